"""What a training run says while it runs: lines on the screen, and its curve as JSON and as a picture."""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...training.states import result_file

SPEAK_EVERY = 200  # steps


class Timer:
    """Says when a chore is due.

    Args:
        every: seconds from the end of one time to the next.
    """

    def __init__(self, every: float):
        self.every, self.next = every, time.monotonic() + every

    def is_due(self) -> bool:
        """Whether it is time; if so, the next time is `every` seconds from now."""
        if time.monotonic() < self.next:
            return False
        self.next = time.monotonic() + self.every
        return True


class Journal:
    """Records of a run.

    Args:
        folder: where the curve goes.
        begun: when the program began, by `time.monotonic`.
        speaks: whether this process prints.

    Attributes:
        records: what `curve.json` holds, in the order of time: of training `step`, `seconds` and `losses`, of
            measurements `step`, `seconds` and metrics by the name of the held-out set.
        seconds_per_step: as of late; None before it is known.
    """

    def __init__(self, folder: Path, begun: float, speaks: bool):
        self.folder, self.begun, self.speaks = folder, begun, speaks
        self.records: list[dict[str, Any]] = []
        self.seconds_per_step: float | None = None
        self.last_time, self.last_step = time.monotonic(), None

    def elapsed(self) -> float:
        """Seconds since the program began."""
        return time.monotonic() - self.begun

    def say(self, text: str) -> None:
        """Print a line with the time."""
        if self.speaks:
            print(f"[{self.elapsed():7.1f}] {text}", flush=True)

    def trained(self, step: int, frames: int, losses: dict[str, float]) -> None:
        """Record the losses of a step of `frames` images, and how long steps take."""
        now = time.monotonic()
        if self.last_step is not None:
            self.seconds_per_step = (now - self.last_time) / (step - self.last_step)
        first = self.seconds_per_step is None
        self.last_time, self.last_step = now, step
        self.records.append({"step": step, "seconds": self.elapsed(), "losses": losses})
        if first or step % SPEAK_EVERY == 0:
            speed = f"{frames / self.seconds_per_step:.0f} images/s " if self.seconds_per_step else ""
            self.say(
                f"step {step} {speed}" + " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            )

    def measured(self, step: int, metrics: dict[str, dict[str, float]]) -> None:
        """Record metrics by held-out set, and draw the curve."""
        self.records.append({"step": step, "seconds": self.elapsed(), **metrics})
        for name, values in metrics.items():
            self.say(f"{name}: " + " ".join(f"{key} {value:.3g}" for key, value in values.items()))
        write_curve(self.records, self.folder)

    @contextmanager
    def break_time(self) -> Generator[None]:
        """Leave what is done meanwhile out of the time that steps take."""
        begin = time.monotonic()
        yield
        self.last_time += time.monotonic() - begin


def write_curve(records: list[dict[str, Any]], folder: Path) -> None:
    """`curve.json`, and `curve.png` where matplotlib is installed."""
    with result_file(folder / "curve.json") as temporary:
        temporary.write_text(json.dumps(records, indent=0))
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    trained = [record for record in records if "losses" in record]
    measured = [record for record in records if "rooms" in record]
    figure, (losses, cameras, depth) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    losses.plot([r["step"] for r in trained], [r["losses"]["total"] for r in trained], linewidth=0.6)
    for name in ("rooms", "scenes"):
        steps = [r["step"] for r in measured]
        for axis, key, style in ((cameras, "auc30", "-"), (cameras, "auc15", "--"), (depth, "absrel", "-")):
            axis.plot(steps, [r[name][key] for r in measured], style, label=f"{name} {key}")
    depth.set_yscale("log")
    titles = ("training loss", "held out, 8 views: cameras", "held out: depth")
    for axis, title in zip((losses, cameras, depth), titles, strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    cameras.legend()
    depth.legend()
    with result_file(folder / "curve.png") as temporary:
        figure.savefig(temporary, dpi=90)
    plt.close(figure)
