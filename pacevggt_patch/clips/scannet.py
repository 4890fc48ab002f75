"""Scenes of ScanNet, as its own tools export the frames of a `.sens` file. Two layouts are read:

- SCENE/color/0.jpg, depth/0.png, pose/0.txt, with intrinsic/intrinsic_color.txt and intrinsic_depth.txt
  (or intrinsics_color.txt and intrinsics_depth.txt beside the folders);
- SCENE/frame-000000.color.jpg, .depth.png or .depth.pgm, .pose.txt, with _info.txt (or intrinsic/, as above).

Depth is in millimetres, 0 where not measured. It has a camera and a size of its own. Both cameras are taken to stand in
one place, as the data set's own extrinsics say, so that depth is looked up along the rays of the colour camera. Poses
take the camera to the world; where tracking was lost they hold infinity, and the frame is left out.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import ClipError
from .clip import Clip
from .folder import check_depth, existing_folder, natural_key
from .framing import PATCH_SIZE, PIXEL_CENTRE, check_arguments, choose, framing_of, images_of
from .images import listed, read_header, read_rgb
from .rgbd import matrix_of, read_metres, read_pose, read_text

PARTS = {"color": (".jpg", ".jpeg", ".png"), "depth": (".png", ".pgm"), "pose": (".txt",)}
FLAT = re.compile(r"(frame-[0-9]{6})\.(color|depth|pose)(\.[a-z]+)")
INFO = "_info.txt"
# A camera whose centre lies further from the middle, in shares of the picture, is that of a picture of another size.
MOST_OFF_CENTRE = 0.15


@dataclass(frozen=True)
class Camera:
    """Pinhole camera in pixels, the centre of the top-left pixel at (0.5, 0.5)."""

    focal: tuple[float, float]
    centre: tuple[float, float]


class ScanNetScene:
    """A scene, of which files are listed and poses are read.

    Args:
        path: folder of the scene.

    Attributes:
        name: of the folder.
        left_out: number of frames whose pose was lost.
        has_depth: whether there are depth maps.

    Raises:
        ClipError: the folder has neither layout, a frame lacks a file, no frame has a pose, or a camera is missing.
    """

    metres = True

    def __init__(self, path: str | Path):
        self.folder = existing_folder(path)
        self.name = self.folder.resolve().name
        found = find_files(self.folder)
        self.has_depth = bool(found["depth"])
        check_complete(self.folder, found)
        names = sorted(found["color"], key=natural_key)
        poses = [read_pose(found["pose"][name]) for name in names]
        kept = [(name, pose) for name, pose in zip(names, poses, strict=True) if pose is not None]
        if not kept:
            raise ClipError(f"{self.folder} has {len(names)} frames, and tracking was lost in all of them")
        self.left_out = len(names) - len(kept)
        self.poses = np.stack([pose for _, pose in kept])  # [S, 4, 4]
        self.colours = [found["color"][name] for name, _ in kept]
        self.depths = [found["depth"][name] for name, _ in kept] if self.has_depth else []
        # Without depth nothing asks for cameras.
        self.cameras = read_cameras(self.folder) if self.has_depth else None
        self.size = read_header(self.colours[0])[0]
        if self.cameras is not None:
            self.depth_size = read_header(self.depths[0])[0]
            for camera, file, size in zip(
                self.cameras, (self.colours[0], self.depths[0]), (self.size, self.depth_size), strict=True
            ):
                check_camera(camera, file, size)

    def __len__(self) -> int:
        """Number of frames with a pose."""
        return len(self.colours)

    def check(self, numbers: Sequence[int], width: int, mode: str, patch: int = PATCH_SIZE) -> None:
        """Raise `ClipError` for a frame of which the header of the picture or of the depth map does not fit."""
        for number in numbers:
            check_size(self.colours[number], read_header(self.colours[number])[0], self.colours[0], self.size)
            if self.has_depth:
                size, stored = read_header(self.depths[number])
                check_size(self.depths[number], size, self.depths[0], self.depth_size)
                check_depth(self.depths[number], size, stored, size)
        framing_of(self.colours[0], self.size, width, mode, patch)

    def load(self, numbers: Sequence[int], width: int, mode: str, patch: int = PATCH_SIZE) -> Clip:
        """The clip of the frames with these numbers, counted without those that are left out.

        Raises:
            ClipError: a file can't be read, or has another size than the first one.
        """
        framing = framing_of(self.colours[0], self.size, width, mode, patch)
        pictures, maps = [], []
        intrinsics = None
        if self.cameras is not None:
            colour, depth_camera = self.cameras
            intrinsics = framing.intrinsics(*colour.focal, *colour.centre)  # [3, 3]
        for number in numbers:
            picture = read_rgb(self.colours[number])
            check_size(self.colours[number], picture.size, self.colours[0], self.size)
            pictures.append(framing.image(picture))
            if intrinsics is not None:
                depth = read_metres(self.depths[number])
                check_size(self.depths[number], depth.shape[::-1], self.depths[0], self.depth_size)
                maps.append(resample(depth, depth_camera, intrinsics, pictures[-1].shape[:2]))
        poses = np.linalg.inv(self.poses[list(numbers)])[:, :3]  # [S, 3, 4]
        return Clip(
            self.name,
            images_of(pictures),  # [S, 3, H, W]
            None if intrinsics is None else intrinsics.expand(len(numbers), 3, 3).clone(),
            torch.from_numpy(poses).float(),
            torch.from_numpy(np.stack(maps)) if maps else None,  # [S, H, W]
        )


def load_scannet(
    path: str | Path,
    *,
    frames: int | None = None,
    start: int = 0,
    stride: int = 1,
    width: int = 518,
    mode: Literal["crop", "square"] = "crop",
    patch: int = PATCH_SIZE,
) -> Clip:
    """Load a clip of one scene of ScanNet, exported to one of the layouts in this module's description.

    Frames whose pose was lost are left out before frames are counted; a warning says how many.

    Args:
        path: Folder of the scene.
        frames: How many frames to take; None takes all there are.
        start: First frame taken.
        stride: Step between the frames taken.
        width: Width of the loaded frames in pixels, a multiple of `patch`.
        mode: "crop" or "square", as in `load_clip`.
        patch: Pixels a side of a patch of the model.

    Returns:
        A `Clip` on the CPU in metres. Depth is that of the nearest pixel of the depth camera, rotations are exact.
        Without a folder of depth maps it has no depth and no intrinsics.

    Raises:
        ClipError: An argument is out of range, or a file is missing, broken, or of another size. The message names it.
    """
    check_arguments(frames, start, stride, width, mode, patch)
    scene = ScanNetScene(path)
    if scene.left_out:
        total = len(scene) + scene.left_out
        warnings.warn(
            f"{path}: left out {scene.left_out} of {total} frames, whose pose was lost", stacklevel=2
        )
    return scene.load(choose(range(len(scene)), scene.folder, frames, start, stride), width, mode, patch)


def find_files(folder: Path) -> dict[str, dict[str, Path]]:
    """The files of `color`, `depth` and `pose`, by the names of their frames."""
    found: dict[str, dict[str, Path]] = {part: {} for part in PARTS}
    files, folders = listed(folder)
    if "color" in folders:
        for part in (part for part in PARTS if part in folders):
            for name in listed(folder / part)[0]:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in PARTS[part]:
                    found[part][stem] = folder / part / name
    else:
        inner = folder / "sensor_data" if "sensor_data" in folders else folder
        for match in map(FLAT.fullmatch, files if inner == folder else listed(inner)[0]):
            if match and match[3] in PARTS[match[2]]:
                found[match[2]][match[1]] = inner / match[0]
    if not found["color"]:
        raise ClipError(
            f"{folder} is no exported scene of ScanNet (looked for color/*.jpg and frame-000000.color.jpg)"
        )
    return found


def check_complete(folder: Path, found: dict[str, dict[str, Path]]) -> None:
    """Raise `ClipError` for a frame that lacks one of its files; depth may be missing as a whole."""
    for part, files in found.items():
        if part == "depth" and not files:
            continue
        missing = sorted(set(found["color"]) - set(files), key=natural_key)
        if missing:
            raise ClipError(
                f"{folder} has no {part} of {len(missing)} of {len(found['color'])} frames, {missing[0]} the first: "
                "export the scene again"
            )


def read_cameras(folder: Path) -> tuple[Camera, Camera]:
    """Colour and depth camera.

    Raises:
        ClipError: a file is missing or broken, or says that the cameras stand in two places.
    """
    info = [inner / INFO for inner in (folder, folder / "sensor_data") if (inner / INFO).is_file()]
    if info:
        matrices = info_matrices(info[0])
    else:
        matrices = {
            f"{kind} {part}": (matrix_of(read_text(file), file), file)
            for kind in ("intrinsic", "extrinsic")
            for part in ("color", "depth")
            if (file := matrix_file(folder, kind, part)) is not None
        }
    for part in ("color", "depth"):
        if f"intrinsic {part}" not in matrices:
            raise ClipError(
                f"{folder} has no intrinsic/intrinsic_{part}.txt: depth needs both cameras, export them"
            )
        matrix, file = matrices.get(f"extrinsic {part}", (np.eye(4), folder))
        if not np.allclose(matrix, np.eye(4), atol=1e-3):
            raise ClipError(f"{file} moves the {part} camera, and only cameras in one place are read")
    colour, depth = (camera_of(*matrices[f"intrinsic {part}"]) for part in ("color", "depth"))
    return colour, depth


def matrix_file(folder: Path, kind: str, part: str) -> Path | None:
    """Where a matrix of a camera is stored, or None."""
    places = (f"intrinsic/{kind}_{part}.txt", f"{kind}s_{part}.txt", f"{kind}_{part}.txt")
    return next((folder / place for place in places if (folder / place).is_file()), None)


def info_matrices(file: Path) -> dict[str, tuple[np.ndarray, Path]]:
    """The matrices of an `_info.txt`, by kind and part."""
    lines = (line.partition("=") for line in read_text(file).splitlines())
    values = {name.strip(): text for name, _, text in lines}
    return {
        f"{kind.lower()} {part.lower()}": (matrix_of(values[name], file), file)
        for kind in ("Intrinsic", "Extrinsic")
        for part in ("Color", "Depth")
        if (name := f"m_calibration{part}{kind}") in values
    }


def camera_of(matrix: np.ndarray, file: Path) -> Camera:
    """The camera of a `[4, 4]` matrix, which puts pixel centres on whole numbers."""
    (fx, skew, cx), (_, fy, cy) = matrix[0, :3], matrix[1, :3]
    if not np.isfinite(matrix).all() or min(fx, fy) <= 0 or abs(skew) > 1e-3 * fx:
        raise ClipError(f"{file} is no camera without skew: it must hold fx 0 cx, 0 fy cy, 0 0 1 and zeros")
    return Camera((float(fx), float(fy)), (float(cx) + PIXEL_CENTRE, float(cy) + PIXEL_CENTRE))


def check_camera(camera: Camera, file: Path, size: tuple[int, int]) -> None:
    """Raise `ClipError` if a camera can't be that of pictures of this size, as when they alone were made smaller."""
    if any(
        abs(centre / pixels - 0.5) > MOST_OFF_CENTRE
        for centre, pixels in zip(camera.centre, size, strict=True)
    ):
        raise ClipError(
            f"{file} is {size[0]}x{size[1]}, but its camera has its centre at "
            f"({camera.centre[0]:.0f}, {camera.centre[1]:.0f}): scale the intrinsics as the pictures were"
        )


