"""The forward pass of a stock VGGT for training: the same arithmetic, arranged for speed.

A block is cut where attention mixes tokens: what comes before and after it works token by token on `[F, L, C]`, the
same shape for the image embedding, for frame and for global blocks and for any number of views. So four small functions
are compiled in all, with the parameters as arguments, and attention itself is the only part that differs.

Dense heads are those of `dpt`, which enlarge by two matrix products here: the stock operation took a third of the time
of a head, most of it in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clips.raycast import faster

ROPE_POSITIONS = 64  # more than any grid of patches that is trained on


class Features(NamedTuple):
    """What the heads and the auxiliary losses read.

    Attributes:
        patches: `[F, P, C]` output of the image embedding.
        layers: `[B, S, 5 + P, 2C]` cached outputs of alternating attention, by layer.
    """

    patches: Tensor
    layers: dict[int, Tensor]


def before_attention(
    x: Tensor, cos: Tensor, sin: Tensor, parameters: list[Tensor], heads: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[F, L, heads, C / heads]` of tokens `[F, L, C]`.

    Args:
        x: tokens, float32.
        cos: `[L, C / heads]` cosines of the rotary embedding; unused without query and key norms.
        sin: `[L, C / heads]` its sines.
        parameters: weights and biases of the norm, of the joint projection and, if any, of query and key norms.
        heads: number of heads.
        eps: of the norm before attention.
        dtype: what matrix products are computed in.
    """
    norm_weight, norm_bias, weight, bias, *head_norms = parameters
    width = x.shape[-1] // heads
    normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps).to(dtype)
    joint = F.linear(normed, weight.to(dtype), bias.to(dtype)).unflatten(-1, (3, heads, width))
    query, key, value = joint.unbind(2)
    if head_norms:
        query = rotated(query, cos, sin, head_norms[0], head_norms[1])
        key = rotated(key, cos, sin, head_norms[2], head_norms[3])
    return query, key, value


def rotated(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Queries or keys `[F, L, heads, d]`, normalised and turned by the two-dimensional rotary embedding."""
    normed = F.layer_norm(x.float(), x.shape[-1:], weight, bias, 1e-5)
    # Each half of the channels, for y and for x, turns its own two halves against each other.
    first, second = normed.unflatten(-1, (2, 2, -1)).unbind(-2)
    turned = torch.stack((-second, first), -2).flatten(-3)
    return (normed * cos[:, None] + turned * sin[:, None]).to(x.dtype)


def after_attention(
    x: Tensor, attended: Tensor, parameters: list[Tensor], eps: float, dtype: torch.dtype
) -> Tensor:
    """Tokens `[F, L, C]` after a block, given what its attention returned, in the same shape.

    `parameters` are the weights and biases of the projection, the second norm and both layers of the network, then, if
    the block has them, the two layer scales.
    """
    weight, bias, norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, *scales = parameters
    change = F.linear(attended, weight.to(dtype), bias.to(dtype)).float()
    x = x + (change * scales[0] if scales else change)
    normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps).to(dtype)
    hidden = F.gelu(F.linear(normed, weight_in.to(dtype), bias_in.to(dtype)))
    change = F.linear(hidden, weight_out.to(dtype), bias_out.to(dtype)).float()
    return x + (change * scales[1] if scales else change)


def block(
    module: Any,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    sequences: int,
    dtype: torch.dtype,
    speed: Callable[..., Any],
) -> Tensor:
    """A stock block on tokens `[F, L, C]`, attention running within each of `sequences` groups of frames."""
    attention, mlp = module.attn, module.mlp
    heads, eps = attention.num_heads, module.norm1.eps
    before = [module.norm1.weight, module.norm1.bias, attention.qkv.weight, attention.qkv.bias]
    if attention.rope is not None:
        norms = (attention.q_norm, attention.k_norm)
        before += [p for norm in norms for p in (norm.weight, norm.bias)]
    after = [attention.proj.weight, attention.proj.bias, module.norm2.weight, module.norm2.bias]
    after += [mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias]
    if not isinstance(module.ls1, nn.Identity):
        after += [module.ls1.gamma, module.ls2.gamma]
    parts = speed(before_attention)(x, cos, sin, before, heads, eps, dtype)
    query, key, value = (part.reshape(sequences, -1, heads, part.shape[-1]).transpose(1, 2) for part in parts)
    attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
    return speed(after_attention)(x, attended, after, eps, dtype)


def rotary_table(
    rope: Any, special: int, rows: int, columns: int, width: int, device: torch.device
) -> list[Tensor]:
    """Cosines and sines `[special + rows * columns, width]` of the positions that VGGT gives to the tokens."""
    cos, sin = rope._compute_frequency_components(width // 2, ROPE_POSITIONS, device, torch.float32)
    grid = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device)) + 1
    positions = torch.cat([torch.zeros(special, 2, device=device, dtype=grid.dtype), grid])
    return [torch.cat([table[positions[:, 0]], table[positions[:, 1]]], 1) for table in (cos, sin)]


class FastForward:
    """Aggregator of a stock VGGT, as a function of images."""

    def __init__(self, model: Any, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        self.tables: dict[tuple[int, int], list[Tensor]] = {}

    def __call__(self, images: Tensor) -> Features:
        """Features of images `[B, S, 3, H, W]` in [0, 1]."""
        aggregator = self.model.aggregator
        embed = aggregator.patch_embed
        clips, views, _, height, width = images.shape
        speed = lambda function: faster(function, images.is_cuda)  # noqa: E731
        grid = height // aggregator.patch_size, width // aggregator.patch_size
        if grid not in self.tables:
            head = aggregator.frame_blocks[0].attn.head_dim
            special = aggregator.patch_start_idx
            self.tables[grid] = rotary_table(aggregator.rope, special, *grid, head, images.device)
        cos, sin = self.tables[grid]

        normed = ((images - aggregator._resnet_mean) / aggregator._resnet_std).flatten(0, 1)
        x = embed.prepare_tokens_with_masks(normed).float().contiguous()  # [F, 5 + P, C]
        for module in embed.blocks:
            x = block(module, x, cos, sin, clips * views, self.dtype, speed)
        patches = embed.norm(x)[:, 1 + embed.num_register_tokens :]
        special = torch.cat([aggregator.camera_token, aggregator.register_token], 2)[0]  # [2, 5, C]
        first = torch.arange(clips * views, device=images.device) % views == 0
        special = torch.where(first[:, None, None], special[0], special[1])
        x = torch.cat([special, patches.float()], 1).contiguous()
        layers = {}
        for layer, (frame, across) in enumerate(
            zip(aggregator.frame_blocks, aggregator.global_blocks, strict=True)
        ):
            within = block(frame, x, cos, sin, clips * views, self.dtype, speed)
            x = block(across, within, cos, sin, clips, self.dtype, speed)
            if layer in aggregator.cached_layer_indices:
                layers[layer] = torch.cat([within, x], 2).unflatten(0, (clips, views))
        return Features(patches, layers)


def layer_list(features: Features, depth: int) -> list[Tensor | None]:
    """The cached layers as the stock heads take them: one entry a layer, None where it is not cached."""
    return [features.layers.get(layer) for layer in range(depth)]
