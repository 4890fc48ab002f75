"""Rendered clips to train any VGGT on: plain rooms, or rooms and facades as VGGT-mini is trained on them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..clips import Clip
from ..training.cuda_graphs import Recorder
from ..training.seeds import mixed_seed
from ..training.sources import SWEEPS, ClipSource, Sample, Truth, stacked, to_device
from .scenes.rooms import render_room
from .scenes.sweeps import Sweeps, render_sweeps, sample_sweeps
from .scenes.textures import TextureAtlas, load_photographs, texture_atlas
from .training.held_out import HELD_OUT_SEED
from .training.trainer import Inputs, Settings, render, sample_inputs


class PlainRooms:
    """The rooms of `render_room`, with other seeds than those that models are judged on."""

    description = "plain rooms"
    compiled = False

    def __init__(self, size: int):
        self.size = size

    def draw(self, seed: int, clips: int, views: int) -> list[Clip]:
        # Below the seeds of the held-out rooms, and never negative.
        return [
            render_room(mixed_seed(seed, i) % HELD_OUT_SEED, views, self.size, self.size)
            for i in range(clips)
        ]

    def finish(self, drawn: list[Clip], device: torch.device) -> Sample:
        return stacked(drawn, device)


class RenderedScenes:
    """Rooms and facades as VGGT-mini is trained on them, rendered in one batch on the device that trains.

    With photographs among the textures, some steps see those alone (see `sweeps`).

    Args:
        size: pixels a side, a multiple of 28.
        atlas: their textures, on that device.
    """

    compiled = True

    def __init__(self, size: int, atlas: TextureAtlas):
        self.size, self.atlas = size, atlas
        # Rendering is hundreds of kernels whose launches take longer than they.
        self.recorder = Recorder(atlas.texels.is_cuda)
        self.description = f"rendered scenes with {len(atlas)} textures"
        if atlas.photographs:
            self.description += f", {SWEEPS:.0%} of steps on {atlas.photographs} photographs"

    def draw(self, seed: int, clips: int, views: int) -> Inputs | Sweeps:
        generator = torch.Generator().manual_seed(mixed_seed(seed, clips, views))
        if self.atlas.photographs and torch.rand((), generator=generator) < SWEEPS:
            return sample_sweeps(clips, views, self.atlas.photographs, generator)
        settings = Settings(frames=clips * views, dense=1, views=(views,), size=self.size)
        return sample_inputs(settings, views, seed, len(self.atlas), self.atlas.photographs)

    def finish(self, drawn: Inputs | Sweeps, device: torch.device) -> Sample:
        if isinstance(drawn, Sweeps):
            with torch.no_grad():
                on_device = Sweeps(*(to_device(value, device) for value in drawn))
                return Sample(render_sweeps(on_device, self.atlas, self.size), None)
        packed = to_device(drawn.packed(), device)
        shape = tuple(drawn.scenes.cameras.shape)
        images, *truth = self.recorder(shape, partial(self.render, drawn), [packed])
        return Sample(images, Truth(*truth))

    @torch.no_grad()  # in steps as in checks: compiled once
    def render(self, shapes: Inputs, packed: Tensor) -> list[Tensor]:
        """Images and truth of what `packed` holds, which has the shapes of some other inputs."""
        drawn, device = shapes.unpack(packed), packed.device
        size, shape = self.size, drawn.scenes.cameras.shape[:2]
        images, depth = render(drawn, self.atlas, size)
        intrinsics = torch.zeros(*shape, 3, 3, device=device)
        intrinsics[..., 0, 0], intrinsics[..., 1, 1] = (drawn.scenes.focal.T * size)[:, :, None]
        intrinsics[..., :2, 2], intrinsics[..., 2, 2] = size / 2, 1.0
        images, depth = images.unflatten(0, shape), depth.unflatten(0, shape)
        valid = torch.ones_like(depth, dtype=torch.bool)
        return [images, *Truth(drawn.scenes.world_to_camera(), intrinsics, depth, valid)]


def rendered_source(plain: bool, size: int, textures: Path | None, device: torch.device) -> ClipSource:
    """Plain rooms, or scenes of all kinds with textures on the device; of photographs, too, if there are `textures`."""
    if plain:
        return PlainRooms(size)
    photographs = load_photographs(textures) if textures else None
    return RenderedScenes(size, texture_atlas(photographs, 512 if device.type == "cuda" else 64, 0, device))
