"""Training losses of VGGT-mini: cameras, depth, points, and two cheap auxiliary ones on the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...evaluation.geometry import from_first_camera, quaternions
from ...training.losses import PAIR_WEIGHTS, POSE_WEIGHTS
from ..compiling import faster
from ..scenes.training_scenes import SceneBatch

CONFIDENCE = 0.2  # reward for confidence
TEMPERATURE = 15.0  # of patch correspondence: factor on cosines
SAME_DEPTH = 0.04  # relative difference of depth up to which a patch centre is taken to be visible
CORRESPONDENCE_WIDTH = 64
WEIGHTS = {
    **POSE_WEIGHTS,
    **PAIR_WEIGHTS,
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
    view = (2 * torch.atan(0.5 / scenes.focal)).flip(1)[:, None]  # [B, 1, 2] vertical first
    pose = torch.cat([extrinsics[..., 3], quaternions(rotation), view.expand(-1, rotation.shape[1], -1)], 2)
    points = first_camera_points(depth, extrinsics, scenes.focal, patch, patch // 2).flatten(2, 3)
    return Targets(pose, extrinsics, scenes.focal, depth, points)


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
