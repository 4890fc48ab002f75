"""Depth Anything 3 by the package's own classes, small and with random weights, where it can be imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conformance import Subject, tensors
from real_hosts import CHANNELS, bare, missing, with_random_weights
from real_hosts import load as load_module
from torch import Tensor

FAMILY = "depth-anything-3"


def load(name: str) -> Any:
    return load_module(f"depth_anything_3.{name}")


def net(start: int, depth: int, seed: int, *, gated: bool = False) -> Any:
    """A net of C=32; one that sees each image alone for `start` -1."""
    da3, alternates = load("model.da3"), start != -1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trunk = bare(load("model.dinov2.dinov2").DinoV2)
        trunk.out_layers = [depth - 4, depth - 3, depth - 2, depth - 1]
        trunk.pretrained = load("model.dinov2.vision_transformer").DinoVisionTransformer(
            img_size=56, patch_size=14, embed_dim=CHANNELS, depth=depth, num_heads=4, alt_start=start,
            qknorm_start=start, rope_start=start, cat_token=alternates, ffn_layer="swiglufused" if gated else "mlp",
        )  # fmt: skip
        head = dict(features=16, out_channels=(8, 8, 16, 16))
        if not alternates:
            found = da3.DepthAnything3Net(trunk, load("model.dpt").DPT(CHANNELS, output_dim=1, **head))
        else:
            found = da3.DepthAnything3Net(
                trunk,
                load("model.dualdpt").DualDPT(2 * CHANNELS, **head),
                load("model.cam_dec").CameraDec(2 * CHANNELS),
                load("model.cam_enc").CameraEnc(CHANNELS, trunk_depth=1, num_heads=4),
            )
    return with_random_weights(found, seed)


def nested(start: int, depth: int, seed: int) -> Any:
    """A net of all views beside a metric one."""
    found = bare(load("model.da3").NestedDepthAnything3Net)
    found.da3, found.da3_metric = net(start, depth, seed), net(-1, 4, seed)
    return found.eval()


def outputs(model: Any, images: Tensor) -> list[Tensor]:
    """What a user gets of images: cameras, depth and its confidence, and features of two layers."""
    found = model(images, export_feat_layers=[5, 6])
    return tensors([dict(found, aux=dict(found.aux))])


def small(seed: int) -> Any:
    return net(4, 10, seed)


def small_giant(seed: int) -> Any:
    """As the giant it begins to alternate with a global block, and its networks have a gate."""
    return net(3, 8, seed, gated=True)


def subject(name: str, build: Callable[[int], Any], blocks: int, variant: bool = False) -> Subject:
    return Subject(
        f"{name} (its own classes)", FAMILY, build, 14, 1, outputs, outputs, compiles=blocks,
        refused=("output_device",), variant=variant, missing=missing("depth_anything_3.model.da3"),
    )  # fmt: skip


REAL = [subject("depth-anything-3", small, 10), subject("depth-anything-3 giant", small_giant, 8, True)]
