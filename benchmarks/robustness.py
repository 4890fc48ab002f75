"""Try what goes wrong, thousands of times, and count what was not as promised.

    python benchmarks/robustness.py --out runs/robustness            # some 20 minutes on two cores
    python benchmarks/robustness.py --quick --only "weight files" cycles

Writes robustness.json and robustness.md: for each campaign how many situations were tried, how many of them were
refused in a sentence, and all that went wrong. It runs on the CPU with small models of random weights; files, kills
and full disks are real. The Hub is a server of its own on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # small models, a Hub, broken files
os.environ.setdefault("PACEVGGT_CACHE", tempfile.mkdtemp(prefix="pacevggt-"))

import torch
from campaigns import CAMPAIGNS, Campaign, files, models, runs  # noqa: F401 (each adds its campaigns)
from huggingface_hub.utils import logging

from pacevggt_patch.runtime.files import environment, write_json

SHOWN = 5


def run(campaign: Campaign, quick: bool) -> dict[str, Any]:
    """A row of the table: what a campaign found."""
    start, tried, refused, wrong = time.perf_counter(), 0, 0, []
    for trial in campaign.run(quick):
        tried, refused = tried + 1, refused + trial.refused
        if trial.problem is not None:
            wrong.append(f"{trial.name}: {trial.problem}")
        if sys.stderr.isatty():
            print(f"\r{campaign.name}: {tried} tried, {len(wrong)} wrong  ", end="", file=sys.stderr)
    row = {"campaign": campaign.name, "promise": campaign.promise, "tried": tried, "refused": refused}
    seconds = round(time.perf_counter() - start, 1)
    print(f"\r{campaign.name}: {tried} tried, {refused} refused, {len(wrong)} wrong, {seconds} s")
    for text in wrong[:SHOWN]:
        print(f"    {text}")
    return row | {"wrong": wrong, "seconds": seconds}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| what was tried | times | what must hold | not so |", "|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['campaign']} | {row['tried']:,d} | {row['promise']} | {len(row['wrong'])} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for robustness.json and robustness.md")
    parser.add_argument("--quick", action="store_true", help="fewer of each, in a minute or two")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=sorted(CAMPAIGNS),
        help="campaigns to run, beside those in the folder; all if not given",
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    rows: dict[str, dict[str, Any]] = {}
    file = None if args.out is None else args.out / "robustness.json"
    if file is not None and file.exists():
        rows = {row["campaign"]: row for row in json.loads(file.read_text(encoding="utf-8"))["campaigns"]}
    for name in args.only or CAMPAIGNS:
        rows[name] = run(CAMPAIGNS[name], args.quick)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            report = {
                "environment": environment("cpu"),
                "quick": args.quick,
                "campaigns": list(rows.values()),
            }
            write_json(file, report)
            file.with_suffix(".md").write_text(table(report["campaigns"]), encoding="utf-8")
    return 1 if any(row["wrong"] for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
