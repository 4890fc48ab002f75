"""Doubles of the sibling models: small models of our own with the structure of Pi3 and of VGGT-Omega.

All code here was written for these tests. A double holds what matters to the patch: the parts by which its family is
recognised, how its blocks are called, and what it returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from conformance import Subject
from real_hosts import with_random_weights
from torch import Tensor, nn

CHANNELS, HEADS, WIDTH = 32, 2, 16


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((CHANNELS,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(CHANNELS, 4 * CHANNELS), nn.Linear(4 * CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Attention with norms of queries and keys; `turn` rotates both."""

    def __init__(self, joint: nn.Module | None = None):
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS) if joint is None else joint
        self.q_norm, self.k_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.proj = nn.Linear(CHANNELS, CHANNELS)

    def turn(self, x: Tensor, where: Any) -> Tensor:
        return x

    def forward(self, x: Tensor, where: Any = None) -> Tensor:
        joint = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH))
        query, key, value = (t.transpose(1, 2) for t in joint.unbind(2))
        query, key = (norm(t).to(value.dtype) for norm, t in ((self.q_norm, query), (self.k_norm, key)))
        query, key = self.turn(query, where), self.turn(key, where)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Residual(nn.Module):
    """The two layers of a block."""

    def __init__(self, attention: nn.Module | None = None):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS, eps=1e-6), nn.LayerNorm(CHANNELS, eps=1e-6)
        self.attn, self.mlp = attention or Attention(), Network()
        self.ls1, self.ls2 = Scale(), Scale()

    def run(self, x: Tensor, where: Any) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), where))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Embedding(nn.Module):
    """Patches of images [N, 3, H, W] as a dictionary of tokens, called with more than images."""

    def __init__(self, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, CHANNELS, patch, patch)

    def forward(self, images: Tensor, is_training: bool = False) -> dict[str, Any]:
        tokens = self.proj(images).flatten(2).mT
        assert is_training
        return {"x_norm_patchtokens": F.layer_norm(tokens, (CHANNELS,)), "masks": None}


# ---- Pi3


class PlaneRope(nn.Module):
    """Two-dimensional rotary embedding, its tables made up to the largest position."""

    def __init__(self):
        super().__init__()
        self.cache: dict[Any, tuple[Tensor, Tensor]] = {}

    def get_cos_sin(self, channels: int, rows: int, device: Any, dtype: Any) -> tuple[Tensor, Tensor]:
        key = channels, rows, device, dtype
        if key not in self.cache:
            speeds = 100.0 ** -(torch.arange(0, channels, 2, device=device) / channels)
            angles = (torch.arange(rows, device=device)[:, None] * speeds).to(dtype).repeat(1, 2)
            self.cache[key] = angles.cos(), angles.sin()
        return self.cache[key]

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        half = tokens.shape[-1] // 2
        cos, sin = self.get_cos_sin(half, int(positions.max()) + 1, tokens.device, tokens.dtype)
        parts = []
        for axis, part in enumerate(tokens.split(half, -1)):
            rows = positions[:, None, :, axis]  # [B, 1, L]
            first, second = part.chunk(2, -1)
            parts.append(part * cos[rows] + torch.cat([-second, first], -1) * sin[rows])
        return torch.cat(parts, -1)


class PlaneAttention(Attention):
    def __init__(self, rope: nn.Module):
        super().__init__()
        self.rope = rope

    def turn(self, x: Tensor, where: Any) -> Tensor:
        return self.rope(x, where)


class PlaneBlock(Residual):
    def forward(self, x: Tensor, xpos: Tensor | None = None) -> Tensor:
        return self.run(x, xpos)


class Decoder(nn.Module):
    """A head's blocks within frames."""

    def __init__(self, rope: nn.Module):
        super().__init__()
        self.projects = nn.Linear(2 * CHANNELS, CHANNELS)
        self.blocks = nn.ModuleList(PlaneBlock(PlaneAttention(rope)) for _ in range(2))

    def forward(self, x: Tensor, xpos: Tensor) -> Tensor:
        x = self.projects(x)
        for block in self.blocks:
            x = block(x, xpos=xpos)
        return x


