"""Fit the linear part of the restoration of pre-AA pruning, in closed form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PaceError
from ..method.regression import solve_ridge
from ..method.restoration import reading
from ..method.restored_tokens import RestoredTokens
from ..patching.heads import TokenList, tokens_of
from ..patching.install import retune, state_of
from ..runtime.attention import half_precision
from ..weights.pace import PaceWeights

KEEP_RATIOS = (0.5, 0.3, 0.15)
RIDGE = 0.01  # relative to the mean eigenvalue
FRAMES = 8  # frames whose dense tokens exist at a time


@torch.no_grad()
def fit_linear(
    model: nn.Module, clips: Iterable[Tensor], weights: PaceWeights, keep_ratios: Sequence[float]
) -> None:
    """Fit `weights.restoration.linear` to the unpruned model, by ridge regression.

    For each cached layer it finds the matrix A that minimises the sum of |t_i - r_i - A d_i|^2 plus lambda |A|^2, over
    the dropped tokens i of all clips and keep ratios:

    - t_i is the token of the unpruned model, and r_i what is restored without a linear part.
    - d_i = f_i - sum_j w_ij f_j is the feature difference that `FeatureGuidedRestoration` takes.
    - lambda is RIDGE times the mean eigenvalue of sum d d^T.

    Memory does not grow with the number of clips.

    Args:
        model: accelerated with these weights.
        clips: images [B, S, 3, H, W].
        weights: of pre-AA pruning, changed in place.
        keep_ratios: fitted together.

    Raises:
        PaceError: there are no clips.
    """
    assert weights.restoration is not None
    linear: list[Any] = list(weights.restoration.linear)
    for layer in linear:
        layer.weight.zero_()
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    for images in clips:
        teacher = _tokens(model, images, 1.0)
        for ratio in keep_ratios:
            student = _tokens(model, images, ratio)
            for start in range(0, images.shape[1], FRAMES):
                accumulate(sums, student, teacher, range(start, min(start + FRAMES, images.shape[1])))
    if not sums:
        raise PaceError("calibration needs at least one clip, got none")
    for layer, (squares, products) in sums.items():
        level = RIDGE * squares.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        solution = solve_ridge(squares, products, level)  # [C, 2C]
        linear[weights.restoration.layers.index(layer)].weight.copy_(solution.T)


def _tokens(model: nn.Module, images: Tensor, keep_ratio: float) -> RestoredTokens | TokenList:
    retune(model, keep_ratio)
    host = state_of(model).host
    grid = images.shape[-2] // host.patch_size, images.shape[-1] // host.patch_size
    with half_precision(images):
        return tokens_of(host.run_trunk(images)[0], grid, host.special_tokens)


def accumulate(sums: dict[int, tuple[Tensor, Tensor]], student: Any, teacher: Any, frames: range) -> None:
    """Add d d^T [C, C] and d (t - r)^T [C, 2C] (float64) over the dropped tokens of some frames, layer by layer.

    Kept tokens pass a restoration unchanged: they tell nothing.
    """
    module = student.restoration
    if module is None:
        return
    layers = [layer for layer in module.layers if layer in student.layers]
    restored: list[Any] = student.frames(frames.start, frames.stop, layers)
    wanted: list[Any] = teacher.frames(frames.start, frames.stop, layers)
    kept = student.kept[:, frames.start : frames.stop].flatten(0, 1)
    features = student.features[:, frames.start : frames.stop].flatten(0, 1)
    with torch.autocast(features.device.type, enabled=False):
        _, difference, _ = reading(features, kept, student.grid, module)  # [N, P, C]
        dropped = torch.ones(difference.shape[:2], device=kept.device).scatter_(1, kept, 0.0)  # [N, P]
        rows = (difference * dropped.unsqueeze(-1)).flatten(0, 1).double()  # [N*P, C]
        for layer in layers:
            missing = (wanted[layer] - restored[layer])[:, :, student.special :]
            products = rows.T @ missing.flatten(0, 2).double()
            before = sums.get(layer, (0.0, 0.0))
            sums[layer] = before[0] + rows.T @ rows, before[1] + products
