"""The `pacevggt` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import DEFAULT_KEEP_RATIO, PaceError
from .version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except PaceError as error:
        print(f"pacevggt: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"pacevggt: {error}: pip install 'pacevggt-patch[demo]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pacevggt: interrupted; files already reported as written are whole", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pacevggt", description="Accelerate VGGT by pruning patch tokens.")
    parser.add_argument("--version", action="version", version=f"pacevggt-patch {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="run VGGT-mini on a clip, stock and accelerated",
        description="Run VGGT-mini on a clip, stock and accelerated; print a table, write report.json, tokens.png, "
        "depth.png, points.png and points.ply.",
    )
    demo.add_argument(
        "--clip",
        type=Path,
        metavar="DIR",
        help="folder of images or with a clip.json (bundled clip if not given), cut square",
    )
    demo.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("runs/demo"),
        help="folder for the results (runs/demo)",
    )
    demo.add_argument("--frames", type=int, help="frames, evenly spaced (up to 24 if not given)")
    demo.add_argument(
        "--keep-ratio", type=float, default=DEFAULT_KEEP_RATIO, help="share of patch tokens kept (0.3)"
    )
    demo.add_argument(
        "--merge-budget", type=float, help="share merged into kept ones (all others if not given)"
    )
    demo.add_argument(
        "--weights", default="auto", help='"auto" (default), "none" (training-free), a file, a Hub id'
    )
    demo.add_argument("--device", help="cpu or cuda (cuda where there is one if not given)")
    demo.set_defaults(run=demo_command)
    return parser


def demo_command(arguments: argparse.Namespace) -> int:
    from .demo import format_table, run_demo

    report, written, skipped = run_demo(
        arguments.out,
        arguments.clip,
        frames=arguments.frames,
        keep_ratio=arguments.keep_ratio,
        merge_budget=arguments.merge_budget,
        weights=None if arguments.weights == "none" else arguments.weights,
        device=arguments.device,
    )
    print(format_table(report))
    print(f"wrote {arguments.out}/: {', '.join(written)}")
    for problem in skipped:
        print(f"left out: {problem}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
