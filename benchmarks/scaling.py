"""Seconds and memory of one clip over several GPUs, against one, and what paper says of more.

    python benchmarks/scaling.py --gpus 1,2 --backbone vggt-1b --precision bfloat16 --size 392x518 --compile \\
        --full-heads published --frames 300,1000 --once-frames 3000 --json FILE --plot FILE
    torchrun --nproc-per-node 2 benchmarks/scaling.py ...     # the same, of processes that are there already
    python benchmarks/scaling.py --gpus 1,2 --device cpu --frames 8 --size 56x56

Each number of GPUs runs the same clip; one GPU runs it without a group. A row's seconds are those of the slowest
process, its memory that of the fullest. Without a checkpoint VGGT-1B has random weights: shapes alone decide the time.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench import frames_that_fit, free
from exchange_model import Shape, predicted
from models import PRECISIONS, SEED, add_mode_arguments, build, check_values, forward, heads_of, random_clip
from tqdm import tqdm

from pacevggt_patch import PaceError, PaceWeights, accelerate, split_frames
from pacevggt_patch.config import GLOBAL
from pacevggt_patch.evaluation.timing import Timing, time_interleaved
from pacevggt_patch.hosts.base import Host, find_host
from pacevggt_patch.method.regression import solve_ridge
from pacevggt_patch.runtime.attention import kernel_name
from pacevggt_patch.runtime.device import usable_device
from pacevggt_patch.runtime.files import environment, write_json
from pacevggt_patch.runtime.ranks import Ranks

TIMEOUT = datetime.timedelta(minutes=10)
ON_PAPER = (1, 2, 4, 8)  # GPUs
CARDS_GIB = (24, 40, 80)
WARM_UP_FRAMES = (30, 49)  # of clips whose keys are samples, of some heads and of all


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if "RANK" in os.environ:  # started by torchrun
        in_group(args, None, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    elif max(args.gpus or [1]) > 1:
        start_processes(args, max(args.gpus))
    else:
        finish(args, measured(args, own_device(args), 0, 1))
    return 0


def own_device(args: argparse.Namespace) -> torch.device:
    """The device of this process, made the current one."""
    device = usable_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def start_processes(args: argparse.Namespace, world: int) -> None:
    """The benchmark in `world` processes of this machine.

    Raises:
        PaceError: there are fewer GPUs, or a process failed; names it.
    """
    there = torch.cuda.device_count()
    if args.device != "cpu" and there and there < world:
        raise PaceError(f"--gpus {world} needs as many, and torch sees {there}: name fewer")
    # Here, so that no port has to be found beforehand.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    try:
        mp.spawn(one_process, (args, store.port, world), nprocs=world)
    except mp.ProcessRaisedException as error:
        print(error, file=sys.stderr)
        reason = str(error).strip().splitlines()[-1]
        raise PaceError(f"rank {error.error_index} failed ({reason})") from None
    except mp.ProcessExitedException as error:
        how = error.signal_name or f"exit status {error.exit_code}"
        raise PaceError(f"rank {error.error_index} ended by itself ({how})") from None


def one_process(rank: int, args: argparse.Namespace, port: int, world: int) -> None:
    """What each process of `start_processes` does."""
    os.environ["LOCAL_RANK"] = str(rank)
    if args.device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // world))
    in_group(args, dist.TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT), rank, world)


def in_group(args: argparse.Namespace, store: Any, rank: int, world: int) -> None:
    """The benchmark in one of several processes; `store` is where they meet, None where torchrun says it."""
    device = own_device(args)
    where: dict[str, Any] = {} if store is None else {"store": store, "rank": rank, "world_size": world}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT, **where)
    finish(args, measured(args, device, rank, world), rank)
    gc.collect()  # of the model, which holds the group: threads of gloo must end before the interpreter does
    # Not after an error: others that wait in a call would keep this process from ending.
    dist.destroy_process_group()


def finish(args: argparse.Namespace, report: dict[str, Any], rank: int = 0) -> None:
    """Print and draw a whole report."""
    if rank:
        return
    print_report(report)
    if args.plot:
        from plots import save_scaling

        save_scaling(report, args.plot)


def measured(args: argparse.Namespace, device: torch.device, rank: int, world: int) -> dict[str, Any]:
    """The report, whole on rank 0."""
    counts = args.gpus or [2**i for i in range(world.bit_length()) if 2**i <= world]
    if max(counts) > world:
        raise PaceError(f"--gpus {max(counts)} needs as many processes, and torchrun started {world}")
    # Every process makes every group, as torch asks for it.
    several = [count for count in counts if count > 1]
    groups = {n: dist.group.WORLD if n == world else dist.new_group([*range(n)]) for n in several}
    model = build(args.backbone, device, args.checkpoint, args.precision)
    if world > 1:
        for tensor in model.state_dict().values():  # random ones are not promised to be the same on all
            sent = tensor.contiguous()
            dist.broadcast(sent, 0)
            tensor.copy_(sent)
    host = find_host(model)
    if any(side < host.patch_size or side % host.patch_size for side in args.size):
        raise PaceError(
            f"--size must be of multiples of {host.patch_size}, got {args.size[0]}x{args.size[1]}"
        )
    check_values(model, args.size, args.precision, device)
    heads = heads_of(host.spec(), args.full_heads)
    settings: dict[str, Any] = {
        "weights": PaceWeights.of_heads(host, heads, {}, "the benchmark"),
        "compile": args.compile,
        "keep_ratio": args.keep_ratio,
    }
    shape = Shape.of(host, heads, args.size, args.keep_ratio, 4 if args.precision == "float32" else 2)
    report: dict[str, Any] = {
        "environment": environment(device),
        "backbone": args.backbone
        + ("" if args.checkpoint or args.backbone == "mini" else " (random weights)"),
        "size": f"{args.size[0]}x{args.size[1]}",
        "precision": PRECISIONS[args.precision],
        "compile": args.compile,
        "keep_ratio": args.keep_ratio,
        "full_heads": len(heads),
        "attention": kernel_name(device, torch.float32 if args.precision == "float32" else torch.bfloat16),
        "backend": dist.get_backend() if world > 1 else None,
        "repeats": args.repeats,
        "seed": SEED,
        "warm_up_seconds": None,
        "link": None,
        "unsplit_seconds": {},
        "rows": [],
        "model": [],
        "largest_frames": [],
    }
    run = forward(model, args.precision)
    bar = tqdm(total=len(jobs_of(args, counts)), unit="size", disable=True if rank else None)
    accelerate(model, **settings, min_frames=1)
    report["warm_up_seconds"] = warm_up(args, run, device)  # by all at once: each compiles for itself
    if several:
        meet(dist.group.WORLD, device)
    if several and rank < max(several):
        report["link"] = link_of(groups[max(several)], device)
    for frames, count, once in jobs_of(args, counts):
        if rank < count:
            group = groups.get(count)
            accelerate(
                model, **settings, **({"min_frames": 1} if group is None else {"process_group": group})
            )
            row = timed(args, run, device, frames, group, rank, count, once)
            report["rows"].append(with_speedup(row, report["rows"]))
            if count == 1:
                report["unsplit_seconds"][str(frames)] = unsplit(model, host, shape, frames, args, device)
            report["model"] = on_paper(shape, report)
            report["largest_frames"] = largest_frames(report["rows"], device)
            if rank == 0 and args.json:  # after every row: what is interrupted keeps what it has
                write_json(args.json, report)
        if several:
            meet(dist.group.WORLD, device)
        bar.update()
    bar.close()
    return report


def jobs_of(args: argparse.Namespace, counts: list[int]) -> list[tuple[int, int, bool]]:
    """Frames, GPUs, and whether one run is all; the longest last."""
    jobs = [(frames, count, False) for frames in args.frames for count in counts]
    return jobs + [(frames, count, True) for frames in args.once_frames for count in counts]


def meet(group: Any, device: torch.device) -> None:
    """Wait for all processes of a group. Not by a barrier, which would have to be told its GPU."""
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    wait_for(device)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def warm_up(args: argparse.Namespace, run: Callable[[torch.Tensor], None], device: torch.device) -> float:
    """Seconds of the first passes, compiling included, over short clips of this process alone."""
    start = time.perf_counter()
    if args.compile:
        for frames in WARM_UP_FRAMES:
            with torch.inference_mode():
                run(random_clip(frames, args.size, args.precision, device))
    wait_for(device)
    return time.perf_counter() - start


def timed(
    args: argparse.Namespace,
    run: Callable[[torch.Tensor], None],
    device: torch.device,
    frames: int,
    group: Any,
    rank: int,
    count: int,
    once: bool = False,
) -> dict[str, Any]:
    """A row, of a group of `count` processes that this one is in. Out of memory on one GPU alone has no figures."""
    free(device)
    images = random_clip(frames, args.size, args.precision, device)[:, split_frames(frames, rank, count)]
    images = images.clone()  # the frames of others may go

    def whole() -> None:
        with torch.inference_mode():
            run(images)

    def together(name: str) -> None:
        if group is not None:
            meet(group, device)

    timing = Timing([math.nan])
    # Where one of several runs out, the others wait for it: that ends them all.
    with contextlib.suppress(*([torch.cuda.OutOfMemoryError] if group is None else [])):
        timing = time_interleaved(
            {"clip": whole},
            1 if once else args.repeats,
            device,
            keep_results=False,
            warm_up=not once,
            prepare=together,
        )["clip"]
    every: list[Any] = [(timing.seconds, timing.peak_gib)]
    if group is not None:
        every = [None] * count
        dist.all_gather_object(every, (timing.seconds, timing.peak_gib), group=group)
    seconds = [max(one) for one in zip(*(seconds for seconds, _ in every), strict=True)]
    failed = any(math.isnan(one) for one in seconds)
    peaks = [peak for _, peak in every if peak is not None]
    return {
        "gpus": count,
        "frames": frames,
        "runs": len(seconds),
        "seconds_median": None if failed else statistics.median(seconds),
        "seconds_min": None if failed else min(seconds),
        "seconds_max": None if failed else max(seconds),
        "peak_gib": max(peaks, default=None),
        "peaks_gib": peaks,  # of each rank
    }


def with_speedup(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A row with its speed-up over one GPU, and its share of that one's memory; None where that was not measured."""
    one = next((r for r in [*rows, row] if r["gpus"] == 1 and r["frames"] == row["frames"]), {})

    def over_one(key: str) -> float | None:
        return row[key] / one[key] if row[key] and one.get(key) else None

    share = over_one("seconds_median")
    return row | {"speedup": share and 1 / share, "memory_share": over_one("peak_gib")}


