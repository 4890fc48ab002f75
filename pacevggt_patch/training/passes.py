"""One forward pass through the product itself: what is trained is what runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..method.restored_tokens import RestoredTokens
from ..patching.heads import TokenList, tokens_of
from ..patching.install import retune
from ..runtime.attention import half_precision


class Outputs(NamedTuple):
    """What a model gives for clips [B, S, 3, H, W]; dense parts for n of the frames only.

    Attributes:
        tokens: of all frames.
        dense: of the n frames.
        poses: pose encodings [B, S, 9] of every iteration of the camera head; empty without one.
        depth: [B, n, H, W] and its confidence, or None.
        points: [B, n, H, W, 3] and their confidence [B, n, H, W], or None.
    """

    tokens: RestoredTokens | TokenList
    dense: RestoredTokens | TokenList
    poses: list[Tensor]
    depth: tuple[Tensor, Tensor] | None
    points: tuple[Tensor, Tensor] | None


def run(
    model: Any,
    images: Tensor,
    frames: Tensor,
    keep_ratio: float,
    merge_budget: float | None = None,
    *,
    checkpointing: bool = False,
    heads: bool = True,
) -> Outputs:
    """Aggregator and heads of an accelerated model.

    On CUDA everything but the camera head of a float32 model, which sees a few tokens only, runs under bfloat16
    autocast.

    Args:
        model: an accelerated VGGT (see `guest`); its settings become the given ones.
        images: [B, S, 3, H, W] in [0, 1].
        frames: [n] numbers of the frames for which depth and points are wanted, on the device.
        keep_ratio, merge_budget: as in `accelerate`; 1 is the unpruned model, the teacher.
        checkpointing: keep little for the backward pass and compute it once more.
        heads: whether to run camera, depth and point heads.
    """
    retune(model, keep_ratio, merge_budget, checkpointing=checkpointing)
    # Tensors that the model makes on its way are made on the device: nothing waits, and graphs can be recorded.
    with half_precision(images), images.device:
        found, start = model.aggregator(images)
        tokens = tokens_of(found, _grid(model, images), start)
        dense, some = tokens.select(frames), images.index_select(1, frames)
        entering = dense if isinstance(dense, RestoredTokens) else dense.list

        def head(name: str) -> tuple[Tensor, Tensor] | None:
            module: Callable | None = getattr(model, name, None)
            if module is None or not heads:
                return None
            values, confidence = (
                checkpoint(module, entering, some, start, use_reentrant=False)
                if checkpointing
                else module(entering, some, start)
            )
            return values.float(), confidence.float()

        depth, points = head("depth_head"), head("point_head")
    poses: list[Tensor] = []
    if heads and getattr(model, "camera_head", None) is not None:
        narrow = model.aggregator.camera_token.dtype != torch.float32
        with half_precision(images) if narrow else nullcontext():
            poses = [pose.float() for pose in model.camera_head(found)]
    if depth is not None:
        depth = depth[0][..., 0], depth[1]
    return Outputs(tokens, dense, poses, depth, points)


def _grid(model: Any, images: Tensor) -> tuple[int, int]:
    patch = int(model.aggregator.patch_size)
    return images.shape[-2] // patch, images.shape[-1] // patch
