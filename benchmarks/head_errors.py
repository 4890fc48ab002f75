"""Which heads of global attention must see all tokens: what each loses where it sees the kept ones alone.

    python benchmarks/head_errors.py --clips rooms --count 4 --frames 8 --json FILE --plot FILE
    python benchmarks/head_errors.py --clips DIR --frames 8

The errors are those by which calibration chooses (`pacevggt_patch.method.full_heads`): mean squares, at keep ratio
0.3, of what a head adds to the tokens less what it would add, over the variance of the tokens. With `--alone`, each
head is pruned by itself as well, and the outputs are compared with those of the model whose heads all see all tokens.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from quality import add_clip_arguments, header, model_and_clips, parse
from tqdm import tqdm

from pacevggt_patch import PaceError, PaceWeights, accelerate, remove
from pacevggt_patch.calibration.full_heads import find_full_heads
from pacevggt_patch.evaluation import decode_pose_encoding, pairwise_pose_errors
from pacevggt_patch.method.full_heads import KEEP_RATIO, LEAST_ERROR, Heads
from pacevggt_patch.runtime.files import write_json
from pacevggt_patch.runtime.plotting import load_pyplot, save_figure


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    model, found = model_and_clips(args)
    clips = [clip.images for clip in found]
    accelerate(model, weights=None, min_frames=1)
    heads, errors = find_full_heads(model, (images[None] for images in clips))
    remove(model)
    report: dict[str, Any] = {
        **header(args, len(clips)),
        "keep_ratio": KEEP_RATIO,
        "least_error": LEAST_ERROR,
        "full_heads": [list(head) for head in heads],
        "errors": errors.tolist(),
    }
    if args.alone:
        report["alone"] = alone(model, clips, *errors.shape)
    print(f"{report['clips']}: {len(clips)} clips of {args.frames} frames, keep ratio {KEEP_RATIO:g}")
    for block, row in enumerate(errors.tolist()):
        print(f"block {block:2d}  " + "  ".join(f"{value:.4f}" for value in row))
    print("full-attention heads (block, head): " + (", ".join(map(str, heads)) or "none"))
    if args.json:
        write_json(args.json, report)
    if args.plot:
        plot(report, args.plot)
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_clip_arguments(parser, rooms=4)
    parser.add_argument("--alone", action="store_true", help="prune each head by itself, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG")
    return parse(parser, argv)


@torch.inference_mode()
def alone(model: Any, clips: list[torch.Tensor], blocks: int, heads: int) -> list[list[dict[str, float]]]:
    """For each block and head: how far the outputs are off if this head alone sees the kept tokens only.

    `rotation_deg` and `translation_deg`: over frame pairs the mean and the median difference; `depth`: mean relative
    difference after one scale for the clip. Means over clips.
    """
    everyone = tuple((block, head) for block in range(blocks) for head in range(heads))
    untrained = PaceWeights.new(model)

    def prune_all_but(heads: Heads) -> None:
        accelerate(model, KEEP_RATIO, weights=replace(untrained, full_heads=heads), min_frames=1)

    prune_all_but(everyone)
    wanted = [model(images) for images in clips]
    rows: list[list[dict[str, float]]] = [[] for _ in range(blocks)]
    for block, head in tqdm(everyone, unit="head", disable=None):
        prune_all_but(tuple(one for one in everyone if one != (block, head)))
        found = [difference(model(images), truth) for images, truth in zip(clips, wanted, strict=True)]
        rows[block].append({name: sum(row[name] for row in found) / len(found) for name in found[0]})
    remove(model)
    return rows


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """Of one clip."""
    ratio = found["depth"] / wanted["depth"]
    poses = [decode_pose_encoding(out["pose_enc"][0], 1, 1)[0] for out in (found, wanted)]
    errors = pairwise_pose_errors(*poses)
    return {
        "rotation_deg": errors.rotation.mean().item(),
        "translation_deg": errors.translation.median().item(),
        "depth": (ratio / ratio.median() - 1).abs().mean().item(),
    }


def plot(report: dict[str, Any], path: Path) -> None:
    """Errors of all heads, blocks across and heads down; full-attention heads in frames."""
    pyplot = load_pyplot()
    errors = torch.tensor(report["errors"]).T  # [heads, blocks]
    figure, axis = pyplot.subplots(
        figsize=(1.5 + 0.6 * errors.shape[1], 1.5 + 0.4 * errors.shape[0]), layout="constrained"
    )
    image = axis.imshow(errors, cmap="magma_r", vmin=0)
    for block, head in report["full_heads"]:
        box = pyplot.Rectangle((block - 0.5, head - 0.5), 1, 1, fill=False, edgecolor="tab:cyan", linewidth=2)
        axis.add_patch(box)
    axis.set(
        xlabel="global block",
        ylabel="head",
        title=f"What a head loses with {report['keep_ratio']:.0%} of the tokens",
    )
    axis.set_xticks(range(errors.shape[1]))
    axis.set_yticks(range(errors.shape[0]))
    figure.colorbar(image, label="error / variance of the tokens")
    save_figure(figure, path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"head_errors.py: {error}")
