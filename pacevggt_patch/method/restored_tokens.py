"""What a pruned aggregator returns in place of the stock list of token tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from contextlib import nullcontext
from typing import overload

import torch
from torch import Tensor

from .restoration import FeatureGuidedRestoration, restore

# Frames restored at a time: bounds the [frames, P, K] interpolation weights.
FRAMES_RESTORED = 8


class RestoredTokens(Sequence):
    """The aggregator's outputs, kept compact and restored to the dense grid when somebody looks.

    Reads like the stock list: `tokens[i]` is the dense [B, S, n + P, 2C] of layer i, or None where the host caches
    nothing. Each look restores the whole clip anew, so take a layer once, or ask `frames` for a few frames at a time,
    as accelerated heads do: four dense layers of a long clip never exist at once. (A stock head that walks through the
    clip in chunks looks once for each chunk: hand it `list(tokens)`.)

    Args:
        compact: layer -> [B, S, n + K, 2C], special tokens first.
        length: number of layers of the host.
        features: DINO patch tokens [B, S, P, C].
        kept: indices of the kept tokens [B, S, K], ascending.
        role: [B, S, P], what became of each patch token (see `assignment.Assignment`).
        grid: patch rows and columns.
        special: n, camera and register tokens in front of each frame's patch tokens.
        restoration: learned residual, or None.
    """

    def __init__(
        self,
        compact: dict[int, Tensor],
        length: int,
        features: Tensor,
        kept: Tensor,
        role: Tensor,
        grid: tuple[int, int],
        special: int,
        restoration: FeatureGuidedRestoration | None = None,
    ):
        self.compact = compact
        self.features = features
        self.kept = kept
        self.role = role
        self.grid = grid
        self.special = special
        self.restoration = restoration
        self._length = length

    def __repr__(self) -> str:
        batch, frames, kept = self.kept.shape
        return (
            f"{type(self).__name__}({self._length} layers, dense in {sorted(self.layers)}, {batch} x {frames} frames, "
            f"{kept} of {self.role.shape[2]} patch tokens kept)"
        )

    @property
    def layers(self) -> Set[int]:
        """The layers that are not None."""
        return self.compact.keys()

    @property
    def pruned(self) -> bool:
        """Whether tokens were dropped, so that there is something to restore."""
        return self.kept.shape[-1] < self.role.shape[2]

    @property
    def total(self) -> int:
        """S."""
        return self.kept.shape[1]

    @property
    def tokens_held(self) -> int:
        """Patch tokens of a clip before anything is restored."""
        return self.total * self.kept.shape[-1]

    @property
    def tokens_read(self) -> int:
        """Patch tokens of a clip that a dense head reads."""
        return self.total * self.role.shape[2]

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Tensor | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor | None]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} layers, no layer {index}")
        layer = index % len(self)
        if layer not in self.layers:
            return None
        frames = self.kept.shape[1]
        chunks = [
            self.frames(i, i + FRAMES_RESTORED, [layer])[layer] for i in range(0, frames, FRAMES_RESTORED)
        ]
        return torch.cat(chunks, dim=1)  # type: ignore[arg-type]

    def frames(self, start: int, stop: int, layers: Iterable[int]) -> list[Tensor | None]:
        """Dense tokens [B, stop - start, n + P, 2C] of some layers and frames, None for all other layers."""
        if self.pruned:
            lead = len(self.kept), -1
            dense = {
                i: torch.cat([self.special_tokens(i)[:, start:stop], t.unflatten(0, lead)], dim=2)
                for i, t in self.patches(start, stop, layers).items()
            }
        else:
            dense = {i: self.compact[i][:, start:stop] for i in self.wanted(layers)}
        return [dense.get(i) for i in range(len(self))]

    def wanted(self, layers: Iterable[int]) -> list[int]:
        """Those of `layers`, counted from the front, that the host caches; ascending."""
        return sorted({range(len(self))[i] for i in layers} & self.layers)

    def special_tokens(self, layer: int) -> Tensor:
        """Camera and register tokens [B, S, n, 2C] of a layer that the host caches."""
        return self.compact[layer][:, :, : self.special]

    def patches(self, start: int, stop: int, layers: Iterable[int]) -> dict[int, Tensor]:
        """Layer -> dense patch tokens [B * (stop - start), P, 2C], for those of `layers` that the host caches."""
        compact = {
            i: self.compact[i][:, start:stop, self.special :].flatten(0, 1) for i in self.wanted(layers)
        }  # [B*s, K, 2C]
        features, kept = (t[:, start:stop].flatten(0, 1) for t in (self.features, self.kept))
        # Tokens of an inference mode that has ended can't enter a graph of gradients, which trained weights ask for.
        ended = not torch.compiler.is_compiling() and features.is_inference()
        with torch.inference_mode() if ended else nullcontext():
            return restore(compact, features, kept, self.grid, self.restoration)

    def select(self, frames: Tensor) -> RestoredTokens:
        """The tokens of some frames, given by their numbers [n] (int64, on the device of the tokens)."""
        return RestoredTokens(
            {layer: tokens.index_select(1, frames) for layer, tokens in self.compact.items()},
            self._length,
            self.features.index_select(1, frames),
            self.kept.index_select(1, frames),
            self.role.index_select(1, frames),
            self.grid,
            self.special,
            self.restoration,
        )

    def camera(self) -> list[Tensor | None]:
        """The list a camera head reads: of the last layer the special tokens, which are never pruned."""
        return [None] * (len(self) - 1) + [self.special_tokens(len(self) - 1)]
