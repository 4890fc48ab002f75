"""Pi3 and Pi3X (arXiv 2507.13347): one list of blocks, of frames and of the clip in turn, recognised by its parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Host, register_host
from .rope import static_rope

# What makes a model look like one, and what its blocks are called with.
CLUES = ("encoder", "decoder", "register_token")
PARTS = ("decode", "patch_start_idx", "patch_size")
# What turns the last layers into points, confidence and cameras: blocks within frames.
HEADS = ("point_decoder", "conf_decoder", "camera_decoder")


class Pi3(Host):
    """A Pi3, as `yyfz/Pi3` has it, or a model with the same parts. The model itself runs the blocks."""

    family = "pi3"
    image_argument, position_argument = "imgs", "xpos"
    trunk_name, embedding_name = "", "encoder"

    def __init__(self, model: Any):
        self.model, self.trunk, self.embedding = model, model, model.encoder
        self.special_tokens, self.patch_size = int(model.patch_start_idx), int(model.patch_size)
        self.embed_dim = model.register_token.shape[-1]
        self.depth = len(model.decoder) // 2
        kinds = ("frame", "global")
        self.blocks = tuple((kinds[i % 2], i // 2, block) for i, block in enumerate(model.decoder))
        rope = getattr(model, "rope", None)
        self.rope = None if rope is None or static_rope(rope) is None else rope

    def block_name(self, kind: str, index: int) -> str:
        return f"decoder.{2 * index + (kind == 'global')}"

    def side_blocks(self) -> dict[str, Any]:
        heads = ((name, getattr(self.model, name, None)) for name in HEADS)
        return super().side_blocks() | {
            f"{name}.blocks.{index}": block
            for name, head in heads
            for index, block in enumerate(getattr(head, "blocks", ()))
        }

    def special_parameters(self) -> list[Tensor]:
        token: Any = self.model.register_token
        return [token]

    def mean_dtype(self, images: Tensor) -> torch.dtype:
        return getattr(self.model, "image_mean", images).dtype

    def rope_dtype(self, dtype: torch.dtype, narrow: torch.dtype | None) -> torch.dtype:
        # Queries and keys are cast to the dtype of values before they are rotated.
        return dtype if narrow is None else narrow


@register_host("pi3")
def find_pi3(model: nn.Module) -> Pi3 | str | None:
    """The Host of a Pi3, or why it is none."""
    if not all(hasattr(model, name) for name in CLUES):
        return None
    kind = type(model).__name__
    missing = [name for name in PARTS if not hasattr(model, name)]
    if missing:
        return f"{kind} lacks {', '.join(missing)}: of models with encoder and decoder only Pi3 is supported"
    decoder: Any = model.decoder
    if not isinstance(decoder, nn.ModuleList) or not len(decoder) or len(decoder) % 2:
        return f"{kind}.decoder is not a list of blocks of frames and of the clip in turn, as in Pi3"
    return Pi3(model)
