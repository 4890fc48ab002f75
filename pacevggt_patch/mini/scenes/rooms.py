"""Synthetic rooms: furnished boxes seen by hand-held cameras, with exact depth and poses.

A room is a box of walls with furniture (boxes), pictures and cabinets (flat boxes on the walls) and
ellipsoids, each with its own solid texture, lit by one point light. `render_room` samples a scene and its
cameras from a seed, casts one ray through the centre of each pixel and shades what it hits. World axes: x and
y along the floor, z up, the origin in the middle of the room, metres.

Points and directions are kept as `[3, N]`, coordinates first, so that what is reduced over x, y, z stays
contiguous over the pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...clips.clip import Clip
from ...errors import ClipError
from .geometry import (
    ROOM_FACES,
    WALL_CLEARANCE,
    Axes,
    clearance,
    cross_cube,
    enter_sphere,
    look_at,
    rotation_about_z,
)
from .sampling import ELLIPSOIDS, FURNITURE, WALL_BOXES, Sampler
from .sampling import sample_furniture as sample_boxes
from .sampling import sample_wall_boxes as sample_flat_boxes

NOISE_PERIOD = 64  # lattice cells; the finest noise repeats after 7 m, the widest room
CANDIDATES_PER_CAMERA = 8


@dataclass(frozen=True)
class Solids:
    """K boxes or ellipsoids: `x_world = rotation x_local + centre`, reaching out to `half_size`."""

    centre: Tensor  # [K, 3]
    rotation: Tensor  # [K, 3, 3]
    half_size: Tensor  # [K, 3]

    @property
    def unit_from_world(self) -> Tensor:
        """`[K, 3, 3]` linear map that takes the solid to the cube, or the sphere, of half-size 1."""
        return self.rotation.transpose(1, 2) / self.half_size[:, :, None]


@dataclass(frozen=True)
class Textures:
    """Solid textures of T surfaces, as functions of the position in the object's own frame, in metres."""

    colours: Tensor  # [T, 3, 3] ground, noise and pattern colour, RGB
    noise_origin: Tensor  # [T, 3] where in the noise lattice the surface starts
    noise_frequency: Tensor  # [T, 2] coarse and fine, cells per metre
    noise_weight: Tensor  # [T, 2]
    checker_frequency: Tensor  # [T] fields per metre
    checker_weight: Tensor  # [T]
    stripe_wave: Tensor  # [T, 3] radians per metre
    stripe_weight: Tensor  # [T]


@dataclass(frozen=True)
class Scene:
    """One furnished room. Surfaces are numbered: 6 room faces (-x, +x, -y, +y, -z, +z), boxes, ellipsoids."""

    room: Tensor  # [3] half extents
    boxes: Solids
    ellipsoids: Solids
    textures: Textures
    noise: Tensor  # [P, P, P] noise lattice, uniform in [0, 1]
    light: Tensor  # [3] position
    ambient: Tensor  # [] share of the light that comes from everywhere


@dataclass(frozen=True)
class Cameras:
    """S views by one camera."""

    centre: Tensor  # [S, 3]
    rotation: Tensor  # [S, 3, 3] camera to world
    field_of_view: Tensor  # [] horizontal, radians
    exposure: Tensor  # [S] factor on the light


@dataclass(frozen=True)
class Hits:
    """What N rays meet first."""

    distance: Tensor  # [N] in lengths of the ray's direction
    surface: Tensor  # [N] number of the surface (see Scene)
    point: Tensor  # [3, N] in the frame of the object, metres
    normal: Tensor  # [3, N] world frame, unit length, towards the side the ray comes from


