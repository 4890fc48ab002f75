"""Scenes and cameras for training, many at a time: plain rooms, furnished rooms with photographs, and facades.

Plain rooms follow `rooms.py` (same furniture, same cameras, procedural textures). Furnished rooms add tables, shelves,
chairs and piles, often in one group, small things on top of them, photographs on every surface, and cameras that
scatter, walk or circle. Most of these look down on furniture from near, as who scans a room does. Facades are one wall
with rows of windows and columns in relief, seen from wide apart.

All scenes of a call are sampled together as `[B, ...]` tensors on the CPU, so that a seed gives the same scenes
whatever device renders them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from .raycast import ROOM_FACES, FrameScenes
from .rooms import look_at
from .textures import PROCEDURAL_SPAN

PLAIN, FURNISHED, FACADE = 0, 1, 2
KIND_SHARES = (0.4, 0.42, 0.18)
SCATTER, WALK, ORBIT = 0, 1, 2
MOTION_SHARES = ((0.85, 0.15, 0.0), (0.3, 0.55, 0.15), (0.45, 0.3, 0.25))  # of each kind of scene

WALL_BOXES, FURNITURE, PIECES, PARTS, SMALL_BOXES = 4, 8, 2, 6, 8
ELLIPSOIDS, SMALL_ELLIPSOIDS = 4, 4
BOXES = WALL_BOXES + FURNITURE + PIECES * PARTS + SMALL_BOXES
SOLIDS = 1 + BOXES + ELLIPSOIDS + SMALL_ELLIPSOIDS
SURFACES = ROOM_FACES + SOLIDS - 1
FAR_AWAY = 1e3  # where solids go that a scene does not have
CLEARANCE = 0.22
WALL_CLEARANCE = 0.2
CANDIDATES = 6
SCANNED = 0.65  # share of furnished rooms whose cameras are turned to their furniture
GATHERED = 0.6  # share of furnished rooms whose furniture stands in a group
FLAT_SHARES = (0.0, 0.3, 0.15)  # of the surfaces of each kind of scene: many real ones show next to nothing

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


@dataclass(frozen=True)
class SceneBatch:
    """B scenes with S views each. Surfaces, solids and tables are those of `raycast.FrameScenes`.

    Attributes:
        solids: `[B, K, 15]` centre, rotation (row by row) and half-size.
        surfaces: `[B, T, 12]` texture number, placing (5) and paint (6).
        lights: `[B, 5]` place of the lamp, ambient share, darkness of shadows.
        focal: `[B, 2]` focal lengths over width and height.
        cameras: `[B, S, 12]` centre, and camera-to-world rotation row by row.
        kind: `[B]` PLAIN, FURNISHED or FACADE, as floating numbers.
    """

    solids: torch.Tensor
    surfaces: torch.Tensor
    lights: torch.Tensor
    focal: torch.Tensor
    cameras: torch.Tensor
    kind: torch.Tensor

    def frame_scenes(self) -> FrameScenes:
        """The tables of all B * S frames, scene by scene."""
        views = self.cameras.shape[1]

        def per_frame(value: torch.Tensor) -> torch.Tensor:
            return value[:, None].expand(-1, views, *value.shape[1:]).flatten(0, 1).contiguous()

        solids, surfaces, lights = per_frame(self.solids), per_frame(self.surfaces), per_frame(self.lights)
        cameras = self.cameras.flatten(0, 1)
        return FrameScenes(
            centre=solids[..., :3],
            rotation=solids[..., 3:12].unflatten(2, (3, 3)),
            half_size=solids[..., 12:].contiguous(),
            cubes=1 + BOXES,
            camera=cameras[:, :3].contiguous(),
            orientation=cameras[:, 3:].unflatten(1, (3, 3)).contiguous(),
            focal=per_frame(self.focal),
            light=lights[:, :3].contiguous(),
            shade=lights[:, 3:].contiguous(),
            texture=surfaces[..., 0].contiguous(),
            placing=surfaces[..., 1:6].contiguous(),
            paint=surfaces[..., 6:].contiguous(),
        )

    def to(self, device: torch.device | str) -> SceneBatch:
        """The batch with every tensor on `device`."""
        return SceneBatch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def world_to_camera(self) -> torch.Tensor:
        """`[B, S, 3, 4]` extrinsics, the world being the scene's."""
        rotation = self.cameras[..., 3:].unflatten(2, (3, 3)).transpose(2, 3)
        return torch.cat([rotation, -rotation @ self.cameras[..., :3, None]], 3)


