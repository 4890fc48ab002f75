"""Find the full-attention heads of a model: those that lose most where they see the kept tokens alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PaceError
from ..hosts.base import BlockCall
from ..method.full_heads import Heads, choose_full_heads
from ..patching.first_clip import measured, training_free_plan
from ..patching.install import observing, state_of
from ..patching.state import Clip
from ..runtime.attention import half_precision


@torch.no_grad()
def find_full_heads(
    model: nn.Module, clips: Iterable[Tensor], run: Callable[[Tensor], Any] | None = None
) -> tuple[Heads, Tensor]:
    """Run an accelerated model unpruned on every clip, and compare the heads of each global block.

    Each head's output is compared with what it would be if the head saw only tokens that are kept at keep ratio 0.3,
    training-free. See `method.full_heads.head_errors` and `choose_full_heads`.

    Args:
        model: an accelerated model; what it prunes is left aside.
        clips: images [B, S, 3, H, W] in [0, 1] on the model's device.
        run: how the model is called; None calls its trunk, on CUDA under bfloat16 autocast.

    Returns:
        (block, head) of the full-attention heads, and the errors of all heads [blocks, heads].

    Raises:
        PaceError: there are no clips, one has a single frame, or images do not fit.
        UnsupportedModelError: the global blocks are of an unsupported type.
    """
    state = state_of(model)
    host, found = state.host, []
    blocks = host.indices("global")
    for images in clips:
        if images.shape[1] < 2:
            raise PaceError(
                "which heads find matches between frames can't be told from a clip of one frame: give two or more"
            )
        errors: dict[int, Tensor] = {}

        def observer(index: int, call: BlockCall, own: Callable, clip: Clip, errors=errors) -> Any:
            if clip.plan is None:
                features = torch.cat([part for part, _ in clip.parts])
                clip.plan = training_free_plan(state, features, len(call.x))
                clip.parts = []
            args, kwargs = call.arguments()
            errors[index], out = measured(state, index, clip.plan, own, args, kwargs)
            return out

        with observing(model, observer), half_precision(images):
            (run or host.run_trunk)(images)
        if len(errors) != len(blocks):
            raise PaceError(
                f"{len(errors)} of {len(blocks)} global blocks ran, so what their heads lose can't be told: pass run= "
                "with the call that you use"
            )
        found.append(torch.stack([errors[index] for index in blocks]))
    if not found:
        raise PaceError("calibration needs at least one clip, got none")
    mean = torch.stack(found).mean(0)
    return choose_full_heads(mean, blocks), mean
