"""Dropped tokens take their change from the kept tokens of their frame.

Global attention sees special and kept tokens alone. What it changes there is propagated to all other tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.chunks import in_chunks
from .exchange import Exchange, extent
from .regression import solve_ridge
from .similarity import interpolation_weights

# Frames at a time. It bounds the float32 similarities [frames, P, K] and the intermediate tensors of propagation.
FRAMES_PER_CHUNK = 32
# Ridge of the regression, relative to the mean eigenvalue of the tokens' covariance.
RIDGE = 1.0
ROWS = 4  # kept tokens that the regression looks at, for each channel
# GPUs multiply matrices in half precision faster where rows have a multiple of so many numbers.
ALIGNED = 8


class Propagation(NamedTuple):
    """Which tokens of each frame take part in global attention, and from which the others take their change.

    Attributes:
        index: [N, n + K] (int64), numbers of special and kept tokens among the n + P tokens of a frame; a row a frame.
        columns: [N, n + P, c], how much each token takes from each of the last c of those: nothing from special ones,
            of which there are as many as make c a multiple of ALIGNED. Rows of tokens in `index` are not read.
        kept: K.
    """

    index: Tensor
    columns: Tensor
    kept: int

    @property
    def weights(self) -> Tensor:
        """How much each token takes from each kept one, [N, n + P, K]."""
        return self.columns[..., -self.kept :]

    def rows(self, length: int) -> Tensor:
        """Numbers [N * (n + K)] of the tokens of `index` among those of all frames, `length` = n + P each."""
        first = torch.arange(len(self.index), device=self.index.device) * length
        return (self.index + first[:, None]).flatten()

    def gather(self, tokens: Tensor) -> Tensor:
        """Special and kept tokens [N, n + K, C] of all tokens [N, n + P, C]."""
        some = tokens.flatten(0, 1).index_select(0, self.rows(tokens.shape[1]))
        return some.view(*self.index.shape, -1)

    def propagate(self, before: Tensor, after: Tensor, slope: Tensor) -> Tensor:
        """All tokens [N, n + P, C] after a block in which only special and kept tokens took part.

        A dropped token x_i changes by a linear guess from itself, plus the mean of what that guess misses on kept
        tokens:

            A x_i + sum_j w_ij (change_j - A x_j) = sum_j w_ij change_j + A (x_i - sum_j w_ij x_j)

        Args:
            before: all tokens before the block, [N, n + P, C].
            after: special and kept tokens after it, [N, n + K, C].
            slope: A of each clip, [B, C, C], see `slope`; N is a multiple of B.
        """
        # Autocast would round the tokens, not the products alone.
        with torch.autocast(before.device.type, enabled=False):
            return self.by_frames(partial(Propagation._propagate, slope=slope), len(slope), before, after)

    def _propagate(self, before: Tensor, after: Tensor, slope: Tensor) -> Tensor:
        before = before.contiguous()
        few = self.gather(before)
        moved = before + self._fill(before, few, after - few, slope)
        return self._with_known(moved, after)

    def fill(self, tokens: Tensor, values: Tensor, slope: Tensor) -> Tensor:
        """Values of all tokens from those of special and kept tokens, by the formula of `propagate`.

        Args:
            tokens: all tokens [N, n + P, C].
            values: of special and kept tokens, [N, n + K, D].
            slope: how values depend on tokens, [B, D, C], see `dependence`.

        Returns:
            [N, n + P, D], in the dtype of `weights`.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.contiguous()
            return self._with_known(self._fill(tokens, self.gather(tokens), values, slope), values)

    def _fill(self, tokens: Tensor, few: Tensor, values: Tensor, slope: Tensor) -> Tensor:
        (_, _, read), dtype = self.columns.shape, self.columns.dtype
        matrices = slope.to(dtype).mT
        # What all tokens of a frame share cancels in the sum. It is taken out before anything is rounded.
        mean = few[:, -self.kept :].mean(1, keepdim=True)  # [N, 1, C]
        missed = values.to(dtype) - multiply_by_clip((few - mean).to(dtype), matrices)
        if read > self.kept:  # special tokens lend columns alone: theirs may be infinite in half precision
            missed[:, -read : -self.kept] = 0
        guess = multiply_by_clip((tokens - mean).to(dtype), matrices)  # [N, n + P, D]
        return guess.baddbmm_(self.columns, missed[:, -read:])

    def _with_known(self, dense: Tensor, values: Tensor) -> Tensor:
        """Write the values of special and kept tokens into those of all, in place."""
        rows = self.rows(dense.shape[1])
        dense.view(-1, dense.shape[-1]).index_copy_(0, rows, values.flatten(0, 1).to(dense.dtype))
        return dense

    def by_frames(self, function: Callable[..., Tensor], clips: int, *tensors: Tensor) -> Tensor:
        """`function` of all frames, a chunk of frames of every clip at a time.

        Args:
            function: of a Propagation and the rows of `tensors` for some frames, as many of each clip.
            clips: B, to which the N frames belong.
            tensors: [N, ...].

        Returns:
            [N, ...].
        """

        def some(index: Tensor, columns: Tensor, *tensors: Tensor) -> tuple[Tensor]:
            lead = index.shape[:2]
            part = Propagation(index.flatten(0, 1), columns.flatten(0, 1), self.kept)
            return (function(part, *(t.flatten(0, 1) for t in tensors)).unflatten(0, lead),)

        apart = [t.unflatten(0, (clips, -1)) for t in (self.index, self.columns, *tensors)]  # [B, S, ...]
        return in_chunks(some, max(1, FRAMES_PER_CHUNK // clips), *apart, dim=1)[0].flatten(0, 1)

    def slope(self, before: Tensor, after: Tensor, clips: int, exchange: Exchange | None = None) -> Tensor:
        """How the change of a token depends on the token: A [B, C, C] of each clip, for `propagate`.

        Args:
            before, after: special and kept tokens before and after a block, [N, n + K, C].
            clips: B, to which the N frames belong.
            exchange: of a clip that is spread over processes.
        """
        with torch.autocast(before.device.type, enabled=False):
            old, new = (self._sample(t, clips, before.shape[-1], exchange) for t in (before, after))
            return regress(old, new - old, exchange)

    def dependence(
        self, tokens: Tensor, values: Tensor, clips: int, exchange: Exchange | None = None
    ) -> Tensor:
        """How values depend on tokens: [B, D, C] of each clip, for `fill`.

        Args:
            tokens: special and kept tokens, [N, n + K, C].
            values: theirs, [N, n + K, D].
            clips: B, to which the N frames belong.
            exchange: of a clip that is spread over processes.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            x, y = (self._sample(t, clips, tokens.shape[-1], exchange) for t in (tokens, values))
            return regress(x, y, exchange)

    def _sample(self, tokens: Tensor, clips: int, channels: int, exchange: Exchange | None) -> Tensor:
        """Kept tokens [B, few, K, C] of evenly spread frames: at least ROWS for each of `channels`, if there are.

        Of a clip that is spread over processes, those of its frames that are here: there may be none.
        """
        frames = len(tokens) // clips
        before, total = extent(exchange, frames)
        few = min(total, -(-ROWS * channels // self.kept))
        # The i-th is frame i * total // few. From `start` on they are here, from `stop` on elsewhere.
        start, stop = (-(-at * few // total) for at in (before, before + frames))
        chosen = torch.arange(start, stop, device=tokens.device) * total // few
        if before:
            chosen -= before
        some = tokens.detach().unflatten(0, (clips, frames)).index_select(1, chosen)[:, :, -self.kept :]
        return some.to(torch.promote_types(tokens.dtype, torch.float32))


@torch.no_grad()
def regress(x: Tensor, y: Tensor, exchange: Exchange | None = None) -> Tensor:
    """The matrix A for which A x is nearest to y, both less their means over the tokens of a frame.

    A constant for gradients: what is learned is learned through the tokens.

    Args:
        x: [B, frames, K, C], float32 at least.
        y: [B, frames, K, D], in the same dtype.
        exchange: of a clip that is spread over processes, some of whose frames these are.

    Returns:
        [B, D, C]; it shrinks towards 0 as RIDGE says.
    """
    channels = x.shape[-1]
    square = x.square().sum((1, 2, 3))
    x, y = ((t - t.mean(2, keepdim=True)).flatten(1, 2) for t in (x, y))
    squares, products = x.mT @ x, x.mT @ y  # [B, C, C], [B, C, D]
    if exchange is not None:
        # Means are those of a frame, so sums add up.
        squares, products, square = exchange.sum(squares, products, square)
    # Tokens that are the same but for rounding tell nothing.
    limits = torch.finfo(x.dtype)
    rounding = limits.eps * square / channels + limits.tiny
    level = RIDGE * squares.diagonal(dim1=1, dim2=2).mean(-1).maximum(rounding)  # [B]
    return solve_ridge(squares, products, level).mT


def multiply_by_clip(tokens: Tensor, matrices: Tensor) -> Tensor:
    """Tokens [N, L, C] of B clips times the matrix of their clip, [B, C, D]."""
    flat = tokens.flatten(0, 1).view(len(matrices), -1, tokens.shape[-1])
    return torch.bmm(flat, matrices).view(*tokens.shape[:-1], matrices.shape[-1])


def make_propagation(
    features: Tensor, kept: Tensor, grid: tuple[int, int], special: int, dtype: torch.dtype
) -> Propagation:
    """Dropped tokens take from kept tokens of their frame that look alike and lie near, see `interpolation_weights`.

    Args:
        features: DINO patch tokens [N, P, C], one row a frame.
        kept: [N, K] indices into P.
        grid: patch rows and columns.
        special: n, camera and register tokens in front of a frame's patch tokens.
        dtype: of the weights; they are made in float32.
    """
    at_special = torch.arange(special, device=kept.device).expand(len(kept), -1)
    with torch.autocast(features.device.type, enabled=False):
        chunks = zip(features.split(FRAMES_PER_CHUNK), kept.split(FRAMES_PER_CHUNK), strict=True)
        weights = torch.cat([interpolation_weights(f, k, grid).to(dtype) for f, k in chunks])  # [N, P, K]
    count = kept.shape[1]
    more = -count % ALIGNED
    columns = F.pad(weights, (more if more <= special else 0, 0, special, 0))
    return Propagation(torch.cat([at_special, kept + special], dim=1), columns, count)
