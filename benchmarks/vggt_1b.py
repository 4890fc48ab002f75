"""VGGT-1B, accelerated: how fast it is, what it loses on 7-Scenes, and which of its heads match points between frames.

    python benchmarks/vggt_1b.py --scenes DIR_OF_7SCENES --out DIR
    python benchmarks/vggt_1b.py --scenes DIR_OF_7SCENES --out DIR --quick    # one clip of 24 frames, some minutes

Wants a GPU, a network (or the checkpoint in the cache of the Hub), a `vggt` on the path, and scenes of 7-Scenes,
unpacked: DIR_OF_7SCENES/chess/seq-01/frame-000000.color.png. See docs/vggt-1b.md. **Nobody has run this on VGGT-1B
yet**: it was tested with a small model of the same code.

The model calibrates on a training sequence, which finds the heads that see all tokens. Then it runs stock and
accelerated, in turn, on random images (seconds, memory) and on the test sequences (cameras, depth, points).
DIR/report.json is written whole after each of them. The same command goes on where an interrupted run ended.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from bench import Bench, Job, free, measure
from models import PRECISIONS, SAF3R_HEADS
from quality import METRICS, Metrics, make_row, was_unpruned
from tqdm import tqdm

from pacevggt_patch import PaceConfig, PaceError, PaceWeights, paused
from pacevggt_patch.arguments import whole
from pacevggt_patch.calibration.full_heads import find_full_heads
from pacevggt_patch.clips import Clip, load_seven_scenes
from pacevggt_patch.clips.folder import existing_folder
from pacevggt_patch.clips.framing import crop_framing
from pacevggt_patch.clips.images import listed
from pacevggt_patch.clips.seven_scenes import (
    SPLITS,
    Calibration,
    choose_frames,
    sequence_frames,
    split_sequences,
)
from pacevggt_patch.config import GLOBAL
from pacevggt_patch.evaluation import evaluate_predictions
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.method.full_heads import Heads
from pacevggt_patch.patching.first_clip import MOST_FRAMES
from pacevggt_patch.patching.guest import guest
from pacevggt_patch.runtime.device import usable_device
from pacevggt_patch.runtime.files import environment, write_json
from pacevggt_patch.training.backbones import load_backbone
from pacevggt_patch.training.states import results_folder, writing

REPORT, HEADS = "report.json", "heads.safetensors"
NAMES = {"stock": "stock", "pace": "accelerated"}  # variants, as in other reports -> what they are called
SceneClip = tuple[str, int, int]  # scene, sequence, number of frames
QUICK = {"frames": [24], "clip_frames": 24, "most_clips": 1, "repeats": 1}


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    clips, source = find_clips(args), find_source(args)
    run = Run(args)
    print(" | ".join(f"{k} {v}" for k, v in run.report["environment"].items() if v))
    print(f"clips of {args.scenes}: " + ", ".join(name_of(clip) for clip in clips))
    model = load(args.backbone, run.device)
    weights = run.calibrated(model, source)
    print_heads(run.report["calibration"])
    bench = Bench(bench_arguments(args, run.device), model, weights)
    run.report["attention"] = bench.attention
    jobs = [Job(n, (None, PaceConfig().keep_ratio), args.repeats) for n in args.frames]
    jobs = [job for job in jobs if job.frames not in {row["frames"] for row in run.report["speed"]}]
    done = {(row["scene"], row["sequence"]) for row in run.report["quality"]}
    clips = [clip for clip in clips if clip[:2] not in done]
    print(estimate(bench, jobs, clips))
    for job in tqdm(jobs, desc="speed", unit="size", disable=None):
        run.report["speed"] += measure(bench, job)[0]
        free(run.device)
        run.save()
    for clip in tqdm(clips, desc="quality", unit="clip", disable=None):
        run.report["quality"].append(judge(bench, clip, args))
        free(run.device)
        run.save()
    run.report["means"] = means(run.report["quality"])
    run.save()
    print_report(run.report)
    print(f"please send back {run.file}: docs/vggt-1b.md says where")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=Path, required=True, help="folder with scenes of 7-Scenes")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--backbone", default="facebook/VGGT-1B", help="Hub id or checkpoint file")
    parser.add_argument("--device", help="cuda where there is one if not given")
    parser.add_argument(
        "--frames",
        type=lambda text: [int(part) for part in text.split(",") if part],
        default=[100, 300],
        metavar="N,N",
        help="numbers of frames at which speed is measured (100,300)",
    )
    parser.add_argument("--clip-frames", type=int, default=100, help="at most, of each test sequence (100)")
    parser.add_argument("--stride", type=int, default=10, help="step between the frames of a clip (10)")
    parser.add_argument("--width", type=int, default=518, help="of the frames, pixels (518)")
    parser.add_argument("--repeats", type=int, default=3, help="counted runs of each model at each size (3)")
    parser.add_argument("--compile", action="store_true", help="accelerate with compile=True")
    parser.add_argument("--unaligned", action="store_true", help="depth and poses of 7-Scenes as published")
    parser.add_argument("--quick", action="store_true", help="one clip of 24 frames, one run at 24 frames")
    args = parser.parse_args(argv)
    args.most_clips = None
    if args.quick:
        vars(args).update(QUICK)
    for name in ("clip_frames", "stride", "repeats"):
        whole(f"--{name.replace('_', '-')}", getattr(args, name))
    for frames in args.frames:
        whole("--frames", frames, 2)
    whole("--clip-frames", args.clip_frames, 4)
    if args.width % 14:
        raise PaceError(f"--width must be a multiple of 14, got {args.width}")
    args.precision = "autocast" if usable_device(args.device).type == "cuda" else "float32"
    return args


def find_clips(args: argparse.Namespace) -> list[SceneClip]:
    """Scene, test sequence and number of frames of each clip.

    Raises:
        PaceError: there is no scene, or a frame is missing or broken.
    """
    clips = []
    for scene in scenes_of(args.scenes):
        for sequence in split_sequences(args.scenes / scene, "test"):
            clips.append((scene, sequence, frames_there(args, scene, sequence, args.clip_frames)))
    clips = clips[: args.most_clips]
    for clip in tqdm(clips, desc="looking through 7-Scenes", unit="clip", disable=None):
        check_clip(args, clip, "test")
    return clips


def find_source(args: argparse.Namespace) -> SceneClip:
    """What calibration runs on: the first training sequence of the first scene.

    Raises:
        PaceError: a frame is missing or broken.
    """
    scene = scenes_of(args.scenes)[0]
    sequence = split_sequences(args.scenes / scene, "train")[0]
    clip = scene, sequence, frames_there(args, scene, sequence, MOST_FRAMES)
    check_clip(args, clip, "train")
    return clip


def scenes_of(path: Path) -> list[str]:
    """Names of the scenes in a folder.

    Raises:
        PaceError: there is none.
    """
    folder = existing_folder(path)
    scenes = [name for name in listed(folder)[1] if (folder / name / SPLITS["test"]).is_file()]
    if not scenes:
        raise PaceError(f"{folder} has no folder of a scene of 7-Scenes (looked for */{SPLITS['test']})")
    return scenes


def frames_there(args: argparse.Namespace, scene: str, sequence: int, most: int) -> int:
    """How many frames a clip of a sequence has."""
    return min(-(-len(sequence_frames(args.scenes / scene, sequence)) // args.stride), most)


def check_clip(args: argparse.Namespace, clip: SceneClip, split: str) -> None:
    """Raise `PaceError` for a frame that is missing or broken, as far as can be told without reading pictures."""
    scene, sequence, frames = clip
    choose_frames(args.scenes / scene, split, sequence, frames, 0, args.stride, Calibration())


def name_of(clip: SceneClip) -> str:
    return f"{clip[0]}/seq-{clip[1]:02d} ({clip[2]} frames)"


def load(backbone: str, device: torch.device) -> Any:
    """The model on its device.

    Raises:
        PaceError: it can't be loaded, or does not fit.
    """
    print(f"loading {backbone} ...", flush=True)
    try:
        return load_backbone(backbone).to(device)
    except torch.cuda.OutOfMemoryError as error:
        raise PaceError(
            f"{backbone} does not fit into the memory of {device}: choose another --device"
        ) from error


def bench_arguments(args: argparse.Namespace, device: torch.device) -> argparse.Namespace:
    """What `Bench` wants to know."""
    return argparse.Namespace(
        device=str(device), size=size_of(args), precision=args.precision, mode=GLOBAL, merge_budget=None,
        keep_ratios=[PaceConfig().keep_ratio], compile=args.compile, head_dtype=None,
    )  # fmt: skip


def size_of(args: argparse.Namespace) -> tuple[int, int]:
    """Height and width of the frames."""
    width, height = crop_framing(*Calibration().size, args.width).resized
    return height, width


class Run:
    """The report, on the disk and here.

    Raises:
        PaceError: the folder holds a run with other settings, or can't be written to.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, usable_device(args.device)
        self.file = args.out / REPORT
        results_folder(args.out, (REPORT, HEADS))
        settings = {
            "backbone": args.backbone,
            "size": "x".join(map(str, size_of(args))),
            "precision": PRECISIONS[args.precision],
            "compile": args.compile,
            "keep_ratio": PaceConfig().keep_ratio,
            "stride": args.stride,
            "clip_frames": args.clip_frames,
            "repeats": args.repeats,
            "aligned": not args.unaligned,
            "environment": environment(self.device),
        }
        self.report: dict[str, Any] = {**settings, "attention": None, "calibration": None}
        self.report |= {"speed": [], "quality": [], "means": None}
        if self.file.exists():
            self.report = self.earlier(settings)

    def earlier(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The report of an earlier run with the same settings."""
        try:
            report = json.loads(self.file.read_text(encoding="utf-8"))
            other = [key for key in settings if report[key] != settings[key]]
            if not isinstance(report["speed"], list) or not isinstance(report["quality"], list):
                raise TypeError("no list of results")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise PaceError(f"{self.file} is no report of this script: choose another --out") from error
        if other:
            raise PaceError(f"{self.file} is of a run with another {', '.join(other)}: choose another --out")
        return report

    def save(self) -> None:
        with writing(self.file):
            write_json(self.file, self.report)

    def calibrated(self, model: Any, source: SceneClip) -> PaceWeights:
        """The weights that calibration makes, and its part of the report; those of an earlier run if there are some."""
        if self.report["calibration"] is not None:
            return PaceWeights.load(self.args.out / HEADS)
        clip = load_clip(self.args, source, "train")
        frames = len(clip)
        start = time.monotonic()
        try:
            with guest(model):
                heads, errors = find_full_heads(model, [clip.images[None].to(self.device)])
        except torch.cuda.OutOfMemoryError as error:
            raise PaceError(
                f"calibration on {frames} frames does not fit into memory: pass a smaller --width"
            ) from error
        weights = PaceWeights.of_heads(find_host(model), heads, {"clips": clip.name})
        weights.save(self.args.out / HEADS)
        self.report["calibration"] = {
            "clip": clip.name,
            "frames": frames,
            "seconds": time.monotonic() - start,
            **(compare_heads(heads) if has_published(errors.shape) else {}),
            "full_heads": [list(head) for head in heads],
            "errors": [[float(f"{value:.4g}") for value in row] for row in errors.tolist()],
        }
        self.save()
        return weights


def has_published(shape: Sequence[int]) -> bool:
    """Whether a model of so many blocks and heads has all of SAF3R's."""
    return all(block < shape[0] and head < shape[1] for block, head in SAF3R_HEADS)


def compare_heads(heads: Heads) -> dict[str, Any]:
    """Which of SAF3R's heads are among these, which are not, and how many others there are."""
    return {
        "published_found": [list(head) for head in SAF3R_HEADS if head in heads],
        "published_missed": [list(head) for head in SAF3R_HEADS if head not in heads],
        "others": len(set(heads) - set(SAF3R_HEADS)),
    }


def estimate(bench: Bench, jobs: list[Job], clips: list[SceneClip]) -> str:
    """What is to come, and about how long it takes."""
    speed = sum(bench.estimate(job) for job in jobs)
    both = (None, PaceConfig().keep_ratio)
    quality = sum(bench.estimate(Job(frames, both, 1, warm_up=False)) for _, _, frames in clips)
    return f"about {speed + quality:.0f} s of forwards: speed {speed:.0f} s, quality {quality:.0f} s"


def load_clip(args: argparse.Namespace, clip: SceneClip, split: Literal["train", "test"]) -> Clip:
    scene, sequence, frames = clip
    return load_seven_scenes(
        args.scenes / scene,
        split=split,
        sequence=sequence,
        frames=frames,
        stride=args.stride,
        width=args.width,
        aligned=not args.unaligned,
    )


def judge(bench: Bench, clip: SceneClip, args: argparse.Namespace) -> dict[str, Any]:
    """Metrics of one clip, stock and accelerated; None and `out_of_memory` of what does not fit."""
    scene, sequence, frames = clip
    loaded = load_clip(args, clip, "test")
    row: dict[str, Any] = {"scene": scene, "sequence": sequence, "frames": frames, "out_of_memory": []}
    for variant in NAMES:
        with paused(bench.model) if variant == "stock" else nullcontext():
            row[variant] = metrics(bench, loaded)
        if row[variant] is None:
            free(bench.device)
            row["out_of_memory"].append(variant)
    if row["pace"] is not None and was_unpruned(bench.model):
        raise PaceError(f"{name_of(clip)} ran unpruned, so that nothing was compared")
    return row


@torch.inference_mode()
def metrics(bench: Bench, clip: Clip) -> Metrics | None:
    """Of the model as it is; None if its memory does not suffice."""
    autocast = torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.args.precision == "autocast")
    try:
        with autocast:
            found = bench.model(clip.images.to(bench.device))
        wanted = {name: found[name].float().cpu() for name in ("pose_enc", "depth")}
    except torch.cuda.OutOfMemoryError:
        return None
    return evaluate_predictions(wanted, clip)


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Rows as quality.py writes them, over the clips that both models ran on."""
    both = [row for row in rows if not row["out_of_memory"]]
    if not both:
        return None
    make = partial(make_row, unpruned=[row["stock"] for row in both])
    return [{**make({"variant": v}, [row[v] for row in both]), "per_clip": None} for v in NAMES]


def print_heads(found: dict[str, Any]) -> None:
    def shown(heads: list[list[int]]) -> str:
        return ", ".join(f"{block}/{head}" for block, head in heads) or "none"

    print(
        f"calibrated on {found['frames']} frames of {found['clip']} in {found['seconds']:.0f} s: "
        f"{len(found['full_heads'])} heads see all tokens"
    )
    if "published_found" in found:
        print(
            f"of the {len(SAF3R_HEADS)} correspondence heads of SAF3R: {len(found['published_found'])} found "
            f"({shown(found['published_found'])}), missed {shown(found['published_missed'])}; {found['others']} others"
        )


def print_report(report: dict[str, Any]) -> None:
    print(f"\n{'frames':>8s}{'model':>14s}{'seconds':>10s}{'speed-up':>10s}{'GiB':>8s}")
    for row in report["speed"]:
        name = NAMES[row["variant"]]
        if row["seconds_median"] is None:
            print(f"{row['frames']:>8d}{name:>14s}  out of memory")
            continue
        speedup = "-" if row["speedup"] is None else f"{row['speedup']:.1f}x"
        peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        print(f"{row['frames']:>8d}{name:>14s}{row['seconds_median']:>10.3f}{speedup:>10s}{peak:>8s}")
    for row in report["quality"]:
        for variant in row["out_of_memory"]:
            print(
                f"{name_of((row['scene'], row['sequence'], row['frames']))}: {NAMES[variant]} ran out of memory"
            )
    if report["means"]:
        print(f"\n{'mean over clips':16s}" + "".join(f"{name:>16s}" for name in METRICS))
        for row in report["means"]:
            cells = ("-" if row[name] is None else f"{row[name]:.4g}" for name in METRICS)
            print(f"{NAMES[row['variant']]:16s}" + "".join(f"{cell:>16s}" for cell in cells))


if __name__ == "__main__":
    # Stock vggt uses a spelling of autocast that torch has deprecated; it would tear the progress bars.
    warnings.filterwarnings("ignore", message=".*torch.cuda.amp.autocast", category=FutureWarning)
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"vggt_1b.py: {error}")
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(130)
