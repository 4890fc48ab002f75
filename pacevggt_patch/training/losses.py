"""How far a pruned model is from its targets: the unpruned model's output, and the ground truth where there is one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..evaluation.geometry import from_first_camera, quaternions, rotation_matrix, unproject
from .passes import Outputs
from .sources import Truth
from .tensors import total

POSE_WEIGHTS = {"translation": 5.0, "rotation": 6.0, "field_of_view": 1.0}
PAIR_WEIGHTS = {"pair_translation": 1.0, "pair_rotation": 0.5}
WEIGHTS = {
    "camera": 1.0,
    "pairs": 1.0,
    "depth": 1.0,
    "scale": 0.1,
    "points": 0.5,
    "confidence": 0.05,
    "special": 0.5,
    "dense": 0.5,
}
NEAREST = 1e-4
GAMMA = 0.6  # weight of a camera iteration over that of the next
PAIR_FLOOR = 0.03  # added to the length of a pair's translation, in units of the mean distance
PAIR_HALF = 0.5  # error over length at which a pair counts half
# The saliency that is taught is the attention received to this power: coverage and importance must work together, and
# with the attention itself the picks crowd together. AUC@30 on 24 rooms at keep ratio 0.15 and 0.3: 41.2 and 50.3
# without a scorer, 41.7 and 51.5 with power 0.5, 43.0 and 51.9 with 0.25; power 1 was worse than 0.5 on eight rooms.
ATTENTION_POWER = 0.25


class Target(NamedTuple):
    """What the heads should say.

    Attributes:
        pose: encodings [B, S, 9], or None.
        depth: [B, n, H, W] and the weights of its pixels, or None.
        points: [B, n, H, W, 3] and the weights of their pixels, or None.
    """

    pose: Tensor | None
    depth: tuple[Tensor, Tensor] | None
    points: tuple[Tensor, Tensor] | None


def teacher_target(teacher: Outputs) -> Target:
    """The unpruned model's output; pixels weigh as much as it is sure of them."""

    def weighted(output: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        if output is None:
            return None
        values, confidence = output
        return values, confidence / confidence.mean((1, 2, 3), keepdim=True)

    return Target(
        teacher.poses[-1] if teacher.poses else None, weighted(teacher.depth), weighted(teacher.points)
    )


def truth_target(truth: Truth, frames: Tensor, teacher: Outputs) -> Target | None:
    """Ground truth as the model would say it: seen from the first camera, in the scale that the teacher gives it.

    The scale of a clip is the median over its valid pixels of the teacher's depth over the true one.

    Args:
        truth: of clips [B, S, ...].
        frames: [n] the frames of the dense outputs.
        teacher: output of the unpruned model.

    Returns:
        None for a model without a depth head, which does not tell its scale.
    """
    if teacher.depth is None:
        return None
    valid = truth.valid.index_select(1, frames)  # [B, n, H, W]
    depth = truth.depth.index_select(1, frames)
    ratio = torch.where(valid, teacher.depth[0] / depth.clamp(min=NEAREST), torch.nan)
    scale = ratio.flatten(1).nanmedian(1).values.nan_to_num(1.0)  # [B]

    cameras = from_first_camera(truth.world_to_camera)  # [B, S, 3, 4]
    rotation, translation = cameras[..., :3], cameras[..., 3:] * scale[:, None, None, None]
    depth = torch.where(valid, depth, 1.0) * scale[:, None, None, None]
    pose = None
    if teacher.poses:
        quaternion = quaternions(rotation)
        # A rotation has two quaternions: the one that the teacher is nearer to.
        same = (quaternion * teacher.poses[-1][..., 3:7]).sum(-1, keepdim=True) >= 0
        height, width = truth.depth.shape[2:]
        half = torch.stack(
            [height / 2 / truth.intrinsics[..., 1, 1], width / 2 / truth.intrinsics[..., 0, 0]], -1
        )
        quaternion = torch.where(same, quaternion, -quaternion)
        pose = torch.cat([translation[..., 0], quaternion, 2 * torch.atan(half)], -1)
    weight = valid.float() / valid.float().mean((1, 2, 3), keepdim=True).clamp(min=NEAREST)
    points = None
    if teacher.points is not None:
        cameras = torch.cat([rotation, translation], -1).index_select(1, frames).flatten(0, 1)
        intrinsics = truth.intrinsics.index_select(1, frames).flatten(0, 1)
        points = unproject(depth.flatten(0, 1), intrinsics, cameras).unflatten(0, depth.shape[:2]), weight
    return Target(pose, (depth, weight), points)


def output_losses(student: Outputs, target: Target) -> dict[str, Tensor]:
    """Camera, pair, depth, scale and point losses, as far as the model has these heads.

    What a VGGT says is true up to one scale for each clip, so that is taken out: it is the geometric mean of the
    student's depth over the target's, by which depth, points and translations are divided. How far it is from 1 is a
    loss of its own, and a small one.

    Cameras: mean absolute error of translation, quaternion and field of view, weighted by POSE_WEIGHTS, over the
    iterations of the head, weighted to the last. Pairs: errors of the relative motion of two frames, as in
    `pair_losses`, weighted by PAIR_WEIGHTS. Depth: mean absolute error of the logarithm. Points: mean
    distance over the target's distance from the first camera, or over the clip's mean distance, if that is larger.
    """
    losses = {}
    scale: Tensor | float = 1.0
    if target.depth is not None and student.depth is not None:
        values, weight = target.depth
        error = student.depth[0].clamp(min=NEAREST).log() - values.clamp(min=NEAREST).log()  # [B, n, H, W]
        weights = weight.sum((1, 2, 3), keepdim=True).clamp(min=NEAREST)
        shift = (error * weight).sum((1, 2, 3), keepdim=True) / weights  # [B, 1, 1, 1]
        losses["depth"] = ((error - shift).abs() * weight).mean()
        losses["scale"] = shift.abs().mean()
        # No part of the camera and point losses is to be had by a change of scale.
        scale = shift.detach().exp()
    if target.pose is not None:
        parts = camera_losses([rescaled(pose, scale) for pose in student.poses], target.pose)
        losses["camera"] = total(POSE_WEIGHTS[name] * part for name, part in parts.items())
        pairs = pair_losses(rescaled(student.poses[-1], scale), target.pose)
        losses["pairs"] = total(PAIR_WEIGHTS[name] * part for name, part in pairs.items())
    if target.points is not None and student.points is not None:
        values, weight = target.points
        reach = values.norm(dim=-1)  # [B, n, H, W]
        reach = reach.maximum(reach.mean((1, 2, 3), keepdim=True)).clamp(min=NEAREST)
        found = student.points[0] / (scale.unsqueeze(-1) if isinstance(scale, Tensor) else scale)
        losses["points"] = ((found - values).norm(dim=-1) / reach * weight).mean()
    return losses


def camera_losses(predictions: list[Tensor], truth: Tensor) -> dict[str, Tensor]:
    """Mean absolute errors of pose encodings, over the iterations of the camera head weighted to the last."""
    count = len(predictions)
    weights = [GAMMA ** (count - 1 - i) for i in range(count)]
    errors = [w * (p.float() - truth).abs() for w, p in zip(weights, predictions, strict=True)]
    error = total(errors) / sum(weights)
    return {
        "translation": error[..., :3].mean(),
        "rotation": error[..., 3:7].mean(),
        "field_of_view": error[..., 7:].mean(),
    }


def pair_losses(prediction: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Errors between the frames of each pair, for the metrics look at pairs: pose encodings `[B, S, 9]`.

    A pair's translation counts by its error over its length, and the less the farther off it is already, as it does in
    an AUC; its rotation by the Frobenius norm of the difference of the matrices.
    """
    views = truth.shape[1]
    rotation, translation = relative_motion(prediction.float())
    true_rotation, true_translation = relative_motion(truth)
    error = length(translation - true_translation)
    relative = error / (length(true_translation) + PAIR_FLOOR)  # [B, S, S]
    turned = length((rotation - true_rotation).flatten(3))
    others = 1 - torch.eye(views, device=truth.device)
    count = len(truth) * max(views * (views - 1), 1)
    return {
        "pair_translation": (relative / (relative + PAIR_HALF) * others).sum() / count,
        "pair_rotation": (turned * others).sum() / count,
    }


def relative_motion(poses: Tensor) -> tuple[Tensor, Tensor]:
    """Rotations `[B, S, S, 3, 3]` and translations `[B, S, S, 3]` from the i-th camera of a clip to the j-th."""
    rotation, translation = rotation_matrix(poses[..., 3:7]), poses[..., :3]
    relative = rotation[:, None] @ rotation[:, :, None].mT  # [B, i, j, 3, 3]
    return relative, translation[:, None] - (relative @ translation[:, :, None, :, None])[..., 0]


def length(x: Tensor) -> Tensor:
    """Length of vectors `[..., n]`, with a gradient at 0."""
    return (x.square().sum(-1) + 1e-8).sqrt()


def rescaled(pose: Tensor, scale: Tensor | float) -> Tensor:
    """Pose encodings [B, S, 9] of clips divided by their scale [B, 1, 1, 1]."""
    scale = scale[..., 0] if isinstance(scale, Tensor) else scale
    return torch.cat([pose[..., :3] / scale, pose[..., 3:]], -1)


def confidence_loss(student: Outputs, teacher: Outputs) -> Tensor | None:
    """Mean absolute error of the logarithm of the confidences, so that users' thresholds go on meaning the same."""
    pairs = [(student.depth, teacher.depth), (student.points, teacher.points)]
    errors = [(a[1].log() - b[1].log()).abs().mean() for a, b in pairs if a is not None and b is not None]
    return torch.stack(errors).mean() if errors else None


def token_losses(student: Outputs, teacher: Outputs, layers: Collection[int]) -> dict[str, Tensor]:
    """Mean squared error of tokens over the variance of the teacher's, mean over layers, so that layers weigh alike.

    "special": camera and register tokens of all frames and returned layers. "dense": patch tokens of the n frames with
    dense outputs, at those of `layers` that the host returns.
    """
    n = student.tokens.special
    special = [
        relative_error(student.tokens.special_tokens(layer), teacher.tokens.special_tokens(layer))
        for layer in student.tokens.layers
    ]
    losses = {"special": torch.stack(special).mean()}
    frames = student.dense.total
    if frames:
        layers = [layer for layer in layers if layer in student.dense.layers]
        found: list[Any] = student.dense.frames(0, frames, layers)
        wanted: list[Any] = teacher.dense.frames(0, frames, layers)
        dense = [relative_error(found[layer][:, :, n:], wanted[layer][:, :, n:]) for layer in layers]
        losses["dense"] = torch.stack(dense).mean()
    return losses


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of [..., C] over the mean variance of the channels of `wanted`."""
    found, wanted = found.float(), wanted.float()
    variance = (wanted - wanted.flatten(0, -2).mean(0)).square().mean()
    return (found - wanted).square().mean() / variance.clamp(min=NEAREST)


def distillation_loss(logits: Tensor, attention: Tensor) -> Tensor:
    """Kullback-Leibler divergence of softmax(logits) from what the tokens of a frame should weigh.

    That is the attention that they receive to the power ATTENTION_POWER, made to sum to 1.

    Args:
        logits: log-saliency [B, S, P].
        attention: not negative, [B, S, P]; only its ratios within a frame matter.

    Returns:
        Mean over frames; 0 if and only if they agree.
    """
    weight = attention.float() ** ATTENTION_POWER
    target = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return F.kl_div(logits.log_softmax(-1), target, reduction="none").sum(-1).mean()


def total_loss(
    student: Outputs, teacher: Outputs, truth: Target | None, truth_share: float, layers: Collection[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the second stage, and its parts.

    Args:
        student: output of the pruned model.
        teacher: output of the unpruned model on the same clips and frames.
        truth: what is known to be true, or None.
        truth_share: how much of the camera, pair, depth, scale and point losses is against the truth where it is known.
        layers: of the dense tokens that are compared, those that dense heads read.
    """
    parts = output_losses(student, teacher_target(teacher))
    if truth is not None:
        true = output_losses(student, truth)
        parts = {name: torch.lerp(parts[name], true[name], truth_share) for name in parts}
    confidence = confidence_loss(student, teacher)
    if confidence is not None:
        parts["confidence"] = confidence
    parts |= token_losses(student, teacher, layers)
    return torch.stack([WEIGHTS[name] * value for name, value in parts.items()]).sum(), parts
