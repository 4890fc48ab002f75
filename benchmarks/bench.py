"""One model on one device: its variants timed, and where their time goes."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from arithmetic import Dimensions, Work, stage_work, total
from models import build, check_values, forward, heads_of, random_clip
from stages import kernels, stages_and_syncs

from pacevggt_patch import PaceWeights, accelerate, paused, summary
from pacevggt_patch.config import GLOBAL
from pacevggt_patch.evaluation.timing import time_interleaved
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.patching.install import retune
from pacevggt_patch.patching.summary import device_time
from pacevggt_patch.runtime.attention import kernel_name
from pacevggt_patch.runtime.device import usable_device

# A forward takes about so many times its floor; used until the first size is measured.
TIMES_FLOOR = 2.5
RESERVE_GIB = 1.0  # of a card, for the CUDA context and the allocator's fragments
IN_FLOAT32 = ("selection", "merging")
HEADS = ("camera_head", "depth_head", "point_head")


@dataclass(frozen=True)
class Job:
    """One number of frames.

    Attributes:
        frames: N.
        ratios: keep ratios of the accelerated model, and None for the stock model; the dearest first.
        repeats: counted runs of each variant.
        warm_up: whether an uncounted run comes first.
        stages: whether stages and host syncs are taken, which is one more run.
        kernels: whether the GPU kernels of the accelerated model are taken, which is another.
    """

    frames: int
    ratios: tuple[float | None, ...]
    repeats: int
    warm_up: bool = True
    stages: bool = False
    kernels: bool = False


class Bench:
    """One model on one device, and what is known about both.

    Args:
        args: of latency.py.
        model: one that is there already, on the device; without it the one that the arguments name is built.
        weights: of that model; without them it gets those that the arguments say.
    """

    def __init__(self, args: argparse.Namespace, model: Any = None, weights: PaceWeights | None = None):
        self.args = args
        self.device = usable_device(args.device)
        if model is None:
            model = build(args.backbone, self.device, args.checkpoint, args.precision)
        self.model = model
        check_values(self.model, args.size, args.precision, self.device)
        host = find_host(self.model)
        if weights is None and args.mode == GLOBAL:  # as calibration leaves them
            weights = PaceWeights.of_heads(host, heads_of(host.spec(), args.full_heads), {}, "the benchmark")
        self.shares = [] if weights is None else weights.full_head_shares()
        accelerate(
            self.model,
            args.keep_ratios[0],
            args.merge_budget,
            weights=weights,
            min_frames=1,
            compile=args.compile,
            head_dtype=args.head_dtype and getattr(torch, args.head_dtype),
            mode=args.mode,
        )
        self.attention = kernel_name(
            self.device, torch.float32 if args.precision == "float32" else torch.bfloat16
        )
        narrow = {"float32": 4, "autocast": 2, "bfloat16": 2}[args.precision]
        self.dims = Dimensions.of(self.model, narrow, 2 if args.precision == "bfloat16" else 4)
        self.grid = (args.size[0] // self.dims.patch, args.size[1] // self.dims.patch)
        self.peaks = device_peaks(self.device)
        self.times_floor = TIMES_FLOOR
        self.run = forward(self.model, args.precision)

    def first_call(self, frames: int) -> float:
        """Seconds of the accelerated model's first call, compiling included."""
        images, start = self.images(frames), device_time()
        with torch.inference_mode():
            self.pace(images, self.args.keep_ratios[0])
        return device_time() - start

    def pace(self, images: torch.Tensor, ratio: float) -> None:
        retune(self.model, ratio, self.args.merge_budget)
        self.run(images)

    def stock(self, images: torch.Tensor) -> None:
        with paused(self.model):
            self.run(images)

    def call(self, ratio: float | None, images: torch.Tensor) -> Callable[[], None]:
        return partial(self.stock, images) if ratio is None else partial(self.pace, images, ratio)

    def images(self, frames: int) -> torch.Tensor:
        return random_clip(frames, self.args.size, self.args.precision, self.device)

    def work(self, frames: int, ratio: float | None) -> dict[str, Work]:
        patches = self.grid[0] * self.grid[1]
        kept = patches if ratio is None else min(patches, max(1, round(ratio * patches)))
        alone = self.args.mode == GLOBAL and ratio is not None
        return stage_work(self.dims, frames, self.grid, kept, alone, self.shares)

    def floor(self, stage: str, work: Work) -> float:
        """Seconds that a stage can't go below on this device, in the precision it runs in."""
        size = self.dims.head_bytes if stage in HEADS else self.dims.aggregator_bytes
        wide = size == 4 or stage in IN_FLOAT32
        return work.floor(self.peaks["float32" if wide else "bfloat16"], self.peaks["bytes"])

    def whole_floor(self, frames: int, ratio: float | None) -> float:
        return sum(self.floor(stage, work) for stage, work in self.work(frames, ratio).items())

    def estimate(self, job: Job) -> float:
        """Seconds that a job will take, about."""
        seconds = 0.0
        for ratio in job.ratios:
            runs = job.repeats + job.warm_up + job.stages + (job.kernels and ratio is not None)
            seconds += runs * self.times_floor * self.whole_floor(job.frames, ratio)
        return seconds


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


def frames_that_fit(peaks: dict[int, float], card: float) -> int | None:
    """The largest number of frames for a card of so many GiB, by the line a + b N through peaks of memory.

    Args:
        peaks: GiB by number of frames, two at least.
        card: GiB.

    Returns:
        None where memory does not grow with the number of frames.
    """
    slope, start = statistics.linear_regression(list(peaks), list(peaks.values()))
    return max(0, math.floor((card - RESERVE_GIB - start) / slope)) if slope > 0 else None


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
    with torch.inference_mode():
        timings = timed({ratio: bench.call(ratio, images) for ratio in job.ratios}, job, bench.device)
        for ratio in job.ratios:
            if ratio is not None:
                retune(bench.model, ratio, bench.args.merge_budget)
            rows.append(make_row(bench, job, ratio, timings.get(ratio)))
            rows[-1] = with_speedup(rows[-1], rows)
            if job.stages and ratio in timings:
                details.append(make_details(bench, job, ratio, bench.call(ratio, images)))
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
        "merge_budget": None if ratio is None else summary(bench.model).config.merge_budget,
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


def make_details(bench: Bench, job: Job, ratio: float | None, run: Callable[[], None]) -> dict[str, Any]:
    """Where the time of one forward goes."""
    seconds, syncs = stages_and_syncs(bench.model, run, bench.device)
    work = bench.work(job.frames, ratio)
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
        "frames": job.frames,
        "keep_ratio": 1.0 if ratio is None else ratio,
        "stages": stages,
        "host_syncs": syncs,
        "kernels": kernels(run, bench.device) if job.kernels and ratio is not None else None,
    }
