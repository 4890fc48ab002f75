"""From how many frames on pruning pays, told from the number of tokens alone: no clock and no look at the device."""

from __future__ import annotations

from collections.abc import Sequence

from ..method.propagation import ROWS

# Tokens are picked one after another, and on a GPU each pick waits for a few small kernels, however few frames there
# are. An H100 could have done this much of attention and MLP in the meantime: at 392x518 and keep ratio 0.3, VGGT-1B in
# bfloat16 was measured to gain from 6 frames on. On the CPU, pruning was the faster one from a single frame on.
GPU_FLOPS_PER_PICK = 25e9


def saved_flops(
    frames: int,
    patches: int,
    kept: int,
    special: int,
    channels: int,
    blocks: int,
    dense_frames: bool = False,
    matching: Sequence[float] = (),
) -> float:
    """Floating-point operations of alternating attention that pruning saves for one clip.

    Args:
        frames: S.
        patches: patch tokens of a frame.
        kept: those of them that are kept.
        special: camera and register tokens of a frame.
        channels: C.
        blocks: pairs of frame and global blocks.
        dense_frames: whether frame blocks keep all tokens.
        matching: for each global block with heads that see all tokens, the share of its heads that they are.
    """

    def linear(tokens: int) -> int:
        return 2 * 12 * frames * tokens * channels**2  # projections and an MLP of 4C

    def in_frames(tokens: int) -> int:
        return linear(tokens) + 4 * channels * frames * tokens**2

    def in_clip(tokens: int) -> int:
        return linear(tokens) + 4 * channels * (frames * tokens) ** 2

    before, after = special + patches, special + kept
    saved = in_clip(before) - in_clip(after)
    if dense_frames:
        # The others follow: a mean over kept tokens and a product of their own, by a regression.
        saved -= 2 * frames * (patches * kept * channels + (before + after) * channels**2)
        saved -= 4 * min(frames * kept, ROWS * channels) * channels**2 + 7 * channels**3 // 3
    else:
        saved += in_frames(before) - in_frames(after)
    saved = float((blocks - len(matching)) * saved)
    for share in matching:  # attention of the other heads alone, which are filled in
        filled = (1 - share) * channels
        if not filled:
            continue
        saved += 4 * filled * ((frames * before) ** 2 - (frames * after) ** 2)
        saved -= 2 * frames * filled * (patches * kept + (before + after) * channels)
        saved -= 2 * min(frames * kept, ROWS * channels) * channels * (channels + filled)
    return saved


def pruning_pays(
    device: str,
    clips: int,
    frames: int,
    patches: int,
    kept: int,
    special: int,
    channels: int,
    blocks: int,
    dense_frames: bool = False,
    matching: Sequence[float] = (),
) -> bool:
    """Whether pruning is the faster one on a type of device, for a batch of `clips`; see `saved_flops`."""
    if device == "cpu" or kept == patches:
        return True
    saved = saved_flops(frames, patches, kept, special, channels, blocks, dense_frames, matching)
    return clips * saved >= GPU_FLOPS_PER_PICK * kept
