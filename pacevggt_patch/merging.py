"""Merge tokens into the kept token that is most like them."""

from __future__ import annotations

import torch
from torch import Tensor

from .assignment import PRUNED, Assignment
from .similarity import similarity_to_kept

# Frames at a time: bounds the [frames, K, P] similarities.
FRAMES_PER_CHUNK = 32


def kept_tokens(tokens: Tensor, assignment: Assignment) -> Tensor:
    """The kept tokens [B, S, K, C] of `tokens` [B, S, P, C], in raster order, as they are."""
    return tokens.gather(2, assignment.kept.unsqueeze(-1).expand(-1, -1, -1, tokens.shape[-1]))


def merge_tokens(tokens: Tensor, assignment: Assignment) -> Tensor:
    """The kept tokens, each a mean of itself and the tokens merged into it, weighted by their scores.

    A merged token goes to the kept token of its own frame with the largest cosine similarity. Kept tokens into which
    nothing is merged stay as they are, to the bit.

    Args:
        tokens: DINO patch tokens [B, S, P, C].
        assignment: of these tokens.

    Returns:
        [B, S, K, C] in the dtype of `tokens`.
    """
    parts = zip(
        *(
            t.flatten(0, 1).split(FRAMES_PER_CHUNK)
            for t in (tokens, assignment.kept, assignment.role, assignment.scores)
        ),
        strict=True,
    )
    return torch.cat([_merge_frames(*part) for part in parts]).unflatten(0, tokens.shape[:2])


def _merge_frames(tokens: Tensor, kept: Tensor, role: Tensor, scores: Tensor) -> Tensor:
    """`merge_tokens` for tokens [N, P, C], kept [N, K], role and scores [N, P]."""
    channels = kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    with torch.autocast(tokens.device.type, enabled=False):
        target = merge_targets(tokens, kept)  # [N, P]
        weight = scores.float().clamp(min=torch.finfo(torch.float32).tiny).masked_fill(role == PRUNED, 0)
        share = weight.new_zeros(*kept.shape, tokens.shape[1])  # [N, K, P]
        share.scatter_(1, target.unsqueeze(1), weight.unsqueeze(1))
        merged = (share > 0).sum(-1, keepdim=True) > 1  # [N, K, 1]
        share = share / share.sum(-1, keepdim=True)
        mean = (share @ tokens.float()).to(tokens.dtype)
    return torch.where(merged, mean, tokens.gather(1, channels))


def merge_targets(features: Tensor, kept: Tensor) -> Tensor:
    """For each token the place in `kept` of the kept token most like it; for a kept token its own place.

    Args:
        features: [N, P, C].
        kept: [N, K] indices into P.

    Returns:
        [N, P] (int64), in [0, K).
    """
    own = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return similarity_to_kept(features, kept).argmax(-1).scatter(1, kept, own)
