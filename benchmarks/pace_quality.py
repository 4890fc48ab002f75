"""What each stage of training pace weights is worth: unpruned, training-free, calibrated, distilled, refined.

    for seed in 0 1 2; do pacevggt train --rooms --seed $seed --out runs/pace-$seed; done
    python benchmarks/pace_quality.py --runs runs/pace-0 runs/pace-1 runs/pace-2 --json FILE --plot FILE

Every folder of `--runs` is one that `pacevggt train` wrote, with another seed each: the spread is that over seeds. The
clips are those of quality.py: rooms from fixed seeds that training never draws, or a folder. A clip that fails ends the
benchmark: none is left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from quality import METRICS, add_clip_arguments, header, known_values, measure, model_and_clips, parse
from tqdm import tqdm

from pacevggt_patch import PaceError, accelerate, remove
from pacevggt_patch.clips import Clip
from pacevggt_patch.config import GLOBAL, MODES
from pacevggt_patch.runtime.files import write_json
from pacevggt_patch.runtime.plotting import load_pyplot, save_figure

STAGES = {"calibrated": "calibrated", "distilled": "distilled", "refined": "pace"}  # and their files


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    model, clips = model_and_clips(args)
    report: dict[str, Any] = {
        **header(args, len(clips)),
        "runs": [str(run) for run in args.runs],
        "mode": args.mode,
        "rows": [],
    }
    unpruned = [mean_metrics(model, clips)]
    report["rows"].append(make_row("unpruned", 1.0, unpruned, unpruned, unpruned))
    # A run without distillation has no file of it.
    stages = {
        k: file for k, file in STAGES.items() if all((r / f"{file}.safetensors").is_file() for r in args.runs)
    }
    jobs = 1 + len(stages) * len(args.runs)
    with tqdm(total=len(args.keep_ratios) * jobs, unit="setting", disable=None) as bar:
        for ratio in args.keep_ratios:
            accelerate(model, ratio, weights=None, mode=args.mode, min_frames=1)
            free = [mean_metrics(model, clips)]
            bar.update()
            report["rows"].append(make_row("training-free", ratio, free, unpruned, free))
            for stage, file in stages.items():
                found = []
                for run in args.runs:
                    weights = run / f"{file}.safetensors"
                    accelerate(model, ratio, weights=weights, mode=args.mode, min_frames=1)
                    found.append(mean_metrics(model, clips))
                    bar.update()
                report["rows"].append(make_row(stage, ratio, found, unpruned, free))
            if args.json:
                write_json(args.json, report)
    remove(model)
    print_table(report)
    if args.plot:
        plot(report, args.plot)
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, nargs="+", required=True, metavar="DIR")
    add_clip_arguments(parser, rooms=24)
    parser.add_argument("--mode", choices=MODES, default=GLOBAL, help="of the runs (global)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG")
    return parse(parser, argv)


def mean_metrics(model: Any, clips: list[Clip]) -> dict[str, float | None]:
    """Mean of each metric over the clips, of the model as it is; None where they have no ground truth for it."""
    results = measure(model, clips)
    means: dict[str, float | None] = {}
    for key in METRICS:
        known = known_values(results, key)
        means[key] = statistics.fmean(known) if known else None
    return means


def make_row(
    stage: str,
    ratio: float,
    runs: list[dict[str, float | None]],
    unpruned: list[dict[str, float | None]],
    free: list[dict[str, float | None]],
) -> dict[str, Any]:
    """One line of the table: of each metric the mean over runs and its standard deviation, as `<metric>_std`.

    `<metric>_change` is the change from the unpruned model in percent, `<metric>_loss_share` the loss in percent of
    what the training-free setting loses at the same keep ratio (None where that loses nothing).
    """
    row: dict[str, Any] = {"stage": stage, "keep_ratio": ratio, "runs": len(runs)}
    for key in METRICS:
        known = [value for value in (run[key] for run in runs) if value is not None]
        before, plain = unpruned[0][key], free[0][key]
        row[key] = statistics.fmean(known) if known else None
        row[f"{key}_std"] = statistics.stdev(known) if len(known) > 1 else None
        row[f"{key}_change"] = row[f"{key}_loss_share"] = None
        if known and before is not None and plain is not None:
            row[f"{key}_change"] = 100 * (row[key] / before - 1) if before else None
            row[f"{key}_loss_share"] = (
                100 * (row[key] - before) / (plain - before) if plain != before else None
            )
    return row


def print_table(report: dict[str, Any]) -> None:
    def cell(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    print(
        f"{report['clips']}: {report['count']} clips of {report['frames']} frames, {len(report['runs'])} runs; "
        "mean (standard deviation over runs), change from unpruned"
    )
    print(
        f"{'keep':>6s}  {'stage':15s}{'AUC@30':>13s}{'change':>9s}{'AUC@15':>8s}{'rot deg':>9s}{'AbsRel':>18s}"
        f"{'change':>9s}"
    )
    for row in report["rows"]:
        auc = f"{cell(row['auc30'], 1)} ({cell(row['auc30_std'], 1)})"
        absrel = f"{cell(row['absrel'], 4)} ({cell(row['absrel_std'], 4)})"
        print(
            f"{row['keep_ratio']:>6g}  {row['stage']:15s}{auc:>13s}{cell(row['auc30_change'], 1):>8s}%"
            f"{cell(row['auc15'], 1):>8s}{cell(row['rotation_deg'], 2):>9s}{absrel:>18s}"
            f"{cell(row['absrel_change'], 1):>8s}%"
        )


def plot(report: dict[str, Any], path: Path) -> None:
    """AUC@30 and AbsRel over the keep ratio, a line for each stage, the spread over runs as bars."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    (unpruned,) = (row for row in report["rows"] if row["stage"] == "unpruned")
    for axis, key, title in ((axes[0], "auc30", "AUC@30, percent"), (axes[1], "absrel", "AbsRel")):
        if unpruned[key] is not None:
            axis.axhline(unpruned[key], color="black", linewidth=0.8, label="unpruned")
        for stage in ("training-free", *STAGES):
            rows = [row for row in report["rows"] if row["stage"] == stage and row[key] is not None]
            if not rows:
                continue
            axis.errorbar(
                [row["keep_ratio"] for row in rows],
                [row[key] for row in rows],
                [row[f"{key}_std"] or 0.0 for row in rows],
                fmt="o-",
                capsize=3,
                label=stage,
            )
        axis.set(title=title, xlabel="keep ratio")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"pace_quality.py: {error}")
