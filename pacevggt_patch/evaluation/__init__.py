"""Quality of predicted cameras, depth and points against ground truth."""

from .geometry import decode_pose_encoding, similarity_alignment, unproject
from .metrics import (
    absolute_trajectory_error,
    depth_errors,
    evaluate_predictions,
    pairwise_pose_errors,
    point_error,
    pose_auc,
)

__all__ = [
    "absolute_trajectory_error",
    "decode_pose_encoding",
    "depth_errors",
    "evaluate_predictions",
    "pairwise_pose_errors",
    "point_error",
    "pose_auc",
    "similarity_alignment",
    "unproject",
]
