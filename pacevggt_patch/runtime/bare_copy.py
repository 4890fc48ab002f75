"""A second module on the same tensors, that nobody watches: to try things out on."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def bare_copy(
    module: Any, values: Callable[[Tensor], Tensor] | None = None, known: dict | None = None
) -> Any:
    """The module and all in it once more, without hooks, uncompiled, in evaluation mode; the module is left alone.

    In evaluation mode batch norms do not write, and dropout draws nothing from the user's random state. Lists and
    dictionaries of its attributes are copied, one level deep, and so are objects that hold dictionaries alone: caches.

    Args:
        module: any module.
        values: gives the values of a parameter or buffer; None: the very same tensors.
        known: copies by `id` of modules that were copied already: what is shared stays shared.
    """
    known = {} if known is None else known
    module = unwrapped(module)
    if id(module) in known:
        return known[id(module)]
    bare = known[id(module)] = type(module).__new__(type(module))

    def again(value: Any) -> Any:
        if isinstance(value, types.MethodType) and id(value.__self__) in known:
            return types.MethodType(value.__func__, known[id(value.__self__)])
        if type(value) in (dict, list):
            return type(value)(value)
        held = getattr(value, "__dict__", {})
        if isinstance(value, type) or not held or any(type(part) is not dict for part in held.values()):
            return value
        another = copy.copy(value)
        another.__dict__ = {name: dict(part) for name, part in held.items()}
        return another

    own = {k: v for k, v in module.__dict__.items() if not getattr(v, "pacevggt", False)}
    bare.__dict__ = {k: again(v) for k, v in own.items()} | {"training": False}
    for name in HOOKS:
        bare.__dict__[name] = OrderedDict()

    def copied(tensor: Any) -> Any:
        if tensor is None or values is None:
            return tensor
        return (
            nn.Parameter(values(tensor), requires_grad=False) if isinstance(tensor, nn.Parameter) else tensor
        )

    bare._parameters = {name: copied(p) for name, p in module._parameters.items()}
    bare._buffers = dict(module._buffers)
    if values is not None:
        bare._buffers = {k: None if b is None else b.detach().to("cpu") for k, b in bare._buffers.items()}
    bare._modules = {
        name: None if m is None else bare_copy(m, values, known) for name, m in module._modules.items()
    }
    return bare


def unwrapped(module: Any) -> Any:
    """The module inside of one that `torch.compile` made."""
    return module._modules.get("_orig_mod", module)


def on_cpu(tensor: Tensor) -> Tensor:
    """A tensor in float32 on the CPU, shared where it is that already."""
    return tensor.detach().to("cpu", torch.float32)
