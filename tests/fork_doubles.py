"""Doubles of public VGGT forks: small models that differ from the stock VGGT where a fork does.

All code here was written for these tests. A double holds what matters to the patch: how a fork calls its patch
embedding and its global blocks, with which arguments, and what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hosts import LAYERS, tiny_vggt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from vggt.layers.attention import Attention
from vggt.layers.block import Block
from vggt.layers.rope import RotaryPositionEmbedding2D
from vggt.models.aggregator import Aggregator, slice_expand_and_flatten
from vggt.models.vggt import VGGT

CHANNELS = 32


@dataclass(frozen=True)
class Double:
    """One kind of host.

    Attributes:
        name: of the kind.
        build: a small model in eval mode, with random weights that are the same at each call.
        call: runs a model on images [B, S, 3, H, W], S >= 3, as its users do, and returns all tensors it gave.
        target: what a user passes to `accelerate`, given the model.
        batches: whether it takes clips in batches.
        stock: whether its aggregator's forward is the stock one.
        like_stock: whether its aggregator gives what the stock forward gives.
        refused: what the refusal of `accelerate` names, a regular expression, or None where the host works.
    """

    name: str
    build: Callable[[], nn.Module]
    call: Callable[[Any, Tensor], list[Tensor]]
    target: Callable[[Any], Any] = lambda model: model
    batches: bool = True
    stock: bool = False
    like_stock: bool = False
    refused: str | None = None

    def aggregator(self, model: Any) -> Any:
        return self.target(model).aggregator


def tensors(*results: Any) -> list[Tensor]:
    """All tensors of nested results, in order. Restored tokens are looked at as the lists they stand for."""
    found: list[Tensor] = []
    for result in results:
        if isinstance(result, Tensor):
            found.append(result)
        elif isinstance(result, dict):
            found += tensors(*result.values())
        elif isinstance(result, Sequence) and not isinstance(result, str):
            found += tensors(*result)
    return found


class Trunk(Aggregator):
    """Alternating attention in steps, of which each double overrides some."""

    def embed(self, images: Tensor) -> Tensor:
        """Patch tokens [B * S, P, C] of images [B, S, 3, H, W]."""
        return self.patch_embed(self.normalized(images))["x_norm_patchtokens"]

    def normalized(self, images: Tensor) -> Tensor:
        """Images [B * S, 3, H, W] as the patch embedding takes them."""
        return ((images - self._resnet_mean) / self._resnet_std).flatten(0, 1)

    def grid(self, images: Tensor) -> tuple[int, int]:
        return images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size

    def special(self, batch: int, frames: int) -> Tensor:
        """Special tokens [B * S, n, C]."""
        own = (self.camera_token, self.register_token)
        return torch.cat([slice_expand_and_flatten(token, batch, frames) for token in own], dim=1)

    def positions(self, frames: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Positions [B * S, n + P, 2]."""
        patches = self.position_getter(frames, *grid, device=device) + 1
        return F.pad(patches, (0, 0, self.patch_start_idx, 0))

    def frame_step(self, layer: int, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens [B * S, n + P, C] after a frame block."""
        return self.frame_blocks[layer](tokens, pos=positions)

    def between(self, layer: int, tokens: Tensor, batch: int) -> Tensor:
        """Tokens [B * S, n + P, C] after what a fork does between two blocks."""
        return tokens

    def global_step(self, layer: int, tokens: Tensor, positions: Tensor, frames: int) -> Tensor:
        """Tokens [B, S * (n + P), C] after a global block."""
        return self.global_blocks[layer](tokens, pos=positions)

    def attend(self, patches: Tensor, batch: int, grid: tuple[int, int]) -> list[Tensor]:
        """Outputs [B, S, n + P, 2C] of all layers, of patch tokens [B * S, P, C]."""
        frames = len(patches) // batch
        tokens = torch.cat([self.special(batch, frames), patches], dim=1)
        positions = self.positions(len(tokens), grid, tokens.device)
        outputs = []
        for layer in range(self.depth):
            tokens = self.between(layer, self.frame_step(layer, tokens, positions), batch)
            seen = tokens.unflatten(0, (batch, frames))
            joined = seen.flatten(1, 2)
            joined = self.global_step(layer, joined, positions.view(batch, -1, 2), frames)
            tokens = joined.view(batch * frames, -1, joined.shape[-1])
            outputs.append(torch.cat([seen, tokens.view(seen.shape)], dim=-1))
        return outputs

    def forward(self, images: Tensor) -> Any:
        outputs = self.attend(self.embed(images), len(images), self.grid(images))
        return outputs, self.patch_start_idx


class Model(VGGT):
    """A VGGT whose heads can be run on their own."""

    def heads(self, outputs: list[Tensor], images: Tensor, start: int) -> dict[str, Any]:
        depth, depth_conf = self.depth_head(outputs, images=images, patch_start_idx=start)
        points, points_conf = self.point_head(outputs, images=images, patch_start_idx=start)
        return dict(
            pose_enc=self.camera_head(outputs)[-1],
            depth=depth,
            depth_conf=depth_conf,
            world_points=points,
            world_points_conf=points_conf,
        )

    def forward(self, images: Tensor) -> dict[str, Any]:
        outputs, start = self.aggregator(images)
        return self.heads(outputs, images, start)


def tiny(
    trunk: type[Aggregator], model: type[VGGT] = Model, block: type | None = None, **settings: Any
) -> Any:
    """A tiny VGGT of other classes; `block` is that of the global blocks."""
    host = tiny_vggt(**settings)
    host.__class__, host.aggregator.__class__ = model, trunk
    for module in host.aggregator.global_blocks if block else ():
        module.__class__ = block
    return host


def randomized(module: nn.Module, seed: int = 1) -> nn.Module:
    """Random weights that do not depend on what was built before."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@torch.no_grad()
def call_images(model: Any, images: Tensor) -> list[Tensor]:
    """The plain call, on images alone."""
    return tensors(model(images))


# The stock model, called as its users do


@torch.no_grad()
def call_parts(model: Any, images: Tensor) -> list[Tensor]:
    """Aggregator and heads one by one."""
    outputs, start = model.aggregator(images)
    depth = model.depth_head(outputs, images=images, patch_start_idx=start)
    return tensors(outputs, model.camera_head(outputs), depth)


@torch.no_grad()
def call_tracks(model: Any, images: Tensor) -> list[Tensor]:
    queries = torch.tensor([[10.0, 20.0], [30.0, 40.0]]).expand(len(images), -1, -1)
    return tensors(model(images, query_points=queries))


# VGGT_SPARK, as VGGT-SLAM calls it: one more argument, four return values


class SlamTrunk(Trunk):
    def forward(self, images: Tensor, compute_similarity: bool = False):
        outputs, start = super().forward(images)
        ratio, target = None, None
        if compute_similarity:
            first, second = outputs[2][:, :2, start:].unbind(1)
            target = second.mean(1)
            similar = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).mT
            ratio = similar.amax(-1).sigmoid().mean()
        return outputs, start, target, ratio


