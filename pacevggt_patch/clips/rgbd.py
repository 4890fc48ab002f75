"""What data sets of RGB-D cameras have in common: matrices in text files, depth in millimetres."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import ClipError, first_line
from .folder import MILLIMETRES_PER_METRE, is_rigid
from .images import check_file, read_image

NOT_MEASURED = (0, 65535)  # values of a depth map
MOST_TEXT = 2**20  # bytes of a pose or of a list


def read_text(file: Path) -> str:
    """A small text file."""
    check_file(file, MOST_TEXT)
    try:
        return file.read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        raise ClipError(f"{file} can't be read as text: {first_line(error)}") from error


def matrix_of(text: str, file: Path, size: int = 4) -> np.ndarray:
    """`[size, size]` float64 of numbers in a text, in rows; NaN and infinity are numbers, too."""
    try:
        numbers = [float(number) for number in text.split()]
    except ValueError as error:
        raise ClipError(f"{file} must hold {size} x {size} numbers: {first_line(error)}") from error
    if len(numbers) != size**2:
        raise ClipError(f"{file} must hold {size} x {size} numbers, and has {len(numbers)}")
    return np.array(numbers).reshape(size, size)


def read_pose(file: Path) -> np.ndarray | None:
    """`[4, 4]` float64 camera-to-world, or None where tracking was lost: NaN or infinity is stored.

    Published rotations are off by some 1e-4; here they are exact.

    Raises:
        ClipError: the file holds finite numbers that are no rotation and translation.
    """
    pose = matrix_of(read_text(file), file)
    if not np.isfinite(pose).all():
        return None
    if not is_rigid(pose.tolist()):
        raise ClipError(f"{file} is not a 4x4 rotation and translation: leave this frame out")
    left, _, right = np.linalg.svd(pose[:3, :3])
    pose[:3, :3] = left @ right
    return pose


def read_metres(file: Path) -> np.ndarray:
    """`[H, W]` float32 depth in metres, 0 where not measured."""
    stored = np.asarray(read_image(file))
    return np.where(np.isin(stored, NOT_MEASURED), 0, stored / MILLIMETRES_PER_METRE).astype(np.float32)
