"""How a picture of any size becomes a frame, and which frames are taken; the same for folders and videos."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..arguments import shown, whole
from ..errors import ClipError
from .images import MOST_PIXELS

PATCH_SIZE = 14

# clip.json puts pixel centres on whole numbers, a Clip on halves.
PIXEL_CENTRE = 0.5


@dataclass(frozen=True)
class Framing:
    """How a source image becomes a frame: crop to a box, resize, then keep a band of rows."""

    box: tuple[int, int, int, int]  # left, top, right, bottom, in source pixels
    resized: tuple[int, int]  # width, height after resizing
    band: tuple[int, int]  # first row and end row kept of the resized image

    @property
    def scale(self) -> tuple[float, float]:
        """Resized pixels per source pixel, in x and y (they differ: the height is rounded to patches)."""
        left, top, right, bottom = self.box
        return self.resized[0] / (right - left), self.resized[1] / (bottom - top)

    def image(self, image: Image.Image) -> np.ndarray:
        """`[H, W, 3]` uint8 of an RGB image, resized with the bicubic filter."""
        cropped = image if self.box == (0, 0, *image.size) else image.crop(self.box)
        resized = cropped.resize(self.resized, Image.Resampling.BICUBIC)
        return np.asarray(resized.crop((0, self.band[0], self.resized[0], self.band[1])))

    def depth(self, depth: np.ndarray) -> np.ndarray:
        """`[H, W]` of a source depth map, the nearest source pixel for each pixel.

        Depth is never interpolated: between a near and a far surface there is nothing halfway.
        """
        (left, top, right, bottom), (scale_x, scale_y) = self.box, self.scale
        columns = left + nearest_source(self.resized[0], right - left, scale_x)
        rows = top + nearest_source(self.resized[1], bottom - top, scale_y)[self.band[0] : self.band[1]]
        return depth[rows[:, None], columns[None, :]]

    def intrinsics(self, fx: float, fy: float, cx: float, cy: float) -> Tensor:
        """`[3, 3]` float32 intrinsics of the frame; all in continuous coordinates (see `Clip`)."""
        (left, top, _, _), (scale_x, scale_y) = self.box, self.scale
        return torch.tensor(
            [
                [fx * scale_x, 0.0, (cx - left) * scale_x],
                [0.0, fy * scale_y, (cy - top) * scale_y - self.band[0]],
                [0.0, 0.0, 1.0],
            ]
        )


def nearest_source(size: int, source_size: int, scale: float) -> np.ndarray:
    """`[size]` source pixel that holds the centre of each resized pixel."""
    centres = (np.arange(size) + PIXEL_CENTRE) / scale
    return np.clip(np.floor(centres).astype(np.int64), 0, source_size - 1)


def crop_framing(width: int, height: int, target: int, patch: int = PATCH_SIZE) -> Framing:
    """VGGT's "crop" mode: width to `target`, height to whole patches, at most `target` rows of it."""
    rows = max(round(height * (target / width) / patch) * patch, patch)
    first = max(rows - target, 0) // 2
    return Framing((0, 0, width, height), (target, rows), (first, first + min(rows, target)))


def square_framing(width: int, height: int, target: int, patch: int = PATCH_SIZE) -> Framing:
    """The central square of the image, resized to `target` x `target`."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return Framing((left, top, left + side, top + side), (target, target), (0, target))


FRAMINGS = {"crop": crop_framing, "square": square_framing}


def framing_of(
    file: str | Path, size: tuple[int, int], width: int, mode: str, patch: int = PATCH_SIZE
) -> Framing:
    """How a picture of that file and size becomes a frame; `ClipError` if it would be too large."""
    framing = FRAMINGS[mode](*size, width, patch)
    if math.prod(framing.resized) > MOST_PIXELS:
        raise ClipError(
            f"{file} is {size[0]}x{size[1]}, which is too large at a width of {width} pixels: "
            "crop it, or ask for a smaller width"
        )
    return framing


def check_arguments(
    frames: int | None, start: int, stride: int, width: int, mode: str, patch: int = PATCH_SIZE
) -> None:
    """Raise `PaceError` if an argument of `load_clip` is out of range or no whole number."""
    if frames is not None:
        whole("frames", frames, 1)
    whole("start", start, 0)
    whole("stride", stride, 1)
    whole("patch", patch, 1)
    whole("width", width, patch)
    if width % patch:
        raise ClipError(f"width must be a multiple of {patch}, got {width}")
    if mode not in tuple(FRAMINGS):
        raise ClipError(f"mode must be one of {', '.join(FRAMINGS)}, got {shown(mode)}")


def choose(items: Sequence[Any], source: Path, frames: int | None, start: int, stride: int) -> Sequence[Any]:
    """The `frames` items from `start` on, every `stride`-th; all of them if `frames` is None."""
    chosen = items[start::stride][:frames]
    if not chosen:
        raise ClipError(f"{source} has {len(items)} frames, there is no frame {start}")
    if frames is not None and len(chosen) < frames:
        raise ClipError(
            f"{source} has {len(items)} frames: only {len(chosen)} from frame {start} in steps of {stride}, "
            f"not the {frames} asked for"
        )
    return chosen


def images_of(pictures: Sequence[np.ndarray]) -> Tensor:
    """`[S, 3, H, W]` float32 in [0, 1] of pictures `[H, W, 3]` uint8."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div_(255).contiguous()
