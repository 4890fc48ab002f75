"""Write the tables of README.md, docs and weights/README.md from the files in results/, between their markers.

python benchmarks/write_tables.py
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from pacevggt_patch import PaceError
from pacevggt_patch.compare.report import format_table
from pacevggt_patch.runtime.files import whole_file

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
# Setting, as in the names of result files -> what it is called, and the call.
SETTINGS = {
    "default": ("global pruning, bundled weights", "`accelerate(model)`"),
    "calibrated": ("global pruning, calibrated on the first clip", "`accelerate(model)`, no file that fits"),
    "training-free": ("global pruning, training-free", "`weights=None`"),
    "pre-aa": ("pre-AA pruning, bundled weights", '`mode="pre-aa"`'),
    "pre-aa-training-free": ("pre-AA pruning, training-free", '`mode="pre-aa", weights=None`'),
}
# Clips, as in the names of result files -> what they are called.
CLIPS = {
    "rooms-8": "24 rooms, 8 views",
    "rooms-24": "12 rooms, 24 views",
    "redkitchen": "redkitchen, 3 x 8 photographs",
}
CHANGED = ("rooms-8", "redkitchen")  # clips that these were measured on
CHANGES = ("default", "calibrated", "pre-aa")  # settings
RATIOS = (0.3, 0.15)
STAGES = ("training-free", "calibrated", "refined")
LENGTHS = (8, 24, 96, 300)  # frames of the clips of the longer measurements
KEYS_LENGTHS = (24, 96, 300)
UNPRUNED = {
    "rooms-8": "24 rooms, 8 views",
    "rooms-24": "12 rooms, 24 views",
    "redkitchen": "redkitchen (7-Scenes), 3 clips of 8 photographs, 10 frames of the original apart",
    "redkitchen-wide": "redkitchen, 50 frames of the original apart",
    "herzjesu": "herzjesu-p25, first 8 photographs",
}


def report(name: str) -> dict[str, Any]:
    """A file that `quality.py` wrote."""
    return json.loads((RESULTS / f"quality-mini-{name}.json").read_text())


def row_of(name: str, ratio: float) -> dict[str, Any]:
    """The row of a keep ratio of such a file."""
    (row,) = (row for row in report(name)["rows"] if row["keep_ratio"] == ratio)
    return row


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(head: list[str], lines: list[list[str]]) -> str:
    """Markdown."""
    rows = ["| " + " | ".join(cells) + " |" for cells in (head, *lines)]
    return "\n".join([rows[0], "|" + "---|" * len(head), *rows[1:]])


def settings_table() -> str:
    """What each setting costs on rooms of 8 views, and on what it was measured."""
    head = [
        "setting",
        "call",
        "keep ratio",
        "AUC@30",
        "least, most",
        "change",
        "AbsRel",
        "least, most",
        "change",
    ]
    lines = [["unpruned", "", "", *of_metrics(row_of("rooms-8-default", 1.0), changes=False)]]
    for ratio in RATIOS:
        for setting, (title, call) in SETTINGS.items():
            lines.append([title, call, f"{ratio:g}", *of_metrics(row_of(f"rooms-8-{setting}", ratio))])
    return f"{measured_on('rooms-8-default')}\n\n{table(head, lines)}"


def of_metrics(row: dict[str, Any], changes: bool = True) -> list[str]:
    """Cells of AUC@30 and AbsRel: mean and standard deviation, range, change and its standard error."""
    cells = []
    for key, digits in (("auc30", 1), ("absrel", 4)):
        cells.append(f"{row[key]:.{digits}f} ± {row[f'{key}_std']:.{digits}f}")
        cells.append(f"{row[f'{key}_min']:.{digits}f}, {row[f'{key}_max']:.{digits}f}")
        cells.append(change(row, key) if changes else "")
    return cells


def change(row: dict[str, Any], key: str) -> str:
    """Change of a metric from the unpruned model, and its standard error."""
    return f"{row[f'{key}_change']:+.1f} % (± {row[f'{key}_change_error']:.1f})"


def measured_on(name: str) -> str:
    """Where a file comes from, in words."""
    found = report(name)
    where, seeds, threads = found["environment"], found["seeds"], found["environment"]["threads"]
    return (
        f"{found['count']} rooms (seeds {seeds[0]:,d} to {seeds[-1]:,d}) of {found['frames']} views, float32, "
        f"{where['device']}, {threads} thread{'s' * (threads != 1)}, torch {where['torch']}."
    )


def changes_table() -> str:
    """Changes of AUC@30 and AbsRel from the unpruned model, on rooms and on photographs."""
    lines = []
    for ratio in RATIOS:
        for setting in CHANGES:
            rows = [row_of(f"{name}-{setting}", ratio) for name in CHANGED]
            cells = [" / ".join(change(row, key) for key in ("auc30", "absrel")) for row in rows]
            lines.append([SETTINGS[setting][0], f"{ratio:g}", *cells])
    return table(["setting", "keep ratio", *(CLIPS[name] for name in CHANGED)], lines)


def lengths_table() -> str:
    """What global pruning costs on clips of several lengths, calibrated and with the bundled weights."""
    lines = []
    for frames in LENGTHS:
        name = f"long-rooms-{frames}"
        unpruned, *pruned = row_of(name, 1.0), row_of(name, 0.3), row_of(f"{name}-bundled", 0.3)
        cells = [f"{unpruned['auc30']:.1f} / {unpruned['absrel']:.4f}"]
        cells += [" / ".join(change(row, key) for key in ("auc30", "absrel")) for row in pruned]
        lines.append([str(frames), str(report(name)["count"]), *cells])
    return table(["frames", "rooms", "unpruned", "calibrated", "bundled weights"], lines)


def keys_table() -> str:
    """What the parts of the keys are worth: pairs of queries and keys, and what is lost, for each length."""
    found = [
        json.loads((RESULTS / f"ablation-keys-rooms-{frames}.json").read_text()) for frames in KEYS_LENGTHS
    ]
    lines = []
    for rows in zip(*(one["rows"][1:] for one in found), strict=True):
        cells = [
            f"{100 * row['pairs']:.0f} %: {row['auc30_change']:+.1f} / {row['absrel_change']:+.1f}"
            for row in rows
        ]
        lines.append([rows[0]["variant"], *cells])
    return table(["keys", *(f"{one['count']} rooms, {one['frames']} views" for one in found)], lines)


def stages_table() -> str:
    """What each stage of training weights of global pruning is worth, with the spread over seeds."""
    lines = []
    for ratio in RATIOS:
        for frames in LENGTHS:
            found = json.loads((RESULTS / f"pace-mini-global-rooms-{frames}.json").read_text())
            rows = {row["stage"]: row for row in found["rows"] if row["keep_ratio"] in (1.0, ratio)}
            cells = [rows["unpruned"], *(rows[stage] for stage in STAGES)]
            lines.append([f"{ratio:g}", f"{found['count']} rooms, {frames} views", *map(both_metrics, cells)])
    return table(["keep ratio", "clips", "unpruned", *STAGES], lines)


def both_metrics(row: dict[str, Any]) -> str:
    """AUC@30 and AbsRel of a row of `pace_quality.py`; with the spread over seeds where they differ."""
    cells = []
    for key, digits in (("auc30", 1), ("absrel", 4)):
        spread = f" ± {row[f'{key}_std']:.{digits}f}" if row[f"{key}_std"] else ""
        cells.append(f"{row[key]:.{digits}f}{spread}")
    return " / ".join(cells)


def unpruned_table() -> str:
    """How good the bundled VGGT-mini is."""
    head = ["clips", "AUC@5", "AUC@15", "AUC@30", "rotation", "translation", "AbsRel", "delta < 1.25 (%)"]
    lines = []
    for name, title in UNPRUNED.items():
        row = report(name)["rows"][0]
        cells = [number(row[key], 1) for key in ("auc5", "auc15", "auc30", "rotation_deg", "translation_deg")]
        lines.append([title, *cells, number(row["absrel"], 4), number(row["delta125"], 1)])
    return table(head, lines)


# Seconds of VGGT-1B's shape: what a row is called, and its files.
EIGHT = ("latency-vggt-1b-h200",)
GPU_ROWS = [
    ("global pruning, 8 full-attention heads", EIGHT),
    ("global pruning, 24 full-attention heads", ("latency-vggt-1b-h200-heads-24",)),
    ("global pruning, 60 full-attention heads", ("latency-vggt-1b-h200-heads-60",)),
    ("pre-AA pruning", ("latency-vggt-1b-h200-pre-aa",)),
]
GPU_FRAMES, README_FRAMES, CPU_FRAMES = (100, 300, 1000, 3000), (100, 300, 1000), (8, 24, 48)
CPU_ROWS = [
    ("global pruning, 5 full-attention heads", ("latency-mini-cpu",)),
    ("pre-AA pruning, no weights", ("latency-mini-cpu-pre-aa",)),
]
# Setting of README.md: what it is called, the call, the files with its seconds (None: not timed), and with its loss.
README_ROWS = [
    ("**global pruning, calibrated by itself**", "`accelerate(model, compile=True)`", EIGHT, "calibrated"),
    ("global pruning, trained weights", "`weights=FILE`", None, "default"),
    (
        "pre-AA pruning, no weights",
        '`mode="pre-aa", weights=None`',
        ("latency-vggt-1b-h200-pre-aa",),
        "pre-aa-training-free",
    ),
    ("pre-AA pruning, trained weights", '`mode="pre-aa"`', None, "pre-aa"),
]


def timings(*names: str) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows of files that `latency.py` wrote, by variant and number of frames."""
    rows = [row for name in names for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]]
    return {(row["variant"], row["frames"]): row for row in rows}


