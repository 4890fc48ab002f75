"""What rules share: the tokens of a clip, attention that counts its pairs, and parts of frames."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS = 24  # global blocks of VGGT-1B, in whose numbers papers speak


class Layout(NamedTuple):
    """Which tokens a clip has: of S frames one after another, n special and P patch tokens in raster order each.

    Attributes:
        frames, special: S and n.
        grid: patch rows and columns.
    """

    frames: int
    special: int
    grid: tuple[int, int]

    @property
    def patches(self) -> int:
        """P, of a frame."""
        return self.grid[0] * self.grid[1]

    @property
    def length(self) -> int:
        """L, all tokens of a frame."""
        return self.special + self.patches

    @property
    def tokens(self) -> int:
        """T, all tokens of the clip."""
        return self.frames * self.length


@dataclass(frozen=True)
class Context:
    """What a rule may look at besides queries, keys and values.

    Attributes:
        layout: of each clip.
        block, depth: number of this global block, and how many there are.
        tokens: [B, T, C] normed tokens that enter the attention of this block.
        features: [B, S, P, C] patch tokens as they enter the first block.
        images: [B, S, 3, H, W].
        memory: what a rule leaves for later blocks of the same forward.
    """

    layout: Layout
    block: int
    depth: int
    tokens: Tensor
    features: Tensor
    images: Tensor
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def block_of_large(self) -> int:
        """Number of the block of VGGT-1B that lies as deep as the middle of this one."""
        return int((self.block + 0.5) * BLOCKS / self.depth)


class Attended(NamedTuple):
    """What heads put out, [B, heads, T, d], and how many pairs of queries and keys that took, over clips and heads."""

    output: Tensor
    pairs: int


class Rule(Protocol):
    """A rule of attention. Its fields are its parameters.

    Attributes:
        name, paper: what it is called, and its number on arXiv.
        swept: the parameter that is swept.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    swept: ClassVar[str]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Attended:
        """Attention of one global block; queries, keys and values are [B, heads, T, d]."""
        ...


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Attended:
    """Plain attention, every pair that the mask leaves counted.

    Args:
        query: [B, heads, L, d].
        key, value: [B, heads, m, d].
        mask: [..., L, m] (bool), which keys a query sees; None is all.
        scale: factor of the products; None is d ** -0.5.
    """
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    shape = (*query.shape[:-1], key.shape[2])
    pairs = math.prod(shape) if mask is None else int(mask.expand(shape).sum())
    return Attended(output, pairs)


def attend_some(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Attended:
    """All queries see the same keys: those of a mask [B, T] (bool), as many in each clip."""
    if bool(mask.all()):
        return attend(query, key, value)
    index = mask.nonzero()[:, 1].view(len(mask), 1, -1, 1)  # [B, 1, m, 1]
    index = index.expand(-1, key.shape[1], -1, key.shape[3])
    return attend(query, key.gather(2, index), value.gather(2, index))


def attend_in_frames(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Attended:
    """Tokens see those of their own frame."""
    parts = (t.unflatten(2, (layout.frames, -1)).transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    output, pairs = attend(*parts)  # [B * S, heads, L, d]
    return Attended(output.unflatten(0, (-1, layout.frames)).transpose(1, 2).flatten(2, 3), pairs)


def token_mask(special: Tensor, patch: Tensor, layout: Layout) -> Tensor:
    """A mask [B, T] from one of frames, for their special tokens, and one of patch tokens.

    Args:
        special: [B, S] (bool).
        patch: [B, S, P] (bool).
        layout: of the clip.
    """
    special = special[:, :, None].expand(-1, -1, layout.special)
    return torch.cat([special, patch], dim=2).flatten(1)


def cell_corners(grid: tuple[int, int], side: int, device: torch.device) -> Tensor:
    """One patch of each cell of `side` x `side` patches, the first in raster order, as a mask [P]."""
    y, x = (torch.arange(size, device=device) % side == 0 for size in grid)
    return (y[:, None] & x).flatten()


def best_of_cells(scores: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """The patch of each cell with the largest score, as a mask [B, S, P].

    Args:
        scores: [B, S, P].
        grid: patch rows and columns; cells at the lower and right edge may be smaller.
        side: of a cell, in patches.
    """
    rows, columns = grid
    wide = F.pad(
        scores.unflatten(2, grid), (0, -columns % side, 0, -rows % side), value=-torch.inf
    )  # [B, S, H', W']
    cells = wide.unflatten(3, (-1, side)).unflatten(2, (-1, side)).transpose(3, 4)  # [B, S, h, w, side, side]
    best = F.one_hot(cells.flatten(4).argmax(4), side**2).bool().view(cells.shape)
    return best.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :rows, :columns].flatten(2)
