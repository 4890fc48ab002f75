"""How far two predictions for one clip are apart, where neither is the truth: cameras, depth and points.

Pure functions on tensors of any device. Errors are computed in float64, and what the input does not determine is None.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import Similarity, similarity_alignment
from .metrics import check_poses, median, relative_poses, rotation_angle

# Baselines shorter than this share of the scene's size have a direction that noise decides.
LEAST_BASELINE = 0.01


class CameraAgreement(NamedTuple):
    """Angles between the relative poses of all N frame pairs i < j, in degrees.

    Attributes:
        rotation: [N] between the relative rotations, 0 to 180.
        direction: [N] between the relative translations, 0 to 180; NaN for pairs that are left out.
        rotation_of_frame, direction_of_frame: of each frame, the median over the pairs that it is in.
        left_out: number of pairs without a direction.
    """

    rotation: Tensor
    direction: Tensor
    rotation_of_frame: list[float | None]
    direction_of_frame: list[float | None]
    left_out: int


class DepthAgreement(NamedTuple):
    """Relative differences of depth after one scale for the clip, as fractions.

    Attributes:
        scale: that the other depth is multiplied by: the median of reference / other.
        median, mean: over all pixels that have a depth in both.
        of_frame: the median of each frame.
        difference: [S, H, W] of each pixel, float32, on the CPU; NaN where one has no depth.
    """

    scale: float
    median: float
    mean: float
    of_frame: list[float | None]
    difference: Tensor


class PointAgreement(NamedTuple):
    """Distances of corresponding points after one Sim(3) alignment, in percent of the reference cloud's size.

    Attributes:
        size: of the reference cloud, see `cloud_size`.
        median: over all points.
        of_frame: the median of each frame.
        alignment: takes the other points to the reference.
    """

    size: float
    median: float
    of_frame: list[float | None]
    alignment: Similarity


def camera_agreement(reference: Tensor, other: Tensor, size: float = 0.0) -> CameraAgreement:
    """Compare the relative poses `T_i T_j^-1` of all frame pairs; the world frame does not matter, nor does scale.

    Args:
        reference: world-to-camera [S, 3, 4].
        other: world-to-camera [S, 3, 4].
        size: of the scene, in the unit of `reference`. Pairs whose reference baseline is shorter than
            `LEAST_BASELINE` of it, or zero in either, have no direction.

    Raises:
        ValueError: the shapes are not both [S, 3, 4].
    """
    check_poses(other, reference)
    first, second = torch.triu_indices(len(reference), len(reference), offset=1)
    turn, way = relative_poses(reference.cpu().double(), first, second)  # [N, 3, 3], [N, 3]
    other_turn, other_way = relative_poses(other.cpu().double(), first, second)
    rotation = rotation_angle(turn.mT @ other_turn)
    baseline = way.norm(dim=1)
    counted = (baseline > LEAST_BASELINE * size) & (baseline > 0) & (other_way.norm(dim=1) > 0)
    direction = torch.where(counted, vector_angle(way, other_way), torch.nan)
    rotation_of_frame, direction_of_frame = [], []
    for frame in range(len(reference)):
        pairs = (first == frame) | (second == frame)  # [N]
        rotation_of_frame.append(median(rotation[pairs]))
        direction_of_frame.append(median(direction[pairs & counted]))
    return CameraAgreement(rotation, direction, rotation_of_frame, direction_of_frame, int((~counted).sum()))


def vector_angle(first: Tensor, second: Tensor) -> Tensor:
    """[N] angles between vectors [N, 3], in degrees, 0 to 180."""
    sine, cosine = torch.linalg.cross(first, second).norm(dim=1), (first * second).sum(dim=1)
    return torch.rad2deg(torch.atan2(sine, cosine))


def depth_agreement(reference: Tensor, other: Tensor) -> DepthAgreement | None:
    """Compare depth pixel by pixel, |scale * other - reference| / reference, where both are positive.

    Args:
        reference: [S, H, W] z-depth.
        other: [S, H, W] z-depth.

    Returns:
        None where no pixel has two positive depths.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != other.shape or reference.ndim != 3:
        raise ValueError(f"depth must be [S, H, W] both, got {list(reference.shape)} and {list(other.shape)}")
    reference, other = reference.cpu().double(), other.cpu().double()
    valid = (reference > 0) & (other > 0)  # [S, H, W]
    scale = median((reference / other)[valid])
    if scale is None:
        return None
    difference = torch.where(valid, (scale * other / reference - 1).abs(), torch.nan)
    compared = difference[valid]
    of_frame = [median(frame[~frame.isnan()]) for frame in difference]
    return DepthAgreement(
        scale, median(compared) or 0.0, compared.mean().item(), of_frame, difference.float()
    )


def cloud_size(points: Tensor) -> float:
    """Size of a cloud [N, 3]: the median distance of its points from their median, taken axis by axis."""
    points = points.cpu().double()
    return median((points - points.median(dim=0).values).norm(dim=1)) or 0.0


def point_agreement(reference: Tensor, other: Tensor, frame: Tensor, frames: int) -> PointAgreement | None:
    """Compare corresponding points after the Sim(3) that aligns `other` with `reference` in the least-squares sense.

    Args:
        reference: [N, 3].
        other: [N, 3].
        frame: [N] number of the frame that each point was seen in.
        frames: S.

    Returns:
        None for fewer than four points, or where the reference cloud has no size.
    """
    size = cloud_size(reference) if len(reference) else 0.0
    if len(reference) < 4 or size == 0:
        return None
    reference, other, frame = reference.cpu().double(), other.cpu().double(), frame.cpu()
    alignment = similarity_alignment(other, reference)
    percent = (moved(other, alignment) - reference).norm(dim=1) / size * 100  # [N]
    of_frame = [median(percent[frame == i]) for i in range(frames)]
    return PointAgreement(size, median(percent) or 0.0, of_frame, alignment)


def moved(points: Tensor, similarity: Similarity) -> Tensor:
    """Points [..., 3] after a similarity, in their own dtype."""
    scale, rotation, translation = (value.to(points) for value in similarity)
    return scale * points @ rotation.mT + translation


def moved_cameras(world_to_camera: Tensor, similarity: Similarity) -> Tensor:
    """World-to-camera [S, 3, 4] of the same cameras in the world that a similarity leads to.

    A camera sees what it saw, `scale` times as large and as far away.
    """
    scale, rotation, translation = (value.to(world_to_camera) for value in similarity)
    turned = world_to_camera[:, :, :3] @ rotation.mT  # [S, 3, 3]
    return torch.cat([turned, scale * world_to_camera[:, :, 3:] - turned @ translation[:, None]], dim=2)
