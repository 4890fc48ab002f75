"""Do scores tell what tokens are worth? Groups of tokens are left out of global attention, and the outputs compared.

    python benchmarks/occlusion.py --frames 8 --count 12 --json FILE --plot FILE

Cells: each frame is cut into cells of 4 x 4 patches. In one pass every frame leaves out one cell, another one in each
pass, until each cell of each frame was out once. What a cell is worth is how far depth and camera of its own frame
move. Beside it stands the mean score of its tokens, and Spearman's correlation of the two over all cells of a clip.

Ranks: in one pass all frames leave out the tokens of one sixteenth of the ranks by score, from the best to the last.

Outputs are compared with those of the unpruned VGGT-mini. What is left out is filled in from the rest, as always; no
head sees all tokens, and nothing is trained. Scores are those of `method.scoring` at keep ratio 0.3, and for
comparison distinctness alone, how far a token is from its frame's mean, and chance. Needs scipy.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ablation import atypical_scores, distinct_scores, random_scores, swapped
from quality import add_clip_arguments, header, model_and_clips, parse
from torch import Tensor
from tqdm import tqdm

from pacevggt_patch import PaceError, accelerate, remove
from pacevggt_patch.evaluation import decode_pose_encoding, pairwise_pose_errors
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.method.scoring import token_scores
from pacevggt_patch.patching import state
from pacevggt_patch.runtime.files import write_json
from pacevggt_patch.runtime.plotting import load_extra, load_pyplot, save_figure

SIDE = 4  # patches a side of a cell
GROUPS = 16  # of ranks
KEEP_RATIO = 0.3  # at which scores are made
MEASURES = {"depth": "depth moves by, percent", "camera": "cameras move by, degrees"}


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    spearman = load_extra("scipy.stats", "correlations", "eval").spearmanr
    model, clips = model_and_clips(args)
    report: dict[str, Any] = {
        **header(args, len(clips)),
        "cell": SIDE,
        "groups": GROUPS,
        "keep_ratio": KEEP_RATIO,
        "clips_measured": [],
    }
    for clip in tqdm(clips, unit="clip", disable=None):
        report["clips_measured"].append(measured(model, clip.images, spearman))
        report["summary"] = summarised(report["clips_measured"])
        if args.json:
            write_json(args.json, report)
    print_table(report["summary"])
    if args.plot:
        plot(report, args.plot)
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_clip_arguments(parser, rooms=12)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG")
    return parse(parser, argv)


def measured(model: Any, images: Tensor, spearman: Callable[..., Any]) -> dict[str, Any]:
    """One clip [S, 3, H, W]: correlations of cells, and how far outputs move by rank."""
    host = find_host(model)
    grid = images.shape[-2] // host.patch_size, images.shape[-1] // host.patch_size
    if grid[0] % SIDE or grid[1] % SIDE or grid[0] * grid[1] % GROUPS:
        raise PaceError(f"frames of {grid[0]}x{grid[1]} patches are no whole cells of {SIDE} x {SIDE}")
    features: list[Tensor] = []
    hook = model.aggregator.patch_embed.register_forward_hook(
        lambda module, inputs, output: features.extend(
            [found] if (found := host.features(output)) is not None else []
        )
    )
    with torch.inference_mode():
        unpruned = model(images)
    hook.remove()
    scores = scores_of(features[0], grid)
    cells = cells_of(grid, images.device)
    worth = worth_of_cells(model, images, cells, unpruned)
    correlations = {
        name: {
            measure: float(spearman(by_cells(of, cells).flatten().cpu(), worth[measure].flatten().cpu())[0])
            for measure in MEASURES
        }
        for name, of in scores.items()
    }
    return {
        "correlations": correlations,
        "by_rank": worth_of_ranks(model, images, scores["scores"], unpruned),
    }


def scores_of(features: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Scores [S, P] of patch tokens [S, P, C] by name."""
    keep = max(1, round(KEEP_RATIO * features.shape[1]))
    return {
        "scores": token_scores(features[None], grid, keep)[0],
        "distinctness": distinct_scores(features, grid),
        "far from the mean": atypical_scores(features, grid),
        "chance": random_scores(0)(features, grid),
    }


def cells_of(grid: tuple[int, int], device: torch.device | str) -> Tensor:
    """The patches [cells, SIDE ** 2] of each cell."""
    number = torch.arange(grid[0] * grid[1], device=device).view(grid)
    return number.unfold(0, SIDE, SIDE).unfold(1, SIDE, SIDE).flatten(2).flatten(0, 1)


def by_cells(scores: Tensor, cells: Tensor) -> Tensor:
    """Mean scores [S, cells] of scores [S, P]."""
    return scores[:, cells].mean(-1)


