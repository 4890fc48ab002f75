"""Quality of predicted cameras, depth and points against ground truth, and how far two predictions are apart."""

from .agreement import camera_agreement, depth_agreement, point_agreement
from .clouds import cloud_errors
from .geometry import decode_pose_encoding, similarity_alignment, unproject
from .metrics import (
    depth_errors,
    evaluate_predictions,
    pairwise_pose_errors,
    point_error,
    pose_auc,
)
from .trajectories import absolute_trajectory_error, trajectory_errors

__all__ = [
    "absolute_trajectory_error",
    "camera_agreement",
    "cloud_errors",
    "decode_pose_encoding",
    "depth_agreement",
    "depth_errors",
    "evaluate_predictions",
    "pairwise_pose_errors",
    "point_agreement",
    "point_error",
    "pose_auc",
    "similarity_alignment",
    "trajectory_errors",
    "unproject",
]
