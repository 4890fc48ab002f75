"""Block-sparse global attention (arXiv 2509.07120): each block of queries sees the blocks of keys most like it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Attended, Context, attend

SIZE = 64  # tokens of a block
GATHERED = 2**27  # numbers of gathered keys at a time


@dataclass(frozen=True)
class BlockSparse:
    """Blocks are runs of patch tokens. Which see each other follows from attention between their means.

    Special tokens see all, and all see them.

    Attributes:
        share: of the blocks of keys that a block of queries sees, rounded up.
        size: tokens of a block.
    """

    name: ClassVar[str] = "block-sparse"
    paper: ClassVar[str] = "2509.07120"
    swept: ClassVar[str] = "share"
    share: float = 0.25
    size: int = SIZE

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Attended:
        layout = context.layout
        number = torch.arange(layout.tokens, device=query.device)
        special = number % layout.length < layout.special  # [T]
        output = torch.empty_like(query)
        output[:, :, special], pairs = attend(query[:, :, special], key, value)
        found = attend_blocks(query, key, value, special, self.share, self.size)
        output[:, :, ~special] = found.output
        return Attended(output, pairs + found.pairs)


def attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, special: Tensor, share: float, size: int
) -> Attended:
    """Attention [B, heads, S * P, d] of patch tokens to special ones and to a share of the blocks.

    Args:
        query, key, value: [B, heads, T, d].
        special: [T] (bool).
        share, size: see `BlockSparse`.
    """
    batch, heads, _, width = query.shape
    length = int((~special).sum())
    queries, keys, values = (in_blocks(t[:, :, ~special].flatten(0, 1), size) for t in (query, key, value))
    always = [t[:, :, special].flatten(0, 1)[:, None] for t in (key, value)]  # [B * heads, 1, S * n, d]
    blocks = keys.shape[1]
    real = torch.arange(blocks * size, device=query.device).view(blocks, size) < length
    means = [t.sum(2) / real.sum(1)[:, None] for t in (queries, keys)]  # [B * heads, blocks, d] each
    # Softmax leaves the order of a row as it is.
    best = (means[0] @ means[1].mT).topk(math.ceil(share * blocks), dim=2).indices  # [B * heads, blocks, m]
    sizes = real.sum(1)
    # [B * heads, blocks], of a query in each block.
    seen_keys = sizes[best].sum(2) + always[0].shape[2]
    row = torch.arange(batch * heads, device=query.device)[:, None, None]
    step = max(1, GATHERED // (batch * heads * best.shape[2] * size * width))
    outputs = []
    for some, seen in zip(queries.split(step, dim=1), best.split(step, dim=1), strict=True):
        near_keys, near_values = (
            torch.cat([t[row, seen].flatten(2, 3), more.expand(-1, seen.shape[1], -1, -1)], dim=2)
            for t, more in zip((keys, values), always, strict=True)
        )  # [B * heads, blocks, m * size + S * n, d]
        mask = None
        if blocks * size > length:
            mask = F.pad(real[seen].flatten(2), (0, always[0].shape[2]), value=True)[:, :, None]
        outputs.append(attend(some, near_keys, near_values, mask).output)
    output = torch.cat(outputs, dim=1).flatten(1, 2)[:, :length]
    return Attended(output.unflatten(0, (batch, heads)), int((seen_keys * sizes).sum()))


def in_blocks(tensor: Tensor, size: int) -> Tensor:
    """Rows [N, L, d] in blocks of `size`, the last one padded with zeros: [N, blocks, size, d]."""
    return F.pad(tensor, (0, 0, 0, -tensor.shape[1] % size)).unflatten(1, (-1, size))
