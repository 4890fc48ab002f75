"""How alike and how far apart patch tokens are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
