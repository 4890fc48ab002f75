"""What the parts of global pruning's keys are worth: VGGT-mini with one part changed at a time, on clips of one length.

    python benchmarks/ablation.py --frames 96 --count 6 --weights runs/train/calibrated.safetensors --json FILE

Each line changes one thing of what ships: whether keys count for the tokens that they stand for, how many keys a frame
has, and which keys full-attention heads see. `pairs` are the pairs of queries and keys of all global blocks, over those
of the unpruned model. Clips and metrics are those of quality.py.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Generator
from typing import Any
from unittest import mock

from quality import add_clip_arguments, header, load, make_row, measure, parse
from tqdm import tqdm

from pacevggt_patch import PaceError, accelerate, remove, summary
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.method import few_keys, global_pruning
from pacevggt_patch.mini import build_mini
from pacevggt_patch.patching.install import state_of
from pacevggt_patch.runtime.files import write_json


def keys_once(propagation: Any, batch: int = 1) -> None:
    """All kept tokens are keys, each counts once."""


@contextlib.contextmanager
def swapped(*places: tuple[Any, str, Any]) -> Generator[None]:
    """Names of modules mean something else inside."""
    with contextlib.ExitStack() as stack:
        for module, name, value in places:
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def pairs_share(
    frames: int, special: int, patches: int, kept: int, heads: int, full: int, once: bool = False
) -> float:
    """Pairs of queries and keys of global pruning in all global blocks, over those of the unpruned model.

    Args:
        frames, special, patches: S, n and P of a clip.
        kept: K, patch tokens of a frame.
        heads, full: of all blocks together, and how many of them are full-attention heads.
        once: all kept tokens are keys, and count once.
    """
    tokens, few = frames * (special + patches), frames * (special + kept)
    keys = few if once else few_keys.keys_of_clip(frames, special, patches, kept)
    of_full = few_keys.keys_of_full(frames, special, patches)
    return (full * tokens * of_full + (heads - full) * few * keys) / (heads * tokens**2)


def variants(frames: int, special: int, patches: int, kept: int, heads: int, full: int) -> dict[str, tuple]:
    """Name -> (places to swap, pairs of queries and keys over the unpruned model's)."""

    def changed(name: str, once: bool = False, **constants: int) -> None:
        places: list[tuple[Any, str, Any]] = [
            (few_keys, constant, value) for constant, value in constants.items()
        ]
        if once:
            places.append((global_pruning, "few_keys", keys_once))
        with swapped(*places):
            found[name] = places, pairs_share(frames, special, patches, kept, heads, full, once)

    found: dict[str, tuple] = {}
    changed("shipped")
    changed("all kept tokens, each once", once=True)
    # As many frames as the clip has: no sampling.
    changed("all keys, counted", FRAMES=frames, LONG=frames, FRAMES_OF_FULL=frames)
    for short in (12, 48):
        changed(f"keys of {short} frames in place of {few_keys.FRAMES}", FRAMES=short)
    for short in (24, 96):
        name = f"full-attention heads: {short} frames in place of {few_keys.FRAMES_OF_FULL}"
        changed(name, FRAMES_OF_FULL=short)
    return found


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    model = build_mini(args.checkpoint or True).to(args.device)
    clips = [clip.to(args.device) for clip in tqdm(load(args), desc="clips", total=args.count, disable=None)]
    patches = (clips[0].images.shape[-1] // model.aggregator.patch_size) ** 2
    host, ratio = find_host(model), args.keep_ratios[0]
    spec = host.spec()
    accelerate(model, ratio, weights=args.weights, min_frames=1)
    weights = state_of(model).weights
    full = 0 if weights is None else len(weights.full_heads)
    kept = summary(model).config.kept_tokens(patches)
    tried = variants(args.frames, host.special_tokens, patches, kept, spec.depth * spec.num_heads, full)
    report: dict[str, Any] = {**header(args, len(clips)), "weights": summary(model).weights, "rows": []}
    remove(model)
    with tqdm(total=(1 + len(tried)) * len(clips), unit="clip", disable=None) as bar:
        unpruned = measure(model, clips, bar)
        report["rows"].append(
            make_row({"variant": "unpruned", "keep_ratio": 1.0, "pairs": 1.0}, unpruned, unpruned)
        )
        accelerate(model, ratio, weights=args.weights, min_frames=1)
        for name, (places, pairs) in tried.items():
            with swapped(*places):
                found = measure(model, clips, bar)
            report["rows"].append(
                make_row({"variant": name, "keep_ratio": ratio, "pairs": pairs}, found, unpruned)
            )
            if args.json:
                write_json(args.json, report)
    print(
        f"{'variant':44s}{'pairs':>7s}{'AUC@30':>18s}{'AbsRel':>18s}   change in percent (its standard error)"
    )
    for row in report["rows"][1:]:
        cells = (
            f"{row[f'{key}_change']:+.1f} ({row[f'{key}_change_error']:.1f})" for key in ("auc30", "absrel")
        )
        print(f"{row['variant']:44s}{row['pairs']:>7.3f}" + "".join(f"{cell:>18s}" for cell in cells))
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_clip_arguments(parser, rooms=12, keep_ratios=[0.3])
    parser.add_argument("--weights", default="auto", help='"auto" (default), a file, or a Hub id')
    return parse(parser, argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"ablation.py: {error}")
