"""Latency and memory of a VGGT, stock against accelerated: same inputs, interleaved runs.

    python benchmarks/latency.py --backbone mini --device cpu --frames 8,24 --size 224x224
    python benchmarks/latency.py --backbone vggt-1b --device cuda --frames 100,300 --size 392x518 --precision autocast

vggt-1b without --checkpoint is the full shape with random weights: shapes alone decide the time, not the values.
Needs a `vggt` on the path.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pacevggt_patch import PaceError, accelerate, paused, summary
from pacevggt_patch.demo import usable_device
from pacevggt_patch.evaluation.timing import time_interleaved
from pacevggt_patch.mini import build_mini
from pacevggt_patch.report import environment, write_json

SEED = 0
BREAK_EVEN_CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
PRECISIONS = {
    "float32": "float32 weights, no autocast",
    "autocast": "float32 weights, aggregator under bfloat16 autocast, heads in float32 (stock forward)",
    "bfloat16": "bfloat16 weights, heads called one by one under bfloat16 autocast",
}


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    device = usable_device(args.device)
    torch.manual_seed(SEED)
    model = build(args.backbone, device, args.checkpoint)
    if args.precision == "bfloat16":
        model.to(torch.bfloat16)
    accelerate(model, args.keep_ratio, args.merge_budget, weights=None)

    report: dict[str, Any] = {
        "environment": environment(device),
        "backbone": args.backbone
        + ("" if args.checkpoint or args.backbone == "mini" else " (random weights)"),
        "size": f"{args.size[0]}x{args.size[1]}",
        "precision": PRECISIONS[args.precision],
        "repeats": args.repeats,
        "seed": SEED,
        "rows": [],
    }
    print(" | ".join(f"{k} {v}" for k, v in report["environment"].items() if v))
    with tqdm(total=len(args.frames) * 2 * (args.repeats + 1), unit="run", disable=None) as bar:
        for frames in args.frames:
            report["rows"] += measure(model, frames, args, device, bar.update)
            if args.json:  # after every size: an interrupted benchmark keeps what it has
                write_json(args.json, report)
    report["break_even_frames"] = break_even(model, args, device)
    if args.json:
        write_json(args.json, report)
    print_table(report)
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", choices=("mini", "vggt-1b"), default="mini")
    parser.add_argument(
        "--checkpoint", help="file or Hub id of VGGT-1B's weights (random weights if not given)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frames", type=lambda text: [int(n) for n in text.split(",")], default=[8, 24])
    parser.add_argument(
        "--size", type=lambda text: tuple(int(n) for n in text.split("x")), default=(224, 224)
    )
    parser.add_argument("--keep-ratio", type=float, default=0.3)
    parser.add_argument("--merge-budget", type=float)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def build(backbone: str, device: torch.device, checkpoint: str | None) -> Any:
    """The model in float32, in eval mode."""
    if backbone == "mini":
        return build_mini().to(device)
    from vggt.models.vggt import VGGT

    if checkpoint and Path(checkpoint).is_file():
        model = VGGT()
        if checkpoint.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(checkpoint)
        else:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    elif checkpoint:
        model = VGGT.from_pretrained(checkpoint)
    else:
        with device:
            model = VGGT()
    model.track_head = None  # runs on query points only
    return model.to(device).eval()


def forward(model: Any, images: torch.Tensor, precision: str) -> Callable[[], None]:
    """One full prediction of cameras, depth and points; outputs are dropped."""
    kind = images.device.type

    def whole() -> None:
        with torch.autocast(kind, torch.bfloat16) if precision == "autocast" else contextlib.nullcontext():
            model(images)

    def separate() -> None:
        tokens, start = model.aggregator(images)
        with torch.autocast(kind, torch.bfloat16):
            for head in (model.depth_head, model.point_head):
                if head is not None:
                    head(tokens, images=images, patch_start_idx=start)
            model.camera_head(tokens)

    return separate if precision == "bfloat16" else whole


def measure(
    model: Any, frames: int, args: argparse.Namespace, device: torch.device, update: Callable[[], Any]
) -> list[dict[str, Any]]:
    """Rows of the stock and the accelerated model for one number of frames."""
    dtype = torch.bfloat16 if args.precision == "bfloat16" else torch.float32
    generator = torch.Generator(device).manual_seed(SEED)
    images = torch.rand(1, frames, 3, *args.size, generator=generator, device=device).to(dtype)
    run = forward(model, images, args.precision)

    def stock() -> None:
        with paused(model):
            run()

    rows, seconds = [], {}
    with torch.inference_mode():
        try:
            timings = time_interleaved(
                {"stock": stock, "pace": run}, args.repeats, device, keep_results=False, update=update
            )
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            timings = time_interleaved({"pace": run}, args.repeats, device, keep_results=False, update=update)
    for variant in ("stock", "pace"):
        timing = timings.get(variant)
        pace = variant == "pace"
        if timing is not None:
            seconds[variant] = timing.median
        rows.append(
            {
                "variant": variant,
                "frames": frames,
                "keep_ratio": args.keep_ratio if pace else 1.0,
                "merge_budget": summary(model).config.merge_share if pace else 0.0,
                "seconds_median": timing and timing.median,
                "seconds_min": timing and min(timing.seconds),
                "seconds_max": timing and max(timing.seconds),
                "peak_gib": timing and timing.peak_gib,
                "speedup": seconds["stock"] / timing.median if timing and "stock" in seconds else None,
            }
        )
    return rows


def break_even(model: Any, args: argparse.Namespace, device: torch.device) -> int | None:
    """The smallest number of frames tried at which the accelerated model is the faster one; None if at none."""
    for frames in BREAK_EVEN_CANDIDATES:
        rows = measure(model, frames, args, device, lambda: None)
        if rows[1]["speedup"] is not None and rows[1]["speedup"] > 1:
            return frames
    return None


def print_table(report: dict[str, Any]) -> None:
    print(f"{report['backbone']}, {report['size']}, {report['precision']}, {report['repeats']} repeats")
    columns = f"{'median s':>11s}{'min-max s':>18s}{'GiB':>7s}{'speed-up':>10s}"
    print(f"{'frames':>7s} {'variant':8s}{'keep':>6s}{'merge':>7s}{columns}")
    for row in report["rows"]:
        if row["seconds_median"] is None:
            print(f"{row['frames']:>7d} {row['variant']:8s}  out of memory")
            continue
        spread = f"{row['seconds_min']:.3f}-{row['seconds_max']:.3f}"
        peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        speedup = "-" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        print(
            f"{row['frames']:>7d} {row['variant']:8s}{row['keep_ratio']:>6g}{row['merge_budget']:>7.2g}"
            f"{row['seconds_median']:>11.3f}{spread:>18s}{peak:>7s}{speedup:>10s}"
        )
    print(
        f"break-even (smallest number of frames at which pace is faster): {report['break_even_frames'] or 'not found'}"
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"latency.py: {error}")