def seconds(row: dict[str, Any] | None, stock: dict[str, Any] | None = None, digits: int = 1) -> str:
    """Median seconds, the speed-up over stock where both were measured, to so many digits, and memory."""
    if row is None:
        return "not run"
    taken = row["seconds_median"]
    if taken is None:
        return "did not fit"
    known = stock is not None and stock["seconds_median"] is not None
    faster = f" ({stock['seconds_median'] / taken:.{digits}f}x)" if stock is not None and known else ""
    memory = "" if row["peak_gib"] is None else f", {row['peak_gib']:.1f} GiB"
    return f"{taken:.3g} s{faster}{memory}"


def gpu_table() -> str:
    """Latency of VGGT-1B's shape on one GPU."""
    stock = timings("latency-vggt-1b-h200")
    lines = [["stock", *(seconds(stock.get(("stock", n))) for n in GPU_FRAMES)]]
    for title, names in GPU_ROWS:
        found = timings(*names)
        cells = [seconds(found.get(("pace", n)), stock.get(("stock", n))) for n in GPU_FRAMES]
        lines.append([title, *cells])
    return table(["setting", *(f"{n} frames" for n in GPU_FRAMES)], lines)


def cpu_table() -> str:
    """Latency of VGGT-mini on the CPU."""
    lines = []
    for title, names in CPU_ROWS:
        found = timings(*names)
        for n in CPU_FRAMES:
            stock, pace = found["stock", n], found["pace", n]
            lines.append([title, str(n), seconds(stock), seconds(pace, stock)])
    return table(["setting", "frames", "stock", "accelerated"], lines)


