"""Means over scenes and their changes from stock, as one dictionary, as Markdown, and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ..errors import PaceError
from ..evaluation.intervals import RESAMPLES, change_of_mean
from .protocols import METRICS, PUBLISHED

FEW_SCENES = 10  # below which a bootstrap knows too little
Result = dict[str, Any]  # of a scene


def summarise(settings: dict[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """The content of summary.json.

    A metric's mean is over the scenes in which it is known for every side that knows it anywhere, so that all its means
    are of the same scenes.

    Args:
        settings: of the run.
        results: of all its scenes.

    Raises:
        PaceError: scenes ran with different sides or weights.
    """
    check_alike(results)
    metrics = {key: metric_summary(key, results) for key in METRICS}
    times = common(results, lambda side: side["seconds"])
    sides = []
    for number in range(len(results[0]["sides"])):
        of_side = [result["sides"][number] for result in results]
        seconds = mean(times[number])
        stock_seconds = mean(times[0])
        sides.append(
            {
                **{key: of_side[0][key] for key in ("name", "keep_ratio", "mode", "merge_budget")},
                **{
                    key: first_known(of_side, key)
                    for key in ("weights", "weights_digest", "full_heads", "heads", "kept_tokens")
                },
                "seconds": seconds,
                "speedup": stock_seconds / seconds if seconds and stock_seconds else None,
                "peak_gib": max((side["peak_gib"] for side in of_side if side["peak_gib"]), default=None),
                "did_not_fit": scenes_where(results, number, lambda side: not side["fits"]),
                "without_points": scenes_where(results, number, lambda side: lacks_points(side, settings)),
                "metrics": {key: found[number] for key, found in metrics.items()},
            }
        )
    frames = [result["frames"] for result in results]
    return {
        "settings": settings,
        "scenes": len(results),
        "frames": {"least": min(frames), "most": max(frames)},
        "frames_left_out": sum(result["frames_left_out"] for result in results),
        "without_depth": [result["scene"] for result in results if not result["has_depth"]],
        "not_in_metres": [result["scene"] for result in results if not result["metres"]],
        "resamples": RESAMPLES,
        "sides": sides,
    }


def check_alike(results: Sequence[Result]) -> None:
    """Raise `PaceError` if two scenes did not run with the same."""
    for key, what in (("name", "settings"), ("weights_digest", "weights")):
        for number, side in enumerate(results[0]["sides"]):
            for result in results:
                sides = result["sides"]
                if len(sides) != len(results[0]["sides"]) or (
                    side["fits"] and sides[number]["fits"] and sides[number][key] != side[key]
                ):
                    raise PaceError(
                        f"scenes {results[0]['scene']} and {result['scene']} did not run with the same {what}: "
                        "delete the results of one of them, and it runs again"
                    )


def lacks_points(side: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a side has no point that is confident enough to be compared with the mesh."""
    return settings["protocol"] == PUBLISHED and side["fits"] and side["metrics"]["chamfer_clipped"] is None


def scenes_where(results: Sequence[Result], number: int, holds: Any) -> list[str]:
    """Names of the scenes of which that holds for a side."""
    return [result["scene"] for result in results if holds(result["sides"][number])]


def common(results: Sequence[Result], value_of: Any) -> list[list[float]]:
    """Values of each side over the scenes in which all sides have one, but for sides that never have."""
    sides = range(len(results[0]["sides"]))
    values = [[value_of(result["sides"][number]) for result in results] for number in sides]
    known = [number for number in sides if any(value is not None for value in values[number])]
    shared = [i for i in range(len(results)) if all(values[number][i] is not None for number in known)]
    return [[values[number][i] for i in shared] if number in known else [] for number in sides]


def metric_summary(key: str, results: Sequence[Result]) -> list[dict[str, Any]]:
    """Mean, number of scenes, and change from stock with its interval, of each side."""
    values = common(results, lambda side: side["metrics"][key] if side["metrics"] else None)
    found = []
    for number, own in enumerate(values):
        change = change_of_mean(values[0], own) if number and values[0] and own else None
        found.append({"mean": mean(own), "scenes": len(own), "change": change and change._asdict()})
    return found


def mean(values: Sequence[float]) -> float | None:
    """Mean, or None where there are no values."""
    return statistics.fmean(values) if values else None


def first_known(sides: Sequence[dict[str, Any]], key: str) -> Any:
    """A value of the first scene that has it."""
    return next((side[key] for side in sides if side["fits"] and side[key] is not None), None)