class SlamModel(Model):
    def forward(self, images: Tensor, compute_similarity: bool = False):
        images = images if images.ndim == 5 else images[None]
        outputs, start, target, ratio = self.aggregator(images, compute_similarity)
        found = self.heads(outputs, images, start)
        return found | dict(target=target, image_match_ratio=ratio)


@torch.no_grad()
def call_slam(model: Any, images: Tensor) -> list[Tensor]:
    """A submap, then a pair of frames without the batch dimension that closes a loop."""
    pair = images[0, [0, 2]]
    return tensors(model(images), model(pair, compute_similarity=True), model.aggregator(images))


# OmniVGGT: six more arguments, priors added to tokens


class OmniTrunk(Trunk):
    def forward(
        self,
        images: Tensor,
        extrinsics: Tensor | None = None,
        intrinsics: Tensor | None = None,
        depth: Tensor | None = None,
        mask: Tensor | None = None,
        depth_index: Iterable[int] = (),
        camera_index: Iterable[int] = (),
    ):
        batch, frames = images.shape[:2]
        patches = self.embed(images).unflatten(0, (batch, frames))
        prior = self.no_depth.expand_as(patches).clone()
        for frame in depth_index:
            both = torch.stack([depth[:, frame] * mask[:, frame], mask[:, frame]], dim=1)
            prior[:, frame] = self.depth_prior(both).flatten(2).mT
        self.cameras = patches.new_zeros(batch, frames, CHANNELS)
        for frame in camera_index:
            told = torch.cat([extrinsics[:, frame].flatten(1), intrinsics[:, frame].flatten(1)], dim=-1)
            self.cameras[:, frame] = self.camera_prior(told)
        outputs = self.attend((patches + prior).flatten(0, 1), batch, self.grid(images))
        del self.cameras
        return outputs, self.patch_start_idx

    def between(self, layer: int, tokens: Tensor, batch: int) -> Tensor:
        added = torch.zeros_like(tokens)
        added[:, 0] = self.cameras.flatten(0, 1)
        return tokens + added