def readme_table() -> str:
    """What each setting gains and costs, in one table."""
    stock = timings("latency-vggt-1b-h200")
    head = ["setting", "call", *(f"{n} frames" for n in README_FRAMES), "AUC@30 lost", "AbsRel worse by"]
    lines = [["stock", "", *(seconds(stock.get(("stock", n))) for n in README_FRAMES), "", ""]]
    for title, call, names, quality in README_ROWS:
        found = None if names is None else timings(*names)
        cells = ["not timed"] * len(README_FRAMES)
        if found is not None:
            cells = [seconds(found.get(("pace", n)), stock.get(("stock", n))) for n in README_FRAMES]
        row = row_of(f"rooms-8-{quality}", 0.3)
        lines.append([title, call, *cells, f"{-row['auc30_change']:.1f} %", f"{row['absrel_change']:.1f} %"])
    return table(head, lines)


SCALING = "scaling-vggt-1b-h200"  # a file that `scaling.py` wrote


def scaling_table() -> str:
    """Seconds and memory of one clip over several GPUs, and what paper says of them and of more."""
    file = RESULTS / f"{SCALING}.json"
    if not file.is_file():
        return "It has not been timed on GPUs yet."
    found = json.loads(file.read_text())
    rows = {(row["frames"], row["gpus"]): row for row in found["rows"]}
    paper = {(row["frames"], row["gpus"]): row for row in found["model"]}
    measured, said = (sorted({gpus for _, gpus in some}) for some in (rows, paper))
    said = [gpus for gpus in said if gpus > 1]
    lines = []
    for frames in sorted({frames for frames, _ in rows}):
        one = rows.get((frames, 1))
        cells = [seconds(rows.get((frames, gpus)), one if gpus > 1 else None, 2) for gpus in measured]
        lines.append([str(frames), *cells, *(on_paper(paper.get((frames, gpus))) for gpus in said)])
    head = ["frames", *(in_gpus(gpus) for gpus in measured)]
    head += [f"{in_gpus(gpus)}, on paper" for gpus in said]
    what = f"{found['backbone']}, {found['size']}, {found['precision']}, {found['environment']['device']}"
    return f"{what}; memory is that of the fullest GPU.\n\n{table(head, lines)}"


