"""The `pacevggt` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from ..config import DEFAULT_KEEP_RATIO, GLOBAL, MODES
from ..errors import PaceError
from ..runtime.plotting import install_hint
from ..runtime.ranks import place_of_torchrun, processes_of_torchrun, said_by_first
from ..version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except PaceError as error:
        return failed(str(error))
    except ImportError as error:
        return failed(f"{error}; {install_hint(arguments.extra)}")
    except KeyboardInterrupt as stop:
        what = str(stop) or "interrupted; files already reported as written are whole"
        print(f"pacevggt: {what}", file=sys.stderr)
        return getattr(stop, "status", 130)


def failed(text: str) -> int:
    """Say what went wrong; of several processes each says its own, and the first one what went wrong in all.

    Returns:
        The exit status.
    """
    who = ""
    with suppress(PaceError):  # of torchrun's variables, which is said where they are needed
        rank, world = place_of_torchrun()
        who = f" (rank {rank})" if world > 1 else ""
    if not said_by_first(text):
        print(f"pacevggt{who}: {text}", file=sys.stderr)
    return 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pacevggt", description="Accelerate VGGT and its siblings by pruning patch tokens."
    )
    parser.add_argument("--version", action="version", version=f"pacevggt-patch {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")
    parser.set_defaults(run=help_command, parser=parser)

    add_compare(commands)
    add_demo(commands)
    add_evaluate(commands)
    add_view(commands)
    add_train(commands)
    add_push(commands)
    cache = commands.add_parser(
        "cache",
        help="show or clear the calibrations that are kept on this machine",
        description="Show or delete the calibrations that were made on the first clip of a model. They lie in "
        "$PACEVGGT_CACHE, or in ~/.cache/pacevggt if that is not set. PACEVGGT_CACHE=off keeps none.",
    )
    cache.add_argument("--clear", action="store_true", help="delete them")
    cache.set_defaults(run=cache_command, extra="compare")
    env = commands.add_parser(
        "env",
        help="describe this machine, for a report of a fault",
        description="Print versions, GPUs, attention kernels, optional libraries and environment variables. No model "
        "is loaded, and paths have ~ for your home.",
    )
    env.add_argument("--json", action="store_true", help="print JSON")
    env.set_defaults(run=env_command, extra="compare")
    return parser


def add_compare(commands) -> None:
    compare = commands.add_parser(
        "compare",
        help="run a model stock and accelerated on your own clips: how much faster, how far apart",
        description="Run a model stock and accelerated, in turn, on your own clips. Tells how much faster it is, how "
        "much memory it takes, how far cameras, depth and points are from stock, and from the truth where a clip has "
        "it. Prints a table and writes report.json and report.html, a page to look at in a browser. Several GPUs: "
        "torchrun --nproc-per-node N -m pacevggt_patch compare ...",
    )
    add_backbone(compare)
    compare.add_argument(
        "--clip",
        action="append",
        default=[],
        metavar="PATH",
        help="folder of images, folder with a clip.json, or video; give it again for more clips (the bundled clip)",
    )
    add_comparison(compare, "runs/compare")
    compare.set_defaults(run=compare_command)


def add_demo(commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="compare with VGGT-mini and the bundled clip",
        description="`pacevggt compare` with VGGT-mini and the bundled clip, written to runs/demo.",
    )
    demo.add_argument(
        "--clip", action="append", default=[], metavar="PATH", help="another clip, as in `pacevggt compare`"
    )
    add_comparison(demo, "runs/demo")
    demo.set_defaults(run=compare_command, backbone="mini")


def add_backbone(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backbone",
        default="mini",
        help='"mini" (default), a checkpoint file, a Hub id such as facebook/VGGT-1B, or another family (pi3, '
        "pi3x, vggt-omega, depth-anything-3), after a colon with a checkpoint: pi3:yyfz233/Pi3",
    )


def add_comparison(parser: argparse.ArgumentParser, out: str) -> None:
    """The options of `compare` that `demo` has, too."""
    add_settings(parser)
    add_run_options(
        parser,
        "frames of a clip, evenly spaced (all, up to 24 on the CPU, which takes minutes for more, and up to 100 on a "
        "GPU)",
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed runs of each, in turn (3)")
    add_compile(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path(out), help=f"folder for the report ({out})"
    )
    parser.add_argument("--colmap", type=Path, metavar="DIR", help="write a COLMAP model of each side there")
    parser.add_argument("--ply", action="store_true", help="write the point cloud of each side as PLY")
    parser.set_defaults(extra="compare")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The settings that are run beside stock."""
    parser.add_argument(
        "--keep-ratios",
        type=numbers,
        default=(DEFAULT_KEEP_RATIO,),
        metavar="R,R",
        help="shares of patch tokens kept, one after another (0.3)",
    )
    parser.add_argument(
        "--modes",
        type=words,
        default=(None,),
        metavar="MODE,MODE",
        help=f"what is pruned: {', '.join(MODES)} (that of the weights); each is run with each keep ratio",
    )
    parser.add_argument(
        "--merge-budget",
        type=float,
        metavar="M",
        help="of pre-aa: share of patch tokens merged into kept ones (all others)",
    )


