"""Errors of a whole trajectory after one alignment, on any device, computed in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import camera_to_world, similarity_alignment
from .metrics import check_poses, rotation_angle


class TrajectoryErrors(NamedTuple):
    """Root mean squares over a trajectory, aligned as `trajectory_errors` says.

    Attributes:
        ate: distance of positions, in the unit of the truth.
        are_deg: angle between orientations, degrees. None where predicted positions lie on one line, so that any turn
            about it aligns them, and the first pose does not settle it.
        rpe_translation: distance between the motions from each frame to the next, in the unit of the truth.
        rpe_rotation_deg: angle between their rotations, degrees.
    """

    ate: float
    are_deg: float | None
    rpe_translation: float
    rpe_rotation_deg: float


def trajectory_errors(
    predicted: Tensor, truth: Tensor, align_origin: bool = False
) -> TrajectoryErrors | None:
    """Compare two trajectories of poses, whatever they take to what.

    The Sim(3) that aligns positions in the least-squares sense is applied to the prediction.

    Args:
        predicted: `[S, 4, 4]` rigid motions, in a frame and at a scale of their own.
        truth: `[S, 4, 4]` rigid motions.
        align_origin: whether a rigid motion then lays the first predicted pose on the first true one.

    Returns:
        None for fewer than three poses or true positions on one line, to which anything aligns too well. Predicted
        positions all in one place get scale 0: each is then in the middle of the true ones.
    """
    predicted, truth = predicted.cpu().double(), truth.cpu().double()
    places, true_places = predicted[:, :3, 3], truth[:, :3, 3]  # [S, 3]
    if len(truth) < 3 or not spans_plane(true_places):
        return None
    scale, rotation, translation = similarity_alignment(places, true_places)
    turned = rotation @ predicted[:, :3, :3]  # [S, 3, 3]
    moved = scale * places @ rotation.T + translation  # [S, 3]
    true_turned = truth[:, :3, :3]
    if align_origin:
        turn = true_turned[0] @ turned[0].mT
        turned, moved = turn @ turned, (moved - moved[0]) @ turn.T + true_places[0]
    step, step_turn = motions(turned, moved)
    true_step, true_step_turn = motions(true_turned, true_places)
    return TrajectoryErrors(
        root_mean_square((moved - true_places).norm(dim=1)),
        root_mean_square(rotation_angle(turned.mT @ true_turned))
        if align_origin or spans_plane(places)
        else None,
        root_mean_square((step - true_step).norm(dim=1)),
        root_mean_square(rotation_angle(step_turn.mT @ true_step_turn)),
    )


def motions(rotation: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Translations `[S - 1, 3]` and rotations `[S - 1, 3, 3]` from each pose to the next, in the frame of the first."""
    back = rotation[:-1].mT
    return (back @ (place[1:] - place[:-1])[..., None])[..., 0], back @ rotation[1:]


def root_mean_square(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def spans_plane(points: Tensor) -> bool:
    """Whether points `[N, 3]` lie on more than one line."""
    extent = torch.linalg.svdvals(points - points.mean(dim=0))
    return bool(len(extent) > 1 and extent[1] > 1e-6 * extent[0])


def absolute_trajectory_error(predicted: Tensor, truth: Tensor) -> float | None:
    """Root mean square distance between camera **centres** after Sim(3) alignment.

    Args:
        predicted: World-to-camera `[S, 3, 4]`.
        truth: World-to-camera `[S, 3, 4]`.

    Returns:
        The error in the unit of `truth`; None as in `trajectory_errors`.

    Raises:
        ValueError: The shapes are not both `[S, 3, 4]`.
    """
    check_poses(predicted, truth)
    errors = trajectory_errors(camera_to_world(predicted), camera_to_world(truth))
    return None if errors is None else errors.ate
