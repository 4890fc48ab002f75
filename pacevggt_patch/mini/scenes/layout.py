"""What stands in training scenes: furniture, small things on it, ellipsoids, and the relief of facades.

Everything is sampled for B scenes at a time, as centre `[B, n, 3]`, rotation `[B, n, 3, 3]` and half-size `[B, n, 3]`.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import ROOM_FACES, rotation_about_z
from .sampling import ELLIPSOIDS, FURNITURE, WALL_BOXES, Sampler, sample_furniture, sample_wall_boxes

PLAIN, FURNISHED, FACADE = 0, 1, 2
PIECES, PARTS, SMALL_BOXES, SMALL_ELLIPSOIDS = 2, 6, 8, 4
BOXES = WALL_BOXES + FURNITURE + PIECES * PARTS + SMALL_BOXES
SOLIDS = 1 + BOXES + ELLIPSOIDS + SMALL_ELLIPSOIDS
SURFACES = ROOM_FACES + SOLIDS - 1
GATHERED = 0.6  # share of furnished rooms whose furniture stands in a group

# Pieces of furniture from six boxes each: centre and half-size in shares of width, depth and height, front towards -y.
PIECE_PARTS = torch.tensor(
    [
        [  # a table: top, legs, drawer
            [0, 0, 0.97, 0.5, 0.5, 0.03],
            [-0.45, -0.45, 0.47, 0.04, 0.04, 0.47],
            [0.45, -0.45, 0.47, 0.04, 0.04, 0.47],
            [-0.45, 0.45, 0.47, 0.04, 0.04, 0.47],
            [0.45, 0.45, 0.47, 0.04, 0.04, 0.47],
            [0.25, 0, 0.85, 0.2, 0.4, 0.09],
        ],
        [  # a shelf: back and five boards
            [0, 0.48, 0.5, 0.5, 0.02, 0.5],
            [0, 0, 0.02, 0.5, 0.5, 0.02],
            [0, 0, 0.26, 0.5, 0.5, 0.015],
            [0, 0, 0.5, 0.5, 0.5, 0.015],
            [0, 0, 0.74, 0.5, 0.5, 0.015],
            [0, 0, 0.98, 0.5, 0.5, 0.02],
        ],
        [  # a chair: seat, back, legs
            [0, 0, 0.5, 0.5, 0.5, 0.04],
            [0, 0.46, 0.78, 0.5, 0.04, 0.22],
            [-0.44, -0.44, 0.23, 0.05, 0.05, 0.23],
            [0.44, -0.44, 0.23, 0.05, 0.05, 0.23],
            [-0.44, 0.44, 0.23, 0.05, 0.05, 0.23],
            [0.44, 0.44, 0.23, 0.05, 0.05, 0.23],
        ],
        [  # a pile, each box on the one below
            [0, 0, 0.12, 0.5, 0.5, 0.12],
            [0.05, 0.03, 0.33, 0.42, 0.45, 0.09],
            [-0.04, 0, 0.5, 0.4, 0.35, 0.08],
            [0.02, 0.05, 0.67, 0.35, 0.3, 0.09],
            [0, 0, 0.82, 0.25, 0.28, 0.06],
            [0.05, -0.05, 0.94, 0.15, 0.2, 0.06],
        ],
    ]
)
PIECE_LEAST = torch.tensor([[0.6, 0.4, 0.4], [0.5, 0.2, 0.7], [0.38, 0.38, 0.75], [0.3, 0.25, 0.3]])
PIECE_MOST = torch.tensor([[2.2, 1.0, 0.95], [1.6, 0.5, 2.1], [0.55, 0.55, 1.1], [0.9, 0.7, 1.3]])


def sample_solids(s: Sampler, kind: Tensor, room: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre, rotation, half-size and presence of all solids but the room, in the order of `raycast.FrameScenes`."""
    count = len(kind)
    is_plain, is_facade = kind == PLAIN, kind == FACADE
    hub = s.uniform(count, 2, low=-0.7, high=0.7) * room[:, :2]
    gathered = (kind == FURNISHED) & s.chance(count, p=GATHERED)
    wall_boxes = sample_wall_boxes(s, room, partial(sample_thickness, s, is_plain))
    furniture = sample_standing(s, room, is_plain, hub, gathered)
    pieces, tops = sample_pieces(s, room, hub, gathered)
    # Small things stand on furniture and on pieces.
    upright = furniture[0][..., 2] - furniture[2][..., 2] <= 1e-4 - room[:, None, 2]
    yaw = furniture[1]
    supports = (
        torch.cat([furniture[0], tops[0]], 1),
        torch.cat([yaw, tops[1]], 1),
        torch.cat([furniture[2], tops[2]], 1),
        torch.cat([upright, torch.ones(count, PIECES, dtype=torch.bool)], 1),
    )
    small = sample_small(s, supports, SMALL_BOXES)
    small_round = sample_small(s, supports, SMALL_ELLIPSOIDS)
    radius = s.log_uniform(count, ELLIPSOIDS, 1, low=0.12, high=0.48)
    ellipsoids = (
        s.uniform(count, ELLIPSOIDS, 3, low=-1.0) * (room[:, None] - 0.1),
        s.rotations(count, ELLIPSOIDS),
        radius * s.uniform(count, ELLIPSOIDS, 3, low=0.7, high=1.3),
    )
    inside = [torch.cat(parts, 1) for parts in zip(wall_boxes, furniture, pieces, small, strict=True)]
    relief = sample_relief(s, room)
    boxes = [
        torch.where(is_facade.view(-1, *[1] * (a.ndim - 1)), b, a)
        for a, b in zip(inside, relief, strict=True)
    ]
    centre, rotation, half_size = (
        torch.cat(parts, 1) for parts in zip(boxes, ellipsoids, small_round, strict=True)
    )

    # Some rooms are full and some are nearly bare.
    fullness = s.uniform(count, 1, low=0.4, high=1.0)
    fullness = torch.where((kind == FURNISHED)[:, None], fullness.sqrt(), fullness)
    present = s.chance(count, SOLIDS - 1, p=fullness)
    piece = s.chance(count, PIECES, 1, p=0.75).expand(-1, -1, PARTS).flatten(1)
    start = WALL_BOXES + FURNITURE
    present[:, start : start + PIECES * PARTS] = torch.where(
        is_facade[:, None], present[:, start : start + PIECES * PARTS], piece
    )
    # Ellipsoids are rare among real things; furnished rooms have other things, and fewer floating ones.
    clutter = torch.zeros(SOLIDS - 1, dtype=torch.bool)
    clutter[start:BOXES] = clutter[BOXES + ELLIPSOIDS :] = True
    large_round = torch.zeros(SOLIDS - 1, dtype=torch.bool)
    large_round[BOXES : BOXES + ELLIPSOIDS] = True
    present &= ~(is_plain[:, None] & clutter)
    present &= is_plain[:, None] | ~large_round | s.chance(count, SOLIDS - 1, p=0.35)
    return centre, rotation, half_size, present


