"""Global pruning: in each global block only special and kept tokens take part, the others take their change from them.

Frame attention sees all tokens: its cost grows with the number of frames only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .exchange import Exchange
from .few_keys import FewKeys, few_keys, full_keys
from .propagation import Propagation
from .scoring import TokenScorer, token_scores
from .selection import assign


class Plan(NamedTuple):
    """Which tokens of B clips of S frames are kept, N = B * S frames in all; the same in all global blocks.

    Attributes:
        kept: [N, K] (int64) indices of the kept patch tokens of each frame, ascending.
        propagation: of the N frames.
        batch: B.
        keys: which keys kept tokens see, where they do not see all of each other's.
        full_keys: which keys full-attention heads see, where they do not see those of all tokens.
        exchange: of a clip that is spread over processes; S are its frames here.
    """

    kept: Tensor
    propagation: Propagation
    batch: int = 1
    keys: FewKeys | None = None
    full_keys: FewKeys | None = None
    exchange: Exchange | None = None

    def token_rows(self, length: int) -> Tensor:
        """Numbers [B, S * (n + K)] of special and kept tokens among the S * `length` tokens of their clip."""
        rows = self.propagation.rows(length).view(self.batch, -1)
        first = torch.arange(self.batch, device=rows.device) * (len(self.kept) // self.batch) * length
        return rows - first[:, None]


def keep_best(
    features: Tensor, grid: tuple[int, int], keep: int, scorer: TokenScorer | None = None
) -> Tensor:
    """Indices [N, K] of the `keep` best tokens of each frame by their scores, ascending.

    Args:
        features: patch tokens [N, P, C], as they enter the first block.
        grid: patch rows and columns.
        keep: K, in [1, P].
        scorer: learned saliency; None is training-free.
    """
    return assign(token_scores(features[None], grid, keep, scorer), keep, 0).kept[0]


def joined(plans: Sequence[Plan], batch: int, exchange: Exchange | None = None) -> Plan:
    """One plan of `batch` clips, of those of its frames.

    Args:
        exchange: of a clip that is spread over processes, of whose frames here the plans are.
    """
    parts = [plan.propagation for plan in plans]
    propagation = parts[0]
    if len(parts) > 1:
        index, columns = (torch.cat(some) for some in ([p.index for p in parts], [p.columns for p in parts]))
        propagation = Propagation(index, columns, propagation.kept)
    kept = torch.cat([plan.kept for plan in plans])
    frames, count = kept.shape
    tokens = propagation.columns.shape[1]
    special = propagation.index.shape[1] - count
    whole = full_keys(frames // batch, special, tokens - special, batch, kept.device, exchange)
    return Plan(kept, propagation, batch, few_keys(propagation, batch, exchange), whole, exchange)


def run_on_kept(x: Tensor, plan: Plan, block: Callable[[Tensor], Tensor], apart: bool = False) -> Tensor:
    """A global block on special and kept tokens, its change propagated to all others.

    Args:
        x: all tokens [B, S * (n + P), C].
        plan: of these clips.
        block: of tokens [B, S * (n + K), C], gives as many.
        apart: whether each frame has a regression of its own, so that frames tell each other nothing but by `block`.

    Returns:
        [B, S * (n + P), C], new memory.
    """
    propagation, (batch, _, channels) = plan.propagation, x.shape
    dense = x.reshape(len(plan.kept), -1, channels)  # [N, n + P, C]
    few = propagation.gather(dense)  # [N, n + K, C]
    after = block(few.view(batch, -1, channels)).view(few.shape)
    slope = propagation.slope(few, after, len(plan.kept) if apart else batch, plan.exchange)
    del few  # its memory is needed
    return propagation.propagate(dense, after, slope).view(x.shape)
