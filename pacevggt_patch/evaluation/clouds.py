"""How far two point clouds of one scene are apart, without correspondences: numpy and SciPy, in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..runtime.plotting import load_extra

VOXEL = 0.05  # metres, a side
CLIP = 0.5  # metres
NEIGHBOURS = 30  # points of a cloud that tell a normal
LEAST_POINTS = 4  # that tell one


class CloudErrors(NamedTuple):
    """Distances between two clouds after thinning to voxels, in their unit.

    Attributes:
        accuracy: mean distance from a predicted point to the nearest true one.
        completeness: mean distance from a true point to the nearest predicted one.
        chamfer: sum of both.
        chamfer_clipped: sum of both means, distances beyond the limit counting as the limit.
        normal_consistency: mean absolute cosine between the normals of a point and of the nearest one of the other
            cloud, over both directions. None where a cloud has too few points for normals.
    """

    accuracy: float
    completeness: float
    chamfer: float
    chamfer_clipped: float
    normal_consistency: float | None


def cloud_errors(
    predicted: np.ndarray, truth: np.ndarray, voxel: float = VOXEL, clip: float = CLIP
) -> CloudErrors | None:
    """Compare two clouds.

    Args:
        predicted: `[N, 3]`.
        truth: `[M, 3]`.
        voxel: side of the voxels that both are thinned to, in their unit.
        clip: distance at which `chamfer_clipped` ends.

    Returns:
        None where one has no points.

    Raises:
        PaceError: SciPy is not installed.
    """
    if not len(predicted) or not len(truth):
        return None
    predicted, truth = voxel_means(predicted, voxel), voxel_means(truth, voxel)
    tree, true_tree = tree_of(predicted), tree_of(truth)
    to_truth, nearest_true = true_tree.query(predicted)  # [N], [N]
    to_predicted, nearest_predicted = tree.query(truth)  # [M], [M]
    consistency = None
    if min(len(predicted), len(truth)) >= LEAST_POINTS:
        normal, true_normal = normals(predicted, tree), normals(truth, true_tree)
        there = np.abs((normal * true_normal[nearest_true]).sum(1)).mean()
        back = np.abs((true_normal * normal[nearest_predicted]).sum(1)).mean()
        consistency = float((there + back) / 2)
    return CloudErrors(
        float(to_truth.mean()),
        float(to_predicted.mean()),
        float(to_truth.mean() + to_predicted.mean()),
        float(to_truth.clip(max=clip).mean() + to_predicted.clip(max=clip).mean()),
        consistency,
    )


def tree_of(points: np.ndarray):
    """A search tree over points `[N, 3]`."""
    return load_extra("scipy.spatial", "distances between clouds", "eval").cKDTree(points)


def voxel_means(points: np.ndarray, size: float) -> np.ndarray:
    """`[M, 3]` float64: the mean of the points `[N, 3]` in each voxel that holds some.

    The grid begins half a voxel before the least coordinates.
    """
    points = np.asarray(points, np.float64)
    cells = np.floor((points - points.min(0)) / size + 0.5)  # [N, 3]
    cell = np.zeros(len(points), np.int64)
    # Axis by axis, by rank: unique() of rows takes ten times as long, and one number of all axes may not fit.
    for axis in range(3):
        ranks = np.unique(cells[:, axis], return_inverse=True)[1]
        cell = np.unique(cell * len(points) + ranks, return_inverse=True)[1]  # [N]
    count = np.bincount(cell)
    return np.stack([np.bincount(cell, weights=points[:, axis]) / count for axis in range(3)], 1)


def normals(points: np.ndarray, tree) -> np.ndarray:
    """`[N, 3]` unit normals of points, up to their sign: the least direction of each point's nearest neighbours."""
    _, near = tree.query(points, min(NEIGHBOURS, len(points)))  # [N, k]
    around = points[near] - points[near].mean(1, keepdims=True)  # [N, k, 3]
    _, vectors = np.linalg.eigh(around.transpose(0, 2, 1) @ around)
    return vectors[:, :, 0]


def sample(points: np.ndarray, most: int, seed: int = 0) -> np.ndarray:
    """At most so many of the points `[N, 3]`, drawn without repetition, the same at every call."""
    if len(points) <= most:
        return points
    return points[np.random.default_rng(seed).choice(len(points), most, replace=False, shuffle=False)]


Box = tuple[np.ndarray, np.ndarray]  # [3] least and [3] largest coordinates


def box_of(points: np.ndarray) -> Box:
    """The box around points `[N, 3]`."""
    return points.min(0), points.max(0)


def fit_to_box(points: np.ndarray, box: Box, target: Box) -> np.ndarray:
    """Points scaled and moved as takes the diagonal and the centre of a box to those of another one.

    Args:
        points: `[N, 3]`, any of those in the box.
        box: around all of them.
        target: what the box becomes.
    """
    (low, high), (target_low, target_high) = box, target
    diagonal = np.linalg.norm(high - low)
    scale = np.linalg.norm(target_high - target_low) / diagonal if diagonal > 0 else 1.0
    return (points - (low + high) / 2) * scale + (target_low + target_high) / 2
