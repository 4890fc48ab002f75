"""How good predicted cameras, depth and points are, against a clip's ground truth.

Pure functions on tensors of any device; every result is a Python float, computed in float64, or None where
the input does not determine it (a single frame has no pairs, a frame without valid pixels no depth error).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..clips.clip import Clip
from ..errors import PaceError
from .geometry import decode_pose_encoding, masked_points, similarity_alignment, thinned

AUC_THRESHOLDS = (5, 15, 30)
MAX_POINTS = 200_000


class PairErrors(NamedTuple):
    """Errors of the relative poses of all frame pairs i < j, in degrees: `[S * (S - 1) / 2]` float64 each."""

    rotation: Tensor
    translation: Tensor


class DepthErrors(NamedTuple):
    """Depth errors over the valid pixels of a clip, after one scale for the whole clip."""

    absrel: float
    delta125: float


def pairwise_pose_errors(predicted: Tensor, truth: Tensor) -> PairErrors:
    """Errors of the relative poses between all pairs of frames, as VGGT's camera evaluation defines them.

    Of each pair i < j the pose of camera j relative to camera i, `T_i T_j^-1`, is compared: the angle between
    the two rotations, and the angle between the lines along the two translations. The latter knows no sign,
    so it is at most 90 degrees; where a translation is zero it has no direction, and the error is 90. Both do
    not depend on the world frame, the translation error not on scale either.

    Args:
        predicted: World-to-camera `[S, 3, 4]`.
        truth: World-to-camera `[S, 3, 4]`.

    Raises:
        ValueError: The shapes are not both `[S, 3, 4]`.
    """
    check_poses(predicted, truth)
    first, second = torch.triu_indices(len(truth), len(truth), offset=1)
    rotation, translation = relative_poses(predicted.cpu().double(), first, second)
    true_rotation, true_translation = relative_poses(truth.cpu().double(), first, second)
    return PairErrors(
        rotation_angle(rotation.transpose(1, 2) @ true_rotation),
        line_angle(translation, true_translation),
    )


def check_poses(predicted: Tensor, truth: Tensor) -> None:
    """Raise `ValueError` unless both are `[S, 3, 4]`."""
    if predicted.shape != truth.shape or truth.shape[1:] != (3, 4):
        raise ValueError(f"poses must be [S, 3, 4] both, got {list(predicted.shape)} and {list(truth.shape)}")


def relative_poses(world_to_camera: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Rotations `[N, 3, 3]` and translations `[N, 3]` from the cameras `second` to the cameras `first`."""
    rotation, translation = world_to_camera[:, :, :3], world_to_camera[:, :, 3]
    relative = rotation[first] @ rotation[second].transpose(1, 2)
    return relative, translation[first] - (relative @ translation[second, :, None])[:, :, 0]


def rotation_angle(rotation: Tensor) -> Tensor:
    """`[N]` angles of rotations `[N, 3, 3]`, in degrees."""
    # The arc tangent of sine and cosine: the arc cosine alone loses half the digits near 0 and 180 degrees.
    twice_sine_axis = torch.stack(
        [
            rotation[:, 2, 1] - rotation[:, 1, 2],
            rotation[:, 0, 2] - rotation[:, 2, 0],
            rotation[:, 1, 0] - rotation[:, 0, 1],
        ],
        dim=1,
    )
    twice_cosine = rotation.diagonal(dim1=1, dim2=2).sum(dim=1) - 1
    return torch.rad2deg(torch.atan2(twice_sine_axis.norm(dim=1), twice_cosine))


def line_angle(first: Tensor, second: Tensor) -> Tensor:
    """`[N]` angles between the lines along vectors `[N, 3]`, 0 to 90 degrees; 90 where a vector is zero."""
    sine, cosine = torch.linalg.cross(first, second).norm(dim=1), (first * second).sum(dim=1).abs()
    angle = torch.rad2deg(torch.atan2(sine, cosine))
    return torch.where((first.norm(dim=1) > 0) & (second.norm(dim=1) > 0), angle, 90.0)


def pose_auc(errors: Tensor, threshold: int) -> float | None:
    """Area under the curve of accuracy over error threshold, in percent (AUC@threshold).

    As VGGT reports it: errors are counted in bins of one degree up to the threshold, the last one closed, and
    the accuracies at 1, 2, ..., `threshold` degrees are averaged.

    Args:
        errors: `[N]` errors in degrees, of each pair the larger of its rotation and translation error. An
            error that is not a number counts as wrong.
        threshold: Upper end of the curve, in degrees.

    Returns:
        0 to 100, or None if there are no errors.
    """
    if errors.numel() == 0:
        return None
    histogram, _ = np.histogram(errors.cpu().double().numpy(), bins=np.arange(threshold + 1))
    return float(histogram.cumsum().mean() / errors.numel() * 100)


def median(values: Tensor) -> float | None:
    """Median of all values (the mean of the middle two of an even number); None if there are none."""
    return float(np.median(values.detach().cpu().double().numpy())) if values.numel() else None


