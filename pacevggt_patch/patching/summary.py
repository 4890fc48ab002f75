"""What an accelerated model does, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import GLOBAL, PaceConfig


@dataclass(frozen=True)
class Stage:
    """One stage of a forward pass.

    Attributes:
        name: what it does.
        tokens_in, tokens_out: tokens of one clip that enter and leave it.
        seconds: wall time, None unless asked for.
        attend: tokens that attend to each other, of blocks; full-attention heads have all. None of other stages.
    """

    name: str
    tokens_in: int
    tokens_out: int
    seconds: float | None = None
    attend: int | None = None


class StageTimer:
    """Keeps the stages of the last forward pass; takes their times only while `timing`: that waits for the device."""

    def __init__(self):
        self.stages: list[Stage] = []
        self.timing = False

    def clear(self) -> None:
        """Forget the stages: a forward pass begins."""
        self.stages = []

    @contextmanager
    def measuring(self) -> Generator[None]:
        """Take the times of stages inside the `with` block."""
        before, self.timing = self.timing, True
        try:
            yield
        finally:
            self.timing = before

    @contextmanager
    def stage(
        self, name: str, tokens_in: int, tokens_out: int, add: bool = False, attend: int | None = None
    ) -> Generator[None]:
        """A stage, or with `add` one more part of a stage of that name."""
        if torch.compiler.is_compiling():
            yield
            return
        start = device_time() if self.timing else 0.0
        yield
        seconds = device_time() - start if self.timing else None
        stages = self.stages  # other threads may run the model, too
        others = [stage for stage in stages if stage.name != name]
        same = next((stage for stage in stages if stage.name == name), None) if add else None
        if same is not None:
            if seconds is not None:
                seconds += same.seconds or 0.0
            tokens_in, tokens_out = max(tokens_in, same.tokens_in), max(tokens_out, same.tokens_out)
            attend = None if attend is None else max(attend, same.attend or 0)
        # A head that is called again on the same tokens replaces what it said before.
        self.stages = [*others, Stage(name, tokens_in, tokens_out, seconds, attend)]


def device_time() -> float:
    """Wall clock in seconds, read after the work of the current CUDA device is done; see `current_device`."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def current_device(device: torch.device) -> AbstractContextManager:
    """Makes a CUDA device the current one, whose times and peak memory are taken, inside the `with` block."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True)
class Summary:
    """Settings and stages of an accelerated model; `print` it.

    Attributes:
        backbone: the host's dimensions, in words.
        config: the settings in force.
        weights: the weights in force and where they came from, in words.
        paused: whether the stock forward runs at the moment.
        patched: names of the submodules whose forward is replaced, compiled blocks left out. An empty name is the
            model's own.
        attention: who computes attention, in words.
        compiled: what runs compiled, in words.
        processes: which of the processes that share each clip this is, in words; None without such.
        stages: of the last forward pass; empty before the first.
        kept: [B, S, K] (int64), indices of the patch tokens that the last forward pass kept in each frame. None before
            the first pass, and after an unpruned one.
    """

    backbone: str
    config: PaceConfig
    weights: str
    paused: bool
    patched: list[str]
    attention: str = "torch SDPA"
    compiled: str = "no"
    processes: str | None = None
    stages: list[Stage] = field(default_factory=list)
    kept: Tensor | None = None

    def __str__(self) -> str:
        lines = [
            f"backbone      {self.backbone}",
            f"keep ratio    {self.config.keep_ratio:g}",
            f"mode          {self._mode()}",
            f"weights       {self.weights}",
            f"patched       {', '.join(name or 'the model itself' for name in self.patched)}"
            + (" (paused: the stock forward runs)" if self.paused else ""),
            f"attention     {self.attention}",
            f"compiled      {self.compiled}",
        ]
        if self.processes is not None:
            lines.append(f"processes     {self.processes}")
        if not self.stages:
            return "\n".join([*lines, "stages        none yet: run the model, or pass images to summary()"])
        lines.append(f"{'stage':34s}{'tokens in':>12s}{'attend':>12s}{'tokens out':>12s}{'seconds':>10s}")
        for stage in self.stages:
            seconds = "-" if stage.seconds is None else f"{stage.seconds:.3f}"
            attend = "-" if stage.attend is None else f"{stage.attend:,d}"
            lines.append(
                f"{stage.name:34s}{stage.tokens_in:>12,d}{attend:>12s}{stage.tokens_out:>12,d}{seconds:>10s}"
            )
        return "\n".join(lines)

    def _mode(self) -> str:
        if self.config.mode == GLOBAL:
            return "global pruning (frame attention sees all tokens)"
        merged = "all others" if self.config.merge_budget is None else f"{self.config.merge_budget:g}"
        return f"pre-AA pruning (merged: {merged})"
