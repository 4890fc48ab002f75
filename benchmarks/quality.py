"""Quality of VGGT-mini accelerated, beside the same model unpruned, clip by clip: cameras, depth, points.

    python benchmarks/quality.py --clips rooms --count 24 --frames 8 --json FILE    # accelerate(model), no more
    python benchmarks/quality.py --scale-weights 1e-3 --keep-ratios 0.3,0.15        # calibrated on the first clip
    python benchmarks/quality.py --mode pre-aa --weights none
    python benchmarks/quality.py --clips DIR --frames 8 --stride 2 --starts 0,60,120

Settings that are not given are those of `accelerate`. Rooms are rendered from seeds, from HELD_OUT_SEED on, that
training never draws. A clip that fails, or that ran unpruned, ends the benchmark: none is left out.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from pacevggt_patch import PaceConfig, PaceError, accelerate, remove, summary
from pacevggt_patch.clips import Clip, load_clip
from pacevggt_patch.config import MODES
from pacevggt_patch.evaluation import evaluate_predictions
from pacevggt_patch.mini import build_mini
from pacevggt_patch.mini.scenes.rooms import render_room
from pacevggt_patch.mini.training.held_out import HELD_OUT_SEED
from pacevggt_patch.patching.install import state_of
from pacevggt_patch.runtime.files import environment, write_json
from pacevggt_patch.weights.cache import VARIABLE

METRICS = ("auc5", "auc15", "auc30", "rotation_deg", "translation_deg", "absrel", "delta125", "point_error")
Metrics = dict[str, float | None]  # of one clip


# A calibration that this machine keeps would be taken in place of the one that is measured.
@mock.patch.dict(os.environ, {VARIABLE: "off"})
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    model, clips = model_and_clips(args)
    scale_weights(model, args.scale_weights)
    report = {**header(args, len(clips)), "scale_weights": args.scale_weights, "rows": []}
    with tqdm(total=(1 + len(args.keep_ratios)) * len(clips), unit="clip", disable=None) as bar:
        unpruned = measure(model, clips, bar)
        report["rows"].append(make_row({"keep_ratio": 1.0}, unpruned, unpruned))
        for ratio in args.keep_ratios:
            accelerate(model, ratio, args.merge_budget, **chosen(args))
            found = measure(model, clips, bar)
            report["rows"].append(make_row(settings_of(model), found, unpruned))
            remove(model)  # the next one calibrates anew, as the first call on a model does
            if args.json:
                write_json(args.json, report)
    print_table(report)
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_clip_arguments(parser, rooms=24, keep_ratios=[PaceConfig().keep_ratio])
    parser.add_argument("--mode", choices=MODES)
    parser.add_argument("--merge-budget", type=float)
    parser.add_argument("--weights", help='"auto", "none" (training-free), a file, or a Hub id')
    parser.add_argument("--min-frames", type=int, help="1 prunes clips that are faster unpruned, too")
    parser.add_argument(
        "--head-dtype", choices=("bfloat16", "float16"), help="of the accelerated dense heads"
    )
    parser.add_argument(
        "--scale-weights",
        type=float,
        default=0.0,
        metavar="EPS",
        help="multiply the weights of the model by 1 + EPS: no bundled file fits then",
    )
    return parse(parser, argv)


def add_clip_arguments(
    parser: argparse.ArgumentParser, rooms: int, keep_ratios: list[float] | None = None
) -> None:
    """The arguments that say what is measured on what, with `rooms` as the number of rooms if none is given."""
    parser.add_argument("--checkpoint", type=Path, help="another VGGT-mini than the bundled one")
    parser.add_argument("--clips", default="rooms", help='"rooms", or a folder with images or a clip.json')
    parser.add_argument("--count", type=int, default=rooms, help="number of rooms")
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED, help="of the first room")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--stride", type=int, default=1, help="step between the frames of a folder")
    parser.add_argument(
        "--starts", type=lambda t: [int(n) for n in t.split(",")], default=[0], help="first frames"
    )
    parser.add_argument(
        "--keep-ratios",
        type=lambda t: [float(n) for n in t.split(",")],
        default=keep_ratios or [0.5, 0.3, 0.15],
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
            yield render_room(args.seed + i, args.frames)
        else:
            start = args.starts[i]
            yield load_clip(
                args.clips, frames=args.frames, start=start, stride=args.stride, width=224, mode="square"
            )


def model_and_clips(args: argparse.Namespace) -> tuple[Any, list[Clip]]:
    """VGGT-mini and all clips, on the device."""
    model = build_mini(args.checkpoint or True).to(args.device)
    return model, [
        clip.to(args.device) for clip in tqdm(load(args), desc="clips", total=args.count, disable=None)
    ]


def header(args: argparse.Namespace, count: int) -> dict[str, Any]:
    """What was measured on what: the first fields of a report."""
    rooms = args.clips == "rooms"
    return {
        "environment": environment(args.device),
        "backbone": "vggt-mini",
        "clips": Path(args.clips).name,
        "count": count,
        "frames": args.frames,
        "seeds": [args.seed + i for i in range(count)] if rooms else None,
        "starts": None if rooms else args.starts,
        "stride": None if rooms else args.stride,
    }


@torch.no_grad()
def scale_weights(model: torch.nn.Module, by: float) -> None:
    """Multiply all parameters by 1 + `by`."""
    if by:
        for parameter in model.parameters():
            parameter.mul_(1 + by)


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `accelerate` that were given, and no others."""
    given: dict[str, Any] = {"mode": args.mode, "min_frames": args.min_frames}
    given["head_dtype"] = args.head_dtype and getattr(torch, args.head_dtype)
    given = {name: value for name, value in given.items() if value is not None}
    if args.weights is not None:
        given["weights"] = None if args.weights == "none" else args.weights
    return given