def add_run_options(parser: argparse.ArgumentParser, frames: str) -> None:
    """What commands that run a model run, and on what; `frames` is the help of that option."""
    parser.add_argument(
        "--weights", default="auto", help='"auto" (default), "none" (training-free), a file, a Hub id'
    )
    parser.add_argument("--frames", type=int, metavar="N", help=frames)
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one if not given)")
    parser.add_argument(
        "--precision",
        metavar="PRECISION",
        help="float32 (default on the CPU), autocast to bfloat16 (default on a GPU), or bfloat16 weights",
    )


def add_compile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the accelerated model, which takes a minute or so; made for GPUs",
    )


def add_evaluate(commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="run a model stock and accelerated on every scene of ScanNet, 7-Scenes or a folder, against the truth",
        description="Run a VGGT, or a model of another family, stock and accelerated on every scene of a data set, and "
        "compare the cameras, depth and points of both with its ground truth. Writes a JSON for each scene when it "
        "ends, and summary.json, summary.md and changes.png. The same command goes on after an interruption. Several "
        "GPUs: torchrun --nproc-per-node N -m pacevggt_patch evaluate ...",
    )
    evaluate.add_argument("data", type=Path, metavar="DATA", help="folder of scenes, or of one scene")
    evaluate.add_argument(
        "--dataset",
        required=True,
        metavar="NAME",
        help="scannet (exported frames), 7scenes, or folder (of folders with a clip.json that has cameras)",
    )
    add_backbone(evaluate)
    add_settings(evaluate)
    add_run_options(evaluate, "frames of a scene (every K-th one with --stride K, else it must be given)")
    evaluate.add_argument(
        "--stride", type=int, default=1, metavar="K", help="take every K-th frame alone (1)"
    )
    evaluate.add_argument(
        "--protocol",
        default="corrected",
        metavar="NAME",
        help="corrected (default), or published: the one of ScanNet that papers share, with its faults",
    )
    evaluate.add_argument("--scenes", type=Path, metavar="FILE", help="names of the scenes, one a line (all)")
    evaluate.add_argument(
        "--most-scenes", type=int, metavar="N", help="at most so many scenes, evenly spaced by name (all)"
    )
    evaluate.add_argument(
        "--meshes",
        type=Path,
        metavar="DIR",
        help="of published: folder with SCENE/SCENE_vh_clean_2.ply (the folder of each scene)",
    )
    evaluate.add_argument(
        "--width",
        type=int,
        metavar="PIXELS",
        help="of the frames (224 for VGGT-mini, else 518, or 512 where patches have 16 pixels)",
    )
    add_compile(evaluate)
    evaluate.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("runs/evaluate"),
        help="folder for the results (runs/evaluate)",
    )
    evaluate.set_defaults(run=evaluate_command, extra="eval")


def add_view(commands) -> None:
    view = commands.add_parser(
        "view",
        help="look at the points of both in a browser",
        description="Run a model once stock and once accelerated, and serve both point clouds and their cameras to a "
        "browser, with a switch between them. Ctrl-C ends it.",
    )
    add_backbone(view)
    view.add_argument(
        "--clip",
        metavar="PATH",
        help="folder of images, folder with a clip.json, or video (the bundled clip)",
    )
    view.add_argument("--keep-ratio", type=float, default=DEFAULT_KEEP_RATIO, metavar="R", help="(0.3)")
    view.add_argument("--mode", metavar="MODE", help=f"{' or '.join(MODES)} (that of the weights)")
    add_run_options(
        view,
        "frames of a clip, evenly spaced (all, up to 24 on the CPU, which takes minutes for more, and up to 100 on a "
        "GPU)",
    )
    view.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (127.0.0.1, this machine alone)"
    )
    view.add_argument("--port", type=int, default=8080, help="(8080, or the next free one)")
    view.set_defaults(run=view_command, extra="view")