def sample_thickness(s: Sampler, is_plain: Tensor, *shape: int) -> Tensor:
    """Half of what pictures and cabinets are thick, in a shape `[B, ...]`."""
    plain = is_plain.view(-1, *[1] * (len(shape) - 1))
    return torch.where(
        plain, s.uniform(*shape, low=0.02, high=0.25), s.log_uniform(*shape, low=0.01, high=0.35)
    )


def near(s: Sampler, hub: Tensor, room: Tensor, count: int) -> Tensor:
    """`[B, count, 2]` places about a metre from `hub` `[B, 2]`, within the room."""
    away = F.normalize(s.normal(len(hub), count, 2), dim=2) * s.uniform(len(hub), count, 1, low=0.2, high=1.4)
    limit = 0.92 * room[:, None, :2]
    return (hub[:, None] + away).maximum(-limit).minimum(limit)


def sample_standing(
    s: Sampler, room: Tensor, is_plain: Tensor, hub: Tensor, gathered: Tensor
) -> list[Tensor]:
    """Boxes of 0.2 to 2 m, most of them upright on the floor, in furnished rooms often along a wall or by the hub."""
    shape = (len(room), FURNITURE)
    floor_share = torch.where(is_plain, 0.65, 0.9)[:, None]
    centre, half_size, on_floor, tilted, yaw = sample_furniture(s, room, floor_share)
    # Furniture stands square to the walls, and half of it against one.
    square = ~is_plain[:, None] & s.chance(*shape, p=0.7)
    yaw = torch.where(square, 0.03 * s.normal(*shape), yaw)
    wall = F.one_hot(s.chance(*shape, p=0.5).long(), 2).bool()
    wall &= (square & on_floor & s.chance(*shape, p=0.6))[..., None]
    at_wall = s.sides(*shape)[..., None] * (room[:, None, :2] - half_size[..., :2])
    by_hub = (gathered[:, None] & s.chance(*shape, p=0.4))[..., None]
    place = torch.where(by_hub, near(s, hub, room, FURNITURE), centre[..., :2])
    centre = torch.cat([torch.where(wall, at_wall, place), centre[..., 2:]], 2)
    rotation = torch.where(tilted[..., None, None], s.rotations(*shape), rotation_about_z(yaw))
    return [centre, rotation, half_size]