def render_room(
    seed: int,
    frames: int = 8,
    height: int = 224,
    width: int = 224,
    *,
    device: torch.device | str = "cpu",
) -> Clip:
    """Render a clip of one synthetic room, with exact depth and cameras.

    The seed alone decides the scene: it is sampled on the CPU whatever `device` renders it, with a generator
    of its own, and the global random state is neither read nor changed. More frames show the same room from
    other places.

    Args:
        seed: Any integer that `torch.Generator.manual_seed` takes.
        frames: Number of views S. They look at one area of the room and overlap, in no particular order.
        height: Height of the frames, in pixels.
        width: Width of the frames, in pixels.
        device: Where to render, and where the clip lies.

    Returns:
        A `Clip` with all fields, every pixel valid, principal point at `(width / 2, height / 2)`, unit metre.

    Raises:
        ClipError: `frames`, `height` or `width` is below 1.
    """
    for name, value in (("frames", frames), ("height", height), ("width", width)):
        if value < 1:
            raise ClipError(f"{name} must be at least 1, got {value}")
    generator = torch.Generator().manual_seed(seed)
    scene = sample_scene(generator)
    cameras: Cameras = move(sample_cameras(scene, frames, generator), device)
    scene: Scene = move(scene, device)
    intrinsics = pinhole_intrinsics(cameras.field_of_view, height, width)
    rays = pixel_rays(intrinsics, height, width)  # [3, H*W]
    images, depths = [], []
    for centre, rotation, exposure in zip(cameras.centre, cameras.rotation, cameras.exposure, strict=True):
        directions = rotation @ rays  # [3, H*W]
        hits = cast_rays(scene, centre, directions)
        colour = shade(scene, hits, centre[:, None] + hits.distance * directions)  # [3, H*W]
        images.append((colour * exposure).clamp(0, 1).view(3, height, width))
        # The rays have z = 1 in the camera frame, so that distance along them is z-depth.
        depths.append(hits.distance.view(height, width))
    return Clip(
        f"room-{seed}",
        torch.stack(images),
        intrinsics.expand(frames, 3, 3).clone(),
        world_to_camera(cameras),
        torch.stack(depths),
    )


