"""Pictures of what latency.py measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pacevggt_patch.runtime.plotting import load_pyplot, save_figure


def save_plots(report: dict[str, Any], path: Path) -> None:
    """Seconds over the number of frames, stages as bars, and peak memory where it was measured, in one PNG."""
    pyplot = load_pyplot()
    panels: list[Callable[[Any, dict[str, Any]], None]] = [draw_seconds]
    panels += [draw_stages] if report["details"] else []
    panels += [draw_memory] if any(row.get("peak_gib") for row in report["rows"]) else []
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.5), layout="constrained", squeeze=False
    )
    for axis, draw in zip(axes[0], panels, strict=True):
        draw(axis, report)
    figure.suptitle(f"{report['backbone']}, {report['size']}, {report['environment']['device']}", fontsize=10)
    save_figure(figure, path)


def label(row: dict[str, Any]) -> str:
    """What a line of the picture stands for."""
    return f"keep {row['keep_ratio']:g}" if row["variant"] == "pace" else row["variant"]


def draw_lines(axis: Any, report: dict[str, Any], key: str) -> None:
    """A line for each variant and keep ratio over the number of frames; sizes that failed are left out."""
    names = list(dict.fromkeys(label(row) for row in report["rows"]))
    for name in names:
        rows = [row for row in report["rows"] if label(row) == name and row.get(key) is not None]
        rows.sort(key=lambda row: row["frames"])
        axis.plot([row["frames"] for row in rows], [row[key] for row in rows], "o-", label=name)
    axis.set_xlabel("frames")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)


def draw_seconds(axis: Any, report: dict[str, Any]) -> None:
    draw_lines(axis, report, "seconds_median")
    axis.set(title="seconds, median", xscale="log", yscale="log")


def draw_memory(axis: Any, report: dict[str, Any]) -> None:
    draw_lines(axis, report, "peak_gib")
    axis.set(title="peak GPU memory, GiB", ylim=(0, None))


def draw_stages(axis: Any, report: dict[str, Any]) -> None:
    """One bar for each profiled setting, as shares of its time."""
    settings = report["details"]
    names = list(dict.fromkeys(stage["stage"] for detail in settings for stage in detail["stages"]))
    left = [0.0] * len(settings)
    places = range(len(settings))
    for name in names:
        widths = []
        for detail in settings:
            total = sum(stage["seconds"] for stage in detail["stages"])
            own = sum(stage["seconds"] for stage in detail["stages"] if stage["stage"] == name)
            widths.append(100 * own / total)
        axis.barh(places, widths, left=left, label=name.replace("_", " "))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_yticks(places, [f"{label(detail)}, N={detail['frames']}" for detail in settings], fontsize=8)
    axis.invert_yaxis()
    axis.set(title="stages, percent of a forward")
    axis.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08))


def save_scaling(report: dict[str, Any], path: Path) -> None:
    """Speed-up over the number of GPUs, on paper and measured, and memory of a GPU over frames, in one PNG."""
    pyplot = load_pyplot()
    rows, paper = report["rows"], report["model"]
    panels: list[Callable[[Any], None]] = []

    def speedups(axis: Any) -> None:
        gpus = sorted({row["gpus"] for row in [*rows, *paper]})
        axis.plot(gpus, gpus, "--", color="gray", label="as many times as GPUs")
        for number, frames in enumerate(dict.fromkeys(row["frames"] for row in rows)):
            line = [(row["gpus"], row["predicted_speedup"]) for row in paper if row["frames"] == frames]
            dots = [
                (row["gpus"], row["speedup"]) for row in rows if row["frames"] == frames and row["speedup"]
            ]
            color = f"C{number}"
            axis.plot(*zip(*line, strict=True), color=color, alpha=0.6) if line else None
            axis.plot(*zip(*dots, strict=True), "o", color=color, label=f"{frames} frames") if dots else None
        axis.set(title="speed-up over one GPU: dots measured, lines on paper", xlabel="GPUs", xticks=gpus)
        axis.set(ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)

    def memory(axis: Any) -> None:
        for gpus in dict.fromkeys(row["gpus"] for row in rows):
            some = sorted((r["frames"], r["peak_gib"]) for r in rows if r["gpus"] == gpus and r["peak_gib"])
            name = f"{gpus} GPU{'s' * (gpus > 1)}"
            axis.plot(*zip(*some, strict=True), "o-", label=name) if some else None
        axis.set(title="peak memory of a GPU, GiB", xlabel="frames", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)

    panels.append(speedups)
    panels += [memory] if any(row["peak_gib"] for row in rows) else []
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.5), layout="constrained", squeeze=False
    )
    for axis, draw in zip(axes[0], panels, strict=True):
        draw(axis)
    figure.suptitle(f"{report['backbone']}, {report['size']}, {report['environment']['device']}", fontsize=10)
    save_figure(figure, path)
