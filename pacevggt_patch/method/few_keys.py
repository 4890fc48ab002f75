"""Which keys a token sees in global attention: kept tokens in short clips, fewer of each frame the longer a clip is.

Most heads gather what many tokens have in common. Such a mean needs no more samples in a long clip than in a short one,
but its samples must stand for the whole frame: kept tokens alone would count special tokens and rare patches too often.
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

# Up to so many frames every kept token is a key. Longer clips have as many keys as so many frames have kept tokens,
FRAMES = 24
# and from here on more: the keys of a frame fall by this power of the number of frames.
LONG, POWER = 96, 1 / 3


class FewKeys(NamedTuple):
    """Which keys stand for those of all tokens of B clips.

    Attributes:
        index: [B, m] (int64) places among the S * (n + K) special and kept tokens of a clip, some of them several
            times; those of special tokens and of the first frame come first. None: all of them in their order.
        counts: how many tokens each key stands for, as `runtime.attention.attention` takes it.
    """

    index: Tensor | None
    counts: Repeats | Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """Keys or values [B, heads, m, d] of those of special and kept tokens, [B, heads, S * (n + K), d]."""
        if self.index is None:
            return tensor
        index = self.index[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
        return tensor.gather(2, index)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention: Callable[..., Tensor]) -> Tensor:
        """Attention [B, heads, L, d] of L queries to these keys.

        Args:
            query: [B, heads, L, d].
            key, value: of special and kept tokens, [B, heads, S * (n + K), d].
            attention: of queries, keys, values and `counts`.
        """
        return attention(query, self.of(key), self.of(value), self.counts)


def keys_of_frame(frames: int, kept: int) -> int:
    """How many keys stand for the patch tokens of a frame, K of them kept, in a clip of S frames.

    K up to FRAMES frames, then K * FRAMES / S, and from LONG frames on K * FRAMES / LONG * (LONG / S) ** POWER.
    """
    share = FRAMES / max(FRAMES, min(frames, LONG)) * (LONG / max(frames, LONG)) ** POWER
    return max(1, int(kept * share))


def keys_of_clip(frames: int, special: int, patches: int, kept: int) -> int:
    """m: all keys of a clip of so many frames, of n special and P patch tokens each."""
    sampled = frames * special + patches + (frames - 1) * keys_of_frame(frames, kept)
    return min(frames * (special + kept), sampled)


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
    count = keys_of_frame(frames, kept)

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
    frame = number[:frames]
    period = math.ceil(patches / count)
    at = torch.arange(count, device=device) + (frame % period)[:, None] / period  # [S, c]
    at = (at * (patches / count)).long().clamp(max=patches - 1)
    parts = zip(number.split(FRAMES_PER_CHUNK), at.repeat(batch, 1).split(FRAMES_PER_CHUNK), strict=True)
    others = torch.cat([standing_for(*part) for part in parts]).view(batch, frames, count)
    first = standing_for(number[::frames], every.expand(batch, -1))  # [B, P]
    start = (frame * (special + kept))[:, None]
    before = (start + torch.arange(special, device=device)).flatten().expand(batch, -1)  # [B, S * n]
    rest = (start + special + others)[:, 1:].flatten(1)
    places = torch.cat([before, special + first, rest], dim=1)
    return FewKeys(places, Repeats(frames * special + patches, patches / count))
