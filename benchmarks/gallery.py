"""The clips that lose most: their frames, kept tokens, and depth of the unpruned and of the accelerated VGGT-mini.

    python benchmarks/gallery.py --frames 8 --count 24 --seed 2000000 --out gallery.png --json FILE
    python benchmarks/gallery.py --clips DIR --frames 8 --starts 0,40,80 --out gallery.png

Clips are ordered by how much of AUC@30 they lose. Of each the frame is shown whose depth moves most. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality import METRICS, add_clip_arguments, header, load, parse
from torch import Tensor
from tqdm import tqdm

from pacevggt_patch import PaceConfig, PaceError, accelerate, paused
from pacevggt_patch.clips import Clip
from pacevggt_patch.compare.pictures import DEPTH_COLOURS, DIFFERENCE_COLOURS, limits, overlay_kept, pixels
from pacevggt_patch.evaluation import evaluate_predictions
from pacevggt_patch.mini import build_mini
from pacevggt_patch.patching.install import state_of
from pacevggt_patch.runtime.files import write_json
from pacevggt_patch.runtime.plotting import load_pyplot, save_figure

SHOWN = 4
TITLES = ("frame", "kept tokens", "true depth", "unpruned", "accelerated", "they differ by, %")


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    load_pyplot()  # says what is missing before the work
    model = build_mini(args.checkpoint or True).to(args.device)
    ratio, worst, rows = args.keep_ratios[0], [], []
    accelerate(model, ratio, weights=args.weights, min_frames=1)
    for number, clip in enumerate(tqdm(load(args), total=args.count, unit="clip", disable=None)):
        row, drawn = measured(model, clip.to(args.device), number)
        rows.append(row)
        worst = sorted([*worst, (row, drawn)], key=lambda one: one[0]["auc30_change"])[:SHOWN]
    if args.json:
        report: dict[str, Any] = {**header(args, len(rows)), "keep_ratio": ratio, "weights": args.weights}
        write_json(args.json, report | {"rows": sorted(rows, key=lambda row: row["auc30_change"])})
    draw(worst, header(args, len(rows)), ratio, args.out)
    for row in sorted(rows, key=lambda row: row["auc30_change"]):
        print(
            f"clip {row['clip']:3d}: AUC@30 {row['auc30_change']:+6.1f}, AbsRel {row['absrel_change']:+6.1f} %"
        )
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_clip_arguments(parser, rooms=24, keep_ratios=[PaceConfig().keep_ratio])
    parser.add_argument("--weights", default="auto", help='"auto" (default), a file, or a Hub id')
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a PNG")
    return parse(parser, argv)


def measured(model: Any, clip: Clip, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a clip loses, in points of AUC@30 and percent of AbsRel, and what is drawn of it.

    Raises:
        PaceError: the clip has no true cameras and depth.
    """
    with torch.inference_mode():
        found = model(clip.images)
        kept = state_of(model).kept  # [1, S, K]
        with paused(model):
            unpruned = model(clip.images)
    assert kept is not None
    metrics = {
        "unpruned": evaluate_predictions(unpruned, clip),
        "accelerated": evaluate_predictions(found, clip),
    }
    before, after = metrics.values()
    if (
        before["auc30"] is None
        or before["absrel"] is None
        or after["auc30"] is None
        or after["absrel"] is None
    ):
        raise PaceError(f"clip {number} has no true cameras and depth, so what it loses can't be told")
    row = {
        "clip": number,
        "auc30_change": after["auc30"] - before["auc30"],
        "absrel_change": 100 * (after["absrel"] / before["absrel"] - 1),
        **{side: {key: values[key] for key in METRICS} for side, values in metrics.items()},
    }
    stock, ours = (out["depth"][0, ..., 0].float().cpu() for out in (unpruned, found))
    ratio = ours / stock
    moved = 100 * (ratio / ratio.median() - 1).abs()  # [S, H, W]
    frame = int(moved.flatten(1).mean(1).argmax())
    patch = int(model.aggregator.patch_size)
    grid = clip.height // patch, clip.width // patch
    image = clip.images[frame].cpu()
    assert clip.depth is not None and clip.valid is not None
    truth = clip.depth[frame].cpu().float().where(clip.valid[frame].cpu(), torch.nan)
    scale = (clip.depth[clip.valid].cpu() / stock[clip.valid.cpu()]).median()
    return row, {
        "frame": frame,
        "image": pixels(image),
        "kept": pixels(overlay_kept(image, kept[0, frame].cpu(), grid)),
        "depths": [truth, stock[frame] * scale, ours[frame] * scale / ratio.median()],
        "moved": moved[frame],
    }


def draw(
    worst: list[tuple[dict[str, Any], dict[str, Any]]], of: dict[str, Any], ratio: float, path: Path
) -> None:
    """A row for each clip."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(
        len(worst),
        len(TITLES),
        figsize=(2.0 * len(TITLES), 2.05 * len(worst) + 0.4),
        layout="constrained",
        squeeze=False,
    )
    for line, (row, drawn) in zip(axes, worst, strict=True):
        low, high = limits(drawn["depths"][1], 0.01, 0.99)
        most = max(5.0, limits(drawn["moved"], 0.0, 0.98)[1])
        depths = [(depth, low, high, DEPTH_COLOURS) for depth in drawn["depths"]]
        line[0].imshow(drawn["image"])
        line[1].imshow(drawn["kept"])
        shown: list[tuple[Tensor, float, float, str]] = [
            *depths,
            (drawn["moved"], 0.0, most, DIFFERENCE_COLOURS),
        ]
        for axis, (values, least, largest, colours) in zip(line[2:], shown, strict=True):
            axis.imshow(np.ma.masked_invalid(values.numpy()), vmin=least, vmax=largest, cmap=colours)
        line[-1].set_title(f"0 to {most:.0f}", fontsize=8, loc="right")
        line[0].set_ylabel(
            f"clip {row['clip']}, frame {drawn['frame']}\nAUC@30 {row['unpruned']['auc30']:.1f} "
            f"{row['auc30_change']:+.1f}\nAbsRel {row['absrel_change']:+.0f} %",
            fontsize=8,
        )
    for axis, title in zip(axes[0], TITLES, strict=True):
        axis.set_title(title, fontsize=9, loc="left")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    several = f"{of['count']} rooms" if of["clips"] == "rooms" else f"{of['count']} windows of {of['clips']}"
    figure.suptitle(
        f"The {len(worst)} that lose most of {several} of {of['frames']} views, keep ratio {ratio:g}",
        fontsize=11,
    )
    save_figure(figure, path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"gallery.py: {error}")
