"""What the method asks for where a clip is spread over processes, each of which has some of its frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Exchange(Protocol):
    """One clip over several processes, its frames in their order. In one process there is None in its place.

    All processes call the same functions in the same order.

    Attributes:
        counts: frames of each process.
        before: frames of the processes before this one.
        total: S, frames of all.
    """

    @property
    def counts(self) -> Sequence[int]: ...
    @property
    def before(self) -> int: ...
    @property
    def total(self) -> int: ...

    def gather(self, tensor: Tensor, sizes: Sequence[int], dim: int) -> list[Tensor]:
        """The tensors of all processes, alike but for their `sizes` in dimension `dim`."""
        ...

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        """The sums over all processes of tensors of one dtype, the same on each."""
        ...


def extent(exchange: Exchange | None, frames: int) -> tuple[int, int]:
    """How many frames of a clip come before those here, and how many there are in all, of `frames` that are here."""
    return (0, frames) if exchange is None else (exchange.before, exchange.total)
