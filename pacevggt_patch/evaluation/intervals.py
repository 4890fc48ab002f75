"""How sure a change of a mean over scenes is: the bootstrap over scenes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000


class Change(NamedTuple):
    """Change of a mean in percent, and the ends of its confidence interval, which one scene alone does not tell."""

    percent: float
    low: float | None
    high: float | None


def change_of_mean(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Change | None:
    """Change of the mean over scenes, in percent of the mean before.

    Scenes are drawn anew with repetition, each with both of its values, `RESAMPLES` times. The interval is that between
    the quantiles that leave out 2.5 % at either end. It is the same at every call.

    Args:
        before: [N] values of the scenes.
        after: [N] values of the same scenes.

    Returns:
        None where the mean before is 0, or there are no scenes.
    """
    if not len(before) or not np.mean(before):
        return None
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    percent = float(100 * (second.mean() / first.mean() - 1))
    if len(first) == 1:
        return Change(percent, None, None)
    drawn = np.random.default_rng(seed).integers(0, len(first), (RESAMPLES, len(first)))
    means, others = first[drawn].mean(1), second[drawn].mean(1)  # [RESAMPLES]
    changes = 100 * (others[means != 0] / means[means != 0] - 1)
    low, high = np.quantile(changes, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Change(percent, float(low), float(high))
