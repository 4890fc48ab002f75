"""From how many frames on pruning pays, told from the number of tokens alone: no clock and no look at the device."""

from __future__ import annotations

# Tokens are picked one after another, and on a GPU each pick waits for a few small kernels, however few frames there
# are. An H100 could have done this much of attention and MLP in the meantime: at 392x518 and keep ratio 0.3, VGGT-1B in
# bfloat16 was measured to gain from 6 frames on. On the CPU, pruning was the faster one from a single frame on.
GPU_FLOPS_PER_PICK = 25e9


def saved_flops(frames: int, patches: int, kept: int, special: int, channels: int, blocks: int) -> float:
    """Floating-point operations of alternating attention that pruning saves for one clip.

    Args:
        frames: S.
        patches: patch tokens of a frame.
        kept: those of them that are kept.
        special: camera and register tokens of a frame.
        channels: C.
        blocks: pairs of frame and global blocks.
    """

    def flops(tokens: int) -> float:
        linear = 2 * 2 * 12 * frames * tokens * channels**2  # projections and an MLP of 4C, in both blocks
        attention = 4 * channels * (frames * tokens**2 + (frames * tokens) ** 2)
        return blocks * float(linear + attention)

    return flops(special + patches) - flops(special + kept)


def pruning_pays(
    device: str, clips: int, frames: int, patches: int, kept: int, special: int, channels: int, blocks: int
) -> bool:
    """Whether pruning is the faster one on a type of device, for a batch of `clips`; see `saved_flops`."""
    if device == "cpu" or kept == patches:
        return True
    return clips * saved_flops(frames, patches, kept, special, channels, blocks) >= GPU_FLOPS_PER_PICK * kept
