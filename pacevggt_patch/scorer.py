"""Scores of patch tokens: which of them must enter alternating attention.

A score has two factors: coverage (how far a token is from everything that is already kept) and, where weights were
trained, a learned saliency. Coverage alone is the training-free scorer. An importance map without coverage is worse
than random choice: its top K crowd together, and restoration has nothing to interpolate from.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .similarity import grid_cells

# Spatial distance, in units of the grid's longer side, against cosine distance of DINO features.
SPATIAL_WEIGHT = 2.0
# A token this much less salient than the clip's most salient one is as good as never picked.
LEAST_LOG_SALIENCY = -30.0
# The pairwise distances of a chunk of frames stay below this.
CHUNK_BYTES = 2**30


class TokenScorer(nn.Module):
    """Learned saliency of patch tokens: a two-layer perceptron on the DINO features.

    Zero-initialised, so that an untrained scorer gives every token the same saliency and leaves coverage alone.

    Args:
        embed_dim: channels C of a patch token.
        hidden_dim: width of the hidden layer; C/4 keeps the scorer under 1 % of any VGGT's parameters.
    """

    def __init__(self, embed_dim: int, hidden_dim: int | None = None):
        super().__init__()
        hidden_dim = hidden_dim or max(1, embed_dim // 4)
        self.norm = nn.LayerNorm(embed_dim)
        self.hidden = nn.Linear(embed_dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Log-saliency [..., P] (float32) of DINO features [..., P, C] in any dtype."""
        return self.out(F.gelu(self.hidden(self.norm(features.float())))).squeeze(-1)


def token_scores(
    features: Tensor, grid: tuple[int, int], keep: int, scorer: TokenScorer | None = None
) -> Tensor:
    """Score every patch token, each frame for itself.

    Args:
        features: DINO patch tokens [B, S, P, C].
        grid: patch rows and columns, rows * columns == P.
        keep: K, how many tokens of a frame the scores must rank first.
        scorer: learned saliency; None scores by coverage alone (training-free).

    Returns:
        Non-negative scores [B, S, P] (float32). Which tokens are picked has no gradient; how a score changes with its
        own token's saliency has.
    """
    flat = features.flatten(0, 1)  # [B*S, P, C]
    frames = max(1, CHUNK_BYTES // (4 * flat.shape[1] ** 2))
    if scorer is None:
        saliency = torch.ones(flat.shape[:2], device=flat.device)
    else:
        with torch.autocast(features.device.type, enabled=False):
            logits = torch.cat([scorer(chunk) for chunk in flat.split(frames)])  # [B*S, P]
        # Only ratios matter: measured against the largest, no saliency overflows.
        saliency = (logits - logits.detach().amax()).clamp(min=LEAST_LOG_SALIENCY).exp()
    chunks = zip(flat.split(frames), saliency.split(frames), strict=True)
    scores = torch.cat([coverage_scores(f, w, grid, keep) for f, w in chunks])
    if saliency.requires_grad:
        # A score is the saliency times a distance that the picks fix: a factor of exactly 1 that has its gradient.
        scores = scores * (saliency / saliency.detach())
    return scores.unflatten(0, features.shape[:2])


@torch.no_grad()
def coverage_scores(features: Tensor, saliency: Tensor, grid: tuple[int, int], keep: int) -> Tensor:
    """Saliency-weighted farthest point sampling, as scores.

    Tokens are picked one by one, each time the one with the largest saliency * distance to the tokens picked before;
    the distance is 1 - cosine of the features plus SPATIAL_WEIGHT * distance on the grid. That product only falls as
    more is picked, so the value at which a token was picked ranks the picks above all others, and the value left at
    the end says how badly a token is covered by them. The first pick is the frame's least typical token, which
    differs from frame to frame: the frames of a clip look at different places.

    Args:
        features: [N, P, C], one row a frame.
        saliency: positive weights [N, P].
        grid: patch rows and columns.
        keep: K, the number of picks.

    Returns:
        Scores [N, P] (float32): for picked tokens the value at the pick, for all others the value left.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=-1)
        distance = (unit @ unit.mT).neg_().add_(1)  # [N, P, P], in place: it is the largest tensor here
        centre = F.normalize(unit.mean(1), dim=-1)
        atypical = 1 - (unit @ centre.unsqueeze(-1)).squeeze(-1)  # [N, P]
    cells = grid_cells(grid, features.device)
    distance.add_(torch.cdist(cells, cells), alpha=SPATIAL_WEIGHT / max(grid)).clamp_(min=0)
    farthest = 2 + SPATIAL_WEIGHT * math.sqrt(2)  # no distance is larger

    saliency = saliency.float()
    distance.mul_(saliency.unsqueeze(1))  # from here on weighted by the saliency of the token that is asked
    frame = torch.arange(len(features), device=features.device)
    left = saliency * farthest  # [N, P]
    # The first pick need not have the largest weight, but it comes before all others.
    value, pick = left.amax(1), (saliency * atypical).argmax(1)  # [N]
    picks, values = [], []
    for _ in range(keep):
        picks.append(pick)
        values.append(value)
        # Few kernels and no host sync: this loop is all launches.
        left = torch.minimum(left, distance[frame, pick]).scatter_(
            1, pick.unsqueeze(1), -1
        )  # -1: never picked again
        value, pick = left.max(1)
    return left.scatter(1, torch.stack(picks, 1), torch.stack(values, 1))
