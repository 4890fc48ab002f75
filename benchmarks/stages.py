"""Where the time of one forward goes: seconds of each stage, GPU kernels, host syncs.

Everything is watched from outside, by hooks on the modules that every VGGT has and on the two functions of this package
that no module stands for, and taken off again: the models run the code that users run.
"""

from __future__ import annotations

import re
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch

from pacevggt_patch.method.propagation import Propagation
from pacevggt_patch.method.restored_tokens import RestoredTokens
from pacevggt_patch.patching.summary import StageTimer

HEADS = ("camera_head", "depth_head", "point_head")
KERNELS_SHOWN = 10


class Stopwatch:
    """Time of nested regions, each without those inside it.

    On CUDA two events mark every region, so the device never waits; on the CPU it is the wall clock.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.spans: list[tuple[str, Any, Any, list[int]]] = []  # name, start, end, the spans inside
        self.open: list[int] = []

    @contextmanager
    def region(self, name: str) -> Generator[None]:
        """Time what runs inside the `with` block under a name; the same name adds up."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def begin(self, name: str) -> None:
        """Enter a region."""
        if self.open:
            self.spans[self.open[-1]][3].append(len(self.spans))
        self.open.append(len(self.spans))
        self.spans.append((name, self._now(), None, []))

    def end(self) -> None:
        """Leave the region entered last."""
        index = self.open.pop()
        name, start, _, inside = self.spans[index]
        self.spans[index] = (name, start, self._now(), inside)

    def inside(self) -> list[str]:
        """Names of the regions that were entered and not left."""
        return [self.spans[index][0] for index in self.open]

    def seconds(self) -> dict[str, float]:
        """Seconds of each region, in the order in which they were first entered."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        total = [self._elapsed(start, end) for _, start, end, _ in self.spans]
        result: dict[str, float] = defaultdict(float)
        for (name, _, _, inside), seconds in zip(self.spans, total, strict=True):
            result[name] += seconds - sum(total[i] for i in inside)
        return dict(result)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _elapsed(self, start: Any, end: Any) -> float:
        return end - start if self.device.type != "cuda" else start.elapsed_time(end) / 1000


@contextmanager
def watched(model: Any, watch: Stopwatch) -> Generator[None]:
    """Time the stages of a VGGT, stock or accelerated, inside the `with` block.

    Blocks, patch embedding and heads are modules, found in any fork. Selection and merging are named by the
    accelerated model itself, propagation and restoration are functions of this package.
    """
    modules = [(model.aggregator.patch_embed, "DINO")]
    modules += [(block, "frame blocks") for block in model.aggregator.frame_blocks]
    modules += [(block, "global blocks") for block in model.aggregator.global_blocks]
    modules += [(getattr(model, name), name) for name in HEADS if getattr(model, name, None) is not None]
    named: Any = StageTimer.stage
    functions = [
        (RestoredTokens, "patches", "restoration"),
        (Propagation, "gather", "propagation"),
        (Propagation, "slope", "propagation"),
        (Propagation, "dependence", "propagation"),
        (Propagation, "propagate", "propagation"),
        (Propagation, "fill", "propagation"),
    ]

    @contextmanager
    def stage(timer: StageTimer, name: str, *tokens: int, **more: Any) -> Generator[None]:
        # All but these are modules, which hooks tell apart.
        inside = name in ("selection", "merging")
        with watch.region(name) if inside else nullcontext(), named(timer, name, *tokens, **more):
            yield

    def timed(function: Callable, name: str) -> Callable:
        def run(*args, **kwargs):
            # What heads restore is theirs, by whatever function.
            with nullcontext() if "restoration" in watch.inside() else watch.region(name):
                return function(*args, **kwargs)

        return run

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(StageTimer, "stage", stage))
        for kind, function, name in functions:
            stack.enter_context(mock.patch.object(kind, function, timed(getattr(kind, function), name)))
        for module, name in modules:
            before = module.register_forward_pre_hook(lambda *_, name=name: watch.begin(name))
            after = module.register_forward_hook(lambda *_: watch.end())
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


def stages_and_syncs(
    model: Any, run: Callable[[], Any], device: torch.device
) -> tuple[dict[str, float], int | None]:
    """Seconds of each stage of one forward ("other" belongs to none), and what `host_syncs` counts in it."""
    watch = Stopwatch(device)
    with watched(model, watch), watch.region("other"):
        syncs = host_syncs(run, device)
    seconds = watch.seconds()
    seconds["other"] = seconds.pop("other")  # last
    return seconds, syncs


def host_syncs(run: Callable[[], Any], device: torch.device) -> int | None:
    """How often `run` makes the host wait for the device; None on the CPU, which has nothing to wait for."""
    if device.type != "cuda":
        run()
        return None
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return count_syncs(str(warning.message) for warning in caught)


def count_syncs(messages: Iterable[str]) -> int:
    """How many of these warnings are CUDA's about a wait (other warnings come through, too)."""
    return sum("synchronizing CUDA operation" in message for message in messages)


def kernels(run: Callable[[], Any], device: torch.device) -> list[dict[str, Any]] | None:
    """The GPU kernels that take most of one forward; None on the CPU."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize(device)
    return top_kernels(profile.key_averages())


def top_kernels(events: Iterable[Any], shown: int = KERNELS_SHOWN) -> list[dict[str, Any]]:
    """The `shown` longest kernels of a profile: name, calls, seconds, share of all kernel time."""
    times = {}
    for event in events:
        # Renamed in torch 2.4.
        microseconds = getattr(event, "self_device_time_total", None)
        if microseconds is None:
            microseconds = getattr(event, "self_cuda_time_total", 0)
        if microseconds > 0:
            times[event.key] = (microseconds / 1e6, event.count)
    total = sum(seconds for seconds, _ in times.values())
    longest = sorted(times.items(), key=lambda item: -item[1][0])[:shown]
    return [
        {"kernel": short_name(name), "calls": calls, "seconds": seconds, "share": seconds / total}
        for name, (seconds, calls) in longest
    ]


def short_name(kernel: str) -> str:
    """A kernel's name without template arguments' tails, of at most 100 characters."""
    name = re.sub(r"^void ", "", kernel)
    name = re.sub(r"\(anonymous namespace\)::", "", name)
    return name if len(name) <= 100 else name[:97] + "..."
