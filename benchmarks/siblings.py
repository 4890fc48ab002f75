"""Latency and memory of a sibling of VGGT by its own classes, stock against accelerated: same inputs, interleaved runs.

    python benchmarks/siblings.py --family pi3 --device cuda --compile --frames 100,300 --size 392x518 --json FILE
    python benchmarks/siblings.py --family depth-anything-3-giant --device cuda --compile --head-dtype bfloat16
    python benchmarks/siblings.py --family vggt-omega --tiny --device cpu --frames 4 --size 64x80

The model has its full shape and random weights: shapes alone decide the time, not the values. Its package must be on
the path, a checkout will do. --tiny is the small model of the tests, to try the script on a CPU. Which heads match
points between frames is not known of these models: --full-heads says how many to assume.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench import Job, timed, with_speedup
from models import SEED, heads_of
from random_weights import with_random_weights
from tqdm import tqdm

from pacevggt_patch import PaceError, PaceWeights, accelerate, paused, summary
from pacevggt_patch.evaluation.timing import Timing
from pacevggt_patch.hosts.base import PACKAGES, Host, find_host
from pacevggt_patch.patching.summary import device_time
from pacevggt_patch.runtime.device import usable_device
from pacevggt_patch.runtime.files import environment, write_json

TESTS = Path(__file__).parents[1] / "tests"
Call = Callable[[], Any]


def depth_anything_3(source: Any, name: str) -> Any:
    """A Depth Anything 3 by the package's own configuration, given its module `cfg`."""
    config = source.load_config(str(Path(source.__file__).parent / "configs" / f"{name}.yaml"))
    for part in ("gs_head", "gs_adapter"):  # Gaussians are made on request, and by packages beside
        config.pop(part, None)
    return source.create_object(config)


class Family(NamedTuple):
    """How a model is made.

    Attributes:
        package: as `PACKAGES` names it.
        module: of it.
        make: makes it, given that module.
        tests: module and function of the tests that make a small one.
    """

    package: str
    module: str
    make: Callable[[Any], Any]
    tests: tuple[str, str]


FAMILIES = {
    "pi3": Family("pi3", "pi3.models.pi3", lambda source: source.Pi3(), ("real_hosts", "pi3")),
    "pi3x": Family("pi3x", "pi3.models.pi3x", lambda source: source.Pi3X(), ("real_hosts", "pi3x")),
    "vggt-omega": Family(
        "vggt-omega", "vggt_omega.models", lambda source: source.VGGTOmega(), ("real_hosts", "vggt_omega")
    ),
    **{
        f"depth-anything-3-{size}": Family(
            "depth-anything-3",
            "depth_anything_3.cfg",
            partial(depth_anything_3, name=f"da3-{size}"),
            ("real_depth_anything", "small_giant" if size == "giant" else "small"),
        )
        for size in ("small", "base", "large", "giant")
    },
}


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    device = usable_device(args.device)
    model = build(args.family, device, args.tiny)
    host = find_host(model)
    indices = host.indices("global")
    rows = heads_of(replace(host.spec(), depth=len(indices)), args.full_heads)
    heads = tuple((indices[row], head) for row, head in rows)
    weights = PaceWeights.of_heads(host, heads, {}, "the benchmark")
    head_dtype = args.head_dtype and getattr(torch, args.head_dtype)
    accelerate(
        model, args.keep_ratio, weights=weights, min_frames=1, compile=args.compile, head_dtype=head_dtype
    )
    found = summary(model)
    report: dict[str, Any] = {
        "environment": environment(device),
        "family": args.family,
        "backbone": found.backbone + (" (the tests' small one)" if args.tiny else " (random weights)"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "size": f"{args.size[0]}x{args.size[1]}",
        "precision": "float32 weights under bfloat16 autocast" if device.type == "cuda" else "float32",
        "compile": args.compile,
        "head_dtype": args.head_dtype,
        "attention": found.attention,
        "full_heads": [list(head) for head in heads],
        "global_blocks": len(indices),
        "seed": SEED,
        "first_call_seconds": None,
        "rows": [],
        "stages": {},
    }
    print(f"{report['backbone']}, {report['size']}, {report['precision']}, {report['environment']['device']}")
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        for frames in tqdm(args.frames, unit="size", disable=None):
            images = clip(host, frames, args.size, device)
            if report["first_call_seconds"] is None:
                start = device_time()
                model(images)
                report["first_call_seconds"] = device_time() - start
            report["rows"] += measured(model, images, args.keep_ratio, args.repeats, device)
            report["stages"][str(frames)] = [
                {"stage": stage.name, "seconds": stage.seconds} for stage in summary(model, images).stages
            ]
            if args.json:  # after every size: an interrupted benchmark keeps what it has
                write_json(args.json, report)
    print_rows(report["rows"])
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=tuple(FAMILIES), required=True)
    parser.add_argument("--frames", type=numbers, default=[100, 300], help="of the clips (100,300)")
    parser.add_argument(
        "--size", type=partial(numbers, separator="x"), default=[392, 518], help="HxW (392x518)"
    )
    parser.add_argument("--keep-ratio", type=float, default=0.3)
    parser.add_argument("--full-heads", default="8", metavar="HEADS", help="see latency.py (8)")
    parser.add_argument("--repeats", type=int, default=5, help="counted runs of each (5)")
    parser.add_argument("--device", default=None)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--head-dtype", choices=("bfloat16", "float16"), help="accelerate with head_dtype")
    parser.add_argument("--tiny", action="store_true", help="the small model of the tests")
    parser.add_argument("--json", default=None)
    return parser.parse_args(argv)


