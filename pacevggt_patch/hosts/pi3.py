"""Pi3 and Pi3X (arXiv 2507.13347): one list of blocks, of frames and of the clip in turn, recognised by its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .base import PACKAGES, Host, Package, register_host
from .rope import static_rope

SOURCE = "https://github.com/yyfz/Pi3"
PACKAGES["pi3"] = Package("pi3.models.pi3", "Pi3", 14, SOURCE, "yyfz233/Pi3")
PACKAGES["pi3x"] = Package(
    "pi3.models.pi3x", "Pi3X", 14, SOURCE, "yyfz233/Pi3X", prepare=lambda model: model.disable_multimodal()
)
# What makes a model look like one, and what else it needs.
CLUES = ("encoder", "decoder", "register_token")
PARTS = ("decode", "patch_start_idx", "patch_size")
# What turns the last layers into points, confidence and cameras: blocks within frames.
HEADS = ("point_decoder", "conf_decoder", "camera_decoder")


class Pi3(Host):
    """A Pi3, as `yyfz/Pi3` has it, or a model with the same parts. The model itself runs the blocks."""

    family = "pi3"
    image_argument, position_argument = "imgs", "xpos"
    trunk_name, embedding_name = "", "encoder"

    def __init__(self, model: Any):
        self.model, self.trunk, self.embedding = model, model, model.encoder
        self.special_tokens, self.patch_size = int(model.patch_start_idx), int(model.patch_size)
        self.embed_dim = model.register_token.shape[-1]
        self.depth = len(model.decoder) // 2
        kinds = ("frame", "global")
        self.blocks = tuple((kinds[i % 2], i // 2, block) for i, block in enumerate(model.decoder))
        rope = getattr(model, "rope", None)
        self.rope = None if rope is None or static_rope(rope) is None else rope

    def block_name(self, kind: str, index: int) -> str:
        return f"decoder.{2 * index + (kind == 'global')}"

    def side_blocks(self) -> dict[str, Any]:
        heads = ((name, getattr(self.model, name, None)) for name in HEADS)
        return super().side_blocks() | {
            f"{name}.blocks.{index}": block
            for name, head in heads
            for index, block in enumerate(getattr(head, "blocks", ()))
        }

    def special_parameters(self) -> list[Tensor]:
        token: Any = self.model.register_token
        return [token]

    def mean_dtype(self, images: Tensor) -> torch.dtype:
        return getattr(self.model, "image_mean", images).dtype

    def rope_dtype(self, dtype: torch.dtype, narrow: torch.dtype | None) -> torch.dtype:
        # Queries and keys are cast to the dtype of values before they are rotated.
        return dtype if narrow is None else narrow

    def predictions(self, outputs: Mapping[str, Any]) -> Mapping[str, Any]:
        points, poses = outputs["local_points"], outputs["camera_poses"]  # [1, S, H, W, 3], [1, S, 4, 4]
        turned = poses[..., :3, :3].mT
        return {
            "world_to_camera": torch.cat([turned, -turned @ poses[..., :3, 3:]], -1),
            "intrinsics": fitted_intrinsics(points),
            "depth": points[..., 2:],
            "depth_conf": outputs["conf"][..., 0],
        }


def fitted_intrinsics(points: Tensor) -> Tensor:
    """Intrinsics [..., 3, 3] in pixels that fit the points [..., H, W, 3] of pixels in their own camera best.

    The principal point is the middle of the image. Pi3 gives points and no cameras' intrinsics.
    """
    found = points.new_zeros(*points.shape[:-3], 3, 3)
    for axis, size in enumerate(points.shape[-2:-4:-1]):  # W, H
        pixels = torch.arange(size, device=points.device, dtype=points.dtype) + 0.5 - size / 2
        pixels = pixels[:, None] if axis else pixels
        rays = points[..., axis] / points[..., 2]
        focal = (pixels * rays).sum((-2, -1)) / rays.square().sum((-2, -1)).clamp(min=1e-12)
        found[..., axis, axis], found[..., axis, 2] = focal, size / 2
    found[..., 2, 2] = 1
    return found


@register_host("pi3")
def find_pi3(model: nn.Module) -> Pi3 | str | None:
    """The Host of a Pi3, or why it is none."""
    if not all(hasattr(model, name) for name in CLUES):
        return None
    kind = type(model).__name__
    missing = [name for name in PARTS if not hasattr(model, name)]
    if missing:
        return f"{kind} lacks {', '.join(missing)}: of models with encoder and decoder only Pi3 is supported"
    decoder: Any = model.decoder
    if not isinstance(decoder, nn.ModuleList) or not len(decoder) or len(decoder) % 2:
        return f"{kind}.decoder is not a list of blocks of frames and of the clip in turn, as in Pi3"
    return Pi3(model)
