"""Which frames of a scene are taken, and what is measured on them. docs/evaluate.md tells both protocols apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..clips import Clip
from ..compare.runs import Prediction
from ..errors import PaceError, first_line
from ..evaluation import cloud_errors, evaluate_predictions, similarity_alignment, trajectory_errors
from ..evaluation.agreement import moved
from ..evaluation.clouds import box_of, fit_to_box, sample
from ..evaluation.geometry import camera_to_world, from_first_camera, masked_points, thinned
from ..runtime.plotting import load_extra

PUBLISHED, CORRECTED = "published", "corrected"
# Least confidence of a pixel whose point counts in "published". VGGT's begins at 1, other families have other scales.
PUBLISHED_CONFIDENCE = 3.0
PUBLISHED_POINTS = 100_000
MOST_POINTS = 1_000_000  # of a cloud, before it is thinned to voxels
ALIGNED_POINTS = 200_000  # that tell the Sim(3)


@dataclass(frozen=True)
class Metric:
    """A number of a scene.

    Attributes:
        title: in tables, with its unit.
        better: whether "more" or "less" is better.
        digits: after the point.
    """

    title: str
    better: str
    digits: int


# In the order of the tables.
METRICS = {
    "auc5": Metric("camera AUC@5, %", "more", 1),
    "auc15": Metric("camera AUC@15, %", "more", 1),
    "auc30": Metric("camera AUC@30, %", "more", 1),
    "ate": Metric("ATE, m", "less", 4),
    "are_deg": Metric("ARE, degrees", "less", 3),
    "rpe_translation": Metric("RPE translation, m", "less", 4),
    "rpe_rotation_deg": Metric("RPE rotation, degrees", "less", 3),
    "absrel": Metric("depth AbsRel", "less", 4),
    "delta125": Metric("depth within 1.25, %", "more", 1),
    "accuracy": Metric("points, accuracy, m", "less", 4),
    "completeness": Metric("points, completeness, m", "less", 4),
    "chamfer": Metric("points, chamfer, m", "less", 4),
    "chamfer_clipped": Metric("points, chamfer clipped, m", "less", 4),
    "normal_consistency": Metric("points, normal consistency", "more", 4),
}
IN_METRES = ("ate", "rpe_translation")  # points are, too, but depth is stored in metres alone
Values = dict[str, float | None]


def choose_frames(protocol: str, total: int, frames: int | None, stride: int = 1) -> list[int]:
    """Numbers of the frames that are taken, of `total` with a pose; all there are where that is fewer.

    Args:
        protocol: "corrected" takes them evenly, first and last among them. "published" takes the first one and then
            every floor((total - 1) / (frames - 1))-th of the others, from the second one on.
        frames: how many; None takes all.
        stride: step between the frames that are there to choose from.
    """
    there = range(0, total, stride)
    if frames is None or len(there) <= frames:
        return list(there)
    if protocol == PUBLISHED:
        step = max(1, (len(there) - 1) // (frames - 1))
        return [there[0], *there[1::step][: frames - 1]]
    return [there[round(i * (len(there) - 1) / (frames - 1))] for i in range(frames)]


def measure(
    protocol: str, prediction: Prediction, clip: Clip, mesh: np.ndarray | None = None, metres: bool = True
) -> Values:
    """All numbers of a scene, by the names of `METRICS`; None where the scene or the prediction does not tell one.

    Args:
        mesh: [N, 3] vertices of the scene, which "published" compares points with.
        metres: whether that is the unit of the scene's poses; else none of `IN_METRES` is told.
    """
    values: Values = dict.fromkeys(METRICS)
    found = evaluate_predictions(prediction.outputs(), clip)
    values |= {key: value for key, value in found.items() if key in METRICS}
    values |= trajectory(protocol, prediction, clip)
    if not metres:
        values |= dict.fromkeys(IN_METRES)
    if protocol == CORRECTED:
        return values | points(prediction, clip)
    assert mesh is not None
    return values | published_points(prediction, clip, mesh)


def trajectory(protocol: str, prediction: Prediction, clip: Clip) -> Values:
    """ATE, ARE and RPE: of camera centres, or, as published, of the matrices from the first camera to each one."""
    assert clip.world_to_camera is not None
    both = prediction.world_to_camera, clip.world_to_camera
    if protocol == CORRECTED:
        predicted, truth = map(camera_to_world, both)
    else:
        predicted, truth = (in_four_rows(in_first_camera(poses)) for poses in both)
    errors = trajectory_errors(predicted, truth, align_origin=protocol == PUBLISHED)
    return {} if errors is None else errors._asdict()


def in_first_camera(world_to_camera: Tensor) -> Tensor:
    """[S, 3, 4] float64, where the first camera is the world.

    The published script moves true poses there, and takes models that predict there by themselves.
    """
    return from_first_camera(world_to_camera.cpu().double()[None])[0]


def in_four_rows(poses: Tensor) -> Tensor:
    """[S, 4, 4] float64 of [S, 3, 4]."""
    last = torch.tensor([[[0.0, 0.0, 0.0, 1.0]]], dtype=torch.float64).expand(len(poses), 1, 4)
    return torch.cat([poses.cpu().double(), last], dim=1)


def points(prediction: Prediction, clip: Clip) -> Values:
    """Errors of points by depth unprojection at the pixels whose depth was measured, after one Sim(3)."""
    if clip.depth is None or clip.valid is None or clip.intrinsics is None or clip.world_to_camera is None:
        return {}
    of_clip = clip.depth.float(), clip.intrinsics.float(), clip.world_to_camera.float()
    of_model = prediction.depth, prediction.intrinsics, prediction.world_to_camera
    # Aligned by points that correspond, compared as clouds.
    pairs = thinned(clip.valid, ALIGNED_POINTS)
    source, target = (masked_points(*cameras, pairs).double() for cameras in (of_model, of_clip))
    if len(source) < 4:
        return {}
    alignment = similarity_alignment(source, target)
    measured = thinned(clip.valid, MOST_POINTS)
    predicted = moved(masked_points(*of_model, measured).double(), alignment)
    truth = masked_points(*of_clip, measured).double()
    errors = cloud_errors(predicted.numpy(), truth.numpy())
    return {} if errors is None else errors._asdict()


def published_points(prediction: Prediction, clip: Clip, mesh: np.ndarray) -> Values:
    """The published chamfer distance: confident pixels against the mesh, fitted by the boxes around both."""
    assert clip.world_to_camera is not None
    confident = prediction.confidence >= PUBLISHED_CONFIDENCE  # [S, H, W]
    if not bool(confident.any()):
        return {}
    cameras = in_first_camera(prediction.world_to_camera).float()
    predicted = masked_points(prediction.depth, prediction.intrinsics, cameras, confident).numpy()  # [N, 3]
    first = camera_to_world(clip.world_to_camera[:1])[0].float().numpy()  # [4, 4]
    predicted = predicted @ first[:3, :3].T
    predicted += first[:3, 3]
    # A thousand frames have 2e8 points: only those that are compared are scaled, in float64.
    fitted = fit_to_box(sample(predicted, PUBLISHED_POINTS), box_of(predicted), box_of(mesh))
    errors = cloud_errors(fitted, sample(mesh, PUBLISHED_POINTS))
    return {} if errors is None else {"chamfer_clipped": errors.chamfer_clipped}


def read_mesh(file: Path) -> np.ndarray:
    """[N, 3] float64 vertices of a PLY.

    Raises:
        PaceError: it is missing or can't be read.
    """
    ply = load_extra("plyfile", "meshes", "eval")
    try:
        vertices = ply.PlyData.read(str(file))["vertex"]
        found = np.stack([np.asarray(vertices[axis], np.float64) for axis in "xyz"], 1)
    except Exception as error:  # plyfile has errors of its own for each way to be broken
        raise PaceError(f"{file} can't be read as a PLY: {first_line(error)}") from error
    if not len(found) or not np.isfinite(found).all():
        raise PaceError(f"{file} holds no vertices, or some that are not finite")
    return found
