"""Arithmetic on several tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor


def total(terms: Iterable[Tensor]) -> Tensor:
    """Sum of at least one tensor, in their order."""
    return functools.reduce(torch.add, terms)
