"""The models that latency.py times, and how they are called; also the program that times another VGGT's own code.

latency.py --compare starts this file in a process of its own, since the other code is a package `vggt`, too. It takes a
request as JSON on its standard input and writes a row as JSON for each number of frames.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import types
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch

from pacevggt_patch import PaceError
from pacevggt_patch.config import GLOBAL, MODES
from pacevggt_patch.evaluation.timing import time_interleaved
from pacevggt_patch.hosts.base import BackboneSpec
from pacevggt_patch.method.full_heads import Heads
from pacevggt_patch.mini import build_mini

SEED = 0
ROW = "latency.py row: "
PRECISIONS = {
    "float32": "float32 weights, no autocast",
    "autocast": "float32 weights, aggregator under bfloat16 autocast, heads in float32 (stock forward)",
    "bfloat16": "bfloat16 weights, heads called one by one under bfloat16 autocast",
}


def build(
    backbone: str, device: torch.device, checkpoint: str | None, precision: str, arguments: dict | None = None
) -> Any:
    """The model in eval mode on its device.

    Args:
        backbone: "mini" or "vggt-1b"; without a checkpoint the latter has random weights, made on the device.
        checkpoint: file or Hub id of VGGT-1B's weights.
        precision: one of PRECISIONS.
        arguments: of VGGT's constructor, for forks that want more.
    """
    torch.manual_seed(SEED)
    model = build_mini() if backbone == "mini" else build_large(device, checkpoint, arguments or {})
    model.track_head = None  # runs on query points only
    model = model.to(device).eval()
    return model.to(torch.bfloat16) if precision == "bfloat16" else model


# Correspondence heads of VGGT-1B as SAF3R (arXiv 2607.03612) publishes them, and one more of the last block of these.
SAF3R_HEADS: Heads = ((11, 14), (13, 10), (13, 15), (14, 4), (14, 10), (14, 14), (15, 8))
PUBLISHED_HEADS: Heads = (*SAF3R_HEADS, (15, 0))


def add_mode_arguments(parser: ArgumentParser) -> None:
    """The arguments that say what is pruned, and which heads see all tokens; see `heads_of`."""
    parser.add_argument("--mode", choices=MODES, default=GLOBAL, help="what is pruned (global)")
    parser.add_argument(
        "--full-heads",
        default="0",
        metavar="HEADS",
        help="of global pruning: heads of global attention that see all tokens: a number of them in blocks evenly "
        'spread, block/head,block/head,..., or "published", the seven known of VGGT-1B and one more (0)',
    )


def heads_of(backbone: BackboneSpec, text: str) -> Heads:
    """(block, head) of global attention that `--full-heads` names.

    Raises:
        PaceError: the model does not have them.
    """
    depth, each_block = backbone.depth, backbone.num_heads
    try:
        if text == "published":
            heads = PUBLISHED_HEADS
        elif "/" in text:
            pairs = [[int(number) for number in pair.split("/")] for pair in text.split(",")]
            heads = tuple((block, head) for block, head in pairs)
        else:
            count = int(text)
            blocks = min(count, depth)  # blocks that have some
            where = [(2 * i + 1) * depth // (2 * blocks) for i in range(blocks)]
            heads = tuple((where[i % blocks], i // blocks) for i in range(count))
        if not all(0 <= block < depth and 0 <= head < each_block for block, head in heads):
            raise ValueError
    except ValueError:
        raise PaceError(
            f"--full-heads {text} are not heads of a model of {depth} blocks of {each_block} heads"
        ) from None
    return heads


def build_large(device: torch.device, checkpoint: str | None, arguments: dict) -> Any:
    """VGGT-1B by the `vggt` on the path."""
    from vggt.models.vggt import VGGT

    if checkpoint and Path(checkpoint).is_file():
        model = VGGT(**arguments)
        if checkpoint.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(checkpoint)
        else:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
        return model
    if checkpoint:
        return VGGT.from_pretrained(checkpoint, **arguments)
    with device:  # on the CPU this takes long
        return VGGT(**arguments)


def random_clip(frames: int, size: tuple[int, int], precision: str, device: torch.device) -> torch.Tensor:
    """Images [1, N, 3, H, W], the same in every process."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    generator = torch.Generator(device).manual_seed(SEED)
    return torch.rand(1, frames, 3, *size, generator=generator, device=device).to(dtype)


