"""Make weights for a model from a few of the user's frames: no labels, no gradient steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..arguments import several, shown
from ..config import GLOBAL, PRE_AA, PaceConfig, check_mode
from ..errors import PaceError, UnsupportedModelError
from ..hosts.base import Host, find_host, value_range
from ..patching.guest import guest
from ..weights.pace import PaceWeights, check_values
from .full_heads import find_full_heads
from .restoration import KEEP_RATIOS, fit_linear

Run = Callable[[Tensor], Any]


def calibrate(
    model: nn.Module,
    clips: Tensor | Iterable[Tensor],
    *,
    mode: str = GLOBAL,
    keep_ratios: Sequence[float] | None = None,
    run: Run | None = None,
) -> PaceWeights:
    """Make weights for `accelerate(model, weights=...)` from frames, in seconds to minutes.

    For global pruning it finds the heads that must see all tokens (`find_full_heads`). For pre-AA pruning it fits the
    linear part of the restoration (`fit_linear`). The model is left as it was.

    Args:
        model: any model that `accelerate` takes, not accelerated.
        clips: one clip or several, images [S, 3, H, W] or [B, S, 3, H, W] in [0, 1] on the model's device. One clip of
            a few dozen frames will do.
        mode: "global" or "pre-aa".
        keep_ratios: the keep ratios that pre-AA pruning is fitted for, together. None is 0.5, 0.3 and 0.15.
        run: how the model is called for global pruning, given images [B, S, 3, H, W]. None calls its
            trunk, the aggregator of a VGGT.

    Returns:
        New weights; `save` writes them.

    Raises:
        PaceError: there are no clips, a clip has a single frame, a setting is out of range, or the model is accelerated
            already.
    """
    check_mode(mode)
    if run is not None and not callable(run):
        raise PaceError(f"run must be a function of images, got {shown(run)}")
    stray = {"run": run} if mode == PRE_AA else {"keep_ratios": keep_ratios}
    if None not in stray.values():
        raise PaceError(f'{", ".join(stray)} does not go with mode="{mode}": leave it out')
    host = find_host(model)
    check_values(host)
    if any(p.is_meta for p in model.parameters()):
        raise UnsupportedModelError(
            "parts of the model are offloaded, so it can't be calibrated: load it whole"
        )
    batches = as_batches(clips, host)
    if mode == PRE_AA:
        ratios = KEEP_RATIOS if keep_ratios is None else keep_ratios
        keep_ratios = tuple(PaceConfig(ratio).keep_ratio for ratio in several("keep_ratios", ratios))
        if not keep_ratios:
            raise PaceError("keep_ratios is empty: give at least one keep ratio to fit the restoration for")
        weights = PaceWeights.new(model, mode=mode, keep_ratios=keep_ratios)
        # Untrained, the others change nothing.
        weights = replace(weights, scorer=None, merge=None, block_deltas=None)
        with guest(model, weights):
            fit_linear(model, batches, weights, keep_ratios)
        return weights
    with guest(model):
        heads, _ = find_full_heads(model, batches, run)
    return PaceWeights.of_heads(host, heads, {"clips": "given to calibrate"})


def as_batches(clips: Tensor | Iterable[Tensor], host: Host) -> Iterable[Tensor]:
    """Clips as images [B, S, 3, H, W], one after another.

    Raises:
        PaceError: one is no such tensor, when it comes.
    """
    if not isinstance(clips, Iterable):
        raise PaceError(f"clips must be images, or several of them, got {type(clips).__name__}")
    for images in [clips] if isinstance(clips, Tensor) else clips:
        if not isinstance(images, Tensor) or images.ndim not in (4, 5):
            what = f"a tensor {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise PaceError(f"clips must be images [S, 3, H, W] or [B, S, 3, H, W], got {what}")
        if images.is_floating_point() and images.numel() and host.far_from_range(*value_range(images)):
            raise PaceError(f"clips must be images in {host.image_values}: {host.image_advice}")
        yield images[None] if images.ndim == 4 else images