def worth_of_cells(
    model: Any, images: Tensor, cells: Tensor, unpruned: dict[str, Tensor]
) -> dict[str, Tensor]:
    """How far depth and camera of each frame move without one of its cells: [S, cells] by measure."""
    frames, count = len(images), len(cells)
    worth = {measure: torch.zeros(frames, count) for measure in MEASURES}
    step = next(step for step in range(count // 3, count) if math.gcd(step, count) == 1)
    frame = torch.arange(frames, device=images.device)
    for start in range(count):
        # Frames leave out different cells: what one moves alike in all of them would not show.
        out = (start + step * frame) % count  # [S]
        moved = change(without(model, images, cells[out]), unpruned)
        for measure, values in moved.items():
            worth[measure][torch.arange(frames), out.cpu()] = values
    return worth


def worth_of_ranks(
    model: Any, images: Tensor, scores: Tensor, unpruned: dict[str, Tensor]
) -> dict[str, list[float]]:
    """How far outputs move, mean over frames, without each group of ranks, the best first."""
    order = scores.argsort(dim=1, descending=True)  # [S, P]
    found: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    for group in order.chunk(GROUPS, dim=1):
        for measure, values in change(without(model, images, group), unpruned).items():
            found[measure].append(values.mean().item())
    return found


def without(model: Any, images: Tensor, out: Tensor) -> dict[str, Tensor]:
    """Outputs where global attention lacks patch tokens [S, m] of each frame."""
    patch = find_host(model).patch_size
    patches = (images.shape[-2] // patch) * (images.shape[-1] // patch)
    stays = torch.ones(len(images), patches, dtype=torch.bool, device=images.device)
    stays.scatter_(1, out, False)
    kept = stays.nonzero()[:, 1].view(len(images), -1)

    def chosen(features: Tensor, grid: tuple[int, int], keep: int, scorer: Any = None) -> Tensor:
        return kept

    accelerate(model, kept.shape[1] / patches, weights=None, min_frames=1)  # tries it on a clip of its own
    try:
        with swapped((state, "keep_best", chosen)), torch.inference_mode():
            return model(images)
    finally:
        remove(model)


def change(found: dict[str, Tensor], unpruned: dict[str, Tensor]) -> dict[str, Tensor]:
    """How far each frame's outputs are from the unpruned model's: [S] by measure.

    Depth: mean relative difference in percent, after one scale for the clip. Camera: mean difference in degrees of
    the poses relative to all other frames, rotation and direction of translation, the larger one.
    """
    ratio = found["depth"][0].float() / unpruned["depth"][0].float()
    depth = 100 * (ratio / ratio.median() - 1).abs().flatten(1).mean(1)
    poses = [decode_pose_encoding(out["pose_enc"][0].double(), 1, 1)[0] for out in (found, unpruned)]
    errors = pairwise_pose_errors(*poses)
    larger = torch.maximum(errors.rotation, errors.translation)
    frames = len(ratio)
    first, second = torch.triu_indices(frames, frames, offset=1)
    sums = torch.zeros(frames, dtype=larger.dtype).index_add(0, first, larger).index_add(0, second, larger)
    return {"depth": depth.cpu(), "camera": (sums / (frames - 1)).float()}


def summarised(clips: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over clips, and standard errors of the correlations."""

    def mean_and_error(values: list[float]) -> dict[str, float | None]:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return {"mean": statistics.fmean(values), "error": error}

    names = clips[0]["correlations"]
    return {
        "correlations": {
            name: {
                measure: mean_and_error([clip["correlations"][name][measure] for clip in clips])
                for measure in MEASURES
            }
            for name in names
        },
        "by_rank": {
            measure: [
                statistics.fmean(group)
                for group in zip(*(clip["by_rank"][measure] for clip in clips), strict=True)
            ]
            for measure in MEASURES
        },
    }


def print_table(summary: dict[str, Any]) -> None:
    print(f"{'correlation over cells with':28s}" + "".join(f"{measure:>18s}" for measure in MEASURES))
    for name, row in summary["correlations"].items():
        cells = [
            f"{row[m]['mean']:+.2f}" + ("" if row[m]["error"] is None else f" ({row[m]['error']:.2f})")
            for m in MEASURES
        ]
        print(f"{name:28s}" + "".join(f"{cell:>18s}" for cell in cells))
    for measure, label in MEASURES.items():
        print(f"{label}, best sixteenth first: " + " ".join(f"{v:.2f}" for v in summary["by_rank"][measure]))


def plot(report: dict[str, Any], path: Path) -> None:
    """How far outputs move by rank."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(1, len(MEASURES), figsize=(9.5, 3.4), layout="constrained")
    for axis, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        values = report["summary"]["by_rank"][measure]
        axis.bar(range(1, len(values) + 1), values, color="#3182bd")
        axis.axvspan(0.4, 0.5 + KEEP_RATIO * GROUPS, color="#08306b", alpha=0.08)
        axis.set_ylim(0, 1.15 * max(values))
        axis.text(0.6, 1.12 * max(values), f"kept at {KEEP_RATIO:g}", va="top", fontsize=9)
        axis.set(xlabel="sixteenth of the tokens left out, by score, best first", ylabel=label)
        axis.spines[["top", "right"]].set_visible(False)
    what = "rooms" if report["clips"] == "rooms" else f"windows of {report['clips']}"
    figure.suptitle(
        f"What tokens are worth by their scores: VGGT-mini, {report['count']} {what} of {report['frames']} views",
        fontsize=11,
    )
    save_figure(figure, path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"occlusion.py: {error}")
