"""A small scene in the layouts of ScanNet: the surfaces of seven_scenes.py, seen by two cameras in one place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from seven_scenes import colours, seen
from seven_scenes import pose_of as straight_pose

COLOUR_SIZE, DEPTH_SIZE = (140, 104), (70, 52)  # as 1296x968 and 640x480, about
COLOUR = (126.0, 68.5, 51.2)  # focal length, principal point: pixel centres on whole numbers
DEPTH = (62.0, 34.5, 25.5)


def pose_of(index: int) -> np.ndarray:
    """`[4, 4]` camera-to-world, on a curve."""
    pose = straight_pose(index)
    pose[1, 3] += 0.04 * (index % 3)
    return pose


def matrix_text(camera: tuple[float, float, float]) -> str:
    """A camera as ScanNet's tools write it."""
    focal, x, y = camera
    rows = [[focal, 0, x, 0], [0, focal, y, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    return "".join(" ".join(f"{value:.6f}" for value in row) + "\n" for row in rows)


def write_scene(
    folder: Path, frames: int, lost: Sequence[int] = (), flat: bool = False, mesh: bool = False
) -> Path:
    """A scene of so many frames, in some of which tracking was lost."""
    for part in ("color", "depth", "pose") if not flat else (".",):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for index in range(frames):
        names = (
            [f"frame-{index:06d}.{part}" for part in ("color.jpg", "depth.pgm", "pose.txt")]
            if flat
            else [f"color/{index}.jpg", f"depth/{index}.png", f"pose/{index}.txt"]
        )
        _, points = seen(pose_of(index), COLOUR[0], COLOUR[1:], COLOUR_SIZE)
        picture = Image.fromarray((colours(points) * 255).round().astype(np.uint8))
        picture.save(folder / names[0], quality=98, subsampling=0)
        depth, _ = seen(pose_of(index), DEPTH[0], DEPTH[1:], DEPTH_SIZE)
        stored = (depth * 1000).round().astype(np.uint16)
        stored[:3] = 0
        if flat:  # not every Pillow writes 16-bit PGM
            header = f"P5\n{stored.shape[1]} {stored.shape[0]}\n65535\n"
            (folder / names[1]).write_bytes(header.encode() + stored.astype(">u2").tobytes())
        else:
            Image.fromarray(stored).save(folder / names[1])
        pose = np.full((4, 4), -np.inf) if index in lost else pose_of(index)
        np.savetxt(folder / names[2], pose, fmt="%.6f")
    identity = " ".join(f"{value:g}" for value in np.eye(4).flatten())
    if flat:
        cameras = {
            part: " ".join(matrix_text(camera).split())
            for part, camera in zip("CD", (COLOUR, DEPTH), strict=True)
        }
        (folder / "_info.txt").write_text(
            f"m_versionNumber = 4\nm_depthShift = 1000\nm_calibrationColorIntrinsic = {cameras['C']} \n"
            f"m_calibrationColorExtrinsic = {identity} \nm_calibrationDepthIntrinsic = {cameras['D']} \n"
            f"m_calibrationDepthExtrinsic = {identity} \nm_frames.size = {frames}\n"
        )
    else:
        (folder / "intrinsic").mkdir(exist_ok=True)
        for part, camera in (("color", COLOUR), ("depth", DEPTH)):
            (folder / "intrinsic" / f"intrinsic_{part}.txt").write_text(matrix_text(camera))
            (folder / "intrinsic" / f"extrinsic_{part}.txt").write_text(identity)
    if mesh:
        write_mesh(folder / f"{folder.name}_vh_clean_2.ply", frames)
    return folder


def mesh_points(frames: int) -> np.ndarray:
    """[N, 3] points on the surfaces that the frames see."""
    found = [
        seen(pose_of(index), DEPTH[0], DEPTH[1:], DEPTH_SIZE)[1].reshape(-1, 3) for index in range(frames)
    ]
    return np.concatenate(found).astype(np.float32)


def write_mesh(file: Path, frames: int) -> None:
    """A PLY with these points as vertices, in the form of ScanNet's meshes."""
    from plyfile import PlyData, PlyElement

    points = mesh_points(frames)
    vertices = np.zeros(len(points), [("x", "f4"), ("y", "f4"), ("z", "f4"), ("red", "u1")])
    for axis, name in enumerate("xyz"):
        vertices[name] = points[:, axis]
    faces = np.array([([0, 1, 2],)], dtype=[("vertex_indices", "i4", (3,))])
    PlyData([PlyElement.describe(vertices, "vertex"), PlyElement.describe(faces, "face")]).write(file)
