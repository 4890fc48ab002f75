"""The report: everything as one dictionary, as a table for the terminal, and in a sentence."""

from __future__ import annotations

import math
from typing import Any

from ..clips import Clip
from ..runtime.files import environment
from ..version import __version__
from .differences import Difference, changes, truth_errors
from .plan import PRECISIONS, Options, Plan, Source
from .runs import Runner, Side

DID_NOT_FIT = "did not fit"


def new_report(plan: Plan, processes: int = 1) -> dict[str, Any]:
    """A report without clips; `processes` share the accelerated runs."""
    options = plan.options
    command = options.command
    if command is not None and processes > 1:
        command = (
            f"torchrun --nproc-per-node {processes} -m {command.replace('pacevggt', 'pacevggt_patch', 1)}"
        )
    return {
        "pacevggt_patch": __version__,
        "command": command,
        "processes": processes,
        "backbone": backbone_name(options),
        "device": str(plan.device),
        "precision": plan.precision,
        "precision_in_words": PRECISIONS[plan.precision],
        "compile": options.compile,
        "repeats": options.repeats,
        "environment": environment(plan.device),
        "clips": [],
    }


def backbone_name(options: Options) -> str:
    """What the backbone is called."""
    if not isinstance(options.backbone, str):
        return type(options.backbone).__name__
    return "VGGT-mini" if options.backbone == "mini" else options.backbone


def clip_report(
    source: Source, sides: list[Side], differences: dict[str, Difference], runner: Runner
) -> dict[str, Any]:
    """One clip of the report; what did not fit has null where there is no value."""
    clip, (stock, *others) = source.clip, sides
    patches = (clip.height // runner.patch_size) * (clip.width // runner.patch_size)
    before = side_report(stock, clip)
    settings = []
    for side in others:
        assert side.config is not None
        found = side_report(side, clip)
        faster = stock.timing.median / side.timing.median if stock.fits and side.fits else None
        entry = {
            "name": side.name,
            "keep_ratio": side.config.keep_ratio,
            "mode": side.config.mode,
            "merge_budget": side.config.merge_budget,
            "weights": side.weights or None,
            "full_heads": side.full_heads,
            "heads": runner.heads,
            "kept_tokens": patches if side.kept_count is None else side.kept_count,
            "patches": patches,
            **found,
            "speedup": faster,
            "truth_change": changes(before["truth"], found["truth"]),
            "agreement": differences[side.name].values if side.name in differences else None,
        }
        settings.append({**entry, "outcome": outcome(entry, before)})
    return {
        "name": clip.name,
        "path": source.path,
        "frames": len(clip),
        "width": clip.width,
        "height": clip.height,
        "has_truth": {"cameras": clip.world_to_camera is not None, "depth": clip.depth is not None},
        "stock": before,
        "settings": settings,
    }


def side_report(side: Side, clip: Clip) -> dict[str, Any]:
    """Times, memory and errors of one side."""
    truth: dict[str, float | None] = {"auc30": None, "rotation_deg": None, "absrel": None}
    if side.fits and side.prediction is not None:
        truth = truth_errors(side.prediction, clip)
    return {
        "fits": side.fits,
        "seconds": side.timing.median if side.fits else None,
        "seconds_of_runs": side.timing.seconds if side.fits else [],
        "peak_gib": side.timing.peak_gib if side.fits else None,
        "truth": truth,
    }


def outcome(setting: dict[str, Any], stock: dict[str, Any]) -> str:
    """What came out, in a sentence."""
    if not setting["fits"]:
        return "the accelerated model did not fit into memory"
    if not stock["fits"]:
        memory = "" if setting["peak_gib"] is None else f" and {setting['peak_gib']:.1f} GiB"
        return (
            f"stock did not fit into memory; the accelerated model took {seconds(setting['seconds'])}{memory}"
        )
    parts = [f"{times(setting['speedup'])} as fast"]
    runs, of_stock = setting["seconds_of_runs"], stock["seconds_of_runs"]
    if len(runs) > 1 and max(min(runs), min(of_stock)) <= min(max(runs), max(of_stock)):
        parts = ["about as fast as stock: the times of their runs overlap"]
    before, after = stock["peak_gib"], setting["peak_gib"]
    if before and after:
        parts.append(f"{after:.1f} GiB in place of {before:.1f}")
    found = setting["agreement"]
    if found and found["rotation_deg"]:
        parts.append(f"cameras {degrees(found['rotation_deg']['median'])} from stock")
    if found and found["depth"]:
        parts.append(f"depth {percent(found['depth']['median'])} from stock")
    return "; ".join(parts)


def significant(value: float, digits: int = 2) -> str:
    """A number with at least so many significant digits and no exponent; what is below 0.001 is 0."""
    if abs(value) < 1e-3:
        return "0"
    rounded = abs(float(f"{value:.{digits - 1}e}"))
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(rounded)))}f}"


