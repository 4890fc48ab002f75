"""Run a module with other tensors in place of some of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class OtherParameters(TorchFunctionMode):
    """Torch's functions take other tensors in place of some parameters inside its block of code, in this thread alone.

    The modules that hold the parameters, their hooks and other threads see nothing of it. Parameters inside of lists,
    and those that a custom `autograd.Function` is applied to, are not replaced.

    Args:
        others: `id` of a parameter -> what is taken in its place.
    """

    ours = True  # compiled code is given the others directly

    def __init__(self, others: Mapping[int, Tensor]):
        super().__init__()
        self.others = others

    @classmethod
    def of(cls, module: nn.Module, others: Mapping[str, Tensor]) -> OtherParameters:
        """Others for parameters of a module by their names, as they were before a compiler wrapped parts of it."""
        return cls(
            {id(p): others[n] for name, p in module.named_parameters() if (n := plain_name(name)) in others}
        )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def other(value):
            # A look at the kind first: compilers can't take the id of everything.
            return self.others.get(id(value), value) if isinstance(value, nn.Parameter) else value

        return func(*map(other, args), **{name: other(value) for name, value in (kwargs or {}).items()})


def plain_name(name: str) -> str:
    """The name of a parameter without what `torch.compile` puts into it."""
    return name.replace("_orig_mod.", "")


class _Around(nn.Module):
    """A function around a module as the forward of another, so that `functional_call` can run it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


def run_with(
    module: nn.Module,
    others: Mapping[str, Tensor],
    function: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """A function around a module with other parameters, in a way that a compiler can trace."""
    named = {f"module.{name}": value for name, value in others.items()}
    return torch.func.functional_call(_Around(module), named, (function, *args), kwargs, tie_weights=False)
