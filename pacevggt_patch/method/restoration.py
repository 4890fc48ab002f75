"""Rebuild the dense token grid from the kept tokens, guided by the DINO features of the dropped ones."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .similarity import SPREAD, TEMPERATURE, grid_cells, interpolation_weights


class FeatureGuidedRestoration(nn.Module):
    """Learned part of the restoration: what interpolation misses, from what the dropped token looks like.

    For each cached layer: a linear map of the feature difference f_i - sum_j w_ij f_j, and a small network on
    (interpolated output, feature difference, offset to the kept tokens it reads). Zero-initialised, so that the
    untrained module restores by interpolation alone.

    Args:
        embed_dim: channels C of a patch token; the outputs of a cached layer have 2C.
        layers: the cached layers it restores.
        hidden_dim: width of the network.
    """

    def __init__(self, embed_dim: int, layers: tuple[int, ...], hidden_dim: int | None = None):
        super().__init__()
        hidden_dim = hidden_dim or max(1, embed_dim // 2)
        self.layers = tuple(layers)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(TEMPERATURE)))
        self.log_spread = nn.Parameter(torch.tensor(math.log(SPREAD)))
        self.norm = nn.ModuleList(nn.LayerNorm(2 * embed_dim) for _ in layers)
        self.hidden = nn.ModuleList(nn.Linear(3 * embed_dim + 2, hidden_dim) for _ in layers)
        self.out = nn.ModuleList(nn.Linear(hidden_dim, 2 * embed_dim) for _ in layers)
        self.linear = nn.ModuleList(nn.Linear(embed_dim, 2 * embed_dim, bias=False) for _ in layers)
        for layer in (*self.out, *self.linear):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(self, layer: int, interpolated: Tensor, difference: Tensor, offset: Tensor) -> Tensor:
        """Residual [N, P, 2C] (float32) for the interpolated outputs of one cached layer.

        Args:
            layer: the AA layer.
            interpolated: [N, P, 2C].
            difference: [N, P, C], feature of a token minus the interpolated feature.
            offset: [N, P, 2], interpolated position minus own position, in units of the grid's longer side.
        """
        i = self.layers.index(layer)
        inputs = torch.cat([self.norm[i](interpolated.float()), difference, offset], dim=-1)
        return self.linear[i](difference) + self.out[i](F.gelu(self.hidden[i](inputs)))


def reading(
    features: Tensor, kept: Tensor, grid: tuple[int, int], module: FeatureGuidedRestoration
) -> tuple[Tensor, Tensor, Tensor]:
    """How a learned restoration reads the kept tokens, and what it learns from.

    Args:
        features: [N, P, C], one row a frame.
        kept: [N, K] indices into P.
        grid: patch rows and columns.
        module: the learned restoration.

    Returns:
        Interpolation weights [N, P, K], `difference` [N, P, C] and `offset` [N, P, 2] as the module takes them, all
        float32.
    """
    weights = interpolation_weights(
        features, kept, grid, module.log_temperature.exp(), module.log_spread.exp()
    )
    own = features.float()
    difference = own - weights @ own.gather(1, kept.unsqueeze(-1).expand(-1, -1, own.shape[-1]))
    cells = grid_cells(grid, features.device)
    return weights, difference, (weights @ cells[kept] - cells) / max(grid)


def restore(
    outputs: dict[int, Tensor],
    features: Tensor,
    kept: Tensor,
    grid: tuple[int, int],
    module: FeatureGuidedRestoration | None = None,
) -> dict[int, Tensor]:
    """Dense patch tokens of some frames, from their kept ones.

    Kept tokens pass unchanged.

    Args:
        outputs: cached layer -> outputs of the kept tokens [N, K, 2C].
        features: DINO patch tokens [N, P, C] of the same frames.
        kept: [N, K] indices of the kept tokens.
        grid: patch rows and columns.
        module: learned residual; None restores by interpolation alone (training-free).

    Returns:
        cached layer -> [N, P, 2C] in the dtype of its outputs.
    """
    with torch.autocast(features.device.type, enabled=False):
        if module is None:
            weights = interpolation_weights(features, kept, grid)  # [N, P, K]
        else:
            weights, difference, offset = reading(features, kept, grid, module)
        dense = {}
        for layer, output in outputs.items():
            rows = weights.to(output.dtype) @ output  # [N, P, 2C]
            if module is not None and layer in module.layers:
                rows = rows + module(layer, rows, difference, offset).to(rows.dtype)
            dense[layer] = rows.scatter_(1, kept.unsqueeze(-1).expand_as(output), output)
    return dense