def seconds(value: float) -> str:
    return f"{significant(value, 3)} s"


def times(value: float) -> str:
    return f"{value:.1f} times"


def degrees(value: float) -> str:
    return f"{significant(value)}°"


def percent(share: float) -> str:
    return f"{significant(100 * share)} %"


def signed(value: float) -> str:
    return f"{value:+.1f} %"


def rows(clip: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The table of a clip: names of the rows, and a cell for stock and for each setting."""
    sides = [clip["stock"], *clip["settings"]]
    table = [
        ("seconds, median", cells(sides, lambda side: significant(side["seconds"], 3))),
        ("seconds, fastest to slowest run", cells(sides, run_range)),
        ("speed-up", cells(sides, lambda side: speedup(side, clip["stock"]))),
    ]
    if any(side["peak_gib"] for side in sides):
        table.append(("GPU memory, peak GiB", cells(sides, lambda side: f"{side['peak_gib']:.1f}")))
    for name, key in (
        ("rotation from stock, degrees (90 %)", "rotation"),
        ("direction from stock, degrees (90 %)", "direction"),
        ("depth from stock, median % (mean)", "depth"),
        ("points from stock, % of the cloud's size", "points"),
    ):
        table.append((name, cells(sides, lambda side, key=key: agreement_cell(side, clip["stock"], key))))
    for name, key, digits in (
        ("camera AUC@30, % (more is better)", "auc30", 1),
        ("rotation error, median degrees", "rotation_deg", 2),
        ("depth AbsRel (less is better)", "absrel", 4),
    ):
        if any(side["truth"][key] is not None for side in sides):
            table.append((name, cells(sides, lambda side, key=key, n=digits: truth_cell(side, key, n))))
    return table


def cells(sides: list[dict[str, Any]], show: Any) -> list[str]:
    """A cell for each side; what did not fit says so."""
    return [show(side) if side["fits"] else DID_NOT_FIT for side in sides]


def run_range(side: dict[str, Any]) -> str:
    """Fastest to slowest run."""
    runs = side["seconds_of_runs"]
    return f"{significant(min(runs), 3)}-{significant(max(runs), 3)}"


def speedup(side: dict[str, Any], stock: dict[str, Any]) -> str:
    """How many times as fast as stock."""
    if side is stock:
        return "1.0x"
    return "no stock" if side["speedup"] is None else f"{side['speedup']:.1f}x"


def agreement_cell(side: dict[str, Any], stock: dict[str, Any], key: str) -> str:
    """How far a side is from stock."""
    if side is stock:
        return "0"
    found = side["agreement"]
    if found is None:
        return "no stock"
    if key in ("rotation", "direction"):
        angles = found[f"{key}_deg"]
        if angles is None:
            return "no pairs"
        return f"{significant(angles['median'])} ({significant(angles['p90'])})"
    values = found[key]
    if values is None:
        return f"no {key}"
    if key == "points":
        return significant(values["median_percent"])
    return f"{significant(100 * values['median'])} ({significant(100 * values['mean'])})"


def truth_cell(side: dict[str, Any], key: str, digits: int) -> str:
    """An error against ground truth, with its change from stock."""
    value = side["truth"][key]
    if value is None:
        return "no truth"
    change = side.get("truth_change", {}).get(key)
    return f"{value:.{digits}f}" + ("" if change is None else f" ({signed(change)})")


def format_table(report: dict[str, Any]) -> str:
    """The report for the terminal: a table for each clip, and a sentence for each setting."""
    lines = []
    for clip in report["clips"]:
        table = [("", ["stock", *(setting["name"] for setting in clip["settings"])]), *rows(clip)]
        widths = [max(map(len, column)) for column in zip(*(row for _, row in table), strict=True)]
        width = max(len(name) for name, _ in table)
        lines.append(title(report, clip))
        for name, row in table:
            aligned = (f"  {cell:>{wide}s}" for cell, wide in zip(row, widths, strict=True))
            lines.append(f"{name:{width}s}{''.join(aligned)}")
        lines += [f"{setting['name']}: {setting['outcome']}." for setting in clip["settings"]]
        used = dict.fromkeys(setting["weights"] for setting in clip["settings"] if setting["weights"])
        lines += [*(f"weights: {weights}" for weights in used), ""]
    return "\n".join(lines).rstrip()


def of_processes(report: dict[str, Any]) -> str:
    """Who ran what, where several processes did; empty where one did all."""
    count = report.get("processes", 1)
    return "" if count == 1 else f", stock in one process, accelerated in {count} that share the frames"


def title(report: dict[str, Any], clip: dict[str, Any]) -> str:
    """What ran on what, in a line."""
    where = f"{report['environment']['device']}{of_processes(report)}"
    return (
        f"{report['backbone']} on {clip['name']}, {clip['frames']} frames of {clip['width']}x{clip['height']}, "
        f"{report['precision']}, {where}"
    )
