"""Quality of a VGGT at several keep ratios, the unpruned model always beside: cameras, depth, points.

    python benchmarks/quality.py --backbone mini --clips rooms --count 16 --frames 8 --keep-ratios 1.0,0.5,0.3,0.15
    python benchmarks/quality.py --clips DIR --frames 8 --stride 2 --starts 0,60,120

Rooms are rendered from fixed seeds, from HELD_OUT_SEED on. A clip that fails ends the benchmark: none is left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pacevggt_patch import PaceError, accelerate, summary
from pacevggt_patch.clips import load_clip
from pacevggt_patch.evaluation import evaluate_predictions
from pacevggt_patch.mini import build_mini
from pacevggt_patch.mini.scenes.rooms import render_room
from pacevggt_patch.mini.training.held_out import HELD_OUT_SEED
from pacevggt_patch.runtime.files import environment, write_json

METRICS = ("auc5", "auc15", "auc30", "rotation_deg", "translation_deg", "absrel", "delta125", "point_error")


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    model = build_mini(args.checkpoint or True).to(args.device)
    weights = None if args.weights == "none" else args.weights
    ratios = sorted({1.0, *args.keep_ratios}, reverse=True)  # the unpruned row is always there
    clips = [clip.to(args.device) for clip in tqdm(load(args), desc="clips", total=args.count, disable=None)]
    report: dict[str, Any] = {"environment": environment(args.device), "backbone": "vggt-mini", "rows": []}
    with tqdm(total=len(ratios) * len(clips), unit="clip", disable=None) as bar:
        for ratio in ratios:
            budget = args.merge_budget if args.merge_budget is None else min(args.merge_budget, 1 - ratio)
            keys = args.global_keys if ratio < 1 else 1.0
            # Pruned however short the clip: a stock row must not pass for a pruned one.
            narrow = args.head_dtype and getattr(torch, args.head_dtype)
            accelerate(
                model,
                ratio,
                budget,
                weights=weights,
                min_frames=1,
                global_keys=keys,
                head_dtype=narrow,
                dense_frames=args.dense_frames,
            )
            results = []
            for clip in clips:
                with torch.inference_mode():
                    results.append(evaluate_predictions(model(clip.images), clip))
                bar.update()
            report["rows"].append(make_row(args, model, results))
            if args.json:
                write_json(args.json, report)
    print_table(report)
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", choices=("mini",), default="mini")
    add_clip_arguments(parser, rooms=16)
    parser.add_argument("--merge-budget", type=float, help="at most 1 - keep ratio is used")
    parser.add_argument(
        "--weights", default="none", help='"auto", "none" (training-free), a file, or a Hub id'
    )
    parser.add_argument(
        "--global-keys", type=float, default=1.0, help="share of the kept tokens that global attention sees"
    )
    parser.add_argument(
        "--dense-frames",
        action="store_true",
        help="frame blocks on all patch tokens; only global attention is pruned",
    )
    parser.add_argument(
        "--head-dtype", choices=("bfloat16", "float16"), help="of the accelerated dense heads"
    )
    return parse(parser, argv)


def add_clip_arguments(parser: argparse.ArgumentParser, rooms: int) -> None:
    """The arguments that say what is measured on what, with `rooms` as the number of rooms if none is given."""
    parser.add_argument("--checkpoint", type=Path, help="another VGGT-mini than the bundled one")
    parser.add_argument("--clips", default="rooms", help='"rooms", or a folder with images or a clip.json')
    parser.add_argument("--count", type=int, default=rooms, help="number of rooms")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--stride", type=int, default=1, help="step between the frames of a folder")
    parser.add_argument(
        "--starts", type=lambda t: [int(n) for n in t.split(",")], default=[0], help="first frames"
    )
    parser.add_argument(
        "--keep-ratios", type=lambda t: [float(n) for n in t.split(",")], default=[0.5, 0.3, 0.15]
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments, `count` being the number of clips, also of those of a folder."""
    args = parser.parse_args(argv)
    if args.clips != "rooms":
        args.count = len(args.starts)
    return args


def load(args: argparse.Namespace):
    """The clips, one after another."""
    for i in range(args.count):
        if args.clips == "rooms":
            yield render_room(HELD_OUT_SEED + i, args.frames)
        else:
            start = args.starts[i]
            yield load_clip(
                args.clips, frames=args.frames, start=start, stride=args.stride, width=224, mode="square"
            )


def known_values(results: list[dict[str, float | None]], key: str) -> list[float]:
    """A metric of all clips, or nothing where none of them has ground truth for it."""
    values = [result[key] for result in results]
    known = [value for value in values if value is not None]
    if known and len(known) < len(values):
        raise PaceError(
            f"{key} is defined for {len(known)} of {len(values)} clips only: its mean would mislead"
        )
    return known


def make_row(args: argparse.Namespace, model, results: list[dict[str, float | None]]) -> dict[str, Any]:
    """Mean over clips of each metric, and its standard deviation over clips as `<metric>_std`."""
    settings = summary(model)
    row: dict[str, Any] = {
        "clips": Path(args.clips).name,
        "count": len(results),
        "frames": args.frames,
        "weights": settings.weights,
        "keep_ratio": settings.config.keep_ratio,
        "merge_budget": settings.config.merge_share,
        "global_keys": settings.config.global_keys,
        "head_dtype": args.head_dtype,
        "dense_frames": settings.config.dense_frames,
    }
    for key in METRICS:
        known = known_values(results, key)
        row[key] = statistics.fmean(known) if known else None
        row[f"{key}_std"] = statistics.stdev(known) if len(known) > 1 else None
    return row


def print_table(report: dict[str, Any]) -> None:
    def cell(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    first = report["rows"][0]
    print(
        f"{first['clips']}: {first['count']} clips of {first['frames']} frames, mean (standard deviation over clips)"
    )
    print(f"{'keep':>6s}{'merge':>7s}{'AUC@5':>8s}{'AUC@15':>8s}{'AUC@30':>15s}{'rot deg':>9s}{'tr deg':>8s}"
          f"{'AbsRel':>17s}{'d<1.25':>8s}{'points':>8s}")  # fmt: skip
    for row in report["rows"]:
        auc = f"{cell(row['auc30'], 1)} ({cell(row['auc30_std'], 1)})"
        absrel = f"{cell(row['absrel'], 4)} ({cell(row['absrel_std'], 4)})"
        print(
            f"{row['keep_ratio']:>6g}{row['merge_budget']:>7.2g}{cell(row['auc5'], 1):>8s}{cell(row['auc15'], 1):>8s}"
            f"{auc:>15s}{cell(row['rotation_deg'], 2):>9s}{cell(row['translation_deg'], 1):>8s}{absrel:>17s}"
            f"{cell(row['delta125'], 1):>8s}{cell(row['point_error'], 3):>8s}"
        )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"quality.py: {error}")