def numbers(text: str, separator: str = ",") -> list[int]:
    return [int(part) for part in text.split(separator) if part]


def build(family: str, device: torch.device, tiny: bool = False) -> Any:
    """The model in evaluation mode on its device, all its values finite.

    Raises:
        PaceError: its package can't be imported.
    """
    package, module, make, (tests, small) = FAMILIES[family]
    torch.manual_seed(SEED)
    if tiny:
        sys.path += [str(TESTS)] * (str(TESTS) not in sys.path)
        return getattr(importlib.import_module(tests), small)(SEED).to(device)
    try:
        source = importlib.import_module(module)
    except ImportError as error:
        raise PaceError(
            f"{module} can't be imported ({error}): put a checkout of it on PYTHONPATH"
        ) from error
    with device:  # on the CPU this takes long
        model = make(source)
    PACKAGES[package].prepare(model)
    return with_random_weights(model.to(device), SEED, 0.02)


def clip(host: Host, frames: int, size: list[int], device: torch.device) -> torch.Tensor:
    """Images [1, N, 3, H, W], the nearest smaller size that the patches of the model fill."""
    patch = host.patch_size
    height, width = (side // patch * patch for side in size)
    generator = torch.Generator(device).manual_seed(SEED)
    return torch.rand(1, frames, 3, height, width, generator=generator, device=device)


def measured(
    model: Any, images: torch.Tensor, ratio: float, repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """Rows of the stock and of the accelerated model; one that runs out of memory has no figures."""

    def stock() -> Any:
        with paused(model):
            return model(images)

    frames, height, width = images.shape[1], *images.shape[-2:]
    runs: dict[float | None, Call] = {None: stock, ratio: partial(model, images)}
    timings = timed(runs, Job(frames, tuple(runs), repeats), device)
    rows: list[dict[str, Any]] = []
    for keep in runs:
        timing: Timing | None = timings.get(keep)
        row = {
            "variant": "stock" if keep is None else "pace",
            "frames": frames,
            "pixels": f"{height}x{width}",
            "keep_ratio": 1.0 if keep is None else keep,
            "seconds": timing and timing.seconds,
            "seconds_median": timing and timing.median,
            "seconds_min": timing and min(timing.seconds),
            "seconds_max": timing and max(timing.seconds),
            "peak_gib": timing and timing.peak_gib,
        }
        rows.append(with_speedup(row, [*rows, row]))
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    print(f"{'frames':>7s} {'variant':8s}{'median s':>10s}{'min-max s':>18s}{'GiB':>7s}{'speed-up':>10s}")
    for row in rows:
        start = f"{row['frames']:>7d} {row['variant']:8s}"
        if row["seconds_median"] is None:
            print(f"{start}  out of memory")
            continue
        peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        gain = "-" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        spread = f"{row['seconds_min']:.3f}-{row['seconds_max']:.3f}"
        print(f"{start}{row['seconds_median']:>10.3f}{spread:>18s}{peak:>7s}{gain:>10s}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"error: {error}")
