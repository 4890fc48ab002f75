"""Merging of tokens in two parts, after ToMe (arXiv 2210.09461): who joins whom, means, and copies back."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PRODUCTS = 2**27  # similarities at a time


class Merge(NamedTuple):
    """Which tokens are one.

    Attributes:
        place: [B, T] (int64), the number of the merged token that each is part of.
        count: merged tokens of a clip.
    """

    place: Tensor
    count: int

    def mean(self, tensor: Tensor) -> Tensor:
        """Means [B, heads, count, d] over what is merged, of [B, heads, T, d]."""
        place = self.place[:, None, :, None].expand(tensor.shape)
        sums = tensor.new_zeros(*tensor.shape[:2], self.count, tensor.shape[3]).scatter_add_(2, place, tensor)
        sizes = tensor.new_zeros(len(tensor), self.count)
        sizes.scatter_add_(1, self.place, sizes.new_ones(self.place.shape))
        return sums / sizes[:, None, :, None]

    def copied(self, tensor: Tensor) -> Tensor:
        """Each token gets what it is part of: [B, heads, T, d] of [B, heads, count, d]."""
        place = self.place[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
        return tensor.gather(2, place)


def bipartite_merge(tokens: Tensor, destination: Tensor, merged: int) -> Merge:
    """The sources that are most like a destination join it, by cosine.

    Args:
        tokens: [B, T, C].
        destination: [B, T] (bool), as many in each clip; the others are sources.
        merged: how many sources join; all, if there are not so many.
    """
    batch, length = destination.shape
    to = destination.nonzero()[:, 1].view(batch, -1)  # [B, D]
    source = (~destination).nonzero()[:, 1].view(batch, -1)  # [B, T - D]
    merged = min(merged, source.shape[1])
    if not merged:
        return Merge(torch.arange(length, device=tokens.device).expand(batch, -1), length)
    unit = F.normalize(tokens, dim=-1)
    kept, joining = (unit.gather(1, at[:, :, None].expand(-1, -1, unit.shape[2])) for at in (to, source))
    parts = joining.split(max(1, PRODUCTS // (batch * to.shape[1])), dim=1)
    found = [(part @ kept.mT).max(-1) for part in parts]
    score, nearest = (torch.cat(both, dim=1) for both in zip(*found, strict=True))  # [B, T - D]
    chosen = score.argsort(dim=1, descending=True, stable=True)[:, :merged]  # [B, merged]
    joins = source.gather(1, chosen)
    stays = torch.ones_like(destination).scatter_(1, joins, False)
    place = stays.cumsum(1) - 1
    return Merge(
        place.scatter(1, joins, place.gather(1, to.gather(1, nearest.gather(1, chosen)))), length - merged
    )
