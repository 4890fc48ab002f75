"""Good Token Hunting (arXiv 2605.23892): keys of a few frames that differ, thinned in early blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Attended, Context, attend_in_frames, attend_some, cell_corners, token_mask

SIDE = 3  # of the cells with one key each, in patches


@dataclass(frozen=True)
class GoodTokens:
    """Keys are tokens of key frames: the first, and then always the frame that is least like those before.

    Attributes:
        frames: key frames.
        in_frames: so many blocks of VGGT-1B attend within frames,
        thinned: and those that follow, up to this one, have one key of each cell.
    """

    name: ClassVar[str] = "Good Token Hunting"
    paper: ClassVar[str] = "2605.23892"
    swept: ClassVar[str] = "frames"
    frames: int = 25
    in_frames: int = 2
    thinned: int = 9

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Attended:
        layout, block = context.layout, context.block_of_large
        if block < self.in_frames:
            return attend_in_frames(query, key, value, layout)
        if "key frames" not in context.memory:
            context.memory["key frames"] = farthest_frames(context.features, self.frames)
        chosen = context.memory["key frames"]  # [B, S]
        side = SIDE if block < self.thinned else 1
        patch = cell_corners(layout.grid, side, query.device) & chosen[:, :, None]  # [B, S, P]
        return attend_some(query, key, value, token_mask(chosen, patch, layout))


def farthest_frames(features: Tensor, count: int) -> Tensor:
    """Frames by farthest point sampling on the cosine of their mean features, the first frame first: a mask [B, S].

    Args:
        features: [B, S, P, C].
        count: of frames; all, if there are not so many.
    """
    unit = F.normalize(features.mean(2), dim=-1)  # [B, S, C]
    distances = 1 - unit @ unit.mT  # [B, S, S]
    chosen = torch.zeros(unit.shape[:2], dtype=torch.bool, device=features.device)
    chosen[:, 0] = True
    for _ in range(min(count, unit.shape[1]) - 1):
        near = distances.masked_fill(~chosen[:, None], torch.inf).amin(2)  # [B, S]
        chosen.scatter_(1, near.masked_fill(chosen, -torch.inf).argmax(1, keepdim=True), True)
    return chosen
