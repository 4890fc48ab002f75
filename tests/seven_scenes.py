"""A small scene in the layout of 7-Scenes: two planes and a box, computed for both cameras of a Kinect."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from pacevggt_patch.clips.seven_scenes import Calibration

WIDTH, HEIGHT = 280, 210
SCALE = WIDTH / 640
# As the true one, in smaller pictures.
SMALL = Calibration(
    size=(WIDTH, HEIGHT),
    depth_focal=585 * SCALE,
    depth_centre=(320.5 * SCALE - 0.5, 240.5 * SCALE - 0.5),
    colour_focal=526.17 * SCALE,
    colour_centre=(315.82 * SCALE - 0.5, 239.78 * SCALE - 0.5),
)
PLANES = (
    (np.array([0.3, 0.1, 1.0]), 2.4),
    (np.array([0.0, 1.0, 0.25]), 1.2),
)  # n . x = d: a wall, and a floor
BOX = np.array([-0.25, -0.1, 1.3]), np.array([0.3, 0.4, 1.7])


def pose_of(index: int) -> np.ndarray:
    """`[4, 4]` camera-to-world of a depth camera that moves sideways and turns."""
    angle = 0.04 * index - 0.05
    pose = np.eye(4)
    pose[0, 0] = pose[2, 2] = math.cos(angle)
    pose[0, 2], pose[2, 0] = math.sin(angle), -math.sin(angle)
    pose[:3, 3] = 0.05 * index, 0.01 * index, 0.02 * index
    return pose


def seen(
    pose: np.ndarray, focal: float, centre: tuple[float, float], size: tuple[int, int] = SMALL.size
) -> tuple[np.ndarray, np.ndarray]:
    """Depth `[H, W]` and world points `[H, W, 3]` of what a camera sees first at each pixel centre."""
    rows, columns = np.mgrid[: size[1], : size[0]]
    rays = np.stack([(columns - centre[0]) / focal, (rows - centre[1]) / focal, np.ones_like(rows)], -1)
    return along(pose, rays)


def along(pose: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth `[H, W]` and world points `[H, W, 3]` of what lies first on rays `[H, W, 3]` of a camera, whose z is 1."""
    ways, start = rays @ pose[:3, :3].T, pose[:3, 3]
    depth = np.full(rays.shape[:2], np.inf)
    for normal, distance in PLANES:
        along = ways @ normal
        with np.errstate(divide="ignore"):
            meets = (distance - start @ normal) / along
        depth = np.where(meets > 0, np.minimum(depth, meets), depth)
    with np.errstate(divide="ignore"):
        low, high = ((corner - start) / ways for corner in BOX)
    enter, leave = np.minimum(low, high).max(-1), np.maximum(low, high).min(-1)
    depth = np.where((enter < leave) & (enter > 0), np.minimum(depth, enter), depth)
    return depth, start + depth[..., None] * ways


def colours(points: np.ndarray) -> np.ndarray:
    """RGB in [0, 1] of world points, smooth in them."""
    return 0.5 + 0.45 * np.sin(points * 3 + np.array([0.0, 1.0, 2.0]))


def colour_pose(index: int) -> np.ndarray:
    """`[4, 4]` camera-to-world of the colour camera, written out for the rotation's axis and angle."""
    axis = np.array(SMALL.rotation)
    angle = np.linalg.norm(axis)
    x, y, z = axis / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    rotation = np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
    inverse = np.eye(4)
    inverse[:3, :3] = rotation.T
    inverse[:3, 3] = -rotation.T @ np.array(SMALL.translation)
    return pose_of(index) @ inverse


def write_frame(folder: Path, number: int, cameras: Calibration) -> None:
    """The three files of one frame."""
    depth, _ = seen(pose_of(number), cameras.depth_focal, cameras.depth_centre, cameras.size)
    stored = (depth * 1000).round().astype(np.uint16)
    stored[:10] = 65535
    stored[-5:] = 0
    _, points = seen(colour_pose(number), cameras.colour_focal, cameras.colour_centre, cameras.size)
    pixels = (colours(points) * 255).round().astype(np.uint8)
    name = folder / f"frame-{number:06d}"
    Image.fromarray(pixels).save(f"{name}.color.png", compress_level=1)
    Image.fromarray(stored).save(f"{name}.depth.png", compress_level=1)
    pose = pose_of(number)
    pose[:3, :3] += 1e-4 * np.sin(np.arange(9)).reshape(3, 3)  # as the published ones are
    np.savetxt(f"{name}.pose.txt", pose, delimiter="\t")


def write_scene(
    folder: Path, sequences: dict[int, int], test: tuple[int, ...], cameras: Calibration = SMALL
) -> Path:
    """A scene of sequences with so many frames each, the `test` ones in that split and the others in the other."""
    for sequence, frames in sequences.items():
        (folder / f"seq-{sequence:02d}").mkdir(parents=True)
        for number in range(frames):
            write_frame(folder / f"seq-{sequence:02d}", number, cameras)
    for name, chosen in (("TestSplit", test), ("TrainSplit", set(sequences) - set(test))):
        (folder / f"{name}.txt").write_text("".join(f"sequence{number}\n" for number in sorted(chosen)))
    return folder
