"""The forward pass of a stock VGGT for training: the same arithmetic, arranged for speed.

Blocks are those of `blocks`, cut where attention mixes tokens: what comes before and after it works token by token on
`[F, L, C]`, the same shape for the image embedding, for frame and for global blocks and for any number of views. So
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
from ..scenes.raycast import faster


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
        speed = lambda function, *_: faster(function, images.is_cuda)  # noqa: E731
        grid = height // aggregator.patch_size, width // aggregator.patch_size
        if grid not in self.tables:
            head = aggregator.frame_blocks[0].attn.head_dim
            special = aggregator.patch_start_idx
            host: Any = find_host(self.model)
            positions: Any = host.patch_positions(grid, images.device)  # [P, 2]: a stock VGGT has RoPE
            positions = F.pad(positions, (0, 0, special, 0))  # special tokens sit at 0
            tables = rotation(aggregator.rope, head, torch.float32, positions[None])
            self.tables[grid] = tables[0][0, 0], tables[1][0, 0]  # [5 + P, C / heads] each
        turned = self.tables[grid]

        normed = ((images - aggregator._resnet_mean) / aggregator._resnet_std).flatten(0, 1)
        x = embed.prepare_tokens_with_masks(normed).float().contiguous()  # [F, 5 + P, C]
        for module in embed.blocks:
            x = run_block(module, x, turned, clips * views, self.dtype, speed)
        patches = embed.norm(x)[:, 1 + embed.num_register_tokens :]
        special = torch.cat([aggregator.camera_token, aggregator.register_token], 2)[0]  # [2, 5, C]
        first = torch.arange(clips * views, device=images.device) % views == 0
        special = torch.where(first[:, None, None], special[0], special[1])
        x = torch.cat([special, patches.float()], 1).contiguous()
        layers = {}
        for layer, (frame, across) in enumerate(
            zip(aggregator.frame_blocks, aggregator.global_blocks, strict=True)
        ):
            within = run_block(frame, x, turned, clips * views, self.dtype, speed)
            x = run_block(across, within, turned, clips, self.dtype, speed)
            if layer in aggregator.cached_layer_indices:
                layers[layer] = torch.cat([within, x], 2).unflatten(0, (clips, views))
        return Features(patches, layers)


def layer_list(features: Features, depth: int) -> list[Tensor | None]:
    """The cached layers as the stock heads take them: one entry a layer, None where it is not cached."""
    return [features.layers.get(layer) for layer in range(depth)]