class OmniModel(Model):
    def forward(self, images: Tensor, **priors: Any):
        outputs, start = self.aggregator(images=images, **priors)
        return self.heads(outputs, images, start)


def build_omni() -> nn.Module:
    model = tiny(OmniTrunk, OmniModel)
    model.aggregator.no_depth = nn.Parameter(torch.full((1, 1, 1, CHANNELS), 0.1))
    model.aggregator.depth_prior = randomized(nn.Conv2d(2, CHANNELS, 14, stride=14))
    model.aggregator.camera_prior = randomized(nn.Linear(12 + 9, CHANNELS))
    return model.eval()


@torch.no_grad()
def call_omni(model: Any, images: Tensor) -> list[Tensor]:
    """Without priors, then with depth of one frame and cameras of two."""
    batch, frames, _, height, width = images.shape
    priors = dict(
        extrinsics=torch.eye(3, 4).expand(batch, frames, 3, 4),
        intrinsics=torch.eye(3).expand(batch, frames, 3, 3),
        depth=images.mean(2),
        mask=torch.ones(batch, frames, height, width),
        depth_index=[1],
        camera_index=[0, 2],
    )
    return tensors(model(images), model(images, **priors))


# VGGT-X: verbose and chunk_size, frames in chunks, writes in place, a dict of layers


class InPlaceRope(RotaryPositionEmbedding2D):
    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return tokens.copy_(super().forward(tokens, positions))


class ChunkedTrunk(Trunk):
    def embed(self, images: Tensor) -> Tensor:
        chunks = self.normalized(images).split(self.chunk_size)
        return torch.cat([self.patch_embed(chunk)["x_norm_patchtokens"] for chunk in chunks])

    def frame_step(self, layer: int, tokens: Tensor, positions: Tensor) -> Tensor:
        for start in range(0, len(tokens), self.chunk_size):
            part = slice(start, start + self.chunk_size)
            tokens[part] = self.frame_blocks[layer](tokens[part], pos=positions[part])
        return tokens

    def global_step(self, layer: int, tokens: Tensor, positions: Tensor, frames: int) -> Tensor:
        after = super().global_step(layer, tokens, positions, frames)
        assert after.dtype == tokens.dtype
        return after

    def forward(self, images: Tensor, verbose: bool = False, chunk_size: int = 128):
        self.chunk_size = chunk_size
        outputs, start = super().forward(images)
        return dict(enumerate(outputs)), start


class ChunkedModel(Model):
    def forward(self, images: Tensor, verbose: bool = False, chunk_size: int = 2):
        outputs, start = self.aggregator(images, verbose=verbose, chunk_size=chunk_size)
        return self.heads(list(outputs.values()), images, start)


def build_chunked() -> nn.Module:
    model = tiny(ChunkedTrunk, ChunkedModel)
    model.aggregator.rope.__class__ = InPlaceRope
    model.aggregator.chunk_size = 2
    return model


@torch.no_grad()
def call_chunked(model: Any, images: Tensor) -> list[Tensor]:
    return tensors(model(images), model(images, verbose=True), model.aggregator(images))


# SwiftVGGT: an entrance for embedding and one for attention


class TwoEntrances(Trunk):
    def forward_embedding(self, images: Tensor) -> Tensor:
        """Patch tokens [S, P, C] of images [S, 3, H, W]."""
        return self.embed(images[None])

    def forward_attention(self, patches: Tensor, height: int, width: int):
        grid = height // self.patch_size, width // self.patch_size
        return self.attend(patches, 1, grid), self.patch_start_idx