def check_size(file: Path, size: tuple[int, ...], first: Path, expected: tuple[int, int]) -> None:
    """Raise `ClipError` if a picture has another size than the first one."""
    if tuple(size) != expected:
        raise ClipError(
            f"{file} is {size[0]}x{size[1]}, but {first.name} has {expected[0]}x{expected[1]}: "
            "all frames of a scene must have one size"
        )


def resample(depth: np.ndarray, camera: Camera, intrinsics: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """`[H, W]` depth along the rays of a frame's pixel centres, the nearest pixel of a depth map; 0 beside it.

    Args:
        depth: of the depth camera.
        camera: the depth camera.
        intrinsics: `[3, 3]` of the frame, whose camera stands in the same place.
        size: H and W of the frame.
    """
    numbers, inside = [], []
    for axis, (pixels, measured) in enumerate(zip(size[::-1], depth.shape[::-1], strict=True)):  # x, then y
        focal, centre = intrinsics[axis, axis].item(), intrinsics[axis, 2].item()
        rays = (np.arange(pixels) + PIXEL_CENTRE - centre) / focal
        # Rounded, so that a frame of the depth camera itself gets each pixel for itself.
        number = np.floor(np.round(rays * camera.focal[axis] + camera.centre[axis], 6)).astype(np.int64)
        inside.append((number >= 0) & (number < measured))
        numbers.append(number.clip(0, measured - 1))
    found = depth[numbers[1][:, None], numbers[0][None]]
    return np.where(inside[1][:, None] & inside[0][None], found, 0).astype(np.float32)
