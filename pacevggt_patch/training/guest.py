"""Being a guest in somebody's model: it is accelerated and frozen meanwhile, and afterwards as it was."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

from ..errors import PaceError
from ..patching.install import accelerate, compile_blocks_alone, is_accelerated, remove
from ..weights.pace import PaceWeights


@contextmanager
def guest(model: nn.Module, weights: PaceWeights, compile: bool = False) -> Generator[None]:
    """Inside the `with` block the model is accelerated with `weights`, in evaluation mode, and needs no gradients.

    Afterwards every flag (`training` of each module, `requires_grad` of each parameter) is what it was, and the model
    is the stock one again, also after an error.

    Args:
        model: a VGGT that is not accelerated.
        weights: on its device.
        compile: run the attention blocks compiled. Dense heads never are: with gradients they take the longest to
            compile, and anew for other numbers of frames.

    Raises:
        PaceError: the model is accelerated already, or the weights do not fit.
    """
    if is_accelerated(model):
        raise PaceError(
            "this model is accelerated already: call pacevggt_patch.remove(model) before training"
        )
    # Values are looked at where they come in; a look in every step would make CUDA wait.
    accelerate(
        model,
        weights=weights,
        check_finite=False,
        min_frames=1,
        dense_frames=weights.dense_frames,
        compile=compile,
    )
    compile_blocks_alone(model)
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
