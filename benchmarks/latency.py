"""Latency and memory of a VGGT, stock against accelerated: same inputs, interleaved runs.

    python benchmarks/latency.py --backbone mini --device cpu --frames 8,24 --size 224x224
    python benchmarks/latency.py --backbone vggt-1b --device cuda --precision bfloat16 --size 392x518 \\
        --compile --frames 100,300 --pace-frames 1000 --once-frames 3000 --keep-ratios 0.3,0.15 --budget-frames 300 \\
        --minutes 15 --json benchmarks/results/latency.json --plot benchmarks/results/latency.png

Beside seconds and memory: the time of every stage and what part of it arithmetic alone would take (arithmetic.py),
the longest GPU kernels, host syncs, the largest clip for usual cards, the smallest clip for which acceleration pays,
how well `fit_budget` predicts, and with --compare another VGGT's own code. Under torchrun it is scaling.py, and takes
the arguments of that. vggt-1b without --checkpoint is the full shape with random weights: shapes alone decide the time,
not the values. Needs a `vggt` on the path.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scaling
from bench import Bench, Job, frames_that_fit, free, measure, with_speedup
from models import PRECISIONS, SEED, add_mode_arguments, other_rows
from plots import save_plots
from tables import print_report
from tqdm import tqdm

from pacevggt_patch import PaceError
from pacevggt_patch.planning.fit_budget import measure_costs
from pacevggt_patch.runtime.files import environment, write_json
from pacevggt_patch.runtime.ranks import place_of_torchrun

BREAK_EVEN_CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
CARDS_GIB = (12, 16, 24, 40, 80)


def main(argv: list[str] | None = None) -> int:
    if place_of_torchrun()[1] > 1:
        return scaling.main(argv)
    args = parse_arguments(argv)
    start = time.monotonic()
    bench = Bench(args)
    report: dict[str, Any] = {
        "environment": environment(bench.device),
        "backbone": args.backbone
        + ("" if args.checkpoint or args.backbone == "mini" else " (random weights)"),
        "size": f"{args.size[0]}x{args.size[1]}",
        "precision": PRECISIONS[args.precision],
        "compile": args.compile,
        "head_dtype": args.head_dtype,
        "mode": args.mode,
        "full_heads": args.full_heads,
        "attention": bench.attention,
        "first_call_seconds": None,
        "repeats": args.repeats,
        "seed": SEED,
        "peak_flops_per_second": {name: bench.peaks[name] for name in ("float32", "bfloat16")},
        "peak_bytes_per_second": bench.peaks["bytes"],
        "rows": [],
        "details": [],
        "skipped": [],
        "break_even_frames": {},
        "budget": [],
        "largest_frames": None,  # measured on CUDA only
    }

    def save() -> None:  # after every size: an interrupted benchmark keeps what it has
        if bench.device.type == "cuda":
            report["largest_frames"] = largest_frames(report["rows"])
        if args.json:
            write_json(args.json, report)
        if args.plot:
            save_plots(report, args.plot)

    def work_off(jobs: list[Job]) -> None:
        for job in tqdm(jobs, unit="size", disable=None):
            left = args.minutes * 60 - (time.monotonic() - start)
            if bench.estimate(job) > left:
                report["skipped"].append({"frames": job.frames, "reason": f"--minutes {args.minutes:g}"})
                tqdm.write(f"{job.frames} frames skipped: they would take longer than --minutes leaves")
            else:
                rows, details = measure(bench, job)
                report["rows"] += rows
                report["details"] += details
            save()

    print(" | ".join(f"{k} {v}" for k, v in report["environment"].items() if v))
    sizes, once = plan(args)
    parts = [(job, bench.estimate(job)) for job in sizes + once]
    each = ", ".join(f"{job.frames} frames {seconds:.0f} s" for job, seconds in parts)
    print(
        f"about {sum(seconds for _, seconds in parts):.0f} s: {each}; more for break-even, budget, other code"
    )
    report["first_call_seconds"] = bench.first_call(min(args.frames + args.pace_frames, default=1))
    save()
    work_off(sizes)
    report["break_even_frames"] = break_even(bench)
    save()
    for frames in args.budget_frames:
        report["budget"] += check_budget(bench, frames, report["rows"])
        save()
    for directory in args.compare:
        free(bench.device)  # the other process needs the memory that this one only keeps at hand
        for row in other_rows(args, bench.device, directory):
            report["rows"].append(with_speedup(row, report["rows"]))
            save()
    work_off(once)  # the longest last: if somebody ends it, all else is there
    print_report(report)
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [kind(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", choices=("mini", "vggt-1b"), default="mini")
    parser.add_argument(
        "--checkpoint", help="file or Hub id of VGGT-1B's weights (random weights if not given)"
    )
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one if not given)")
    sizes: dict[str, Any] = {"type": several(int), "metavar": "N,N"}
    parser.add_argument("--frames", **sizes, default=[8, 24], help="stock and accelerated")
    parser.add_argument("--pace-frames", **sizes, default=[], help="accelerated only")
    parser.add_argument(
        "--once-frames",
        **sizes,
        default=[],
        help="accelerated only, at the first keep ratio, one run without warm-up",
    )
    parser.add_argument(
        "--size", type=lambda text: tuple(int(n) for n in text.split("x")), default=(224, 224)
    )
    parser.add_argument("--keep-ratios", type=several(float), default=[0.3], metavar="R,R")
    parser.add_argument("--merge-budget", type=float)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--compile", action="store_true", help="accelerate with compile=True")
    add_mode_arguments(parser)
    parser.add_argument("--head-dtype", choices=("bfloat16", "float16"), help="accelerate with head_dtype")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="sizes that would take longer are skipped, and say so"
    )
    parser.add_argument(
        "--budget-frames",
        **sizes,
        default=[],
        help="numbers of frames at which fit_budget's prediction is checked",
    )
    parser.add_argument(
        "--break-even-frames",
        **sizes,
        default=BREAK_EVEN_CANDIDATES,
        help='numbers of frames that are tried to find out from which on acceleration pays; "" for none',
    )
    parser.add_argument(
        "--compare",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="time the vggt package in this folder, too, in a process of its own, at all but --once-frames",
    )
    parser.add_argument(
        "--compare-arguments",
        type=json.loads,
        default={},
        metavar="JSON",
        help="of that package's VGGT constructor",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG; needs matplotlib")
    return parser.parse_args(argv)


def plan(args: argparse.Namespace) -> tuple[list[Job], list[Job]]:
    """The sizes to measure, and those that run once, in this order."""
    ratios = tuple(sorted(args.keep_ratios, reverse=True))
    sizes = [Job(n, (None, *ratios), args.repeats, stages=True, kernels=True) for n in args.frames]
    sizes += [Job(n, ratios, args.repeats, stages=True) for n in args.pace_frames]
    return sizes, [Job(n, (args.keep_ratios[0],), 1, warm_up=False) for n in args.once_frames]


def largest_frames(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest N for usual cards: peak memory = a + b N through the measured peaks of each variant.

    A variant that was measured at one N only has no line; a figure beyond the largest measured N is marked.
    """
    found = []
    variants = dict.fromkeys((row["variant"], row.get("keep_ratio")) for row in rows)
    for variant, ratio in variants:
        points = {
            row["frames"]: row["peak_gib"]
            for row in rows
            if (row["variant"], row.get("keep_ratio")) == (variant, ratio) and row.get("peak_gib")
        }
        if len(points) < 2:
            continue
        for card in CARDS_GIB:
            frames = frames_that_fit(points, card)
            found.append(
                {
                    "variant": variant,
                    "keep_ratio": ratio,
                    "card_gib": card,
                    "frames": frames,
                    "measured": frames is not None and min(points) <= frames <= max(points),
                }
            )
    return found


