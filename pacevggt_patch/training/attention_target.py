"""What the unpruned model attends to: the target of the scorer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..hosts.base import BlockCall
from ..patching.install import observing, state_of
from ..patching.state import Clip
from ..runtime.attention import InterceptAttention

# Patch tokens of a clip whose attention is looked at, evenly spread; camera and register tokens are all looked at.
PATCH_QUERIES = 256
# The attention weights of a chunk of queries stay below this (unless those of a single query do not).
CHUNK_BYTES = 2**28


@torch.no_grad()
def attention_target(
    model: nn.Module, images: Tensor, patch_queries: int = PATCH_QUERIES
) -> tuple[Tensor, Tensor]:
    """Features that are scored, and the attention that each patch token receives in the unpruned global blocks.

    The mean over all global blocks, heads, and the queries: all camera and register tokens of the clip and
    `patch_queries` of its patch tokens. The full matrix of attention never exists.

    Args:
        model: an accelerated model; what it prunes is left aside.
        images: [B, S, 3, H, W] in [0, 1].
        patch_queries: how many patch tokens of a clip are asked; all of them, if there are no more.

    Returns:
        Features [B, S, P, C], and attention [B, S, P] (float32), not negative; over a clip it sums to at most 1: the
        rest goes to camera and register tokens.

    Raises:
        UnsupportedModelError: the model's global blocks do not call `scaled_dot_product_attention`.
    """
    host = state_of(model).host
    batch, frames, special = *images.shape[:2], host.special_tokens
    patches = images.shape[-2] * images.shape[-1] // host.patch_size**2
    queries = chosen_queries(frames, special + patches, special, patch_queries, images.device)
    received = torch.zeros(batch, frames * (special + patches), device=images.device)
    features: list[Tensor] = []
    seen = 0

    def look(run: Callable, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        nonlocal seen
        seen += 1
        scale = options.get("scale")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        received.add_(attention_received(query[:, :, queries] * scale, key))
        return run(query, key, value)

    def observer(index: int, call: BlockCall, own: Callable, clip: Clip) -> Any:
        if not features:
            features.extend(part for part, _ in clip.parts)
        args, kwargs = call.arguments()
        with InterceptAttention(look):
            return own(*args, **kwargs)

    with observing(model, observer):
        host.trunk(images)
    if seen == 0:
        raise UnsupportedModelError(
            "the global blocks of this model do not call scaled_dot_product_attention, so what they attend to can't be "
            "seen: train without the first stage (--distil 0)"
        )
    found = torch.cat(features).unflatten(0, (batch, frames))
    return found, (received / seen).unflatten(1, (frames, -1))[:, :, special:]


def chosen_queries(
    frames: int, length: int, special: int, patch_queries: int, device: torch.device
) -> Tensor:
    """Numbers [n] of the tokens of a clip that are asked: all special ones, and patch tokens evenly spread.

    Args:
        frames: S.
        length: tokens of a frame, the `special` ones first.
        special: camera and register tokens of a frame.
        patch_queries: how many patch tokens; all if there are no more.
        device: where the result lies; made there, nothing waits.
    """
    numbers = torch.arange(frames * length, device=device).view(frames, length)
    patches = numbers[:, special:].flatten()
    count = min(patch_queries, len(patches))
    # The middles of `count` equal parts.
    places = (torch.arange(count, device=device) * 2 + 1) * len(patches) // (2 * max(count, 1))
    return torch.cat([numbers[:, :special].flatten(), patches[places]])


def attention_received(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention that each key receives, mean over heads and queries, a chunk of queries at a time.

    Args:
        queries: [B, heads, Q, d], scaled.
        keys: [B, heads, L, d].

    Returns:
        [B, L] (float32), sums to 1.
    """
    batch, heads, count, _ = queries.shape
    chunk = max(1, CHUNK_BYTES // (4 * batch * heads * keys.shape[2]))
    total = torch.zeros(batch, keys.shape[2], device=keys.device)
    for part in queries.split(chunk, dim=2):
        total += (part @ keys.mT).float().softmax(-1).sum((1, 2))
    return total / (heads * count)
