"""Rotations, cameras and points: conversions between the forms that they come in."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Similarity(NamedTuple):
    """`y = scale * rotation @ x + translation`."""

    scale: Tensor  # []
    rotation: Tensor  # [3, 3]
    translation: Tensor  # [3]


def decode_pose_encoding(pose_encoding: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Cameras of VGGT's pose encoding "absT_quaR_FoV".

    Args:
        pose_encoding: `[..., 9]`: translation (3), quaternion x, y, z, w (4, of any length but 0), vertical
            and horizontal field of view in radians.
        height: Height of the images, in pixels.
        width: Width of the images, in pixels.

    Returns:
        World-to-camera `[..., 3, 4]` (OpenCV axes) and intrinsics `[..., 3, 3]` in pixels, with the principal
        point in the middle of the image, both of the dtype of the encoding.
    """
    translation, quaternion, field_of_view = pose_encoding.split([3, 4, 2], dim=-1)
    world_to_camera = torch.cat([rotation_matrix(quaternion), translation[..., None]], dim=-1)
    half_size = torch.tensor([height / 2, width / 2]).to(pose_encoding)
    focal_y, focal_x = (half_size / torch.tan(field_of_view / 2)).unbind(-1)
    intrinsics = torch.zeros(*pose_encoding.shape[:-1], 3, 3).to(pose_encoding)
    intrinsics[..., 0, 0], intrinsics[..., 1, 1] = focal_x, focal_y
    intrinsics[..., 0, 2], intrinsics[..., 1, 2] = width / 2, height / 2
    intrinsics[..., 2, 2] = 1
    return world_to_camera, intrinsics


def encode_cameras(world_to_camera: Tensor, intrinsics: Tensor, height: int, width: int) -> Tensor:
    """`[..., 9]`, what `decode_pose_encoding` decodes, of cameras whose principal point is in the middle.

    Args:
        world_to_camera: `[..., 3, 4]`.
        intrinsics: `[..., 3, 3]`, in pixels.
        height, width: Of the images, in pixels.
    """
    sizes = torch.tensor([height / 2, width / 2]).to(intrinsics)
    focal = torch.stack([intrinsics[..., 1, 1], intrinsics[..., 0, 0]], -1)
    rotation = quaternions(world_to_camera[..., :3])
    return torch.cat([world_to_camera[..., 3], rotation, 2 * torch.atan2(sizes, focal)], -1)


def rotation_matrix(quaternion: Tensor) -> Tensor:
    """`[..., 3, 3]` rotations of quaternions `[..., 4]`, scalar last."""
    quaternion = F.normalize(quaternion, dim=-1)
    vector, scalar = quaternion[..., :3], quaternion[..., 3, None, None]
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    # Rodrigues' formula in half angles: R = I + 2 w [v]x + 2 [v]x^2.
    one = torch.eye(3, dtype=quaternion.dtype, device=quaternion.device)
    return one + 2 * scalar * cross + 2 * cross @ cross


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


def camera_centres(world_to_camera: Tensor) -> Tensor:
    """`[..., 3]` camera centres `-R^T t` of world-to-camera `[..., 3, 4]`."""
    rotation, translation = world_to_camera[..., :3], world_to_camera[..., 3:]
    return -(rotation.transpose(-1, -2) @ translation)[..., 0]


def from_first_camera(world_to_camera: Tensor) -> Tensor:
    """Extrinsics `[B, S, 3, 4]` of each clip's first camera to camera, of those of world to camera."""
    first = world_to_camera[:, :1]
    rotation = world_to_camera[..., :3] @ first[..., :3].mT
    return torch.cat([rotation, world_to_camera[..., 3:] - rotation @ first[..., 3:]], 3)


def camera_to_world(world_to_camera: Tensor) -> Tensor:
    """`[S, 4, 4]` float64 camera-to-world of world-to-camera `[S, 3, 4]`."""
    poses = world_to_camera.cpu().double()
    inverse = torch.eye(4, dtype=torch.float64).repeat(len(poses), 1, 1)
    inverse[:, :3, :3] = poses[:, :, :3].transpose(1, 2)
    inverse[:, :3, 3] = camera_centres(poses)
    return inverse


def unproject(depth: Tensor, intrinsics: Tensor, world_to_camera: Tensor) -> Tensor:
    """`[S, H, W, 3]` world points of the pixel centres, which lie at (j + 0.5, i + 0.5) (see `Clip`).

    Args:
        depth: `[S, H, W]` z-depth.
        intrinsics: `[S, 3, 3]`, pixels, without skew.
        world_to_camera: `[S, 3, 4]`.
    """
    _, height, width = depth.shape
    columns, rows = (torch.arange(n, device=depth.device, dtype=depth.dtype) + 0.5 for n in (width, height))
    columns, rows = columns[None, None, :], rows[None, :, None]
    focal_x, focal_y = intrinsics[:, 0, 0, None, None], intrinsics[:, 1, 1, None, None]
    centre_x, centre_y = intrinsics[:, 0, 2, None, None], intrinsics[:, 1, 2, None, None]
    x = (columns - centre_x) / focal_x * depth  # [S, H, W]
    y = (rows - centre_y) / focal_y * depth
    camera = torch.stack([x, y, depth], dim=-1)  # [S, H, W, 3]
    # Row vectors: (x - t) R is R^T (x - t).
    return (camera - world_to_camera[:, None, None, :, 3]) @ world_to_camera[:, None, :, :3]


def masked_points(depth: Tensor, intrinsics: Tensor, world_to_camera: Tensor, mask: Tensor) -> Tensor:
    """`[N, 3]` world points of the pixels in a mask `[S, H, W]`, frame after frame, as `unproject` gives them.

    One frame is unprojected at a time: a thousand would take a hundred bytes for each of their pixels.
    """
    one_each = (value.split(1) for value in (depth, intrinsics, world_to_camera, mask))
    return torch.cat([unproject(d, k, pose)[chosen] for d, k, pose, chosen in zip(*one_each, strict=True)])


def thinned(mask: Tensor, most: int) -> Tensor:
    """A mask of evenly spaced ones among those of a mask of any shape, at most so many; on its device."""
    chosen = mask.flatten().nonzero()[:, 0]
    kept = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
    kept[chosen[:: max(1, -(-len(chosen) // most))]] = True
    return kept.view(mask.shape)


def similarity_alignment(source: Tensor, target: Tensor) -> Similarity:
    """The similarity that takes `source` to `target`, both `[N, 3]`, with the least squared error.

    Umeyama, "Least-squares estimation of transformation parameters between two point patterns", PAMI 1991. A
    `source` all in one place gets scale 0.
    """
    source_mean, target_mean = source.mean(dim=0), target.mean(dim=0)
    source, target = source - source_mean, target - target_mean
    u, singular, vh = torch.linalg.svd(target.T @ source / len(source))
    signs = torch.ones_like(singular)
    signs[2] = torch.sign(torch.linalg.det(u) * torch.linalg.det(vh))  # no reflections
    rotation = (u * signs) @ vh
    variance = source.square().sum(dim=1).mean()
    scale = (singular * signs).sum() / variance if variance > 0 else torch.zeros_like(variance)
    return Similarity(scale, rotation, target_mean - scale * rotation @ source_mean)
