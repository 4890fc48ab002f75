"""Find the heads of global attention that must see all tokens, from what the others would lose: no gradient steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PaceError, UnsupportedModelError
from ..hosts import vggt as backbone
from ..method.full_heads import Heads, attend
from ..method.propagation import Following, following
from ..method.scoring import token_scores
from ..method.selection import assign
from ..training.passes import half_precision

KEEP_RATIO = 0.3
# A head matches if its output, with the kept tokens alone, is off by this share of the variance of the tokens that it
# is added to. Of VGGT-mini's 28 before the last block the fifth has 0.009 on rooms and 0.011 on photographs, the sixth
# 0.0055 and 0.0099: there MOST leaves it out.
LEAST_ERROR = 0.007
# At most this share of all heads: their attention costs what it does in the unpruned model, and their blocks run on all
# tokens but for the attention of the other heads.
MOST = 1 / 6


@torch.no_grad()
def find_matching_heads(model: Any, clips: Iterable[Tensor]) -> tuple[Heads, Tensor]:
    """The heads that find what matches between frames, see `matching.MatchingHeads`.

    The unpruned model runs on every clip. In each global block, each head's output is compared with what it would be if
    the head saw the kept tokens at keep ratio 0.3 alone, those that are kept training-free.

    Args:
        model: any VGGT that `accelerate` takes, accelerated or not; weights in force are left aside.
        clips: images [S, 3, H, W] or [B, S, 3, H, W] in [0, 1] on the model's device.

    Returns:
        (block, head) of those with the largest errors, but for the last block, to whose output no other attends;
        and the errors of all heads [blocks, heads], each over the variance of the tokens that its output is added to.

    Raises:
        PaceError: there are no clips, one has a single frame, or images do not fit.
        UnsupportedModelError: the global blocks are of another make.
    """
    aggregator = backbone.find_host(model).aggregator
    found: list[Tensor] = []
    for images in clips:
        images = images[None] if images.ndim == 4 else images
        if images.ndim == 5 and images.shape[1] < 2:
            raise PaceError("which heads find matches between frames can't be told from a clip of one frame")
        with half_precision(images):
            found.append(head_errors(aggregator, images))
    if not found:
        raise PaceError("finding the matching heads needs at least one clip, got none")
    errors = torch.stack(found).mean(0)  # [blocks, heads]
    heads, before_last = errors.shape[1], errors[:-1].flatten()
    most = min(max(1, int(MOST * errors.numel())), len(before_last))
    best = before_last.topk(most)
    chosen = [int(i) for value, i in zip(best.values, best.indices, strict=True) if value >= LEAST_ERROR]
    return tuple(sorted((i // heads, i % heads) for i in chosen)), errors


def head_errors(aggregator: Any, images: Tensor) -> Tensor:
    """Errors [blocks, heads] of all heads on clips [B, S, 3, H, W]."""
    grid = backbone.check_images(aggregator, images, None)
    features, tokens, positions = backbone.unpruned_tokens(aggregator, images, grid)
    keep = max(1, round(KEEP_RATIO * features.shape[2]))
    kept = assign(token_scores(features, grid, keep), keep, 0).kept
    special = tokens.shape[2] - features.shape[2]
    followed = following(features.flatten(0, 1), kept.flatten(0, 1), grid, special, torch.float32)
    missed: list[Tensor] = []
    variances: list[Tensor] = []

    def measure(module: Any, args: tuple) -> None:
        variances.append(args[0].float().flatten(0, -2).var(0, unbiased=False).sum())

    def look(number: int, query: Tensor, key: Tensor, value: Tensor, scale: float):
        matrix = backbone.attention_output(aggregator, number).float()  # [C, C]
        missed.append(errors_of_heads(query, key, value, scale, followed, matrix))
        return query, key, value

    blocks = backbone.depth(aggregator)
    hooks = [block.register_forward_pre_hook(measure) for block in aggregator.global_blocks]
    try:
        backbone.alternating_attention(aggregator, tokens, positions, (), change=look)
    finally:
        for hook in hooks:
            hook.remove()
    if not len(missed) == len(variances) == blocks:
        raise UnsupportedModelError(
            f"{blocks} global blocks of this model called scaled_dot_product_attention {len(missed)} times, so what "
            "their heads lose can't be told"
        )
    return torch.stack(missed) / torch.stack(variances)[:, None]


def errors_of_heads(
    query: Tensor, key: Tensor, value: Tensor, scale: float, followed: Following, matrix: Tensor
) -> Tensor:
    """Mean squares [heads] of how far each head's part of the block's output is off, over all tokens.

    Args:
        query, key, value: [B, heads, S * (n + P), d].
        scale: factor of the products of queries and keys.
        followed: which tokens are kept.
        matrix: from the outputs of all heads to what is added to the tokens, [C, heads * d].
    """
    batch, heads, tokens, width = query.shape
    dtype = value.dtype  # autocast leaves queries and keys in float32
    query, key = query.to(dtype), key.to(dtype)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)

    whole = attention(query, key, value)
    off = (attend(query, key, value, (), followed, attention) - whole).float()  # [B, heads, L, d]
    with torch.autocast(off.device.type, enabled=False):
        # |M e|^2 = tr(M^T M e e^T), which needs no tensor of L x C.
        parts = matrix.view(-1, heads, width).transpose(0, 1)  # [heads, C, d]
        squares = (parts.mT @ parts) * (off.mT @ off).sum(0)  # [heads, d, d]
        return squares.sum((1, 2)) / (batch * tokens)
