"""A function of many rows on a few of them at a time, which bounds the memory of what it makes on the way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Hidden layers of MLPs stay below this. From 32 MiB on the C library asks the system for fresh memory each time.
HIDDEN_BYTES = {"cpu": 2**23, "gpu": 2**30}


def chunk_rows(channels: int, device: torch.device) -> int:
    """Rows of so many numbers each whose hidden layer, four times as wide in float32, stays below HIDDEN_BYTES."""
    return max(1, HIDDEN_BYTES["cpu" if device.type == "cpu" else "gpu"] // (16 * channels))


def in_chunks(
    function: Callable[..., tuple[Tensor, ...]], size: int, *tensors: Tensor | None, dim: int = 0
) -> tuple[Tensor, ...]:
    """What `function` gives of all rows, if it looks at each by itself.

    Args:
        function: of the tensors; what it returns has the same rows in the same dimension.
        size: rows at a time, at most. A compiler gets all at once, since it would write every chunk out, and so do
            gradients, which keep everything anyway.
        tensors: with as many rows each, or None, which stays None.
        dim: of the rows.
    """
    rows = next(t.shape[dim] for t in tensors if t is not None)
    if rows <= size or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return function(*tensors)
    chunks = -(-rows // size)
    whole: tuple[Tensor, ...] = ()
    for i in range(chunks):
        # As even as can be: what is compiled is made anew for a single row.
        start = i * rows // chunks
        here = (i + 1) * rows // chunks - start
        parts = function(*(None if t is None else t.narrow(dim, start, here) for t in tensors))
        if not whole:
            # Not joined at the end, when all parts would be there twice.
            shapes = [(*p.shape[:dim], rows, *p.shape[dim + 1 :]) for p in parts]
            whole = tuple(p.new_empty(shape) for p, shape in zip(parts, shapes, strict=True))
        for joined, part in zip(whole, parts, strict=True):
            joined.narrow(dim, start, here).copy_(part)
        del parts
    return whole