def in_gpus(count: int) -> str:
    return f"{count} GPU{'s' * (count > 1)}"


def on_paper(row: dict[str, Any] | None) -> str:
    """Seconds that paper says, and the speed-up over one GPU."""
    return "" if row is None else f"{row['predicted_seconds']:.3g} s ({row['predicted_speedup']:.2f}x)"


def robustness_table() -> str:
    """What robustness.py tried."""
    rows = json.loads((RESULTS / "robustness.json").read_text())["campaigns"]
    return table(
        ["what was tried", "times", "refused", "what must hold", "not so"],
        [
            [
                row["campaign"],
                f"{row['tried']:,d}",
                f"{row['refused']:,d}",
                row["promise"],
                str(len(row["wrong"])),
            ]
            for row in rows
        ],
    )


def comparison() -> str:
    """What `pacevggt compare` prints, as it printed it."""
    found = json.loads((RESULTS / "compare-mini-redkitchen.json").read_text())
    return f"```\n{found['command']}\n\n{format_table(found)}\n```"


UNTRAINED = ("training-free", "calibrated")  # lines of ours that, as the others, need no training


# Files that `frontier.py` wrote, frames of the clips in them, and what these are called.
PEERS = [
    ("frontier", 24, "rooms, 24 views"),
    ("frontier", 96, "rooms, 96 views"),
    ("frontier", 300, "rooms, 300 views"),
]
PHOTOGRAPHS = [
    ("frontier-redkitchen", 8, "redkitchen"),
    ("frontier-herzjesu", 8, "herzjesu"),
    ("frontier-fox", 8, "fox"),
]
SHORT = [("frontier", 8, "rooms, 8 views")]
TIMED = (96, 300)  # views


def frontier_rows(name: str, frames: int) -> list[dict[str, Any]]:
    """Rows of clips of one length in a file of frontier.py."""
    found = json.loads((RESULTS / f"{name}.json").read_text())
    return [row for row in found["rows"] if row["frames"] == frames]


