"""Clips of 7-Scenes, as Microsoft Research publishes them: SCENE/seq-01/frame-000000.{color.png,depth.png,pose.txt}.

Depth is in millimetres, 0 or 65535 where not measured. Poses take the **depth** camera to the world. Neither fits the
pictures as it is: the colour camera has another focal length and stands some 2.5 cm to the side, so that depth is about
20 pixels away from its colour. `load_seven_scenes` moves both to the colour camera.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ..arguments import shown, whole
from ..errors import ClipError
from . import rgbd
from .clip import Clip
from .folder import check_depth, existing_folder
from .framing import FRAMINGS, PATCH_SIZE, PIXEL_CENTRE, check_arguments, choose, images_of
from .images import listed, read_header, read_rgb
from .rgbd import read_metres, read_text

SPLITS = {"train": "TrainSplit.txt", "test": "TestSplit.txt"}
FRAME = re.compile(r"frame-([0-9]{6})\.(color\.png|depth\.png|pose\.txt)")


@dataclass(frozen=True)
class Calibration:
    """The two cameras of the Kinect. A point of the depth camera is at `rotation @ x + translation` of the colour one.

    The depth camera is the one that the data set states. The colour camera was estimated on a sequence of RedKitchen,
    from edges of depth and edges of the pictures; either half of it gives the same to within 0.4 pixels.

    Attributes:
        size: width and height of pictures and depth maps, pixels.
        depth_focal: pixels.
        depth_centre: principal point, x and y, the centre of the top-left pixel at (0, 0).
        colour_focal, colour_centre: likewise.
        rotation: axis times angle, radians.
        translation: metres.
    """

    size: tuple[int, int] = (640, 480)
    depth_focal: float = 585.0
    depth_centre: tuple[float, float] = (320.0, 240.0)
    colour_focal: float = 526.17
    colour_centre: tuple[float, float] = (315.32, 239.28)
    rotation: tuple[float, float, float] = (0.0047, 0.0074, 0.0085)
    translation: tuple[float, float, float] = (-0.023, 0.004, 0.0)

    @property
    def colour_from_depth(self) -> np.ndarray:
        """`[4, 4]` float64 rigid motion."""
        x, y, z = self.rotation
        cross = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]], dtype=torch.float64)
        motion = np.eye(4)
        motion[:3, :3] = torch.linalg.matrix_exp(cross).numpy()
        motion[:3, 3] = self.translation
        return motion


@dataclass(frozen=True)
class Frame:
    """The three files of one frame."""

    colour: Path
    depth: Path
    pose: Path


class SevenScenesSequence:
    """One sequence of a scene, as a scene to evaluate on: its files are listed, none of them is read.

    Args:
        folder: of the scene.
        sequence: its number.
        calibration: of the two cameras; None is `Calibration()`.

    Raises:
        ClipError: the sequence is missing or has no frames.
    """

    left_out = 0  # frames without a pose: there are none
    metres = True

    def __init__(self, folder: Path, sequence: int, calibration: Calibration | None = None):
        self.name = f"{folder.resolve().name}/seq-{sequence:02d}"
        self.frames = sequence_frames(folder, sequence)
        self.calibration = calibration or Calibration()

    def __len__(self) -> int:
        return len(self.frames)

    def check(self, numbers: Sequence[int], width: int, mode: str, patch: int = PATCH_SIZE) -> None:
        """Raise `ClipError` for a frame of which a pose or the header of a picture does not fit."""
        check_frames([self.frames[number] for number in numbers], self.calibration)

    def load(self, numbers: Sequence[int], width: int, mode: str, patch: int = PATCH_SIZE) -> Clip:
        """The clip of the frames with these numbers, depth and poses moved to the colour camera."""
        return load_frames(
            [self.frames[number] for number in numbers], self.name, width, mode, patch, self.calibration
        )


def load_seven_scenes(
    path: str | Path,
    *,
    split: Literal["train", "test"] = "test",
    sequence: int | None = None,
    frames: int | None = None,
    start: int = 0,
    stride: int = 1,
    width: int = 518,
    mode: Literal["crop", "square"] = "crop",
    aligned: bool = True,
    calibration: Calibration | None = None,
    patch: int = PATCH_SIZE,
) -> Clip:
    """Load a clip of one scene of 7-Scenes.

    Args:
        path: Folder of the scene, with its split files and its unpacked sequences.
        split: "train" or "test".
        sequence: Number of one sequence of the split; None takes all of them, one after another.
        frames: How many frames to take; None takes all there are.
        start: First frame taken.
        stride: Step between the frames taken.
        width: Width of the loaded frames in pixels, a multiple of `patch`.
        mode: "crop" or "square", as in `load_clip`.
        aligned: Whether depth is warped into the colour camera, the nearest point at each pixel, and poses are moved to
            it. False takes both as they are, with the intrinsics of the depth camera, as if it had made the pictures.
        calibration: Of the two cameras; None is `Calibration()`.
        patch: Pixels a side of a patch of the model.

    Returns:
        A `Clip` on the CPU with all fields, in metres, as `load_clip` returns it. Rotations are exact.

    Raises:
        ClipError: An argument is out of range, the scene has no split file or not the sequence, or one of the frames is
            missing, can't be read, has another size than the calibration, or has no pose. The message names the file.
    """
    check_arguments(frames, start, stride, width, mode, patch)
    calibration = calibration or Calibration()
    chosen = choose_frames(path, split, sequence, frames, start, stride, calibration)
    name = Path(path).resolve().name
    name = name if sequence is None else f"{name} seq-{sequence:02d}"
    return load_frames(chosen, name, width, mode, patch, calibration, aligned)


def load_frames(
    chosen: Sequence[Frame],
    name: str,
    width: int,
    mode: str,
    patch: int,
    calibration: Calibration,
    aligned: bool = True,
) -> Clip:
    """A clip of these frames; see `load_seven_scenes` for arguments and errors."""
    poses = [read_pose(frame.pose) for frame in chosen]
    framing = FRAMINGS[mode](*calibration.size, width, patch)
    pictures, maps = [], []
    for frame in chosen:
        pictures.append(framing.image(read_rgb(frame.colour)))
        depth = read_metres(frame.depth)
        maps.append(framing.depth(warp_depth(depth, calibration) if aligned else depth))
    if aligned:
        depth_from_colour = np.linalg.inv(calibration.colour_from_depth)
        poses = [pose @ depth_from_colour for pose in poses]
        focal, centre = calibration.colour_focal, calibration.colour_centre
    else:
        focal, centre = calibration.depth_focal, calibration.depth_centre
    intrinsics = framing.intrinsics(focal, focal, centre[0] + PIXEL_CENTRE, centre[1] + PIXEL_CENTRE)
    return Clip(
        name,
        images_of(pictures),  # [S, 3, H, W]
        intrinsics.expand(len(chosen), 3, 3).clone(),
        torch.from_numpy(np.linalg.inv(np.stack(poses))[:, :3]).float(),  # [S, 3, 4]
        torch.from_numpy(np.stack(maps)),  # [S, H, W]
    )


def choose_frames(
    path: str | Path,
    split: str,
    sequence: int | None,
    frames: int | None,
    start: int,
    stride: int,
    calibration: Calibration,
) -> list[Frame]:
    """The frames that `load_seven_scenes` takes, checked as far as can be without reading a thousand pictures.

    Raises:
        ClipError: As there. A picture or depth map of which the header is fine may still be broken.
    """
    folder = existing_folder(path)
    numbers = split_sequences(folder, split)
    if sequence is not None:
        if whole("sequence", sequence) not in numbers:
            raise ClipError(f"{folder / SPLITS[split]} has no sequence {sequence}, only {numbers}")
        numbers = [sequence]
    found = [frame for number in numbers for frame in sequence_frames(folder, number)]
    chosen = list(choose(found, folder, frames, start, stride))
    check_frames(chosen, calibration)
    return chosen


def check_frames(chosen: Sequence[Frame], calibration: Calibration) -> None:
    """Raise `ClipError` for a frame of which a pose or the header of a picture does not fit."""
    for frame in chosen:
        read_pose(frame.pose)
        check_size(frame.colour, read_header(frame.colour)[0], calibration)
        check_depth(frame.depth, *read_header(frame.depth), calibration.size)


def split_sequences(path: str | Path, split: str) -> list[int]:
    """Numbers of the sequences in a split of a scene.

    Raises:
        ClipError: There is no such split, or its file is missing or broken.
    """
    folder = existing_folder(path)
    if split not in tuple(SPLITS):
        raise ClipError(f"split must be one of {', '.join(SPLITS)}, got {shown(split)}")
    file = folder / SPLITS[split]
    if not os.path.lexists(file):
        raise ClipError(f"{file} does not exist: name the folder of one scene of 7-Scenes, unpacked")
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    matches = [re.fullmatch(r"sequence([0-9]{1,3})", line) for line in lines]
    numbers = [int(match[1]) for match in matches if match]
    if not lines or len(numbers) < len(lines):
        raise ClipError(f'{file} must have lines like "sequence1" and no others')
    return numbers


def sequence_frames(path: str | Path, sequence: int) -> list[Frame]:
    """The frames of a sequence, from number 0 to the last one of which there is a file.

    Raises:
        ClipError: The sequence is missing or has no frames. A frame of which a file is missing is in the list.
    """
    folder = Path(path) / f"seq-{sequence:02d}"
    if not os.path.isdir(folder):
        raise ClipError(f"{folder} does not exist: unpack {folder.name}.zip in the folder of the scene")
    numbers = [int(match[1]) for match in map(FRAME.fullmatch, listed(folder)[0]) if match]
    if not numbers:
        raise ClipError(f"{folder} has no frames (looked for frame-000000.color.png)")
    names = [f"frame-{number:06d}" for number in range(max(numbers) + 1)]
    endings = ("color.png", "depth.png", "pose.txt")
    return [Frame(*(folder / f"{name}.{ending}" for ending in endings)) for name in names]


def check_size(file: Path, size: tuple[int, int], calibration: Calibration) -> None:
    """Raise `ClipError` if a picture is not of the calibration's size."""
    if size != calibration.size:
        expected = f"{calibration.size[0]}x{calibration.size[1]}"
        raise ClipError(f"{file} is {size[0]}x{size[1]}, but the calibration is for {expected}")


