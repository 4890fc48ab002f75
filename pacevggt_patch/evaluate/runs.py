"""The runs on one scene, stock and with each setting, and what is written about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..clips import Clip
from ..compare.plan import in_words
from ..compare.runs import STOCK, Runner, Side, memory_kept
from ..config import GLOBAL
from ..errors import PaceError
from ..evaluation.timing import time_interleaved
from ..patching.first_clip import MOST_FRAMES
from ..patching.install import state_of
from ..runtime.files import environment
from ..weights.fingerprint import checkpoint_digest
from ..weights.pace import PaceWeights
from .plan import Job, Plan, without_folder
from .protocols import choose_frames, measure, read_mesh


class SceneRunner:
    """A model with the settings that it is evaluated with.

    Args:
        model: on its device, in evaluation mode.
        plan: what to run.

    Raises:
        PaceError: the model, a setting or the weights do not fit.
    """

    def __init__(self, model: nn.Module, plan: Plan):
        self.plan = plan
        self.runner = Runner(model, plan.runs)
        self.device = plan.runs.device
        self.sides = 1 + len(self.runner.configs)

    def digests(self) -> dict[str, str | None]:
        """What tells the checkpoint and the weights that were given, whatever their files are called."""
        given, found = self.plan.options.weights, state_of(self.runner.model).weights
        weights = None if given in (None, "auto") or found is None else found.digest()
        return {"checkpoint_digest": checkpoint_digest(self.runner.model), "weights_digest": weights}

    def calibrate(self, file: Path) -> None:
        """Let every setting that would calibrate on its first clip have one calibration, on the first scene of all.

        Args:
            file: that keeps it, for other processes and for later runs.

        Raises:
            PaceError: it can't be done on this scene.
        """
        first = self.plan.jobs[0]
        for config in self.runner.configs:
            if self.plan.options.weights != "auto" or config.mode != GLOBAL:
                continue
            self.runner.install(config)
            if not state_of(self.runner.model).pending and not file.is_file():
                continue  # weights of this checkpoint are known
            if not file.is_file():
                few = choose_frames("corrected", len(first.numbers), MOST_FRAMES)
                clip = self.plan.load(replace(first, numbers=[first.numbers[i] for i in few]))
                self.runner.outputs(Side(in_words(config), config), self.runner.images(clip))
                found = state_of(self.runner.model).weights
                if found is None:
                    raise PaceError(
                        f"scene {first.name}: the model can't be calibrated on it: pass --weights FILE or none"
                    )
                found.save(file)
            weights = replace(PaceWeights.load(file), source=f"calibrated on {first.name}")
            self.runner.weights[config] = weights
            self.runner.in_force = None

    def estimate(self, clip: Clip, times: int) -> float | None:
        """Seconds that the model will take at most for so many clips like this one, told by two short runs."""
        return self.runner.estimate([clip] * times)

    def run(self, clip: Clip, update: Callable[[], Any]) -> Iterator[Side]:
        """Run a clip once with each side, stock first, timed; what they gave lives until the next one.

        Args:
            update: called after every run.

        Yields:
            The sides. One that ran out of memory has no prediction.
        """
        images = None
        with memory_kept(self.device):
            images = self.runner.images(clip)
        for side in (Side(STOCK), *(Side(in_words(config), config) for config in self.runner.configs)):
            if images is not None:
                with memory_kept(self.device):
                    self.run_side(side, images, clip)
            update()
            yield side
            side.prediction = None

    def run_side(self, side: Side, images: Tensor, clip: Clip) -> None:
        """Run a side once, and take down what it gave."""
        timing = time_interleaved(
            {side.name: lambda: self.runner.outputs(side, images)},
            1,
            self.device,
            warm_up=False,
            prepare=lambda _: self.runner.prepare(side),
        )[side.name]
        side.prediction = self.runner.prediction(timing.result, side, clip)
        timing.result = None
        side.timing = timing
        if side.config is not None:
            self.runner.describe(side)

    def judge(self, job: Job, clip: Clip, update: Callable[[], Any]) -> dict[str, Any]:
        """The result of a scene.

        Raises:
            PaceError: no side fits into memory, or one gave values that are not finite.
        """
        mesh = None if job.mesh is None else read_mesh(job.mesh)
        patch = self.runner.patch_size
        patches = (clip.height // patch) * (clip.width // patch)
        sides = []
        for side in self.run(clip, update):
            fits = side.prediction is not None
            sides.append(
                {
                    "name": side.name,
                    **self.setting(side, patches),
                    "fits": fits,
                    "seconds": side.timing.median if fits else None,
                    "peak_gib": side.timing.peak_gib if fits else None,
                    "metrics": None
                    if side.prediction is None
                    else measure(self.plan.options.protocol, side.prediction, clip, mesh, job.scene.metres),
                }
            )
        if not any(side["fits"] for side in sides):
            raise PaceError(f"{len(clip)} frames fit into memory neither stock nor accelerated: take fewer")
        return {
            "scene": job.name,
            "frames": len(clip),
            "frames_with_pose": len(job.scene),
            "frames_left_out": job.scene.left_out,
            "frame_numbers": job.numbers,
            "width": clip.width,
            "height": clip.height,
            "has_depth": clip.depth is not None,
            "metres": job.scene.metres,
            "environment": environment(self.device),
            "sides": sides,
        }

    def setting(self, side: Side, patches: int) -> dict[str, Any]:
        """What a side is run with; null for stock."""
        config, given = side.config, str(self.plan.options.weights)
        found = config and self.runner.weights[config]
        return {
            "keep_ratio": config and config.keep_ratio,
            "mode": config and config.mode,
            "merge_budget": config and config.merge_budget,
            "weights": side.weights.replace(given, without_folder(given)) or None,
            "weights_digest": found.digest() if isinstance(found, PaceWeights) else None,
            "full_heads": side.full_heads if config else None,
            "heads": self.runner.heads if config else None,
            "kept_tokens": patches if side.kept_count is None else side.kept_count,
            "patches": patches,
        }
