"""Latency and memory of a VGGT, stock against accelerated: same inputs, interleaved runs.

    python benchmarks/latency.py --backbone mini --device cpu --frames 8,24 --size 224x224
    python benchmarks/latency.py --backbone vggt-1b --device cuda --precision bfloat16 --size 392x518 \\
        --frames 100,300 --pace-frames 1000 --once-frames 3000 --keep-ratios 0.3,0.15 --budget-frames 300 \\
        --minutes 15 --json benchmarks/results/latency.json --plot benchmarks/results/latency.png

Beside seconds and memory: the time of every stage and what part of it arithmetic alone would take (arithmetic.py),
the longest GPU kernels, host syncs, the largest clip for usual cards, the smallest clip for which acceleration pays,
how well `fit_budget` predicts, and with --compare another VGGT's own code. vggt-1b without --checkpoint is the full
shape with random weights: shapes alone decide the time, not the values. Needs a `vggt` on the path.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arithmetic import Dimensions, Work, stage_work, total
from hosts import PRECISIONS, SEED, build, check_values, forward, other_rows, random_clip
from plots import save_plots
from stages import host_syncs, kernels, stage_seconds
from tables import print_report
from tqdm import tqdm

from pacevggt_patch import PaceError, accelerate, paused, summary
from pacevggt_patch.budget import measure_costs
from pacevggt_patch.demo import usable_device
from pacevggt_patch.evaluation.timing import time_interleaved
from pacevggt_patch.patch import retune
from pacevggt_patch.report import environment, write_json
from pacevggt_patch.summary import device_time

BREAK_EVEN_CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
CARDS_GIB = (12, 16, 24, 40, 80)
RESERVE_GIB = 1.0  # of a card, for the CUDA context and the allocator's fragments
# A forward takes about so many times its floor; used until the first size is measured.
TIMES_FLOOR = 2.5
IN_FLOAT32 = ("scores", "keep and merge")
HEADS = ("camera_head", "depth_head", "point_head")


@dataclass(frozen=True)
class Job:
    """One number of frames.

    Attributes:
        frames: N.
        stock: whether the stock model runs, too.
        repeats: counted runs of each variant.
        warm_up: whether an uncounted run comes first.
        details: whether stages, kernels and syncs are taken.
    """

    frames: int
    stock: bool
    repeats: int
    warm_up: bool
    details: bool


class Bench:
    """One model on one device, and what is known about both."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = usable_device(args.device)
        self.model = build(args.backbone, self.device, args.checkpoint, args.precision)
        check_values(self.model, args.size, args.precision, self.device)
        accelerate(self.model, args.keep_ratios[0], args.merge_budget, weights=None)
        narrow = {"float32": 4, "autocast": 2, "bfloat16": 2}[args.precision]
        self.dims = Dimensions.of(self.model, narrow, 2 if args.precision == "bfloat16" else 4)
        self.grid = (args.size[0] // self.dims.patch, args.size[1] // self.dims.patch)
        self.peaks = device_peaks(self.device)
        self.times_floor = TIMES_FLOOR
        self.run = forward(self.model, args.precision)

    def pace(self, images: torch.Tensor, ratio: float) -> None:
        retune(self.model, ratio, self.args.merge_budget)
        self.run(images)

    def stock(self, images: torch.Tensor) -> None:
        with paused(self.model):
            self.run(images)

    def variants(self, job: Job) -> list[float | None]:
        """Keep ratios, and None for stock; the dearest first."""
        return [*([None] if job.stock else []), *sorted(self.args.keep_ratios, reverse=True)]

    def call(self, ratio: float | None, images: torch.Tensor) -> Callable[[], None]:
        return partial(self.stock, images) if ratio is None else partial(self.pace, images, ratio)

    def images(self, frames: int) -> torch.Tensor:
        return random_clip(frames, self.args.size, self.args.precision, self.device)

    def work(self, frames: int, ratio: float | None) -> dict[str, Work]:
        patches = self.grid[0] * self.grid[1]
        kept = patches if ratio is None else min(patches, max(1, round(ratio * patches)))
        return stage_work(self.dims, frames, self.grid, kept)

    def floor(self, stage: str, work: Work) -> float:
        """Seconds that a stage can't go below on this device, in the precision it runs in."""
        size = self.dims.head_bytes if stage in HEADS else self.dims.aggregator_bytes
        wide = size == 4 or stage in IN_FLOAT32
        return work.floor(self.peaks["float32" if wide else "bfloat16"], self.peaks["bytes"])

    def whole_floor(self, frames: int, ratio: float | None) -> float:
        return sum(self.floor(stage, work) for stage, work in self.work(frames, ratio).items())

    def estimate(self, job: Job) -> float:
        """Seconds that a job will take, about."""
        rounds = job.repeats + job.warm_up
        seconds = 0.0
        for ratio in self.variants(job):
            extra = 0 if not job.details else 1 if ratio is None else 3  # stages; syncs and kernels
            seconds += (rounds + extra) * self.times_floor * self.whole_floor(job.frames, ratio)
        return seconds


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    start = time.monotonic()
    bench = Bench(args)
    report: dict[str, Any] = {
        "environment": environment(bench.device),
        "backbone": args.backbone
        + ("" if args.checkpoint or args.backbone == "mini" else " (random weights)"),
        "size": f"{args.size[0]}x{args.size[1]}",
        "precision": PRECISIONS[args.precision],
        "repeats": args.repeats,
        "seed": SEED,
        "peak_flops_per_second": {name: bench.peaks[name] for name in ("float32", "bfloat16")},
        "peak_bytes_per_second": bench.peaks["bytes"],
        "rows": [],
        "details": [],
        "skipped": [],
    }

    def save() -> None:  # after every size: an interrupted benchmark keeps what it has
        if args.json:
            write_json(args.json, report)
        if args.plot:
            save_plots(report, args.plot)

    print(" | ".join(f"{k} {v}" for k, v in report["environment"].items() if v))
    jobs = plan(args)
    parts = [(job, bench.estimate(job)) for job in jobs]
    each = ", ".join(f"{job.frames} frames {seconds:.0f} s" for job, seconds in parts)
    print(f"about {sum(seconds for _, seconds in parts):.0f} s in all, before what comes after: {each}")
    with tqdm(total=len(jobs), unit="size", disable=None) as bar:
        for job in jobs:
            left = args.minutes * 60 - (time.monotonic() - start)
            if bench.estimate(job) > left:
                report["skipped"].append({"frames": job.frames, "reason": f"--minutes {args.minutes:g}"})
                tqdm.write(f"{job.frames} frames skipped: they would take longer than --minutes leaves")
            else:
                rows, details = measure(bench, job)
                report["rows"] += rows
                report["details"] += details
            save()
            bar.update()
    report["largest_frames"] = largest_frames(report["rows"]) if bench.device.type == "cuda" else None
    report["break_even_frames"] = break_even(bench)
    save()
    report["budget"] = [row for n in args.budget_frames for row in check_budget(bench, n, report["rows"])]
    save()
    for directory in args.compare:
        free(bench.device)  # the other process needs the memory that this one only keeps at hand
        for row in other_rows(args, directory):
            report["rows"].append(with_speedup(row, report["rows"]))
            save()
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
    parser.add_argument("--device", default="cpu")
    sizes: dict[str, Any] = {"type": several(int), "metavar": "N,N"}
    parser.add_argument("--frames", **sizes, default=[8, 24], help="stock and accelerated, with all details")
    parser.add_argument("--pace-frames", **sizes, default=[], help="accelerated only")
    parser.add_argument(
        "--once-frames", **sizes, default=[], help="accelerated only, one run without warm-up, no details"
    )
    parser.add_argument(
        "--size", type=lambda text: tuple(int(n) for n in text.split("x")), default=(224, 224)
    )
    parser.add_argument("--keep-ratios", type=several(float), default=[0.3], metavar="R,R")
    parser.add_argument("--merge-budget", type=float)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
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
        "--compare",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="time the vggt package in this folder, too, in a process of its own",
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


def plan(args: argparse.Namespace) -> list[Job]:
    """The sizes to measure, in this order."""
    jobs = [Job(n, True, args.repeats, True, True) for n in args.frames]
    jobs += [Job(n, False, args.repeats, True, True) for n in args.pace_frames]
    return jobs + [Job(n, False, 1, False, False) for n in args.once_frames]


def device_peaks(device: torch.device) -> dict[str, float]:
    """FLOP/s of a dense matrix product by dtype, and bytes/s of a copy, read and write counted: the best of five."""
    side, count = (8192, 2**28) if device.type == "cuda" else (512, 2**23)

    def fastest(run: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(6):  # the first warms up
            start = device_time()
            run()
            seconds.append(device_time() - start)
        return min(seconds[1:])

    peaks = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(side, side, device=device, dtype=dtype)
        out = torch.empty_like(matrix)
        seconds = fastest(partial(torch.mm, matrix, matrix, out=out))
        peaks[str(dtype).split(".")[1]] = 2 * side**3 / seconds
    source = torch.zeros(count, device=device)
    peaks["bytes"] = 2 * 4 * count / fastest(partial(torch.empty_like(source).copy_, source))
    return peaks


def free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def timed(
    runs: dict[float | None, Callable[[], None]], job: Job, device: torch.device
) -> dict[float | None, Any]:
    """Interleaved timings; variants that run out of memory are left out, the dearest first."""
    runs = dict(runs)
    while runs:
        try:
            named = {str(ratio): run for ratio, run in runs.items()}
            timings = time_interleaved(named, job.repeats, device, keep_results=False, warm_up=job.warm_up)
            return {ratio: timings[str(ratio)] for ratio in runs}
        except torch.cuda.OutOfMemoryError:
            pass  # outside this block nothing holds the tensors of the failed run any more
        free(device)
        runs.pop(next(iter(runs)))
    return {}


def measure(bench: Bench, job: Job) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and details of all variants for one number of frames."""
    rows, details = [], []
    images = bench.images(job.frames)
    variants = bench.variants(job)
    with torch.inference_mode():
        timings = timed({ratio: bench.call(ratio, images) for ratio in variants}, job, bench.device)
        for ratio in variants:
            if ratio is not None:
                retune(bench.model, ratio, bench.args.merge_budget)
            rows.append(make_row(bench, job, ratio, timings.get(ratio)))
            rows[-1] = with_speedup(rows[-1], rows)
            if job.details and ratio in timings:
                details.append(make_details(bench, job.frames, ratio, bench.call(ratio, images)))
    known = [row["seconds_median"] / row["floor_seconds"] for row in rows if row["seconds_median"]]
    bench.times_floor = max(known, default=bench.times_floor)
    return rows, details


def make_row(bench: Bench, job: Job, ratio: float | None, timing: Any) -> dict[str, Any]:
    """One line of the table; figures of a variant that ran out of memory are None."""
    flops = total(bench.work(job.frames, ratio)).flops
    floor = bench.whole_floor(job.frames, ratio)
    return {
        "variant": "stock" if ratio is None else "pace",
        "frames": job.frames,
        "keep_ratio": 1.0 if ratio is None else ratio,
        "merge_budget": 0.0 if ratio is None else summary(bench.model).config.merge_share,
        "runs": job.repeats,
        "seconds_median": timing and timing.median,
        "seconds_min": timing and min(timing.seconds),
        "seconds_max": timing and max(timing.seconds),
        "peak_gib": timing and timing.peak_gib,
        "tflop": flops / 1e12,
        "tflop_per_second": timing and flops / 1e12 / timing.median,
        "floor_seconds": floor,
        "floor_share": timing and floor / timing.median,
    }


def with_speedup(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row with its speed-up over the stock model at the same number of frames, None where that is not known."""
    stock = [r["seconds_median"] for r in rows if r["variant"] == "stock" and r["frames"] == row["frames"]]
    own = row.get("seconds_median")
    return row | {"speedup": stock[0] / own if own and stock and stock[0] else None}


def make_details(bench: Bench, frames: int, ratio: float | None, run: Callable[[], None]) -> dict[str, Any]:
    """Where the time of one forward goes. Kernels and syncs are those of the accelerated model."""
    seconds = stage_seconds(bench.model, run, bench.device)
    work = bench.work(frames, ratio)
    stages = []
    for stage, taken in seconds.items():
        row: dict[str, Any] = {"stage": stage, "seconds": taken}
        if stage in work:
            floor = bench.floor(stage, work[stage])
            row |= {
                "tflop": work[stage].flops / 1e12,
                "gbyte": work[stage].bytes / 1e9,
                "elementwise_gbyte": work[stage].passes / 1e9,
                "tflop_per_second": work[stage].flops / 1e12 / taken,
                "floor_seconds": floor,
                "floor_share": floor / taken,
            }
        stages.append(row)
    return {
        "variant": "stock" if ratio is None else "pace",
        "frames": frames,
        "keep_ratio": 1.0 if ratio is None else ratio,
        "stages": stages,
        "host_syncs": None if ratio is None else host_syncs(run, bench.device),
        "kernels": None if ratio is None else kernels(run, bench.device),
    }


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
        mean = sum(points) / len(points), sum(points.values()) / len(points)
        slope = sum((n - mean[0]) * (gib - mean[1]) for n, gib in points.items())
        slope /= sum((n - mean[0]) ** 2 for n in points)
        start = mean[1] - slope * mean[0]
        for card in CARDS_GIB:
            frames = max(0, math.floor((card - RESERVE_GIB - start) / slope)) if slope > 0 else None
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
    """For each keep ratio the smallest number of frames tried at which the accelerated model is faster, or None."""
    found: dict[str, int | None] = dict.fromkeys((f"{ratio:g}" for ratio in bench.args.keep_ratios), None)
    for frames in BREAK_EVEN_CANDIDATES:
        rows, _ = measure(bench, Job(frames, True, bench.args.repeats, True, False))
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
