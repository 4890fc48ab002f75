"""Run the host's own heads on restored tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .config import PaceError
from .tokens import RestoredTokens

# What the stock DPT head defaults to, for hosts whose head does not say.
FRAMES_PER_CHUNK = 8


def restored_argument(args: tuple, kwargs: dict) -> RestoredTokens | None:
    """The restored tokens among the arguments of a head's call, by position or by keyword, or None."""
    return next((a for a in (*args, *kwargs.values()) if isinstance(a, RestoredTokens)), None)


def run_camera_head(stock: Callable, tokens: RestoredTokens, args: tuple, kwargs: dict):
    """Run a camera head on the compact tokens: it reads camera tokens only, and those are never pruned."""
    last = tokens.camera()
    args = tuple(last if a is tokens else a for a in args)
    return stock(*args, **{name: last if a is tokens else a for name, a in kwargs.items()})


def run_dense_head(head: Any, stock: Callable, tokens: RestoredTokens, args: tuple, kwargs: dict):
    """Run a DPT head a chunk of frames at a time, restoring the tokens of just those frames.

    The chunks are those in which the stock head walks through a clip, so on an unpruned grid the outputs are its own.

    Args:
        head: a module with `intermediate_layer_idx`.
        stock: its own forward.
        tokens: the restored tokens among the arguments.
        args, kwargs: the arguments of the call.

    Returns:
        What the stock head returns: one tensor, or a tuple of tensors, frames in dimension 1.
    """
    call = inspect.signature(stock).bind(*args, **kwargs)
    call.apply_defaults()
    name = next(name for name, a in call.arguments.items() if a is tokens)
    images = call.arguments.get("images")
    total = tokens.kept.shape[1]
    if not isinstance(images, Tensor) or images.ndim != 5 or images.shape[1] != total:
        raise PaceError(
            f"{type(head).__name__} must be called with the {total} images of these tokens as images [B, S, 3, H, W]"
        )
    frames = call.arguments.get("frames_chunk_size", FRAMES_PER_CHUNK) or total
    outputs = []
    for start in range(0, total, frames):
        stop = min(start + frames, total)
        call.arguments[name] = tokens.frames(start, stop, head.intermediate_layer_idx)
        call.arguments["images"] = images[:, start:stop].contiguous()
        outputs.append(stock(*call.args, **call.kwargs))
    if len(outputs) == 1:
        return outputs[0]
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs, dim=1)
    return tuple(torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True))
