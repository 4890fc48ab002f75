"""The main job on a real model: VGGT-mini on a clip, stock and accelerated, timed, judged and drawn."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..clips import Clip, count_frames, load_clip
from ..config import PaceConfig
from ..evaluation import decode_pose_encoding, evaluate_predictions, unproject
from ..evaluation.timing import Timing, time_interleaved
from ..mini import build_mini
from ..patching.install import accelerate, paused, summary
from ..patching.summary import Summary
from ..runtime.device import usable_device
from ..runtime.files import environment, write_json
from ..runtime.plotting import load_extra, load_pyplot
from ..training.states import results_folder, writing
from .pictures import save_depth_picture, save_points, save_points_picture, save_token_picture

BUNDLED_CLIP = Path(__file__).resolve().parent.parent / "data" / "room"
MINI_WIDTH = 224  # pixels; VGGT-mini was trained on squares of this size
MOST_FRAMES = 24
MOST_POINTS = 500_000
RANGES = ("seconds_range_stock", "seconds_range_pace")
METRICS = ("auc30", "rotation_deg", "absrel")


def run_demo(
    out: Path,
    clip_folder: Path | None = None,
    *,
    frames: int | None = None,
    keep_ratio: float = 0.3,
    merge_budget: float | None = None,
    weights: str | None = "auto",
    mode: str | None = None,
    device: str | None = None,
    repeats: int = 3,
) -> dict[str, Any]:
    """Run VGGT-mini on a clip, stock and accelerated, and write report and pictures to `out`.

    Writes `report.json`, `tokens.png`, `depth.png`, `points.png` and `points.ply`, each whole or not at all.

    Args:
        out: folder for the results; made if it is not there.
        clip_folder: a folder of images, or a `clip.json` folder; None takes the bundled clip.
        frames: how many frames, evenly spaced over the clip; None takes 24, or all where there are fewer.
        keep_ratio, merge_budget, weights, mode: as in `accelerate`.
        device: None takes CUDA where there is one.
        repeats: timed runs of each, interleaved.

    Returns:
        The content of report.json.

    Raises:
        PaceError: a library is missing, a setting, the clip or the weights do not fit, or a file can't be written.
    """
    # What is missing or does not go together is told before a minute of work.
    load_pyplot(), load_extra("plyfile", "point clouds"), PaceConfig(keep_ratio, merge_budget, mode)
    chosen = usable_device(device)
    clip = load_evenly(clip_folder or BUNDLED_CLIP, frames).to(chosen)
    model = build_mini().to(chosen)
    # What pruning does is shown even where it is not the faster one.
    accelerate(model, keep_ratio, merge_budget, weights=weights, mode=mode, min_frames=1)
    settings = summary(model)
    results_folder(out)

    def run_stock() -> dict[str, Any]:
        with paused(model):
            return model(clip.images)

    runs = {"stock": run_stock, "accelerated": lambda: model(clip.images)}
    with torch.inference_mode(), warnings.catch_warnings():
        # Stock vggt uses a spelling of autocast that torch has deprecated; it would tear the progress bar.
        warnings.filterwarnings("ignore", message=".*torch.cuda.amp.autocast", category=FutureWarning)
        with tqdm(total=(repeats + 1) * len(runs), desc=f"{len(clip)} frames", unit="run") as bar:
            timings = time_interleaved(runs, repeats, chosen, update=bar.update)
    kept = summary(model).kept  # of the last run, an accelerated one

    report = make_report(clip, settings, timings)
    images = clip.images
    grid = images.shape[-2] // model.aggregator.patch_size, images.shape[-1] // model.aggregator.patch_size
    if kept is None:  # nothing was pruned
        kept = torch.arange(grid[0] * grid[1]).expand(1, len(images), -1)
    stock, pace = (timings[name].result["depth"][0, ..., 0] for name in runs)  # [S, H, W]
    clouds = {name: point_cloud(timings[name].result, images) for name in runs}
    points, colours = clouds["accelerated"]
    writers = {
        "report.json": lambda path: write_json(path, report),
        "tokens.png": lambda path: save_token_picture(path, images, kept[0], grid, settings.config),
        "depth.png": lambda path: save_depth_picture(path, images, stock, pace),
        "points.png": lambda path: save_points_picture(path, clouds),
        "points.ply": lambda path: save_points(path, points, colours),
    }
    for name, write in tqdm(writers.items(), desc="report", unit="file"):
        with writing(out / name):
            write(out / name)
    return report


def load_evenly(folder: Path, frames: int | None) -> Clip:
    """A clip for VGGT-mini: central squares of frames that are evenly spaced, from the first one on."""
    total = count_frames(folder)
    if frames is None:
        frames = min(MOST_FRAMES, total)
    stride = max(1, (total - 1) // max(1, frames - 1))
    return load_clip(folder, frames=frames, stride=stride, width=MINI_WIDTH, mode="square")


def make_report(clip: Clip, settings: Summary, timings: dict[str, Timing]) -> dict[str, Any]:
    """The content of `report.json`; metrics are null where the clip has no ground truth."""
    stock, pace = timings["stock"], timings["accelerated"]
    quality = {name: evaluate_predictions(timing.result, clip) for name, timing in timings.items()}
    return {
        "backbone": "vggt-mini",
        "clip": clip.name,
        "frames": len(clip),
        "keep_ratio": settings.config.keep_ratio,
        "mode": settings.config.mode,
        "merge_budget": settings.config.merge_budget,
        "weights": settings.weights,
        "seconds_stock": stock.median,
        "seconds_pace": pace.median,
        "speedup": stock.median / pace.median,
        "seconds_range_stock": [min(stock.seconds), max(stock.seconds)],
        "seconds_range_pace": [min(pace.seconds), max(pace.seconds)],
        "stock": {key: quality["stock"][key] for key in METRICS},
        "pace": {key: quality["accelerated"][key] for key in METRICS},
        "environment": environment(clip.images.device),
    }


def point_cloud(output: dict[str, Any], images: Tensor) -> tuple[Tensor, Tensor]:
    """Points [N, 3] and colours [N, 3] of the more confident half of all pixels, in the first camera's frame."""
    depth, confidence = output["depth"][0, ..., 0].float(), output["depth_conf"][0]  # [S, H, W]
    world_to_camera, intrinsics = decode_pose_encoding(output["pose_enc"][0].float(), *images.shape[-2:])
    points = unproject(depth, intrinsics, world_to_camera)  # [S, H, W, 3]
    # A sort-based median: quantile() refuses large inputs.
    sure = (confidence > confidence.flatten().median()).flatten().nonzero()[:, 0]
    sure = sure[:: max(1, -(-len(sure) // MOST_POINTS))]
    return points.reshape(-1, 3)[sure], images.permute(0, 2, 3, 1).reshape(-1, 3)[sure]


def format_table(report: dict[str, Any]) -> str:
    """The report as a table for people."""

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    stock, pace = report["stock"], report["pace"]
    rows = [
        ("seconds, median", number(report["seconds_stock"], 2), number(report["seconds_pace"], 2)),
        ("seconds, fastest to slowest run", *("-".join(f"{s:.2f}" for s in report[k]) for k in RANGES)),
        ("speed-up", "1.0x", f"{report['speedup']:.1f}x"),
        ("camera AUC@30 (percent, higher is better)", number(stock["auc30"], 1), number(pace["auc30"], 1)),
        (
            "rotation error (median, degrees)",
            number(stock["rotation_deg"], 2),
            number(pace["rotation_deg"], 2),
        ),
        ("depth AbsRel (lower is better)", number(stock["absrel"], 4), number(pace["absrel"], 4)),
    ]
    title = (
        f"{report['backbone']} on {report['clip']}, {report['frames']} frames, keep ratio {report['keep_ratio']:g}, "
        f"{report['mode']} pruning, weights {report['weights']}"
    )
    lines = [title, f"{'':42s}{'stock':>10s}{'accelerated':>13s}"]
    lines += [f"{name:42s}{a:>10s}{b:>13s}" for name, a, b in rows]
    lines.append(
        "VGGT-mini is small and was trained on rendered rooms: look at the difference between the columns. The clip is "
        "pruned however short it is; short ones gain little, and times vary where others use the machine, too."
    )
    return "\n".join(lines)
