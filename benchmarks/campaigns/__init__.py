"""What goes wrong, tried many times: each campaign yields what it tried and what was not as promised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Trial:
    """One situation.

    Attributes:
        name: what was tried.
        problem: what was not as promised, or None.
        refused: whether the package refused it in a sentence of its own.
        good: whether nothing is wrong with it, so that a refusal is a problem.
    """

    name: str
    problem: str | None = None
    refused: bool = False
    good: bool = False

    def __post_init__(self):
        if self.good and self.refused and self.problem is None:
            object.__setattr__(self, "problem", "is refused, though nothing is wrong with it")


@dataclass(frozen=True)
class Campaign:
    """Situations of one kind.

    Attributes:
        name: of the kind.
        promise: what must hold in each, in a sentence.
        run: yields trials, few of them if its argument says so.
    """

    name: str
    promise: str
    run: Callable[[bool], Iterator[Trial]]


CAMPAIGNS: dict[str, Campaign] = {}


def campaign(promise: str) -> Callable[[Any], Campaign]:
    """Make a function of `quick` a campaign of its name."""

    def add(run: Any) -> Campaign:
        name = run.__name__.replace("_", " ")
        CAMPAIGNS[name] = Campaign(name, promise, run)
        return CAMPAIGNS[name]

    return add
