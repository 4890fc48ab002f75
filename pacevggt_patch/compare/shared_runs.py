"""The runs of a comparison over several processes: stock in the first one alone, accelerated in all together."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..clips import Clip
from ..config import PaceConfig
from ..errors import PaceError
from ..patching.first_clip import MOST_FRAMES
from ..patching.install import accelerate, state_of
from ..runtime.ranks import Ranks, gather_outputs, split_frames
from ..weights.pace import PaceWeights
from .plan import Plan
from .runs import Prediction, Runner, Side, is_out_of_memory

# What is compared of what a model of VGGT's family gives: no other runs over several processes.
COMPARED = ("pose_enc", "depth", "depth_conf")


class SharedRunner(Runner):
    """A model in each of several processes. Those but the first wait while stock runs, and then run their frames.

    What rank 0 gives is of all frames, what others give of theirs. Seconds and memory are those of the slowest and of
    the fullest.

    Args:
        ranks: of the group.

    Raises:
        PaceError: the model, a setting or the weights do not fit, or a clip has fewer frames than there are processes.
    """

    def __init__(self, model: nn.Module, plan: Plan, ranks: Ranks):
        self.ranks, self.leads = ranks, ranks.rank == 0
        self.resolved: dict[PaceConfig, PaceWeights | None] = {}
        for source in plan.sources:
            split_frames(len(source.clip), ranks.rank, ranks.world)
        super().__init__(model, plan)

    def install(self, config: PaceConfig) -> PaceConfig:
        if self.in_force != config:
            if config not in self.resolved:
                self.resolved[config] = self.ranks.agree(lambda: (self.resolve(config), {}))[0][0]
            accelerate(self.model, config, weights=self.resolved[config], process_group=self.ranks.group)
            self.in_force = config
        found = state_of(self.model).config
        self.resolved.setdefault(found, self.resolved.get(config))
        return found

    def resolve(self, config: PaceConfig) -> PaceWeights | None:
        """The weights of a setting, on the CPU: found by the first process, which calibrates where there are none."""
        if not self.leads:
            return None
        super().install(config)
        self.in_force = None  # of this process alone
        state = state_of(self.model)
        if state.pending:
            images = self.images(self.plan.sources[0].clip)
            count = min(len(images), MOST_FRAMES)  # calibration looks at no more
            self.forward(images[torch.linspace(0, len(images) - 1, count).long()])
        weights = state_of(self.model).weights
        return None if weights is None else weights.copy_for(self.host).to("cpu")

    def estimate(self, clips: list[Clip]) -> float | None:
        return super().estimate(clips) if self.leads else None

    def images(self, clip: Clip) -> Tensor:
        """Those of the whole clip on rank 0, which runs stock, and those of its own frames on another."""
        part = slice(None) if self.leads else split_frames(len(clip), self.ranks.rank, self.ranks.world)
        with self.fitting(f"the images of {clip.name}"):
            return super().images(Clip(clip.name, clip.images[part]))

    @contextmanager
    def fitting(self, what: str) -> Generator[None]:
        """A part of a run of all ranks. Others wait for one that runs out of memory, so that is the end of all.

        Raises:
            PaceError: it did.
        """
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise PaceError(
                f"{what} did not fit into the memory of rank {self.ranks.rank}: give fewer --frames, or more GPUs"
            ) from error

    def run(self, clip: Clip, update: Callable[[], Any]) -> list[Side]:
        sides = super().run(clip, update)
        taken = {side.name: side.timing for side in sides if side.config is not None}
        every = [found for found, _ in self.ranks.agree(lambda: (taken, {}))]
        for side in sides:
            if side.config is not None:
                timings = [one[side.name] for one in every]
                seconds = [max(run) for run in zip(*(one.seconds for one in timings), strict=True)]
                peaks = [one.peak_gib for one in timings if one.peak_gib is not None]
                side.timing = replace(side.timing, seconds=seconds, peak_gib=max(peaks, default=None))
        return sides

    def prepare(self, side: Side) -> None:
        super().prepare(side)
        if side.config is not None:
            self.ranks.agree(lambda: (None, {}))  # all begin at once

    def outputs(self, side: Side, images: Tensor) -> dict[str, Any]:
        if side.config is None:
            return super().outputs(side, images) if self.leads else {}
        here = images[split_frames(len(images), 0, self.ranks.world)] if self.leads else images
        with self.fitting(side.name):
            return self.forward(here)

    def predict(self, side: Side, images: Tensor, clip: Clip) -> Prediction | None:
        if side.config is None:
            return super().predict(side, images, clip) if self.leads else None
        outputs = self.outputs(side, images)
        here = {name: outputs[name] for name in COMPARED if name in outputs}
        found = None

        def described() -> tuple[None, dict[str, str]]:
            nonlocal found
            part = clip if self.leads else Clip(clip.name, clip.images[: images.shape[0]])
            with self.fitting(side.name):
                joined = gather_outputs(here, self.ranks.group)
                found = self.prediction(here if joined is None else joined, side, part)
            return None, {}

        self.ranks.agree(described)
        return found

    def describe(self, side: Side) -> None:
        super().describe(side)
        joined = gather_outputs(None if side.kept is None else side.kept[None], self.ranks.group)
        side.kept = None if joined is None else joined[0]
