"""Compare the speed of several functions fairly: warmed up, interleaved, with the device's work done."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Timing:
    """Timed runs of one function.

    Attributes:
        seconds: wall time of each run.
        peak_gib: most CUDA memory allocated during a run, in GiB; None on the CPU.
        result: what the last run returned.
    """

    seconds: list[float] = field(default_factory=list)
    peak_gib: float | None = None
    result: Any = None

    @property
    def median(self) -> float:
        """Median wall time in seconds."""
        return statistics.median(self.seconds)


def time_interleaved(
    runs: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: torch.device | str,
    *,
    keep_results: bool = True,
    warm_up: bool = True,
    update: Callable[[], Any] = lambda: None,
    prepare: Callable[[str], Any] = lambda name: None,
) -> dict[str, Timing]:
    """Time functions in turn, A B A B ..., so that a drift of the machine's speed hits all of them.

    Args:
        runs: name -> function.
        repeats: counted runs of each.
        device: where the functions work.
        keep_results: keep what the last run returned (which takes memory during the others).
        warm_up: run each once more, first; that run is not counted.
        update: called after every run, for a progress bar.
        prepare: called with the name before every run, outside of the timed span.
    """
    device = torch.device(device)
    timings = {name: Timing() for name in runs}
    for repeat in range(0 if warm_up else 1, repeats + 1):
        for name, run in runs.items():
            timing = timings[name]
            prepare(name)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            result = run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                timing.peak_gib = torch.cuda.max_memory_allocated(device) / 2**30
            elapsed = time.perf_counter() - start
            if keep_results:
                timing.result = result
            del result
            if repeat > 0:
                timing.seconds.append(elapsed)
            update()
    return timings
