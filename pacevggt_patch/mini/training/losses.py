"""Training losses of VGGT-mini: cameras, depth, points, and two cheap auxiliary ones on the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...evaluation.metrics import rotation_matrix
from ..scenes.raycast import added, faster
from ..scenes.training_scenes import SceneBatch

GAMMA = 0.6  # weight of a camera iteration over that of the next
PAIR_FLOOR = 0.03  # added to the length of a pair's translation, in units of the mean distance
PAIR_HALF = 0.5  # error over length at which a pair counts half
CONFIDENCE = 0.2  # reward for confidence
TEMPERATURE = 15.0  # of patch correspondence: factor on cosines
SAME_DEPTH = 0.04  # relative difference of depth up to which a patch centre is taken to be visible
CORRESPONDENCE_WIDTH = 64
WEIGHTS = {
    "translation": 5.0,
    "rotation": 6.0,
    "field_of_view": 1.0,
    "pair_translation": 1.0,
    "pair_rotation": 0.5,
    "depth": 1.0,
    "depth_gradient": 0.5,
    "points": 0.5,
    "patch_points": 0.5,
    "correspondence": 0.15,
}


@dataclass(frozen=True)
class Targets:
    """Ground truth of B clips with S views, seen from the first camera and scaled to mean distance 1.

    Attributes:
        pose: `[B, S, 9]` pose encoding: translation, quaternion (scalar last), vertical and horizontal field of view.
        extrinsics: `[B, S, 3, 4]` first camera to camera.
        focal: `[B, 2]` focal lengths over width and height.
        depth: `[B, S, H, W]`.
        patch_points: `[B, S, P, 3]` what the patch centres show.
    """

    pose: Tensor
    extrinsics: Tensor
    focal: Tensor
    depth: Tensor
    patch_points: Tensor


def quaternions(rotation: Tensor) -> Tensor:
    """`[..., 4]` unit quaternions, scalar last and not negative, of rotations `[..., 3, 3]`.

    Of the four ways to compute one, each row of a symmetric matrix, the one with the largest divisor is taken.
    """
    xx, xy, xz, yx, yy, yz, zx, zy, zz = rotation.flatten(-2).unbind(-1)
    rows = torch.stack(
        [
            torch.stack([1 + xx - yy - zz, xy + yx, xz + zx, zy - yz], -1),
            torch.stack([xy + yx, 1 - xx + yy - zz, yz + zy, xz - zx], -1),
            torch.stack([xz + zx, yz + zy, 1 - xx - yy + zz, yx - xy], -1),
            torch.stack([zy - yz, xz - zx, yx - xy, 1 + xx + yy + zz], -1),
        ],
        -2,
    )  # [..., 4, 4], each row a multiple of the quaternion
    best = rows.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None].expand(*rotation.shape[:-2], 1, 4)
    quaternion = F.normalize(rows.gather(-2, best)[..., 0, :], dim=-1)
    return torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def from_first_camera(world_to_camera: Tensor) -> Tensor:
    """Extrinsics `[B, S, 3, 4]` of each clip's first camera to camera, of those of world to camera."""
    first = world_to_camera[:, :1]
    rotation = world_to_camera[..., :3] @ first[..., :3].mT
    return torch.cat([rotation, world_to_camera[..., 3:] - rotation @ first[..., 3:]], 3)


def first_camera_points(depth: Tensor, extrinsics: Tensor, focal: Tensor, step: int, first: int) -> Tensor:
    """`[B, S, h, w, 3]` points of every `step`-th pixel from pixel `first` on, in the frame of the first camera."""
    height, width = depth.shape[2:]
    rows = torch.arange(first, height, step, device=depth.device)
    columns = torch.arange(first, width, step, device=depth.device)
    picked = depth[:, :, rows][:, :, :, columns]  # [B, S, h, w]
    x = ((columns + 0.5) / width - 0.5)[None, None, None] / focal[:, :1, None, None]
    y = ((rows + 0.5) / height - 0.5)[None, None, :, None] / focal[:, 1:, None, None]
    points = torch.stack([x * picked, y * picked, picked], -1)  # [B, S, h, w, 3]
    rotation, translation = extrinsics[..., :3], extrinsics[..., 3]
    return torch.einsum("bshwi,bsij->bshwj", points - translation[:, :, None, None], rotation)