def numbers(text: str) -> tuple[float, ...]:
    """Numbers that commas part."""
    return tuple(float(part) for part in text.split(","))


def words(text: str) -> tuple[str, ...]:
    """Words that commas part."""
    return tuple(part.strip() for part in text.split(","))


def add_train(commands) -> None:
    train = commands.add_parser(
        "train",
        help="train pace weights for a VGGT on your own images",
        description="Train scorer, merge, block deltas and restoration for a VGGT on your own images, without labels. "
        "Calibrates, distils, refines. Writes pace.safetensors, report.json, curve.png and state.pt. --resume goes on "
        "from state.pt, after Ctrl-C or SIGTERM, too. Several GPUs: torchrun --nproc-per-node N -m "
        "pacevggt_patch train ...",
    )
    train.add_argument(
        "--backbone",
        default="mini",
        help='"mini" (default), a checkpoint file, or a Hub id such as facebook/VGGT-1B',
    )
    train.add_argument("--images", type=Path, metavar="DIR", help="folder of images, or of folders of images")
    train.add_argument(
        "--rooms",
        nargs="?",
        const="all",
        choices=("all", "plain"),
        help="rendered scenes instead of images: all kinds (default), or plain rooms only",
    )
    train.add_argument(
        "--textures", type=Path, metavar="PATH", help="photographs for --rooms: zip file or folder"
    )
    train.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("runs/train"),
        help="folder for the results (runs/train)",
    )
    train.add_argument("--steps", type=int, default=4000, help="gradient steps (4000)")
    train.add_argument("--calibrate", action="store_true", help="calibration only: no gradient steps")
    train.add_argument(
        "--distil",
        type=float,
        default=0.0,
        help="share of the steps for a distillation of the scorer before the refinement (0)",
    )
    train.add_argument(
        "--views",
        type=int,
        nargs="+",
        default=[8],
        help="numbers of frames of a clip; each step has one of them (8)",
    )
    train.add_argument(
        "--clips",
        type=int,
        default=1,
        help="clips of a step in each process; fewer where clips have more frames (1)",
    )
    train.add_argument(
        "--supervised-frames",
        type=int,
        default=4,
        help="frames of a clip on which depth and points are compared (4)",
    )
    train.add_argument(
        "--width", type=int, help="width of the frames in pixels (VGGT-mini 224, else 518, rooms 504)"
    )
    train.add_argument("--rate", type=float, default=2e-3, help="learning rate (0.002)")
    train.add_argument(
        "--scorer-rate",
        type=float,
        default=0.0,
        help="learning rate of the scorer in the refinement, as a share of --rate; for pre-AA pruning (0)",
    )
    train.add_argument("--mode", choices=MODES, default=GLOBAL, help="what is pruned (global)")
    train.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    train.add_argument("--device", help="cpu or cuda (cuda where there is one if not given)")
    train.add_argument(
        "--start",
        metavar="WEIGHTS",
        help="pace weights to start from, with their full-attention heads: a file or a Hub id",
    )
    train.add_argument("--resume", action="store_true", help="go on from DIR/state.pt, if it is there")
    train.set_defaults(run=train_command, extra="train")


def add_push(commands) -> None:
    push = commands.add_parser(
        "push",
        help="upload pace weights to the Hugging Face Hub",
        description="Upload a pace weight file, with a model card, to a model repository on the Hugging Face Hub, "
        "which is made if need be. Log in first: hf auth login.",
    )
    push.add_argument(
        "file", type=Path, metavar="FILE", help="a pace weight file, as `pacevggt train` writes it"
    )
    push.add_argument("repo", metavar="USER/REPO")
    push.add_argument("--revision", help="branch (main if not given)")
    push.add_argument("--private", action="store_true", help="make a repository that others can't see")
    push.set_defaults(run=push_command, extra="train")


def help_command(arguments: argparse.Namespace) -> int:
    """What there is, for who names no command."""
    arguments.parser.print_help(sys.stderr)
    return 2


