"""Functions compiled once and for any number of tokens, whatever is in force where they are called."""

from __future__ import annotations

import functools
import itertools
import logging
import types
from collections.abc import Callable, Generator, Hashable, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn, overrides
from torch.nn.modules import module as modules
from torch.utils._device import DeviceContext

from ..errors import PaceError, first_line
from .bare_copy import HOOKS

LOGGER = logging.getLogger("pacevggt_patch")
BACKEND = "inductor"
GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


def compiled(function: types.FunctionType, *key: Hashable) -> Callable[..., Any]:
    """A function of tensors, compiled when it is first called; the first dimension of its tensors is left open.

    That holds for tensors that are arguments themselves; those in lists keep their shapes until they come with others.
    It compiles anew for other dtypes, ranks and constants, with and without gradients, and for each device.

    Args:
        function: a pure function.
        key: calls with another key are compiled on their own, so that no limit on recompilation counts them together.

    Raises:
        PaceError: when it is called, if it can't be compiled on this machine.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        from torch._dynamo.exc import BackendCompilerFailed as Failed  # a second: for those alone who compile

        gradients = torch.is_grad_enabled()
        if not gradients:  # frozen or not, parameters or tensors: all the same then
            args = tuple(_detached(argument) for argument in args)
        for argument in args:
            if isinstance(argument, Tensor):
                torch._dynamo.maybe_mark_dynamic(argument, 0)
        where = (gradients, torch.is_inference_mode_enabled(), _device(args))
        run = _compiled(function, (*key, *where), BACKEND)
        try:
            with outside_modes():
                return run(*args, **kwargs)
        except Failed as error:
            raise PaceError(
                f"torch.compile failed on this machine ({first_line(error)}): pass compile=False"
            ) from error

    return call


def _device(arguments: Iterable[Any]) -> torch.device | None:
    """The device of the first tensor among arguments and lists of them."""
    for argument in arguments:
        found = argument.device if isinstance(argument, Tensor) else None
        if type(argument) is list:
            found = _device(argument)
        if found is not None:
            return found
    return None


def _detached(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.detach()
    return [_detached(value) for value in argument] if type(argument) is list else argument


def unwatched(parts: Iterable[nn.Module]) -> bool:
    """Whether nobody watches, replaced or compiled the forward of these modules, or watches all modules or functions.

    Compiled code would not call hooks, nor run under the modes of others.
    """
    if any(getattr(modules, hooks, None) for hooks in GLOBAL_HOOKS):
        return False
    stack = overrides._get_current_function_mode_stack()
    if not all(isinstance(mode, DeviceContext) or getattr(mode, "ours", False) for mode in stack):
        return False
    return not any("forward" in part.__dict__ or is_watched(part) for part in parts)


def is_watched(part: nn.Module) -> bool:
    """Whether a module has hooks, or was compiled in place."""
    hooked = any(part.__dict__.get(hooks) for hooks in HOOKS)
    return hooked or part.__dict__.get("_compiled_call_impl") is not None


_numbers = itertools.count()


@functools.cache
def _say_once() -> None:
    LOGGER.warning("pacevggt-patch calls torch.compile: the first run takes a minute or so")


@functools.cache
def _compiled(function: types.FunctionType, key: Hashable, backend: str) -> Callable[..., Any]:
    _say_once()
    # What was compiled is kept, counted and limited by code object and its name: each key gets its own.
    name = f"{function.__name__}_{next(_numbers)}"
    code = function.__code__.replace(co_name=name)
    own = types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, backend=backend)


@contextmanager
def outside_modes() -> Generator[None]:
    """Steps out of all torch function modes of this thread: compiled code runs as if none were in force."""
    modes = [overrides._pop_mode() for _ in overrides._get_current_function_mode_stack()]
    try:
        yield
    finally:
        for mode in reversed(modes):
            overrides._push_mode(mode)