def link_of(group: Any, device: torch.device) -> dict[str, float]:
    """Bytes a second that this process receives in a gather, and the seconds of one of next to nothing."""
    ranks = Ranks(group)

    def fastest(numbers: int) -> float:
        tensor, found = torch.ones(numbers, device=device, dtype=torch.bfloat16), []
        for _ in range(6):  # the first makes the connection
            meet(group, device)
            start = time.perf_counter()
            ranks.gather(tensor, [numbers] * ranks.world, 0)
            wait_for(device)
            found.append(time.perf_counter() - start)
        return min(found[1:])

    numbers, call = 2**26 if device.type == "cuda" else 2**20, fastest(1)
    seconds = max(fastest(numbers) - call, 1e-9)
    return {
        "gpus": ranks.world,
        "bytes_per_second": 2 * numbers * (ranks.world - 1) / seconds,
        "seconds_per_call": call,
    }


def unsplit(
    model: Any, host: Host, shape: Shape, frames: int, args: argparse.Namespace, device: torch.device
) -> float:
    """Seconds of a pass that every GPU spends, however many there are: the camera head, and all regressions.

    Args:
        model: accelerated without a group.
        frames: of the whole clip.
    """
    narrow = torch.bfloat16 if args.precision == "bfloat16" else torch.float32
    channels = host.embed_dim
    tokens: list[Any] = [None] * host.depth
    tokens[-1] = torch.randn(1, frames, shape.special, 2 * channels, device=device).to(narrow)
    rows = torch.randn(2 * channels, channels, device=device)
    squares, products, level = rows.mT @ rows, rows.mT @ rows, torch.ones((), device=device)

    def cameras() -> None:
        with torch.inference_mode(), torch.autocast(device.type, narrow, enabled=narrow != torch.float32):
            model.camera_head(tokens)

    runs = {
        "cameras": cameras if host.camera_head is not None else lambda: None,
        "regression": lambda: solve_ridge(squares.clone(), products, level),
    }
    found = time_interleaved(runs, 5, device, keep_results=False)
    return found["cameras"].median + shape.regressions * found["regression"].median