def compare_command(arguments: argparse.Namespace) -> int:
    from ..compare.command import run_plan
    from ..compare.plan import Options, make_plan
    from ..compare.report import format_table

    names = (
        "backbone", "out", "keep_ratios", "modes", "merge_budget", "frames", "device", "precision", "repeats",
        "compile", "colmap", "ply",
    )  # fmt: skip
    given = {name: getattr(arguments, name) for name in names}
    # What does not fit is said before processes wait for each other.
    plan = make_plan(Options(clips=tuple(arguments.clip), weights=weights_of(arguments), **given))
    # The others wait while stock runs.
    with processes_of_torchrun(plan.device, timedelta(hours=4)) as ranks:
        report = run_plan(plan, ranks)
    if ranks is not None and ranks.rank:
        return 0
    print(format_table(report))
    print(f"wrote {arguments.out}/: {', '.join(report['files'])}")
    if arguments.colmap is not None:
        print(f"wrote {arguments.colmap}/: a COLMAP model of each side")
    return 0


def evaluate_command(arguments: argparse.Namespace) -> int:
    from ..evaluate import evaluate
    from ..evaluate.summary import format_table

    names = (
        "out", "backbone", "keep_ratios", "modes", "merge_budget", "frames", "stride", "protocol", "scenes",
        "most_scenes", "meshes", "width", "device", "precision", "compile",
    )  # fmt: skip
    summary = evaluate(
        arguments.data,
        arguments.dataset,
        weights=weights_of(arguments),
        **{name: getattr(arguments, name) for name in names},
    )
    if place_of_torchrun()[0] == 0:
        print(format_table(summary))
        print(f"wrote {arguments.out}/: summary.md, summary.json, changes.png, scenes/")
    return 0


def view_command(arguments: argparse.Namespace) -> int:
    from ..compare.view import view

    names = ("keep_ratio", "mode", "frames", "device", "precision", "host", "port")
    view(
        arguments.backbone,
        arguments.clip,
        weights=weights_of(arguments),
        **{name: getattr(arguments, name) for name in names},
    )
    return 0


def weights_of(arguments: argparse.Namespace) -> str | None:
    """The weights that were asked for, as `accelerate` takes them."""
    return None if arguments.weights == "none" else arguments.weights


def train_command(arguments: argparse.Namespace) -> int:
    from ..training.fit import Settings
    from ..training.run import Options, format_checks, run_training

    settings = Settings(
        steps=0 if arguments.calibrate else arguments.steps,
        distil=arguments.distil,
        clips=arguments.clips,
        supervised=arguments.supervised_frames,
        views=tuple(arguments.views),
        rate=arguments.rate,
        scorer_rate=arguments.scorer_rate,
        mode=arguments.mode,
        seed=arguments.seed,
    )
    names = ("out", "backbone", "images", "rooms", "textures", "width", "device", "start", "resume")
    report = run_training(Options(settings=settings, **{name: getattr(arguments, name) for name in names}))
    if place_of_torchrun()[0] == 0:
        print(format_checks(report["checks"]))
        if report["mode"] == GLOBAL:
            heads = ", ".join(f"block {block} head {head}" for block, head in report["full_heads"])
            none = "none was found that loses much without, so the calibration changes nothing"
            print(f"full-attention heads (block, head): {heads or none}")
        print(f"wrote {arguments.out}/: pace.safetensors, report.json, curve.png, state.pt")
    return 0


def push_command(arguments: argparse.Namespace) -> int:
    from ..weights.card import push

    commit = push(arguments.file, arguments.repo, arguments.revision, private=arguments.private)
    print(f'uploaded; to use it: accelerate(model, weights="{arguments.repo}@{commit}")')
    return 0


def cache_command(arguments: argparse.Namespace) -> int:
    from ..weights import cache

    where = cache.folder()
    if where is None:
        print(f"no calibrations are kept ({cache.VARIABLE} is off)")
    elif arguments.clear:
        print(f"deleted {cache.clear()} from {where}")
    else:
        found = cache.entries()
        print(f"{len(found)} kept in {where}")
        for path in found:
            print(f"  {path.name}")
    return 0


def env_command(arguments: argparse.Namespace) -> int:
    from .env import describe, format_environment

    found = describe()
    print(json.dumps(found, indent=1) if arguments.json else format_environment(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