class Pi3Double(nn.Module):
    """One list of blocks, within frames and across the clip in turn; decoders on the last two of them."""

    def __init__(self):
        super().__init__()
        self.patch_size, self.patch_start_idx = 14, 5
        self.encoder, self.rope = Embedding(14), PlaneRope()
        self.decoder = nn.ModuleList(PlaneBlock(PlaneAttention(self.rope)) for _ in range(6))
        self.register_token = nn.Parameter(torch.randn(1, 1, 5, CHANNELS))
        self.point_decoder, self.camera_decoder = Decoder(self.rope), Decoder(self.rope)
        self.point_head, self.camera_head = nn.Linear(CHANNELS, 4 * 14**2), nn.Linear(CHANNELS, 12)
        self.register_buffer("image_mean", torch.full((1, 3, 1, 1), 0.45))

    def decode(self, tokens: Tensor, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        count, batch, special = len(tokens), len(tokens) // frames, self.patch_start_idx
        x = torch.cat([self.register_token[0].expand(count, -1, -1), tokens], 1)
        rows, columns = (torch.arange(side // self.patch_size) for side in (height, width))
        where = F.pad(torch.cartesian_prod(rows, columns).to(x.device) + 1, (0, 0, special, 0)).expand(
            count, -1, -1
        )
        last = []
        for i, block in enumerate(self.decoder):
            groups = count if i % 2 == 0 else batch
            x, where = (t.reshape(groups, -1, t.shape[-1]) for t in (x, where))
            x = block(x, xpos=where)
            last.append(x)
        return torch.cat([t.reshape(count, -1, CHANNELS) for t in last[-2:]], -1), where.reshape(count, -1, 2)

    def forward(self, imgs: Tensor) -> dict[str, Tensor]:
        batch, frames, _, height, width = imgs.shape
        found = self.encoder(((imgs - self.image_mean) / 0.25).flatten(0, 1), is_training=True)
        hidden, where = self.decode(found["x_norm_patchtokens"], frames, height, width)
        points = self.point_head(self.point_decoder(hidden, xpos=where)[:, self.patch_start_idx :])
        grid = height // self.patch_size, width // self.patch_size
        dense = F.pixel_shuffle(points.mT.unflatten(-1, grid), self.patch_size).movedim(1, -1)
        cameras = self.camera_head(self.camera_decoder(hidden, xpos=where).mean(1))
        dense, cameras = (
            dense.unflatten(0, (batch, frames)).float(),
            cameras.view(batch, frames, 3, 4).float(),
        )
        depth = dense[..., 2:3].exp()
        turned = torch.linalg.qr(cameras[..., :3])[0]
        turned = turned * torch.linalg.det(turned)[..., None, None].sign()
        poses = F.pad(torch.cat([turned, cameras[..., 3:]], -1), (0, 0, 0, 1))
        poses[..., 3, 3] = 1
        local = torch.cat([dense[..., :2] * depth, depth], -1)
        # Poses are camera-to-world.
        turned, moved = poses[..., None, None, :3, :3], poses[..., None, None, :3, 3]
        return {
            "points": (turned @ local[..., None])[..., 0] + moved,
            "local_points": local,
            "conf": dense[..., 3:],
            "camera_poses": poses,
        }


class Pi3XDouble(Pi3Double):
    """A Pi3 that takes more than images, until it is told not to."""

    use_multimodal = True

    def disable_multimodal(self) -> None:
        self.use_multimodal = False

    def forward(self, imgs: Tensor) -> dict[str, Tensor]:
        if self.use_multimodal:
            raise ValueError("depth, rays and poses are missing")
        return super().forward(imgs)


# ---- VGGT-Omega


class KeyMaskedLinear(nn.Linear):
    """Queries, keys and values by one product, with a buffer that takes the bias of keys away."""

    def __init__(self):
        super().__init__(CHANNELS, 3 * CHANNELS)
        self.register_buffer("bias_mask", torch.full((3 * CHANNELS,), torch.nan))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


class TableAttention(Attention):
    """Turns patches by sines and cosines that are handed over; tokens in front of them stay."""

    def __init__(self):
        super().__init__(KeyMaskedLinear())

    def turn(self, x: Tensor, where: Any) -> Tensor:
        if where is None:
            return x
        sin, cos = where
        front, patches = x[:, :, : -len(sin)], x[:, :, -len(sin) :].to(sin.dtype)
        first, second = patches.chunk(2, -1)
        turned = patches * cos + torch.cat([-second, first], -1) * sin
        return torch.cat([front, turned.to(x.dtype)], 2)


class TableBlock(Residual):
    def __init__(self):
        super().__init__(TableAttention())

    def forward(self, x: Tensor, rope: Any = None) -> Tensor:
        return self.run(x, rope)


class OmegaTrunk(nn.Module):
    """Frame blocks and blocks between frames, in some of which the special tokens alone take part."""

    def __init__(self, types: Sequence[str], layers: Sequence[int]):
        super().__init__()
        self.patch_embed, self.patch_size, self.patch_token_start = Embedding(16), 16, 17
        self.frame_blocks = nn.ModuleList(TableBlock() for _ in types)
        self.inter_frame_blocks = nn.ModuleList(TableBlock() for _ in types)
        self.inter_frame_attention_types, self.cached_layer_indices = list(types), {*layers}
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, CHANNELS))
        self.register_token = nn.Parameter(torch.randn(1, 2, 16, CHANNELS))
        self.register_buffer("_resnet_mean", torch.full((1, 1, 3, 1, 1), 0.45), persistent=False)

    def forward(self, images: Tensor) -> tuple[list[Tensor | None], int]:
        batch, frames, special = *images.shape[:2], self.patch_token_start
        found = self.patch_embed(((images - self._resnet_mean) / 0.25).flatten(0, 1), is_training=True)
        own = torch.cat([self.camera_token, self.register_token], 2)
        own = torch.cat([own[:, :1], own[:, 1:].expand(-1, frames - 1, -1, -1)], 1).expand(batch, -1, -1, -1)
        x = torch.cat([own.flatten(0, 1), found["x_norm_patchtokens"]], 1)
        rows, columns = (torch.arange(side // self.patch_size) / 4 for side in images.shape[-2:])
        angles = (
            torch.cartesian_prod(rows, columns).to(x.device).repeat_interleave(WIDTH // 4, 1).repeat(1, 2)
        )
        tables, layers = (angles.sin(), angles.cos()), []
        for i, kind in enumerate(self.inter_frame_attention_types):
            within = x = self.frame_blocks[i](x, tables)
            if kind == "global":
                x = self.inter_frame_blocks[i](x.reshape(batch, -1, CHANNELS), None).view(x.shape)
            else:
                few = self.inter_frame_blocks[i](x[:, :special].reshape(batch, -1, CHANNELS), None)
                x = torch.cat([few.view(len(x), special, CHANNELS), x[:, special:]], 1)
            both = torch.cat([within, x], -1).unflatten(0, (batch, frames))
            layers.append(both if i in self.cached_layer_indices else None)
        return layers, special


class Float32Head(nn.Module):
    """Depth from some layers, in float32 alone, a few frames at a time."""

    def __init__(self, layers: Sequence[int]):
        super().__init__()
        self.intermediate_layer_idx, self.patch_size = list(layers), 16
        self.projects = nn.ModuleList(nn.Linear(2 * CHANNELS, 16**2) for _ in layers)

    def forward(
        self, tokens: list, images: Tensor, patch_token_start: int, frames_chunk_size: int | None = 8
    ):
        size = frames_chunk_size or images.shape[1]
        parts = [
            self.some(
                [None if t is None else t[:, at : at + size] for t in tokens], images.shape, patch_token_start
            )
            for at in range(0, images.shape[1], size)
        ]
        return torch.cat(parts, 1)

    def some(self, tokens: list, shape: Sequence[int], special: int) -> Tensor:
        read = zip(self.projects, self.intermediate_layer_idx, strict=True)
        found = sum(project(tokens[i][:, :, special:].float()) for project, i in read)
        if found.dtype != torch.float32:
            raise TypeError("depth must be float32")
        grid = (shape[-2] // 16, shape[-1] // 16)
        depth = F.pixel_shuffle(found.flatten(0, 1).mT.unflatten(-1, grid), 16)[:, 0]
        return depth.unflatten(0, found.shape[:2]).exp()


class OmegaDouble(nn.Module):
    """A trunk with register attention, a head for cameras and one for depth."""

    def __init__(self):
        super().__init__()
        layers = (1, 3, 4)
        self.aggregator = OmegaTrunk(["global", "register", "global", "register", "global"], layers)
        self.camera_head, self.dense_head = nn.Linear(2 * CHANNELS, 9), Float32Head(layers)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        images = images[None] if images.ndim == 4 else images
        tokens, start = self.aggregator(images)
        depth = self.dense_head(tokens, images=images, patch_token_start=start)
        return {
            "pose_enc": self.camera_head(tokens[-1][:, :, 0].float()),
            "depth": depth[..., None],
            "depth_conf": depth.reciprocal(),
        }


def pi3(seed: int) -> Any:
    return made(Pi3Double, seed)


def pi3x(seed: int) -> Any:
    return made(Pi3XDouble, seed)


def vggt_omega(seed: int) -> Any:
    return made(OmegaDouble, seed)


def made(kind: type, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return with_random_weights(kind(), seed)


DOUBLES = [
    Subject(
        "pi3", "pi3", pi3, patch_size=14, special=5, compiles=10, refused=("head_dtype", "output_device")
    ),
    Subject(
        "vggt-omega", "vggt-omega", vggt_omega, patch_size=16, special=17, compiles=8, special_blocks=(1, 3),
        refused=("head_dtype",), inner=lambda model, images: model.aggregator(images),
    ),
]  # fmt: skip
