"""Rays against unit cubes and spheres, rotations, and how far places are from solids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...training.tensors import total

ROOM_FACES = 6
CAMERA_CLEARANCE = 0.22  # metres between a camera and the nearest object
WALL_CLEARANCE = 0.2

# Starts and directions of rays along x, y and z, seen from a solid whose half-size is 1.
Axes = Sequence[tuple[Tensor, Tensor]]


def cross_cube(axes: Axes) -> tuple[Tensor, Tensor]:
    """Distances at which rays enter and leave the cube of half-size 1 (enter > leave: a miss)."""
    enters, leaves = [], []
    for start, direction in axes:
        # A ray along a face divides by zero; a hair off it is inside or outside like its neighbours.
        inverse = 1 / torch.where(direction.abs() < 1e-9, 1e-9, direction)
        middle, half = -start * inverse, inverse.abs()
        enters.append(middle - half)
        leaves.append(middle + half)
    return enters[0].maximum(enters[1]).maximum(enters[2]), leaves[0].minimum(leaves[1]).minimum(leaves[2])


def enter_sphere(axes: Axes) -> tuple[Tensor, Tensor]:
    """Distances at which rays enter the sphere of radius 1, and whether they meet it."""
    a = total(direction.square() for _, direction in axes)
    b = total(start * direction for start, direction in axes)
    c = total(start.square() for start, _ in axes) - 1
    discriminant = b.square() - a * c
    return (-b - discriminant.clamp(min=0).sqrt()) / a, discriminant > 0


def rotation_about_z(angle: Tensor) -> Tensor:
    """`[..., 3, 3]` rotations by `angle` `[...]` radians."""
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], -1).unflatten(-1, (3, 3))


def look_at(centre: Tensor, target: Tensor) -> Tensor:
    """`[..., 3, 3]` camera-to-world rotations of level cameras at `centre` that look at `target`, both `[..., 3]`."""
    forward = F.normalize(target - centre, dim=-1)
    # Never straight up or down, where "level" has no meaning.
    forward = torch.cat([forward[..., :2] + 1e-3, forward[..., 2:].clamp(-0.85, 0.85)], dim=-1)
    forward = F.normalize(forward, dim=-1)
    up = torch.tensor([0.0, 0.0, 1.0]).expand_as(forward)
    right = F.normalize(torch.linalg.cross(forward, up), dim=-1)
    return torch.stack([right, torch.linalg.cross(forward, right), forward], dim=-1)


def clearance(local: Tensor, half_size: Tensor) -> Tensor:
    """`[...]` distance to the nearest of K solids, at most `CAMERA_CLEARANCE` and negative within one.

    Args:
        local: `[..., K, 3]` a place as each solid sees it.
        half_size: of the solids, likewise.
    """
    # Distance to the bounding box: exact for boxes, and on the safe side for ellipsoids.
    beyond = local.abs() - half_size
    distance = beyond.clamp(min=0).norm(dim=-1) + beyond.amax(-1).clamp(max=0)
    return distance.amin(-1).clamp(max=CAMERA_CLEARANCE)
