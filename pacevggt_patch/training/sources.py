"""Where training takes its clips from, such as folders of images. A number decides what is drawn.

A source draws in two parts: `draw` runs ahead in other threads and on the CPU (decoding, sampling), `finish` on the
device that trains (copying, rendering).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from ..clips import Clip, count_frames, load_clip
from ..clips.folder import image_files, read_description
from ..errors import ClipError

LARGEST_STRIDE = 4
SWEEPS = 0.25  # share of steps that see photographs instead of scenes, where there are some


class Truth(NamedTuple):
    """Ground truth of clips, in the conventions of `clips.Clip`.

    Attributes:
        world_to_camera: [B, S, 3, 4].
        intrinsics: [B, S, 3, 3], pixels.
        depth: [B, S, H, W].
        valid: [B, S, H, W] bool.
    """

    world_to_camera: Tensor
    intrinsics: Tensor
    depth: Tensor
    valid: Tensor


class Sample(NamedTuple):
    """Clips of one step: images [B, S, 3, H, W] in [0, 1], and the ground truth where all of them have it."""

    images: Tensor
    truth: Truth | None

    def clips(self) -> list[Sample]:
        """The clips one by one, as steps of one clip."""
        return [
            Sample(
                self.images[i : i + 1],
                None if self.truth is None else Truth(*(value[i : i + 1] for value in self.truth)),
            )
            for i in range(len(self.images))
        ]


class ClipSource(Protocol):
    """What training draws from; the same number and views give the same clips."""

    description: str
    compiled: bool  # whether `finish` is compiled anew for each number of clips on CUDA

    def draw(self, seed: int, clips: int, views: int) -> Any:
        """What is needed to make B = `clips` clips of S = `views` frames; on the CPU, in any thread."""
        ...

    def finish(self, drawn: Any, device: torch.device) -> Sample:
        """The clips, on the device."""
        ...


class FolderSource:
    """Windows of frames from a folder of images, or from a folder of such folders (each may have a `clip.json`).

    A window is a clip, a first frame and a stride of up to `largest_stride`, all random. The clips of a step share one
    size of image.

    Args:
        folder: the folder.
        frames: most frames of a window that will be asked for.
        width: width of the frames in pixels.
        mode: "crop" or "square", as in `load_clip`.
        largest_stride: most frames from one frame of a window to the next.

    Raises:
        ClipError: there is no folder or no image, a clip has fewer frames than asked for, or can't be read.
    """

    compiled = False

    def __init__(
        self, folder: str | Path, frames: int, width: int, mode: Any, largest_stride: int = LARGEST_STRIDE
    ):
        self.width, self.mode, self.largest_stride = width, mode, largest_stride
        self.groups: dict[Any, list[tuple[Path, int]]] = {}  # size of the frames -> clips and their lengths
        clips = clip_folders(Path(folder))
        for clip in clips:
            count = count_frames(clip)
            if count < frames:
                raise ClipError(
                    f"{clip} has {count} frames, but training takes {frames} at a time: add frames, or pass fewer with "
                    "--views"
                )
            size = None if mode == "square" else image_size(clip)
            self.groups.setdefault(size, []).append((clip, count))
        total = sum(count for group in self.groups.values() for _, count in group)
        self.description = f"{len(clips)} clip{'s' * (len(clips) > 1)} of {total} images"

    def draw(self, seed: int, clips: int, views: int) -> list[Clip]:
        generator = torch.Generator().manual_seed(seed)

        def pick(weights: Sequence[int]) -> int:
            return int(torch.multinomial(torch.tensor(weights).double(), 1, generator=generator))

        def below(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        groups = list(self.groups.values())
        group = groups[pick([sum(count for _, count in group) for group in groups])]
        drawn = []
        for _ in range(clips):
            folder, count = group[pick([count for _, count in group])]
            most = min(self.largest_stride, (count - 1) // max(views - 1, 1)) or 1
            stride = 1 + below(most)
            start = below(count - (views - 1) * stride)
            drawn.append(
                load_clip(folder, frames=views, start=start, stride=stride, width=self.width, mode=self.mode)
            )
        return drawn

    def finish(self, drawn: list[Clip], device: torch.device) -> Sample:
        return stacked(drawn, device)


def clip_folders(folder: Path) -> list[Path]:
    """The clips in a folder: itself, if it holds images or a `clip.json`, else those of its folders that do.

    Raises:
        ClipError: there is no such folder, or none of it holds images.
    """
    if not folder.is_dir():
        raise ClipError(f"{folder} is not a folder")

    def holds_clip(path: Path) -> bool:
        if (path / "clip.json").is_file():
            return True
        try:
            return bool(image_files(path))
        except ClipError:
            return False

    if holds_clip(folder):
        return [folder]
    found = sorted(path for path in folder.iterdir() if path.is_dir() and holds_clip(path))
    if not found:
        raise ClipError(f"{folder} has no images, and no folder with images: nothing to train on")
    return found


def image_size(folder: Path) -> tuple[int, int]:
    """Width and height of the stored frames of a clip; of a folder of images, those of the first one."""
    description = folder / "clip.json"
    if description.is_file():
        values = read_description(description)
        return values["width"], values["height"]
    file = image_files(folder)[0]
    try:
        with Image.open(file) as image:
            turned = image.getexif().get(0x0112, 1) >= 5  # orientation tags that swap the sides
            return (image.height, image.width) if turned else image.size
    except Exception as error:  # Pillow's decoders raise whatever their format trips over
        raise ClipError(f"{file} cannot be read as an image: {error}") from error


def stacked(clips: list[Clip], device: torch.device) -> Sample:
    """Clips of one size, one after another in a batch, on the device."""
    images = to_device(torch.stack([clip.images for clip in clips]), device)
    columns = [
        [getattr(clip, name) for clip in clips]
        for name in ("world_to_camera", "intrinsics", "depth", "valid")
    ]
    if any(value is None for column in columns for value in column):
        return Sample(images, None)
    return Sample(images, Truth(*(to_device(torch.stack(column), device) for column in columns)))


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for."""
    return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)