def on_paper(shape: Shape, report: dict[str, Any]) -> list[dict[str, Any]]:
    """What paper says of each clip that was measured on one GPU, beside what was measured."""
    link, rows = report["link"], report["rows"]
    if link is None:
        return []
    measured = {(row["frames"], row["gpus"]): row["seconds_median"] for row in rows}
    found = []
    for frames in dict.fromkeys(row["frames"] for row in rows):
        one, alone = measured.get((frames, 1)), report["unsplit_seconds"].get(str(frames))
        if not one or alone is None:
            continue
        for gpus in (number for number in ON_PAPER if number <= frames):
            speed = link["bytes_per_second"], link["seconds_per_call"]
            row = predicted(shape, frames, gpus, one, min(alone, one), *speed)
            seconds = measured.get((frames, gpus))
            row |= {"predicted_speedup": one / row["predicted_seconds"], "measured_seconds": seconds}
            found.append(row | {"error": seconds and row["predicted_seconds"] / seconds - 1})
    return found


def largest_frames(rows: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """The largest N for GPUs of several sizes: peak memory = a + b N through the measured peaks of each number of GPUs.

    Without two sizes there is no line; a figure beyond the largest measured N is marked.
    """
    own = [torch.cuda.get_device_properties(device).total_memory / 2**30] if device.type == "cuda" else []
    found = []
    for gpus in dict.fromkeys(row["gpus"] for row in rows):
        points = {r["frames"]: r["peak_gib"] for r in rows if r["gpus"] == gpus and r["seconds_median"]}
        if len(points) < 2 or None in points.values():
            continue
        for card in [*CARDS_GIB, *own]:
            frames = frames_that_fit(points, card)
            if frames is None:
                continue
            within = min(points) <= frames <= max(points)
            found.append({"gpus": gpus, "card_gib": card, "frames": frames, "measured": within})
    return found


def print_report(report: dict[str, Any]) -> None:
    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    print(" | ".join(f"{k} {v}" for k, v in report["environment"].items() if v))
    print(f"{'gpus':>5s}{'frames':>8s}{'median s':>11s}{'GiB':>8s}{'of one':>8s}{'speed-up':>10s}")
    for row in report["rows"]:
        figures = cell(row["seconds_median"], ".3f"), cell(row["peak_gib"], ".1f")
        more = cell(row["memory_share"], ".0%"), cell(row["speedup"], ".2f")
        print(
            f"{row['gpus']:>5d}{row['frames']:>8d}{figures[0]:>11s}{figures[1]:>8s}{more[0]:>8s}{more[1]:>9s}x"
        )
    if report["link"] is not None:
        speed, call = report["link"]["bytes_per_second"] / 1e9, report["link"]["seconds_per_call"] * 1e6
        print(f"\ngather: {speed:.1f} GB/s, {call:.0f} us a call\non paper:")
        print(
            f"{'gpus':>5s}{'frames':>8s}{'GiB sent':>10s}{'predicted s':>13s}{'measured s':>12s}{'off':>7s}"
        )
    for row in report["model"]:
        figures = cell(row["measured_seconds"], ".3f"), cell(row["error"], "+.0%")
        print(
            f"{row['gpus']:>5d}{row['frames']:>8d}{row['received_gib']:>10.2f}{row['predicted_seconds']:>13.3f}"
            f"{figures[0]:>12s}{figures[1]:>7s}"
        )
    for row in report["largest_frames"]:
        mark = "" if row["measured"] else " (extrapolated)"
        print(f"{row['gpus']} GPUs of {row['card_gib']:.0f} GiB hold {row['frames']} frames{mark}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", choices=("mini", "vggt-1b"), default="mini")
    parser.add_argument("--checkpoint", help="file or Hub id of VGGT-1B's weights (random if not given)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one if not given")
    parser.add_argument(
        "--gpus",
        type=numbers,
        metavar="N,N",
        help="numbers of processes, a GPU each (under torchrun powers of two, else 1)",
    )
    sizes: dict[str, Any] = {"type": numbers, "metavar": "N,N"}
    parser.add_argument("--frames", **sizes, default=[24])
    parser.add_argument("--once-frames", **sizes, default=[], help="one run, without warm-up")
    parser.add_argument(
        "--size", type=lambda text: tuple(int(n) for n in text.split("x")), default=(224, 224)
    )
    parser.add_argument("--keep-ratio", type=float, default=0.3)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--compile", action="store_true", help="accelerate with compile=True")
    add_mode_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="the report")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG; needs matplotlib")
    args = parser.parse_args(argv)
    if args.mode != GLOBAL:
        raise PaceError(f"--mode {args.mode} runs in one process alone: leave it out")
    if args.repeats < 1:
        raise PaceError(f"--repeats must be at least 1, got {args.repeats}")
    if args.gpus is not None and (not args.gpus or min(args.gpus) < 1):
        raise PaceError("--gpus must be numbers of GPUs such as 1,2")
    few = [frames for frames in args.frames + args.once_frames if frames < max(args.gpus or [1])]
    if few:
        frames = "1 frame is" if few[0] == 1 else f"{few[0]} frames are"
        raise PaceError(f"{frames} too few for {max(args.gpus)} GPUs: each needs one at least")
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"scaling.py: {error}")
