"""What pruning saves, told from the number of tokens alone: no clock and no look at the device."""

from __future__ import annotations

from collections.abc import Sequence

from .few_keys import keys_of_clip, keys_of_full
from .propagation import ROWS

# On a GPU tokens are picked one after another, and each pick waits for a few small kernels, however few frames there
# are; every global block solves a regression. The device could do this much of attention and MLP in the meantime. An
# H200 gained from 16 frames of 392x518 on at keep ratio 0.3, and not yet at 12 (latency-vggt-1b-h200.json).
GPU_FLOPS_PER_PICK = 80e9


def saved_flops(
    frames: int,
    patches: int,
    kept: int,
    special: int,
    channels: int,
    blocks: int,
    global_alone: bool = True,
    full: Sequence[float] = (),
) -> float:
    """Floating-point operations of alternating attention that pruning saves for one clip.

    Args:
        frames: S.
        patches: P, patch tokens of a frame.
        kept: K of them that are kept.
        special: n, special tokens of a frame.
        channels: C.
        blocks: pairs of frame and global blocks.
        global_alone: whether frame blocks keep all tokens.
        full: for each global block with full-attention heads, the share of its heads that they are.
    """

    def linear(tokens: int) -> int:
        return 2 * 12 * frames * tokens * channels**2  # projections and an MLP of 4C

    def in_frames(tokens: int) -> int:
        return linear(tokens) + 4 * channels * frames * tokens**2

    def in_clip(tokens: int) -> int:
        return linear(tokens) + 4 * channels * (frames * tokens) ** 2

    before, after = special + patches, special + kept
    saved = in_clip(before) - in_clip(after)
    if global_alone:
        keys = keys_of_clip(frames, special, patches, kept)
        # Pairs of queries and keys that are left out besides.
        saved += 4 * channels * frames * after * (frames * after - keys)
        # Propagation: a mean over kept tokens, and a product of each token's own by a regression.
        saved -= 2 * frames * (patches * kept * channels + (before + after) * channels**2)
        saved -= 4 * min(frames * kept, ROWS * channels) * channels**2 + 7 * channels**3 // 3
    else:
        saved += in_frames(before) - in_frames(after)
    saved = float((blocks - len(full)) * saved)
    for share in full:  # some keys of these heads are left out; what the others give is filled in
        left_out = frames * before - keys_of_full(frames, special, patches)
        saved += 4 * share * channels * frames * before * left_out if share < 1 else 0
        filled = (1 - share) * channels
        if not filled:
            continue
        saved += 4 * filled * ((frames * before) ** 2 - frames * after * keys)
        saved -= 2 * frames * filled * (patches * kept + (before + after) * channels)
        saved -= 2 * min(frames * kept, ROWS * channels) * channels * (channels + filled)
    return saved


def pruning_pays(
    device: str,
    frames: int,
    patches: int,
    kept: int,
    special: int,
    channels: int,
    blocks: int,
    global_alone: bool = True,
    full: Sequence[float] = (),
) -> bool:
    """Whether pruning is the faster one for a clip on a type of device; see `saved_flops`."""
    if device == "cpu" or kept == patches:
        return True
    saved = saved_flops(frames, patches, kept, special, channels, blocks, global_alone, full)
    return saved >= GPU_FLOPS_PER_PICK * kept
