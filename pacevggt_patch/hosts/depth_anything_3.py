"""Depth Anything 3: one vision transformer, some of whose later blocks attend over all frames."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..runtime.bare_copy import unwrapped
from .base import BackboneSpec, BlockCall, Host, register_host
from .rope import static_rope

# Where the net is: the model itself, beside a metric one, and inside the class of the package's API.
PLACES = ("", "da3", "model", "model.da3")
PARTS = ("blocks", "patch_embed", "alt_start", "patch_size", "cls_token", "embed_dim")


class DepthAnything3(Host):
    """A Depth Anything 3 (arXiv 2511.10647) with global blocks: small, base, large, giant, or nested."""

    family = "depth-anything-3"
    embedding_name = "pretrained.patch_embed"

    def __init__(self, model: nn.Module, place: str):
        net: Any = model.get_submodule(place)
        within = f"{place}." if place else ""
        self.model, self.trunk, self.trunk_name = model, net.backbone, f"{within}backbone"
        vit = self.vit = self.trunk.pretrained
        self.embedding = vit.patch_embed
        counts = {"frame": 0, "global": 0}
        self.numbers: dict[tuple[str, int], int] = {}
        for number in range(vit.alt_start, len(vit.blocks)):
            kind = "global" if number % 2 else "frame"
            self.numbers[kind, counts[kind]] = number
            counts[kind] += 1
        self.blocks = tuple((kind, i, vit.blocks[number]) for (kind, i), number in self.numbers.items())
        self.depth, self.embed_dim = counts["global"], vit.embed_dim
        self.special_tokens = 1 + int(getattr(vit, "num_register_tokens", 0))
        self.patch_size = int(vit.patch_size)
        rope = getattr(vit, "rope", None)
        self.rope = None if rope is None or static_rope(rope) is None else rope
        self.camera_head = None
        self.dense_heads = {
            f"{within}{name}": module
            for name, module in net.named_children()
            if isinstance(getattr(module, "intermediate_layer_idx", None), (list, tuple))
        }
        self.cached_layers = tuple(sorted(self.trunk.out_layers))

    @property
    def reference(self) -> Tensor:
        return self.vit.cls_token

    def block_name(self, kind: str, index: int) -> str:
        return f"pretrained.blocks.{self.numbers[kind, index]}"

    def block_call(self, args: tuple, kwargs: dict[str, Any]) -> BlockCall | None:
        kwargs = dict(kwargs)
        x, rest = (args[0], args[1:]) if args else (kwargs.pop("x", None), ())
        if not isinstance(x, Tensor) or x.ndim != 3:
            return None
        return BlockCall(x, kwargs.pop("pos", None), rest, kwargs, "pos")

    def fingerprint_tensors(self) -> list[Tensor]:
        tokens = [self.vit.cls_token, self.vit.camera_token]
        return tokens + [p for b in (self.blocks[0][2], self.blocks[-1][2]) for p in b.parameters()]


@register_host("depth-anything-3")
def find_depth_anything_3(model: nn.Module) -> DepthAnything3 | str | None:
    """The Host of a Depth Anything 3, or why it is none."""
    kind, reason = type(model).__name__, None
    for place in PLACES:
        try:
            net: Any = model.get_submodule(place)
        except AttributeError:
            continue
        vit = getattr(getattr(net, "backbone", None), "pretrained", None)
        if any(not hasattr(vit, name) for name in PARTS):
            continue
        if vit.alt_start != -1:
            return DepthAnything3(model, place)
    return reason
