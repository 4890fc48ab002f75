"""What other programs read: point clouds as PLY, and COLMAP models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import PaceError
from ..runtime.plotting import load_extra
from ..training.states import result_file, results_folder, writing
from .clouds import Cloud

COLMAP_POINTS = 100_000


def save_ply(path: Path, points: Tensor, colours: Tensor) -> None:
    """Write a coloured point cloud as binary PLY, whole or not at all.

    Args:
        path: a .ply.
        points: [N, 3].
        colours: RGB [N, 3] in [0, 1].

    Raises:
        PaceError: it can't be written.
    """
    plyfile = load_extra("plyfile", "PLY files")
    names = [(name, "<f4") for name in ("x", "y", "z")] + [(name, "u1") for name in ("red", "green", "blue")]
    vertices = np.empty(len(points), dtype=names)
    for i, (name, _) in enumerate(names):
        values = points[:, i] if i < 3 else (colours[:, i - 3] * 255).round()
        vertices[name] = values.cpu().numpy()
    with result_file(path) as temporary:
        plyfile.PlyData([plyfile.PlyElement.describe(vertices, "vertex")]).write(temporary)


def save_colmap(folder: Path, cloud: Cloud) -> None:
    """Write a COLMAP model (cameras, rigs, frames, images and points3D, binary) of pixels, cameras and points.

    Each point has the pixel that it comes from as its only observation. Images are called `frame000000.jpg`, and are as
    large as the model saw them.

    Args:
        folder: is made if it is not there; a model in it is replaced.
        cloud: of at most COLMAP_POINTS points.

    Raises:
        PaceError: it can't be written.
    """
    model = colmap_model(cloud)
    results_folder(folder)
    with writing(folder):
        try:
            model.write_binary(str(folder))
        except (RuntimeError, ValueError) as error:  # pycolmap's own, whatever the disk said
            raise PaceError(f"{folder} can't be written as a COLMAP model: {error}") from error


def colmap_model(cloud: Cloud) -> Any:
    """A `pycolmap.Reconstruction` of a cloud."""
    pycolmap = load_extra("pycolmap", "COLMAP models", "colmap")
    height, width = cloud.size
    model = pycolmap.Reconstruction()
    frame = (cloud.pixels // (height * width)).numpy()  # [N]
    # COLMAP has pixel centres at halves, as a `Clip` has them.
    columns = (cloud.pixels % width).numpy() + 0.5
    rows = (cloud.pixels // width % height).numpy() + 0.5
    seen = np.zeros(len(frame), np.int64)  # [N] number of a point among those of its frame
    poses = cloud.world_to_camera.double().numpy()
    for index, matrix in enumerate(cloud.intrinsics.double().numpy()):
        own = frame == index
        seen[own] = np.arange(own.sum())
        camera = pycolmap.Camera(
            model="PINHOLE", width=width, height=height, camera_id=index + 1,
            params=[matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]],
        )  # fmt: skip
        model.add_camera_with_trivial_rig(camera)
        image = pycolmap.Image(
            name=f"frame{index:06d}.jpg", camera_id=index + 1, image_id=index + 1,
            keypoints=np.stack([columns[own], rows[own]], axis=1),
        )  # fmt: skip
        pose = pycolmap.Rigid3d(
            pycolmap.Rotation3d(nearest_rotation(poses[index, :, :3])), poses[index, :, 3]
        )
        model.add_image_with_trivial_frame(image, pose)
    points, colours = cloud.points.double().numpy(), (cloud.colours * 255).round().byte().numpy()
    for index in range(len(points)):
        track = pycolmap.Track()
        track.add_element(int(frame[index]) + 1, int(seen[index]))
        model.add_point3D(points[index], track, colours[index])
    return model


def nearest_rotation(matrix: np.ndarray) -> np.ndarray:
    """The rotation that is nearest to a [3, 3] matrix which is off by rounding."""
    left, _, right = np.linalg.svd(matrix)
    return left @ right
