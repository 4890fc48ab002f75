"""Who is kept, who is merged, who is pruned: pure functions on scores, with exact budgets.

Shapes depend only on the number of frames and patches and on the budgets, never on the data, and nothing waits for
the device. Budgets are shared out in integer arithmetic: they come out exact, and the same on every device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PRUNED, MERGED, KEPT = 0, 1, 2
# Saliency is rounded to this many steps of the clip's largest. Shares are products of steps and tokens, exact in int64
# for clips of up to 2**42 tokens.
SALIENCY_STEPS = 2**20
# Sums of scores over the tokens of a clip stay finite.
LARGEST_SCORE = 1e30


class Assignment(NamedTuple):
    """What becomes of each patch token.

    Attributes:
        kept: [B, S, K] (int64) indices of the kept tokens, ascending.
        role: [B, S, P] (uint8) PRUNED, MERGED or KEPT.
        scores: [B, S, P] (float32) the scores it was made from.
    """

    kept: Tensor
    role: Tensor
    scores: Tensor


def assign(scores: Tensor, keep: int, merge: int) -> Assignment:
    """Keep the `keep` best tokens of each frame, merge the `merge` best of the others, prune the rest.

    The merges of a clip are shared over its frames in proportion to the scores left in their tokens that are not
    kept (PaceVGGT, arXiv 2605.08371), see `merge_quotas`. Equal scores go to the lower index.

    Args:
        scores: non-negative [B, S, P]; NaN counts as 0, so that budgets are exact whatever comes.
        keep: K, kept tokens in each frame, in [1, P].
        merge: M, merged tokens in each clip, in [0, S * (P - K)].
    """
    patches = scores.shape[-1]
    scores = scores.float().nan_to_num(nan=0.0, posinf=LARGEST_SCORE).clamp(0, LARGEST_SCORE)
    order = scores.argsort(dim=-1, descending=True, stable=True)  # [B, S, P]
    ranks = torch.arange(patches, device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, ranks)  # rank of each token in its frame
    left = scores.masked_fill(rank < keep, 0).sum(-1)  # [B, S]
    quotas = merge_quotas(left, merge, patches - keep)
    role = (rank < keep + quotas.unsqueeze(-1)).to(torch.uint8)  # MERGED or PRUNED
    role = role.masked_fill(rank < keep, KEPT)
    return Assignment(order[..., :keep].sort(-1).values, role, scores)


def merge_quotas(saliency: Tensor, total: int, cap: int) -> Tensor:
    """Share `total` merges over the frames of a clip in proportion to their saliency, none above `cap`.

    Frames whose share exceeds the cap get the cap, and the rest is shared anew over the others; fractions are
    settled by largest remainder, ties by the lower frame index.

    Args:
        saliency: non-negative and finite [B, S].
        total: merges of each clip, in [0, S * cap].
        cap: most merges in one frame.

    Returns:
        Quotas [B, S] (int64), each in [0, cap], summing to `total`.
    """
    frames = saliency.shape[-1]
    largest = saliency.amax(-1, keepdim=True).double().clamp(min=torch.finfo(torch.float32).tiny)
    # One step more for everybody: a frame without saliency still takes what the others can't.
    weight = (saliency.double() / largest * SALIENCY_STEPS).round().long() + 1  # [B, S]
    weight, order = weight.sort(dim=-1, descending=True, stable=True)

    # Shares fall with the weight, so the capped frames are the first t. Take the smallest t whose rest fits.
    t = torch.arange(frames, device=saliency.device)
    rest = weight.flip(-1).cumsum(-1).flip(-1)  # weight of the frames from t on
    budget = total - t * cap  # what is left for them
    fits = budget * weight <= cap * rest
    first = fits.long().argmax(-1, keepdim=True)
    budget, rest = budget.expand_as(weight).gather(-1, first), rest.gather(-1, first)

    free = t >= first
    quota = torch.where(free, budget * weight // rest, cap)
    remainder = torch.where(free, budget * weight % rest, -1)
    missing = total - quota.sum(-1, keepdim=True)
    quota = torch.empty_like(quota).scatter_(
        -1, order, quota
    )  # back in frame order, so that ties are settled there
    remainder = torch.empty_like(remainder).scatter_(-1, order, remainder)
    place = remainder.argsort(dim=-1, descending=True, stable=True)
    return quota + torch.zeros_like(quota).scatter_(-1, place, (t < missing).long())
