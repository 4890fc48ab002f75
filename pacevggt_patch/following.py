"""Dropped tokens that follow the kept ones: global attention sees the kept tokens, frame attention all of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .restoration import interpolation_weights

# Frames at a time: bounds the float32 similarities [frames, P, K].
FRAMES_PER_CHUNK = 32


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

    def compact(self, tokens: Tensor) -> Tensor:
        """The special and kept ones [N, n + K, C] of [N, n + P, C]."""
        return tokens.gather(1, self.index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))

    def follow(self, before: Tensor, after: Tensor) -> Tensor:
        """All tokens [N, n + P, C] after attention that only special and kept ones took part in.

        A dropped token changes by a weighted mean of the changes of its frame's kept tokens; so it keeps what it alone
        knows, which a mean of the tokens themselves would lose.

        Args:
            before: all tokens before it, [N, n + P, C].
            after: special and kept ones after it, [N, n + K, C].
        """
        kept = self.weights.shape[-1]
        # Autocast would round the tokens, not the products alone.
        with torch.autocast(before.device.type, enabled=False):
            change = (after - self.compact(before))[:, -kept:].to(self.weights.dtype)
            if before.dtype == change.dtype:
                moved = torch.baddbmm(before, self.weights, change)
            else:  # under autocast tokens are wider than weights
                moved = before + self.weights @ change
            return moved.scatter_(1, self.index.unsqueeze(-1).expand_as(after), after.to(moved.dtype))


class FollowedLayer(NamedTuple):
    """The outputs of a pair of blocks, as little as says it all.

    Attributes:
        frame: of the frame block, all tokens [B, S, n + P, C].
        before: what entered global attention, all tokens [B, S, n + P, C]; mostly `frame` itself.
        after: of the global block, special and kept tokens [B, S, n + K, C].
    """

    frame: Tensor
    before: Tensor
    after: Tensor


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
    with torch.autocast(features.device.type, enabled=False):
        chunks = zip(features.split(FRAMES_PER_CHUNK), kept.split(FRAMES_PER_CHUNK), strict=True)
        weights = torch.cat([interpolation_weights(f, k, grid).to(dtype) for f, k in chunks])  # [N, P, K]
    at_special = torch.arange(special, device=kept.device).expand(len(kept), -1)
    return Following(torch.cat([at_special, kept + special], dim=1), F.pad(weights, (0, 0, special, 0)))
