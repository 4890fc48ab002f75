"""A double of Depth Anything 3: its structure and its ways of calling, small, with random weights.

All code here was written for these tests. It holds what matters to the patch: one transformer whose later odd blocks
see all frames, a camera token put in on the way, views in another order between blocks, positions that are one and the
same in global blocks, and outputs in a dictionary with attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from conformance import Subject
from hosts_doubles import CHANNELS, Network, Scale
from torch import Tensor, nn
from vggt.layers.rope import PositionGetter, RotaryPositionEmbedding2D
from vggt.layers.swiglu_ffn import SwiGLUFFNFused

from pacevggt_patch.evaluation import decode_pose_encoding

HEADS, PATCH, SIDE = 4, 14, 5
LEAST_VIEWS = 3  # from so many on the reference view comes first


class Outputs(dict):
    """A dictionary whose items are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]


class Attention(nn.Module):
    def __init__(self, rope: nn.Module | None):
        super().__init__()
        self.num_heads, self.rope = HEADS, rope
        self.qkv, self.proj = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        norm = nn.Identity if rope is None else lambda: nn.LayerNorm(CHANNELS // HEADS)
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x: Tensor, pos: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(query), self.k_norm(key)
        if self.rope is not None and pos is not None:
            query, key = self.rope(query, pos), self.rope(key, pos)
        mask = None if attn_mask is None else attn_mask[:, None]
        return self.proj(F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, rope: nn.Module | None, gated: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS, eps=1e-6), nn.LayerNorm(CHANNELS, eps=1e-6)
        self.attn, self.ls1, self.ls2 = Attention(rope), Scale(), Scale()
        self.mlp = SwiGLUFFNFused(CHANNELS, 4 * CHANNELS) if gated else Network()

    def forward(self, x: Tensor, pos: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), pos=pos, attn_mask=attn_mask))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, CHANNELS, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Transformer(nn.Module):
    """From block `start` on odd blocks see all frames; without them for -1."""

    def __init__(self, start: int, depth: int, gated: bool):
        super().__init__()
        self.alt_start, self.patch_size, self.embed_dim = start, PATCH, CHANNELS
        self.num_register_tokens, self.patch_start_idx = 0, 1
        self.patch_embed = PatchEmbed()
        self.cls_token = nn.Parameter(torch.randn(1, 1, CHANNELS))
        if start != -1:
            self.camera_token = nn.Parameter(torch.randn(1, 2, CHANNELS))
        self.pos_embed = nn.Parameter(torch.randn(1, SIDE * SIDE + 1, CHANNELS))
        self.rope = RotaryPositionEmbedding2D(frequency=100.0) if start != -1 else None
        self.positions = PositionGetter()
        ropes = [self.rope if start != -1 and i >= start else None for i in range(depth)]
        self.blocks = nn.ModuleList(Block(rope, gated) for rope in ropes)
        self.norm = nn.LayerNorm(CHANNELS)

    def embed(self, images: Tensor) -> Tensor:
        """Tokens [B, S, 1 + P, C] of images [B, S, 3, H, W]."""
        (batch, views), size = images.shape[:2], [side // PATCH for side in images.shape[-2:]]
        x = self.patch_embed(images.flatten(0, 1))
        table = self.pos_embed[:, 1:].unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 2)
        table = F.interpolate(table, size, mode="bicubic").flatten(2).transpose(1, 2)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return torch.cat([first, x + table], 1).unflatten(0, (batch, views))

    def where(self, x: Tensor, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Positions [B, S, 1 + P, 2] in frame blocks and in global blocks."""
        if self.rope is None:
            return None, None
        height, width = (side // PATCH for side in images.shape[-2:])
        inside = self.positions(x.shape[0] * x.shape[1], height, width, device=x.device) + 1
        inside = F.pad(inside, (0, 0, 1, 0)).unflatten(0, x.shape[:2])
        return inside, (inside > 0).to(inside.dtype)

    def get_intermediate_layers(
        self,
        images: Tensor,
        layers: Sequence[int],
        export_feat_layers: Sequence[int] = (),
        cam_token: Tensor | None = None,
        ref_view_strategy: str = "middle",
        attn_mask: Tensor | None = None,
    ) -> tuple[tuple[tuple[Tensor, Tensor], ...], list[Tensor]]:
        x = self.embed(images)
        batch, views = x.shape[:2]
        inside, across = self.where(x, images)
        order = inverse = None
        found, features, frames = [], [], x
        for i, block in enumerate(self.blocks):
            alternates = self.alt_start != -1 and i >= self.alt_start
            if i == self.alt_start - 1 and views >= LEAST_VIEWS and cam_token is None:
                order = self.order(x, ref_view_strategy)
                inverse = order.argsort(1)
                x, frames = taken(x, order), taken(frames, order)
            if i == self.alt_start:
                if cam_token is None:
                    first, others = self.camera_token[:, :1], self.camera_token[:, 1:]
                    cam_token = torch.cat([first, others.expand(-1, views - 1, -1)], 1).expand(batch, -1, -1)
                x[:, :, 0] = cam_token
            if alternates and i % 2:
                pos = None if across is None else across.flatten(1, 2)
                x = block(x.flatten(1, 2), pos=pos, attn_mask=attn_mask).view(x.shape)
            else:
                pos = None if inside is None or i < self.alt_start else inside.flatten(0, 1)
                x = frames = block(x.flatten(0, 1), pos=pos, attn_mask=None).view(x.shape)
            if i in layers:
                both = torch.cat([frames, x], -1) if self.alt_start != -1 else x
                found.append(both if inverse is None else taken(both, inverse))
            if i in export_feat_layers:
                features.append(self.norm(x)[:, :, 1:])
        outputs = []
        for out in found:
            before, last = out[..., :-CHANNELS], self.norm(out[..., -CHANNELS:])
            outputs.append((torch.cat([before, last], -1)[:, :, 1:], out[:, :, 0]))
        return tuple(outputs), features

    def order(self, x: Tensor, strategy: str) -> Tensor:
        """Numbers [B, S] of the views, that of the reference view first."""
        batch, views = x.shape[:2]
        if strategy == "first":
            reference = torch.zeros(batch, dtype=torch.long, device=x.device)
        else:  # another one in each clip
            reference = 1 + x[:, 1:, 0].square().sum(-1).argmax(1)
        numbers = torch.arange(views, device=x.device).expand(batch, -1)
        return torch.where(numbers == reference[:, None], -1, numbers).argsort(1)


def inverted(poses: Tensor) -> Tensor:
    """The other way between camera and world, for rotations and translations [..., 3, 4]."""
    back = poses[..., :3].mT
    return torch.cat([back, -back @ poses[..., 3:]], -1)


def taken(x: Tensor, order: Tensor) -> Tensor:
    """Views of `x` [B, S, ...] in the order [B, S]."""
    return x[torch.arange(len(x), device=x.device)[:, None], order]


class Backbone(nn.Module):
    def __init__(self, start: int, depth: int, gated: bool):
        super().__init__()
        self.alt_start, self.out_layers = start, [depth - 4, depth - 3, depth - 2, depth - 1]
        self.pretrained = Transformer(start, depth, gated)

    def forward(self, x: Tensor, **kwargs):
        return self.pretrained.get_intermediate_layers(x, self.out_layers, **kwargs)


class Head(nn.Module):
    """Depth and its confidence of four layers, a few views at a time."""

    def __init__(self, channels: int):
        super().__init__()
        self.intermediate_layer_idx = (0, 1, 2, 3)
        self.norm = nn.LayerNorm(channels)
        self.projects = nn.ModuleList(nn.Linear(channels, 2 * PATCH * PATCH) for _ in range(4))

    def forward(self, feats, H: int, W: int, patch_start_idx: int, chunk_size: int = 8) -> Outputs:
        batch, views = feats[0][0].shape[:2]
        parts = []
        for start in range(0, batch * views, chunk_size):
            layers = [
                tokens.flatten(0, 1)[start : start + chunk_size, patch_start_idx:] for tokens, _ in feats
            ]
            pairs = zip(self.projects, layers, strict=True)
            pixels = sum(project(self.norm(tokens)) for project, tokens in pairs)
            grid = pixels.transpose(1, 2).unflatten(2, (H // PATCH, W // PATCH))
            parts.append(F.pixel_shuffle(grid, PATCH))
        maps = torch.cat(parts).unflatten(0, (batch, views))  # [B, S, 2, H, W]
        return Outputs(depth=maps[:, :, 0].exp(), depth_conf=1 + maps[:, :, 1].exp())


class CameraEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, CHANNELS)

    def forward(self, extrinsics: Tensor, intrinsics: Tensor | None, size: Sequence[int]) -> Tensor:
        return self.layer(extrinsics.flatten(2))


class Net(nn.Module):
    """The net: of all views, or of each alone where no block sees all frames."""

    def __init__(self, start: int, depth: int, gated: bool = False):
        super().__init__()
        width = CHANNELS if start == -1 else 2 * CHANNELS
        self.backbone, self.head = Backbone(start, depth, gated), Head(width)
        self.cam_dec = None if start == -1 else nn.Linear(width, 9)
        self.cam_enc = None if start == -1 else CameraEncoder()

    def forward(
        self,
        x: Tensor,
        extrinsics: Tensor | None = None,
        intrinsics: Tensor | None = None,
        export_feat_layers: Sequence[int] = (),
        ref_view_strategy: str = "middle",
    ) -> Outputs:
        token = None
        if extrinsics is not None and self.cam_enc is not None:
            token = self.cam_enc(extrinsics, intrinsics, x.shape[-2:])
        feats, features = self.backbone(
            x, cam_token=token, export_feat_layers=export_feat_layers, ref_view_strategy=ref_view_strategy
        )
        with torch.autocast(x.device.type, enabled=False):
            output = self.head(feats, *x.shape[-2:], patch_start_idx=0)
            if self.cam_dec is not None:
                encoding = self.cam_dec(feats[-1][1]).sigmoid()  # fields of view of less than 1
                poses, output.intrinsics = decode_pose_encoding(encoding, *x.shape[-2:])  # camera-to-world
                output.extrinsics = inverted(poses)
        output.aux = Outputs(
            {f"feat_layer_{i}": f for i, f in zip(export_feat_layers, features, strict=True)}
        )
        return output


class Nested(nn.Module):
    """A net of all views, whose depth takes its scale from a metric one."""

    def __init__(self, start: int, depth: int):
        super().__init__()
        self.da3, self.da3_metric = Net(start, depth), Net(-1, 4)

    def forward(self, x: Tensor, *args, **kwargs) -> Outputs:
        output, metric = self.da3(x, *args, **kwargs), self.da3_metric(x)
        scale, other = (found.depth.flatten(1).median(1).values for found in (metric, output))
        output.depth = output.depth * (scale / other)[:, None, None, None]
        return output


class Wrapper(nn.Module):
    """The class that users load, around a net or a nested one."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @torch.inference_mode()
    def forward(self, image: Tensor, *args, **kwargs) -> Outputs:
        with torch.autocast(image.device.type, dtype=torch.bfloat16):
            return self.model(image, *args, **kwargs)


def outputs(model: Any, images: Tensor) -> list[Tensor]:
    """What a user gets of images, features of two layers among it."""
    found = model(images, export_feat_layers=(5, 6))
    return [*(value for value in found.values() if isinstance(value, Tensor)), *found.aux.values()]


def subject(name: str, build: Callable[[], nn.Module], **settings: Any) -> Subject:
    def seeded(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build().eval()

    return Subject(
        name, "depth-anything-3", seeded, PATCH, 1, outputs, outputs, refused=("output_device",), **settings
    )


DOUBLES = [
    subject("depth-anything-3", lambda: Net(4, 10), compiles=10),
    # As the giant: global block first, network with a gate.
    subject("depth-anything-3 giant", lambda: Net(3, 8, gated=True), compiles=8, variant=True),
]
