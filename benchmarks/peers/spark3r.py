"""Spark3R (arXiv 2605.06270): a few queries merge, and most keys are left out, more of them the longer the clip."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Attended, Context, Layout, attend_some, token_mask
from .merging import Merge, bipartite_merge

SHORT, KEY_FRAMES = 100, 40  # longer clips have as many keys as so many frames
GROUP = 20  # frames in which queries merge
SENSITIVE = range(11, 17)  # blocks of VGGT-1B
MERGED = ((100, 1), (300, 2), (500, 3))  # frames up to which so many queries become one
MOST_MERGED = 4


@dataclass(frozen=True)
class Spark3R:
    """Every r-th patch token, frame after frame, is a key, and special tokens are.

    Attributes:
        times: multiplies r; the paper has 1.
        outside: multiplies r in blocks that are not sensitive.
    """

    name: ClassVar[str] = "Spark3R"
    paper: ClassVar[str] = "2605.06270"
    swept: ClassVar[str] = "times"
    times: int = 1
    outside: int = 3

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Attended:
        layout = context.layout
        step = key_step(layout.frames) * self.times
        step *= 1 if context.block_of_large in SENSITIVE else self.outside
        number = torch.arange(layout.frames * layout.patches, device=query.device)
        patch = (number % step == 0).view(1, layout.frames, -1).expand(len(query), -1, -1)
        mask = token_mask(torch.ones_like(patch[:, :, 0]), patch, layout)
        merge = merge_in_groups(context.tokens, layout, merged_queries(layout.frames))
        if merge is None:
            return attend_some(query, key, value, mask)
        output, pairs = attend_some(merge.mean(query), key, value, mask)
        return Attended(merge.copied(output), pairs)


def key_step(frames: int) -> int:
    """r of sensitive blocks in a clip of so many frames."""
    return 1 if frames <= SHORT else math.ceil(frames / KEY_FRAMES)


def merged_queries(frames: int) -> int:
    """How many queries become one in a clip of so many frames."""
    return next((count for most, count in MERGED if frames <= most), MOST_MERGED)


def merge_in_groups(tokens: Tensor, layout: Layout, each: int) -> Merge | None:
    """Queries that merge, one of `each` being the destination of others of its group of frames; special ones never do.

    Args:
        tokens: [B, T, C].
        layout: of the clip.
        each: patch tokens that become one; None is given back for 1.
    """
    if each == 1:
        return None
    places, count = [], 0
    for part in tokens.split(GROUP * layout.length, dim=1):
        frames = part.shape[1] // layout.length
        number = torch.arange(frames * layout.patches, device=tokens.device)
        patch = (number % each == 0).view(1, frames, -1).expand(len(tokens), -1, -1)
        destination = token_mask(torch.ones_like(patch[:, :, 0]), patch, layout)
        merge = bipartite_merge(part, destination, part.shape[1])
        places.append(merge.place + count)
        count += merge.count
    return Merge(torch.cat(places, dim=1), count)
