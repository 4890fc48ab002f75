"""What each part of the method is worth: VGGT-mini with one part changed at a time, on clips of one length.

    python benchmarks/ablation.py --study selection --frames 24 --count 12 --json FILE
    python benchmarks/ablation.py --study keys --frames 96 --count 6 --weights runs/train/calibrated.safetensors

| study       | what is changed                                                                        |
|-------------|----------------------------------------------------------------------------------------|
| selection   | which tokens of a frame are kept                                                       |
| propagation | what dropped tokens take from kept ones                                                |
| heads       | how many heads see all tokens: those that lose most by calibration's measure           |
| weights     | what calibration and training add                                                      |
| keys        | how many keys there are, for which of them count, and which full-attention heads see   |
| merging     | what pre-AA pruning does with tokens that it does not keep                             |

Unless --weights says more, full-attention heads are those of calibration on the first of the clips, and nothing is
trained. `pairs` are the pairs of queries and keys of all global blocks, over those of the unpruned model. Clips and
metrics are those of quality.py. The report is written after every row.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from quality import add_clip_arguments, header, make_row, measure, model_and_clips, parse
from torch import Tensor
from tqdm import tqdm

from pacevggt_patch import PaceError, PaceWeights, accelerate, calibrate, remove
from pacevggt_patch.calibration.full_heads import find_full_heads
from pacevggt_patch.config import GLOBAL, PRE_AA, PaceConfig
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.method import few_keys, global_pruning, propagation, scoring, selection
from pacevggt_patch.method.full_heads import LEAST_ERROR
from pacevggt_patch.patching import state
from pacevggt_patch.patching.first_clip import MOST_FRAMES
from pacevggt_patch.patching.install import state_of
from pacevggt_patch.runtime.files import write_json

RANDOM_DRAWS = 3
HEAD_COUNTS = (0, 1, 2, 3, 4, 5, 6, 8, 12, 32)

Places = tuple[tuple[Any, str, Any], ...]  # of modules: the module, a name in it, and what it means instead


@dataclass(frozen=True)
class Variant:
    """One row.

    Attributes:
        name: what is changed.
        places: what it swaps.
        more: arguments of `accelerate` beside the keep ratio.
        says: fields of its row.
    """

    name: str
    places: Places = ()
    more: dict[str, Any] = field(default_factory=dict)
    says: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """What the variants of a study are made for.

    Attributes:
        model: unpruned.
        images: [S, 3, H, W], of the first clip.
        frames, special, patches, kept: S, n, P and K of a clip.
        heads: of all global blocks together.
        weights: to start from.
    """

    model: Any
    images: Tensor
    frames: int
    special: int
    patches: int
    kept: int
    heads: int
    weights: PaceWeights | None

    @property
    def full(self) -> int:
        """How many full-attention heads the weights have."""
        return 0 if self.weights is None else len(self.weights.full_heads)

    def pairs(self, full: int | None = None, once: bool = False) -> float:
        """`pairs_share` of these clips."""
        full = self.full if full is None else full
        return pairs_share(self.frames, self.special, self.patches, self.kept, self.heads, full, once)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    model, clips = model_and_clips(args)
    ratio, rows = args.keep_ratios[0], []
    subject = make_subject(model, clips[0].images, ratio, args)
    tried = STUDIES[args.study](subject)
    report: dict[str, Any] = {
        **header(args, len(clips)),
        "study": args.study,
        "weights": None if subject.weights is None else subject.weights.source,
        "rows": rows,
    }
    with tqdm(total=(1 + len(tried)) * len(clips), unit="clip", disable=None) as bar:
        unpruned = measure(model, clips, bar)
        rows.append(make_row({"variant": "unpruned", "keep_ratio": 1.0, "pairs": 1.0}, unpruned, unpruned))
        for variant in tried:
            arguments: dict[str, Any] = {"weights": subject.weights, "mode": GLOBAL} | variant.more
            with swapped(*variant.places):
                accelerate(model, ratio, min_frames=1, **arguments)
                found = measure(model, clips, bar)
                remove(model)
            head = {"variant": variant.name, "keep_ratio": ratio, "pairs": None, **variant.says}
            rows.append(make_row(head, found, unpruned))
            if args.json:
                write_json(args.json, report)
    print_table(report)
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_clip_arguments(parser, rooms=12, keep_ratios=[0.3])
    parser.add_argument("--study", choices=STUDIES, default="keys")
    parser.add_argument(
        "--weights", help='"auto", a file, or a Hub id (calibrated on the first clip if not given)'
    )
    return parse(parser, argv)


def make_subject(model: Any, images: Tensor, ratio: float, args: argparse.Namespace) -> Subject:
    """What the variants are made for: clips like `images` [S, 3, H, W], and weights for the model."""
    host = find_host(model)
    spec, side = host.spec(), int(model.aggregator.patch_size)
    patches = (images.shape[-2] // side) * (images.shape[-1] // side)
    if args.weights is None:
        weights = calibrate(model, few_of(images))
    else:
        weights = state_of(accelerate(model, ratio, weights=args.weights)).weights
        remove(model)
    kept = PaceConfig(ratio).kept_tokens(patches)
    heads = spec.depth * spec.num_heads
    return Subject(model, images, len(images), host.special_tokens, patches, kept, heads, weights)


def few_of(images: Tensor) -> Tensor:
    """Evenly spread frames of a clip [S, 3, H, W], as many as the first clip of a model is calibrated on at most."""
    return images[:: -(-len(images) // MOST_FRAMES)]


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


# Which tokens are kept. Each rule is of features [N, P, C], a grid and K, and gives indices [N, K], ascending.


def best(score: Callable[[Tensor, tuple[int, int]], Tensor]) -> Callable[..., Tensor]:
    """The K best tokens of each frame by scores [N, P] of features and a grid."""

    def keep(features: Tensor, grid: tuple[int, int], keep: int, scorer: Any = None) -> Tensor:
        return score(features, grid).topk(keep, dim=1).indices.sort(1).values

    return keep


def covering(
    distinct: float, of: Callable[[Tensor], Tensor] = lambda features: features
) -> Callable[..., Tensor]:
    """Farthest point sampling as `scoring` has it, with another weight of distinctness, on other features."""

    def keep(features: Tensor, grid: tuple[int, int], keep: int, scorer: Any = None) -> Tensor:
        even = torch.ones(features.shape[:2], device=features.device)
        scores = scoring.coverage_scores(of(features), even, grid, keep, distinct)
        return selection.assign(scores[None], keep, 0).kept[0]

    return keep


def evenly(features: Tensor, grid: tuple[int, int], keep: int, scorer: Any = None) -> Tensor:
    """Every P/K-th token in raster order, shifted from frame to frame."""
    frames, patches = features.shape[:2]
    at = torch.arange(keep, device=features.device) * patches // keep
    shift = torch.arange(frames, device=features.device)[:, None]
    return ((at + shift) % patches).sort(1).values


def distinct_scores(features: Tensor, grid: tuple[int, int]) -> Tensor:
    unit = F.normalize(features.float(), dim=-1)
    return scoring.distinctness(1 - unit @ unit.mT, grid)


def atypical_scores(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """How far each token is from the mean of its frame."""
    unit = F.normalize(features.float(), dim=-1)
    return 1 - (unit * F.normalize(unit.mean(1, keepdim=True), dim=-1)).sum(-1)


def random_scores(seed: int) -> Callable[[Tensor, tuple[int, int]], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def scores(features: Tensor, grid: tuple[int, int]) -> Tensor:
        # The trunk may run with a GPU as the default device.
        return torch.rand(features.shape[:2], generator=generator, device="cpu").to(features.device)

    return scores


def selection_study(subject: Subject) -> list[Variant]:
    rules: dict[str, Callable[..., Tensor] | None] = {
        "shipped: coverage and distinctness": None,
        "coverage alone": covering(0.0),
        "coverage of features, not of places": covering(0.0),
        "coverage of places, not of features": covering(0.0, torch.ones_like),
        "the most distinct, no coverage": best(distinct_scores),
        "the least typical, no coverage": best(atypical_scores),
        "evenly spread": evenly,
    }
    rules |= {f"random, draw {seed}": best(random_scores(seed)) for seed in range(RANDOM_DRAWS)}
    found, pairs = [], {"pairs": subject.pairs()}
    for name, rule in rules.items():
        places: Places = () if rule is None else ((state, "keep_best", rule),)
        if name.startswith("coverage of features"):
            places += ((scoring, "SPATIAL_WEIGHT", 0.0),)
        found.append(Variant(name, places, says=pairs))
    return found


# What dropped tokens take.


def no_slope(x: Tensor, y: Tensor, exchange: Any = None) -> Tensor:
    """A regression that says nothing."""
    return x.new_zeros(len(x), y.shape[-1], x.shape[-1])


def propagates(change: Callable[[Tensor], Tensor]) -> Callable[..., propagation.Propagation]:
    """As `make_propagation`, with other weights [N, n + P, c] in place of each token's."""

    def make(*arguments: Any) -> propagation.Propagation:
        found = propagation.make_propagation(*arguments)
        return found._replace(columns=change(found.columns))

    return make