def break_even(bench: Bench) -> dict[str, int | None]:
    """For each keep ratio the smallest number of frames tried at which the accelerated model is faster, or None.

    Empty if none were to be tried.
    """
    if not bench.args.break_even_frames:
        return {}
    found: dict[str, int | None] = dict.fromkeys((f"{ratio:g}" for ratio in bench.args.keep_ratios), None)
    for frames in bench.args.break_even_frames:
        rows, _ = measure(bench, Job(frames, (None, *bench.args.keep_ratios), bench.args.repeats))
        for row in rows:
            name = f"{row['keep_ratio']:g}"
            if row["variant"] == "pace" and found[name] is None and (row["speedup"] or 0) > 1:
                found[name] = frames
        if None not in found.values():
            break
    return found


def check_budget(bench: Bench, frames: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `fit_budget`'s calibration predicts for settings that were measured, beside the measurement."""
    costs = measure_costs(
        bench.model, frames, bench.args.size, run=bench.run, memory=bench.device.type == "cuda"
    )
    patches, checked = bench.grid[0] * bench.grid[1], []
    for row in rows:
        if row["variant"] != "pace" or row["frames"] != frames or row["seconds_median"] is None:
            continue
        kept = round(row["keep_ratio"] * patches)
        seconds = costs.seconds(frames, kept)
        checked.append(
            {
                "frames": frames,
                "keep_ratio": row["keep_ratio"],
                "predicted_seconds": seconds,
                "measured_seconds": row["seconds_median"],
                "error": seconds / row["seconds_median"] - 1,
                "predicted_gib": costs.memory_gib(frames, kept),
                "measured_gib": row["peak_gib"],
                "calibration_seconds": costs.calibration_seconds,
            }
        )
    return checked


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"latency.py: {error}")
