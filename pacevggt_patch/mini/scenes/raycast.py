"""Render many views of many scenes at once: exact z-depth and colours, the same code on the CPU and on a GPU.

All F frames are cast together, one solid after another: `nearest_cubes` and `nearest_spheres` bring four or so solids
into the running minimum over `[F, H, W]` pixels. On a GPU they are compiled, so that a pass over the pixels is one
kernel; shadows use the same two functions with the rays that leave the lamp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...training.tensors import total
from ..compiling import faster
from .geometry import ROOM_FACES, Axes, cross_cube, enter_sphere
from .textures import TextureAtlas, sample_texture

NEAR = 0.05  # metres in front of the camera where nothing is seen
GROUP = 4  # solids cast in one pass
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


def render_frames(scenes: FrameScenes, atlas: TextureAtlas, height: int, width: int) -> tuple[Tensor, Tensor]:
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
    return faster(shade, on_gpu)(best, which, rays, lit, tables, scenes, atlas), best


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
    solids = tables.shape[1]
    groups += [(start, min(start + GROUP, solids), nearest_spheres) for start in range(cubes, solids, GROUP)]
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


def unit_rays(table: Tensor, rays: Tensor) -> Axes:
    """Start `[F, 1, 1]` and direction `[F, H, W]` along each axis of a unit solid, from its table `[12, F]`."""
    value = table[..., None, None]  # [12, F, 1, 1]
    return [
        (
            value[axis],
            value[3 + 3 * axis] * rays[0] + value[4 + 3 * axis] * rays[1] + value[5 + 3 * axis] * rays[2],
        )
        for axis in range(3)
    ]


def leave_room(table: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """Distance `[F, H, W]` to the walls from within, and the number 0 everywhere; `table` is `[F, 12]`."""
    leave = cross_cube(unit_rays(table.T, rays))[1]
    return leave, torch.zeros_like(leave, dtype=torch.int32)


def nearest_cubes(
    best: Tensor, which: Tensor, tables: Tensor, numbers: Tensor, rays: Tensor
) -> tuple[Tensor, Tensor]:
    """Bring G boxes, tables `[G, 12, F]` and numbers `[G]`, into the nearest distance and number `[F, H, W]`."""
    for table, number in zip(tables, numbers, strict=True):
        enter, leave = cross_cube(unit_rays(table, rays))
        nearer = (enter < leave) & (enter > NEAR) & (enter < best)
        best, which = torch.where(nearer, enter, best), torch.where(nearer, number, which)
    return best, which


def nearest_spheres(
    best: Tensor, which: Tensor, tables: Tensor, numbers: Tensor, rays: Tensor
) -> tuple[Tensor, Tensor]:
    """Bring G ellipsoids into the nearest distance and number, as `nearest_cubes` does boxes."""
    for table, number in zip(tables, numbers, strict=True):
        enter, meets = enter_sphere(unit_rays(table, rays))
        nearer = meets & (enter > NEAR) & (enter < best)
        best, which = torch.where(nearer, enter, best), torch.where(nearer, number, which)
    return best, which


def length(vector: Iterable[Tensor]) -> Tensor:
    """Length of vectors, given by their coordinates."""
    return total(value.square() for value in vector).sqrt()


def shade(
    distance: Tensor,  # [F, H, W]
    which: Tensor,  # [F, H, W] number of the solid
    rays: Tensor,  # [3, F, H, W]
    lit: Tensor,  # [F, H, W] 1 where the lamp is seen
    tables: Tensor,  # [F, K, 12]
    scenes: FrameScenes,
    atlas: TextureAtlas,
) -> Tensor:
    """`[F, 3, H, W]` light that the visible points send back: diffuse reflection of one lamp and of all around."""
    frames, solids = tables.shape[:2]
    frame = torch.arange(frames, device=distance.device, dtype=torch.int32)[:, None, None]
    solid = (frame * solids + which).long()  # [F, H, W]
    table, size = tables.flatten(0, 1), scenes.half_size.flatten(0, 1)
    linear = [[table[:, 3 + 3 * row + column][solid] for column in range(3)] for row in range(3)]
    unit = [
        table[:, row][solid]
        + distance * (linear[row][0] * rays[0] + linear[row][1] * rays[1] + linear[row][2] * rays[2])
        for row in range(3)
    ]
    round_solid = which >= scenes.cubes
    # A box has its normal along the largest coordinate. Ellipsoids are painted in the same three directions.
    along_x = (unit[0].abs() >= unit[1].abs()) & (unit[0].abs() >= unit[2].abs())
    along_y = ~along_x & (unit[1].abs() >= unit[2].abs())
    along = (along_x, along_y, ~(along_x | along_y))
    weights = [
        torch.where(round_solid, unit[axis], torch.where(along[axis], unit[axis].sign(), 0.0))
        for axis in range(3)
    ]
    # Unit solids come by a linear map A, so that a normal n of theirs is A^T n in the world.
    normal = [total(linear[row][axis] * weights[row] for row in range(3)) for axis in range(3)]
    towards = torch.where(which == 0, -1.0, 1.0) / length(normal).clamp(
        min=1e-9
    )  # the room is seen from within
    normal = [component * towards for component in normal]

    to_light = [
        scenes.light[:, axis, None, None] - (scenes.camera[:, axis, None, None] + distance * rays[axis])
        for axis in range(3)
    ]
    facing = total(n * way for n, way in zip(normal, to_light, strict=True))
    facing = (facing / length(to_light).clamp(min=1e-6)).clamp(min=0)
    ambient, darkness = scenes.shade[:, 0, None, None], scenes.shade[:, 1, None, None]
    facing = facing * (1 - darkness * (1 - lit))
    light_share = ambient + (1 - ambient) * facing

    face = torch.where(along_x, 0, torch.where(along_y, 2, 4)) + (
        torch.where(along_x, unit[0], torch.where(along_y, unit[1], unit[2])) > 0
    )
    surface = torch.where(which == 0, face, which + (ROOM_FACES - 1))
    surface = (frame * scenes.texture.shape[1] + surface).long()
    local = [unit[axis] * size[:, axis][solid] for axis in range(3)]  # metres
    across = torch.where(along_x, local[1], local[0])
    up = torch.where(along[2], local[1], local[2])
    place = scenes.placing.flatten(0, 1)
    cosine, sine, offset_u, offset_v, tiles = (place[:, index][surface] for index in range(5))
    u = cosine * across - sine * up + offset_u
    v = -sine * across - cosine * up + offset_v  # images run downwards

    view = total(n * ray for n, ray in zip(normal, rays, strict=True)).abs() / length(rays)
    width = distance.shape[2]
    metres_per_pixel = (
        distance / (scenes.focal[:, 0, None, None] * width) / view.clamp(min=LEAST_COSINE).sqrt()
    )
    level = (metres_per_pixel * tiles * atlas.side).clamp(min=1e-6).log2()
    number = scenes.texture.flatten()[surface].round()
    found = sample_texture(atlas, number, u, v, level)
    colour = scenes.paint.flatten(0, 1)
    return torch.stack(
        [
            (found[channel] * colour[:, channel][surface] + colour[:, 3 + channel][surface]).clamp(0, 1)
            * light_share
            for channel in range(3)
        ],
        1,
    )
