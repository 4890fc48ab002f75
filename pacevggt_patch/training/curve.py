"""The picture of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.plotting import load_pyplot, save_figure


def save_training_curve(path: Path, losses: list[dict[str, float]], checks: list[dict[str, Any]]) -> None:
    """Losses over steps, and what every stage gave.

    Args:
        path: a PNG.
        losses: records with `step` and losses by name.
        checks: records with `stage` and, by keep ratio in `ratios`, differences from the unpruned model by name.
    """
    plt = load_pyplot()
    panels = 3 if losses else 2  # a calibration has none
    figure, axes = plt.subplots(1, panels, figsize=(2 + 4 * panels, 4), layout="constrained")
    if losses:
        names = sorted({name for record in losses for name in record} - {"step", "total", "norm"})
        for name in names:
            rows = [(record["step"], record[name]) for record in losses if name in record]
            marker = "." if len(rows) < 3 else ""  # a line through one point can't be seen
            axes[0].plot(*zip(*rows, strict=True), marker=marker, label=name, linewidth=0.8)
        axes[0].set(title="training losses", xlabel="step", yscale="log")
        if names:
            axes[0].legend(fontsize=7)
    ratios = list(checks[0]["ratios"]) if checks else []
    stages = [check["stage"] for check in checks]
    for axis, key, title in (
        (axes[-2], "rotation_deg", "rotation, degrees"),
        (axes[-1], "depth", "depth, relative"),
    ):
        for ratio in ratios:
            values = [check["ratios"][ratio].get(key, np.nan) for check in checks]
            axis.plot(range(len(checks)), values, "o-", label=f"keep {ratio}")
        axis.set_xticks(range(len(checks)), stages, fontsize=8)
        axis.set(title=f"difference from the unpruned model: {title}", ylim=(0, None))
        axis.title.set_fontsize(9)
        axis.legend(fontsize=7)
    for axis in axes:
        axis.grid(alpha=0.3)
    save_figure(figure, path)
