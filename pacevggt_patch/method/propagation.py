"""Dropped tokens that follow the kept ones: global attention sees the kept tokens, frame attention all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.chunks import in_chunks
from .restoration import interpolation_weights

# Frames at a time: bounds the float32 similarities [frames, P, K], and what following makes on the way.
FRAMES_PER_CHUNK = 32
# Of the regression, relative to the mean eigenvalue. AUC@30 / AbsRel of 12 rooms of 8 views at keep ratio 0.3 and 0.15:
# 77.8 / .0474 and 50.5 / .0917 without regression, 78.4 / .0460 and 57.1 / .0764 with 0.3, 78.7 / .0458 and
# 56.4 / .0768 with 1, 78.7 / .0457 at 0.3 with 3 (benchmarks/NOTES.md).
RIDGE = 1.0
ROWS = 4  # kept tokens that it looks at, per channel; 8 frames of VGGT-mini at keep ratio 0.3 have 2.4


class Following(NamedTuple):
    """Which tokens of each frame take part in global attention, and whom the others follow; one row a frame.

    Attributes:
        index: [N, n + K], numbers of the special and of the kept tokens among the n + P tokens of a frame.
        weights: [N, n + P, K], how much each token follows each kept one; not looked at for those of `index`.
        positions: RoPE positions [N, n + K, 2] of those of `index`, or None.
    """

    index: Tensor
    weights: Tensor
    positions: Tensor | None = None

    def rows(self, length: int) -> Tensor:
        """Numbers [N * (n + K)] of the tokens of `index` among those of all frames, n + P = `length` each."""
        first = torch.arange(len(self.index), device=self.index.device) * length
        return (self.index + first[:, None]).flatten()

    def compact(self, tokens: Tensor) -> Tensor:
        """The special and kept ones [N, n + K, C] of [N, n + P, C]."""
        some = tokens.flatten(0, 1).index_select(0, self.rows(tokens.shape[1]))
        return some.view(*self.index.shape, -1)

    def follow(self, before: Tensor, after: Tensor, slope: Tensor) -> Tensor:
        """All tokens [N, n + P, C] after attention that only special and kept ones took part in.

        A dropped token x_i changes by a guess from itself and by the mean of what the guess misses on kept tokens:

            A x_i + sum_j w_ij (change_j - A x_j) = sum_j w_ij change_j + A (x_i - sum_j w_ij x_j)

        So it keeps what it alone knows, which a mean of the tokens themselves would lose.

        Args:
            before: all tokens before it, [N, n + P, C].
            after: special and kept ones after it, [N, n + K, C].
            slope: A of each clip, [B, C, C], see `slope`; N is a multiple of B.
        """
        # Autocast would round the tokens, not the products alone.
        with torch.autocast(before.device.type, enabled=False):
            return self.by_frames(partial(Following._follow, slope=slope), len(slope), before, after)

    def _follow(self, before: Tensor, after: Tensor, slope: Tensor) -> Tensor:
        before = before.contiguous()
        few = self.compact(before)
        moved = before + self._spread(before, few, after - few, slope)
        return self._with(moved, after)

    def by_frames(self, function: Callable[..., Tensor], clips: int, *tensors: Tensor) -> Tensor:
        """What `function` gives of the frames of `clips`, at most FRAMES_PER_CHUNK at a time, or one of each clip.

        Args:
            function: of the Following and the rows of `tensors` of some frames, as many of each clip.
            clips: B, of which the N frames are.
            tensors: [N, ...].

        Returns:
            [N, ...].
        """

        def some(index: Tensor, weights: Tensor, *tensors: Tensor) -> tuple[Tensor]:
            lead = index.shape[:2]
            part = Following(index.flatten(0, 1), weights.flatten(0, 1))
            return (function(part, *(t.flatten(0, 1) for t in tensors)).unflatten(0, lead),)

        apart = [t.unflatten(0, (clips, -1)) for t in (self.index, self.weights, *tensors)]  # [B, S, ...]
        return in_chunks(some, max(1, FRAMES_PER_CHUNK // clips), *apart, dim=1)[0].flatten(0, 1)

    def spread(self, tokens: Tensor, values: Tensor, slope: Tensor) -> Tensor:
        """Values of all tokens, given those of special and kept ones: the others' as in `follow`.

        Args:
            tokens: all tokens [N, n + P, C], which say how their values differ.
            values: of special and kept ones, [N, n + K, D].
            slope: how values depend on tokens, [B, D, C], see `dependence`.

        Returns:
            [N, n + P, D], in the dtype of `weights`.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.contiguous()
            return self._with(self._spread(tokens, self.compact(tokens), values, slope), values)

    def _spread(self, tokens: Tensor, few: Tensor, values: Tensor, slope: Tensor) -> Tensor:
        kept, dtype = self.weights.shape[-1], self.weights.dtype
        matrices = slope.to(dtype).mT
        # What all tokens of a frame share cancels in the sum, and is taken out before anything is rounded.
        mean = few[:, -kept:].mean(1, keepdim=True)  # [N, 1, C]
        missed = values.to(dtype) - times((few - mean).to(dtype), matrices)
        guess = times((tokens - mean).to(dtype), matrices)  # [N, n + P, D]
        return guess.baddbmm_(self.weights, missed[:, -kept:])

    def _with(self, dense: Tensor, values: Tensor) -> Tensor:
        """Write those of special and kept tokens into those of all, in place."""
        rows = self.rows(dense.shape[1])
        dense.view(-1, dense.shape[-1]).index_copy_(0, rows, values.flatten(0, 1).to(dense.dtype))
        return dense

    def slope(self, before: Tensor, after: Tensor, clips: int) -> Tensor:
        """How the change of a token depends on the token, A [B, C, C] of each clip, for `follow`.

        Of changes on the tokens before, as in `dependence`, and a constant for gradients like that.

        Args:
            before, after: special and kept tokens before and after it, [N, n + K, C].
            clips: B, of which the N frames are.
        """
        with torch.autocast(before.device.type, enabled=False):
            old, new = (self._some(t, clips, before.shape[-1]) for t in (before, after))
            return ridge_regression(old, new - old)

    def dependence(self, tokens: Tensor, values: Tensor, clips: int) -> Tensor:
        """How values depend on tokens, [B, D, C] of each clip, for `spread`.

        Ridge regression over kept tokens, both less their mean over the kept ones of the frame. In float32 at least,
        from at most `ROWS` * C tokens of evenly spread frames. A constant for gradients: what is learned is learned
        through the tokens.

        Args:
            tokens: special and kept ones, [N, n + K, C].
            values: theirs, [N, n + K, D].
            clips: B, of which the N frames are.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            return ridge_regression(*(self._some(t, clips, tokens.shape[-1]) for t in (tokens, values)))

    def _some(self, tokens: Tensor, clips: int, channels: int) -> Tensor:
        """The kept ones [B, few, K, C] of special and kept tokens [N, n + K, C] that a regression on `channels` numbers
        looks at."""
        kept, frames = self.weights.shape[-1], len(tokens) // clips
        few = min(frames, -(-ROWS * channels // kept))
        chosen = torch.arange(few, device=tokens.device) * frames // few
        some = tokens.detach().unflatten(0, (clips, frames)).index_select(1, chosen)[:, :, -kept:]
        return some.to(torch.promote_types(tokens.dtype, torch.float32))


@torch.no_grad()
def ridge_regression(x: Tensor, y: Tensor) -> Tensor:
    """The matrix A for which A x is nearest to y, both less their means over the tokens of a frame.

    Args:
        x: [B, frames, K, C], float32 at least.
        y: [B, frames, K, D], in the same dtype.

    Returns:
        [B, D, C], without gradient; it shrinks towards 0 as RIDGE says.
    """
    channels = x.shape[-1]
    square = x.square().sum((1, 2, 3))
    x, y = ((t - t.mean(2, keepdim=True)).flatten(1, 2) for t in (x, y))
    squares, products = x.mT @ x, x.mT @ y  # [B, C, C], [B, C, D]
    # Tokens that are the same but for rounding tell nothing.
    limits = torch.finfo(x.dtype)
    rounding = limits.eps * square / channels + limits.tiny
    level = RIDGE * squares.diagonal(dim1=1, dim2=2).mean(-1).maximum(rounding)  # [B]
    squares.diagonal(dim1=1, dim2=2).add_(level[:, None])
    # Not by `solve`, which waits for the device to tell whether it worked.
    factor = torch.linalg.cholesky_ex(squares).L
    half = torch.linalg.solve_triangular(factor, products, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True).mT


def times(tokens: Tensor, matrices: Tensor) -> Tensor:
    """Tokens [N, L, C] of B clips by the matrix of their clip, [B, C, D]."""
    flat = tokens.flatten(0, 1).view(len(matrices), -1, tokens.shape[-1])
    return torch.bmm(flat, matrices).view(*tokens.shape[:-1], matrices.shape[-1])


class FollowedLayer(NamedTuple):
    """The outputs of a pair of blocks, as little as says it all.

    Attributes:
        frame: of the frame block, all tokens [B, S, n + P, C].
        before: what entered global attention, all tokens [B, S, n + P, C]; mostly `frame` itself.
        after: of the global block, special and kept tokens [B, S, n + K, C]; all, [B, S, n + P, C], where a head of it
            saw all.
        slope: how changes depend on tokens, [B, C, C], see `Following.slope`; None where `after` is all tokens.
    """

    frame: Tensor
    before: Tensor
    after: Tensor
    slope: Tensor | None


def following(
    features: Tensor, kept: Tensor, grid: tuple[int, int], special: int, dtype: torch.dtype
) -> Following:
    """Whom the dropped tokens follow: those that `restoration.interpolation_weights` would read.

    Args:
        features: DINO patch tokens [N, P, C], one row a frame.
        kept: [N, K] indices into P.
        grid: patch rows and columns.
        special: n, camera and register tokens in front of a frame's patch tokens.
        dtype: of the weights; they are made in float32.

    Returns:
        Without positions.
    """
    at_special = torch.arange(special, device=kept.device).expand(len(kept), -1)
    with torch.autocast(features.device.type, enabled=False):
        chunks = zip(features.split(FRAMES_PER_CHUNK), kept.split(FRAMES_PER_CHUNK), strict=True)
        weights = torch.cat([interpolation_weights(f, k, grid).to(dtype) for f, k in chunks])  # [N, P, K]
    return Following(torch.cat([at_special, kept + special], dim=1), F.pad(weights, (0, 0, special, 0)))