def move(value: Any, device: torch.device | str) -> Any:
    """A dataclass of tensors (or of such dataclasses) with every tensor on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(**{field.name: move(getattr(value, field.name), device) for field in fields(value)})


def sample_scene(generator: torch.Generator) -> Scene:
    """One random room."""
    s = Sampler(generator)
    room = torch.cat([s.uniform(2, low=1.5, high=3.5), s.uniform(1, low=1.2, high=1.7)])
    # Some rooms are full and some are nearly bare.
    presence = s.uniform(low=0.4, high=1.0)
    boxes = join(sample_wall_boxes(s, room), sample_furniture(s, room))
    boxes = keep(boxes, s.chance(WALL_BOXES + FURNITURE, p=presence))
    ellipsoids = keep(sample_ellipsoids(s, room), s.chance(ELLIPSOIDS, p=presence))
    return Scene(
        room=room,
        boxes=boxes,
        ellipsoids=ellipsoids,
        textures=sample_textures(s, ROOM_FACES + len(boxes.centre) + len(ellipsoids.centre)),
        noise=s.uniform(NOISE_PERIOD, NOISE_PERIOD, NOISE_PERIOD),
        light=s.uniform(3, low=-1.0) * room * torch.tensor([0.8, 0.8, 0.9]),
        ambient=s.uniform(low=0.35, high=0.75),
    )


def join(first: Solids, second: Solids) -> Solids:
    """The solids of both."""
    names = [field.name for field in fields(Solids)]
    return Solids(**{name: torch.cat([getattr(first, name), getattr(second, name)]) for name in names})


def keep(solids: Solids, chosen: Tensor) -> Solids:
    """The solids that `chosen` `[K]` marks."""
    return Solids(**{field.name: getattr(solids, field.name)[chosen] for field in fields(Solids)})


def sample_furniture(s: Sampler, room: Tensor) -> Solids:
    """Boxes of 0.2 to 2 m, about two thirds of them upright on the floor, some of the others at any angle."""
    centre, half_size, _, tilted, yaw = (value[0] for value in sample_boxes(s, room[None], 0.65))
    rotation = torch.where(tilted[:, None, None], s.rotations(FURNITURE), rotation_about_z(yaw))
    return Solids(centre, rotation, half_size)


def sample_wall_boxes(s: Sampler, room: Tensor) -> Solids:
    """Flat boxes with their back inside one of the four walls."""
    boxes = sample_flat_boxes(s, room[None], partial(s.uniform, low=0.02, high=0.25))
    return Solids(*(value[0] for value in boxes))


def sample_ellipsoids(s: Sampler, room: Tensor) -> Solids:
    """Ellipsoids of 0.2 to 1.2 m anywhere in the room."""
    radius = s.log_uniform(ELLIPSOIDS, 1, low=0.12, high=0.48)
    half_size = radius * s.uniform(ELLIPSOIDS, 3, low=0.7, high=1.3)
    centre = s.uniform(ELLIPSOIDS, 3, low=-1.0) * (room - 0.1)
    return Solids(centre, s.rotations(ELLIPSOIDS), half_size)


def sample_textures(s: Sampler, surfaces: int) -> Textures:
    """Colours of any saturation and contrast with value noise; some surfaces also checkered or striped."""
    ground = s.uniform(surfaces, 3, low=0.1, high=0.9)
    ground = torch.lerp(ground.mean(1, keepdim=True), ground, s.uniform(surfaces, 1))
    contrast = s.log_uniform(surfaces, 1, 1, low=0.08, high=0.96)
    others = ground[:, None] + s.uniform(surfaces, 2, 3, low=-1.0) * contrast
    wave = F.normalize(s.normal(surfaces, 3), dim=1)
    return Textures(
        colours=torch.cat([ground[:, None], others.clamp(0, 1)], dim=1),
        noise_origin=s.uniform(surfaces, 3, high=NOISE_PERIOD),
        noise_frequency=torch.cat(
            [s.log_uniform(surfaces, 1, low=0.8, high=3.2), s.log_uniform(surfaces, 1, low=3.0, high=9.0)], 1
        ),
        noise_weight=torch.cat(
            [s.uniform(surfaces, 1, low=0.3, high=1.3), s.uniform(surfaces, 1, low=0.1, high=0.8)], 1
        ),
        checker_frequency=s.log_uniform(surfaces, low=1.0, high=5.0),
        checker_weight=sample_pattern_weight(s, surfaces),
        stripe_wave=wave * s.log_uniform(surfaces, 1, low=6.0, high=24.0),
        stripe_weight=sample_pattern_weight(s, surfaces),
    )


def sample_pattern_weight(s: Sampler, surfaces: int) -> Tensor:
    """`[T]` weight of a pattern that three surfaces in ten have."""
    return torch.where(s.chance(surfaces, p=0.3), s.uniform(surfaces, low=0.3, high=0.9), 0.0)


def sample_cameras(scene: Scene, frames: int, generator: torch.Generator) -> Cameras:
    """Views from around one place towards one area, upright but for a little roll, clear of the furniture."""
    s = Sampler(generator)
    lying = torch.tensor([1.0, 1.0, 0.6])  # people move less up and down than about
    middle = s.uniform(3, low=-1.0) * (scene.room - 0.45).clamp(min=0.2) * lying
    targets = s.uniform(4, 3, low=-0.9, high=0.9) * scene.room
    # The farthest of a few candidates: views across the room show more of it.
    target = targets[(targets - middle).norm(dim=1).argmax()]
    spread = s.uniform(low=0.35, high=0.9) * torch.tensor([1.0, 1.0, 0.45])
    candidates = middle + s.normal(CANDIDATES_PER_CAMERA * frames, 3) * spread
    limit = scene.room - WALL_CLEARANCE
    centre = clearest(scene, candidates.clamp(-limit, limit), frames)  # [S, 3]
    scatter = 0.28 * (target - middle).norm() * lying
    looked_at = target + s.normal(frames, 3) * scatter
    return Cameras(
        centre=centre,
        rotation=look_at(centre, looked_at) @ rotation_about_z(0.09 * s.normal(frames)),
        field_of_view=s.uniform(low=math.radians(45), high=math.radians(75)),
        exposure=1 + 0.12 * s.normal(frames).clamp(-2, 2),
    )


def clearest(scene: Scene, candidates: Tensor, count: int) -> Tensor:
    """The first `count` candidates `[M, 3]` clear of all objects; if there are too few, the clearest."""
    solids = join(scene.boxes, scene.ellipsoids)
    if len(solids.centre) == 0:
        return candidates[:count]
    offset = candidates[:, None] - solids.centre  # [M, K, 3]
    local = torch.einsum("mki,kij->mkj", offset, solids.rotation)
    order = clearance(local, solids.half_size).argsort(descending=True, stable=True)
    return candidates[order[:count]]


def world_to_camera(cameras: Cameras) -> Tensor:
    """`[S, 3, 4]` extrinsics `[R | t]`."""
    rotation = cameras.rotation.transpose(1, 2)
    return torch.cat([rotation, -rotation @ cameras.centre[:, :, None]], dim=2)


def pinhole_intrinsics(field_of_view: Tensor, height: int, width: int) -> Tensor:
    """`[3, 3]` intrinsics of square pixels with the given horizontal field of view, centred on the image."""
    focal = width / 2 / torch.tan(field_of_view / 2)
    intrinsics = torch.eye(3, device=field_of_view.device)
    intrinsics[0, 0] = intrinsics[1, 1] = focal
    intrinsics[0, 2], intrinsics[1, 2] = width / 2, height / 2
    return intrinsics


def pixel_rays(intrinsics: Tensor, height: int, width: int) -> Tensor:
    """`[3, H*W]` directions through the pixel centres in the camera frame, with z = 1."""
    device = intrinsics.device
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device) + 0.5, torch.arange(width, device=device) + 0.5, indexing="ij"
    )
    x = (columns - intrinsics[0, 2]) / intrinsics[0, 0]
    y = (rows - intrinsics[1, 2]) / intrinsics[1, 1]
    return torch.stack([x, y, torch.ones_like(x)]).view(3, -1)


def cast_rays(scene: Scene, origin: Tensor, directions: Tensor) -> Hits:
    """What rays from `origin` `[3]`, inside the room, along `directions` `[3, N]` meet first."""
    walls = Solids(torch.zeros_like(scene.room)[None], torch.eye(3).to(scene.room)[None], scene.room[None])
    wall_distance = cross_cube(unit_rays(walls, origin, directions))[1]  # [1, N]
    box_distance = enter_cubes(unit_rays(scene.boxes, origin, directions))  # [B, N]
    ellipsoid_distance = enter_spheres(unit_rays(scene.ellipsoids, origin, directions))  # [E, N]
    distance, solid = torch.cat([wall_distance, box_distance, ellipsoid_distance]).min(dim=0)  # [N]

    solids = join(walls, join(scene.boxes, scene.ellipsoids))
    world = origin[:, None] + distance * directions  # [3, N]
    offset = world.T - solids.centre[solid]  # [N, 3]
    point = torch.einsum("ni,nij->jn", offset, solids.rotation[solid])  # [3, N]
    half_size = solids.half_size[solid].T  # [3, N]
    unit = point / half_size
    round_solid = solid > len(scene.boxes.centre)
    face = F.one_hot(unit.abs().argmax(dim=0), 3).T * unit.sign()  # [3, N] outward normal of a cube
    outward = torch.where(round_solid, unit / half_size, face)
    normal = F.normalize(torch.einsum("nij,jn->in", solids.rotation[solid], outward), dim=0)
    inside = solid == 0  # the room is seen from within
    wall = 2 * unit.abs().argmax(dim=0) + (face.sum(dim=0) > 0)
    surface = torch.where(inside, wall, solid + ROOM_FACES - 1)
    return Hits(distance, surface, point, torch.where(inside, -normal, normal))


def unit_rays(solids: Solids, origin: Tensor, directions: Tensor) -> Axes:
    """Starts `[K, 1]` and directions `[K, N]` of rays, along each axis of the solids of half-size 1."""
    start = solids.unit_from_world @ (origin - solids.centre)[:, :, None]
    direction = solids.unit_from_world @ directions
    return list(zip(start.unbind(1), direction.unbind(1), strict=True))


def enter_cubes(axes: Axes) -> Tensor:
    """`[K, N]` distances at which rays enter unit cubes; inf where they miss or start in it."""
    enter, leave = cross_cube(axes)
    return torch.where((enter < leave) & (enter > 0), enter, math.inf)


def enter_spheres(axes: Axes) -> Tensor:
    """`[K, N]` distances at which rays enter unit spheres; inf where they miss or start in it."""
    enter, meets = enter_sphere(axes)
    return torch.where(meets & (enter > 0), enter, math.inf)


def shade(scene: Scene, hits: Hits, world: Tensor) -> Tensor:
    """`[3, N]` light that the hit points `world` `[3, N]` send back: diffuse reflection, without shadows."""
    to_light = F.normalize(scene.light[:, None] - world, dim=0)
    facing = (hits.normal * to_light).sum(dim=0).clamp(min=0)
    return surface_colour(scene, hits) * torch.lerp(facing, torch.ones_like(facing), scene.ambient)


def surface_colour(scene: Scene, hits: Hits) -> Tensor:
    """`[3, N]` RGB of the textures at the hit points."""
    textures, surface, point = scene.textures, hits.surface, hits.point
    origin = textures.noise_origin[surface].T  # [3, N]
    frequency = textures.noise_frequency[surface].T  # [2, N]
    weight = textures.noise_weight[surface].T  # [2, N]
    coarse = value_noise(scene.noise, origin + point * frequency[0])
    fine = value_noise(scene.noise, origin + point * frequency[1])
    noise = 0.5 + 2 * (weight[0] * (coarse - 0.5) + weight[1] * (fine - 0.5))

    # The offset keeps the edges of the fields off the middle of boxes and of the room.
    fields_passed = (point * textures.checker_frequency[surface] + 0.37).floor().sum(dim=0)
    stripes = 0.5 + 0.5 * torch.tanh(3 * torch.sin((textures.stripe_wave[surface].T * point).sum(dim=0)))
    pattern = textures.checker_weight[surface] * fields_passed.remainder(2)
    pattern = pattern + textures.stripe_weight[surface] * stripes

    ground, noisy, patterned = textures.colours.permute(1, 2, 0)[:, :, surface]  # each [3, N]
    colour = torch.lerp(ground, noisy, noise.clamp(0, 1).expand_as(ground))
    return torch.lerp(colour, patterned, pattern.clamp(0, 1).expand_as(ground))


def value_noise(lattice: Tensor, points: Tensor) -> Tensor:
    """`[N]` value noise at `points` `[3, N]`, in lattice cells: smoothstep interpolation, periodic."""
    cell = points.floor()
    within = points - cell
    smooth = within * within * (3 - 2 * within)
    position = cell.remainder(len(lattice)) + smooth  # [3, N] in [0, P]
    padded = F.pad(lattice[None, None], (0, 1, 0, 1, 0, 1), mode="circular")  # [1, 1, P+1, P+1, P+1]
    grid = (2 * position / len(lattice) - 1).T[None, None, None]  # [1, 1, 1, N, 3]
    return F.grid_sample(padded, grid, mode="bilinear", align_corners=True).view(-1)
