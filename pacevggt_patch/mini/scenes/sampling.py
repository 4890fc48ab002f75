"""Random tensors from one generator, and the things that stand in rooms of all kinds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WALL_BOXES, FURNITURE, ELLIPSOIDS = 4, 8, 4  # at most, in a room


class Sampler:
    """Random tensors from one generator, shortened."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform in [low, high)."""
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def log_uniform(self, *shape: int, low: float, high: float) -> Tensor:
        """In [low, high), uniform in the logarithm."""
        return low * (high / low) ** torch.rand(shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal."""
        return torch.randn(shape, generator=self.generator)

    def chance(self, *shape: int, p: float | Tensor) -> Tensor:
        """True with probability p."""
        return torch.rand(shape, generator=self.generator) < p

    def integers(self, *shape: int, high: int) -> Tensor:
        """Integers in [0, high)."""
        return torch.randint(high, shape, generator=self.generator)

    def choice(self, shares: Tensor) -> Tensor:
        """`[B]` indices with probabilities `[B, n]`."""
        return torch.multinomial(shares, 1, generator=self.generator)[:, 0]

    def sides(self, *shape: int) -> Tensor:
        """-1 or 1."""
        return torch.where(self.chance(*shape, p=0.5), 1.0, -1.0)

    def rotations(self, *shape: int) -> Tensor:
        """`[*shape, 3, 3]` rotations, all equally likely: orthogonalised random directions."""
        first, second = self.normal(2, *shape, 3)
        first = F.normalize(first, dim=-1)
        second = F.normalize(second - (first * second).sum(-1, keepdim=True) * first, dim=-1)
        return torch.stack([first, second, torch.linalg.cross(first, second)], -1)


class Furniture(NamedTuple):
    """Boxes `[B, FURNITURE]` in B rooms.

    Attributes:
        centre: `[B, n, 3]`.
        half_size: `[B, n, 3]`.
        on_floor: whether a box stands on the floor.
        tilted: whether it stands at any angle.
        yaw: its turn about z, if it does not.
    """

    centre: Tensor
    half_size: Tensor
    on_floor: Tensor
    tilted: Tensor
    yaw: Tensor


def sample_furniture(s: Sampler, room: Tensor, floor_share: float | Tensor) -> Furniture:
    """Boxes of 0.2 to 2 m in rooms `[B, 3]`, a share of them on the floor, half of the others at any angle."""
    shape = (len(room), FURNITURE)
    half_size = torch.cat(
        [s.log_uniform(*shape, 2, low=0.1, high=0.6), s.log_uniform(*shape, 1, low=0.1, high=0.7)], 2
    )
    half_size = torch.where(s.chance(*shape, 1, p=0.15), 1.6 * half_size, half_size)
    centre = s.uniform(*shape, 3, low=-1.0) * (room[:, None] - 0.05)
    on_floor = s.chance(*shape, p=floor_share)
    height = torch.where(on_floor, half_size[..., 2] - room[:, None, 2], centre[..., 2])
    centre = torch.cat([centre[..., :2], height[..., None]], 2)
    tilted = ~on_floor & s.chance(*shape, p=0.5)
    return Furniture(centre, half_size, on_floor, tilted, s.uniform(*shape, high=2 * math.pi))


def sample_wall_boxes(s: Sampler, room: Tensor, thickness: Callable[..., Tensor]) -> list[Tensor]:
    """Centre, rotation and half-size of pictures and cabinets on the walls of rooms `[B, 3]`.

    `thickness` draws half of what they are thick, given the shape `[B, n, 1]`.
    """
    shape = (len(room), WALL_BOXES)
    wall = F.one_hot(s.chance(*shape, p=0.5).long(), 3).bool()  # [B, n, 3]
    side = s.sides(*shape, 1)
    thick = thickness(*shape, 1)
    half_size = torch.cat(
        [s.uniform(*shape, 2, low=0.15, high=0.9), s.uniform(*shape, 1, low=0.15, high=0.8)], 2
    )
    half_size = torch.where(wall, thick, half_size)
    reach = (room[:, None] - half_size).clamp(min=0)
    centre = torch.where(wall, side, s.uniform(*shape, 3, low=-1.0)) * reach
    return [centre, torch.eye(3).expand(*shape, 3, 3), half_size]
