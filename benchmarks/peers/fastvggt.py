"""FastVGGT (arXiv 2509.02560): tokens merge before global attention, and its outputs are copied back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Attended, Context, attend, best_of_cells, token_mask
from .merging import Merge, bipartite_merge

SIDE = 2  # of the cells with one destination each


@dataclass(frozen=True)
class FastVGGT:
    """Others join the destination that is most like them: one token of each cell, by chance, or one of the first frame.

    Attributes:
        merged: share of all tokens that joins, if so many are no destinations.
    """

    name: ClassVar[str] = "FastVGGT"
    paper: ClassVar[str] = "2509.02560"
    swept: ClassVar[str] = "merged"
    merged: float = 0.9

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Attended:
        generator = torch.Generator().manual_seed(context.block)
        by_chance = torch.rand(context.features.shape[1:3], generator=generator).to(query.device)
        by_chance = by_chance.expand(len(query), -1, -1)  # clips of a batch do not change each other
        return attend_merged(query, key, value, merge_by(by_chance, self.merged, context))


def merge_by(scores: Tensor, merged: float, context: Context) -> Merge:
    """Destinations are the best of each cell by `scores` [B, S, P], the first frame, and special tokens."""
    layout = context.layout
    patch = best_of_cells(scores, layout.grid, SIDE)
    patch[:, 0] = True
    destination = token_mask(torch.ones_like(patch[:, :, 0]), patch, layout)
    return bipartite_merge(context.tokens, destination, int(merged * layout.tokens))


def attend_merged(query: Tensor, key: Tensor, value: Tensor, merge: Merge) -> Attended:
    """Attention of merged queries to merged keys; each token gets the output of what it is part of."""
    output, pairs = attend(merge.mean(query), merge.mean(key), merge.mean(value))
    return Attended(merge.copied(output), pairs)
