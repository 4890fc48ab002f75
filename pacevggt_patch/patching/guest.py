"""A model is accelerated and frozen for a while, and afterwards as it was."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

from ..config import GLOBAL, PaceConfig
from ..errors import PaceError
from ..hosts.base import find_host
from ..weights.pace import PaceWeights
from .install import install, is_accelerated, remove


@contextmanager
def guest(model: nn.Module, weights: PaceWeights | None = None, compile: bool = False) -> Generator[None]:
    """Inside the `with` block the model is accelerated, in evaluation mode, and needs no gradients.

    Afterwards every flag (`training` of each module, `requires_grad` of each parameter) is what it was, and the model
    is the stock one again, also after an error.

    Args:
        model: a model that is not accelerated.
        weights: on its device; what is trained is these very modules. None is global pruning without weights.
        compile: run the attention blocks compiled. Dense heads never are: with gradients they take the longest to
            compile, and anew for other numbers of frames.

    Raises:
        PaceError: the model is accelerated already, or the weights do not fit.
    """
    if is_accelerated(model):
        raise PaceError("this model is accelerated already: call pacevggt_patch.remove(model) first")
    host, mode = find_host(model), GLOBAL
    if weights is not None:
        weights.check(host)
        mode = weights.mode
    state = install(model, host, PaceConfig(mode=mode, min_frames=1, compile=compile), weights)
    state.compiles_heads = False
    with as_it_was(model):
        try:
            model.requires_grad_(False)
            yield
        finally:
            remove(model)


@contextmanager
def as_it_was(model: nn.Module) -> Generator[None]:
    """Evaluation mode inside the `with` block; then every flag of modules and parameters is as before."""
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
