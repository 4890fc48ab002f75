"""VGGT and its forks: an aggregator with frame and global blocks in turn, recognised by its parts."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PaceError, UnsupportedModelError
from ..runtime.attention import autocast_dtype
from .base import BlockCall, Host, far_from_unit, register_host, value_range
from .rope import ROPE_TABLE, static_rope

# What the forward of the global blocks needs to be ours.
PARTS = ("patch_embed", "frame_blocks", "global_blocks", "patch_start_idx", "patch_size")
# What a forward of our own in place of the aggregator's needs beside.
STOCK_PARTS = ("camera_token", "register_token", "_resnet_mean", "_resnet_std")


class VGGT(Host):
    """A VGGT (arXiv 2503.11651), as `facebookresearch/vggt` has it, or a fork with the same parts."""

    family = "vggt"
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
        self.dense_heads = {
            name: module
            for name, module in model.named_modules()
            if isinstance(getattr(module, "intermediate_layer_idx", None), (list, tuple))
            and name != "aggregator"
            and not name.startswith("aggregator.")
        }
        layers = getattr(aggregator, "cached_layer_indices", None)
        # Older aggregators return every layer, and callers may read any.
        self.cached_layers = tuple(range(self.depth)) if layers is None else tuple(sorted(layers))

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

    @property
    def reference(self) -> Tensor:
        token = getattr(self.trunk, "camera_token", None)
        return token if isinstance(token, Tensor) else next(self.of_kind("global")[0].parameters())

    def features(self, output: Any) -> Tensor | None:
        return super().features(output.get("x_norm_patchtokens") if isinstance(output, dict) else output)

    def block_call(self, args: tuple, kwargs: dict[str, Any]) -> BlockCall | None:
        kwargs = dict(kwargs)
        x, rest = (args[0], args[1:]) if args else (kwargs.pop("x", None), ())
        if not isinstance(x, Tensor) or x.ndim != 3:
            return None
        if isinstance(kwargs.get("pos"), Tensor):
            return BlockCall(x, kwargs.pop("pos"), rest, kwargs, "pos")
        if rest and isinstance(rest[0], Tensor) and rest[0].shape == (*x.shape[:2], 2):
            return BlockCall(x, rest[0], rest[1:], kwargs, 0)
        return BlockCall(x, None, rest, kwargs, None)

    def fingerprint_tensors(self) -> list[Tensor]:
        tokens = [getattr(self.trunk, name, None) for name in ("camera_token", "register_token")]
        blocks = [self.of_kind("frame")[0], self.of_kind("global")[-1]]
        return [t for t in tokens if isinstance(t, Tensor)] + [p for b in blocks for p in b.parameters()]

    def check_images(self, images: Any) -> None:
        patch = self.patch_size
        if not isinstance(images, Tensor):
            raise PaceError(f"images must be a tensor [B, S, 3, H, W] in [0, 1], got {type(images).__name__}")
        shape = tuple(images.shape)
        if len(shape) != 5 or shape[2] != 3 or 0 in shape:
            raise PaceError(f"images must be [B, S, 3, H, W] with at least one frame, got {list(shape)}")
        height, width = shape[-2:]
        if height % patch or width % patch:
            raise PaceError(
                f"image height and width must be multiples of {patch}, got {height}x{width}: resize or crop the images"
            )
        if max(height, width) // patch >= ROPE_TABLE:
            raise PaceError(
                f"images are {height}x{width}: sides of {ROPE_TABLE * patch} pixels or more are not supported"
            )
        if not images.is_floating_point():
            raise PaceError(
                f"images must be floating point in [0, 1], got {images.dtype}: divide 8-bit images by 255"
            )
        device, weights = self.reference.device, self.reference.dtype
        if images.device != device:
            raise PaceError(
                f'images are on {images.device} but the model is on {device}: call images.to("{device}") '
                "(torch.nn.DataParallel can't run an accelerated model: use one process per GPU)"
            )
        # The aggregator subtracts its mean first, which promotes narrower images.
        mean = getattr(self.trunk, "_resnet_mean", images)
        entering = torch.promote_types(images.dtype, mean.dtype)
        if entering != weights and autocast_dtype(images.device.type) is None:
            raise PaceError(
                f"images are {images.dtype} but the model is {weights}: "
                f"call images.to({weights}), or run under torch.autocast"
            )
        # On CUDA a look at the values would make the host wait. It would cut a compiled graph in two.
        looks = images.device.type == "cpu" and not torch.compiler.is_compiling()
        if not looks:
            return
        low, high = value_range(images)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise PaceError("images hold NaN or infinity: check how they were loaded")
        if far_from_unit(low, high):
            warnings.warn(
                f"images reach from {low:.3g} to {high:.3g}, and the model expects [0, 1]: divide 8-bit values by 255, "
                "and leave normalisation to the model",
                UserWarning,
                stacklevel=3,
            )

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
