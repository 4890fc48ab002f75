"""Depth Anything 3 (arXiv 2511.10647): one vision transformer, whose later blocks see a view and all views in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PaceError
from .base import PACKAGES, BackboneSpec, Host, Package, register_host
from .rope import static_rope

PACKAGES["depth-anything-3"] = Package(
    "depth_anything_3.api",
    "DepthAnything3",
    14,
    "https://github.com/ByteDance-Seed/Depth-Anything-3",
    "depth-anything/DA3-LARGE",
    part="model",
)

# What tells that a module is a net, and what its transformer must have.
CLUES = ("blocks", "patch_embed", "alt_start")
PARTS = ("camera_token", "num_register_tokens", "patch_size", "embed_dim")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of images
# Where a net is: the model itself, the one of all views beside a metric one, and either in the class of the API.
PLACES = ("", "da3", "model", "model.da3")


class DepthAnything3(Host):
    """A Depth Anything 3 of all views: small, base, large or giant, nested or not, with or without its API around it.

    Blocks from `alt_start` on are of frames where their number is even, and global where it is odd. They are given the
    views in an order of the model's own, the reference view first.
    """

    family = "depth-anything-3"
    image_argument, image_values = "x", "ImageNet's normalisation"
    image_limits, image_advice = (-4.5, 5.0), "let the package's input processor load them"
    embedding_name, rope_name = "pretrained.patch_embed", "pretrained.rope"
    embedding_stage, reorders_frames = "patch embedding", True

    def __init__(self, model: nn.Module, place: str):
        net: Any = model.get_submodule(place)
        within = f"{place}." if place else ""
        self.model, self.trunk, self.trunk_name = model, net.backbone, f"{within}backbone"
        self.in_api = place.startswith("model")
        vit = self.vit = net.backbone.pretrained
        self.embedding = vit.patch_embed
        start, self.first_pair = int(vit.alt_start), int(vit.alt_start) // 2
        every, kinds = list(enumerate(vit.blocks)), ("frame", "global")
        alternating = [(kinds[i % 2], i // 2 - self.first_pair, block) for i, block in every[start:]]
        self.blocks = (*(("early", i, block) for i, block in every[:start]), *alternating)
        self.first_norm = alternating[0][2].norm1
        self.depth = alternating[-1][1] + 1
        self.special_tokens, self.patch_size = 1 + int(vit.num_register_tokens), int(vit.patch_size)
        self.embed_dim = int(vit.embed_dim)
        rope = getattr(vit, "rope", None)
        self.rope = None if rope is None or static_rope(rope) is None else rope
        self.dense_heads = {
            f"{within}{name}": module
            for name, module in net.named_children()
            if isinstance(getattr(module, "intermediate_layer_idx", None), (list, tuple))
        }
        self.cached_layers = tuple(sorted(self.trunk.out_layers))

    def block_name(self, kind: str, index: int) -> str:
        number = index if kind == "early" else 2 * (index + self.first_pair) + (kind == "global")
        return f"pretrained.blocks.{number}"

    def special_parameters(self) -> list[Tensor]:
        return [self.vit.camera_token]

    def scored(self, tokens: Tensor) -> Tensor:
        # Between blocks a few channels may be large in all tokens. What a block reads is normalised.
        return self.first_norm.forward(tokens)  # nobody's hooks are called

    def frame_positions(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        rows, columns = (torch.arange(1, n + 1, device=device) for n in grid)
        return F.pad(torch.cartesian_prod(rows, columns), (0, 0, self.special_tokens, 0))

    def model_images(self, images: Tensor) -> Tensor:
        if self.in_api:
            raise PaceError(
                f"{type(self.model).__name__} can't be called with images alone: pass the net in it (model.model)"
            )
        mean, deviation = (images.new_tensor(values).view(3, 1, 1) for values in IMAGENET)
        return ((images - mean) / deviation)[None]

    def predictions(self, outputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return {
            "world_to_camera": outputs["extrinsics"][..., :3, :],
            "intrinsics": outputs["intrinsics"],
            "depth": outputs["depth"][..., None],
            "depth_conf": outputs["depth_conf"],
        }

    def refusals(self) -> dict[str, str]:
        why = f"{type(self.model).__name__} goes on with what its head gives where the images are"
        return {"output_device": why}

    def spec(self) -> BackboneSpec:
        # The heads count the layers that they are given.
        return replace(super().spec(), cached_layers=self.cached_layers)


@register_host("depth-anything-3")
def find_depth_anything_3(model: nn.Module) -> DepthAnything3 | str | None:
    """The Host of a Depth Anything 3, or why it is none."""
    kind, reason = type(model).__name__, None
    for place in PLACES:
        try:
            net: Any = model.get_submodule(place)
        except AttributeError:
            continue
        vit: Any = getattr(getattr(net, "backbone", None), "pretrained", None)
        if any(not hasattr(vit, name) for name in CLUES):
            continue
        where = ".".join(name for name in (kind, place) if name)
        if vit.alt_start == -1:
            reason = (
                f"{where} is a Depth Anything 3 without global blocks, as the mono and metric models are: it sees each "
                "image alone, so there is nothing to prune"
            )
            continue
        missing = [name for name in PARTS if not hasattr(vit, name)]
        if missing:
            return f"{where}.backbone.pretrained lacks {', '.join(missing)}, which a Depth Anything 3 has"
        return DepthAnything3(model, place)
    vit = getattr(model, "pretrained", model)
    if reason is None and all(hasattr(vit, name) for name in CLUES):
        return f"{kind} is the backbone of a Depth Anything 3: pass the net that holds it"
    return reason
