"""Make weights for a model from a few of the user's frames: no labels, no gradient steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import GLOBAL, MODES, PRE_AA, PaceConfig
from ..errors import PaceError
from ..hosts.base import find_host
from ..patching.install import install, is_accelerated, remove
from ..weights.pace import PaceWeights, check_values
from .full_heads import find_full_heads
from .restoration import KEEP_RATIOS, fit_restoration

Run = Callable[[Tensor], Any]


def calibrate(
    model: nn.Module,
    clips: Tensor | Iterable[Tensor],
    *,
    mode: str = GLOBAL,
    keep_ratios: Sequence[float] = KEEP_RATIOS,
    run: Run | None = None,
) -> PaceWeights:
    """Weights for `accelerate(model, weights=...)`, in seconds to minutes.

    Global pruning: the heads that must see all tokens, see `find_full_heads`. Pre-AA pruning: the linear part of the
    restoration, see `fit_restoration`. The model is left as it was.

    Args:
        model: any model that `accelerate` takes; not accelerated.
        clips: one clip or several, images [S, 3, H, W] or [B, S, 3, H, W] in [0, 1] on the model's device. One clip of
            a few dozen frames will do.
        mode: "global" or "pre-aa".
        keep_ratios: of pre-AA pruning, keep ratios that the restoration is fitted for, together.
        run: of global pruning, how the model is called, given images [B, S, 3, H, W]; its aggregator alone if not
            given.

    Returns:
        New weights; `save` writes them.

    Raises:
        PaceError: there are no clips, a clip has a single frame, a setting is out of range, or the model is accelerated
            already.
    """
    if mode not in MODES:
        raise PaceError(f'mode must be "global" or "pre-aa", got {mode!r}')
    if is_accelerated(model):
        raise PaceError(
            "this model is accelerated already: call pacevggt_patch.remove(model) before calibrating it"
        )
    host = find_host(model)
    check_values(host)
    batches = as_batches(clips, host.reference.device)
    if mode == PRE_AA:
        keep_ratios = tuple(PaceConfig(ratio).keep_ratio for ratio in keep_ratios)
        if not keep_ratios:
            raise PaceError("keep_ratios is empty: give at least one keep ratio to fit the restoration for")
        weights = PaceWeights.new(model, mode=mode, keep_ratios=keep_ratios)
        weights = replace(
            weights, scorer=None, merge=None, block_deltas=None
        )  # untrained, they change nothing
        fit_restoration(model, batches, weights, keep_ratios)
        return weights
    training = [(module, module.training) for module in model.modules()]
    install(model, host, PaceConfig(mode=mode, min_frames=1), None)
    try:
        model.eval()
        heads, _ = find_full_heads(model, batches, run)
    finally:
        for module, flag in training:
            module.training = flag
        remove(model)
    return PaceWeights.of_heads(host, heads, {"clips": "given to calibrate"})


def as_batches(clips: Tensor | Iterable[Tensor], device: torch.device) -> Iterable[Tensor]:
    """Clips as images [B, S, 3, H, W], one after another.

    Raises:
        PaceError: one is no such tensor, when it comes.
    """
    if isinstance(clips, Tensor):
        clips = [clips]
    for images in clips:
        if not isinstance(images, Tensor) or images.ndim not in (4, 5):
            what = f"a tensor {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise PaceError(f"clips must be images [S, 3, H, W] or [B, S, 3, H, W], got {what}")
        yield images[None] if images.ndim == 4 else images
