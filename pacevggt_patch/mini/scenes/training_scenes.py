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
from torch import Tensor

from .geometry import ROOM_FACES, WALL_CLEARANCE, clearance, look_at, rotation_about_z
from .layout import BOXES, FACADE, FURNISHED, PARTS, PIECES, PLAIN, SURFACES, sample_solids
from .raycast import FrameScenes
from .sampling import FURNITURE, WALL_BOXES, Sampler
from .textures import PROCEDURAL_SPAN

KIND_SHARES = (0.4, 0.42, 0.18)
SCATTER, WALK, ORBIT = 0, 1, 2
MOTION_SHARES = ((0.85, 0.15, 0.0), (0.3, 0.55, 0.15), (0.45, 0.3, 0.25))  # of each kind of scene
FAR_AWAY = 1e3  # where solids go that a scene does not have
CANDIDATES = 6  # places for each camera
LYING = torch.tensor([1.0, 1.0, 0.6])  # people move less up and down than about
SCANNED = 0.65  # share of furnished rooms whose cameras are turned to their furniture
FLAT_SHARES = (0.0, 0.3, 0.15)  # of the surfaces of each kind of scene: many real ones show next to nothing


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

    solids: Tensor
    surfaces: Tensor
    lights: Tensor
    focal: Tensor
    cameras: Tensor
    kind: Tensor

    def frame_scenes(self) -> FrameScenes:
        """The tables of all B * S frames, scene by scene."""
        views = self.cameras.shape[1]

        def per_frame(value: Tensor) -> Tensor:
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

    def world_to_camera(self) -> Tensor:
        """`[B, S, 3, 4]` extrinsics, the world being the scene's."""
        rotation = self.cameras[..., 3:].unflatten(2, (3, 3)).transpose(2, 3)
        return torch.cat([rotation, -rotation @ self.cameras[..., :3, None]], 3)


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


