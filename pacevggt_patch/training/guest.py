"""A model in training is accelerated and frozen meanwhile, and afterwards as it was."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

from ..config import PaceConfig
from ..errors import PaceError
from ..hosts.base import find_host
from ..patching.install import install, is_accelerated, remove
from ..weights.pace import PaceWeights


@contextmanager
def guest(model: nn.Module, weights: PaceWeights, compile: bool = False) -> Generator[None]:
    """Inside the `with` block the model is accelerated with `weights`, in evaluation mode, and needs no gradients.

    Afterwards every flag (`training` of each module, `requires_grad` of each parameter) is what it was, and the model
    is the stock one again, also after an error.

    Args:
        model: a model that is not accelerated.
        weights: on its device; what is trained is these very modules.
        compile: run the attention blocks compiled. Dense heads never are: with gradients they take the longest to
            compile, and anew for other numbers of frames.

    Raises:
        PaceError: the model is accelerated already, or the weights do not fit.
    """
    if is_accelerated(model):
        raise PaceError(
            "this model is accelerated already: call pacevggt_patch.remove(model) before training"
        )
    host = find_host(model)
    weights.check(host)
    state = install(model, host, PaceConfig(mode=weights.mode, min_frames=1, compile=compile), weights)
    state.compiles_heads = False
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        remove(model)
