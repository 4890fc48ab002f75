"""Clips of single photographs, as a camera would see them that moves in front of a print in relief.

Rendered scenes look like photographs in their textures only. What a pruned model should say of natural images needs no
ground truth, so any will do: the unpruned model is the teacher.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .textures import TextureAtlas, sample_texture

HALF_SIDES = 0.25, 0.5  # of the square that a frame sees, in sides of the photograph
LARGEST_TURN = 0.35  # radians about the axis of the camera
LARGEST_TILT = 0.25  # how much nearer one edge of the frame may be, relative
LARGEST_SHIFT = 0.3  # of what is bright against what is dark, in sides of the photograph
RELIEF_LEVEL = 4  # mip level of the brightness that the relief follows
TREMBLE = 0.15  # of the way of a whole clip, between one frame and the next


class Sweeps(NamedTuple):
    """What B clips of S frames see.

    Attributes:
        texture: numbers of photographs [B].
        cameras: [B, S, 8]: centre (x, y) and logarithm of the half side of the square, turn, tilt (x, y), and how far
            the relief is shifted (x, y).
    """

    texture: Tensor
    cameras: Tensor


def sample_sweeps(clips: int, frames: int, photographs: int, generator: torch.Generator) -> Sweeps:
    """Random ways from one camera to another, with some tremble."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    texture = torch.randint(photographs, (clips,), generator=generator)
    low, high = map(math.log, HALF_SIDES)
    size = low + (high - low) * uniform(clips, 2, 1)  # [B, first and last, 1]
    room = 1 - 2 * size.exp()  # for the centre
    centre = 0.5 + room * (uniform(clips, 2, 2) - 0.5)
    turn = LARGEST_TURN * (2 * uniform(clips, 2, 1) - 1)
    tilt = LARGEST_TILT * (2 * uniform(clips, 2, 2) - 1)
    shift = LARGEST_SHIFT * (2 * uniform(clips, 2, 2) - 1)
    ends = torch.cat([centre, size, turn, tilt, shift], dim=-1)  # [B, 2, 8]
    first, last = ends[:, :1], ends[:, 1:]
    share = torch.linspace(0, 1, frames).view(1, -1, 1)
    tremble = TREMBLE * (uniform(clips, frames, 8) - 0.5)
    return Sweeps(texture, first + (last - first) * (share + tremble))


def render_sweeps(sweeps: Sweeps, atlas: TextureAtlas, size: int) -> Tensor:
    """Images [B, S, 3, `size`, `size`] in [0, 1], on the device of both."""
    place = (torch.arange(size, device=sweeps.cameras.device) + 0.5) * (2 / size) - 1
    y, x = torch.meshgrid(place, place, indexing="ij")  # [H, W] in [-1, 1]
    values = sweeps.cameras[..., None, None].unbind(2)  # each [B, S, 1, 1]
    centre_x, centre_y, log_half, turn, tilt_x, tilt_y, shift_x, shift_y = values
    half = log_half.exp() / (1 + tilt_x * x + tilt_y * y)  # [B, S, H, W]
    u = centre_x + half * (turn.cos() * x - turn.sin() * y)
    v = centre_y + half * (turn.sin() * x + turn.cos() * y)
    texture = sweeps.texture.view(-1, 1, 1, 1).expand_as(u)
    coarse = sample_texture(atlas, texture, u, v, torch.full_like(u, RELIEF_LEVEL))
    relief = sum(coarse) / 3 - 0.5
    u, v = u + shift_x * relief, v + shift_y * relief
    level = (2 * half * atlas.side / size).log2()
    return torch.stack(sample_texture(atlas, texture, u, v, level), dim=2)
