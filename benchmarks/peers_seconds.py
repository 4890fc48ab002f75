"""Seconds of every setting of frontier.py at another model's shape: rules of others, and this package, on one device.

    python benchmarks/peers_seconds.py --backbone vggt-1b --device cuda --precision bfloat16 --size 392x518 \\
        --frames 96,300 --json benchmarks/results/peers-seconds.json

Random weights: shapes alone decide the time. Rules run as `peers` has them, ours without compile=True, and all blocks
that a rule leaves alone are the stock model's. Block-sparse attention is left out: `peers` gathers its blocks, where
its authors have a kernel. Full-attention heads are as many and as deep as VGGT-mini's bundled weights have, whose
quality frontier.py measures; `published` are those known of VGGT-1B. Merging, choosing keys and filling in are in the
time. The report is written after every row, and the same command goes on behind the last one. Needs a `vggt` on the
path.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import Job, timed
from frontier import OURS, RATIOS, UNPRUNED, settings
from models import PRECISIONS, PUBLISHED_HEADS, SEED, build, check_values, forward, random_clip
from peers import BlockSparse
from peers.runner import applied
from tqdm import tqdm

from pacevggt_patch import PaceError, PaceWeights, accelerate, remove
from pacevggt_patch.hosts.base import BackboneSpec, find_host
from pacevggt_patch.method.full_heads import Heads
from pacevggt_patch.mini import build_mini
from pacevggt_patch.patching.install import state_of
from pacevggt_patch.runtime.attention import kernel_name
from pacevggt_patch.runtime.device import usable_device
from pacevggt_patch.runtime.files import environment, write_json

PUBLISHED = "published heads"


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    device = usable_device(args.device)
    model = build(args.backbone, device, None, args.precision)
    check_values(model, args.size, args.precision, device)
    host = find_host(model)
    heads = same_depth(*bundled_heads(), host.spec())
    whose: dict[str, Heads] = dict.fromkeys(OURS, heads) | {"training-free": ()}
    if args.backbone == "vggt-1b":
        whose[PUBLISHED] = PUBLISHED_HEADS
    report: dict[str, Any] = {
        "environment": environment(device),
        "backbone": args.backbone + (" (random weights)" if args.backbone == "vggt-1b" else ""),
        "size": f"{args.size[0]}x{args.size[1]}",
        "precision": PRECISIONS[args.precision],
        "attention": kernel_name(device, torch.float32 if args.precision == "float32" else torch.bfloat16),
        "full_heads": {line: len(heads) for line, heads in whose.items()},
        "repeats": args.repeats,
        "seed": SEED,
        "rows": [],
    }
    rows = report["rows"] = rows_so_far(args.json, report)
    done = {(row["line"], row["value"], row["frames"]): row for row in rows}
    run = forward(model, args.precision)
    with torch.inference_mode():
        run(random_clip(2, args.size, args.precision, device))  # loads kernels
    for frames in args.frames:
        images = random_clip(frames, args.size, args.precision, device)
        unpruned = done.get((UNPRUNED, 1.0, frames), {}).get("seconds_median")
        for line, value, context in tqdm(
            variants(model, frames, whose, args.whole), desc=f"{frames} frames", disable=None
        ):
            if (line, value, frames) in done:
                continue
            job = Job(frames, (None,), args.repeats, warm_up=args.warm_up)
            with context(), torch.inference_mode():
                timing = timed({None: lambda images=images: run(images)}, job, device).get(None)
            if line == UNPRUNED:
                unpruned = timing and timing.median
            rows.append(
                {
                    "line": line,
                    "value": value,
                    "frames": frames,
                    "seconds_median": timing and timing.median,
                    "seconds_min": timing and min(timing.seconds),
                    "seconds_max": timing and max(timing.seconds),
                    "peak_gib": timing and timing.peak_gib,
                    "speedup": unpruned / timing.median if unpruned and timing else None,
                }
            )
            write_json(args.json, report)
    print_table(report)
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", choices=("mini", "vggt-1b"), default="vggt-1b")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one if not given)")
    parser.add_argument(
        "--frames", type=lambda text: [int(n) for n in text.split(",")], default=[96], metavar="N,N"
    )
    parser.add_argument(
        "--size", type=lambda text: tuple(int(n) for n in text.split("x")), default=(392, 518)
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="bfloat16")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--no-warm-up", dest="warm_up", action="store_false", help="count the first run of each"
    )
    parser.add_argument("--whole", action="store_true", help="all settings, not two of each rule")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    return parser.parse_args(argv)


def rows_so_far(file: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a report of this script that is there already.

    Raises:
        PaceError: the file is something else, or was measured in another way.
    """
    if not file.exists():
        return []
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
        differ = [key for key in report if key not in ("environment", "rows") and old[key] != report[key]]
        machines = [one["environment"] for one in (old, report)]
        differ += [key for key in ("device", "torch") if machines[0][key] != machines[1][key]]
        rows = list(old["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise PaceError(f"{file} is there and no report of this script: take another --json") from error
    if differ:
        raise PaceError(f"{file} has another {', '.join(differ)}: take another --json")
    return rows


def bundled_heads() -> tuple[Heads, BackboneSpec]:
    """The full-attention heads of VGGT-mini's bundled weights, and its dimensions."""
    model = accelerate(build_mini(), weights="auto")
    weights = state_of(model).weights
    assert weights is not None
    return weights.full_heads, weights.backbone


def same_depth(heads: Heads, small: BackboneSpec, large: BackboneSpec) -> Heads:
    """As large a share of a larger model's heads, in the same share of its blocks, as deep.

    Raises:
        PaceError: the larger model's blocks and heads are no multiples of the smaller's.
    """
    blocks, each = large.depth // small.depth, large.num_heads // small.num_heads
    if (blocks * small.depth, each * small.num_heads) != (large.depth, large.num_heads):
        raise PaceError(f"{large} are no multiples of {small}: pass a backbone whose blocks and heads are")
    return tuple(
        (block * blocks + i, head * each + j)
        for block, head in heads
        for i in range(blocks)
        for j in range(each)
    )


def variants(
    model: Any, frames: int, whose: dict[str, Heads], whole: bool
) -> list[tuple[str, float, Callable[[], Any]]]:
    """Line, value, and inside of what the model runs so; the stock model first."""
    found: list[tuple[str, float, Callable[[], Any]]] = [(UNPRUNED, 1.0, contextlib.nullcontext)]
    for setting in settings(frames, not whole):
        if setting.rule is not None and not isinstance(setting.rule, BlockSparse):
            found.append((setting.line, setting.value, lambda rule=setting.rule: applied(model, rule)))
    # Bundled weights add small changes to matrices and nothing to the time: calibrated stands for them.
    for line in [line for line in whose if line != "bundled weights"]:
        for ratio in RATIOS:
            found.append((line, ratio, lambda ratio=ratio, line=line: ours(model, ratio, whose[line])))
    return found


@contextlib.contextmanager
def ours(model: Any, ratio: float, heads: Heads):
    """Inside, the model is accelerated, with these full-attention heads."""
    weights = PaceWeights.of_heads(find_host(model), heads, {}, "the benchmark")
    accelerate(model, ratio, weights=weights, min_frames=1)
    try:
        yield
    finally:
        remove(model)


def print_table(report: dict[str, Any]) -> None:
    print(f"{'frames':>6s}  {'rule':42s}{'value':>6s}{'seconds':>10s}{'speed-up':>10s}{'GiB':>7s}")
    for row in report["rows"]:
        cells = [
            "-" if row[key] is None else f"{row[key]:.{digits}f}"
            for key, digits in (("seconds_median", 3), ("speedup", 1), ("peak_gib", 1))
        ]
        print(
            f"{row['frames']:>6d}  {row['line']:42s}{row['value']:>6g}{cells[0]:>10s}{cells[1]:>10s}{cells[2]:>7s}"
        )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"peers_seconds.py: {error}")
