"""VGGT-Omega: VGGT's alternation, in some places with register attention for global; recognised by its parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from .base import PACKAGES, BlockCall, Host, Package, register_host
from .vggt import VGGT

PACKAGES["vggt-omega"] = Package(
    "vggt_omega.models", "VGGTOmega", 16, "https://github.com/facebookresearch/vggt-omega"
)
PARTS = (
    "patch_embed",
    "frame_blocks",
    "inter_frame_attention_types",
    "patch_token_start",
    "patch_size",
    "cached_layer_indices",
)
# What a block between frames is called by the model, and what it is here.
KINDS = {"global": "global", "register": "special"}


class VGGTOmega(VGGT):
    """A VGGT-Omega, as `facebookresearch/vggt-omega` has it, or a model with the same parts.

    Blocks of register attention are given the special tokens alone, and run as they are.
    """

    family, by_tables = "vggt-omega", True
    narrow_weights, own_autocast = False, True

    def __init__(self, model: nn.Module):
        aggregator: Any = model._modules["aggregator"]
        self.model, self.trunk, self.embedding = model, aggregator, aggregator.patch_embed
        self.depth = len(aggregator.frame_blocks)
        self.special_tokens, self.patch_size = int(aggregator.patch_token_start), int(aggregator.patch_size)
        self.embed_dim = self._embed_dim(aggregator)
        across = zip(aggregator.inter_frame_attention_types, aggregator.inter_frame_blocks, strict=True)
        pairs = zip(aggregator.frame_blocks, across, strict=True)
        self.blocks = tuple(
            block
            for i, (within, (kind, between)) in enumerate(pairs)
            for block in (("frame", i, within), (KINDS[kind], i, between))
        )
        self.dense_heads = self._dense_heads(model)
        self.cached_layers = tuple(sorted(aggregator.cached_layer_indices))

    def block_name(self, kind: str, index: int) -> str:
        return f"frame_blocks.{index}" if kind == "frame" else f"inter_frame_blocks.{index}"

    def block_call(self, args: tuple, kwargs: dict[str, Any]) -> BlockCall | None:
        # Besides tokens a block is given sines and cosines of the patches of any frame, or None.
        call = super().block_call(args, kwargs)
        if call is None:
            return None
        tables = call.args[0] if len(call.args) == 1 and not call.kwargs else None
        return replace(call, shared=True, tables=tables)

    def side_blocks(self) -> dict[str, Any]:
        return {}  # those of DINOv3 are given lists of clips

    def refusals(self) -> dict[str, str]:
        return {"head_dtype": f"the dense head of {type(self.model).__name__} checks that it runs in float32"}

    def missing_stock_parts(self) -> list[str]:
        return Host.missing_stock_parts(self)


@register_host("vggt-omega")
def find_vggt_omega(model: nn.Module) -> VGGTOmega | str | None:
    """The Host of a VGGT-Omega, or why it is none."""
    aggregator: Any = model._modules.get("aggregator")
    if not hasattr(aggregator, "inter_frame_blocks"):
        return None
    kind = type(model).__name__
    missing = [name for name in PARTS if not hasattr(aggregator, name)]
    if missing:
        return f"{kind}.aggregator lacks {', '.join(missing)}, which a VGGT-Omega has"
    types = list(aggregator.inter_frame_attention_types)
    counts = len(aggregator.frame_blocks), len(aggregator.inter_frame_blocks), len(types)
    if len({*counts}) > 1 or not {*types} <= {*KINDS} or "global" not in types:
        return (
            f"{kind}.aggregator has {counts[0]} frame blocks and {counts[1]} between frames, of the types "
            f"{', '.join(sorted({*map(str, types)}))}: expected as many of each, global or register"
        )
    return VGGTOmega(model)
