"""Ridge regression from sums of squares and products."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def solve_ridge(squares: Tensor, products: Tensor, level: Tensor) -> Tensor:
    """The X that minimises the squared error of `inputs @ X` plus `level` times the square of X.

    Args:
        squares: inputs^T @ inputs, [..., C, C]; changed in place.
        products: inputs^T @ targets, [..., C, D].
        level: the ridge, [...], positive.

    Returns:
        X [..., C, D]. Nothing waits for the device.
    """
    squares.diagonal(dim1=-2, dim2=-1).add_(level[..., None])
    # Not by `solve`, which waits for the device to tell whether it worked.
    factor = torch.linalg.cholesky_ex(squares).L
    half = torch.linalg.solve_triangular(factor, products, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)
