"""Measure a model on scenes that training never draws, while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...evaluation.metrics import decode_pose_encoding, depth_errors, pose_results
from ..scenes.rooms import render_room

HELD_OUT_SEED = 1_000_000  # the rooms that `benchmarks/quality.py` measures on; training draws other scenes
HELD_OUT_ROOMS = 8
HELD_OUT_VIEWS = 8


def held_out_rooms(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Images, extrinsics and depth of the first rooms that `benchmarks/quality.py` measures on."""
    clips = [
        render_room(HELD_OUT_SEED + i, HELD_OUT_VIEWS, size, size, device=device)
        for i in range(HELD_OUT_ROOMS)
    ]
    columns = zip(*((clip.images, clip.world_to_camera, clip.depth) for clip in clips), strict=True)
    images, cameras, depth = (torch.stack(column) for column in columns)  # type: ignore[arg-type]
    return images, cameras, depth


def evaluate(
    predict: Callable[[Tensor], tuple[Tensor, Tensor]], images: Tensor, cameras: Tensor, depth: Tensor
) -> dict[str, float]:
    """Mean over held-out clips of the camera and depth metrics.

    Args:
        predict: pose encodings `[B, S, 9]` and depth `[B, S, H, W]` of images.
        images: `[B, S, 3, H, W]`.
        cameras: `[B, S, 3, 4]` world to camera.
        depth: `[B, S, H, W]`.
    """
    poses, depths = predict(images)
    rows = []
    for pose, predicted, truth, z in zip(poses.cpu(), depths.cpu(), cameras.cpu(), depth.cpu(), strict=True):
        extrinsics, _ = decode_pose_encoding(pose, *z.shape[1:])
        camera = pose_results(extrinsics, truth)
        found = depth_errors(predicted, z, torch.ones_like(z, dtype=torch.bool))
        rows.append(
            {
                **{name: camera[name] for name in ("auc15", "auc30", "rotation_deg", "translation_deg")},
                "absrel": found.absrel if found else math.nan,
            }
        )
    return {name: sum(float(row[name] or 0) for row in rows) / len(rows) for name in rows[0]}
