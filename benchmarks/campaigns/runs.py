"""Trainings that are killed, told to stop, or run out of disk, and go on afterwards."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from hosts import write_images
from safetensors.torch import load_file

from . import Trial, campaign

STEPS = {False: 60, True: 6}  # of a training, and of one in a hurry
SETTINGS = ["--views", "2", "3", "--clips", "1", "--width", "56"]
PATIENCE = 240.0


def command(images: Path, out: Path, *more: str) -> list[str]:
    script = str(Path(__file__).with_name("tiny_train.py"))
    steps = STEPS["quick" in out.parts[-1]]
    return [
        sys.executable,
        script,
        "--images",
        str(images),
        "--out",
        str(out),
        "--steps",
        str(steps),
        *SETTINGS,
        *more,
    ]


def finish(images: Path, out: Path, *more: str, limit: int | None = None) -> tuple[int, str]:
    """Run to the end; exit code, and what was said on stderr."""
    environment = os.environ | ({} if limit is None else {"LARGEST_FILE": str(limit)})
    done = subprocess.run(
        command(images, out, *more), capture_output=True, text=True, timeout=PATIENCE, env=environment
    )
    return done.returncode, done.stderr


def same(first: Path, second: Path) -> bool:
    a, b = load_file(first / "pace.safetensors"), load_file(second / "pace.safetensors")
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def left_over(out: Path) -> list[str]:
    """Files that are half written, or nobody's."""
    return [path.name for path in out.iterdir() if path.name.startswith(".")]


SIGNALS = {
    "SIGKILL": signal.SIGKILL,
    "SIGTERM": signal.SIGTERM,
    "SIGINT": signal.SIGINT,
    "SIGHUP": signal.SIGHUP,
}


@campaign(
    "a training that is killed at any moment goes on, and ends with the weights of one that never stopped"
)
def kills_of_training(quick: bool) -> Iterator[Trial]:
    numbers = random.Random(0)
    with TemporaryDirectory() as place:
        images, whole = write_images(Path(place) / "images", 6), Path(place) / f"whole{'-quick' * quick}"
        start = time.monotonic()
        code, said = finish(images, whole)
        seconds = time.monotonic() - start
        yield Trial("never stopped", None if code == 0 else f"exit code {code}: {said[-200:]}")
        for number in range(1 if quick else 28):
            name = list(SIGNALS)[(number + 1) % 4]
            out = Path(place) / f"run-{number}{'-quick' * quick}"
            after = numbers.uniform(0.15, 0.95) * seconds
            yield Trial(f"{name} after {after:.1f} s", kill(images, out, whole, SIGNALS[name], after))
            shutil.rmtree(out, ignore_errors=True)


def kill(images: Path, out: Path, whole: Path, number: int, after: float) -> str | None:
    running = subprocess.Popen(
        command(images, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        running.wait(after)
    except subprocess.TimeoutExpired:
        running.send_signal(number)
    try:
        said = running.communicate(timeout=PATIENCE)[1]
    except subprocess.TimeoutExpired:
        running.kill()
        return "does not end"
    state = (out / "state.pt").exists()
    if running.returncode == 0:
        return None if same(out, whole) else "other weights"
    if (out / "pace.safetensors").exists() and same(out, whole):
        return None  # it was done, and about to end
    if number != signal.SIGKILL:
        if "Traceback" in said:
            return "a traceback: " + said.strip().splitlines()[-1][:150]
        if state and "--resume" not in said:
            return f"does not say how to go on: {said[-150:]!r}"
    code, said = finish(images, out, *(["--resume"] if state else []))
    if code != 0:
        return f"does not go on: {said[-200:]!r}"
    if left_over(out):
        return f"{left_over(out)} is left behind"
    return None if same(out, whole) else "other weights"


@campaign("a full disk gives an error that names the file; what was whole stays whole, and the run can go on")
def full_disk(quick: bool) -> Iterator[Trial]:
    with TemporaryDirectory() as place:
        images, whole = write_images(Path(place) / "images", 6), Path(place) / f"whole{'-quick' * quick}"
        code, said = finish(images, whole)
        yield Trial("enough room", None if code == 0 else f"exit code {code}: {said[-200:]}")
        sizes = {path.name: path.stat().st_size for path in whole.iterdir()}
        for name, size in sorted(sizes.items()):
            if quick and name != "state.pt":
                continue
            out = Path(place) / f"out{'-quick' * quick}"
            code, said = finish(images, out, limit=max(1, size - 1))
            problem = None
            if "Traceback" in said:
                problem = "a traceback: " + said.strip().splitlines()[-1][:150]
            elif code == 0 and not (out / "pace.safetensors").exists():
                problem = "no weights, and exit code 0"
            elif left_over(out):
                problem = f"{left_over(out)} is left behind"
            if problem is None:
                state = (out / "state.pt").exists()
                code, said = finish(images, out, *(["--resume"] if state else []))
                problem = None if code == 0 and same(out, whole) else f"does not go on: {said[-150:]!r}"
            yield Trial(f"no file larger than {name} less a byte", problem)
            shutil.rmtree(out, ignore_errors=True)
