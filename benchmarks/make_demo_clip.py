"""Render the clip that `pacevggt demo` runs on, and write it where the package bundles it.

    python benchmarks/make_demo_clip.py

The room is described in demo_room.py. The output is a `clip.json` folder (JPEG frames, 16-bit depth, cameras) of less
than 1 MB; running this again replaces it with the same clip. Takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_room import AMBIENT, GAMMA, cameras, furniture, lamps, paint, scene
from torch import Tensor
from tqdm import tqdm

from pacevggt_patch.clips import Clip, load_clip, save_clip
from pacevggt_patch.mini.scenes.raycast import FrameScenes, render_frames
from pacevggt_patch.mini.scenes.textures import TextureAtlas

SEED = 0  # of the books, the leaves, the textures and the hand that holds the camera
FRAMES = 24
SIZE = 224
FINER = 2  # pixels are rendered so many times finer either way, against jagged edges
QUALITY = 92

DEFAULT_OUTPUT = Path(__file__).parents[1] / "pacevggt_patch" / "data" / "room"


def main(argv: list[str] | None = None) -> None:
    """Render, write, read back, and report how large the folder is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    output = parser.parse_args(argv).output
    clip = render_clip(range(FRAMES))
    shutil.rmtree(output, ignore_errors=True)
    save_clip(clip, output, quality=QUALITY)

    stored = load_clip(output, width=SIZE)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"{output}: {len(stored)} frames, {size / 1e6:.2f} MB")


def render_clip(frames: range) -> Clip:
    """Some of the frames of the bundled clip, with exact depth and cameras."""
    views, atlas = room(frames)
    # Depth is that of pixel centres: a mean over a pixel lies on no surface at edges.
    depths = [render_frames(view, atlas, SIZE, SIZE)[1] for view in views]
    pictures = [lit(view, atlas, SIZE) for view in tqdm(views, desc="frames", disable=None)]
    centre = torch.cat([view.camera for view in views])[..., None]  # [S, 3, 1]
    rotation = torch.cat([view.orientation for view in views]).transpose(1, 2)
    focal = views[0].focal[0] * SIZE
    intrinsics = torch.tensor([[focal[0], 0, SIZE / 2], [0, focal[1], SIZE / 2], [0, 0, 1]])
    return Clip(
        "room",
        torch.cat(pictures),
        intrinsics.expand(len(frames), 3, 3).clone(),
        torch.cat([rotation, -rotation @ centre], 2),
        torch.cat(depths),
    )


def room(frames: range) -> tuple[list[FrameScenes], TextureAtlas]:
    """What each of some frames sees, and the textures."""
    generator = torch.Generator().manual_seed(SEED)
    solids, atlas = furniture(generator), paint(generator)
    centre, orientation = cameras(FRAMES, generator)
    return [scene(solids, centre[i : i + 1], orientation[i : i + 1]) for i in frames], atlas


def lit(view: FrameScenes, atlas: TextureAtlas, size: int) -> Tensor:
    """`[1, 3, size, size]` of one frame in the light of all lamps, as a screen shows it."""
    fine = FINER * size
    # With ambient light alone each surface has its own colour.
    plain = replace(view, shade=torch.tensor([[1.0, 0.0]]))
    light = torch.tensor(AMBIENT)[:, None, None] * render_frames(plain, atlas, fine, fine)[0]
    for place, colour in lamps():
        seen, _ = render_frames(replace(view, light=place[None]), atlas, fine, fine)
        light = light + colour[:, None, None] * seen
    return F.avg_pool2d(light, FINER).clamp(0, 1) ** (1 / GAMMA)


if __name__ == "__main__":
    main()
