"""LiteVGGT (arXiv 2512.04939) without its training: merging by a map of information, found in some blocks alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Attended, Context, Layout
from .fastvggt import attend_merged, merge_by

FOUND_IN = (0, 6, 15, 20)  # blocks of VGGT-1B


@dataclass(frozen=True)
class LiteVGGT:
    """As FastVGGT, but a cell's destination holds most information, and merges are kept for the blocks that follow.

    Attributes:
        merged: share of all tokens that joins, if so many are no destinations.
    """

    name: ClassVar[str] = "LiteVGGT, untrained"
    paper: ClassVar[str] = "2512.04939"
    swept: ClassVar[str] = "merged"
    merged: float = 0.9

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Attended:
        found_in = max(block for block in FOUND_IN if block <= context.block_of_large)
        if context.memory.get("found in") != found_in:
            scores = information(context.images, context.features, context.layout)
            context.memory.update({"found in": found_in, "merge": merge_by(scores, self.merged, context)})
        return attend_merged(query, key, value, context.memory["merge"])


def information(images: Tensor, features: Tensor, layout: Layout) -> Tensor:
    """How much each patch shows, [B, S, P]: how steep its pixels are, and how far its tokens vary around it.

    Args:
        images: [B, S, 3, H, W].
        features: [B, S, P, C].
        layout: of the clip.
    """
    gray = images.mean(2).flatten(0, 1)[:, None]  # [B * S, 1, H, W]
    down = F.pad(gray.diff(dim=2).abs(), (0, 0, 0, 1))
    right = F.pad(gray.diff(dim=3).abs(), (0, 1))
    steep = F.adaptive_avg_pool2d(down + right, layout.grid).view(features.shape[:3])
    maps = features.flatten(0, 1).mT.unflatten(2, layout.grid)  # [B * S, C, rows, columns]
    mean, square = (F.avg_pool2d(t, 3, 1, 1, count_include_pad=False) for t in (maps, maps.square()))
    varies = (square - mean.square()).mean(1).view(features.shape[:3])
    return in_unit(steep) + in_unit(varies)


def in_unit(scores: Tensor) -> Tensor:
    """Scores [B, S, P] of each frame, moved and scaled into [0, 1]."""
    least, most = torch.aminmax(scores, dim=2, keepdim=True)
    return (scores - least) / (most - least).clamp(min=1e-12)