def depth_errors(predicted: Tensor, truth: Tensor, valid: Tensor) -> DepthErrors | None:
    """Depth error after one scale for the whole clip: the median over the valid pixels of truth / prediction.

    Args:
        predicted: `[S, H, W]` z-depth, positive.
        truth: `[S, H, W]` z-depth.
        valid: `[S, H, W]` bool.

    Returns:
        `absrel`, the mean of |scaled prediction - truth| / truth, as a fraction; `delta125`, the percentage
        of pixels with max(scaled prediction / truth, truth / scaled prediction) < 1.25. None if no pixel is
        valid.
    """
    valid = valid.cpu()
    if not bool(valid.any()):
        return None
    ratio = predicted.cpu()[valid].double() / truth.cpu()[valid].double()  # [N]
    ratio = ratio * float(np.median((1 / ratio).numpy()))
    within = torch.maximum(ratio, 1 / ratio) < 1.25
    return DepthErrors((ratio - 1).abs().mean().item(), within.double().mean().item() * 100)


def point_error(predicted: Tensor, truth: Tensor) -> float | None:
    """Mean distance between corresponding points after one Sim(3) alignment in the least-squares sense.

    Args:
        predicted: `[N, 3]`.
        truth: `[N, 3]`.

    Returns:
        The distance in the unit of `truth`, or None for fewer than four points, which any alignment fits too
        well.
    """
    if len(truth) < 4:
        return None
    predicted, truth = predicted.cpu().double(), truth.cpu().double()
    scale, rotation, translation = similarity_alignment(predicted, truth)
    return (scale * predicted @ rotation.T + translation - truth).norm(dim=1).mean().item()


def evaluate_predictions(predictions: Mapping[str, Tensor], clip: Clip) -> dict[str, float | None]:
    """Compare what a VGGT predicts for a clip with the clip's ground truth.

    Args:
        predictions: What `model(clip.images)` returns. Of it, `pose_enc` `[1, S, 9]` and `depth` `[1, S, H,
            W, 1]` are read; either may be missing.
        clip: The clip, with whatever ground truth it has.

    Returns:
        A dict with these keys, whose value is None where prediction or ground truth is missing or determines
        nothing:

        - `auc5`, `auc15`, `auc30`: area under the accuracy curve of the relative poses, percent (`pose_auc`).
        - `rotation_deg`, `translation_deg`: medians of the pairs' errors, degrees (`pairwise_pose_errors`).
        - `absrel`: fraction, and `delta125`: percent (`depth_errors`).
        - `point_error`: in the clip's unit. Predicted depth, unprojected with the predicted cameras, against
          true depth with the true cameras (`point_error`), over the valid pixels: evenly strided, if there
          are more than 200,000 of them.

    Raises:
        PaceError: A prediction does not have the clip's frames and size, or is not finite.
    """
    size = (len(clip), clip.height, clip.width)
    pose_encoding = prediction(predictions, "pose_enc", (1, len(clip), 9))
    depth = prediction(predictions, "depth", (1, *size, 1))
    result: dict[str, float | None] = dict.fromkeys(f"auc{threshold}" for threshold in AUC_THRESHOLDS)
    result |= dict.fromkeys(["rotation_deg", "translation_deg", "absrel", "delta125", "point_error"])
    poses = intrinsics = None
    if pose_encoding is not None:
        poses, intrinsics = decode_pose_encoding(pose_encoding[0].double(), clip.height, clip.width)
    if poses is not None and clip.world_to_camera is not None:
        result |= pose_results(poses, clip.world_to_camera)
    if depth is not None and clip.depth is not None and clip.valid is not None:
        errors = depth_errors(depth[0, ..., 0], clip.depth, clip.valid)
        if errors is not None:
            result |= errors._asdict()
        if poses is not None and intrinsics is not None:
            result["point_error"] = clip_point_error(depth[0, ..., 0], intrinsics, poses, clip)
    return result


def prediction(predictions: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor | None:
    """The prediction, checked; None if there is none."""
    value = predictions.get(key)
    if value is None:
        return None
    if value.shape != shape:
        raise PaceError(f"predictions[{key!r}] must be {list(shape)} for this clip, got {list(value.shape)}")
    if not bool(value.isfinite().all()):
        raise PaceError(f"predictions[{key!r}] holds values that are not finite")
    return value.detach()


def pose_results(predicted: Tensor, truth: Tensor) -> dict[str, float | None]:
    """The camera entries of `evaluate_predictions`."""
    errors = pairwise_pose_errors(predicted, truth)
    larger = torch.maximum(errors.rotation, errors.translation)
    result = {f"auc{threshold}": pose_auc(larger, threshold) for threshold in AUC_THRESHOLDS}
    return result | {"rotation_deg": median(errors.rotation), "translation_deg": median(errors.translation)}


def clip_point_error(depth: Tensor, intrinsics: Tensor, world_to_camera: Tensor, clip: Clip) -> float | None:
    """`point_error` of unprojected depth `[S, H, W]` with the given cameras; None if the clip cannot tell."""
    if clip.depth is None or clip.valid is None or clip.intrinsics is None or clip.world_to_camera is None:
        return None
    chosen = thinned(clip.valid, MAX_POINTS)
    predicted = masked_points(
        depth.float(), intrinsics.float(), world_to_camera.float(), chosen.to(depth.device)
    )
    truth = masked_points(clip.depth.float(), clip.intrinsics.float(), clip.world_to_camera.float(), chosen)
    return point_error(predicted, truth)
