"""A stock DPT head as a function of patch tokens: the same layers, arranged for speed.

It differs from the host's own forward in two ways, neither of which changes the outputs beyond rounding:

- The feature maps stay channels-last from the tokens on. Tokens lie in memory so, and convolutions on CPU and GPU like
  it. A bilinear enlargement then reads whole pixels at once.
- The last convolution of a fusion block sees one pixel at a time. So it comes before the enlargement by two, where
  there is a quarter of the pixels. Its bias may, too, as the weights of an enlarged pixel sum to 1.

Every other layer is the host's own module.

This module knows the names inside a DPT head, and no other does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.bare_copy import bare_copy, on_cpu
from ..runtime.compiling import is_watched

# Elements of an enlarged map: some kernels for channels-last maps count in 32 bits.
MOST_ELEMENTS = 2**31 - 1


class DenseTables(NamedTuple):
    """What a head needs besides its layers, for one size of images.

    Attributes:
        size: height and width of the output in pixels.
        positions: position embeddings [1, c, h, w] of the four levels and of the output, channels-last; empty for a
            head without.
        activate: the host's function that makes values and confidence of the last convolution's output; None where the
            head returns features.
        dtype: of its convolutions' outputs.
    """

    size: tuple[int, int]
    positions: list[Tensor]
    activate: Callable[..., tuple[Tensor, Tensor]] | None
    dtype: torch.dtype


def dense_tables(head: Any, grid: tuple[int, int], dtype: torch.dtype | None = None) -> DenseTables:
    """Tables of a head for images of `grid` patches, made by the host's own functions.

    Args:
        head: a DPT head.
        grid: patch rows and columns.
        dtype: of its convolutions' outputs; None: as they are where this is called, autocast or not.
    """
    patch, ratio = int(head.patch_size), head.down_ratio
    height, width = patch * grid[0], patch * grid[1]
    size = (int(height / ratio), int(width / ratio))
    weight = head.projects[0].weight
    if dtype is None:
        dtype = F.linear(weight.new_zeros(1, 1), weight.new_zeros(1, 1)).dtype
    positions = []
    if head.pos_embed:
        shapes = [(project.out_channels, *grid) for project in head.projects]
        shapes.append((head.scratch.output_conv1.out_channels, *size))
        for shape in shapes:
            nothing = torch.zeros(1, *shape, device=weight.device, dtype=dtype)
            embedding = head._apply_pos_embed(nothing, width, height)
            positions.append(embedding.contiguous(memory_format=torch.channels_last))
    activate = None
    if not head.feature_only:
        # Where the host's forward finds it: forks and vendored copies have modules of their own.
        activate = type(head)._forward_impl.__globals__["activate_head"]
    return DenseTables(size, positions, activate, dtype)


def dense_head(
    head: Any, layers: Sequence[Tensor], grid: tuple[int, int], tables: DenseTables, by_products: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """What a DPT head makes of the patch tokens of its four layers.

    Args:
        head: the head.
        layers: [N, P, 2C] each, P = rows * columns.
        grid: patch rows and columns.
        tables: of this head and grid.
        by_products: enlarge by matrix products. They have the faster backward pass.

    Returns:
        Values [N, H, W, c] and confidence [N, H, W], or, of a head that is `feature_only`, features [N, c, h, w].
    """
    scratch, levels = head.scratch, []
    narrow = (scratch.layer1_rn, scratch.layer2_rn, scratch.layer3_rn, scratch.layer4_rn)
    for i, tokens in enumerate(layers):
        x = head.norm(tokens).unflatten(1, grid).permute(0, 3, 1, 2)  # [N, 2C, rows, columns], channels-last
        x = head.projects[i](x)
        if tables.positions:
            # In place: the sum is made in float32, and rounded only where the next convolution would do so.
            x = x.add_(tables.positions[i])
        levels.append(narrow[i](head.resize_layers[i](x)))

    def fused(stage: Any, x: Tensor, level: Tensor | None, size: Sequence[int]) -> Tensor:
        if level is not None:
            x = x + stage.resConfUnit1(level)
        return enlarged(stage.out_conv(stage.resConfUnit2(x)), size, by_products)

    fine, finer, finest = (level.shape[2:] for level in (levels[2], levels[1], levels[0]))
    x = fused(scratch.refinenet4, levels[3], None, fine)
    x = fused(scratch.refinenet3, x, levels[2], finer)
    x = fused(scratch.refinenet2, x, levels[1], finest)
    x = fused(scratch.refinenet1, x, levels[0], (2 * finest[0], 2 * finest[1]))
    x = enlarged(scratch.output_conv1(x), tables.size, by_products)
    if tables.activate is None:
        return x + tables.positions[4] if tables.positions else x
    if tables.positions:
        x = x.add_(tables.positions[4])
    return tables.activate(
        scratch.output_conv2(x), activation=head.activation, conf_activation=head.conf_activation
    )


def enlarged(x: Tensor, size: Sequence[int], by_products: bool = False) -> Tensor:
    """`x` [N, C, h, w] enlarged bilinearly to `size`, corners on corners, channels-last."""
    if not by_products:
        images = max(1, MOST_ELEMENTS // (x.shape[1] * size[0] * size[1]))
        parts = [
            F.interpolate(part, size=tuple(size), mode="bilinear", align_corners=True)
            for part in x.split(images)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    count, channels, rows, columns = x.shape
    down, across = (
        F.interpolate(
            torch.eye(small, device=x.device)[None, None], (large, small), mode="bilinear", align_corners=True
        )[0, 0].to(x.dtype)
        for small, large in zip((rows, columns), size, strict=True)
    )
    x = down @ x.permute(0, 2, 3, 1).reshape(count, rows, columns * channels)  # [N, H, w * C]
    x = across @ x.view(-1, columns, channels)  # [N * H, W, C]
    return x.view(count, *size, channels).permute(0, 3, 1, 2)


def frame_bytes(head: Any, tables: DenseTables) -> int:
    """Bytes of the largest feature map of one frame: the enlarged one."""
    channels = head.scratch.output_conv1.out_channels
    return channels * tables.size[0] * tables.size[1] * tables.dtype.itemsize


def make(head: Any, tables: DenseTables) -> tuple:
    """What `dense_head` is compiled for, besides the size of images and the number of frames."""
    return head.projects[0].in_channels, head.scratch.output_conv1.out_channels, head.activation, tables.size


def is_dense_head(head: Any, channels: int, layers: int) -> bool:
    """Whether `dense_head` does what this head does, tried on a small example in float32 on the CPU.

    Forks may change a part and keep its name, and a head may be something else altogether. The head itself is not run:
    nobody's hooks are called.

    Args:
        head: a module with `intermediate_layer_idx`.
        channels: 2C of the tokens it reads.
        layers: number of layers that it may read.
    """
    try:
        bare, grid = bare_copy(head, on_cpu), (2, 3)
        patch = int(bare.patch_size)
        generator = torch.Generator("cpu").manual_seed(0)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            # Said out loud: users may have changed torch's default device and dtype.
            here: Any = {"device": "cpu", "dtype": torch.float32}
            tokens = [torch.randn(1, 2, 7, channels, generator=generator, **here) for _ in range(layers)]
            images = torch.zeros(1, 2, 3, patch * grid[0], patch * grid[1], **here)
            theirs = type(head).forward(bare, list(tokens), images, 1)
            read = [tokens[i][0, :, 1:] for i in bare.intermediate_layer_idx]
            ours = dense_head(bare, read, grid, dense_tables(bare, grid))
        if type(theirs) is not type(ours):  # named tuples, say
            return False
        theirs, ours = ((a,) if isinstance(a, Tensor) else tuple(a) for a in (theirs, ours))
        return len(theirs) == len(ours) and all(map(_alike, theirs, ours))
    except Exception:  # whatever a head of an unknown type trips over
        return False


def is_open(head: Any) -> bool:
    """Whether nobody watches or replaced the parts that `dense_head` does not run as the stock head does.

    It does not call the fusion blocks, gives their last convolutions smaller maps, and writes on what the projections
    return.
    """
    scratch = head.scratch
    stages = (scratch.refinenet1, scratch.refinenet2, scratch.refinenet3, scratch.refinenet4)
    parts = (*stages, *(stage.out_conv for stage in stages), *head.projects)
    return not any("forward" in part.__dict__ or is_watched(part) for part in parts)


def _alike(theirs: Tensor, ours: Tensor) -> bool:
    ours = ours[None]
    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    return bool((theirs - ours).abs().max() <= 1e-4 * theirs.abs().max())
