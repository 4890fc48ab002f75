"""Render many views of many scenes at once: exact z-depth and colours, the same code on the CPU and on a GPU.

All F frames are cast together, one solid after another: `nearest_cubes` and `nearest_spheres` bring four or so solids
into the running minimum over `[F, H, W]` pixels. On a GPU they are compiled, so that a pass over the pixels is one
kernel; shadows use the same two functions with the rays that leave the lamp.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .textures import TextureAtlas, sample_texture

NEAR = 0.05  # metres in front of the camera where nothing is seen
GROUP = 4  # solids cast in one pass
ROOM_FACES = 6
LEAST_COSINE = 0.15  # between ray and normal, where the texture is not blurred any further
SHADOW_GAP = 2e-3  # share of the way from the lamp; what lies nearer to the surface throws no shadow on it


@dataclass(frozen=True)
class FrameScenes:
    """What F frames see, one scene a frame, in the frames' own tables.

    K solids: the room first, then boxes, then ellipsoids; `cubes` of them are not round. Surfaces are numbered as in
    `rooms.Scene`: the six faces of the room (-x, +x, -y, +y, -z, +z), then the solids after the room.

    Attributes:
        centre: `[F, K, 3]` world, metres.
        rotation: `[F, K, 3, 3]` solid to world.
        half_size: `[F, K, 3]` metres.
        cubes: how many of the solids are boxes, the room included.
        camera: `[F, 3]` camera centre, within the room and within nothing else.
        orientation: `[F, 3, 3]` camera to world.
        focal: `[F, 2]` horizontal and vertical focal length over the width and the height of the image.
        light: `[F, 3]` place of the lamp.
        shade: `[F, 2]` ambient share of the light, and darkness of the shadows in [0, 1].
        texture: `[F, T]` number in the atlas, as a floating number.
        placing: `[F, T, 5]` cosine and sine of the texture's turn times tiles per metre, offset u and v in tiles, and
            tiles per metre.
        paint: `[F, T, 6]` gain and offset of red, green and blue.
    """

    centre: Tensor
    rotation: Tensor
    half_size: Tensor
    cubes: int
    camera: Tensor
    orientation: Tensor
    focal: Tensor
    light: Tensor
    shade: Tensor
    texture: Tensor
    placing: Tensor
    paint: Tensor


def render_frames(
    scenes: FrameScenes, atlas: TextureAtlas, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Colours `[F, 3, H, W]` in [0, about 1] and z-depth `[F, H, W]` of the frames.

    Everything lies on the device of `scenes`; there is no randomness and no transfer to the host.
    """
    on_gpu = scenes.centre.is_cuda
    cubes, spheres = faster(nearest_cubes, on_gpu), faster(nearest_spheres, on_gpu)
    linear = scenes.rotation.transpose(2, 3) / scenes.half_size[..., None]  # [F, K, 3, 3] world to unit solid
    rays = faster(world_rays, on_gpu)(scenes.orientation, scenes.focal, height, width)  # [3, F, H, W]
    tables = solid_tables(linear, scenes.centre, scenes.camera)
    best, which = faster(leave_room, on_gpu)(tables[:, 0], rays)
    best, which = nearest(best, which, tables, scenes.cubes, rays, cubes, spheres)

    lit = torch.ones_like(best)
    if on_gpu or bool((scenes.shade[:, 1] > 0).any()):
        point = scenes.camera.T[:, :, None, None] + best * rays  # [3, F, H, W] world
        ways = point - scenes.light.T[:, :, None, None]
        limit = torch.full_like(best, 1 - SHADOW_GAP)
        shadow_tables = solid_tables(linear, scenes.centre, scenes.light)
        blocked, _ = nearest(limit, which, shadow_tables, scenes.cubes, ways, cubes, spheres)
        lit = (blocked >= limit).float()
    image = faster(shade, on_gpu)(
        best, which, rays, lit, tables, scenes.half_size, scenes.cubes, scenes.camera, scenes.light, scenes.shade,
        scenes.focal, scenes.texture, scenes.placing, scenes.paint, atlas,
    )  # fmt: skip
    return image, best


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled for fixed shapes."""
    return torch.compile(function, dynamic=False)


def faster(function: Callable[..., Any], on_gpu: bool) -> Callable[..., Any]:
    """The function, compiled where it pays: on the CPU compiling takes longer than a test."""
    return compiled(function) if on_gpu else function


def added(terms: Iterable[Tensor]) -> Tensor:
    """Sum of at least one tensor."""
    return functools.reduce(torch.add, terms)


def solid_tables(linear: Tensor, centre: Tensor, origin: Tensor) -> Tensor:
    """`[F, K, 12]` for each frame and solid: where rays from `origin` `[F, 3]` start, seen from the solid whose
    half-size is 1, and the linear map `[3, 3]` that takes their directions there."""
    start = (linear @ (origin[:, None] - centre)[..., None])[..., 0]  # [F, K, 3]
    return torch.cat([start, linear.flatten(2)], 2)


def nearest(
    best: Tensor,
    which: Tensor,
    tables: Tensor,
    cubes: int,
    rays: Tensor,
    nearest_cubes: Callable[..., Any],
    nearest_spheres: Callable[..., Any],
) -> tuple[Tensor, Tensor]:
    """Distance and number of the nearest solid after the room, if it is nearer than `best` `[F, H, W]`."""
    numbers = torch.arange(tables.shape[1], device=tables.device, dtype=torch.int32)
    groups = [(start, min(start + GROUP, cubes), nearest_cubes) for start in range(1, cubes, GROUP)]
    total = tables.shape[1]
    groups += [(start, min(start + GROUP, total), nearest_spheres) for start in range(cubes, total, GROUP)]
    for start, end, function in groups:
        # Copies, since compiled code is particular about where its inputs begin in memory.
        table = tables[:, start:end].permute(1, 2, 0).contiguous()  # [G, 12, F]
        best, which = function(best, which, table, numbers[start:end].clone(), rays)
    return best, which


def world_rays(orientation: Tensor, focal: Tensor, height: int, width: int) -> Tensor:
    """`[3, F, H, W]` world directions through the pixel centres, with z = 1 in the camera frame."""
    x = (torch.arange(width, device=focal.device) + 0.5) / width - 0.5
    y = (torch.arange(height, device=focal.device) + 0.5) / height - 0.5
    x = (x / focal[:, :1])[:, None, :]  # [F, 1, W]
    y = (y / focal[:, 1:])[:, :, None]  # [F, H, 1]
    axes = orientation[..., None, None]  # [F, 3, 3, 1, 1]
    return torch.stack([axes[:, row, 0] * x + axes[:, row, 1] * y + axes[:, row, 2] for row in range(3)])


def unit_rays(table: Tensor, rays: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Start `[F, 1, 1]` and direction `[F, H, W]` along each axis of a unit solid, from its table `[12, F]`."""
    value = table[..., None, None]  # [12, F, 1, 1]
    return [
        (
            value[axis],
            value[3 + 3 * axis] * rays[0] + value[4 + 3 * axis] * rays[1] + value[5 + 3 * axis] * rays[2],
        )
        for axis in range(3)
    ]