def measure(model: Any, clips: list[Clip], bar: Any = None) -> list[Metrics]:
    """Metrics of each clip, of the model as it is.

    Raises:
        PaceError: the model is accelerated, and a clip ran unpruned all the same.
    """
    results = []
    for clip in clips:
        with torch.inference_mode():
            results.append(evaluate_predictions(model(clip.images), clip))
        if "forward" in model.aggregator.__dict__ and was_unpruned(model):
            raise PaceError(
                f"a clip of {len(clip)} frames ran unpruned, as the faster one here: pass --min-frames 1"
            )
        if bar is not None:
            bar.update()
    return results


def was_unpruned(model: Any) -> bool:
    """Whether the last clip of an accelerated model ran unpruned, though the settings prune."""
    found = summary(model)
    return found.config.keep_ratio < 1 and found.kept is None


def settings_of(model: Any) -> dict[str, Any]:
    """The settings in force, and which weights."""
    found, weights = summary(model), state_of(model).weights
    return {
        "keep_ratio": found.config.keep_ratio,
        "mode": found.config.mode,
        "merge_budget": found.config.merge_budget,
        "head_dtype": None if found.config.head_dtype is None else str(found.config.head_dtype).split(".")[1],
        "weights": found.weights,
        "full_heads": [] if weights is None else [list(head) for head in weights.full_heads],
        "calibrated_on": None if weights is None else weights.training.get("calibrated_on"),
    }


def known_values(results: list[Metrics], key: str) -> list[float]:
    """A metric of all clips, or nothing where none of them has ground truth for it."""
    values = [result[key] for result in results]
    known = [value for value in values if value is not None]
    if known and len(known) < len(values):
        raise PaceError(
            f"{key} is defined for {len(known)} of {len(values)} clips only: its mean would mislead"
        )
    return known


def make_row(settings: dict[str, Any], results: list[Metrics], unpruned: list[Metrics]) -> dict[str, Any]:
    """The settings, the metrics of each clip as `per_clip`, and of each metric over the clips:

    its mean, standard deviation `_std`, `_min` and `_max`; `_change`, that of the mean from the unpruned model's in
    percent, and `_change_error`, the standard error of that over clips, each compared with itself.
    """
    row: dict[str, Any] = dict(settings)
    for key in METRICS:
        known, before = known_values(results, key), known_values(unpruned, key)
        several = len(known) > 1
        row[key] = statistics.fmean(known) if known else None
        row[f"{key}_std"] = statistics.stdev(known) if several else None
        row[f"{key}_min"], row[f"{key}_max"] = min(known, default=None), max(known, default=None)
        row[f"{key}_change"] = row[f"{key}_change_error"] = None
        base = statistics.fmean(before) if before else 0.0
        if known and base:
            row[f"{key}_change"] = 100 * (row[key] / base - 1)
            if several:
                apart = [one - other for one, other in zip(known, before, strict=True)]
                row[f"{key}_change_error"] = 100 * statistics.stdev(apart) / math.sqrt(len(apart)) / base
    row["per_clip"] = [{key: result[key] for key in METRICS} for result in results]
    return row


def print_table(report: dict[str, Any]) -> None:
    def cell(value: float | None, digits: int, unit: str = "") -> str:
        return "-" if value is None else f"{value:.{digits}f}{unit}"

    print(
        f"{report['clips']}: {report['count']} clips of {report['frames']} frames, mean (standard deviation over "
        "clips), change from unpruned (its standard error)"
    )
    print(f"{'keep':>6s}{'AUC@5':>8s}{'AUC@15':>8s}{'AUC@30':>15s}{'change':>16s}{'rot deg':>9s}{'tr deg':>8s}"
          f"{'AbsRel':>17s}{'change':>16s}{'d<1.25':>8s}{'points':>8s}")  # fmt: skip
    for row in report["rows"]:
        auc = f"{cell(row['auc30'], 1)} ({cell(row['auc30_std'], 1)})"
        absrel = f"{cell(row['absrel'], 4)} ({cell(row['absrel_std'], 4)})"
        changes = [
            f"{cell(row[f'{key}_change'], 1, '%')} ({cell(row[f'{key}_change_error'], 1)})"
            for key in ("auc30", "absrel")
        ]
        print(
            f"{row['keep_ratio']:>6g}{cell(row['auc5'], 1):>8s}{cell(row['auc15'], 1):>8s}{auc:>15s}{changes[0]:>16s}"
            f"{cell(row['rotation_deg'], 2):>9s}{cell(row['translation_deg'], 1):>8s}{absrel:>17s}{changes[1]:>16s}"
            f"{cell(row['delta125'], 1):>8s}{cell(row['point_error'], 3):>8s}"
        )
    for row in report["rows"][1:]:
        print(f"{row['keep_ratio']:>6g}  {row['weights']}, full-attention heads {row['full_heads']}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"quality.py: {error}")