def rows(summary: dict[str, Any]) -> list[list[str]]:
    """The table: a header, then a row for each number that is known; a column for each side."""
    sides = summary["sides"]
    table = [["", *(side["name"] for side in sides)]]
    for key, metric in METRICS.items():
        if all(side["metrics"][key]["mean"] is None for side in sides):
            continue
        arrow = "more is better" if metric.better == "more" else "less is better"
        scenes = max(side["metrics"][key]["scenes"] for side in sides)
        counted = "" if scenes == summary["scenes"] else f"; {scenes} of {summary['scenes']} scenes"
        cells = [cell(side["metrics"][key], metric.digits) for side in sides]
        table.append([f"{metric.title} ({arrow}{counted})", *cells])
    table.append(["seconds a scene", *(shown(side["seconds"], 2) for side in sides)])
    table.append(
        ["speed-up", *("-" if side["speedup"] is None else f"{side['speedup']:.1f}x" for side in sides)]
    )
    if any(side["peak_gib"] for side in sides):
        table.append(["GPU memory, peak GiB", *(shown(side["peak_gib"], 1) for side in sides)])
    return table


def cell(found: dict[str, Any], digits: int) -> str:
    """Mean, and change in percent with its interval."""
    change = found["change"]
    if found["mean"] is None or change is None:
        return shown(found["mean"], digits)
    between = "" if change["low"] is None else f" [{change['low']:+.1f}, {change['high']:+.1f}]"
    return f"{found['mean']:.{digits}f} ({change['percent']:+.1f} %{between})"


def shown(value: float | None, digits: int) -> str:
    """A number, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def title(summary: dict[str, Any]) -> str:
    """What ran on what, in a line."""
    settings, frames = summary["settings"], summary["frames"]
    several = (
        f"{frames['least']}"
        if frames["least"] == frames["most"]
        else f"{frames['least']} to {frames['most']}"
    )
    return (
        f"{settings['backbone']} on {summary['scenes']} scene{'s' * (summary['scenes'] > 1)} of {settings['dataset']}, "
        f"{several} frames each, protocol {settings['protocol']}, {settings['precision']}, {settings['device']}"
    )


def notes(summary: dict[str, Any]) -> list[str]:
    """What a reader of the table has to know, a sentence each."""
    found = []
    if summary["scenes"] > 1:
        found.append(
            "In brackets the change from stock, and its 95 % interval by "
            f"{summary['resamples']:,} bootstrap samples of scenes."
        )
        if summary["scenes"] < FEW_SCENES:
            found.append(f"Intervals of fewer than {FEW_SCENES} scenes are too narrow to rely on.")
    else:
        found.append("One scene has no confidence interval.")
    if summary["frames_left_out"]:
        found.append(f"{summary['frames_left_out']} frames without a pose were left out, over all scenes.")
    if summary["without_depth"]:
        found.append(
            f"Depth and points were not measured in {names(summary['without_depth'])}: there is no true depth."
        )
    if summary["not_in_metres"]:
        found.append(
            f"ATE and RPE translation were not measured in {names(summary['not_in_metres'])}: poses are not in metres."
        )
    for side in summary["sides"]:
        if side["did_not_fit"]:
            found.append(f"{side['name']} did not fit into memory in {names(side['did_not_fit'])}.")
        if side["without_points"]:
            found.append(
                f"{side['name']} has no point of confidence {summary['settings']['confidence']:g} or more in "
                f"{names(side['without_points'])}: chamfer is the mean of the other scenes."
            )
    for weights in dict.fromkeys(side["weights"] for side in summary["sides"][1:]):
        sharing = ", ".join(side["name"] for side in summary["sides"][1:] if side["weights"] == weights)
        found.append(f"Weights of {sharing}: {weights}.")
    return found


def names(scenes: Sequence[str], most: int = 5) -> str:
    """How many scenes, and their names."""
    listed = ", ".join(scenes[:most]) + ", ..." * (len(scenes) > most)
    return f"{len(scenes)} scene{'s' * (len(scenes) > 1)} ({listed})"


def format_table(summary: dict[str, Any]) -> str:
    """The summary for the terminal."""
    table = rows(summary)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [title(summary)]
    for name, *cells in table:
        aligned = (f"  {text:>{width}s}" for text, width in zip(cells, widths[1:], strict=True))
        lines.append(f"{name:{widths[0]}s}{''.join(aligned)}")
    return "\n".join([*lines, *notes(summary)])


def markdown(summary: dict[str, Any]) -> str:
    """The summary as a page of Markdown."""
    header, *others = rows(summary)
    lines = [f"# {title(summary)}", "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in others]
    lines += ["", *(f"- {note}" for note in notes(summary)), "", "![Changes scene by scene](changes.png)", ""]
    return "\n".join(lines)