def shown_settings() -> list[tuple[str, float, str]]:
    """Line, value and what is swept of the published setting of each rule and one more, and of ours."""
    rows = [row for _, frames, _ in SHORT + PEERS for row in frontier_rows("frontier", frames)]
    lines = dict.fromkeys(row["line"] for row in rows if row["line"] != "unpruned")
    shown = []
    for line in lines:
        some = dict.fromkeys((row["value"], row["swept"]) for row in rows if row["line"] == line)
        values = sorted(some, reverse=True) if is_ours(line) else list(some)[:2]
        shown += [(line, value, swept) for value, swept in values]
    return shown


def setting_name(line: str, value: float, swept: str) -> str:
    return f"{f'**pacevggt-patch, {line}**' if is_ours(line) else line}, {swept.replace('_', ' ')} {value:g}"


def rules_table(clips: list[tuple[str, int, str]], key: str = "pairs") -> str:
    """What rules of others and this package lose at which cost, and which of ours is ahead of a rule.

    Args:
        clips: file, frames and title of each pair of columns.
        key: of the cost, "pairs" or "speedup".
    """
    head, columns = ["rule"], []
    for name, frames, title in clips:
        rows = [row for row in frontier_rows(name, frames) if row["line"] != "unpruned"]
        columns.append(rows if key == "pairs" else with_seconds(rows))
        head += [title_of(name, frames, title), "ahead of it"]
    lines = []
    for line, value, swept in shown_settings():
        cells = [setting_name(line, value, swept)]
        for column in columns:
            some = [row for row in column if (row["line"], row["value"]) == (line, value)]
            cells += [lost_at(row, key) for row in some] or [""]
            cells += [ahead_of(row, column, key) for row in some if not is_ours(line)] or [""]
        if any(cells[1:]):
            lines.append(cells)
    unpruned = ["unpruned"]
    for name, frames, _ in clips:
        (row,) = (row for row in frontier_rows(name, frames) if row["line"] == "unpruned")
        figures = [number(row["auc30"], 1), number(row["absrel"], 4)]
        unpruned += [" / ".join(figures), ""]
    return table(head, [unpruned, *lines])


def title_of(name: str, frames: int, title: str) -> str:
    found = json.loads((RESULTS / f"{name}.json").read_text())
    (count,) = (length["count"] for length in found["lengths"] if length["frames"] == frames)
    return f"{count} {title}" if found["lengths"][0]["clips"] == "rooms" else f"{title}, {count} x {frames}"


