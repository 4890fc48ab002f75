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
from collections.abc import Callable, Generator
from typing import Any
from unittest import mock

import torch
from quality import add_clip_arguments, header, load, make_row, measure, parse
from torch import Tensor
from tqdm import tqdm

from pacevggt_patch import PaceError, accelerate, remove, summary
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.method import few_keys, global_pruning
from pacevggt_patch.mini import build_mini
from pacevggt_patch.patching import global_attention
from pacevggt_patch.patching.install import state_of
from pacevggt_patch.runtime.attention import Repeats, attention
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


def thinned(every: int, frames: int, special: int, patches: int) -> Callable[..., Tensor]:
    """Attention that gives full-attention heads one in `every` patch tokens of a frame as keys, each counting so often.

    The first frame and special tokens stay whole. Which patch tokens are taken is shifted from frame to frame.
    """

    def attends(
        query: Tensor, key: Tensor, value: Tensor, counts: Any = None, scale: float | None = None
    ) -> Tensor:
        whole = frames * (special + patches)
        if counts is not None or not query.shape[2] == key.shape[2] == whole:
            return attention(query, key, value, counts, scale)
        frame = torch.arange(frames, device=key.device)[:, None]
        patch = torch.arange(patches, device=key.device)
        start = frame * (special + patches)
        alone = [(start + torch.arange(special, device=key.device)).flatten(), special + patch]
        taken = (patch + frame[1:]) % every == 0
        rest = (start[1:] + special + patch)[taken]
        index = torch.cat([*alone, rest])
        key, value = (t.index_select(2, index) for t in (key, value))
        return attention(query, key, value, Repeats(len(index) - len(rest), every), scale)

    return attends


def variants(frames: int, special: int, patches: int, kept: int, heads: int, full: int) -> dict[str, tuple]:
    """Name -> (places to swap, pairs of queries and keys over the unpruned model's)."""
    tokens, few = frames * (special + patches), frames * (special + kept)

    def pairs(keys: int, keys_of_full: int = tokens) -> float:
        return (full * tokens * keys_of_full + (heads - full) * few * keys) / (heads * tokens**2)

    def keys(of_frames: int) -> int:
        with mock.patch.object(few_keys, "FRAMES", of_frames):
            return few_keys.keys_of_clip(frames, special, patches, kept)

    found: dict[str, tuple] = {"shipped": ((), pairs(keys(few_keys.FRAMES)))}
    once = ((global_pruning, "few_keys", keys_once),)
    found["all kept tokens, each once"] = (once, pairs(few))
    counted = ((few_keys, "FRAMES", frames), (few_keys, "LONG", frames))
    found["all kept tokens, counted"] = (counted, pairs(few))
    for of_frames in (48, 12, 6):
        name = f"keys of {of_frames} frames in place of {few_keys.FRAMES}"
        found[name] = (((few_keys, "FRAMES", of_frames),), pairs(keys(of_frames)))
    for every in (2, 4):
        some = frames * special + patches + (frames - 1) * patches // every
        place = (global_attention, "attention", thinned(every, frames, special, patches))
        found[f"full-attention heads: one in {every} keys"] = ((place,), pairs(keys(few_keys.FRAMES), some))
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