def nearest_alone(columns: Tensor) -> Tensor:
    """All of what a token takes from the kept one that it takes most from."""
    return F.one_hot(columns.argmax(-1), columns.shape[-1]).to(columns.dtype)


def propagation_study(subject: Subject) -> list[Variant]:
    no_regression = (propagation, "regress", no_slope)
    mean = (
        state,
        "make_propagation",
        propagates(lambda columns: columns.where(columns == 0, 1 / subject.kept)),
    )
    nearest = (state, "make_propagation", propagates(nearest_alone))
    nothing = (state, "make_propagation", propagates(torch.zeros_like))
    tried: dict[str, Places] = {
        "shipped: interpolation and regression": (),
        "interpolation, no regression": (no_regression,),
        "the nearest kept token alone, and regression": (nearest,),
        "the nearest kept token alone, no regression": (nearest, no_regression),
        "regression and its mean error in the frame": (mean,),
        "nothing: dropped tokens stay as they are": (nothing, no_regression),
    }
    return [Variant(name, places, says={"pairs": subject.pairs()}) for name, places in tried.items()]


# How many heads see all tokens.


def heads_study(subject: Subject) -> list[Variant]:
    model = subject.model
    accelerate(model, weights=None, min_frames=1)
    chosen, errors = find_full_heads(model, [few_of(subject.images)[None]])
    remove(model)
    host, width, order = find_host(model), errors.shape[1], errors.flatten().argsort(descending=True).tolist()
    found = []
    for count in (count for count in HEAD_COUNTS if count <= len(order)):
        some = tuple(sorted((i // width, i % width) for i in order[:count]))
        least = errors.flatten()[order[count - 1]].item() if count else None
        shipped = " (shipped)" if some == chosen else ""
        weights = PaceWeights.of_heads(host, some, {})
        says = {
            "pairs": subject.pairs(count),
            "full_heads": [list(head) for head in some],
            "least_error": least,
            "chosen": bool(shipped),
        }
        found.append(
            Variant(f"{count} head{'s' * (count != 1)}{shipped}", more={"weights": weights}, says=says)
        )
    if not any(variant.says["chosen"] for variant in found):
        says = {"pairs": subject.pairs(len(chosen)), "least_error": LEAST_ERROR, "chosen": True}
        weights = PaceWeights.of_heads(host, chosen, {})
        found.append(Variant(f"{len(chosen)} heads (shipped)", more={"weights": weights}, says=says))
    return found


# What calibration and training add.


def weights_study(subject: Subject) -> list[Variant]:
    calibrated = subject.weights
    whole = state_of(accelerate(subject.model, weights="auto")).weights
    remove(subject.model)
    if whole is None or whole.block_deltas is None or calibrated is None:
        raise PaceError("the bundled weights do not fit this model: leave --checkpoint out")
    deltas = whole.block_deltas
    tried: dict[str, PaceWeights | None] = {
        "training-free": None,
        "calibrated: full-attention heads": calibrated,
        "bundled: heads and block deltas": whole,
        "bundled, its heads alone": replace(whole, block_deltas=None, scorer=None),
        "bundled, its deltas alone": replace(whole, full_heads=()),
        **{
            f"bundled, deltas of rank {rank}": replace(whole, block_deltas=deltas.nearest(rank))
            for rank in (1, 2)
            if rank < deltas.rank
        },
    }
    return [
        Variant(
            name,
            more={"weights": some},
            says={"pairs": subject.pairs(0 if some is None else len(some.full_heads))},
        )
        for name, some in tried.items()
    ]


# Which keys there are.


def keys_once(propagation: Any, batch: int = 1, exchange: Any = None) -> None:
    """All kept tokens are keys, each counts once."""


def keys_study(subject: Subject) -> list[Variant]:
    found = []

    def changed(name: str, once: bool = False, **constants: int) -> None:
        places: Places = tuple((few_keys, constant, value) for constant, value in constants.items())
        if once:
            places += ((global_pruning, "few_keys", keys_once),)
        with swapped(*places):
            found.append(Variant(name, places, says={"pairs": subject.pairs(once=once)}))

    frames = subject.frames
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


# What pre-AA pruning merges.


def even_quotas(saliency: Tensor, total: int, cap: int) -> Tensor:
    """As many merges in each frame of [B, S], the first ones take what is left over."""
    frames = saliency.shape[-1]
    each = torch.full(saliency.shape, total // frames, dtype=torch.long, device=saliency.device)
    each[:, : total % frames] += 1
    return each


def merging_study(subject: Subject) -> list[Variant]:
    def pre_aa(name: str, merge: float | None, places: Places = ()) -> Variant:
        return Variant(name, places, more={"weights": None, "mode": PRE_AA, "merge_budget": merge})

    even = ((selection, "merge_quotas", even_quotas),)
    found = [pre_aa("all others merged", None), pre_aa("none merged", 0.0)]
    for budget in (0.2, 0.4):
        found.append(pre_aa(f"{budget:g} of all merged, shared by scores", budget))
        found.append(pre_aa(f"{budget:g} of all merged, as many in each frame", budget, even))
    return found


STUDIES: dict[str, Callable[[Subject], list[Variant]]] = {
    "keys": keys_study,
    "selection": selection_study,
    "propagation": propagation_study,
    "heads": heads_study,
    "weights": weights_study,
    "merging": merging_study,
}


def print_table(report: dict[str, Any]) -> None:
    print(
        f"{'variant':48s}{'pairs':>7s}{'AUC@30':>18s}{'AbsRel':>18s}   change in percent (its standard error)"
    )
    for row in report["rows"][1:]:
        cells = []
        for key in ("auc30", "absrel"):
            change, error = row[f"{key}_change"], row[f"{key}_change_error"]
            cells.append(
                "-" if change is None else f"{change:+.1f}" + ("" if error is None else f" ({error:.1f})")
            )
        pairs = "-" if row["pairs"] is None else f"{row['pairs']:.3f}"
        print(f"{row['variant']:48s}{pairs:>7s}" + "".join(f"{cell:>18s}" for cell in cells))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"ablation.py: {error}")
