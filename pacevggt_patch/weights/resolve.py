"""Which weights `accelerate` takes."""

from __future__ import annotations

import warnings
from os import PathLike

from ..config import GLOBAL, PRE_AA, PaceConfig
from ..errors import WeightsError
from ..hosts.base import Host
from . import cache
from .pace import PaceWeights, bundled_for, check_values, load


def resolve(
    weights: str | PathLike[str] | PaceWeights | None, config: PaceConfig, host: Host
) -> tuple[PaceWeights | None, str]:
    """The weights that were asked for, checked against the host, and the mode.

    Args:
        weights: as in `accelerate`. "auto": bundled weights of this checkpoint, else a calibration that is kept on this
            machine, else None.
        config: the settings.
        host: the model.

    Returns:
        The object itself where one was given, else what was read; None where there is none.

    Raises:
        WeightsError: weights can't be had, are damaged, do not fit, or are for another mode.
    """
    asked = config.mode or (None if config.merge_budget is None else PRE_AA)
    if weights is None:
        return None, asked or GLOBAL
    if isinstance(weights, str) and weights == "auto":
        mode = asked or GLOBAL
        check_values(host)
        found = bundled_for(host, mode) or (cache.find(host) if mode == GLOBAL else None)
        if found is None and mode == PRE_AA:
            warnings.warn(
                "no weights of pre-AA pruning are bundled for this checkpoint, so it runs training-free: "
                "pass weights that you trained, or weights=None to choose that without this warning",
                UserWarning,
                stacklevel=4,  # past accelerate(), to the line that called it
            )
        return found, mode
    chosen = weights if isinstance(weights, PaceWeights) else load(weights, host)
    if asked is not None and chosen.mode != asked:
        what = f'mode="{config.mode}"' if config.mode else f"merge_budget={config.merge_budget:g}"
        raise WeightsError(
            f"pace weights {chosen.source} are for {chosen.mode} pruning, and {what} asks for {asked} pruning: "
            "leave that out, or pass other weights"
        )
    chosen.check(host)
    return chosen, chosen.mode
