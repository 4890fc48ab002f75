"""What the stages of a VGGT must compute and move: FLOPs and bytes by formula, and the time no card can go below.

    python benchmarks/arithmetic.py        # the tables of docs/lab-notebook.md, for VGGT-1B

FLOPs are those of matrix products, convolutions and attention, two for each multiply-add; a test counts the same
forward with torch's own counter. Bytes are what these operations read and write when each touches its operands once.
Elementwise passes (norms, activations, scales, residuals, RoPE) can be fused into them, so they are kept apart:
`passes` is what they read and write one by one, as the stock modules run them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pacevggt_patch.method.few_keys import keys_of_clip, keys_of_full
from pacevggt_patch.method.propagation import ROWS

# Dense bfloat16 product and large copy, as measured on an H100 80 GB.
H100_FLOPS = 798e12
H100_BANDWIDTH = 3.0e12


@dataclass(frozen=True)
class Work:
    """What a stage does.

    Attributes:
        flops: of matrix products, convolutions and attention.
        bytes: read and written by these, each operand once.
        passes: bytes read and written by elementwise operations that run one by one.
    """

    flops: float = 0.0
    bytes: float = 0.0
    passes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.passes + other.passes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times, self.passes * times)

    __rmul__ = __mul__

    def floor(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Seconds that neither arithmetic nor memory can go below, elementwise passes fused away."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


@dataclass(frozen=True)
class Dimensions:
    """Widths and depths of a VGGT; the defaults are VGGT-1B's.

    Attributes:
        embed_dim, depth, special: channels, pairs of blocks, camera and register tokens of a frame.
        vit_depth, vit_special: blocks of the patch embedding, and its tokens that are no patch.
        cached: layers that the dense heads read.
        camera_depth, camera_rounds: blocks of the camera head, and how often it runs them.
        dpt_features, dpt_channels: widths of the dense heads; dense: their output channels, by name.
        aggregator_bytes, head_bytes: of an element, in the aggregator and in the heads.
    """

    embed_dim: int = 1024
    depth: int = 24
    special: int = 5
    patch: int = 14
    vit_depth: int = 24
    vit_special: int = 5
    cached: int = 4
    camera_depth: int = 4
    camera_rounds: int = 4
    dpt_features: int = 256
    dpt_channels: tuple[int, ...] = (256, 512, 1024, 1024)
    dense: dict[str, int] = field(default_factory=lambda: {"depth_head": 2, "point_head": 4})
    aggregator_bytes: int = 2
    head_bytes: int = 2

    @classmethod
    def of(cls, model: Any, aggregator_bytes: int, head_bytes: int) -> Dimensions:
        """Those of a model with stock parts."""
        aggregator, vit = model.aggregator, model.aggregator.patch_embed
        heads = {name: getattr(model, name) for name in ("depth_head", "point_head")}
        heads = {name: head for name, head in heads.items() if head is not None}
        head = next(iter(heads.values()))
        return cls(
            embed_dim=aggregator.camera_token.shape[-1],
            depth=len(aggregator.frame_blocks),
            special=aggregator.patch_start_idx,
            patch=aggregator.patch_size,
            vit_depth=len(vit.blocks),
            vit_special=1 + vit.num_register_tokens,
            cached=len(head.intermediate_layer_idx),
            camera_depth=len(model.camera_head.trunk),
            dpt_features=head.scratch.layer1_rn.out_channels,
            dpt_channels=tuple(project.out_channels for project in head.projects),
            dense={name: head.scratch.output_conv2[-1].out_channels for name, head in heads.items()},
            aggregator_bytes=aggregator_bytes,
            head_bytes=head_bytes,
        )


def linear(rows: float, inputs: float, outputs: float, size: int) -> Work:
    """A matrix product [rows, inputs] x [inputs, outputs], elements of `size` bytes."""
    return Work(2 * rows * inputs * outputs, size * (rows * (inputs + outputs) + inputs * outputs))


def block(
    sequences: int, length: int, channels: int, size: int, positions: bool, pairs: float | None = None
) -> Work:
    """A transformer block on `sequences` sequences of `length` tokens that attend to their own sequence; `pairs` of
    queries and keys in all, if not every token attends to every other."""
    rows = sequences * length
    pairs = rows * length if pairs is None else pairs
    products = linear(rows, channels, 3 * channels, size) + linear(rows, channels, channels, size)
    products += linear(rows, channels, 4 * channels, size) + linear(rows, 4 * channels, channels, size)
    attention = Work(4 * pairs * channels, 4 * rows * channels * size)
    # Of [rows, C]: two norms 4, two scales 4, two residuals 6, GELU 8; with positions also norms of q and k 4, and
    # RoPE on both: rotate 4, two products 8, a sum 6, joining the halves 4.
    return products + attention + Work(passes=(22 + (26 if positions else 0)) * rows * channels * size)


def convolution(pixels: float, inputs: int, outputs: int, kernel: int, size: int, read: float = 0.0) -> Work:
    """A convolution with `pixels` outputs, from `read` input pixels (as many, if not given)."""
    moved = (read or pixels) * inputs + pixels * outputs + kernel**2 * inputs * outputs
    return Work(2 * pixels * kernel**2 * inputs * outputs, size * moved)


def dense_head(dims: Dimensions, frames: int, grid: tuple[int, int], outputs: int, accelerated: bool) -> Work:
    """A DPT head on dense tokens; accelerated, the last convolution of a fusion block comes before the enlargement."""
    size, width, channels = dims.head_bytes, dims.dpt_features, dims.dpt_channels
    patches = frames * grid[0] * grid[1]
    image = patches * dims.patch**2
    coarsest = frames * math.ceil(grid[0] / 2) * math.ceil(grid[1] / 2)
    levels = (16 * patches, 4 * patches, patches, coarsest)  # pixels
    work = Work()
    for level, out in enumerate(channels):
        work += convolution(patches, 2 * dims.embed_dim, out, 1, size)
        work += Work(passes=size * patches * (2 * 2 * dims.embed_dim + 3 * out))  # norm, position embedding
        if level < 2:  # transposed: every input pixel makes kernel^2 output pixels
            kernel = (4, 2)[level]
            moved = patches * out + levels[level] * out + (kernel * out) ** 2
            work += Work(2 * patches * (kernel * out) ** 2, size * moved)
        elif level == 3:
            work += convolution(coarsest, out, out, 3, size, read=patches)
        work += convolution(levels[level], out, width, 3, size)
        units = 2 if level < 3 else 1  # residual units: two convolutions, two ReLUs, one sum
        work += 2 * units * convolution(levels[level], width, width, 3, size)
        work += Work(passes=size * levels[level] * width * (7 * units + 3 * (units - 1)))
        finer = levels[level - 1] if level else 4 * levels[0]
        work += convolution(levels[level] if accelerated else finer, width, width, 1, size)
        work += Work(passes=size * width * (levels[level] + finer))  # interpolation
    finest = 4 * levels[0]
    work += convolution(finest, width, width // 2, 3, size)
    work += Work(passes=size * width // 2 * (finest + 4 * image))  # interpolation, position embedding
    work += convolution(image, width // 2, 32, 3, size) + convolution(image, 32, outputs, 1, size)
    return work + Work(passes=size * image * (2 * 32 + 2 * outputs))


def camera_head(dims: Dimensions, frames: int) -> Work:
    """The camera head: rounds of blocks on one token of 2C a frame."""
    channels, size = 2 * dims.embed_dim, dims.head_bytes
    one = dims.camera_depth * block(1, frames, channels, size, positions=False)
    one += linear(frames, 9, channels, size) + linear(frames, channels, 3 * channels, size)
    one += linear(frames, channels, channels // 2, size) + linear(frames, channels // 2, 9, size)
    return dims.camera_rounds * one


def stage_work(
    dims: Dimensions,
    frames: int,
    grid: tuple[int, int],
    kept: int,
    global_alone: bool = False,
    full: Sequence[float] = (),
) -> dict[str, Work]:
    """What each stage does for one clip.

    Args:
        dims: of the model.
        frames: N.
        grid: patch rows and columns.
        kept: K, patch tokens of a frame that enter alternating attention; all of them is the stock model.
        global_alone: frame blocks have all patch tokens, and global blocks propagate to those that are not kept.
        full: for each global block with full-attention heads, the share of its heads that they are.
    """
    channels, size, patches = dims.embed_dim, dims.aggregator_bytes, grid[0] * grid[1]
    length = dims.special + kept
    work = {
        "DINO": linear(frames * patches, 3 * dims.patch**2, channels, size)
        + dims.vit_depth * block(frames, dims.vit_special + patches, channels, size, positions=False)
    }
    if kept < patches:
        # In float32: distances of all pairs; the pass over them is one write and three updates in place. Farthest
        # point sampling then reads one row of them and updates one of its own for each pick.
        similar = Work(2 * patches**2 * channels, 4 * (2 * patches * channels + patches**2))
        work["selection"] = frames * (
            similar + Work(2 * patches * channels, passes=4 * patches * (6 * patches + 5 * kept))
        )
        # Similarity to the kept tokens, and means by a matrix product.
        near = Work(
            2 * patches * kept * channels, 4 * (patches * channels + kept * channels + patches * kept)
        )
        mean = Work(
            2 * patches * kept * channels, 4 * (patches * channels + kept * channels + patches * kept)
        )
        if not global_alone:
            work["merging"] = frames * (near + mean + Work(passes=4 * patches * (4 * channels + 5 * kept)))
    in_frames = dims.special + patches if global_alone else length
    work["frame blocks"] = dims.depth * block(frames, in_frames, channels, size, positions=True)
    whole = full if global_alone and kept < patches else ()
    few = dims.depth - len(whole)  # blocks
    pairs = None  # of queries and keys
    if global_alone and kept < patches:
        pairs = frames * length * keys_of_clip(frames, dims.special, patches, kept)
    work["global blocks"] = few * block(1, frames * length, channels, size, True, pairs)
    if kept < patches:
        heads, size = len(dims.dense), dims.aggregator_bytes

        def read(rows: int, width: int) -> Work:
            return Work(2 * rows * kept * width, size * (width * (rows + kept) + rows * kept))

        if global_alone:
            # A product with the slope of the clip, for all tokens and once more for those in global attention.
            rows = dims.special + patches + length
            passes = Work(passes=size * channels * (6 * length + 2 * patches))
            guess = Work(2 * rows * channels**2, size * 2 * rows * channels)
            moved = read(dims.special + patches, channels) + guess + passes
            # The slope itself, in float32 from some of the tokens: two products; factorisation and solves are left out.
            looked = min(frames, math.ceil(ROWS * channels / kept)) * kept
            slope = Work(4 * looked * channels**2, 4 * (2 * looked * channels + 2 * channels**2))
            near += Work(passes=4 * patches * 8 * kept)
            work["propagation"] = frames * (near + few * moved) + few * slope
            for share in whole:
                seen = keys_of_full(frames, dims.special, patches)
                mixed = share * frames * in_frames * seen + (1 - share) * (pairs or 0)
                work["global blocks"] += block(1, frames * in_frames, channels, size, True, mixed)
                wide = (1 - share) * channels  # of the heads that are filled in
                if not wide:
                    continue
                # Queries and keys of the others are made of the kept tokens, by a product of its own.
                work["global blocks"] += linear(
                    frames * length, channels, 3 * channels, dims.aggregator_bytes
                )
                guess = Work(2 * rows * channels * wide, size * rows * (channels + wide))
                filled = read(in_frames, int(wide)) + guess + Work(passes=size * wide * 4 * in_frames)
                fit = Work(2 * looked * channels * (channels + wide), 4 * 2 * looked * channels)
                work["propagation"] += frames * filled + fit
        else:
            rows = read(patches, 2 * channels)
            # Every dense head restores the cached layers for itself.
            restore = near + dims.cached * (
                rows + Work(passes=size * 2 * channels * (2 * kept + 2 * patches))
            )
            work["restoration"] = (
                heads * frames * (restore + Work(passes=4 * patches * (3 * channels + 8 * kept)))
            )
    work["camera_head"] = camera_head(dims, frames)
    for name, outputs in dims.dense.items():
        work[name] = dense_head(dims, frames, grid, outputs, kept < patches)
    return work


def total(stages: dict[str, Work]) -> Work:
    """All stages together."""
    whole = Work()
    for work in stages.values():
        whole += work
    return whole


def print_tables() -> None:
    """VGGT-1B at 392x518 in bfloat16, as Markdown."""
    dims, grid = Dimensions(), (28, 37)
    patches = grid[0] * grid[1]
    for ratio in (1.0, 0.3, 0.15):
        kept = round(ratio * patches)
        counts = (100, 300, 1000)
        works = [stage_work(dims, frames, grid, kept) for frames in counts]
        print(f"\nkeep ratio {ratio:g}: TFLOP / GB / elementwise GB / floor in s\n")
        print("| stage | " + " | ".join(f"N={frames}" for frames in counts) + " |")
        print("|---" * (1 + len(counts)) + "|")
        totals = [0.0] * len(counts)
        for stage in works[0]:
            cells = []
            for i, work in enumerate(works):
                floor = work[stage].floor(H100_FLOPS, H100_BANDWIDTH)
                totals[i] += floor
                cells.append(
                    f"{work[stage].flops / 1e12:.4g} / {work[stage].bytes / 1e9:.4g} / "
                    f"{work[stage].passes / 1e9:.4g} / {floor:.3g}"
                )
            print(f"| {stage} | " + " | ".join(cells) + " |")
        sums = [total(work) for work in works]
        cells = [
            f"{w.flops / 1e12:.4g} / {w.bytes / 1e9:.4g} / {w.passes / 1e9:.4g} / {t:.3g}"
            for w, t in zip(sums, totals, strict=True)
        ]
        print("| all | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    print_tables()