def with_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of settings that peers_seconds.py timed, with what it found. Bundled weights take no more time."""
    timed = json.loads((RESULTS / "peers-seconds.json").read_text())["rows"]
    known = {(row["line"], row["value"], row["frames"]): row for row in timed}
    found = []
    for row in rows:
        line = "calibrated" if row["line"] == "bundled weights" else row["line"]
        seconds = known.get((line, row["value"], row["frames"]))
        if seconds is not None and seconds["speedup"] is not None:
            found.append(row | {"speedup": seconds["speedup"], "seconds": seconds["seconds_median"]})
    return found


def short_table() -> str:
    return rules_table(SHORT)


def peers_table() -> str:
    return rules_table(PEERS)


def photographs_table() -> str:
    return rules_table(PHOTOGRAPHS)


def seconds_table() -> str:
    return rules_table([one for one in PEERS if one[1] in TIMED], "speedup")


def own_code_table() -> str:
    """Seconds and memory of other projects by their own code, and of this one, from one run."""
    rows = json.loads((RESULTS / "latency-peers-h200.json").read_text())["rows"]
    frames = sorted({row["frames"] for row in rows})
    names = {"stock": "stock VGGT", "pace": "**pacevggt-patch, keep ratio 0.3, 8 full-attention heads**"}
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        cells = [names.get(variant, f"{variant}, its own code")]
        for count in frames:
            some = [row for row in rows if (row["variant"], row["frames"]) == (variant, count)]
            cells.append(timed_cell(some[0]) if some else "not run")
        lines.append(cells)
    return table(["", *(f"{count} frames" for count in frames)], lines)


def timed_cell(row: dict[str, Any]) -> str:
    """Median seconds with the least and the largest, and peak memory."""
    if row.get("seconds_median") is None:
        return row.get("error", "out of memory")
    spread = f"{row['seconds_min']:.3g} to {row['seconds_max']:.3g}"
    return f"{row['seconds_median']:.3g} s ({spread}), {row['peak_gib']:.1f} GiB"


SIBLINGS = {"pi3": "Pi3", "vggt-omega": "VGGT-Omega", "depth-anything-3-giant": "Depth Anything 3 giant"}


def siblings_table() -> str:
    """Seconds and memory of models of other families, stock and accelerated."""
    lines = []
    for family, name in SIBLINGS.items():
        found = json.loads((RESULTS / f"siblings-{family}-h200.json").read_text())
        for frames in sorted({row["frames"] for row in found["rows"]}):
            stock, ours = (
                next(row for row in found["rows"] if (row["variant"], row["frames"]) == (variant, frames))
                for variant in ("stock", "pace")
            )
            cells = [timed_cell(row) for row in (stock, ours)]
            lines.append([name, ours["pixels"], str(frames), *cells, f"{ours['speedup']:.1f}x"])
    return table(["model", "pixels", "frames", "stock", "accelerated", "speed-up"], lines)


def is_ours(line: str) -> bool:
    return line in (*UNTRAINED, "bundled weights")


def lost_at(row: dict[str, Any], key: str = "pairs") -> str:
    """The cost, and the changes of both metrics with their standard errors."""
    changes = (
        "-"
        if row[f"{metric}_change"] is None
        else f"{row[f'{metric}_change']:+.1f} (± {row[f'{metric}_change_error']:.1f})"
        for metric in ("auc30", "absrel")
    )
    cost = (
        f"{100 * row['pairs']:.0f} %" if key == "pairs" else f"{row['seconds']:.2f} s, {row['speedup']:.1f}x"
    )
    return f"{cost}: {' / '.join(changes)}"


def ahead_of(row: dict[str, Any], rows: list[dict[str, Any]], key: str = "pairs") -> str:
    """The cheapest of our untrained settings that loses less of all metrics at no more cost, or "none".

    Args:
        row: of a rule.
        rows: of all settings on the same clips.
        key: of the cost, "pairs" or "speedup".
    """
    sign = 1 if key == "pairs" else -1
    better = [
        one
        for one in rows
        if one["line"] in UNTRAINED
        and sign * one[key] <= sign * row[key]
        and one["auc30"] > row["auc30"]
        and (row["absrel"] is None or one["absrel"] < row["absrel"])
    ]
    best = min(better, key=lambda one: sign * one[key], default=None)
    return "none" if best is None else f"{best['line']} {best['value']:g}"


def ablation_table(study: str, lengths: dict[str, str]) -> str:
    """What each variant of a study of ablation.py changes.

    Args:
        study: as in the names of the files.
        lengths: what is in the names of the files -> title of a column.
    """
    columns = [
        {
            row["variant"]: row
            for row in json.loads((RESULTS / f"ablation-{study}-rooms-{n}.json").read_text())["rows"]
        }
        for n in lengths
    ]
    names = [
        name for name in dict.fromkeys(name for column in columns for name in column) if name != "unpruned"
    ]
    lines = []
    for name in names:
        cells = [name]
        for column in columns:
            row = column.get(name)
            changes = (
                [
                    f"{row[f'{key}_change']:+.1f} (± {row[f'{key}_change_error']:.1f})"
                    for key in ("auc30", "absrel")
                ]
                if row
                else []
            )
            pairs = f"{100 * row['pairs']:.0f} %" if row and row["pairs"] is not None else ""
            least = row.get("least_error") if row else None
            pairs += "" if least is None else f", from {100 * least:.2f} %"
            cells.append(pairs + ": " * bool(pairs) + " / ".join(changes))
        lines.append(cells)
    return table(["", *lengths.values()], lines)


ROOMS = {"24": "12 rooms, 24 views", "96": "6 rooms, 96 views"}
STUDIES = {
    "selection": {"8": "24 rooms, 8 views"} | ROOMS,
    "propagation": ROOMS,
    "heads": ROOMS,
    "weights": ROOMS,
    "merging": ROOMS,
}


def distilled_table() -> str:
    """What pre-AA pruning loses after each stage of training, over three trainings."""
    found = json.loads((RESULTS / "pace-mini-rooms-8.json").read_text())["rows"]
    lines = []
    for stage in ("unpruned", "training-free", "calibrated", "distilled", "refined"):
        cells = [stage]
        for ratio in RATIOS:
            (row,) = (r for r in found if r["stage"] == stage and r["keep_ratio"] in (ratio, 1.0))
            cells.append(f"{spread_of(row, 'auc30', 1)} / {spread_of(row, 'absrel', 4)}")
        lines.append(cells)
    return table(["", *(f"keep ratio {ratio:g}" for ratio in RATIOS)], lines)


def spread_of(row: dict[str, Any], key: str, digits: int) -> str:
    """A mean, and its standard deviation over trainings where there is more than one."""
    spread = row[f"{key}_std"]
    return number(row[key], digits) + ("" if spread is None else f" ± {spread:.{digits}f}")


def occlusion_table() -> str:
    """How the worth of cells of tokens goes with their scores."""
    found = json.loads((RESULTS / "occlusion-rooms-8.json").read_text())["summary"]["correlations"]
    lines = [
        [name, *(f"{row[key]['mean']:+.2f} (± {row[key]['error']:.2f})" for key in ("depth", "camera"))]
        for name, row in found.items()
    ]
    return table(["mean over a cell of", "depth of the frame", "camera of the frame"], lines)


def filled(text: str, name: str, table: str) -> str:
    """`text` with `table` between the markers `<!-- name -->` and `<!-- /name -->`.

    Raises:
        PaceError: a marker is missing.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise PaceError(f"there must be one {begin.strip()} and one {end}")
    head, rest = text.split(begin)
    return head + begin + table + "\n" + end + rest.split(end)[1]