def slabs(table: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """`[F, H, W]` distances at which rays enter and leave a unit cube (enter > leave: a miss)."""
    enters, leaves = [], []
    for start, direction in unit_rays(table, rays):
        # A ray along a face divides by zero; a hair off it is inside or outside like its neighbours.
        inverse = 1 / torch.where(direction.abs() < 1e-9, 1e-9, direction)
        middle, half = -start * inverse, inverse.abs()
        enters.append(middle - half)
        leaves.append(middle + half)
    return enters[0].maximum(enters[1]).maximum(enters[2]), leaves[0].minimum(leaves[1]).minimum(leaves[2])


def leave_room(table: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """Distance `[F, H, W]` to the walls from within, and the number 0 everywhere; `table` is `[F, 12]`."""
    leave = slabs(table.T, rays)[1]
    return leave, torch.zeros_like(leave, dtype=torch.int32)


def nearest_cubes(
    best: Tensor, which: Tensor, tables: Tensor, numbers: Tensor, rays: Tensor
) -> tuple[Tensor, Tensor]:
    """Bring G boxes, tables `[G, 12, F]` and numbers `[G]`, into the nearest distance and number `[F, H, W]`."""
    for table, number in zip(tables, numbers, strict=True):
        enter, leave = slabs(table, rays)
        nearer = (enter < leave) & (enter > NEAR) & (enter < best)
        best, which = torch.where(nearer, enter, best), torch.where(nearer, number, which)
    return best, which


def nearest_spheres(
    best: Tensor, which: Tensor, tables: Tensor, numbers: Tensor, rays: Tensor
) -> tuple[Tensor, Tensor]:
    """Bring G ellipsoids into the nearest distance and number, as `nearest_cubes` does boxes."""
    for table, number in zip(tables, numbers, strict=True):
        axes = unit_rays(table, rays)
        a = added(direction.square() for _, direction in axes)
        b = added(start * direction for start, direction in axes)
        c = added(start.square() for start, _ in axes) - 1
        discriminant = b.square() - a * c
        enter = (-b - discriminant.clamp(min=0).sqrt()) / a
        nearer = (discriminant > 0) & (enter > NEAR) & (enter < best)
        best, which = torch.where(nearer, enter, best), torch.where(nearer, number, which)
    return best, which


def shade(
    distance: Tensor,  # [F, H, W]
    which: Tensor,  # [F, H, W] number of the solid
    rays: Tensor,  # [3, F, H, W]
    lit: Tensor,  # [F, H, W] 1 where the lamp is seen
    tables: Tensor,  # [F, K, 12]
    half_size: Tensor,  # [F, K, 3]
    cubes: int,
    camera: Tensor,
    light: Tensor,
    light_shares: Tensor,  # [F, 2]
    focal: Tensor,
    texture: Tensor,
    placing: Tensor,
    paint: Tensor,
    atlas: TextureAtlas,
) -> Tensor:
    """`[F, 3, H, W]` light that the visible points send back: diffuse reflection of one lamp and of all around."""
    frames, solids = tables.shape[:2]
    frame = torch.arange(frames, device=distance.device, dtype=torch.int32)[:, None, None]
    solid = (frame * solids + which).long()  # [F, H, W]
    table, size = tables.flatten(0, 1), half_size.flatten(0, 1)
    linear = [[table[:, 3 + 3 * row + column][solid] for column in range(3)] for row in range(3)]
    unit = [
        table[:, row][solid]
        + distance * (linear[row][0] * rays[0] + linear[row][1] * rays[1] + linear[row][2] * rays[2])
        for row in range(3)
    ]
    round_solid = which >= cubes
    # A box has its normal along the largest coordinate. Ellipsoids are painted in the same three directions.
    along_x = (unit[0].abs() >= unit[1].abs()) & (unit[0].abs() >= unit[2].abs())
    along_y = ~along_x & (unit[1].abs() >= unit[2].abs())
    along = (along_x, along_y, ~(along_x | along_y))
    weights = [
        torch.where(round_solid, unit[axis], torch.where(along[axis], unit[axis].sign(), 0.0))
        for axis in range(3)
    ]
    # Unit solids come by a linear map A, so that a normal n of theirs is A^T n in the world.
    normal = [added(linear[row][axis] * weights[row] for row in range(3)) for axis in range(3)]
    length = (normal[0].square() + normal[1].square() + normal[2].square()).sqrt().clamp(min=1e-9)
    towards = torch.where(which == 0, -1.0, 1.0) / length  # the room is seen from within
    normal = [component * towards for component in normal]

    to_light = [
        light[:, axis, None, None] - (camera[:, axis, None, None] + distance * rays[axis])
        for axis in range(3)
    ]
    light_length = (to_light[0].square() + to_light[1].square() + to_light[2].square()).sqrt().clamp(min=1e-6)
    facing = (added(n * way for n, way in zip(normal, to_light, strict=True)) / light_length).clamp(min=0)
    ambient, darkness = light_shares[:, 0, None, None], light_shares[:, 1, None, None]
    facing = facing * (1 - darkness * (1 - lit))
    light_share = ambient + (1 - ambient) * facing

    face = torch.where(along_x, 0, torch.where(along_y, 2, 4)) + (
        torch.where(along_x, unit[0], torch.where(along_y, unit[1], unit[2])) > 0
    )
    surface = torch.where(which == 0, face, which + (ROOM_FACES - 1))
    surface = (frame * texture.shape[1] + surface).long()
    local = [unit[axis] * size[:, axis][solid] for axis in range(3)]  # metres
    across = torch.where(along_x, local[1], local[0])
    up = torch.where(along[2], local[1], local[2])
    place = placing.flatten(0, 1)
    cosine, sine, offset_u, offset_v, tiles = (place[:, index][surface] for index in range(5))
    u = cosine * across - sine * up + offset_u
    v = -sine * across - cosine * up + offset_v  # images run downwards

    ray_length = (rays[0].square() + rays[1].square() + rays[2].square()).sqrt()
    view = added(n * ray for n, ray in zip(normal, rays, strict=True)).abs() / ray_length
    width = distance.shape[2]
    metres_per_pixel = distance / (focal[:, 0, None, None] * width) / view.clamp(min=LEAST_COSINE).sqrt()
    level = (metres_per_pixel * tiles * atlas.side).clamp(min=1e-6).log2()
    number = texture.flatten()[surface].round()
    found = sample_texture(atlas, number, u, v, level)
    colour = paint.flatten(0, 1)
    return torch.stack(
        [
            (found[channel] * colour[:, channel][surface] + colour[:, 3 + channel][surface]).clamp(0, 1)
            * light_share
            for channel in range(3)
        ],
        1,
    )
