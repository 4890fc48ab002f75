"""Where training takes its clips from, such as folders of images. A number decides what is drawn.

A source draws in two parts: `draw` runs ahead in other threads and on the CPU (decoding, sampling), `finish` on the
device that trains (copying, rendering).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..clips import Clip
from ..clips.folder import ClipFolder, existing_folder
from ..clips.images import check_content, is_hidden, listed, some, split_images
from ..errors import ClipError

LARGEST_STRIDE = 4
# Bytes of pictures up to which all are decoded before training begins: a few seconds' work.
DECODED_FIRST = 2**28
DEEPEST = 3  # levels below a folder of clips that are looked through for more
MOST_VIEWS = 96  # frames of a rendered scene
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
    size of image. The headers of all pictures are looked at beforehand, and where these are few, all of their content.

    Args:
        folder: the folder.
        frames: most frames of a window that will be asked for.
        width: width of the frames in pixels.
        mode: "crop" or "square", as in `load_clip`.
        largest_stride: most frames from one frame of a window to the next.

    Raises:
        ClipError: there is no folder or no image, a clip has fewer frames than asked for or can't be read, or `width`
            is no multiple of 14.
    """

    compiled = False

    def __init__(
        self, folder: str | Path, frames: int, width: int, mode: Any, largest_stride: int = LARGEST_STRIDE
    ):
        self.width, self.mode, self.largest_stride = width, mode, largest_stride
        self.groups: dict[Any, list[ClipFolder]] = {}  # size of the frames -> clips
        clips = [ClipFolder(clip) for clip in clip_folders(existing_folder(folder))]
        for clip in clips:
            if len(clip) < frames:
                raise ClipError(
                    f"{clip.folder} has {len(clip)} frames, but training takes {frames} at a time: add frames, or pass "
                    "fewer with --views"
                )
            size = clip.check(width, mode)
            self.groups.setdefault(None if mode == "square" else size, []).append(clip)
        files = [file for clip in clips for file in clip.files()]
        if sum(map(os.path.getsize, files)) <= DECODED_FIRST:
            for file in files:
                check_content(file)
        total = sum(map(len, clips))
        self.description = f"{len(clips)} clip{'s' * (len(clips) > 1)} of {total} images"

    def draw(self, seed: int, clips: int, views: int) -> list[Clip]:
        generator = torch.Generator().manual_seed(seed)

        def pick(weights: Sequence[int]) -> int:
            return int(torch.multinomial(torch.tensor(weights).double(), 1, generator=generator))

        def below(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        groups = list(self.groups.values())
        group = groups[pick([sum(map(len, group)) for group in groups])]
        drawn = []
        for _ in range(clips):
            clip = group[pick([len(clip) for clip in group])]
            most = min(self.largest_stride, (len(clip) - 1) // max(views - 1, 1)) or 1
            stride = 1 + below(most)
            start = below(len(clip) - (views - 1) * stride)
            drawn.append(clip.load(views, start, stride, self.width, self.mode))
        return drawn

    def finish(self, drawn: list[Clip], device: torch.device) -> Sample:
        return stacked(drawn, device)


def clip_folders(folder: Path) -> list[Path]:
    """The clips in a folder: itself, if it holds images or a `clip.json`, else those of its folders that do.

    A warning names the folders of images that are left out: deeper ones, and those of formats that are not read.

    Raises:
        ClipError: none of it holds images.
    """

    def is_clip(path: Path) -> bool:
        files = listed(path)[0]
        return "clip.json" in files or bool(split_images(path, files)[0])

    found = [path for path in (folder / name for name in listed(folder)[1]) if is_clip(path)]
    if is_clip(folder):
        found = [folder]
    left = []
    taken, seen = {os.path.realpath(path) for path in found}, set()
    for root, folders, files in os.walk(folder, followlinks=True):
        path, real = Path(root), os.path.realpath(root)
        if real in seen:  # a link to where we were
            folders.clear()
            continue
        seen.add(real)
        if real not in taken and ("clip.json" in files or any(split_images(path, files))):
            left.append(path.relative_to(folder).as_posix())
        # A clip.json says itself where its images lie; and one may have been given the root of a disk.
        ends = "clip.json" in files or len(path.relative_to(folder).parts) == DEEPEST
        folders[:] = [] if ends else sorted(name for name in folders if not is_hidden(name))
    told = f"left out {some(left)}, too deep, beside other images, or of other formats"
    if not found:
        more = f": {told}" if left else ": nothing to train on"
        raise ClipError(f"{folder} has no images, and no folder with images{more}")
    if left:
        warnings.warn(f"{folder}: {told}", stacklevel=3)
    return found


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
