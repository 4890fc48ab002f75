"""The picture of an evaluation: what changed from stock, scene by scene."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.plotting import load_pyplot, save_figure
from .protocols import METRICS

SHOWN = ("auc30", "ate", "absrel", "chamfer", "chamfer_clipped")
MOST_NAMED = 30  # scenes whose names can be read below the axis


def save_changes(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Draw the difference from stock of each scene, in the unit of the metric, with a panel a metric.

    Args:
        path: a PNG.
        results: of the scenes, each with its sides, stock first.
    """
    plt = load_pyplot()
    names = [side["name"] for side in results[0]["sides"][1:]]
    panels = {key: differences(key, results) for key in SHOWN}
    # Of both chamfer distances one is enough.
    panels = {key: rows for key, rows in panels.items() if np.isfinite(rows).any()}
    if "chamfer" in panels:
        panels.pop("chamfer_clipped", None)
    scenes = [result["scene"] for result in results]
    width, height = float(np.clip(1.5 + 0.28 * len(scenes), 6.5, 14)), 1.2 + 1.7 * max(1, len(panels))
    figure, axes = plt.subplots(
        max(1, len(panels)), 1, figsize=(width, height), sharex=True, squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(
        w_pad=0.15, h_pad=0.08
    )  # inches; long names of scenes reach beyond the axes
    for axis, (key, rows) in zip(axes[:, 0], panels.items(), strict=False):
        for number, (name, values) in enumerate(zip(names, rows, strict=True)):
            colour, places = f"C{number}", np.arange(len(scenes)) + 0.12 * (number - (len(names) - 1) / 2)
            axis.plot(places, values, "o", color=colour, markersize=4.5, label=name)
            if np.isfinite(values).any():
                axis.axhline(np.nanmean(values), color=colour, linewidth=1, linestyle="--", alpha=0.8)
        axis.axhline(0, color="0.3", linewidth=0.8)
        better = "above 0 is better" if METRICS[key].better == "more" else "below 0 is better"
        axis.set_title(f"{METRICS[key].title}: difference from stock ({better})", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    last = axes[-1, 0]
    last.set_xlim(-0.7, len(scenes) - 0.3)
    if len(scenes) <= MOST_NAMED:
        last.set_xticks(range(len(scenes)), scenes)
        if len(scenes) > 4:
            plt.setp(last.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
    else:
        last.set_xlabel("number of the scene, sorted by name", fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    entries: list[tuple[Any, str]] = []
    for number, (handle, label) in enumerate(zip(handles, labels, strict=True)):
        mean = plt.Line2D([], [], color=f"C{number}", linewidth=1, linestyle="--")
        entries += [(handle, label), (mean, "its mean" if len(labels) > 1 else "mean")]
    # Columns are filled from above: of several settings each has its mean below it.
    figure.legend(
        [handle for handle, _ in entries],
        [label for _, label in entries],
        loc="outside upper right",
        ncols=max(2, len(labels)),
        fontsize=8,
        frameon=False,
    )
    save_figure(figure, path)


def differences(key: str, results: Sequence[dict[str, Any]]) -> np.ndarray:
    """[settings, scenes] of a metric's difference from stock; NaN where one of both is not known."""

    def value(side: dict[str, Any]) -> float:
        known = side["metrics"] and side["metrics"][key]
        return np.nan if known is None else known

    table = np.array([[value(side) for side in result["sides"]] for result in results], np.float64).T
    return table[1:] - table[0]
