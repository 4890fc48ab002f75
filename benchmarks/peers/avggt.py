"""AVGGT (arXiv 2512.02541): early global blocks attend within frames, later ones to a grid of each frame."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Attended, Context, attend, attend_in_frames, cell_corners, token_mask

HIDDEN = -1e4  # a product that no softmax sees
MORE = 8  # channels, of which one is used: kernels want a multiple of that


@dataclass(frozen=True)
class AVGGT:
    """In later blocks a query sees special tokens, the first frame, one token of each cell, itself, and one mean key.

    The mean is that of the keys and values that are left out.

    Attributes:
        side: of a cell, in patches; the paper has 2 and 3.
        early: so many blocks of VGGT-1B attend within frames.
    """

    name: ClassVar[str] = "AVGGT"
    paper: ClassVar[str] = "2512.02541"
    swept: ClassVar[str] = "side"
    side: int = 2
    early: int = 9

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Attended:
        layout = context.layout
        if context.block_of_large < self.early:
            return attend_in_frames(query, key, value, layout)
        patch = cell_corners(layout.grid, self.side, query.device).repeat(1, layout.frames, 1)
        patch[:, 0] = True
        mask = token_mask(patch.any(2), patch, layout)[0]  # [T]
        return attend(query, key, value) if bool(mask.all()) else attend_and_own(query, key, value, mask)


def attend_and_own(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Attended:
    """Attention to the keys of a mask [T], the mean of the others, and the query's own key, in one softmax.

    A channel more of queries holds the product with the own key. One more key picks it, and a channel more of values
    tells how much attention that key got. So a kernel of plain attention does all of it.
    """
    width = query.shape[3]
    own = (query * key).sum(-1)  # [B, heads, T]
    queries = F.pad(query, (0, MORE))
    queries[..., width] = own.masked_fill(mask, HIDDEN)  # those of the mask are seen already
    # [B, heads, m + 2, d + MORE]: the mask's, the mean, and the one that stands for the own.
    keys, values = (F.pad(joined_to_mean(t, mask), (0, MORE, 0, 1)) for t in (key, value))
    keys[:, :, -1, width] = values[:, :, -1, width] = 1
    found = attend(queries, keys, values, scale=width**-0.5)
    hidden = math.prod(query.shape[:2]) * int(mask.sum())
    output, share = found.output[..., :width], found.output[..., width, None]
    return Attended(output + share * value, found.pairs - hidden)


def joined_to_mean(tensor: Tensor, mask: Tensor) -> Tensor:
    """Rows of [B, heads, T, d] in a mask [T], and behind them the mean of the others."""
    return torch.cat([tensor[:, :, mask], tensor[:, :, ~mask].mean(2, keepdim=True)], dim=2)
