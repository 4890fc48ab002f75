"""Pre-AA pruning (PaceVGGT, arXiv 2605.08371): only some tokens enter alternating attention, merged from all of them.

Frame and global blocks run on special and kept tokens alone. The grid is restored for the dense heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .merging import MergeAdapter, kept_tokens, merge_tokens
from .scoring import TokenScorer, token_scores
from .selection import KEPT, Assignment, assign

# Of kind, number, tokens [N, L, C] and their positions; gives as many tokens.
RunBlock = Callable[[str, int, Tensor, "Tensor | None"], Tensor]


def choose_tokens(
    features: Tensor, grid: tuple[int, int], keep: int, merge: int, scorer: TokenScorer | None
) -> Assignment:
    """What becomes of each patch token of DINO features [B, S, P, C]; see `selection.assign`."""
    batch, frames, patches = features.shape[:3]
    if keep == patches:
        kept = torch.arange(patches, device=features.device).expand(batch, frames, -1)
        return Assignment(kept, torch.full_like(kept, KEPT, dtype=torch.uint8), kept.float())
    return assign(token_scores(features, grid, keep, scorer), keep, merge)


def entering_tokens(
    features: Tensor, chosen: Assignment, grid: tuple[int, int], merges: bool, adapter: MergeAdapter | None
) -> Tensor:
    """The tokens [B, S, K, C] that enter alternating attention."""
    if chosen.kept.shape[-1] == features.shape[2]:
        return features
    if merges or adapter is not None:
        return merge_tokens(features, chosen, grid, adapter)
    return kept_tokens(features, chosen)


def positions_of(kept: Tensor, patch_positions: Tensor | None, special: int) -> Tensor | None:
    """RoPE positions [B, S, n + K, 2] of special and kept tokens; special ones sit at 0."""
    return None if patch_positions is None else F.pad(patch_positions[kept], (0, 0, special, 0))


def alternate(
    order: Iterable[tuple[str, int, Any]],
    tokens: Tensor,
    positions: Tensor | None,
    layers: Iterable[int],
    run: RunBlock,
) -> dict[int, Tensor]:
    """Frame and global blocks in turn.

    Args:
        order: (kind, number, module) of the blocks, as they run.
        tokens: [B, S, L, C].
        positions: [B, S, L, 2], or None.
        layers: those whose output is wanted.
        run: runs a block.

    Returns:
        layer -> [B, S, L, 2C], frame and global output concatenated.
    """
    shape, wanted = tokens.shape, set(layers)
    halves: dict[int, dict[str, Tensor]] = {}
    outputs = {}
    for kind, number, _ in order:
        end = 2 if kind == "frame" else 3  # [B * S, L, ...] or [B, S * L, ...]
        start = 0 if kind == "frame" else 1
        where = None if positions is None else positions.flatten(start, end - 1)
        tokens = run(kind, number, tokens.flatten(start, end - 1), where).view(shape)
        if number in wanted:
            half = halves.setdefault(number, {})
            half[kind] = tokens
            if len(half) == 2:
                del halves[number]
                outputs[number] = torch.cat([half["frame"], half["global"]], dim=-1)
    return outputs
