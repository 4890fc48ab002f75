"""Run the host's own heads on restored tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .config import PaceError
from .tokens import RestoredTokens


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

    The chunks are those in which the stock head walks through a clip (its `frames_chunk_size`), so on an unpruned grid
    the outputs are its own. A head that does not work in chunks gets the tokens as they are: they read like a list.

    Args:
        head: a module with `intermediate_layer_idx`.
        stock: its own forward.
        tokens: the restored tokens among the arguments.
        args, kwargs: the arguments of the call.

    Returns:
        What the stock head returns.

    Raises:
        PaceError: the images are not those of the tokens, or the head's outputs can't be joined over frames.
    """
    call = inspect.signature(stock).bind(*args, **kwargs)
    call.apply_defaults()
    total = tokens.kept.shape[1]
    images, frames = call.arguments.get("images"), call.arguments.get("frames_chunk_size", 0)
    if isinstance(images, Tensor) and images.ndim == 5 and images.shape[1] != total:
        raise PaceError(f"{type(head).__name__} got {images.shape[1]} images for the tokens of {total}")
    if not isinstance(images, Tensor) or images.ndim != 5 or (frames is not None and frames < 1):
        return stock(*args, **kwargs)
    frames = frames or total
    name = next(name for name, a in call.arguments.items() if a is tokens)
    outputs = []
    for start in range(0, total, frames):
        stop = min(start + frames, total)
        call.arguments[name] = tokens.frames(start, stop, head.intermediate_layer_idx)
        call.arguments["images"] = images[:, start:stop].contiguous()
        outputs.append(stock(*call.args, **call.kwargs))
    return outputs[0] if len(outputs) == 1 else join(outputs, frames, type(head).__name__)


def join(parts: list[Any], frames: int, head: str) -> Any:
    """Join what a head returned for chunks of `frames` frames: tensors along dimension 1, inside tuples, lists, dicts.

    Raises:
        PaceError: a tensor does not have its frames in dimension 1, or there is something else in the output.
    """
    first = parts[0]
    if isinstance(first, Tensor) and first.ndim > 1 and first.shape[1] == frames:
        return torch.cat(parts, dim=1)
    if isinstance(first, dict):
        return {key: join([part[key] for part in parts], frames, head) for key in first}
    if isinstance(first, (tuple, list)):
        return type(first)(join(list(group), frames, head) for group in zip(*parts, strict=True))
    if first is None:
        return None
    what = f"a tensor {list(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
    raise PaceError(
        f"{head} returned {what} for {frames} frames, which can't be joined over frames: "
        "call it with frames_chunk_size=None"
    )
