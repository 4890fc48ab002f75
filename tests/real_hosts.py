"""Sibling models by their own classes, small and with random weights, where their packages can be imported.

The environment variable PACEVGGT_HOSTS names folders that hold them, separated as in PATH.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conformance import Subject
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
with_random_weights = importlib.import_module("random_weights").with_random_weights

CHANNELS = 32
WHERE = "put its checkout into PACEVGGT_HOSTS"


def load(name: str) -> Any:
    """A module of a package that is installed or in one of the folders."""
    folders = [folder for folder in os.environ.get("PACEVGGT_HOSTS", "").split(os.pathsep) if folder]
    sys.path += [folder for folder in folders if folder not in sys.path]
    return importlib.import_module(name)


def missing(name: str) -> str | None:
    """Why a module can't be imported, in words, or None."""
    try:
        load(name)
    except ImportError as error:
        return f"{name} can't be imported ({error}): {WHERE}"
    return None


def bare(kind: type) -> Any:
    """A module of a class, without its own parts: they are of full size."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    return module


def pi3(seed: int, *, multimodal: bool | None = None) -> Any:
    """A Pi3 of C=32 and 4 + 4 blocks; a Pi3X where it is told whether to take more than images."""
    name = "pi3" if multimodal is None else "pi3x"
    source = load(f"pi3.models.{name}")
    vit = load("pi3.models.dinov2.models.vision_transformer").DinoVisionTransformer
    decoder_class = load("pi3.models.layers.transformer_head").TransformerDecoder
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = bare(source.Pi3 if multimodal is None else source.Pi3X)
        model.patch_size, model.patch_start_idx, model.dec_embed_dim = 14, 5, CHANNELS
        model.encoder = vit(
            img_size=56, patch_size=14, embed_dim=CHANNELS, depth=2, num_heads=2, mlp_ratio=4, init_values=1.0,
            block_chunks=0, num_register_tokens=4,
        )  # fmt: skip
        model.pos_type, model.rope = "rope100", source.RoPE2D(freq=100.0)
        model.position_getter = source.PositionGetter()
        model.decoder = nn.ModuleList(
            source.BlockRope(
                dim=CHANNELS, num_heads=2, mlp_ratio=4, qkv_bias=True, proj_bias=True, ffn_bias=True, drop_path=0.0,
                norm_layer=partial(nn.LayerNorm, eps=1e-6), act_layer=nn.GELU, ffn_layer=source.Mlp, init_values=0.01,
                qk_norm=True, attn_class=source.FlashAttentionRope, rope=model.rope,
            )
            for _ in range(8)
        )  # fmt: skip
        model.register_token = nn.Parameter(torch.randn(1, 1, 5, CHANNELS))
        parts = {"point": CHANNELS, "conf": CHANNELS, "camera": 16}
        for part, out in parts.items():
            decoder = decoder_class(
                in_dim=2 * CHANNELS,
                dec_embed_dim=CHANNELS,
                dec_num_heads=2,
                out_dim=out,
                depth=2,
                rope=model.rope,
            )
            setattr(model, f"{part}_decoder", decoder)
        model.camera_head = source.CameraHead(dim=16)
        _add_heads(model, source, multimodal)
        for name, values in (("image_mean", (0.485, 0.456, 0.406)), ("image_std", (0.229, 0.224, 0.225))):
            model.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
    return with_random_weights(model, seed)


def _add_heads(model: Any, source: Any, multimodal: bool | None) -> None:
    if multimodal is None:
        model.point_head, model.conf_head = (source.LinearPts3d(14, CHANNELS, out) for out in (3, 1))
        return
    model.use_multimodal = multimodal
    for part, out in (("point", [2, 1]), ("conf", [1])):
        head = source.ConvHead(
            num_features=4, dim_in=CHANNELS, projects=nn.Identity(), dim_out=out, dim_proj=CHANNELS,
            dim_upsample=[16, 16, 16], dim_times_res_block_hidden=2, num_res_blocks=1, res_block_norm="group_norm",
            last_res_blocks=0, last_conv_channels=8, last_conv_size=1, using_uv=True,
        )  # fmt: skip
        setattr(model, f"{part}_head", head)
    model.metric_token = nn.Parameter(torch.randn(1, 1, 2 * CHANNELS))
    model.metric_decoder = source.ContextOnlyTransformerDecoder(
        in_dim=2 * CHANNELS,
        dec_embed_dim=CHANNELS,
        dec_num_heads=2,
        out_dim=CHANNELS,
        depth=1,
        rope=model.rope,
    )
    model.metric_head = nn.Linear(CHANNELS, 1)


def pi3x(seed: int) -> Any:
    """A Pi3X that takes images alone."""
    return pi3(seed, multimodal=False)


def vggt_omega(seed: int) -> Any:
    """A VGGT-Omega of C=32 and 6 + 6 blocks, two of them of register attention."""
    from unittest import mock

    source = load("vggt_omega.models.aggregator")
    heads = load("vggt_omega.models.heads")
    vit = load("vggt_omega.models.layers.vision_transformer").DinoVisionTransformer

    def small(patch_size: int, embed_dim: int) -> Any:
        return vit(
            patch_size=patch_size, embed_dim=embed_dim, depth=2, num_heads=2, ffn_ratio=4, layerscale_init=0.1,
            pos_embed_rope_normalize_coords="max", pos_embed_rope_dtype="fp32", norm_layer="layernormbf16",
            n_storage_tokens=4, mask_k_bias=True,
        )  # fmt: skip

    layers = (1, 2, 4, 5)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = bare(load("vggt_omega.models.vggt_omega").VGGTOmega)
        with mock.patch.object(source, "_build_patch_embed", small):
            model.aggregator = source.Aggregator(
                embed_dim=CHANNELS, depth=6, num_heads=2, register_attention_block_indices=[1, 4],
                cached_layer_indices=layers,
            )  # fmt: skip
        model.aggregator.patch_embed.init_weights()
        model.camera_head = heads.CameraHead(dim_in=2 * CHANNELS)
        model.dense_head = heads.DenseHead(
            dim_in=2 * CHANNELS, features=16, out_channels=[8, 8, 16, 16], intermediate_layer_idx=list(layers)
        )
        model.text_alignment_head = None
    return with_random_weights(model, seed)


def subject(name: str, family: str, build: Callable[[int], Any], module: str, **settings: Any) -> Subject:
    return Subject(f"{name} (its own classes)", family, build, missing=missing(module), **settings)


def decoded(model: Any, images: Any) -> Any:
    """What a Pi3 makes of images before its heads."""
    tokens = model.encoder(images.flatten(0, 1), is_training=True)["x_norm_patchtokens"]
    return model.decode(tokens, *images.shape[1:2], *images.shape[-2:])


def decoded_by_pi3x(model: Any, images: Any) -> Any:
    tokens = model.encoder(images.flatten(0, 1), is_training=True)["x_norm_patchtokens"]
    return model.decode(tokens, *images.shape[1:2], *images.shape[-2:], None, None)


PI3: dict[str, Any] = dict(patch_size=14, special=5, refused=("head_dtype", "output_device"))
REAL = [
    subject("pi3", "pi3", pi3, "pi3.models.pi3", compiles=16, inner=decoded, **PI3),
    subject(
        "pi3x", "pi3", partial(pi3, multimodal=False), "pi3.models.pi3x", compiles=16, inner=decoded_by_pi3x,
        gradients=False, **PI3,
    ),
    subject(
        "vggt-omega", "vggt-omega", vggt_omega, "vggt_omega.models", patch_size=16, special=17, compiles=10,
        special_blocks=(1, 4), refused=("head_dtype",), inner=lambda model, images: model.aggregator(images),
    ),
]  # fmt: skip
