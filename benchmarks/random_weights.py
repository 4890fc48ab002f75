"""Values for models that a checkpoint would bring, where none is at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def with_random_weights(model: nn.Module, seed: int, size: float = 0.05) -> Any:
    """The model in evaluation mode, all its values finite and no two parameters alike.

    Args:
        model: on any device. Some leave parameters and a mask empty until a checkpoint comes.
        seed: of what is added to the parameters.
        size: its standard deviation.
    """
    for module in model.modules():
        mask = getattr(module, "bias_mask", None)
        if mask is not None:  # of keys, whose bias DINOv3 leaves out
            mask.fill_(1)
            mask[len(mask) // 3 : 2 * len(mask) // 3] = 0
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in model.named_parameters():
        where = parameter.device
        generator = generators.setdefault(where, torch.Generator(where).manual_seed(seed))
        if name.endswith("gamma"):
            parameter.fill_(0.5)
        elif (
            not parameter.isfinite().all() or parameter.abs().max() > 1e3
        ):  # memory that nobody has written to
            parameter.zero_()
        parameter.add_(size * torch.randn(parameter.shape, generator=generator, device=where))
    return model.eval()