def sample_pieces(
    s: Sampler, room: Tensor, hub: Tensor, gathered: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Tables, shelves, chairs and piles, as their boxes `[B, PIECES * PARTS, ...]` and as the boxes around them."""
    shape = (len(room), PIECES)
    which = s.integers(*shape, high=len(PIECE_PARTS))
    least, most = PIECE_LEAST[which], PIECE_MOST[which]
    size = least * (most / least) ** s.uniform(*shape, 3)  # [B, n, 3]
    place = s.uniform(*shape, 2, low=-0.85, high=0.85) * room[:, None, :2]
    place = torch.where(gathered[:, None, None], near(s, hub, room, PIECES), place)
    square = s.chance(*shape, p=0.5)
    quarter = s.integers(*shape, high=4) * (math.pi / 2) + 0.03 * s.normal(*shape)
    rotation = rotation_about_z(
        torch.where(square, quarter, s.uniform(*shape, high=2 * math.pi))
    )  # [B, n, 3, 3]
    floor = torch.cat([place, -room[:, None, 2:].expand(-1, PIECES, -1)], 2)  # [B, n, 3]
    parts = PIECE_PARTS[which] * size.repeat(1, 1, 2)[:, :, None]  # [B, n, PARTS, 6]
    centre = floor[:, :, None] + (rotation[:, :, None] @ parts[..., :3, None])[..., 0]
    every = rotation[:, :, None].expand(-1, -1, PARTS, -1, -1)
    boxes = [centre.flatten(1, 2), every.flatten(1, 2), parts[..., 3:].clamp(min=0.004).flatten(1, 2)]
    middle = floor + torch.tensor([0, 0, 0.5]) * size
    return boxes, [middle, rotation, size / 2]


def sample_small(s: Sampler, supports: tuple[Tensor, ...], count: int) -> list[Tensor]:
    """Things of 6 to 40 cm on top of upright supports; a few of them hang in the air like things on strings."""
    centre, rotation, half_size, upright = supports
    shape = (len(centre), count)
    which = torch.multinomial(upright.float() + 1e-3, count, True, generator=s.generator)  # [B, n]

    def taken(value: Tensor) -> Tensor:
        index = which.view(*shape, *[1] * (value.ndim - 2)).expand(*shape, *value.shape[2:])
        return value.gather(1, index)

    own = s.log_uniform(*shape, 1, low=0.03, high=0.2) * s.log_uniform(*shape, 3, low=0.6, high=1.6)
    top = taken(half_size)
    local = s.uniform(*shape, 3, low=-0.85, high=0.85) * top
    local = torch.cat([local[..., :2], top[..., 2:] + own[..., 2:]], 2)
    place = taken(centre) + (taken(rotation) @ local[..., None])[..., 0]
    return [place, rotation_about_z(s.uniform(*shape, high=2 * math.pi)), own]


def sample_relief(s: Sampler, room: Tensor) -> list[Tensor]:
    """The boxes of a facade on the wall at +y: two rows of equal windows or columns, single parts, things in front."""
    count, row = len(room), PARTS
    wide, tall = room[:, None, 0], room[:, None, 2]

    def on_wall(x: Tensor, z: Tensor, half_size: Tensor) -> Tensor:
        # A little of each lies within the wall, so that there is no gap.
        return torch.stack([x, room[:, None, 1] - 0.9 * half_size[..., 1], z], 2)

    parts = []
    for _ in range(PIECES):  # rows
        step = torch.arange(row) - (row - 1) / 2
        pitch = 2 * wide / row * s.uniform(count, 1, low=0.5, high=1.1)
        x = step * pitch + 0.1 * wide * s.normal(count, 1)
        half = torch.stack(
            [
                (pitch * s.uniform(count, 1, low=0.12, high=0.42)).expand(-1, row),
                s.log_uniform(count, 1, low=0.03, high=0.45).expand(-1, row),
                (tall * s.uniform(count, 1, low=0.1, high=0.9)).expand(-1, row),
            ],
            2,
        )
        z = (s.uniform(count, 1, low=-0.8, high=0.8) * tall).expand(-1, row)
        parts.append((on_wall(x, z, half), half))
    single = (count, WALL_BOXES + FURNITURE)
    half = torch.stack(
        [
            wide * s.log_uniform(*single, low=0.02, high=0.5),
            s.log_uniform(*single, low=0.03, high=0.8),
            tall * s.log_uniform(*single, low=0.03, high=0.8),
        ],
        2,
    )
    spot = s.uniform(*single, low=-1.0) * wide, s.uniform(*single, low=-1.0) * tall
    before = (count, SMALL_BOXES)
    own = s.log_uniform(*before, 3, low=0.08, high=0.6)
    ground = torch.stack(
        [
            s.uniform(*before, low=-1.0) * wide,
            room[:, None, 1] * s.uniform(*before, low=0.2, high=0.95),
            own[..., 2] - tall,
        ],
        2,
    )
    centre = torch.cat([on_wall(*spot, half), *[part[0] for part in parts], ground], 1)
    half_size = torch.cat([half, *[part[1] for part in parts], own], 1)
    rotation = torch.eye(3).expand(count, BOXES - SMALL_BOXES, 3, 3)
    rotation = torch.cat([rotation, rotation_about_z(s.uniform(*before, high=2 * math.pi))], 1)
    return [centre, rotation, half_size]
