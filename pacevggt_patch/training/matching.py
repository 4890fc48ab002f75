"""Find the heads of global attention that must see all tokens, from what the others would lose: no gradient steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backbone
from ..assignment import assign
from ..config import PaceError, UnsupportedModelError
from ..following import Following, following
from ..matching import Heads, attend
from ..scorer import TokenScorer, token_scores
from .passes import half_precision

KEEP_RATIO = 0.3
# A head matches if its output, with the kept tokens alone, is off by this share of the variance of the tokens that it
# is added to. VGGT-mini has two of 32 above 0.03, on rooms and photographs alike, and the next below 0.023.
LEAST_ERROR = 0.02
# At most this share of all heads: each costs as much as it does in the unpruned model.
MOST = 1 / 16


@torch.no_grad()
def find_matching_heads(
    model: Any, clips: Iterable[Tensor], scorer: TokenScorer | None = None
) -> tuple[Heads, Tensor]:
    """The heads that find what matches between frames, see `matching.MatchingHeads`.

    The unpruned model runs on every clip. In each global block, each head's output is compared with what it would be if
    the head saw the kept tokens at keep ratio 0.3 alone.

    Args:
        model: any VGGT that `accelerate` takes, accelerated or not.
        clips: images [S, 3, H, W] or [B, S, 3, H, W] in [0, 1] on the model's device.
        scorer: which ranks the tokens; None is training-free.

    Returns:
        (block, head) of those with the largest errors, and the errors of all heads [blocks, heads], each over the
        variance of the tokens that its output is added to.

    Raises:
        PaceError: there are no clips (`UnsupportedModelError`: the global blocks are of another make).
    """
    aggregator = backbone.find_host(model).aggregator
    sums: list[Tensor] = []
    for images in clips:
        images = images[None] if images.ndim == 4 else images
        with half_precision(images):
            sums.append(head_errors(aggregator, images, scorer))
    if not sums:
        raise PaceError("finding the matching heads needs at least one clip, got none")
    errors = torch.stack(sums).mean(0)  # [blocks, heads]
    heads = errors.shape[1]
    most = max(1, int(MOST * errors.numel()))
    best = errors.flatten().topk(most)
    chosen = [int(i) for value, i in zip(best.values, best.indices, strict=True) if value >= LEAST_ERROR]
    return tuple(sorted((i // heads, i % heads) for i in chosen)), errors


def head_errors(aggregator: Any, images: Tensor, scorer: TokenScorer | None) -> Tensor:
    """Errors [blocks, heads] of all heads on clips [B, S, 3, H, W]."""
    grid = backbone.check_images(aggregator, images, None)
    batch, frames = images.shape[:2]
    features = backbone.patch_tokens(aggregator, images)  # [B, S, P, C]
    keep = max(1, round(KEEP_RATIO * features.shape[2]))
    kept = assign(token_scores(features, grid, keep, scorer), keep, 0).kept
    special = backbone.special_tokens(aggregator, batch, frames)  # [B, S, n, C]
    tokens = torch.cat([special, features], dim=2)
    n = special.shape[2]
    followed = following(features.flatten(0, 1), kept.flatten(0, 1), grid, n, torch.float32)
    positions = backbone.rope_positions(aggregator, grid, images.device)
    if positions is not None:
        positions = F.pad(positions, (0, 0, n, 0)).repeat(batch, frames, 1, 1)
    missed: list[Tensor] = []

    def look(number: int, query: Tensor, key: Tensor, value: Tensor, scale: float):
        matrix = backbone.attention_output(aggregator, number).float()  # [C, C]
        missed.append(errors_of_heads(query, key, value, scale, followed, matrix))
        return query, key, value

    layers = tuple(range(backbone.depth(aggregator)))
    outputs = backbone.alternating_attention(aggregator, tokens, positions, layers, change=look)
    if len(missed) != len(layers):
        raise UnsupportedModelError(
            f"{len(layers)} global blocks of this model called scaled_dot_product_attention {len(missed)} times, so "
            "what its heads lose can't be told"
        )
    channels = tokens.shape[-1]
    # What enters a global block is the output of the frame block before it.
    spread = [outputs[i][..., :channels].float().flatten(0, 2).var(0, unbiased=False).sum() for i in layers]
    return torch.stack(missed) / torch.stack(spread)[:, None]


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
    heads, width = query.shape[1], query.shape[-1]
    query, key, value = (t.to(value.dtype) for t in (query, key, value))

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)

    whole = attention(query, key, value)
    off = (attend(query, key, value, (), followed, attention) - whole).float()  # [B, heads, L, d]
    with torch.autocast(off.device.type, enabled=False):
        parts = matrix.view(-1, heads, width)  # [C, heads, d]
        return torch.stack(
            [(off[:, head] @ parts[:, head].T).square().sum(-1).mean() for head in range(heads)]
        )
