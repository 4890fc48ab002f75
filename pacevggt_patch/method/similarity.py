"""How alike and how far apart patch tokens are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Sharpness of the softmax over cosine similarity, and reach of the softmax over distance in units of the mean
# spacing of kept tokens.
TEMPERATURE = 20.0
SPREAD = 0.75


def grid_cells(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Row and column of every patch token, [P, 2] (float32), in raster order."""
    rows, columns = (torch.arange(n, device=device, dtype=torch.float32) for n in grid)
    return torch.cartesian_prod(rows, columns).view(-1, 2)


def similarity_to_kept(features: Tensor, kept: Tensor) -> Tensor:
    """Cosine similarity of every token to the kept tokens of its frame.

    Args:
        features: [N, P, C], one row a frame.
        kept: [N, K] indices into P.

    Returns:
        [N, P, K] (float32).
    """
    unit = F.normalize(features.float(), dim=-1)
    anchors = unit.gather(1, kept.unsqueeze(-1).expand(-1, -1, unit.shape[-1]))  # [N, K, C]
    return unit @ anchors.mT


def interpolation_weights(
    features: Tensor,
    kept: Tensor,
    grid: tuple[int, int],
    temperature: float | Tensor = TEMPERATURE,
    spread: float | Tensor = SPREAD,
) -> Tensor:
    """How each token of the grid reads the kept tokens of its frame.

    w_ij = softmax_j(temperature * cos(f_i, f_j) - |p_i - p_j|^2 / (2 sigma^2)), with DINO features f, grid positions
    p, and sigma = spread * sqrt(P / K), the mean spacing of kept tokens times `spread`.

    Args:
        features: [N, P, C], one row a frame.
        kept: [N, K] indices into P.
        grid: patch rows and columns.

    Returns:
        [N, P, K] (float32), rows sum to 1.
    """
    cells = grid_cells(grid, features.device)
    squared = torch.cdist(cells[None], cells[kept]).square()  # [N, P, K]
    variance = spread**2 * (features.shape[1] / kept.shape[1])
    return (temperature * similarity_to_kept(features, kept) - squared / (2 * variance)).softmax(-1)
