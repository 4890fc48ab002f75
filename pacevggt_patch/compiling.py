"""Functions compiled once and for any number of tokens, whatever is in force where they are called."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, overrides

BACKEND = "inductor"


def compiled(function: types.FunctionType, *key: Hashable) -> Callable[..., Any]:
    """A function of tensors, compiled when it is first called; the first dimension of its tensors is left open.

    That holds for tensors that are arguments themselves; those in lists keep their shapes until they come with others.
    It compiles anew for other dtypes, ranks and constants.

    Args:
        function: a pure function.
        key: calls with another key are compiled on their own, so that no limit on recompilation counts them together.
    """
    run = _compiled(function, key, BACKEND)

    @functools.wraps(function)
    def call(*args, **kwargs):
        for argument in args:
            if isinstance(argument, Tensor):
                torch._dynamo.maybe_mark_dynamic(argument, 0)
        with outside_modes():
            return run(*args, **kwargs)

    return call


@functools.cache
def _compiled(function: types.FunctionType, key: Hashable, backend: str) -> Callable[..., Any]:
    # What was compiled is kept, counted and limited by code object and its name: each key gets its own.
    name = f"{function.__name__}_{abs(hash((function.__qualname__, key, backend))):x}"
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