@torch.no_grad()
def call_entrances(model: Any, images: Tensor, at_once: bool = True) -> list[Tensor]:
    """Embed all frames, then attend to windows that overlap, and to a window made of two.

    Args:
        at_once: False embeds each window right before attention. It gives the same but for rounding.
    """
    frames, trunk = images[0], model.aggregator
    whole = torch.cat([trunk.forward_embedding(part) for part in frames.split(2)])
    numbers, found = list(range(len(frames))), []
    for window in (numbers[:2], numbers[1:], numbers[:1] + numbers[2:]):
        patches = whole[window] if at_once else trunk.forward_embedding(frames[window])
        outputs, start = trunk.forward_attention(patches, *frames.shape[-2:])
        found.append(model.heads(outputs, frames[None, window], start))
    return tensors(found)


# map-anything: forward_features of the patch embedding, and a wrapper around the model


class FeaturesTrunk(Trunk):
    def embed(self, images: Tensor) -> Tensor:
        return self.patch_embed.forward_features(self.normalized(images))["x_norm_patchtokens"]


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, views: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        images = torch.stack([view["img"] for view in views], dim=1)
        outputs, start = self.model.aggregator(images)
        pose = self.model.camera_head(outputs)[-1]
        depth, conf = self.model.depth_head(outputs, images, start)
        return [dict(pose=pose[:, i], depth=depth[:, i], conf=conf[:, i]) for i in range(len(views))]


@torch.no_grad()
def call_views(model: Any, images: Tensor) -> list[Tensor]:
    return tensors(model([dict(img=frame) for frame in images.unbind(1)]))


# PAGE4D: a module between the blocks, and arguments with one number or feature for each token


class TokenBlock(Block):
    """A block that is told numbers and features of tokens, and sizes that it does not need."""

    def forward(self, x, pos=None, temporal_features=None, S=None, P=None, attn_mask=None, attn_value=None):
        if temporal_features is not None:
            x = x + temporal_features
        found = self.attn(self.norm1(x), pos=pos)
        if attn_mask is not None:
            found = found * (1 - attn_mask[..., None]) * attn_value.mT
        x = x + self.ls1(found)
        return x + self.ls2(self.mlp(self.norm2(x)))


