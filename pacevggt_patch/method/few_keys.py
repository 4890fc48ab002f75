"""Which keys a token sees in global attention: fewer of each frame the longer a clip is.

Most heads gather what many tokens have in common. Such a mean needs no more samples in a long clip than in a short one,
but its samples must stand for the whole frame: kept tokens alone would count special tokens and rare patches too often.
Full-attention heads look for matches. In a long clip a place is seen in many frames, so they do with some keys of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.attention import Repeats
from .propagation import FRAMES_PER_CHUNK, Propagation

# Up to so many frames every kept token is a key, and every token one of full-attention heads. Longer clips have as many
# keys as so many frames have such tokens,
FRAMES, FRAMES_OF_FULL = 24, 48
# and from here on more: the keys of a frame fall by this power of the number of frames.
LONG, POWER = 96, 1 / 3


class FewKeys(NamedTuple):
    """Which keys stand for those of all tokens of B clips.

    Attributes:
        index: [B, m] (int64) places among the tokens of a clip, some of them several times; those of special tokens and
            of the first frame come first. None: all of them in their order.
        counts: how many tokens each key stands for, as `runtime.attention.attention` takes it.
    """

    index: Tensor | None
    counts: Repeats | Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """Keys or values [B, heads, m, d] of those of all tokens that `index` counts."""
        if self.index is None:
            return tensor
        index = self.index[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
        return tensor.gather(2, index)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention: Callable[..., Tensor]) -> Tensor:
        """Attention [B, heads, L, d] of L queries to these keys.

        Args:
            query: [B, heads, L, d].
            key, value: of all tokens that `index` counts.
            attention: of queries, keys, values and `counts`.
        """
        return attention(query, self.of(key), self.of(value), self.counts)


def keys_of_frame(frames: int, tokens: int, short: int) -> int:
    """How many of K tokens of a frame are keys in a clip of S frames.

    K up to F frames, then K * F / S, and from LONG frames on K * F / LONG * (LONG / S) ** POWER.

    Args:
        frames: S.
        tokens: K, kept patch tokens, or of full-attention heads all of them.
        short: F, FRAMES or FRAMES_OF_FULL.
    """
    share = short / max(short, min(frames, LONG)) * (LONG / max(frames, LONG)) ** POWER
    return max(1, int(tokens * share))


def keys_of_clip(frames: int, special: int, patches: int, kept: int) -> int:
    """m: all keys of a clip of so many frames, of n special and P patch tokens each."""
    sampled = frames * special + patches + (frames - 1) * keys_of_frame(frames, kept, FRAMES)
    return min(frames * (special + kept), sampled)


def keys_of_full(frames: int, special: int, patches: int) -> int:
    """All keys of full-attention heads of such a clip."""
    count = keys_of_frame(frames, patches, FRAMES_OF_FULL)
    return frames * special + patches + (frames - 1) * count


def even_sample(frames: int, count: int, patches: int, device: torch.device) -> Tensor:
    """Numbers [S, count] of patch tokens, even over a frame in raster order and shifted from frame to frame."""
    period = math.ceil(patches / count)
    shift = torch.arange(frames, device=device) % period / period
    at = torch.arange(count, device=device) + shift[:, None]
    return (at * (patches / count)).long().clamp(max=patches - 1)


def full_keys(frames: int, special: int, patches: int, batch: int, device: torch.device) -> FewKeys | None:
    """The keys of full-attention heads among all tokens of B clips of S frames; None where all of them are keys.

    An even sample of the patch tokens of each frame but the first. Nothing waits for the device.
    """
    count = keys_of_frame(frames, patches, FRAMES_OF_FULL)
    if count == patches:
        return None
    start = torch.arange(frames, device=device)[:, None] * (special + patches)
    before = (start + torch.arange(special, device=device)).flatten()  # [S * n]
    first = special + torch.arange(patches, device=device)  # [P]
    rest = (start + special + even_sample(frames, count, patches, device))[1:].flatten()
    index = torch.cat([before, first, rest]).expand(batch, -1)
    return FewKeys(index, Repeats(frames * special + patches, patches / count))


@torch.no_grad()
def few_keys(propagation: Propagation, batch: int = 1) -> FewKeys | None:
    """The keys of B clips of S frames. A kept token stands for itself and the dropped tokens that take most from it.

    Where a sample would not be smaller, each kept token is a key, and counts for the tokens that it stands for. Else
    an even sample of the patch tokens of each frame, in raster order and shifted from frame to frame, is read at the
    kept tokens that stand for them; of the first frame all patch tokens are. Nothing waits for the device. None where
    all tokens are kept.

    Args:
        propagation: of all frames, one clip after another.
        batch: B.
    """
    index, weights, kept, device = (
        propagation.index,
        propagation.weights,
        propagation.kept,
        propagation.index.device,
    )
    special, frames = index.shape[1] - kept, len(index) // batch
    patches = weights.shape[1] - special
    if kept == patches:
        return None
    count = keys_of_frame(frames, kept, FRAMES)

    def standing_for(rows: Tensor, patch: Tensor) -> Tensor:
        """Numbers of kept tokens in place of patch tokens, for some rows [R] and patches [R, p]."""
        itself = index[rows, None, special:] == (patch + special)[:, :, None]
        return (weights[rows[:, None], patch + special] + itself).argmax(-1)  # of [R, p, K]

    every, number = torch.arange(patches, device=device), torch.arange(len(index), device=device)
    if keys_of_clip(frames, special, patches, kept) == frames * (special + kept):
        each, parts = torch.arange(kept, device=device), number.split(FRAMES_PER_CHUNK)
        found = (standing_for(some, every.expand(len(some), -1)) for some in parts)  # [32, P] each
        sizes = torch.cat([(one[:, :, None] == each).sum(1) for one in found]).float()  # [N, K]
        return FewKeys(None, F.pad(sizes, (special, 0), value=1.0).view(batch, -1))  # [B, S * (n + K)]
    at = even_sample(frames, count, patches, device)  # [S, c]
    parts = zip(number.split(FRAMES_PER_CHUNK), at.repeat(batch, 1).split(FRAMES_PER_CHUNK), strict=True)
    others = torch.cat([standing_for(*part) for part in parts]).view(batch, frames, count)
    first = standing_for(number[::frames], every.expand(batch, -1))  # [B, P]
    start = (number[:frames] * (special + kept))[:, None]
    before = (start + torch.arange(special, device=device)).flatten().expand(batch, -1)  # [B, S * n]
    rest = (start + special + others)[:, 1:].flatten(1)
    places = torch.cat([before, special + first, rest], dim=1)
    return FewKeys(places, Repeats(frames * special + patches, patches / count))