def sample_views(
    s: Sampler, kind: Tensor, room: Tensor, centre: Tensor, rotation: Tensor, half_size: Tensor, views: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Camera centres `[B, S, 3]`, camera-to-world rotations `[B, S, 3, 3]` and focal lengths `[B, 2]`."""
    is_plain = (kind == PLAIN)[:, None]
    middle, target = sample_aim(s, kind, room, centre)
    away = (target - middle).norm(dim=1, keepdim=True)  # [B, 1]
    motion = s.choice(torch.tensor(MOTION_SHARES)[kind])[:, None, None]  # [B, 1, 1]
    time = torch.linspace(0, 1, views) if views > 1 else torch.full((1,), 0.5)
    order = torch.where(s.chance(len(kind), 1, p=0.5), s.uniform(len(kind), views), time).argsort(1)
    time = time.expand(len(kind), -1).gather(1, order)[..., None] - 0.5  # [B, S, 1] in [-1/2, 1/2]

    candidates = sample_places(s, kind, middle, target, away, motion, time)
    limit = (room - WALL_CLEARANCE)[:, None, None]
    candidates = candidates.maximum(-limit).minimum(limit)  # [B, C, S, 3]
    position = first_clear(candidates.transpose(1, 2), centre, rotation, half_size)  # [B, S, 3]
    looked_at = sample_looks(s, kind, target, away, motion, time)
    count = len(kind)
    roll = s.normal(count, views) * torch.where(is_plain, 0.09, s.log_uniform(count, 1, low=0.01, high=0.2))
    roll = roll + torch.where(is_plain, 0.0, 0.05 * s.normal(count, 1))
    orientation = look_at(position, looked_at) @ rotation_about_z(roll)
    degrees = torch.where(
        is_plain, s.uniform(count, 1, low=45, high=75), s.uniform(count, 1, low=33, high=85)
    )
    focal = 0.5 / torch.tan(torch.deg2rad(degrees) / 2)  # over the width
    squeeze = 1 + torch.where(is_plain, 0.0, 0.02) * s.normal(count, 1).clamp(-2, 2)
    return position, orientation, torch.cat([focal, focal * squeeze], 1)


def sample_aim(s: Sampler, kind: Tensor, room: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, 3]` the middle of a clip's cameras, and `[B, 3]` what they look at."""
    count, is_facade = len(kind), (kind == FACADE)[:, None]
    middle = s.uniform(count, 3, low=-1.0) * (room - 0.45).clamp(min=0.2) * LYING
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
    return torch.where(is_scan, scan, middle), torch.where(is_scan, scanned, target)


def sample_places(
    s: Sampler, kind: Tensor, middle: Tensor, target: Tensor, away: Tensor, motion: Tensor, time: Tensor
) -> Tensor:
    """`[B, C, S, 3]` places for each camera: scattered, on a way or on a circle, the first ones nearest to it."""
    count, views = time.shape[:2]
    is_plain, is_facade = (kind == PLAIN)[:, None], (kind == FACADE)[:, None]
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
    circle = target[:, None] + (rotation_about_z(angle) @ arm)[..., 0] * (
        1 + 0.08 * s.normal(count, views, 1)
    )
    path = torch.where(motion == ORBIT, circle, middle[:, None] + heading * length * time)
    # How far from its place on the path a camera may be, if that place is taken.
    noise = s.normal(count, CANDIDATES, views, 3) * torch.tensor([1.0, 1.0, 0.45])
    detour = torch.tensor([0.03, 0.08, 0.15, 0.3, 0.5, 0.8])[:, None, None] * length.clamp(max=1)[:, None]
    scattered = middle[:, None, None] + noise * spread[:, None]
    return torch.where(motion[:, None] == SCATTER, scattered, path[:, None] + noise * detour)


def sample_looks(
    s: Sampler, kind: Tensor, target: Tensor, away: Tensor, motion: Tensor, time: Tensor
) -> Tensor:
    """`[B, S, 3]` what each camera looks at: the target, but for scatter and for a pan on a walk."""
    count, views = time.shape[:2]
    scattered, is_plain = motion == SCATTER, (kind == PLAIN)[:, None]
    steady = s.log_uniform(count, 1, 1, low=0.02, high=0.2)
    scatter = torch.where(scattered & is_plain[:, None], 0.28, steady) * away[:, None]
    wide = s.uniform(count, 1, 1, low=0.05, high=0.4)
    scatter = torch.where(scattered & ~is_plain[:, None], wide, scatter)
    # Who walks through a room looks about: often its first and its last view have nothing in common.
    turns = torch.where((kind == FURNISHED)[:, None] & s.chance(count, 1, p=0.65), 2.4, 0.9)
    pan = F.normalize(s.normal(count, 1, 3) * LYING, dim=2) * (s.uniform(count, 1) * turns * away)[:, None]
    pan = torch.where(motion == WALK, pan * time, torch.zeros(3))
    return target[:, None] + pan + s.normal(count, views, 3) * scatter * LYING


def sample_scan(s: Sampler, room: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
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


def first_clear(candidates: Tensor, centre: Tensor, rotation: Tensor, half_size: Tensor) -> Tensor:
    """`[B, S, 3]` the first of candidates `[B, S, C, 3]` that is clear of all solids, or else the clearest."""
    start = -(rotation.transpose(2, 3) @ centre[..., None])[..., 0]  # [B, K, 3]
    local = torch.einsum("bnj,bkji->bnki", candidates.flatten(1, 2), rotation) + start[:, None]
    clear = clearance(local, half_size[:, None]).view(candidates.shape[:3])
    # Stable: among equals the first.
    best = clear.sort(dim=2, descending=True, stable=True).indices[..., :1, None].expand(-1, -1, -1, 3)
    return candidates.gather(2, best)[:, :, 0]


def sample_surfaces(s: Sampler, kind: Tensor, half_size: Tensor, textures: int, photographs: int) -> Tensor:
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
