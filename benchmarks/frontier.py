"""Quality against cost: published rules of faster global attention and this package, on VGGT-mini and the same clips.

    python benchmarks/frontier.py --quick --out DIR         # rooms of 8 and 24 views, some minutes on two cores
    python benchmarks/frontier.py --lengths 8,24,96,300 --counts 24,12,6,3 --device cuda --out DIR
    python benchmarks/frontier.py --clips DIR --lengths 8 --stride 2 --starts 0,60,120 --out DIR

Cost is the number of pairs of queries and keys in global attention, over the unpruned model's. Merging, picking and
propagation are not in it. With --seconds, a report of peers_seconds.py, cost is time as well. Rules are those of
`peers`; clips and metrics are those of quality.py. The report is written after every row, and the same command goes on
where it was stopped. Figures show what is lost against cost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ablation import few_of, pairs_share
from arithmetic import Dimensions, stage_work, total
from peers import AVGGT, RULES, BlockSparse, FastVGGT, GoodTokens, LiteVGGT, Spark3R
from peers.runner import applied
from quality import Metrics, header, load, make_row, measure
from tqdm import tqdm

from pacevggt_patch import PaceError, PaceWeights, accelerate, calibrate, remove
from pacevggt_patch.clips import Clip
from pacevggt_patch.config import DEFAULT_KEEP_RATIO
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.mini import build_mini
from pacevggt_patch.patching.install import state_of
from pacevggt_patch.runtime.files import environment, write_json
from pacevggt_patch.runtime.plotting import load_pyplot, save_figure

SEED = 3_000_000  # of the first room: neither training nor the choice of any constant has seen these
UNPRUNED = "unpruned"
OURS = {"training-free": None, "calibrated": "calibrated", "bundled weights": "auto"}  # line -> weights
RATIOS = (0.75, 0.5, 0.3, 0.15)
# Of the training-free line, too: no more pairs than the published FastVGGT has in clips of so many frames.
MATCHED = {24: 0.28, 96: 0.48}
COUNTS, QUICK_COUNTS = {8: 24, 24: 12, 96: 6, 300: 3}, {8: 4, 24: 2}  # rooms of so many frames


@dataclass(frozen=True)
class Setting:
    """One row: a rule of `peers`, or this package at a keep ratio.

    Attributes:
        line: of the figure, which the setting is a point of.
        value: of what is swept along the line.
        rule: of `peers`; None is this package.
    """

    line: str
    value: float
    rule: Any = None


def settings(frames: int, quick: bool) -> list[Setting]:
    """What is measured on clips of so many frames; the published setting of a rule comes first.

    Both rules with blocks that attend within frames come without them, too: which blocks can do that differs from model
    to model, and VGGT-mini's early ones find matches.
    """
    found = [
        *(FastVGGT(merged) for merged in (0.9, 0.5, 0.25)),
        *(LiteVGGT(merged) for merged in (0.9, 0.5, 0.25)),
        *(AVGGT(side) for side in (2, 3)),
        *(AVGGT(side, early=0) for side in (2, 3, 4)),
        *(Spark3R(times) for times in (1, 2, 4)),
        # As many key frames as frames are no other setting than more of them.
        *(GoodTokens(count) for count in (25, 12, 6, 3) if count == 25 or count < frames),
        *(GoodTokens(count, in_frames=0) for count in (25, 12, 6, 3) if count == 25 or count < frames),
        *(BlockSparse(share) for share in (0.25, 0.5, 0.1)),
    ]
    rules = [Setting(line_of(rule), getattr(rule, rule.swept), rule) for rule in found]
    if quick:  # two of each line
        lines = dict.fromkeys(setting.line for setting in rules)
        rules = [one for line in lines for one in [each for each in rules if each.line == line][:2]]
    ours = [Setting(line, ratio) for line in OURS for ratio in RATIOS]
    matched = [Setting("training-free", MATCHED[frames])] if frames in MATCHED else []
    return rules + ours + matched


def line_of(rule: Any) -> str:
    """The line of a rule: its name, and whether blocks that attend within frames are left out."""
    without = 0 in (getattr(rule, "early", 1), getattr(rule, "in_frames", 1))
    return f"{rule.name}, all blocks global" if without else rule.name


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    load_pyplot()  # says what is missing before the work
    model = build_mini(args.checkpoint or True).to(args.device)
    model.point_head = None  # points of the metrics come from depth and cameras
    file = args.out / ("frontier-quick.json" if args.quick else "frontier.json")
    report = started(file, args)
    if args.clips != "rooms":
        for length in lengths(args):
            length.load()  # a window that is not there is said before the work
    work = {frames: settings(frames, args.quick) for frames in args.lengths}
    say_estimate(model, args, report, work)
    forwards = sum((1 + len(work[n])) * c for n, c in zip(args.lengths, args.counts, strict=True))
    with tqdm(total=forwards, unit="clip", disable=None) as bar:
        for length in lengths(args):
            measure_length(model, length, work[length.frames], report, file, bar)
    print_table(report)
    for key, name in (("auc30", "auc"), ("absrel", "absrel")):
        draw(report, key, PAIRS, args.out / f"frontier-{name}.png")
        if args.seconds:
            fast = with_speedups(report, args.seconds)
            draw(fast, key, speedup_of(fast), args.out / f"frontier-{name}-speedup.png")
    return 0


def parse_arguments(argv: list[str] | None) -> Namespace:
    """The arguments, with a number of clips for each length.

    Raises:
        PaceError: they do not fit together, or there is no place to write to.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def numbers(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument(
        "--quick", action="store_true", help="two points for each rule, on few rooms of 8 and 24 views"
    )
    parser.add_argument("--clips", default="rooms", help='"rooms", or a folder with images or a clip.json')
    parser.add_argument("--lengths", type=numbers, help="frames of clips (8,24,96,300; --quick: 8,24)")
    parser.add_argument("--counts", type=numbers, help="rooms of each length (24,12,6,3; --quick: 4,2)")
    parser.add_argument("--seed", type=int, default=SEED, help="of the first room")
    parser.add_argument("--stride", type=int, default=1, help="step between the frames of a folder")
    parser.add_argument("--starts", type=numbers, default=[0], help="first frames of windows of a folder")
    parser.add_argument("--checkpoint", type=Path, help="another VGGT-mini than the bundled one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--seconds", type=Path, metavar="FILE", help="a report of peers_seconds.py, for figures of speed-up"
    )
    args = parser.parse_args(argv)
    if args.seconds and not args.seconds.is_file():
        raise PaceError(f"--seconds {args.seconds} is no file: peers_seconds.py writes one")
    usual = QUICK_COUNTS if args.quick else COUNTS
    if args.clips == "rooms":
        args.lengths = args.lengths or list(usual)
        args.counts = args.counts or [usual.get(frames, 1) for frames in args.lengths]
    elif args.counts or not args.lengths:
        raise PaceError("a folder needs --lengths, and --starts in place of --counts")
    else:
        args.counts = [len(args.starts)] * len(args.lengths)
    if len(args.lengths) != len(args.counts) or len(set(args.lengths)) != len(args.lengths):
        raise PaceError(
            f"--lengths {args.lengths} and --counts {args.counts} must be as many, and no length twice"
        )
    if min(*args.lengths, *args.counts) < 1 or min(args.lengths) < 2:
        raise PaceError(f"--lengths {args.lengths} must be 2 or more, and --counts {args.counts} 1 or more")
    if not args.out.is_dir():
        raise PaceError(f"--out {args.out} is no folder: make it first")
    return args


@dataclass(frozen=True)
class Length:
    """The clips of one length: how many frames, what the report says of them, and what loads them."""

    frames: int
    of: dict[str, Any]
    load: Callable[[], list[Clip]]


def lengths(args: Namespace) -> Iterator[Length]:
    """The lengths that are measured, one after another."""
    for frames, count in zip(args.lengths, args.counts, strict=True):
        these = Namespace(**{**vars(args), "frames": frames, "count": count})
        of = {
            key: header(these, count)[key]
            for key in ("clips", "count", "frames", "seeds", "starts", "stride")
        }
        yield Length(frames, of, lambda these=these: [clip.to(these.device) for clip in load(these)])


def started(file: Path, args: Namespace) -> dict[str, Any]:
    """The report so far, or an empty one.

    Raises:
        PaceError: a file is there that is no report, or one of other clips.
    """
    new: dict[str, Any] = {
        "environment": environment(args.device),
        "backbone": "vggt-mini",
        "checkpoint": args.checkpoint and args.checkpoint.name,
        "quick": args.quick,
        "lengths": [length.of for length in lengths(args)],
        "rows": [],
    }
    if not file.exists():
        return new
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
        same = all(old[key] == new[key] for key in ("backbone", "quick", "checkpoint", "lengths"))
        known = {(row["line"], row["value"], row["frames"]) for row in old["rows"]}
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise PaceError(f"{file} is there and no report of this script: take another --out") from error
    if not same:
        raise PaceError(
            f"{file} is of other clips than those given: take another --out, or the same arguments"
        )
    print(f"{file}: goes on behind {len(known)} rows", file=sys.stderr)
    return old


def say_estimate(model: Any, args: Namespace, report: dict[str, Any], work: dict[int, list[Setting]]) -> None:
    """Tell how long it will take at most, by one forward of the shortest clip and the arithmetic of the others."""
    shortest = min(args.lengths)
    images = next(iter(load(Namespace(**{**vars(args), "frames": shortest, "count": 1})))).images
    images = images.to(args.device)
    grid = tuple(size // model.aggregator.patch_size for size in images.shape[-2:])
    dims = Dimensions.of(model, 4, 4)

    def flops(frames: int) -> float:
        return total(stage_work(dims, frames, grid, math.prod(grid))).flops

    begin = time.monotonic()
    with torch.inference_mode():
        model(images)["depth"].sum().item()  # waits for the device
    seconds = time.monotonic() - begin
    left = sum(
        count
        * (1 + len(work[frames]) - sum(row["frames"] == frames for row in report["rows"]))
        * flops(frames)
        for frames, count in zip(args.lengths, args.counts, strict=True)
    )
    minutes = seconds * left / flops(shortest) / 60
    print(
        f"about {max(1, math.ceil(minutes))} min, if rules are no faster than the stock model",
        file=sys.stderr,
    )


def measure_length(
    model: Any, length: Length, work: list[Setting], report: dict[str, Any], file: Path, bar: Any
) -> None:
    """Add the rows of clips of one length to the report, and write it after each."""
    done = {(row["line"], row["value"]): row for row in report["rows"] if row["frames"] == length.frames}
    if len(done) == 1 + len(work):
        bar.update(len(done) * length.of["count"])
        return
    clips = length.load()

    def add(
        line: str, value: float, found: list[Metrics], unpruned: list[Metrics], more: dict[str, Any]
    ) -> None:
        head = {"line": line, "value": value, "frames": length.frames, **more}
        report["rows"].append(make_row(head, found, unpruned))
        write_json(file, report)

    if (UNPRUNED, 1.0) in done:
        unpruned = done[UNPRUNED, 1.0]["per_clip"]
        bar.update(len(clips))
    else:
        unpruned = measure(model, clips, bar)
        add(UNPRUNED, 1.0, unpruned, unpruned, {"pairs": 1.0})
    weights = calibrated(model, clips[0].images)
    for setting in work:
        if (setting.line, setting.value) in done:
            bar.update(len(clips))
            continue
        bar.set_postfix_str(f"{length.frames} frames, {setting.line} {setting.value:g}")
        with running(model, setting, clips[0], weights) as more:
            found = measure(model, clips, bar)
            add(setting.line, setting.value, found, unpruned, more())


def calibrated(model: Any, images: torch.Tensor) -> PaceWeights:
    """Weights by evenly spread frames of a clip [S, 3, H, W], as the first clip of a model gives them."""
    return calibrate(model, few_of(images))


@contextlib.contextmanager
def running(
    model: Any, setting: Setting, clip: Clip, weights: PaceWeights
) -> Generator[Callable[[], dict[str, Any]]]:
    """Inside, the model runs as the setting says. Gives what the row says of it, once clips have run."""
    if setting.rule is not None:
        with applied(model, setting.rule) as pairs:
            rule = setting.rule
            yield lambda: {"pairs": pairs.share, "swept": rule.swept, "paper": rule.paper}
        return
    chosen = OURS[setting.line]
    accelerate(model, setting.value, weights=weights if chosen == "calibrated" else chosen, min_frames=1)
    try:
        share = share_of_ours(model, *clip.images.shape[:1], *clip.images.shape[-2:])
        yield lambda: {"pairs": share, "swept": "keep_ratio", "paper": None}
    finally:
        remove(model)


def share_of_ours(model: Any, frames: int, height: int, width: int) -> float:
    """Pairs of an accelerated model in global attention, over the unpruned model's, for a clip of that size."""
    state, host = state_of(model), find_host(model)
    patch, spec = int(model.aggregator.patch_size), host.spec()
    patches = (height // patch) * (width // patch)
    full = 0 if state.weights is None else len(state.weights.full_heads)
    kept = state.config.kept_tokens(patches)
    return pairs_share(frames, host.special_tokens, patches, kept, spec.depth * spec.num_heads, full)


def print_table(report: dict[str, Any]) -> None:
    print(
        f"{'frames':>6s}  {'rule':42s}{'value':>6s}{'pairs':>8s}{'AUC@30':>18s}{'AbsRel':>18s}   change in percent"
    )
    for row in report["rows"]:
        cells = [
            "-" if row[f"{key}_change"] is None else f"{row[f'{key}_change']:+.1f}{error_of(row, key)}"
            for key in ("auc30", "absrel")
        ]
        print(
            f"{row['frames']:>6d}  {row['line']:42s}{row['value']:>6g}{row['pairs']:>8.1%}"
            + "".join(f"{cell:>18s}" for cell in cells)
        )


def error_of(row: dict[str, Any], key: str) -> str:
    """The standard error of a change in brackets; nothing for a single clip."""
    error = row[f"{key}_change_error"]
    return "" if error is None else f" ({error:.1f})"


def with_speedups(report: dict[str, Any], file: Path) -> dict[str, Any]:
    """The report with those rows alone whose setting was timed at that length, each with its `speedup`.

    Args:
        report: of this script.
        file: of peers_seconds.py. Bundled weights take the time of calibrated ones.
    """
    timed = json.loads(file.read_text(encoding="utf-8"))
    speedups = {(row["line"], row["value"], row["frames"]): row["speedup"] for row in timed["rows"]}

    def speedup(row: dict[str, Any]) -> float | None:
        line = "calibrated" if row["line"] == "bundled weights" else row["line"]
        return speedups.get((line, row["value"], row["frames"]))

    rows = [row | {"speedup": speedup(row)} for row in report["rows"]]
    rows = [row for row in rows if row["speedup"] is not None]
    return report | {"rows": rows, "attention": timed["attention"]}


@dataclass(frozen=True)
class Cost:
    """What is on the horizontal axis: a field of rows, times `times`.

    Attributes:
        where: better points lie.
    """

    key: str
    times: float
    label: str
    where: str
    ticks: tuple[float, ...]


PAIRS = Cost(
    "pairs",
    100,
    "pairs of queries and keys, percent of the unpruned model's",
    "lower and further left",
    (1, 2, 5, 10, 20, 50, 100),
)
SPEEDUP = Cost(
    "speedup",
    1,
    "speed-up of a model of VGGT-1B's shape",
    "lower and further right",
    (0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30),
)


def speedup_of(report: dict[str, Any]) -> Cost:
    """Speed-up as a cost, which says where attention of ours ran on another kernel than that of all others."""
    more = "\n(ours with FlashAttention-3)" if "flash-attention 3" in report["attention"] else ""
    return replace(SPEEDUP, label=SPEEDUP.label + more)


LOST = {
    "auc30": ("AUC@30 lost, percent", -1),
    "absrel": ("AbsRel worse by, percent", 1),
}
DEFAULT_LINES = ("calibrated", "bundled weights")
OUR_STYLE = {
    "training-free": ("#9ecae1", "s"),
    "calibrated": ("#3182bd", "o"),
    "bundled weights": ("#08306b", "D"),
}
COLORS = ("#d62728", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#7f7f7f")
MARKERS = ("v", "^", "<", ">", "P", "X")
LEAST_SHOWN = -0.5  # bars of chance may go on below
TICKS = (-20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def draw(report: dict[str, Any], key: str, cost: Cost, path: Path) -> None:
    """What is lost of a metric against cost, a panel for each length and a line for each rule; ours are bold.

    Losses have a linear scale up to one percent and a logarithmic one beyond. Bars are standard errors over clips.
    """
    pyplot = load_pyplot()
    label, sign = LOST[key]
    rows = [row for row in report["rows"] if row["line"] != UNPRUNED and row[f"{key}_change"] is not None]
    if not rows:
        print(f"{path.name} is not drawn: these clips have no truth for {label}", file=sys.stderr)
        return
    panels = sorted({row["frames"] for row in rows})
    columns = min(2, len(panels))
    figure, axes = pyplot.subplots(
        -(-len(panels) // columns),
        columns,
        figsize=(5.2 * columns + 1.5, 4.4 * -(-len(panels) // columns)),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    lines = list(dict.fromkeys(row["line"] for row in rows))
    lowest = min(sign * row[f"{key}_change"] for row in rows)
    for axis, frames in zip(axes.flat, panels, strict=False):
        for line in lines:
            points = [row for row in rows if (row["line"], row["frames"]) == (line, frames)]
            points.sort(key=lambda row: row[cost.key])
            axis.errorbar(
                [cost.times * row[cost.key] for row in points],
                [sign * row[f"{key}_change"] for row in points],
                [row[f"{key}_change_error"] or 0.0 for row in points],
                label=named(line),
                **style(line, lines),
            )
        axis.set(xscale="log", xlabel=cost.label)
        axis.set_yscale("symlog", linthresh=1)
        axis.axhline(0, color="black", linewidth=0.8)
        default = [
            row
            for row in rows
            if row["frames"] == frames and row["line"] in DEFAULT_LINES and row["value"] == DEFAULT_KEEP_RATIO
        ]
        if default:
            axis.plot(
                [cost.times * row[cost.key] for row in default],
                [sign * row[f"{key}_change"] for row in default],
                "o",
                markersize=14,
                markerfacecolor="none",
                markeredgecolor="black",
                label=f"keep ratio {DEFAULT_KEEP_RATIO:g}, the default",
            )
        low, high = axis.get_ylim()
        high *= 1.3
        low = max(low, min(LEAST_SHOWN, 1.4 * lowest))
        axis.set_ylim(low, high)
        axis.set_yticks([tick for tick in TICKS if low <= tick <= high])
        axis.yaxis.set_major_formatter("{x:g}")
        costs = [cost.times * row[cost.key] for row in rows if row["frames"] == frames]
        axis.set_xticks([x for x in cost.ticks if min(costs) / 1.5 < x < 1.5 * max(costs)])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        (of,) = (one for one in report["lengths"] if one["frames"] == frames)
        several = "s" * (of["count"] > 1)
        what = f"room{several}" if of["clips"] == "rooms" else f"window{several} of {of['clips']}"
        axis.set_title(f"{of['count']} {what}, {frames} views", fontsize=10)
    for row_of_axes in axes:
        row_of_axes[0].set_ylabel(label)
    known = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(known.values(), known.keys(), loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle(f"VGGT-mini: what faster global attention loses ({cost.where} is better)", fontsize=11)
    save_figure(figure, path)


def named(line: str) -> str:
    """What a line is called in the figure."""
    return f"pacevggt-patch, {line}" if line in OURS else line


def style(line: str, lines: list[str]) -> dict[str, Any]:
    """How a line is drawn. A rule without its frame blocks has the colour of the rule, and dashes."""
    if line in OURS:
        color, marker = OUR_STYLE[line]
        return {
            "color": color,
            "marker": marker,
            "linewidth": 2.8,
            "markersize": 7,
            "zorder": 3,
            "elinewidth": 1.2,
        }
    names = [rule.name for rule in RULES]
    base = next(name for name in names if line.startswith(name))
    number, whole = names.index(base), line == base
    return {
        "color": COLORS[number],
        "marker": MARKERS[number],
        "linestyle": "-" if whole else "--",
        "markerfacecolor": COLORS[number] if whole else "white",
        "linewidth": 1.2,
        "markersize": 6,
        "elinewidth": 0.8,
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"frontier.py: {error}")
    except KeyboardInterrupt:
        sys.exit("frontier.py: stopped; the same command goes on behind the last row that was written")
