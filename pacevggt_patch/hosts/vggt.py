"""VGGT and its forks: an aggregator with frame and global blocks in turn, recognised by its parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .base import Host, register_host
from .rope import static_rope

# What the forward of the global blocks needs to be ours.
PARTS = ("patch_embed", "frame_blocks", "global_blocks", "patch_start_idx", "patch_size")
# What a forward of our own in place of the aggregator's needs beside.
STOCK_PARTS = ("camera_token", "register_token", "_resnet_mean", "_resnet_std")


class VGGT(Host):
    """A VGGT (arXiv 2503.11651), as `facebookresearch/vggt` has it, or a fork with the same parts."""

    family, narrow_weights = "vggt", True
    trunk_name, embedding_name = "aggregator", "patch_embed"

    def __init__(self, model: nn.Module):
        aggregator: Any = model._modules["aggregator"]
        self.model, self.trunk, self.embedding = model, aggregator, aggregator.patch_embed
        self.depth = len(aggregator.global_blocks)
        self.special_tokens, self.patch_size = int(aggregator.patch_start_idx), int(aggregator.patch_size)
        self.embed_dim = self._embed_dim(aggregator)
        self.blocks = self._in_order(aggregator)
        rope = getattr(aggregator, "rope", None)
        self.rope = None if rope is None or static_rope(rope) is None else rope
        self.camera_head = model._modules.get("camera_head")
        self.dense_heads = self._dense_heads(model)
        layers = getattr(aggregator, "cached_layer_indices", None)
        # Older aggregators return every layer, and callers may read any.
        self.cached_layers = tuple(range(self.depth)) if layers is None else tuple(sorted(layers))

    @staticmethod
    def _dense_heads(model: nn.Module) -> dict[str, Any]:
        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(getattr(module, "intermediate_layer_idx", None), (list, tuple))
            and name != "aggregator"
            and not name.startswith("aggregator.")
        }

    @staticmethod
    def _embed_dim(aggregator: Any) -> int:
        token = getattr(aggregator, "camera_token", None)
        if isinstance(token, Tensor):
            return token.shape[-1]
        return next(p.shape[-1] for p in aggregator.global_blocks[0].parameters())

    @staticmethod
    def _in_order(aggregator: Any) -> tuple[tuple[str, int, Any], ...]:
        group = int(getattr(aggregator, "aa_block_size", 1))
        kinds = getattr(aggregator, "aa_order", ("frame", "global"))
        modules = {"frame": aggregator.frame_blocks, "global": aggregator.global_blocks}
        starts = range(0, len(aggregator.global_blocks), group)
        return tuple(
            (kind, i, modules[kind][i])
            for first in starts
            for kind in kinds
            for i in range(first, first + group)
        )

    def special_parameters(self) -> list[Tensor]:
        tokens = (getattr(self.trunk, name, None) for name in ("camera_token", "register_token"))
        return [token for token in tokens if isinstance(token, Tensor)]

    def mean_dtype(self, images: Tensor) -> torch.dtype:
        return getattr(self.trunk, "_resnet_mean", images).dtype

    def features(self, output: Any) -> Tensor | None:
        return super().features(output.get("x_norm_patchtokens") if isinstance(output, dict) else output)

    def run_narrow(self, images: Tensor) -> dict[str, Any]:
        # VGGT's own forward switches autocast off for the heads, whose position embedding is float32.
        model: Any = self.model
        tokens, start = model.aggregator(images)
        outputs: dict[str, Any] = {}
        with torch.autocast(images.device.type, torch.bfloat16):
            outputs["pose_enc"] = model.camera_head(tokens)[-1]
            dense = {"images": images, "patch_start_idx": start}
            outputs["depth"], outputs["depth_conf"] = model.depth_head(tokens, **dense)
            if getattr(model, "point_head", None) is not None:
                outputs["world_points"], _ = model.point_head(tokens, **dense)
        return outputs

    # For a forward of our own in place of the aggregator's.

    def missing_stock_parts(self) -> list[str]:
        """Parts without which the aggregator's forward can't be rewritten."""
        return [name for name in STOCK_PARTS if not hasattr(self.trunk, name)]

    def embed(self, images: Tensor) -> Tensor:
        """DINO patch tokens [B, S, P, C] of images [B, S, 3, H, W] in [0, 1]."""
        mean, std = (t.reshape(1, 3, 1, 1) for t in (self.trunk._resnet_mean, self.trunk._resnet_std))
        tokens = self.features(self.embedding((images.flatten(0, 1) - mean) / std))
        patches = images.shape[-2] * images.shape[-1] // self.patch_size**2
        if tokens is None or tokens.shape[1] != patches:
            raise UnsupportedModelError(
                "the patch embedding does not give one token for each patch: only such hosts are supported"
            )
        return tokens.unflatten(0, images.shape[:2])

    def special(self, batch: int, frames: int) -> Tensor:
        """Camera and register tokens [B, S, n, C]: index 0 of the parameters for the first frame, 1 for the rest."""
        tokens = torch.cat([self.trunk.camera_token, self.trunk.register_token], dim=2)  # [1, 2, n, C]
        first, others = tokens[:, :1], tokens[:, 1:].expand(-1, frames - 1, -1, -1)
        return torch.cat([first, others], dim=1).expand(batch, -1, -1, -1)

    def patch_positions(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        """RoPE positions [P, 2] of the patch tokens, (y + 1, x + 1); special tokens sit at 0. None without RoPE."""
        if getattr(self.trunk, "rope", None) is None:
            return None
        rows, columns = (torch.arange(n, device=device) for n in grid)
        return torch.cartesian_prod(rows, columns).view(-1, 2) + 1


@register_host("vggt")
def find_vggt(model: nn.Module) -> VGGT | str | None:
    """The Host of a VGGT, or why it is none."""
    kind = type(model).__name__
    aggregator: Any = model._modules.get("aggregator")
    if aggregator is None:
        if hasattr(model, "frame_blocks") and "_orig_mod" not in model._modules:
            return f"{kind} has no submodule 'aggregator', so it is not a VGGT: pass the VGGT that holds it"
        return None
    missing = [name for name in PARTS if not hasattr(aggregator, name)]
    if missing and hasattr(aggregator, "inter_frame_blocks"):
        return None  # a VGGT-Omega
    if missing:
        return f"{kind}.aggregator lacks {', '.join(missing)}: only VGGT's alternating attention is supported"
    order = getattr(aggregator, "aa_order", ["frame", "global"])
    if sorted(order) != ["frame", "global"]:
        return f"{kind}.aggregator.aa_order is {order}: expected one 'frame' and one 'global'"
    frame, across = len(aggregator.frame_blocks), len(aggregator.global_blocks)
    if frame != across or not frame:
        return f"{kind}.aggregator has {frame} frame and {across} global blocks: expected as many of each"
    host = VGGT(model)
    for name, head in host.dense_heads.items():
        too_deep = [i for i in head.intermediate_layer_idx if not -host.depth <= i < host.depth]
        if too_deep:
            return f"{kind}.{name} reads layers {too_deep}, but the aggregator has {host.depth}"
    return host
