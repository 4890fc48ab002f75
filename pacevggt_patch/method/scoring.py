"""Scores of patch tokens: which of them must enter alternating attention.

A score has three factors: coverage (how far a token is from everything that is already kept), distinctness (how little
it is like its neighbours, as corners are) and, where weights were trained, a learned saliency. The first two are the
training-free scorer. An importance map without coverage is worse than random choice: its top K crowd together, and
restoration has nothing to interpolate from.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .similarity import grid_cells

# Spatial distance, in units of the grid's longer side, against cosine distance of DINO features.
SPATIAL_WEIGHT = 2.0
# Log-saliency of a token for each standard deviation that its distinctness is above the mean of its frame.
DISTINCTNESS_WEIGHT = 0.15
MOST_DEVIATIONS = 3.0
# Distances to neighbours that spread less than this over a frame are all the same but for rounding.
LEAST_SPREAD = 1e-3
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
        distinctness_weight: how much distinctness counts beside what is learned, see `coverage_scores`.
    """

    def __init__(
        self, embed_dim: int, hidden_dim: int | None = None, distinctness_weight: float = DISTINCTNESS_WEIGHT
    ):
        super().__init__()
        if not 0 <= distinctness_weight <= 1:
            raise ValueError(f"distinctness_weight must lie between 0 and 1, got {distinctness_weight:g}")
        self.distinctness_weight = distinctness_weight
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
        scorer: learned saliency; None is training-free.

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
    weight = DISTINCTNESS_WEIGHT if scorer is None else scorer.distinctness_weight
    scores = torch.cat([coverage_scores(f, w, grid, keep, weight) for f, w in chunks])
    if saliency.requires_grad:
        # A score is the saliency times a distance that the picks fix: a factor of exactly 1 that has its gradient.
        scores = scores * (saliency / saliency.detach())
    return scores.unflatten(0, features.shape[:2])


@torch.no_grad()
def coverage_scores(
    features: Tensor,
    saliency: Tensor,
    grid: tuple[int, int],
    keep: int,
    distinctness_weight: float = DISTINCTNESS_WEIGHT,
) -> Tensor:
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
        distinctness_weight: of the distinctness, in the logarithm of the saliency.

    Returns:
        Scores [N, P] (float32): for picked tokens the value at the pick, for all others the value left.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=-1)
        distance = (unit @ unit.mT).neg_().add_(1)  # [N, P, P], in place: it is the largest tensor here
        centre = F.normalize(unit.mean(1), dim=-1)
        atypical = 1 - (unit @ centre.unsqueeze(-1)).squeeze(-1)  # [N, P]
    saliency = saliency.float() * (distinctness_weight * distinctness(distance, grid)).exp()
    cells = grid_cells(grid, features.device)
    distance.add_(torch.cdist(cells, cells), alpha=SPATIAL_WEIGHT / max(grid)).clamp_(min=0)
    farthest = 2 + SPATIAL_WEIGHT * math.sqrt(2)  # no distance is larger

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


def distinctness(distance: Tensor, grid: tuple[int, int]) -> Tensor:
    """How little each patch token is like those around it, in standard deviations over its frame.

    The mean distance to the up to eight neighbours on the grid, less its mean over the frame and over its standard
    deviation there, at most MOST_DEVIATIONS either way. Corners and small things have much of it, walls little.

    Args:
        distance: between the tokens of each frame, [N, P, P].
        grid: patch rows and columns.

    Returns:
        [N, P].
    """
    rows, columns = grid
    cells = grid_cells(grid, distance.device)
    around = torch.arange(-1, 2, device=distance.device)
    steps = torch.cartesian_prod(around, around)  # [9, 2]
    steps = torch.cat([steps[:4], steps[5:]])  # without itself
    around = cells[:, None].long() + steps  # [P, 8, 2]
    inside = (around >= 0).all(-1) & (around[..., 0] < rows) & (around[..., 1] < columns)
    number = (around[..., 0] * columns + around[..., 1]).where(inside, 0)  # [P, 8]
    near = distance.gather(2, number.expand(len(distance), -1, -1)) * inside  # [N, P, 8]
    mean = near.sum(-1) / inside.sum(-1).clamp(min=1)
    spread = mean.std(1, unbiased=False, keepdim=True).clamp(min=LEAST_SPREAD)
    return ((mean - mean.mean(1, keepdim=True)) / spread).clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS)
