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
from .exchange import Exchange, extent
from .propagation import FRAMES_PER_CHUNK, Propagation

# Up to so many frames every kept token is a key, and every token one of full-attention heads. Longer clips have as many
# keys as so many frames have such tokens,
FRAMES, FRAMES_OF_FULL = 24, 48
# and from here on more: the keys of a frame fall by this power of the number of frames.
LONG, POWER = 96, 1 / 3


class Elsewhere(NamedTuple):
    """Keys of a clip that is spread over processes: few, so that they travel and queries stay where they are.

    Attributes:
        exchange: of the clip.
        alone: how many keys of special tokens and of the first frame each process has.
        others: how many others.
    """

    exchange: Exchange
    alone: list[int]
    others: list[int]

    def joined(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, heads, m, d] of all processes, of those here; `alone` of all come first."""
        sizes = [sum(pair) for pair in zip(self.alone, self.others, strict=True)]
        parts = self.exchange.gather(torch.cat([key, value], -1), sizes, 2)
        both = [part.split(pair, 2) for part, *pair in zip(parts, self.alone, self.others, strict=True)]
        keys, values = torch.cat([part for one in zip(*both, strict=True) for part in one], 2).split(
            [key.shape[-1], value.shape[-1]], -1
        )
        return keys.to(key.dtype), values.to(value.dtype)


class FewKeys(NamedTuple):
    """Which keys stand for those of all tokens of B clips.

    Attributes:
        index: [B, m] (int64) places among the tokens of a clip, some of them several times; those of special tokens and
            of the first frame come first. None: all of them in their order.
        counts: how many tokens each key stands for, as `runtime.attention.attention` takes it; None is one each.
        elsewhere: of a clip over several processes. `index` is of the tokens here then, `counts` of all keys.
    """

    index: Tensor | None
    counts: Repeats | Tensor | None
    elsewhere: Elsewhere | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Keys or values [B, heads, m, d] of those of all tokens that `index` counts."""
        if self.index is None:
            return tensor
        index = self.index[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
        return tensor.gather(2, index)

    def everywhere(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, m, d] of the whole clip, of those that `of` gave here."""
        return (key, value) if self.elsewhere is None else self.elsewhere.joined(key, value)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention: Callable[..., Tensor]) -> Tensor:
        """Attention [B, heads, L, d] of L queries to these keys.

        Args:
            query: [B, heads, L, d].
            key, value: of all tokens that `index` counts.
            attention: of queries, keys, values and `counts`.
        """
        return attention(query, *self.everywhere(self.of(key), self.of(value)), self.counts)


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
    sampled = keys_of_sample(frames, special, patches, keys_of_frame(frames, kept, FRAMES))
    return min(frames * (special + kept), sampled)


def keys_of_full(frames: int, special: int, patches: int) -> int:
    """All keys of full-attention heads of such a clip."""
    return keys_of_sample(frames, special, patches, keys_of_frame(frames, patches, FRAMES_OF_FULL))


def keys_of_sample(frames: int, special: int, patches: int, count: int) -> int:
    """Keys of special tokens, of the patch tokens of the first frame, and `count` of each other frame."""
    return frames * special + patches + (frames - 1) * count


def even_sample(frames: int, count: int, patches: int, device: torch.device) -> Tensor:
    """Numbers [S, count] of patch tokens, even over a frame in raster order and shifted from frame to frame."""
    period = math.ceil(patches / count)
    shift = torch.arange(frames, device=device) % period / period
    at = torch.arange(count, device=device) + shift[:, None]
    return (at * (patches / count)).long().clamp(max=patches - 1)


def elsewhere(exchange: Exchange | None, special: int, patches: int, count: int) -> Elsewhere | None:
    """The keys of each process, where each frame but the first has `count` keys of patch tokens."""
    if exchange is None:
        return None
    counts = exchange.counts
    alone = [frames * special + patches * (process == 0) for process, frames in enumerate(counts)]
    return Elsewhere(
        exchange, alone, [(frames - (process == 0)) * count for process, frames in enumerate(counts)]
    )


def all_keys(exchange: Exchange, length: int, counts: Tensor | None = None) -> FewKeys:
    """Each of `length` tokens of each frame is a key, in the order of the frames.

    Args:
        exchange: of a clip that is spread over processes.
        length: tokens of a frame.
        counts: how many tokens each token here stands for, [1, S * length]; None is one.
    """
    numbers = [frames * length for frames in exchange.counts]
    if counts is not None:
        counts = torch.cat(exchange.gather(counts, numbers, 1), 1)
    return FewKeys(None, counts, Elsewhere(exchange, numbers, [0] * len(numbers)))


def full_keys(
    frames: int,
    special: int,
    patches: int,
    batch: int,
    device: torch.device,
    exchange: Exchange | None = None,
) -> FewKeys | None:
    """The keys of full-attention heads among all tokens of B clips of S frames; None where all of them are keys.

    An even sample of the patch tokens of each frame but the first. Nothing waits for the device.

    Args:
        frames: that are here.
        exchange: of a clip that is spread over processes. Where all tokens are keys they still have to be gathered.
    """
    before, total = extent(exchange, frames)
    count = keys_of_frame(total, patches, FRAMES_OF_FULL)
    if count == patches:
        if exchange is None:
            return None
        return all_keys(exchange, special + patches)
    every = torch.arange(patches, device=device)
    first = every.expand(batch, -1) if before == 0 else None
    others = even_sample(total, count, patches, device)[before : before + frames].expand(batch, -1, -1)
    return sampled_keys(first, others, special, patches, patches, total, exchange)


def sampled_keys(
    first: Tensor | None,
    others: Tensor,
    special: int,
    length: int,
    patches: int,
    total: int,
    exchange: Exchange | None,
) -> FewKeys:
    """Special tokens, and of each frame some of those that `length` counts.

    Args:
        first: [B, P] numbers of the keys of the first frame, one for each patch token; None where it is elsewhere.
        others: [B, S, c] those of each frame that is here. Of the first frame they are not read.
        special: n.
        length: patch tokens of a frame that numbers count: K or P.
        patches: P.
        total: frames of the whole clip.
        exchange: of a clip that is spread over processes.
    """
    batch, frames, count = others.shape
    start = torch.arange(frames, device=others.device)[:, None] * (special + length)
    places = [(start + torch.arange(special, device=others.device)).flatten().expand(batch, -1)]  # [B, S * n]
    rest = start + special + others
    if first is not None:
        places.append(special + first)
        rest = rest[:, 1:]
    index = torch.cat([*places, rest.flatten(1)], dim=1)
    counts = Repeats(total * special + patches, patches / count)
    return FewKeys(index, counts, elsewhere(exchange, special, patches, count))


@torch.no_grad()
def few_keys(propagation: Propagation, batch: int = 1, exchange: Exchange | None = None) -> FewKeys | None:
    """The keys of B clips of S frames. A kept token stands for itself and the dropped tokens that take most from it.

    Where a sample would not be smaller, each kept token is a key, and counts for the tokens that it stands for. Else
    an even sample of the patch tokens of each frame, in raster order and shifted from frame to frame, is read at the
    kept tokens that stand for them; of the first frame all patch tokens are. Nothing waits for the device. None where
    all tokens are kept.

    Args:
        propagation: of all frames that are here, one clip after another.
        batch: B.
        exchange: of a clip that is spread over processes.
    """
    index, weights, kept = propagation.index, propagation.weights, propagation.kept
    device = index.device
    special, frames = index.shape[1] - kept, len(index) // batch
    patches = weights.shape[1] - special
    if kept == patches:
        return None
    before, total = extent(exchange, frames)
    count = keys_of_frame(total, kept, FRAMES)

    def standing_for(rows: Tensor, patch: Tensor) -> Tensor:
        """Numbers of kept tokens in place of patch tokens, for some rows [R] and patches [R, p]."""
        itself = index[rows, None, special:] == (patch + special)[:, :, None]
        return (weights[rows[:, None], patch + special] + itself).argmax(-1)  # of [R, p, K]

    every, number = torch.arange(patches, device=device), torch.arange(len(index), device=device)
    if keys_of_clip(total, special, patches, kept) == total * (special + kept):
        each, parts = torch.arange(kept, device=device), number.split(FRAMES_PER_CHUNK)
        found = (standing_for(some, every.expand(len(some), -1)) for some in parts)  # [32, P] each
        sizes = torch.cat([(one[:, :, None] == each).sum(1) for one in found]).float()  # [N, K]
        counts = F.pad(sizes, (special, 0), value=1.0).view(batch, -1)  # [B, S * (n + K)]
        if exchange is None:
            return FewKeys(None, counts)
        return all_keys(exchange, special + kept, counts)
    at = even_sample(total, count, patches, device)[before : before + frames]  # [S, c]
    parts = zip(number.split(FRAMES_PER_CHUNK), at.repeat(batch, 1).split(FRAMES_PER_CHUNK), strict=True)
    others = torch.cat([standing_for(*part) for part in parts]).view(batch, frames, count)
    first = standing_for(number[::frames], every.expand(batch, -1)) if before == 0 else None  # [B, P]
    return sampled_keys(first, others, special, kept, patches, total, exchange)
