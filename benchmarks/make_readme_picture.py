"""Draw the picture of README.md: the bundled clip, the tokens that are kept, and depth, stock and accelerated.

    python benchmarks/make_readme_picture.py

Measures VGGT-mini on this machine's CPU, and writes docs/pictures/result.png and what it measured, with the machine it
was measured on, beside the other results.
"""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pacevggt_patch import PaceError, accelerate, paused, summary
from pacevggt_patch.clips import Clip, load_clip
from pacevggt_patch.evaluation import evaluate_predictions
from pacevggt_patch.evaluation.timing import time_interleaved
from pacevggt_patch.mini import build_mini
from pacevggt_patch.runtime.files import environment, whole_file, write_json
from pacevggt_patch.runtime.plotting import load_pyplot

ROOT = Path(__file__).parents[1]
CLIP = ROOT / "pacevggt_patch" / "data" / "room"
SHOWN = (0, 15)  # frames
WIDTH = 1600  # pixels
DOTS = 100  # pixels of an inch
COLOURS = 256  # of the file, which has to stay small
DARK = 0.25  # brightness of tokens that are not kept


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    load_pyplot()  # a missing library is told before the measurement
    clip = load_clip(CLIP, frames=args.frames, width=224, mode="square")
    results = measure(clip, args.repeats)
    write_json(args.json, results["report"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(args.out) as temporary:
        drawn(clip, results).quantize(COLOURS, kmeans=2, dither=Image.Dither.FLOYDSTEINBERG).save(
            temporary, optimize=True
        )
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} KB")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures" / "result.png")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "readme-picture.json", metavar="FILE"
    )
    parser.add_argument("--frames", type=int, help="of the clip, all of them if not given")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args(argv)


def measure(clip: Clip, repeats: int) -> dict[str, Any]:
    """Depth `[S, H, W]` of both, the kept tokens `[S, K]`, and the report that is written to a file."""
    model = build_mini()
    accelerate(model, min_frames=1)

    def stock() -> dict[str, Any]:
        with paused(model):
            return model(clip.images)

    runs = {"stock": stock, "accelerated": lambda: model(clip.images)}
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.cuda.amp.autocast", category=FutureWarning)
        with tqdm(
            total=(repeats + 1) * len(runs), desc=f"{len(clip)} frames", unit="run", disable=None
        ) as bar:
            timings = time_interleaved(runs, repeats, "cpu", update=bar.update)
    found = summary(model)
    assert found.kept is not None
    report = {
        "environment": environment("cpu"),
        "backbone": "vggt-mini",
        "clip": clip.name,
        "frames": len(clip),
        "keep_ratio": found.config.keep_ratio,
        "weights": found.weights,
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "seconds_median": {name: timing.median for name, timing in timings.items()},
        "quality": {name: evaluate_predictions(timing.result, clip) for name, timing in timings.items()},
    }
    depth = {name: timing.result["depth"][0, ..., 0] for name, timing in timings.items()}
    return {"report": report, "depth": depth, "kept": found.kept[0]}


def drawn(clip: Clip, results: dict[str, Any]) -> Image.Image:
    """Four columns: frames, kept tokens, stock depth, accelerated depth; the seconds stand below."""
    pyplot, report = load_pyplot(), results["report"]
    shown = [index for index in SHOWN if index < len(clip)]
    depth, seconds = results["depth"], report["seconds_median"]
    near, far = depth["stock"][shown].quantile(torch.tensor([0.01, 0.99])).tolist()
    columns = [
        ("Frames", f"{len(clip)} in all"),
        ("Kept tokens", f"{report['keep_ratio']:.0%} of each frame"),
        ("Depth, stock", f"{seconds['stock']:.1f} s"),
        (
            "Depth, accelerated",
            f"{seconds['accelerated']:.1f} s ({seconds['stock'] / seconds['accelerated']:.1f}x)",
        ),
    ]
    rows = len(shown)
    side, top, below = WIDTH / 4 / DOTS, 0.62, 1.5  # inches
    size = (WIDTH / DOTS, rows * side + top + below)
    figure = pyplot.figure(figsize=size, facecolor="white")
    gap = 0.07  # inches
    for row, index in enumerate(shown):
        image = clip.images[index]
        pictures: list[Any] = [image, dimmed(image, results["kept"][index])]
        pictures = [picture.permute(1, 2, 0).numpy() for picture in pictures]
        pictures += [depth[name][index].numpy() for name in ("stock", "accelerated")]
        for column, picture in enumerate(pictures):
            bottom = below + (rows - 1 - row) * side
            box = (column * side + gap, bottom + gap, side - 2 * gap, side - 2 * gap)
            axis = figure.add_axes((box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]))
            # One scale for both: nearer is brighter.
            axis.imshow(picture, vmin=near, vmax=far, cmap="magma_r", interpolation="bilinear")
            axis.axis("off")
    for column, (title, caption) in enumerate(columns):
        middle = (column + 0.5) / 4
        figure.text(middle, 1 - 0.33 / size[1], title, ha="center", va="center", fontsize=24)
        strong = "bold" if column > 1 else "normal"
        figure.text(
            middle,
            (below - 0.36) / size[1],
            caption,
            ha="center",
            va="center",
            fontsize=28,
            fontweight=strong,
        )
    machine = report["environment"]
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    figure.text(
        0.5,
        0.42 / size[1],
        f"VGGT-mini on {len(clip)} frames of {clip.width} x {clip.height} pixels, {machine['device']}, {threads}, "
        f"median of {len(report['seconds']['stock'])} runs each",
        ha="center",
        va="center",
        fontsize=18,
        color="#444444",
    )
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DOTS)
    pyplot.close(figure)
    return Image.open(content).convert("RGB")


def dimmed(image: Tensor, kept: Tensor) -> Tensor:
    """An image `[3, H, W]`, dark but for its kept patch tokens `[K]`, given by their numbers."""
    height, width = image.shape[1] // 14, image.shape[2] // 14
    cells = torch.full((height * width,), DARK)
    cells[kept] = 1
    light = cells.view(height, width).repeat_interleave(14, 0).repeat_interleave(14, 1)  # [H, W]
    return image * light


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"make_readme_picture.py: {error}")