class MaskTrunk(Trunk):
    def between(self, layer: int, tokens: Tensor, batch: int) -> Tensor:
        if layer != 1:
            return tokens
        joined = tokens.unflatten(0, (batch, -1)).flatten(1, 2)
        self.mask = self.mask_head(joined).sigmoid()  # [B, S * (n + P), 2]
        return tokens * (1 + self.mask[..., :1].reshape(*tokens.shape[:2], 1))

    def global_step(self, layer: int, tokens: Tensor, positions: Tensor, frames: int) -> Tensor:
        numbers = dict(temporal_features=None, attn_mask=None, attn_value=None)
        if layer == 2:
            numbers.update(attn_mask=self.mask[..., 0], attn_value=self.mask[..., 1][:, None])
        elif layer == 3:
            numbers.update(temporal_features=self.mask.repeat(1, 1, CHANNELS // 2))
            del self.mask
        sizes = dict(S=frames, P=tokens.shape[1] // frames)
        return self.global_blocks[layer](tokens, pos=positions, **sizes, **numbers)


def build_mask_head() -> nn.Module:
    model = tiny(MaskTrunk, block=TokenBlock)
    model.aggregator.mask_head = randomized(nn.Linear(CHANNELS, 2))
    return model


# A detector's VGGT: a list of the cached layers alone


class ShortListTrunk(Trunk):
    def forward(self, images: Tensor):
        outputs, start = super().forward(images)
        return [outputs[layer] for layer in (1, 3)], start


def build_short_list() -> nn.Module:
    model = tiny(ShortListTrunk)
    for head in (model.depth_head, model.point_head):
        head.intermediate_layer_idx = [0, 0, 1, 1]
    return model


# AnySplat: an encoder that asks for layers, blocks behind a checkpoint also in eval mode


class LayersTrunk(Trunk):
    def frame_step(self, layer: int, tokens: Tensor, positions: Tensor) -> Tensor:
        return checkpoint(self.frame_blocks[layer], tokens, positions, use_reentrant=False)

    def global_step(self, layer: int, tokens: Tensor, positions: Tensor, frames: int) -> Tensor:
        return checkpoint(self.global_blocks[layer], tokens, positions, use_reentrant=False)

    def forward(self, images: Tensor, intermediate_layer_idx: list[int] | None = None):
        outputs, start = super().forward(images)
        if intermediate_layer_idx is not None:
            wanted = sorted({*intermediate_layer_idx, self.depth - 1})
            outputs = [outputs[layer] for layer in wanted]
        return outputs, start


class Encoder(nn.Module):
    """It holds the aggregator and the heads, and no VGGT."""

    def __init__(self, model: Any):
        super().__init__()
        self.aggregator = model.aggregator
        self.camera_head = model.camera_head
        self.depth_head = model.depth_head
        self.depth_head.intermediate_layer_idx = [0, 1, 1, 2]

    def forward(self, images: Tensor) -> list[Tensor]:
        outputs, start = self.aggregator(images, intermediate_layer_idx=[0, 2])
        depth = self.depth_head(outputs, images=images, patch_start_idx=start)
        return tensors(self.camera_head(outputs)[-1], depth, outputs)


def build_encoder() -> nn.Module:
    return Encoder(tiny(LayersTrunk)).eval()


# StreamVGGT: a cache of keys and values frame by frame, or a causal mask over all tokens


def split_heads(attn: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, heads, N, d]."""
    joined = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim))
    query, key, value = joined.permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def join_heads(attn: Attention, x: Tensor) -> Tensor:
    return attn.proj(x.transpose(1, 2).flatten(2))


class StreamBlock(Block):
    """A block that takes a mask, or a cache of keys and values that it also returns.

    Cached keys are not rotated yet. All frames get the positions of the frame at hand, which are the same in stock.
    """

    def forward(self, x, pos=None, attn_mask=None, past_key_values=None, use_cache=False):
        query, key, value = split_heads(self.attn, self.norm1(x))
        if use_cache:
            key, value = key.unsqueeze(2), value.unsqueeze(2)
            if past_key_values is not None:
                key = torch.cat([past_key_values[0], key], dim=2)
                value = torch.cat([past_key_values[1], value], dim=2)
        cache = (key, value)
        if use_cache:
            key, value = key.flatten(2, 3), value.flatten(2, 3)
        attn = self.attn
        query, key = attn.q_norm(query), attn.k_norm(key)
        query, key = attn.rope(query, pos), attn.rope(key, pos.repeat(1, key.shape[2] // pos.shape[1], 1))
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)
        x = x + self.ls1(join_heads(attn, found))
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return (x, cache) if use_cache else x


class StreamTrunk(Trunk):
    def special(self, batch: int, frames: int) -> Tensor:
        every = super().special(batch, self.past + frames)
        return every.unflatten(0, (batch, -1))[:, self.past :].flatten(0, 1)

    def global_step(self, layer: int, tokens: Tensor, positions: Tensor, frames: int) -> Tensor:
        block = self.global_blocks[layer]
        if self.cache is None:
            return block(tokens, pos=positions, attn_mask=self.mask(tokens, frames))
        tokens, self.cache[layer] = block(
            tokens, pos=positions, attn_mask=None, past_key_values=self.cache[layer], use_cache=True
        )
        return tokens

    def mask(self, tokens: Tensor, frames: int) -> Any:
        """Of [S * (n + P), S * (n + P)], to be added: no frame sees a later one."""
        frame = torch.arange(tokens.shape[1]) // (tokens.shape[1] // frames)
        later = frame[:, None] < frame
        return later.to(tokens.dtype) * torch.finfo(tokens.dtype).min

    def forward(self, images: Tensor, past_key_values=None, use_cache: bool = False, past_frame_idx: int = 0):
        self.cache, self.past = (past_key_values if use_cache else None), past_frame_idx
        outputs, start = super().forward(images)
        del self.cache, self.past
        return (outputs, start, past_key_values) if use_cache else (outputs, start)


@torch.no_grad()
def call_stream(model: Any, images: Tensor) -> list[Tensor]:
    """Frame by frame."""
    cache, found = [None] * model.aggregator.depth, []
    for number, frame in enumerate(images.unbind(1)):
        outputs, start, cache = model.aggregator(
            frame[:, None], past_key_values=cache, use_cache=True, past_frame_idx=number
        )
        found.append(model.heads(outputs, frame[:, None], start))
    return tensors(found)


@torch.no_grad()
def call_causal(model: Any, images: Tensor) -> list[Tensor]:
    """Only what is causal: the camera head attends to all frames."""
    outputs, start = model.aggregator(images)
    return tensors(outputs, model.depth_head(outputs, images=images, patch_start_idx=start))


class SoftmaxMaskBlock(Block):
    """A block that takes a mask of bools by its place, and attends by its own code."""

    def forward(self, x, pos, mask):
        attn = self.attn
        query, key, value = split_heads(attn, self.norm1(x))
        query, key = attn.rope(attn.q_norm(query), pos), attn.rope(attn.k_norm(key), pos)
        logits = (query @ key.mT * attn.scale).masked_fill(~mask, float("-inf"))
        x = x + self.ls1(join_heads(attn, logits.softmax(-1) @ value))
        return x + self.ls2(self.mlp(self.norm2(x)))


class BoolMaskTrunk(Trunk):
    def global_step(self, layer: int, tokens: Tensor, positions: Tensor, frames: int) -> Tensor:
        frame = torch.arange(tokens.shape[1]) // (tokens.shape[1] // frames)
        allowed = (frame[:, None] >= frame).expand(len(tokens), 1, -1, -1)
        return self.global_blocks[layer](tokens, positions, allowed)


class KeyMaskTrunk(Trunk):
    """Some tokens of each frame are no keys: a mask of [B, 1, 1, S * (n + P)]."""

    def global_step(self, layer: int, tokens: Tensor, positions: Tensor, frames: int) -> Tensor:
        number = torch.arange(tokens.shape[1]) % (tokens.shape[1] // frames)
        allowed = (number % 3 != 1).expand(len(tokens), 1, 1, -1)
        return self.global_blocks[layer](tokens, positions, allowed)


class FrameMask:
    """A mask that is no tensor."""

    def __init__(self, blocked: Tensor):
        self.blocked = blocked


class MaskObjectBlock(StreamBlock):
    def forward(self, x, pos=None, attn_mask=None):
        return super().forward(x, pos=pos, attn_mask=attn_mask.blocked)


class MaskObjectTrunk(StreamTrunk):
    def mask(self, tokens: Tensor, frames: int) -> Any:
        return FrameMask(super().mask(tokens, frames))


# Arguments of every shape, in a block that takes what to add to tokens and a mask


class ArgumentBlock(Block):
    def forward(self, x, pos=None, extra=0.0, mask=None):
        attn = self.attn
        query, key, value = split_heads(attn, self.norm1(x + extra))
        query, key = attn.rope(attn.q_norm(query), pos), attn.rope(attn.k_norm(key), pos)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.ls1(join_heads(attn, found))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ArgumentTrunk(Trunk):
    """The values of `argument` differ from token to token; all clips of a batch are given the same.

    Attributes:
        name: of the argument.
        dimensions: its shape, in which "B" and "N" stand for clips and tokens.
    """

    name, dimensions = "", ()

    def global_step(self, layer: int, tokens: Tensor, positions: Tensor, frames: int) -> Tensor:
        sizes = dict(B=len(tokens), N=tokens.shape[1])
        shape = [sizes.get(d, d) for d in self.dimensions]
        generator = torch.Generator().manual_seed(layer)
        shared = [1 if d == "B" else size for d, size in zip(self.dimensions, shape, strict=True)]
        value = 2 * torch.randn(shared, generator=generator).expand(shape)
        return self.global_blocks[layer](tokens, pos=positions, **{self.name: value})


def build_argument(name: str, *dimensions: int | str) -> nn.Module:
    model = tiny(ArgumentTrunk, block=ArgumentBlock)
    model.aggregator.name, model.aggregator.dimensions = name, dimensions
    return model


class RewrittenMaskTrunk(Trunk):
    """One mask, written in place between blocks; `fresh` gives each block a new one of the same values."""

    fresh = False

    def global_step(self, layer: int, tokens: Tensor, positions: Tensor, frames: int) -> Tensor:
        frame = torch.arange(tokens.shape[1]) // (tokens.shape[1] // frames)
        if layer == 0:
            self.allowed = frame[:, None] >= frame
        elif layer == 2:
            self.allowed.logical_or_(frame[:, None] == 0)
        mask = self.allowed if layer % 2 == 0 else self.allowed.mT
        return self.global_blocks[layer](tokens, positions, mask.clone() if self.fresh else mask)


# FastVGGT and LiteVGGT: merging inside attention


class MergingBlock(Block):
    """Neighbours in a row share one key and one value. The grid is an attribute, set before a call."""

    rows, columns, merging = 28, 37, True

    def forward(self, x, pos=None, global_merging=None):
        attn = self.attn
        query, key, value = split_heads(attn, self.norm1(x))
        query, key = attn.rope(attn.q_norm(query), pos), attn.rope(attn.k_norm(key), pos)
        if global_merging is not None:
            key, value = self.merged(key), self.merged(value)
        x = x + self.ls1(join_heads(attn, F.scaled_dot_product_attention(query, key, value)))
        return x + self.ls2(self.mlp(self.norm2(x)))

    def merged(self, tokens: Tensor) -> Tensor:
        frames = tokens.unflatten(2, (-1, 5 + self.rows * self.columns))
        patches = frames[:, :, :, 5:].unflatten(3, (self.rows, self.columns))
        even = patches[..., : self.columns // 2 * 2, :].unflatten(4, (-1, 2)).mean(5)
        return torch.cat([frames[:, :, :, :5].flatten(2, 3), even.flatten(2, 4)], dim=2)


class MergingTrunk(Trunk):
    def global_step(self, layer: int, tokens: Tensor, positions: Tensor, frames: int) -> Tensor:
        merging = layer if self.merging else None
        return self.global_blocks[layer](tokens, pos=positions, global_merging=merging)


def build_merging(merging: bool = True) -> nn.Module:
    model = tiny(MergingTrunk, block=MergingBlock)
    model.aggregator.merging = merging
    return model


@torch.no_grad()
def call_merging(model: Any, images: Tensor) -> list[Tensor]:
    for block in model.aggregator.global_blocks:
        block.rows, block.columns = model.aggregator.grid(images)
    return tensors(model(images))


class FunctionsBlock(Block):
    """A block that returns functions beside the tokens: what they merge is chosen once, for all tokens."""

    def forward(self, x, pos=None, global_merging=False, grid=None, functions=None):
        attn = self.attn
        query, key, value = split_heads(attn, self.norm1(x))
        query, key = attn.rope(attn.q_norm(query), pos), attn.rope(attn.k_norm(key), pos)
        if global_merging and functions is None:
            some = torch.arange(0, x.shape[1], 2)
            patches = x.unflatten(1, (-1, 5 + grid[0] * grid[1]))[:, :, 5:]
            gain = 1 + patches.unflatten(2, grid).mean().sigmoid()
            functions = (lambda tokens: tokens.index_select(2, some), lambda tokens: gain * tokens)
        if global_merging:
            key, value = functions[0](key), functions[0](value)
        found = F.scaled_dot_product_attention(query, key, value)
        if global_merging:
            found = functions[1](found)
        x = x + self.ls1(join_heads(attn, found))
        return x + self.ls2(self.mlp(self.norm2(x))), functions


class FunctionsTrunk(Trunk):
    merges = True

    def global_step(self, layer: int, tokens: Tensor, positions: Tensor, frames: int) -> Tensor:
        functions = None if layer == 0 else self.functions
        tokens, self.functions = self.global_blocks[layer](
            tokens, pos=positions, global_merging=self.merges, grid=self.found, functions=functions
        )
        return tokens

    def forward(self, images: Tensor):
        self.found = self.grid(images)
        outputs = super().forward(images)
        del self.found, self.functions
        return outputs


class NoMergingTrunk(FunctionsTrunk):
    """The same with merging off: a block returns None beside the tokens."""

    merges = False


# Blocks of another make, other ways to pass positions, other special tokens


class OwnBlock(nn.Module):
    """A block with attention of its own: one key and value for all heads, softmax by hand."""

    def __init__(self, channels: int, heads: int, rope: nn.Module):
        super().__init__()
        self.heads, self.rope = heads, rope
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.to_query = nn.Linear(channels, channels)
        self.to_key_value = nn.Linear(channels, 2 * channels // heads)
        self.out = nn.Linear(channels, channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        normed = self.norm1(x)
        query = self.to_query(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.to_key_value(normed)[:, None].chunk(2, dim=-1)
        query, key = self.rope(query, pos), self.rope(key, pos)
        weights = torch.softmax(query @ key.mT / key.shape[-1] ** 0.5, dim=-1)
        x = x + self.out((weights @ value).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def build_own_blocks() -> nn.Module:
    model = tiny(Trunk)
    trunk = model.aggregator
    for name in ("frame_blocks", "global_blocks"):
        blocks = nn.ModuleList(OwnBlock(CHANNELS, 2, trunk.rope) for _ in range(trunk.depth))
        setattr(trunk, name, randomized(blocks, seed=len(name)))
    return model.eval()


class PlacedPositions(Trunk):
    def frame_step(self, layer: int, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.frame_blocks[layer](tokens, positions)

    def global_step(self, layer: int, tokens: Tensor, positions: Tensor, frames: int) -> Tensor:
        return self.global_blocks[layer](tokens, positions)


class ScaleTokenTrunk(Trunk):
    """One more special token, in front of the patch tokens."""

    def special(self, batch: int, frames: int) -> Tensor:
        scale = slice_expand_and_flatten(self.scale_token, batch, frames)
        return torch.cat([super().special(batch, frames), scale], dim=1)


def build_scale_token() -> nn.Module:
    model = tiny(ScaleTokenTrunk)
    generator = torch.Generator().manual_seed(2)
    model.aggregator.scale_token = nn.Parameter(torch.randn(1, 2, 1, CHANNELS, generator=generator))
    model.aggregator.patch_start_idx += 1
    return model


STOCK = [
    Double("stock", tiny_vggt, call_images, stock=True),
    Double("stock-parts", tiny_vggt, call_parts, stock=True),
    Double("stock-tracks", partial(tiny_vggt, track=True), call_tracks, stock=True),
    Double("stock-all-layers", partial(tiny_vggt, all_layers=True), call_images, stock=True),
    Double("stock-groups-of-2", partial(tiny_vggt, group=2), call_images, stock=True),
]

FORKS = [
    Double("vggt-slam", partial(tiny, SlamTrunk, SlamModel), call_slam),
    Double("omnivggt", build_omni, call_omni),
    Double("vggt-x", build_chunked, call_chunked),
    Double("swiftvggt", partial(tiny, TwoEntrances), call_entrances, batches=False, like_stock=True),
    Double(
        "map-anything",
        lambda: Wrapper(tiny(FeaturesTrunk)).eval(),
        call_views,
        target=lambda model: model.model,
        like_stock=True,
    ),
    Double("page4d", build_mask_head, call_images),
    Double("short-list", build_short_list, call_images),
    Double("anysplat", build_encoder, call_images, like_stock=True),
    Double("streamvggt-cache", partial(tiny, StreamTrunk, block=StreamBlock), call_stream),
    Double("streamvggt-mask", partial(tiny, StreamTrunk, block=StreamBlock), call_causal),
    Double("mask-of-bools", partial(tiny, BoolMaskTrunk, block=SoftmaxMaskBlock), call_causal),
    Double("mask-of-keys", partial(tiny, KeyMaskTrunk, block=SoftmaxMaskBlock), call_images),
    Double("fastvggt-off", partial(build_merging, False), call_images, like_stock=True),
    Double("litevggt-off", partial(tiny, NoMergingTrunk, block=FunctionsBlock), call_images, like_stock=True),
    Double("own-blocks", build_own_blocks, call_images, like_stock=True),
    Double("placed-positions", partial(tiny, PlacedPositions), call_images, like_stock=True),
    Double("scale-token", build_scale_token, call_images),
]

REFUSED = [
    Double("fastvggt", build_merging, call_merging, refused="(?i)merg|grid|all tokens"),
    Double(
        "litevggt",
        partial(tiny, FunctionsTrunk, block=FunctionsBlock),
        call_images,
        refused="(?i)merg|grid|all tokens",
    ),
    Double(
        "mask-object", partial(tiny, MaskObjectTrunk, block=MaskObjectBlock), call_causal, refused="(?i)mask"
    ),
]

# Those whose frame 0 must not know of later frames.
CAUSAL = [
    double for double in FORKS if double.name in ("streamvggt-mask", "mask-of-bools", "streamvggt-cache")
]

assert len(LAYERS) == 4  # the short lists above are of 4 layers
