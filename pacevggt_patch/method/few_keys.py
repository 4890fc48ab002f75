"""Which keys a token sees in global attention: an even sample of the clip, a smaller one the more frames there are.

Most heads gather what many tokens have in common. Such a mean needs no more samples in a long clip than in a short one,
but its samples must stand for the whole frame: kept tokens alone would count special tokens and rare patches too often.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.attention import Repeats
from .propagation import Propagation

# In a clip of so many frames there is a key for every fourth kept token; shorter clips have more, longer ones fewer.
FRAMES, SHARE = 96, 0.25
# By these powers of the number of frames: in short clips keys cost little, in long ones each tells little.
SHORT, LONG = 1.5, 1 / 3


class FewKeys(NamedTuple):
    """Which keys stand for those of all tokens of B clips.

    Attributes:
        index: [B, m] (int64) places among the S * (n + K) special and kept tokens of a clip, some of them several
            times; those of special tokens and of the first frame come first.
        repeats: how many those are, and how many tokens each of the others stands for; None where all stand for one.
    """

    index: Tensor
    repeats: Repeats | None

    def of(self, tensor: Tensor) -> Tensor:
        """Keys or values [B, heads, m, d] of those of special and kept tokens, [B, heads, S * (n + K), d]."""
        index = self.index[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
        return tensor.gather(2, index)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention: Callable[..., Tensor]) -> Tensor:
        """Attention [B, heads, L, d] of L queries to these keys.

        Args:
            query: [B, heads, L, d].
            key, value: of special and kept tokens, [B, heads, S * (n + K), d].
            attention: of queries, keys, values and `Repeats`.
        """
        return attention(query, self.of(key), self.of(value), self.repeats)


def keys_of_frame(frames: int, patches: int, kept: int) -> int:
    """How many keys stand for the P patch tokens of a frame, K of them kept, in a clip of so many frames.

    SHARE * K * (FRAMES / S) ** SHORT up to FRAMES frames, with LONG in place of SHORT from there on; from 1 to P.
    """
    share = SHARE * (FRAMES / frames) ** (SHORT if frames < FRAMES else LONG)
    return max(1, min(patches, int(share * kept)))


def keys_of_clip(frames: int, special: int, patches: int, kept: int) -> int:
    """m: all keys of a clip of so many frames, of n special and P patch tokens each."""
    return frames * special + patches + (frames - 1) * keys_of_frame(frames, patches, kept)


def few_keys(propagation: Propagation, batch: int = 1) -> FewKeys | None:
    """The keys of B clips of S frames: special tokens, all patch tokens of the first frame, and some of the others.

    Those are evenly spread over the patch tokens of a frame, in raster order, and shifted from frame to frame. The key
    of a dropped token is that of the kept token which it takes most from. Nothing waits for the device. None where all
    tokens are kept.

    Args:
        propagation: of all frames, one clip after another.
        batch: B.
    """
    index, weights = propagation
    kept, device = weights.shape[2], weights.device
    special, frames = index.shape[1] - kept, len(index) // batch
    patches = weights.shape[1] - special
    if kept == patches:
        return None
    count = keys_of_frame(frames, patches, kept)

    def standing_for(rows: Tensor, patch: Tensor) -> Tensor:
        """Numbers of kept tokens in place of patch tokens, for some rows [R] and patches [R, p]."""
        itself = index[rows, None, special:] == (patch + special)[:, :, None]
        return (weights[rows[:, None], patch + special] + itself).argmax(-1)  # of [R, p, K]

    number = torch.arange(frames, device=device)
    period = math.ceil(patches / count)
    at = torch.arange(count, device=device) + (number % period)[:, None] / period  # [S, c]
    at = (at * (patches / count)).long().clamp(max=patches - 1)
    clips = torch.arange(batch, device=device)
    others = standing_for(torch.arange(len(index), device=device), at.repeat(batch, 1)).view(
        batch, frames, count
    )
    first = standing_for(clips * frames, torch.arange(patches, device=device).expand(batch, -1))  # [B, P]
    start = (number * (special + kept))[:, None]
    before = (start + torch.arange(special, device=device)).flatten().expand(batch, -1)  # [B, S * n]
    rest = (start + special + others)[:, 1:].flatten(1)
    one = frames == 1 or count == patches
    repeats = None if one else Repeats(frames * special + patches, patches / count)
    return FewKeys(torch.cat([before, special + first, rest], dim=1), repeats)
