"""How far a side is from stock, and both from the truth where the clip has it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..clips import Clip
from ..evaluation import camera_agreement, depth_agreement, evaluate_predictions, point_agreement, unproject
from ..evaluation.agreement import cloud_size
from ..evaluation.geometry import Similarity
from .runs import Prediction

TRUTH = ("auc30", "rotation_deg", "absrel")
MOST_POINTS = 200_000  # that are compared


class Difference(NamedTuple):
    """How far a prediction is from stock.

    Attributes:
        values: for report.json, see `docs/compare.md`.
        depth: relative difference of each pixel [S, H, W], or None where there is no depth.
        alignment: the Sim(3) that takes its points to those of stock, or None.
    """

    values: dict[str, Any]
    depth: Tensor | None
    alignment: Similarity | None


def world_points(prediction: Prediction) -> Tensor:
    """[S, H, W, 3] points of depth and cameras, in the frame of the first camera."""
    return unproject(prediction.depth, prediction.intrinsics, prediction.world_to_camera)


def confident(prediction: Prediction, share: float, most: int) -> Tensor:
    """Numbers of the more confident pixels of a clip: that share of all, evenly thinned out to at most `most`."""
    confidence = prediction.confidence.flatten()  # [S H W]
    # By sorting: quantile() refuses large inputs.
    least = confidence.kthvalue(max(1, round((1 - share) * len(confidence)))).values
    chosen = (confidence >= least).flatten().nonzero()[:, 0]
    return chosen[:: max(1, -(-len(chosen) // most))]


def difference(stock: Prediction, other: Prediction) -> Difference:
    """Compare a prediction with that of the stock model for the same clip.

    Points are those of the half of all pixels of which stock is more confident.
    """
    frames = len(stock.depth)
    chosen = confident(stock, 0.5, MOST_POINTS)
    of_pixel = chosen // stock.depth[0].numel()
    reference = world_points(stock).view(-1, 3)[chosen]  # [N, 3]
    points = point_agreement(reference, world_points(other).view(-1, 3)[chosen], of_pixel, frames)
    cameras = camera_agreement(stock.world_to_camera, other.world_to_camera, cloud_size(reference))
    depth = depth_agreement(stock.depth, other.depth)
    values = {
        "pairs": len(cameras.rotation),
        "rotation_deg": spread(cameras.rotation),
        "direction_deg": spread(cameras.direction[~cameras.direction.isnan()]),
        "pairs_without_direction": cameras.left_out,
        "depth": depth and {"scale": depth.scale, "median": depth.median, "mean": depth.mean},
        "points": points and {"size": points.size, "median_percent": points.median},
        "per_frame": {
            "rotation_deg": cameras.rotation_of_frame,
            "direction_deg": cameras.direction_of_frame,
            "depth": depth and depth.of_frame,
            "points_percent": points and points.of_frame,
        },
    }
    return Difference(values, depth and depth.difference, points and points.alignment)


def spread(values: Tensor) -> dict[str, float] | None:
    """Median and 90th percentile; None where there are no values."""
    if not len(values):
        return None
    middle, high = values.double().quantile(torch.tensor([0.5, 0.9], dtype=torch.float64)).tolist()
    return {"median": middle, "p90": high}


def truth_errors(prediction: Prediction, clip: Clip) -> dict[str, float | None]:
    """Errors against the clip's ground truth; None where it has none."""
    found = evaluate_predictions(prediction.outputs(), clip)
    return {key: found[key] for key in TRUTH}


def changes(stock: dict[str, float | None], other: dict[str, float | None]) -> dict[str, float | None]:
    """Changes from stock in percent; None where stock has no value, or 0."""
    return {key: percent_change(before, other[key]) for key, before in stock.items()}


def percent_change(before: float | None, after: float | None) -> float | None:
    """Change in percent; None where it has no meaning."""
    return None if not before or after is None else 100 * (after / before - 1)
