"""The `Clip`: frames of one static scene, with cameras and depth where they are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..errors import ClipError


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of one static scene, in the layout a VGGT takes, and their ground truth where it is known.

    Conventions:

    - Cameras are pinhole cameras with OpenCV axes: x right, y down, z forward. `world_to_camera` holds
      `[R | t]` with `x_camera = R x_world + t`; the camera centre is `-R^T t`. The world frame and its unit
      are the source's own.
    - Image coordinates are continuous: the image spans `[0, W] x [0, H]`, and the pixel in row i and column j
      has its **centre at (j + 0.5, i + 0.5)**. A camera that looks through the middle of its image has its
      principal point at `(W / 2, H / 2)`, as in VGGT's pose encoding. Resizing an image by s scales all of
      `fx, fy, cx, cy` by s. Sources that put pixel centres on whole numbers are shifted by half a pixel on loading.
    - `depth` is the z coordinate in the camera frame (not the length of the ray), in the unit of the poses.

    Args:
        name: What to call the clip in reports.
        images: `[S, 3, H, W]` float32, RGB in [0, 1].
        intrinsics: `[S, 3, 3]` floating, pixels of `images`, or None.
        world_to_camera: `[S, 3, 4]` floating, or None.
        depth: `[S, H, W]` floating, or None.
        valid: `[S, H, W]` bool, where `depth` can be trusted. Left out, it is every pixel whose depth is
            finite and positive; None where there is no depth.

    Raises:
        ClipError: A field has the wrong shape or dtype, lies on another device than `images`, or `valid`
            marks a pixel whose depth is not finite and positive.
    """

    name: str
    images: Tensor
    intrinsics: Tensor | None = None
    world_to_camera: Tensor | None = None
    depth: Tensor | None = None
    valid: Tensor | None = None

    def __post_init__(self) -> None:
        for field, value in vars(self).items():
            if field != "name" and not isinstance(value, Tensor) and (field == "images" or value is not None):
                raise ClipError(f"clip {self.name!r}: {field} must be a tensor, got {type(value).__name__}")
        if self.images.ndim != 4 or self.images.shape[1] != 3 or 0 in self.images.shape:
            raise ClipError(f"clip {self.name!r}: images must be [S, 3, H, W], got {list(self.images.shape)}")
        if self.images.dtype != torch.float32:
            raise ClipError(f"clip {self.name!r}: images must be float32, got {self.images.dtype}")
        frames, _, height, width = self.images.shape
        self._check("intrinsics", [frames, 3, 3])
        self._check("world_to_camera", [frames, 3, 4])
        self._check("depth", [frames, height, width])
        self._check("valid", [frames, height, width])
        if self.depth is None:
            if self.valid is not None:
                raise ClipError(f"clip {self.name!r}: valid is given without depth")
            return
        measured = self.depth.isfinite() & (self.depth > 0)
        if self.valid is None:
            object.__setattr__(self, "valid", measured)
        elif bool((self.valid & ~measured).any()):
            raise ClipError(f"clip {self.name!r}: valid marks pixels whose depth is not finite and positive")

    def _check(self, field: str, shape: list[int]) -> None:
        value = getattr(self, field)
        if value is None:
            return
        if list(value.shape) != shape:
            raise ClipError(f"clip {self.name!r}: {field} must be {shape}, got {list(value.shape)}")
        if field == "valid" and value.dtype != torch.bool:
            raise ClipError(f"clip {self.name!r}: valid must be bool, got {value.dtype}")
        if field != "valid" and not value.is_floating_point():
            raise ClipError(f"clip {self.name!r}: {field} must be floating point, got {value.dtype}")
        if value.device != self.images.device:
            raise ClipError(
                f"clip {self.name!r}: {field} is on {value.device}, images on {self.images.device}"
            )

    def __len__(self) -> int:
        """Number of frames S."""
        return self.images.shape[0]

    @property
    def height(self) -> int:
        """Height of the frames, in pixels."""
        return self.images.shape[2]

    @property
    def width(self) -> int:
        """Width of the frames, in pixels."""
        return self.images.shape[3]

    def select(self, indices: Sequence[int]) -> Clip:
        """The clip of the given frames, in the given order.

        Args:
            indices: Frame numbers; negative ones count from the end, as in a list.

        Raises:
            ClipError: `indices` is empty, holds something else than whole numbers, or names a frame that the clip
                does not have.
        """
        try:
            order = torch.tensor(list(indices))
        except (TypeError, ValueError, RuntimeError, OverflowError):
            order = torch.tensor(0.5)
        if order.numel() == 0:
            raise ClipError(f"clip {self.name!r}: no frames selected")
        if order.ndim != 1 or order.dtype == torch.bool or order.is_floating_point() or order.is_complex():
            raise ClipError(f"clip {self.name!r}: indices must be a list of whole numbers")
        order = order.long()
        outside = order[(order < -len(self)) | (order >= len(self))].tolist()
        if outside:
            raise ClipError(f"clip {self.name!r} has {len(self)} frames, there is no frame {outside[0]}")
        order = order.remainder(len(self)).to(self.images.device)
        return replace(self, **{field: value[order] for field, value in self._tensors().items()})

    def to(self, device: torch.device | str) -> Clip:
        """The clip with every tensor on `device`."""
        return replace(self, **{field: value.to(device) for field, value in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {field: value for field, value in values.items() if isinstance(value, Tensor)}
