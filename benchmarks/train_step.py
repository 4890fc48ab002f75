"""Seconds and memory of calibration and of a training step of pace weights, of both stages: does it fit this GPU?

    python benchmarks/train_step.py --backbone vggt-1b --views 8 24 --json FILE
    python benchmarks/train_step.py --backbone vggt-1b --views 8 24 --mode pre-aa --json FILE
    python benchmarks/train_step.py --backbone vggt-1b --views 8 24 --full-heads 60 --json FILE

Random images (and for VGGT-1B random weights, unless --checkpoint is given): shapes decide time and memory.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from models import add_mode_arguments, build, heads_of
from tqdm import tqdm

from pacevggt_patch import PaceError, PaceWeights
from pacevggt_patch.config import GLOBAL
from pacevggt_patch.patching.guest import guest
from pacevggt_patch.patching.summary import current_device, device_time
from pacevggt_patch.runtime.device import usable_device
from pacevggt_patch.runtime.files import environment, write_json
from pacevggt_patch.training.fit import Fit, Settings
from pacevggt_patch.training.run import LARGE
from pacevggt_patch.training.sources import Sample, to_device


class RandomClips:
    """A source of clips that show nothing."""

    description = "random images"
    compiled = False

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def draw(self, seed: int, clips: int, views: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(clips, views, 3, *self.size, generator=generator)

    def finish(self, drawn: torch.Tensor, device: torch.device) -> Sample:
        return Sample(to_device(drawn, device), None)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.repeats < 1:
        raise PaceError(f"--repeats must be at least 1, got {args.repeats}")
    device = usable_device(args.device)
    model = build(args.backbone, device, args.checkpoint, "float32")
    large = model.aggregator.camera_token.shape[-1] >= LARGE
    weights = PaceWeights.new(model, mode=args.mode)
    full_heads = heads_of(weights.backbone, args.full_heads) if args.mode == GLOBAL else ()
    report: dict[str, Any] = {
        "environment": environment(device),
        "backbone": args.backbone,
        "size": args.size,
        "supervised": args.supervised,
        "mode": args.mode,
        "full_heads": len(full_heads),
        "checkpointing": large,
        "rows": [],
    }
    with (
        current_device(device),
        guest(model, weights),
        tqdm(total=len(args.views), unit="size", disable=None) as bar,
    ):
        for views in args.views:
            # Stage 1 has the first half of the steps, the first of them an uncounted one, and so has stage 2.
            steps = 2 * (args.repeats + 1)
            settings = Settings(
                steps=steps,
                distil=0.5,
                clips=args.clips,
                views=(views,),
                supervised=args.supervised,
                mode=args.mode,
            )
            fit = Fit(model, weights, RandomClips(args.size), settings, checkpointing=large)
            report["rows"].append(calibration(fit, views))
            weights.full_heads = full_heads  # random weights have none, or any
            report["rows"] += measure(fit, views)
            bar.update()
            if args.json:
                write_json(args.json, report)
    for found in report["rows"]:
        memory = "" if found["peak_gib"] is None else f", {found['peak_gib']:.1f} GiB"
        print(
            f"{found['stage']:9s} {found['clips']} x {found['views']:<4d} {found['seconds_median']:.2f} s "
            f"({found['seconds_min']:.2f}-{found['seconds_max']:.2f}){memory}"
        )
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", choices=("mini", "vggt-1b"), default="vggt-1b")
    parser.add_argument("--checkpoint", help="file or Hub id of VGGT-1B's weights")
    parser.add_argument("--size", type=int, nargs=2, default=[392, 518], metavar=("H", "W"))
    parser.add_argument("--views", type=int, nargs="+", default=[8, 24], help="frames of a clip")
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument(
        "--supervised-frames",
        dest="supervised",
        type=int,
        default=4,
        help="frames on which depth, points and tokens are compared",
    )
    add_mode_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3, help="counted steps of each stage")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one if not given)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def calibration(fit: Fit, views: int) -> dict[str, Any]:
    """A row for the closed-form calibration on the clips that a run takes for it: all of its seconds, warm-up too."""
    if fit.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(fit.device)
    start = device_time()
    fit.calibrate()
    return row("calibrate", fit, fit.settings.calibration, views, [device_time() - start])


def row(stage: str, fit: Fit, clips: int, views: int, seconds: list[float]) -> dict[str, Any]:
    on_gpu = fit.device.type == "cuda"
    return {
        "stage": stage,
        "clips": clips,
        "views": views,
        "runs": len(seconds),
        "seconds_median": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "peak_gib": torch.cuda.max_memory_allocated(fit.device) / 2**30 if on_gpu else None,
    }


def measure(fit: Fit, views: int) -> list[dict[str, Any]]:
    """A row for each stage: seconds of its steps but the first, and the most memory in use, all weights included."""
    rows, settings, on_gpu = [], fit.settings, fit.device.type == "cuda"
    for stage, count in (
        ("distil", settings.distil_steps),
        ("refine", settings.steps - settings.distil_steps),
    ):
        seconds = []
        for step in range(count):
            drawn = fit.draw(fit.step_number)
            if on_gpu and step == 1:
                torch.cuda.reset_peak_memory_stats(fit.device)
            start = device_time()
            fit.step(drawn)
            seconds.append(device_time() - start)
        losses = fit.latest_losses()
        if not all(map(math.isfinite, losses.values())):
            raise PaceError(f"a loss is not finite: {losses}")
        rows.append(row(stage, fit, settings.clips, views, seconds[1:]))
    return rows


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"train_step.py: {error}")