class Sampler:
    """Random tensors from one generator, shortened."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """Uniform in [low, high)."""
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def log_uniform(self, *shape: int, low: float, high: float) -> torch.Tensor:
        """In [low, high), uniform in the logarithm."""
        return low * (high / low) ** torch.rand(shape, generator=self.generator)

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal."""
        return torch.randn(shape, generator=self.generator)

    def chance(self, *shape: int, p: float | torch.Tensor) -> torch.Tensor:
        """True with probability p."""
        return torch.rand(shape, generator=self.generator) < p

    def integers(self, *shape: int, high: int) -> torch.Tensor:
        """Integers in [0, high)."""
        return torch.randint(high, shape, generator=self.generator)

    def choice(self, shares: torch.Tensor) -> torch.Tensor:
        """`[B]` indices with probabilities `[B, n]`."""
        return torch.multinomial(shares, 1, generator=self.generator)[:, 0]

    def rotations(self, *shape: int) -> torch.Tensor:
        """`[*shape, 3, 3]` rotations, all equally likely."""
        first, second = self.normal(2, *shape, 3)
        first = F.normalize(first, dim=-1)
        second = F.normalize(second - (first * second).sum(-1, keepdim=True) * first, dim=-1)
        return torch.stack([first, second, torch.linalg.cross(first, second)], -1)


def turn(angle: torch.Tensor) -> torch.Tensor:
    """`[..., 3, 3]` rotations about z by `angle` `[...]` radians."""
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], -1).unflatten(-1, (3, 3))


def sample_scenes(
    scenes: int, views: int, generator: torch.Generator, textures: int, photographs: int
) -> SceneBatch:
    """Sample B scenes of S views on the CPU; the global random state is left alone.

    Args:
        scenes: B.
        views: S.
        generator: a generator on the CPU.
        textures: how many textures there are, the first `photographs` of them photographs, at least one not.
        photographs: 0 where there are none; scenes are then procedural throughout.
    """
    s = Sampler(generator)
    kind = s.choice(torch.tensor(KIND_SHARES).expand(scenes, -1))  # [B]
    is_plain, is_facade = kind == PLAIN, kind == FACADE
    room = torch.cat([s.uniform(scenes, 2, low=1.5, high=3.5), s.uniform(scenes, 1, low=1.2, high=1.7)], 1)
    outside = torch.cat([s.uniform(scenes, 2, low=2.0, high=5.0), s.uniform(scenes, 1, low=1.5, high=3.5)], 1)
    # Furnished rooms are smaller: real rooms are full, and cameras near to things.
    room = torch.where((kind == FURNISHED)[:, None], room * torch.tensor([0.8, 0.8, 0.9]), room)
    room = torch.where(is_facade[:, None], outside, room)  # [B, 3] half extents

    centre, rotation, half_size, present = sample_solids(s, kind, room)
    far = torch.tensor([FAR_AWAY, FAR_AWAY, FAR_AWAY])
    centre = torch.where(present[..., None], centre, far)
    half_size = torch.where(present[..., None], half_size, 1e-3)
    eye = torch.eye(3).expand(scenes, 1, 3, 3)
    centre = torch.cat([torch.zeros(scenes, 1, 3), centre], 1)
    rotation, half_size = torch.cat([eye, rotation], 1), torch.cat([room[:, None], half_size], 1)

    position, orientation, focal = sample_views(
        s, kind, room, centre[:, 1:], rotation[:, 1:], half_size[:, 1:], views
    )
    light = s.uniform(scenes, 3, low=-1.0) * room * torch.tensor([0.8, 0.8, 0.9])
    darkness = s.uniform(scenes) * s.chance(scenes, p=0.6) * ~is_plain
    lights = torch.cat([light, s.uniform(scenes, 1, low=0.35, high=0.75), darkness[:, None]], 1)
    return SceneBatch(
        solids=torch.cat([centre, rotation.flatten(2), half_size], 2),
        surfaces=sample_surfaces(s, kind, half_size, textures, photographs),
        lights=lights,
        focal=focal,
        cameras=torch.cat([position, orientation.flatten(2)], 2),
        kind=kind.float(),
    )


