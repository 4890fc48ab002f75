"""Write the quality tables of README.md and weights/README.md from the files in results/, between their markers.

python benchmarks/write_tables.py
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from pacevggt_patch import PaceError
from pacevggt_patch.runtime.files import whole_file

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
# Result file -> what its clips are called.
PRUNED = {
    "rooms-8": "24 rooms, 8 frames",
    "rooms-24": "12 rooms, 24 frames",
    "redkitchen": "redkitchen, 3 x 8 photographs",
    "herzjesu": "herzjesu, 8 photographs",
}
ALL_STAGES = ("training-free", "calibrated", "distilled", "refined")
STAGES = {
    "rooms-8": "24 rooms, 8 frames",
    "rooms-24": "12 rooms, 24 frames",
    "redkitchen": "redkitchen, 3 x 8 photographs",
}
UNPRUNED = {
    "rooms-8": "24 rooms, 8 views",
    "rooms-24": "12 rooms, 24 views",
    "redkitchen": "redkitchen (7-Scenes), 3 clips of 8 photographs, 10 frames of the original apart",
    "redkitchen-wide": "redkitchen, 50 frames of the original apart",
    "herzjesu": "herzjesu-p25, first 8 photographs",
}


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of a file that `quality.py` wrote."""
    return json.loads((RESULTS / f"quality-mini-{name}.json").read_text())["rows"]


def spread(row: dict[str, Any], key: str, digits: int) -> str:
    """Mean and standard deviation over clips; "-" where there is no ground truth, one clip has no spread."""
    if row[key] is None:
        return "-"
    text = f"{row[key]:.{digits}f}"
    return text if row["count"] == 1 else f"{text} ± {row[f'{key}_std']:.{digits}f}"


def number(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def pruning_table() -> str:
    """What pruning costs, training-free and with the bundled weights."""
    lines = [
        "| clips | keep ratio | weights | AUC@30 | AUC@15 | rotation | AbsRel | delta < 1.25 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, title in PRUNED.items():
        free, bundled = rows(name), rows(f"{name}-pace")
        for row, trained in zip(free, bundled, strict=True):
            if row["keep_ratio"] != trained["keep_ratio"]:
                raise PaceError(f"quality-mini-{name}.json and its -pace.json have other keep ratios")
            pairs = [("none", row), ("bundled", trained)]
            for weights, found in [("", row)] if row["keep_ratio"] == 1 else pairs:
                ratio = "unpruned" if found["keep_ratio"] == 1 else f"{found['keep_ratio']:g}"
                cells = [title, ratio, weights, spread(found, "auc30", 1), number(found["auc15"], 1)]
                cells += [number(found["rotation_deg"], 1, "°"), spread(found, "absrel", 4)]
                cells += [number(found["delta125"], 1, " %")]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def unpruned_table() -> str:
    """How good the bundled VGGT-mini is."""
    lines = [
        "| clips | AUC@5 | AUC@15 | AUC@30 | rotation | translation | AbsRel | delta < 1.25 (%) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, title in UNPRUNED.items():
        row = rows(name)[0]
        cells = [number(row[key], 1) for key in ("auc5", "auc15", "auc30", "rotation_deg", "translation_deg")]
        cells += [number(row["absrel"], 4), number(row["delta125"], 1)]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def stages_table(prefix: str = "") -> str:
    """What each stage of training pace weights is worth: AUC@30 and AbsRel, with the spread over seeds.

    Args:
        prefix: of the clips in the names of the files of `pace_quality.py`.
    """
    lines = [
        "| clips | keep ratio | unpruned | " + " | ".join(ALL_STAGES) + " |",
        "|---|---|" + "---|" * (1 + len(ALL_STAGES)),
    ]
    for name, title in STAGES.items():
        by_setting = stage_rows(prefix + name)
        for ratio in sorted({ratio for stage, ratio in by_setting if stage != "unpruned"}, reverse=True):
            cells = [by_setting["unpruned", 1.0], *(by_setting[stage, ratio] for stage in ALL_STAGES)]
            lines.append(f"| {title} | {ratio:g} | " + " | ".join(map(both_metrics, cells)) + " |")
    return "\n".join(lines)


def stage_rows(name: str) -> dict[tuple[str, float], dict[str, Any]]:
    """Stage and keep ratio -> row of a file that `pace_quality.py` wrote."""
    found = json.loads((RESULTS / f"pace-mini-{name}.json").read_text())["rows"]
    return {(row["stage"], row["keep_ratio"]): row for row in found}


def losses_table() -> str:
    """What is lost of the unpruned model's AUC@30 and AbsRel, in percent."""
    lines = [
        "| keep ratio | | " + " | ".join(STAGES.values()) + " |",
        "|---|---|" + "---|" * len(STAGES),
    ]
    plain, dense = ({name: stage_rows(prefix + name) for name in STAGES} for prefix in ("", "dense-"))
    for ratio in (0.3, 0.15):
        kinds = [(f"dense frames, {stage}", dense, stage) for stage in ALL_STAGES if stage != "distilled"]
        for title, found, stage in [("both pruned, refined", plain, "refined"), *kinds]:
            changes = [found[name][stage, ratio] for name in STAGES]
            cells = [f"{-row['auc30_change']:.1f} / {row['absrel_change']:.1f}" for row in changes]
            lines.append(f"| {ratio:g} | {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def both_metrics(row: dict[str, Any]) -> str:
    """AUC@30 and AbsRel of a row of `pace_quality.py`; with the spread over seeds where they differ."""
    cells = []
    for key, digits in (("auc30", 1), ("absrel", 4)):
        spread_of_runs = f" ± {row[f'{key}_std']:.{digits}f}" if row[f"{key}_std"] else ""
        cells.append(f"{row[key]:.{digits}f}{spread_of_runs}")
    return " / ".join(cells)


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
    (ROOT / "README.md", "pruning", pruning_table),
    (ROOT / "README.md", "stages", stages_table),
    (ROOT / "README.md", "dense", partial(stages_table, "dense-")),
    (ROOT / "README.md", "losses", losses_table),
    (ROOT / "weights" / "README.md", "unpruned", unpruned_table),
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