def read_pose(file: Path) -> np.ndarray:
    """`[4, 4]` float64 camera-to-world, with an exact rotation."""
    pose = rgbd.read_pose(file)
    if pose is None:  # never in what is published
        raise ClipError(f"{file} is not a 4x4 rotation and translation: leave this frame out")
    return pose


def warp_depth(depth: np.ndarray, calibration: Calibration) -> np.ndarray:
    """`[H, W]` depth as the colour camera sees it, of `[H, W]` of the depth camera; 0 where nothing comes to lie.

    Each measured point goes to the nearest pixel; where several do, the nearest point counts.
    """
    height, width = depth.shape
    row, column = np.nonzero(depth)
    z = depth[row, column].astype(np.float64)
    motion = calibration.colour_from_depth
    rays = np.stack(
        [
            (column - calibration.depth_centre[0]) / calibration.depth_focal,
            (row - calibration.depth_centre[1]) / calibration.depth_focal,
            np.ones_like(z),
        ]
    )
    x, y, z = motion[:3, :3] @ (rays * z) + motion[:3, 3:]  # each [N]
    ahead = z > 0
    x, y, z = x[ahead], y[ahead], z[ahead]
    column = np.rint(x / z * calibration.colour_focal + calibration.colour_centre[0]).astype(np.int64)
    row = np.rint(y / z * calibration.colour_focal + calibration.colour_centre[1]).astype(np.int64)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    found = np.full(height * width, np.inf)
    np.minimum.at(found, row[inside] * width + column[inside], z[inside])
    return np.where(np.isfinite(found), found, 0).astype(np.float32).reshape(height, width)
