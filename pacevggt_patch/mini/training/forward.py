"""The forward pass of a stock VGGT for training: the same arithmetic, arranged for speed.

Blocks are those of `blocks`, cut where attention mixes tokens: what comes before and after it works token by token on
`[F * L, C]`, the same shape for the image embedding, for frame and for global blocks and for any number of views. So
four small functions are compiled in all, and attention itself is the only part that differs.

Dense heads are those of `dpt`, which enlarge by two matrix products here: the stock operation took a third of the time
of a head, most of it in the backward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...hosts.base import find_host
from ...hosts.blocks import run_block
from ...hosts.rope import Rotation, rotation
from ...runtime.compiling import compiled


class Features(NamedTuple):
    """What the heads and the auxiliary losses read.

    Attributes:
        patches: `[F, P, C]` output of the image embedding.
        layers: `[B, S, 5 + P, 2C]` cached outputs of alternating attention, by layer.
    """

    patches: Tensor
    layers: dict[int, Tensor]


class FastForward:
    """Aggregator of a stock VGGT, as a function of images."""

    def __init__(self, model: Any, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        self.tables: dict[tuple[int, int], Rotation] = {}

    def __call__(self, images: Tensor) -> Features:
        """Features of images `[B, S, 3, H, W]` in [0, 1]."""
        aggregator = self.model.aggregator
        embed = aggregator.patch_embed
        clips, views, _, height, width = images.shape
        frames, speed = clips * views, compiled if images.is_cuda else None
        grid = height // aggregator.patch_size, width // aggregator.patch_size
        turned = self.rotation(grid, images.device)
        turned = turned[0].repeat(frames, 1), turned[1].repeat(frames, 1)

        normed = ((images - aggregator._resnet_mean) / aggregator._resnet_std).flatten(0, 1)
        x = embed.prepare_tokens_with_masks(normed).float().flatten(0, 1)  # [F * (5 + P), C]
        for module in embed.blocks:
            x = run_block(module, x, turned, frames, self.dtype, speed)
        patches = embed.norm(x.unflatten(0, (frames, -1)))[:, 1 + embed.num_register_tokens :]
        special = torch.cat([aggregator.camera_token, aggregator.register_token], 2)[0]  # [2, 5, C]
        first = torch.arange(frames, device=images.device) % views == 0
        special = torch.where(first[:, None, None], special[0], special[1])
        x = torch.cat([special, patches.float()], 1).flatten(0, 1)
        layers = {}
        for layer, (frame, across) in enumerate(
            zip(aggregator.frame_blocks, aggregator.global_blocks, strict=True)
        ):
            within = run_block(frame, x, turned, frames, self.dtype, speed)
            x = run_block(across, within, turned, clips, self.dtype, speed)
            if layer in aggregator.cached_layer_indices:
                layers[layer] = torch.cat([within, x], 1).unflatten(0, (clips, views, -1))
        return Features(patches, layers)

    def rotation(self, grid: tuple[int, int], device: torch.device) -> Rotation:
        """Cosines and sines `[5 + P, C / heads]` of all tokens of a frame of `grid` patches."""
        if grid not in self.tables:
            aggregator, host = self.model.aggregator, find_host(self.model)
            positions: Any = host.patch_positions(grid, device)  # [P, 2]: a stock VGGT has RoPE
            positions = F.pad(positions, (0, 0, aggregator.patch_start_idx, 0))  # special tokens sit at 0
            width = aggregator.frame_blocks[0].attn.head_dim
            cos, sin = rotation(aggregator.rope, width, torch.float32, positions[None])
            self.tables[grid] = cos[0, 0], sin[0, 0]
        return self.tables[grid]


def layer_list(features: Features, depth: int) -> list[Tensor | None]:
    """The cached layers as the stock heads take them: one entry a layer, None where it is not cached."""
    return [features.layers.get(layer) for layer in range(depth)]