def forward(model: Any, precision: str) -> Callable[[torch.Tensor], None]:
    """One full prediction of cameras, depth and points; outputs live until it is complete, as for a user."""

    def whole(images: torch.Tensor) -> None:
        autocast = torch.autocast(images.device.type, torch.bfloat16)
        with autocast if precision == "autocast" else contextlib.nullcontext():
            model(images)

    def separate(images: torch.Tensor) -> None:
        tokens, start = model.aggregator(images)
        outputs = []
        with torch.autocast(images.device.type, torch.bfloat16):
            for head in (model.depth_head, model.point_head):
                if head is not None:
                    outputs.append(head(tokens, images=images, patch_start_idx=start))
            outputs.append(model.camera_head(tokens))

    return separate if precision == "bfloat16" else whole


def check_values(model: Any, size: tuple[int, int], precision: str, device: torch.device) -> None:
    """Refuse a model whose tokens are NaN or all alike: kernels and power draw could be faster than on real values.

    Raises:
        PaceError: says what is wrong.
    """
    images = random_clip(2, size, precision, device)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast"):
        tokens = model.aggregator(images)[0][-1].float()  # [1, 2, n + P, 2C]
    spread = (tokens.std(2).mean() / tokens.std()).item()
    if not (torch.isfinite(tokens).all() and spread > 0.01):
        raise PaceError(
            f"the model's tokens hold NaN or are all alike (spread {spread:.2g}): times would mislead"
        )


def other_rows(args: Namespace, device: torch.device, directory: Path) -> Generator[dict[str, Any]]:
    """Rows of another VGGT's own code, from a process of its own; a row with an `error` where it fails."""
    name = directory.resolve().name
    request = {
        "directory": str(directory.resolve()),
        "backbone": args.backbone,
        "checkpoint": args.checkpoint,
        "arguments": args.compare_arguments,
        "precision": args.precision,
        "device": str(device),
        "size": args.size,
        "frames": args.frames + args.pace_frames,
        "repeats": args.repeats,
        "threads": torch.get_num_threads(),
    }
    found = 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request))
        process.stdin.close()
        for line in process.stdout:
            if line.startswith(ROW):  # the other code may print, too
                found += 1
                yield {"variant": name, **json.loads(line.removeprefix(ROW))}
        if process.wait():
            errors.seek(0)
            said = [line.strip() for line in errors if line.strip()]
            error = said[-1] if said else f"exit status {process.returncode}"
            for frames in request["frames"][found:]:
                yield {"variant": name, "frames": frames, "error": error}


def take_package(directory: Path) -> None:
    """Make `vggt` the one in `directory`, whatever else is installed.

    Without an `__init__.py` it would be joined with an installed one, and missing files would come from there.

    Raises:
        PaceError: there is no such package.
    """
    package = directory / "vggt"
    if not (package / "models").is_dir():
        raise PaceError(f"{directory} has no folder vggt/models: pass the folder that holds the vggt package")
    for name in [name for name in sys.modules if name.split(".")[0] == "vggt"]:
        del sys.modules[name]
    sys.path.insert(0, str(directory))  # for what lies beside it
    if (package / "__init__.py").is_file():
        spec = importlib.util.spec_from_file_location(
            "vggt", package / "__init__.py", submodule_search_locations=[str(package)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["vggt"] = module
        spec.loader.exec_module(module)
    else:
        module = types.ModuleType("vggt")
        module.__path__ = [str(package)]
        sys.modules["vggt"] = module


def serve(request: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
    """Time the other code for every number of frames that the request asks for."""
    take_package(Path(request["directory"]))
    torch.set_num_threads(request["threads"])
    device, precision = torch.device(request["device"]), request["precision"]
    model = build(request["backbone"], device, request["checkpoint"], precision, request["arguments"])
    height, width = request["size"]
    if hasattr(model, "update_patch_dimensions"):  # FastVGGT and its descendants want to be told
        patch = int(model.aggregator.patch_size)
        model.update_patch_dimensions(width // patch, height // patch)
    run = forward(model, precision)
    for frames in request["frames"]:
        images = random_clip(frames, (height, width), precision, device)
        try:
            with torch.inference_mode():
                timing = time_interleaved(
                    {"other": lambda images=images: run(images)},
                    request["repeats"],
                    device,
                    keep_results=False,
                )["other"]
        except torch.cuda.OutOfMemoryError:
            del images
            torch.cuda.empty_cache()
            write({"frames": frames, "error": "out of memory"})
            continue
        write(
            {
                "frames": frames,
                "seconds_median": timing.median,
                "seconds_min": min(timing.seconds),
                "seconds_max": max(timing.seconds),
                "peak_gib": timing.peak_gib,
            }
        )


def write_line(row: dict[str, Any]) -> None:
    print(ROW + json.dumps(row), flush=True)


if __name__ == "__main__":
    try:
        serve(json.load(sys.stdin), write_line)
    except PaceError as error:
        sys.exit(str(error))
