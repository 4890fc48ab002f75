"""What a pass over several GPUs takes, on paper: from the seconds of one GPU, and the bytes that travel.

Frames are shared out, so most of the work is. Some is done by every GPU: the camera head sees all frames, and each
solves the regressions. Keys and values of global blocks travel, and sums of the regressions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

from pacevggt_patch import split_frames
from pacevggt_patch.config import PaceConfig
from pacevggt_patch.hosts.base import Host
from pacevggt_patch.method.few_keys import FRAMES, FRAMES_OF_FULL, elsewhere, keys_of_frame
from pacevggt_patch.method.full_heads import Heads

SUMS_BYTES = 4  # of a number in the sums of a regression: float32


class Sent(NamedTuple):
    """What a rank hands to the group, in the order of the calls.

    Attributes:
        gathered: bytes of each gather, as large on all ranks.
        summed: bytes of each sum.
    """

    gathered: list[int]
    summed: list[int]


@dataclass(frozen=True)
class Shape:
    """What decides how much travels.

    Attributes:
        blocks: global blocks.
        heads: attention heads of each.
        width: channels of a head.
        special, patches, kept: n, P and K, tokens of a frame.
        full: how many full-attention heads each global block has.
        number: bytes of a number in keys and values.
    """

    blocks: int
    heads: int
    width: int
    special: int
    patches: int
    kept: int
    full: tuple[int, ...]
    number: int

    @classmethod
    def of(cls, host: Host, heads: Heads, size: tuple[int, int], keep_ratio: float, number: int) -> Shape:
        """Of a model, its full-attention heads, the height and width of images, and settings."""
        spec = host.spec()
        patches = size[0] * size[1] // spec.patch_size**2
        each = Counter(block for block, _ in heads)
        return cls(
            blocks=spec.depth,
            heads=spec.num_heads,
            width=spec.embed_dim // spec.num_heads,
            special=spec.special_tokens,
            patches=patches,
            kept=PaceConfig(keep_ratio).kept_tokens(patches),
            full=tuple(each[block] for block in range(spec.depth)),
            number=number,
        )

    @property
    def regressions(self) -> int:
        """How many a pass solves: one for each block but those in which all heads see all tokens."""
        return sum(full < self.heads for full in self.full)

    def sent(self, frames: int, gpus: int) -> Sent:
        """What each of some GPUs hands to the others in a pass over a clip."""
        counts = [_length(split_frames(frames, rank, gpus)) for rank in range(gpus)]
        special, channels = self.special, self.heads * self.width
        few = keys_of_frame(frames, self.kept, FRAMES)
        every = keys_of_frame(frames, self.patches, FRAMES_OF_FULL)
        sampled = _most(counts, special, self.patches, few)
        # Where a sample would not be smaller, all kept tokens are keys, and how often each counts travels once.
        samples = frames * special + self.patches + (frames - 1) * few < frames * (special + self.kept)
        keys = sampled if samples else max(counts) * (special + self.kept)
        whole = (
            max(counts) * (special + self.patches)
            if every == self.patches
            else _most(counts, special, self.patches, every)
        )
        pair = 2 * self.width * self.number
        gathered = [] if samples else [keys * SUMS_BYTES]
        summed = []
        for full in self.full:
            others = self.heads - full
            if not others:  # runs unpruned
                gathered.append(max(counts) * (special + self.patches) * full * pair)
                continue
            gathered += [whole * full * pair] if full else []
            gathered.append(keys * others * pair)
            targets = others * self.width if full else channels
            summed.append((channels * (channels + targets) + 1) * SUMS_BYTES)
        gathered.append(max(counts) * special * 2 * channels * self.number)  # of the camera head
        return Sent(gathered, summed)


def _length(part: slice) -> int:
    return part.stop - part.start


def _most(counts: list[int], special: int, patches: int, count: int) -> int:
    """Keys of the process that has most: each hands over as many."""
    found = elsewhere(SimpleNamespace(counts=counts), special, patches, count)  # ty: ignore[invalid-argument-type]
    assert found is not None
    return max(map(sum, zip(found.alone, found.others, strict=True)))


def predicted(
    shape: Shape, frames: int, gpus: int, seconds: float, unsplit: float, link: float, call: float
) -> dict[str, Any]:
    """Seconds of a pass over some GPUs, and their parts.

    Args:
        frames: of the whole clip.
        seconds: of the same pass over one GPU.
        unsplit: those of them that every GPU spends, however many there are.
        link: bytes a second that a GPU sends, and receives, in a gather.
        call: seconds of a gather of next to nothing.
    """
    share = max(_length(split_frames(frames, rank, gpus)) for rank in range(gpus)) / frames
    row = {"gpus": gpus, "frames": frames, "compute_seconds": (seconds - unsplit) * share}
    row["unsplit_seconds"] = unsplit
    row["received_gib"] = row["exchange_seconds"] = 0.0
    if gpus > 1:
        sent = shape.sent(frames, gpus)
        # In a ring each part passes every link once; a sum takes a round to add up and one to spread.
        received = sum(sent.gathered) * (gpus - 1) + sum(sent.summed) * 2 * (gpus - 1) / gpus
        row["received_gib"] = received / 2**30
        row["exchange_seconds"] = received / link + (len(sent.gathered) + len(sent.summed)) * call
    row["predicted_seconds"] = row["compute_seconds"] + unsplit + row["exchange_seconds"]
    return row