def sample_solids(
    s: Sampler, kind: torch.Tensor, room: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centre, rotation, half-size and presence of all solids but the room, in the order of `raycast.FrameScenes`."""
    count = len(kind)
    is_plain, is_facade = kind == PLAIN, kind == FACADE
    hub = s.uniform(count, 2, low=-0.7, high=0.7) * room[:, :2]
    gathered = (kind == FURNISHED) & s.chance(count, p=GATHERED)
    wall_boxes = sample_wall_boxes(s, room, is_plain)
    furniture = sample_furniture(s, room, is_plain, hub, gathered)
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


def sample_wall_boxes(s: Sampler, room: torch.Tensor, is_plain: torch.Tensor) -> list[torch.Tensor]:
    """Pictures and cabinets on the walls."""
    count, shape = len(room), (len(room), WALL_BOXES)
    wall = F.one_hot(s.chance(*shape, p=0.5).long(), 3).bool()  # [B, n, 3]
    side = torch.where(s.chance(*shape, p=0.5), 1.0, -1.0)[..., None]
    thickness = torch.where(
        is_plain[:, None], s.uniform(*shape, low=0.02, high=0.25), s.log_uniform(*shape, low=0.01, high=0.35)
    )[..., None]
    half_size = torch.cat(
        [s.uniform(*shape, 2, low=0.15, high=0.9), s.uniform(*shape, 1, low=0.15, high=0.8)], 2
    )
    half_size = torch.where(wall, thickness, half_size)
    reach = (room[:, None] - half_size).clamp(min=0)
    centre = torch.where(wall, side, s.uniform(*shape, 3, low=-1.0)) * reach
    return [centre, torch.eye(3).expand(count, WALL_BOXES, 3, 3), half_size]


def near(s: Sampler, hub: torch.Tensor, room: torch.Tensor, count: int) -> torch.Tensor:
    """`[B, count, 2]` places about a metre from `hub` `[B, 2]`, within the room."""
    away = F.normalize(s.normal(len(hub), count, 2), dim=2) * s.uniform(len(hub), count, 1, low=0.2, high=1.4)
    limit = 0.92 * room[:, None, :2]
    return (hub[:, None] + away).maximum(-limit).minimum(limit)


def sample_furniture(
    s: Sampler, room: torch.Tensor, is_plain: torch.Tensor, hub: torch.Tensor, gathered: torch.Tensor
) -> list[torch.Tensor]:
    """Boxes of 0.2 to 2 m, most of them upright on the floor, in furnished rooms often along a wall or by the hub."""
    shape = (len(room), FURNITURE)
    half_size = torch.cat(
        [s.log_uniform(*shape, 2, low=0.1, high=0.6), s.log_uniform(*shape, 1, low=0.1, high=0.7)], 2
    )
    half_size = torch.where(s.chance(*shape, 1, p=0.15), 1.6 * half_size, half_size)
    centre = s.uniform(*shape, 3, low=-1.0) * (room[:, None] - 0.05)
    on_floor = s.chance(*shape, p=torch.where(is_plain, 0.65, 0.9)[:, None])
    height = torch.where(on_floor, half_size[..., 2] - room[:, None, 2], centre[..., 2])
    centre = torch.cat([centre[..., :2], height[..., None]], 2)
    tilted = ~on_floor & s.chance(*shape, p=0.5)
    yaw = s.uniform(*shape, high=2 * math.pi)
    # Furniture stands square to the walls, and half of it against one.
    square = ~is_plain[:, None] & s.chance(*shape, p=0.7)
    yaw = torch.where(square, 0.03 * s.normal(*shape), yaw)
    wall = (
        F.one_hot(s.chance(*shape, p=0.5).long(), 2).bool()
        & (square & on_floor & s.chance(*shape, p=0.6))[..., None]
    )
    side = torch.where(s.chance(*shape, p=0.5), 1.0, -1.0)[..., None]
    at_wall = side * (room[:, None, :2] - half_size[..., :2])
    by_hub = (gathered[:, None] & s.chance(*shape, p=0.4))[..., None]
    place = torch.where(by_hub, near(s, hub, room, FURNITURE), centre[..., :2])
    centre = torch.cat([torch.where(wall, at_wall, place), centre[..., 2:]], 2)
    rotation = torch.where(tilted[..., None, None], s.rotations(*shape), turn(yaw))
    return [centre, rotation, half_size]


def sample_pieces(
    s: Sampler, room: torch.Tensor, hub: torch.Tensor, gathered: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Tables, shelves, chairs and piles, as their boxes `[B, PIECES * PARTS, ...]` and as the boxes around them."""
    shape = (len(room), PIECES)
    which = s.integers(*shape, high=len(PIECE_PARTS))
    least, most = PIECE_LEAST[which], PIECE_MOST[which]
    size = least * (most / least) ** s.uniform(*shape, 3)  # [B, n, 3]
    place = s.uniform(*shape, 2, low=-0.85, high=0.85) * room[:, None, :2]
    place = torch.where(gathered[:, None, None], near(s, hub, room, PIECES), place)
    square = s.chance(*shape, p=0.5)
    quarter = s.integers(*shape, high=4) * (math.pi / 2) + 0.03 * s.normal(*shape)
    rotation = turn(torch.where(square, quarter, s.uniform(*shape, high=2 * math.pi)))  # [B, n, 3, 3]
    floor = torch.cat([place, -room[:, None, 2:].expand(-1, PIECES, -1)], 2)  # [B, n, 3]
    parts = PIECE_PARTS[which] * size.repeat(1, 1, 2)[:, :, None]  # [B, n, PARTS, 6]
    centre = floor[:, :, None] + (rotation[:, :, None] @ parts[..., :3, None])[..., 0]
    every = rotation[:, :, None].expand(-1, -1, PARTS, -1, -1)
    boxes = [centre.flatten(1, 2), every.flatten(1, 2), parts[..., 3:].clamp(min=0.004).flatten(1, 2)]
    middle = floor + torch.tensor([0, 0, 0.5]) * size
    return boxes, [middle, rotation, size / 2]


def sample_small(s: Sampler, supports: tuple[torch.Tensor, ...], count: int) -> list[torch.Tensor]:
    """Things of 6 to 40 cm on top of upright supports; a few of them hang in the air like things on strings."""
    centre, rotation, half_size, upright = supports
    shape = (len(centre), count)
    which = torch.multinomial(upright.float() + 1e-3, count, True, generator=s.generator)  # [B, n]

    def taken(value: torch.Tensor) -> torch.Tensor:
        index = which.view(*shape, *[1] * (value.ndim - 2)).expand(*shape, *value.shape[2:])
        return value.gather(1, index)

    own = s.log_uniform(*shape, 1, low=0.03, high=0.2) * s.log_uniform(*shape, 3, low=0.6, high=1.6)
    top = taken(half_size)
    local = s.uniform(*shape, 3, low=-0.85, high=0.85) * top
    local = torch.cat([local[..., :2], top[..., 2:] + own[..., 2:]], 2)
    place = taken(centre) + (taken(rotation) @ local[..., None])[..., 0]
    return [place, turn(s.uniform(*shape, high=2 * math.pi)), own]


def sample_relief(s: Sampler, room: torch.Tensor) -> list[torch.Tensor]:
    """The boxes of a facade on the wall at +y: two rows of equal windows or columns, single parts, things in front."""
    count, row = len(room), PARTS
    wide, tall = room[:, None, 0], room[:, None, 2]

    def on_wall(x: torch.Tensor, z: torch.Tensor, half_size: torch.Tensor) -> torch.Tensor:
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
    rotation = torch.cat([rotation, turn(s.uniform(*before, high=2 * math.pi))], 1)
    return [centre, rotation, half_size]


def sample_views(
    s: Sampler,
    kind: torch.Tensor,
    room: torch.Tensor,
    centre: torch.Tensor,
    rotation: torch.Tensor,
    half_size: torch.Tensor,
    views: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Camera centres `[B, S, 3]`, camera-to-world rotations `[B, S, 3, 3]` and focal lengths `[B, 2]`."""
    count = len(kind)
    is_plain, is_facade = (kind == PLAIN)[:, None], (kind == FACADE)[:, None]
    lying = torch.tensor([1.0, 1.0, 0.6])  # people move less up and down than about
    middle = s.uniform(count, 3, low=-1.0) * (room - 0.45).clamp(min=0.2) * lying
    targets = s.uniform(count, 4, 3, low=-0.9, high=0.9) * room[:, None]
    farthest = (targets - middle[:, None]).norm(dim=2).argmax(1)
    target = targets[torch.arange(count), farthest]
    # Before a facade: in the half that faces it, and looking at it.
    before = torch.cat(
        [middle[:, :1] * 0.8, room[:, 1:2] * s.uniform(count, 1, low=-0.9, high=0.35), middle[:, 2:] * 0.7], 1
    )
    at_wall = torch.cat([targets[:, 0, :1] * 0.6, room[:, 1:2] * 0.95, targets[:, 0, 2:] * 0.5], 1)
    middle, target = torch.where(is_facade, before, middle), torch.where(is_facade, at_wall, target)
    scan, scanned = sample_scan(s, room, centre)
    is_scan = (kind == FURNISHED)[:, None] & s.chance(count, 1, p=SCANNED)
    middle, target = torch.where(is_scan, scan, middle), torch.where(is_scan, scanned, target)
    away = (target - middle).norm(dim=1, keepdim=True)  # [B, 1]

    motion = s.choice(torch.tensor(MOTION_SHARES)[kind])[:, None, None]  # [B, 1, 1]
    time = torch.linspace(0, 1, views) if views > 1 else torch.full((1,), 0.5)
    order = torch.where(s.chance(count, 1, p=0.5), s.uniform(count, views), time).argsort(1)
    time = time.expand(count, -1).gather(1, order)[..., None] - 0.5  # [B, S, 1] in [-1/2, 1/2]

    spread = torch.where(
        is_plain, s.uniform(count, 1, low=0.35, high=0.9), s.log_uniform(count, 1, low=0.04, high=1.0)
    )
    spread = torch.where(is_facade, away * s.uniform(count, 1, low=0.05, high=0.45), spread)[:, None]
    heading = s.normal(count, 1, 3) * torch.tensor([1.0, 1.0, 0.3])
    heading = F.normalize(
        heading * torch.where(is_facade[:, None], torch.tensor([1.0, 0.4, 0.5]), 1.0), dim=2
    )
    length = s.log_uniform(count, 1, low=0.1, high=3.0)
    length = torch.where(is_facade, away * s.log_uniform(count, 1, low=0.1, high=1.6), length)[:, None]
    angle = s.log_uniform(count, 1, low=0.15, high=2.2) * time[..., 0]  # [B, S]
    arm = (middle - target)[:, None, :, None]  # [B, 1, 3, 1]
    circle = target[:, None] + (turn(angle) @ arm)[..., 0] * (1 + 0.08 * s.normal(count, views, 1))
    drift = middle[:, None] + heading * length * time
    path = torch.where(motion == ORBIT, circle, drift)
    # How far from its place on the path a camera may be, if that place is taken.
    noise = s.normal(count, CANDIDATES, views, 3) * torch.tensor([1.0, 1.0, 0.45])
    detour = torch.tensor([0.03, 0.08, 0.15, 0.3, 0.5, 0.8])[:, None, None] * length.clamp(max=1)[:, None]
    scattered = middle[:, None, None] + noise * spread[:, None]
    candidates = torch.where(motion[:, None] == SCATTER, scattered, path[:, None] + noise * detour)
    limit = (room - WALL_CLEARANCE)[:, None, None]
    candidates = candidates.maximum(-limit).minimum(limit)  # [B, C, S, 3]
    position = first_clear(candidates.transpose(1, 2), centre, rotation, half_size)  # [B, S, 3]

    steady = s.log_uniform(count, 1, 1, low=0.02, high=0.2)
    scatter = torch.where((motion == SCATTER) & is_plain[:, None], 0.28, steady) * away[:, None]
    scatter = torch.where(
        (motion == SCATTER) & ~is_plain[:, None], s.uniform(count, 1, 1, low=0.05, high=0.4), scatter
    )
    # Who walks through a room looks about: often its first and its last view have nothing in common.
    turns = torch.where((kind == FURNISHED)[:, None] & s.chance(count, 1, p=0.65), 2.4, 0.9)
    pan = F.normalize(s.normal(count, 1, 3) * lying, dim=2) * (s.uniform(count, 1) * turns * away)[:, None]
    pan = torch.where(motion == WALK, pan * time, torch.zeros(3))
    looked_at = target[:, None] + pan + s.normal(count, views, 3) * scatter * lying
    roll = s.normal(count, views) * torch.where(is_plain, 0.09, s.log_uniform(count, 1, low=0.01, high=0.2))
    roll = roll + torch.where(is_plain, 0.0, 0.05 * s.normal(count, 1))
    orientation = look_at(position, looked_at) @ turn(roll)
    degrees = torch.where(
        is_plain, s.uniform(count, 1, low=45, high=75), s.uniform(count, 1, low=33, high=85)
    )
    focal = 0.5 / torch.tan(torch.deg2rad(degrees) / 2)  # over the width
    squeeze = 1 + torch.where(is_plain, 0.0, 0.02) * s.normal(count, 1).clamp(-2, 2)
    return position, orientation, torch.cat([focal, focal * squeeze], 1)


def sample_scan(s: Sampler, room: torch.Tensor, centre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, 3]` places of a camera that looks at furniture from near and above, and `[B, 3]` what it looks at."""
    count = len(room)
    things = centre[:, WALL_BOXES:BOXES]
    here = (things.abs().amax(2) < FAR_AWAY / 2).float() + 1e-6
    target = things[torch.arange(count), s.choice(here)]
    target = target.maximum(-room).minimum(room) + 0.15 * s.normal(count, 3)
    # From the side of the room that is open, rather than from the wall behind.
    side = F.normalize(s.normal(count, 2) * 0.7 - target[:, :2] / room[:, :2], dim=1)
    distance = s.log_uniform(count, 1, low=0.7, high=2.8)
    height = s.uniform(count, 1, low=0.05, high=0.8) * distance
    limit = room - WALL_CLEARANCE
    place = target + torch.cat([side * distance, height], 1)
    return place.maximum(-limit).minimum(limit), target


def first_clear(
    candidates: torch.Tensor, centre: torch.Tensor, rotation: torch.Tensor, half_size: torch.Tensor
) -> torch.Tensor:
    """`[B, S, 3]` the first of candidates `[B, S, C, 3]` that is clear of all solids, or else the clearest."""
    count, views, choices, _ = candidates.shape
    # Distance to the bounding box: exact for boxes, and on the safe side for ellipsoids.
    start = -(rotation.transpose(2, 3) @ centre[..., None])[..., 0]  # [B, K, 3]
    local = torch.einsum("bnj,bkji->bnki", candidates.flatten(1, 2), rotation) + start[:, None]
    beyond = local.abs() - half_size[:, None]
    distance = beyond.clamp(min=0).norm(dim=3) + beyond.amax(3).clamp(max=0)  # [B, S*C, K]
    clearance = distance.amin(2).clamp(max=CLEARANCE).view(count, views, choices)
    # Stable: among equals the first.
    best = clearance.sort(dim=2, descending=True, stable=True).indices[..., :1, None].expand(-1, -1, -1, 3)
    return candidates.gather(2, best)[:, :, 0]


def sample_surfaces(
    s: Sampler, kind: torch.Tensor, half_size: torch.Tensor, textures: int, photographs: int
) -> torch.Tensor:
    """`[B, T, 12]` texture number, placing and paint of each surface; `half_size` `[B, K, 3]` starts with the room."""
    shape = (len(kind), SURFACES)
    is_plain, is_facade = (kind == PLAIN)[:, None], (kind == FACADE)[:, None]
    procedural = photographs + s.integers(*shape, high=textures - photographs)
    photograph = s.integers(*shape, high=max(photographs, 1))
    # Parts of one piece, and windows of one row, look alike.
    start = ROOM_FACES + WALL_BOXES + FURNITURE
    for piece in range(PIECES):
        part = slice(start + piece * PARTS, start + (piece + 1) * PARTS)
        photograph[:, part] = photograph[:, part.start : part.start + 1]
    share = torch.where(is_plain, 0.0, torch.where(s.chance(len(kind), 1, p=0.75), 0.95, 0.5))
    is_photo = s.chance(*shape, p=share) & (photographs > 0)
    number = torch.where(is_photo, photograph, procedural)

    # A photograph covers a good part of what it lies on; procedural textures keep their own scale.
    size = torch.cat([half_size[:, :1].expand(-1, ROOM_FACES, -1), half_size[:, 1:]], 1)
    extent = 2 * size.amax(2)  # [B, T] metres
    repeats = s.log_uniform(*shape, low=0.5, high=4.0)
    repeats[:, :ROOM_FACES] = s.log_uniform(shape[0], ROOM_FACES, low=0.7, high=8.0)
    tiles = torch.where(is_photo, repeats / extent, 1 / PROCEDURAL_SPAN)
    turned = torch.where(
        s.chance(*shape, p=0.7),
        s.integers(*shape, high=4) * (math.pi / 2),
        s.uniform(*shape, high=2 * math.pi),
    )
    offset = s.uniform(*shape, 2, high=2.0)
    placing = torch.stack(
        [turned.cos() * tiles, turned.sin() * tiles, offset[..., 0], offset[..., 1], tiles], 2
    )

    # Paint: contrast and brightness of the surface, and a tint; procedural textures have their colours.
    contrast = torch.where(is_plain, 1.0, s.log_uniform(*shape, low=0.5, high=1.5))
    flat = s.chance(*shape, p=torch.tensor(FLAT_SHARES)[kind][:, None])
    contrast = torch.where(flat, contrast * 0.15, contrast)
    brightness = torch.where(is_plain, 0.0, 0.12 * s.normal(*shape)) + torch.where(
        flat, s.uniform(*shape, low=-0.1, high=0.4), 0.0
    )
    tint = 1 + torch.where(is_plain, 0.0, 0.15)[..., None] * s.normal(*shape, 3).clamp(-2, 2)
    # Bricks and leaves alike sit around the middle grey of the facade's sky, which is bright.
    sky = torch.zeros(shape, dtype=torch.bool)
    sky[:, ROOM_FACES - 1] = True
    brightness = torch.where(is_facade & sky, 0.35, brightness)
    gain = contrast[..., None] * tint
    middle = 0.45
    paint = torch.cat([gain, (middle * (tint - gain)) + brightness[..., None]], 2)
    return torch.cat([number[..., None].float(), placing, paint], 2)
