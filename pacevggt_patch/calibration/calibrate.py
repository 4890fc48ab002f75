"""Calibration on a few frames without gradient steps: the linear part of the restoration, or the matching heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import PaceError
from ..method.restoration import reading
from ..method.restored_tokens import RestoredTokens
from ..training.guest import guest
from ..training.passes import run
from ..weights.pace import PaceWeights
from .full_heads import find_matching_heads

KEEP_RATIOS = (0.5, 0.3, 0.15)
RIDGE = 0.01
FRAMES = 8  # frames whose dense tokens exist at a time


def calibrate(
    model: Any,
    clips: Iterable[Tensor],
    weights: PaceWeights | None = None,
    *,
    keep_ratios: Sequence[float] = KEEP_RATIOS,
    ridge: float = RIDGE,
) -> PaceWeights:
    """Make weights fit a few clips of the user's, in seconds to minutes and without gradient steps.

    Weights for dense frames get the heads that must see all tokens, see `matching.find_matching_heads`. All others get
    the linear part of the restoration, by ridge regression against the unpruned model:

    For each cached layer it finds the matrix A that minimises, over the dropped tokens i of all clips and keep ratios,
    the sum of |t_i - r_i - A d_i|^2 plus lambda |A|^2: t is the token of the unpruned model, r what is restored without
    a linear part, and d_i = f_i - sum_j w_ij f_j the feature difference that `FeatureGuidedRestoration` takes; lambda
    is `ridge` times the mean eigenvalue of sum d d^T.

    Two forward passes for each clip and one for each keep ratio; memory does not grow with the number of clips.

    Args:
        model: any VGGT that `accelerate` takes; it is left as it was.
        clips: images [S, 3, H, W] or [B, S, 3, H, W] in [0, 1] on the model's device; a few dozen frames will do.
        weights: what to start from; the linear part or the matching heads are replaced, all else stays. None starts
            from untrained weights; for dense frames pass `PaceWeights.new(model, dense_frames=True)`.
        keep_ratios: keep ratios that the linear part is fitted for, together; matching heads are the same for all.
        ridge: strength of the ridge, relative; for it alone.

    Returns:
        `weights`, changed in place, or new ones.

    Raises:
        PaceError: there are no clips, a setting is out of range, or the model is accelerated already.
    """
    weights = weights or PaceWeights.new(model, keep_ratios=keep_ratios)
    with guest(model, weights):
        if weights.dense_frames:
            weights.matching, _ = find_matching_heads(model, clips)
            weights.keep_ratios = weights.keep_ratios or tuple(float(ratio) for ratio in keep_ratios)
        else:
            fit_linear(model, clips, weights, keep_ratios, ridge)
    return weights


@torch.no_grad()
def fit_linear(
    model: Any, clips: Iterable[Tensor], weights: PaceWeights, keep_ratios: Sequence[float], ridge: float
) -> None:
    """`calibrate` for a model that is accelerated with these weights."""
    assert weights.restoration is not None
    linear: list[Any] = list(weights.restoration.linear)
    for layer in linear:
        layer.weight.zero_()
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    for images in clips:
        images = images[None] if images.ndim == 4 else images
        none = torch.arange(0, device=images.device)
        teacher = run(model, images, none, 1.0, heads=False).tokens
        for ratio in keep_ratios:
            student = run(model, images, none, ratio, heads=False).tokens
            for start in range(0, images.shape[1], FRAMES):
                accumulate(sums, student, teacher, range(start, min(start + FRAMES, images.shape[1])))
    if not sums:
        raise PaceError("calibration needs at least one clip, got none")
    for layer, (squares, products) in sums.items():
        level = ridge * squares.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        eye = torch.eye(len(squares), dtype=squares.dtype, device=squares.device)
        solution = torch.linalg.solve(squares + level * eye, products)  # [C, 2C]
        linear[weights.restoration.layers.index(layer)].weight.copy_(solution.T)


def accumulate(
    sums: dict[int, tuple[Tensor, Tensor]], student: RestoredTokens, teacher: RestoredTokens, frames: range
) -> None:
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