def make_targets(scenes: SceneBatch, depth: Tensor, patch: int) -> Targets:
    """Targets of scenes whose frames have z-depth `[B, S, H, W]`, for patches of `patch` pixels."""
    extrinsics = from_first_camera(scenes.world_to_camera())  # [B, S, 3, 4]
    rotation, translation = extrinsics[..., :3], extrinsics[..., 3:]
    distance = first_camera_points(depth, extrinsics, scenes.focal, 4, 2).norm(dim=-1).mean((1, 2, 3))  # [B]
    scale = 1 / distance.clamp(1e-2, 1e2)
    depth = depth * scale[:, None, None, None]
    extrinsics = torch.cat([rotation, translation * scale[:, None, None, None]], 3)
    view = (
        (2 * torch.atan(0.5 / scenes.focal)).flip(1)[:, None].expand(-1, rotation.shape[1], -1)
    )  # vertical first
    pose = torch.cat([extrinsics[..., 3], quaternions(rotation), view], 2)
    points = first_camera_points(depth, extrinsics, scenes.focal, patch, patch // 2).flatten(2, 3)
    return Targets(pose, extrinsics, scenes.focal, depth, points)


def camera_losses(predictions: list[Tensor], truth: Tensor) -> dict[str, Tensor]:
    """Mean absolute errors of pose encodings, over the iterations of the camera head weighted to the last."""
    count = len(predictions)
    weights = [GAMMA ** (count - 1 - i) for i in range(count)]
    errors = [w * (p.float() - truth).abs() for w, p in zip(weights, predictions, strict=True)]
    error = added(errors) / sum(weights)
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


def confidence_loss(error: Tensor, confidence: Tensor) -> Tensor:
    """Mean of error times confidence, less a reward for confidence; half plain error, so that none is given up."""
    return 0.5 * error.mean() + 0.5 * (confidence * error - CONFIDENCE * confidence.log()).mean()


def gradient_loss(error: Tensor) -> Tensor:
    """How signed errors `[..., H, W]` differ between neighbours, and between pixels 8 apart at half the weight."""
    total = 0.0
    for step, weight in ((1, 1.0), (8, 0.5)):
        down = (error[..., step:, ::step] - error[..., :-step, ::step]).abs().clamp(max=1).mean()
        across = (error[..., ::step, step:] - error[..., ::step, :-step]).abs().clamp(max=1).mean()
        total = total + weight * (down + across)
    return total


def depth_losses(depth: Tensor, confidence: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Losses of positive depth and its confidence, `[N, H, W]`: in the logarithm, so that near and far count alike."""
    error = depth.float().clamp(min=1e-4).log() - truth.log()
    return {"depth": confidence_loss(error.abs(), confidence.float()), "depth_gradient": gradient_loss(error)}


def point_loss(points: Tensor, confidence: Tensor, truth: Tensor, depth: Tensor) -> Tensor:
    """Loss of points `[N, H, W, 3]`: distance to the truth over its depth `[N, H, W]`, not below half the mean."""
    error = (points.float() - truth).norm(dim=-1) / depth.clamp(min=0.5)
    return confidence_loss(error, confidence.float())


def next_view_patches(targets: Targets) -> tuple[Tensor, Tensor]:
    """Where the next view shows each patch centre: patch number `[B, S, P]`, and whether it is visible there.

    The view after the last is the first.
    """
    extrinsics = targets.extrinsics.roll(-1, 1)
    depth = targets.depth.roll(-1, 1)
    height, width = depth.shape[2:]
    points = (
        torch.einsum("bsij,bspj->bspi", extrinsics[..., :3], targets.patch_points)
        + extrinsics[:, :, None, :, 3]
    )
    z = points[..., 2]
    ahead = z.clamp(min=1e-3)
    x = (points[..., 0] / ahead * targets.focal[:, None, :1] + 0.5) * width
    y = (points[..., 1] / ahead * targets.focal[:, None, 1:] + 0.5) * height
    column, row = x.floor().clamp(0, width - 1).long(), y.floor().clamp(0, height - 1).long()
    seen = depth.flatten(2).gather(2, row * width + column)
    inside = (x > 0) & (x < width) & (y > 0) & (y < height) & (z > 0.02)
    visible = inside & ((z / seen - 1).abs() < SAME_DEPTH)
    patches = targets.patch_points.shape[2]
    columns = round((patches * width / height) ** 0.5)
    rows = patches // columns
    return (row * rows // height) * columns + column * columns // width, visible


def correspondence_loss(descriptors: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Cross-entropy of finding each visible patch `[B, S, P, d]` in the next view, and the share found."""
    number, visible = next_view_patches(targets)
    there = descriptors.roll(-1, 1).flatten(0, 1)
    match = faster(matching_loss, descriptors.is_cuda)
    return match(descriptors.flatten(0, 1), there, number.flatten(), visible.flatten())


def matching_loss(here: Tensor, there: Tensor, number: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of finding patches `[F, P, d]` in other frames `[F, P, d]`, and the share found.

    Args:
        here: descriptors.
        there: descriptors of the frames in which to find them.
        number: `[F * P]` number of the right patch there.
        visible: `[F * P]` whether it is to be seen there; only then it counts.
    """
    here, there = F.normalize(here.float(), dim=-1), F.normalize(there.float(), dim=-1)
    likeness = (here @ there.mT).flatten(0, 1) * TEMPERATURE  # [F * P, P]
    share = visible.float() / visible.sum().clamp(min=1)
    loss = (F.cross_entropy(likeness, number, reduction="none") * share).sum()
    found = ((likeness.argmax(1) == number).float() * share).sum()
    return loss, found.detach()


class AuxiliaryHeads(nn.Module):
    """Linear read-outs that are thrown away after training.

    Every patch token of the later cached layers tells the point that its centre shows, and the image embedding gives
    descriptors that find the same place in another view: both teach tokens of all frames at next to no cost.
    """

    def __init__(self, width: int, layers: list[int]):
        super().__init__()
        self.points = nn.ModuleDict(
            {str(layer): nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, 3)) for layer in layers}
        )
        self.descriptor = nn.Linear(width, CORRESPONDENCE_WIDTH)

    def point_loss(self, layers: dict[int, Tensor], special: int, truth: Tensor) -> Tensor:
        """Mean absolute error of the points `[B, S, P, 3]`, over the layers."""
        speed = faster(read_out_error, truth.is_cuda)
        errors = []
        for number, head in self.points.items():
            # Copies, since compiled code is particular about where its inputs begin in memory.
            parameters = [parameter.clone() for parameter in head.parameters()]
            tokens = layers[int(number)].flatten(0, 1)  # [F, special + P, 2C]
            errors.append(speed(tokens, special, truth.flatten(0, 1), parameters))
        return torch.stack(errors).mean()


def read_out_error(tokens: Tensor, special: int, truth: Tensor, parameters: list[Tensor]) -> Tensor:
    """Mean absolute error of `[F, P, 3]` read from tokens `[F, special + P, C]` by a norm and a linear map."""
    norm_weight, norm_bias, weight, bias = parameters
    normed = F.layer_norm(tokens[:, special:], tokens.shape[2:], norm_weight, norm_bias)
    return (F.linear(normed, weight, bias).float() - truth).abs().mean()