TABLES = [
    (ROOT / "docs" / "quality.md", "settings", settings_table),
    (ROOT / "docs" / "quality.md", "changes", changes_table),
    (ROOT / "docs" / "quality.md", "lengths", lengths_table),
    (ROOT / "docs" / "quality.md", "keys", keys_table),
    (ROOT / "docs" / "quality.md", "stages", stages_table),
    (ROOT / "docs" / "peers.md", "own code", own_code_table),
    (ROOT / "docs" / "peers.md", "seconds", seconds_table),
    (ROOT / "docs" / "peers.md", "peers", peers_table),
    (ROOT / "docs" / "peers.md", "short", short_table),
    (ROOT / "docs" / "peers.md", "photographs", photographs_table),
    *(
        (ROOT / "docs" / "ablations.md", name, partial(ablation_table, name, n))
        for name, n in STUDIES.items()
    ),
    (ROOT / "docs" / "ablations.md", "distilled", distilled_table),
    (ROOT / "docs" / "ablations.md", "occlusion", occlusion_table),
    (ROOT / "docs" / "hosts.md", "siblings", siblings_table),
    (ROOT / "docs" / "compare.md", "example", comparison),
    (ROOT / "docs" / "latency.md", "gpu", gpu_table),
    (ROOT / "docs" / "latency.md", "cpu", cpu_table),
    (ROOT / "docs" / "several-gpus.md", "scaling", scaling_table),
    (ROOT / "README.md", "settings", readme_table),
    (ROOT / "weights" / "README.md", "unpruned", unpruned_table),
    (ROOT / "docs" / "robustness.md", "robustness", robustness_table),
]


def main() -> int:
    for path, name, table in TABLES:
        text = filled(path.read_text(), name, table())
        with whole_file(path) as temporary:
            temporary.write_text(text)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"write_tables.py: {error}")
