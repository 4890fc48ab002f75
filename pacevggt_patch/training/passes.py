"""One forward pass through the product itself: what is trained is what runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..method.restored_tokens import RestoredTokens
from ..patching.install import retune


class Outputs(NamedTuple):
    """What a model gives for clips [B, S, 3, H, W]; dense parts for n of the frames only.

    Attributes:
        tokens: of all frames.
        dense: of the n frames.
        poses: pose encodings [B, S, 9] of every iteration of the camera head; empty without one.
        depth: [B, n, H, W] and its confidence, or None.
        points: [B, n, H, W, 3] and their confidence [B, n, H, W], or None.
    """

    tokens: RestoredTokens
    dense: RestoredTokens
    poses: list[Tensor]
    depth: tuple[Tensor, Tensor] | None
    points: tuple[Tensor, Tensor] | None


def half_precision(images: Tensor) -> AbstractContextManager:
    """bfloat16 autocast for images on CUDA; elsewhere all is computed as it is stored."""
    return torch.autocast("cuda", torch.bfloat16) if images.is_cuda else nullcontext()


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
    with half_precision(images):
        tokens, start = model.aggregator(images)
        dense, some = tokens.select(frames), images.index_select(1, frames)

        def head(name: str) -> tuple[Tensor, Tensor] | None:
            module: Callable | None = getattr(model, name, None)
            if module is None or not heads:
                return None
            values, confidence = (
                checkpoint(module, dense, some, start, use_reentrant=False)
                if checkpointing
                else module(dense, some, start)
            )
            return values.float(), confidence.float()

        depth, points = head("depth_head"), head("point_head")
    poses: list[Tensor] = []
    if heads and getattr(model, "camera_head", None) is not None:
        narrow = model.aggregator.camera_token.dtype != torch.float32
        with half_precision(images) if narrow else nullcontext():
            poses = [pose.float() for pose in model.camera_head(tokens)]
    if depth is not None:
        depth = depth[0][..., 0], depth[1]
    return Outputs(tokens, dense, poses, depth, points)
