"""Seconds and memory of one clip over several GPUs, against one.

    torchrun --nproc-per-node 4 benchmarks/scaling.py --backbone vggt-1b --precision bfloat16 --size 392x518 \\
        --compile --full-heads published --frames 300,1000 --json FILE
    torchrun --nproc-per-node 2 benchmarks/scaling.py --device cpu --frames 8 --size 56x56

Each number of GPUs up to that of processes, in powers of two, runs the same clip; one GPU runs it without a group. A
row's seconds are those of the slowest process, its memory that of the fullest. Without a checkpoint VGGT-1B has random
weights: shapes alone decide the time.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import sys
from typing import Any

import torch
import torch.distributed as dist
from models import PRECISIONS, add_mode_arguments, build, check_values, forward, heads_of, random_clip
from tqdm import tqdm

from pacevggt_patch import PaceError, PaceWeights, accelerate, split_frames
from pacevggt_patch.config import GLOBAL
from pacevggt_patch.evaluation.timing import time_interleaved
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.runtime.attention import kernel_name
from pacevggt_patch.runtime.device import usable_device
from pacevggt_patch.runtime.files import environment, write_json

TIMEOUT = datetime.timedelta(minutes=10)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    device, alone = usable_device(args.device), "RANK" not in os.environ
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not alone:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    rank, world = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    try:
        report = measured(args, device, rank, world)
    finally:
        if not alone:
            dist.destroy_process_group()
    if rank == 0:
        print_rows(report["rows"])
    return 0


def measured(args: argparse.Namespace, device: torch.device, rank: int, world: int) -> dict[str, Any]:
    """The report, whole on rank 0."""
    counts = [2**i for i in range(world.bit_length()) if 2**i <= world]
    # Every process makes every group, as torch asks for it.
    groups = {count: dist.new_group(list(range(count)), timeout=TIMEOUT) for count in counts if count > 1}
    model = build(args.backbone, device, args.checkpoint, args.precision)
    check_values(model, args.size, args.precision, device)
    host = find_host(model)
    weights = PaceWeights.of_heads(host, heads_of(host.spec(), args.full_heads), {}, "the benchmark")
    settings: dict[str, Any] = {"weights": weights, "compile": args.compile, "keep_ratio": args.keep_ratio}
    report: dict[str, Any] = {
        "environment": environment(device),
        "backbone": args.backbone
        + ("" if args.checkpoint or args.backbone == "mini" else " (random weights)"),
        "size": f"{args.size[0]}x{args.size[1]}",
        "precision": PRECISIONS[args.precision],
        "compile": args.compile,
        "keep_ratio": args.keep_ratio,
        "full_heads": len(weights.full_heads),
        "attention": kernel_name(device, torch.float32 if args.precision == "float32" else torch.bfloat16),
        "repeats": args.repeats,
        "rows": [],
    }
    run = forward(model, args.precision)
    jobs = [(frames, count) for frames in args.frames for count in counts]
    for frames, count in tqdm(jobs, unit="size", disable=True if rank else None):
        if rank < count:
            more = {"process_group": groups[count]} if count > 1 else {"min_frames": 1}
            accelerate(model, **settings, **more)
            row = timed(args, run, device, frames, groups.get(count), rank, count)
            report["rows"].append(with_speedup(row, report["rows"]))
            if rank == 0 and args.json:  # after every row: what is interrupted keeps what it has
                write_json(args.json, report)
        if groups:
            dist.barrier()
    return report


def timed(
    args: argparse.Namespace, run: Any, device: torch.device, frames: int, group: Any, rank: int, count: int
) -> dict[str, Any]:
    """A row, of a group of `count` processes that this one is in."""
    images = random_clip(frames, args.size, args.precision, device)
    images = images[:, split_frames(frames, rank, count)].clone()

    def together(name: str) -> None:
        if group is not None:
            dist.barrier(group)

    with torch.inference_mode():
        timing = time_interleaved(
            {"clip": lambda: run(images)}, args.repeats, device, keep_results=False, prepare=together
        )["clip"]
    every: list[Any] = [(timing.seconds, timing.peak_gib)]
    if group is not None:
        every = [None] * count
        dist.all_gather_object(every, (timing.seconds, timing.peak_gib), group=group)
    seconds = [max(one) for one in zip(*(seconds for seconds, _ in every), strict=True)]
    peaks = [peak for _, peak in every if peak is not None]
    return {
        "gpus": count,
        "frames": frames,
        "seconds_median": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "peak_gib": max(peaks, default=None),
    }


def with_speedup(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A row with its speed-up over one GPU."""
    one = next((r for r in [*rows, row] if r["gpus"] == 1 and r["frames"] == row["frames"]), None)
    return row | {"speedup": None if one is None else one["seconds_median"] / row["seconds_median"]}


def print_rows(rows: list[dict[str, Any]]) -> None:
    print(f"{'gpus':>5s}{'frames':>8s}{'median s':>11s}{'GiB':>8s}{'speed-up':>10s}")
    for row in rows:
        peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        print(
            f"{row['gpus']:>5d}{row['frames']:>8d}{row['seconds_median']:>11.3f}{peak:>8s}{row['speedup']:>9.2f}x"
        )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", choices=("mini", "vggt-1b"), default="mini")
    parser.add_argument("--checkpoint", help="file or Hub id of VGGT-1B's weights (random if not given)")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one if not given)")
    parser.add_argument(
        "--frames", type=lambda text: [int(n) for n in text.split(",")], default=[24], metavar="N,N"
    )
    parser.add_argument(
        "--size", type=lambda text: tuple(int(n) for n in text.split("x")), default=(224, 224)
    )
    parser.add_argument("--keep-ratio", type=float, default=0.3)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--compile", action="store_true", help="accelerate with compile=True")
    add_mode_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="file for the report")
    args = parser.parse_args(argv)
    if args.mode != GLOBAL:
        raise PaceError(f"--mode {args.mode} runs in one process alone: leave it out")
    if args.repeats < 1:
        raise PaceError(f"--repeats must be at least 1, got {args.repeats}")
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"scaling.py: {error}")
