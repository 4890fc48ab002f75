"""`evaluate`: one after another what the other files of this folder do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from os import PathLike
from typing import Any

from torch import nn

from ..arguments import several
from ..compare.runs import borrowed
from ..config import DEFAULT_KEEP_RATIO
from ..runtime.ranks import Ranks, processes_of_torchrun
from ..training.states import result_file, writing
from .picture import save_changes
from .plan import Job, Options, Plan, make_plan, naming
from .protocols import CORRECTED
from .results import PICTURE, SUMMARY, TABLE, Results
from .runs import SceneRunner
from .summary import markdown, summarise

PATIENCE = timedelta(days=7)  # of processes whose share of the scenes is done before that of others


def evaluate(
    data: str | PathLike[str],
    dataset: str,
    *,
    out: str | PathLike[str] = "runs/evaluate",
    backbone: str | nn.Module = "mini",
    keep_ratios: Sequence[float] = (DEFAULT_KEEP_RATIO,),
    modes: Sequence[str | None] = (None,),
    merge_budget: float | None = None,
    weights: Any = "auto",
    frames: int | None = None,
    stride: int = 1,
    protocol: str = CORRECTED,
    scenes: str | PathLike[str] | None = None,
    most_scenes: int | None = None,
    meshes: str | PathLike[str] | None = None,
    width: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    compile: bool = False,
) -> dict[str, Any]:
    """Run a model stock and accelerated on every scene of a data set, and compare both with its ground truth.

    Writes a JSON for each scene when it ends. At the end come `summary.json`, `summary.md` and `changes.png`. The same
    call goes on where an interrupted one ended. Under torchrun each process takes every world-th scene.

    Args:
        data: folder of scenes, or of one scene.
        dataset: "scannet", "7scenes", or "folder" for folders with a `clip.json` that has cameras.
        out: folder; made if it is not there.
        backbone: as in `compare`.
        keep_ratios, modes: each mode is run with each keep ratio. The mode None is that of the weights.
        merge_budget, weights, compile: as in `accelerate`. What calibrates on a first clip does so on the first scene.
        frames: of a scene; None takes every `stride`-th one.
        stride: step between the frames that are there to choose from.
        protocol: "corrected", or "published", the one of ScanNet that papers share.
        scenes: file with the names of the scenes, one a line.
        most_scenes: evenly spaced ones, by name.
        meshes: folder with SCENE/SCENE_vh_clean_2.ply of "published"; None looks in the folder of each scene.
        width: of the frames, pixels; None takes 224 for VGGT-mini, else 518, or 512 where patches have 16 pixels.
        device: None takes CUDA where there is one.
        precision: "float32", "autocast" or "bfloat16"; None takes float32 on the CPU, else autocast.

    Returns:
        The content of summary.json.

    Raises:
        PaceError: a library is missing, or a setting, scene, model or file does not fit. A scene that fails ends the
            run, and the message names it.
    """
    return run_plan(
        make_plan(
            Options(
                data=data,
                dataset=dataset,
                out=out,
                backbone=backbone,
                keep_ratios=tuple(several("keep_ratios", keep_ratios)),
                modes=tuple(several("modes", modes)),
                merge_budget=merge_budget,
                weights=weights,
                frames=frames,
                stride=stride,
                protocol=protocol,
                scenes=scenes,
                most_scenes=most_scenes,
                meshes=meshes,
                width=width,
                device=device,
                precision=precision,
                compile=compile,
            )
        )
    )


def run_plan(plan: Plan) -> dict[str, Any]:
    """Run what was planned; see `evaluate`."""
    with (
        processes_of_torchrun(plan.runs.device, PATIENCE) as ranks,
        borrowed(plan.options.backbone, plan.runs) as model,
    ):
        return Evaluation(plan, model, ranks).run()


class Evaluation:
    """A plan that is being run, by one of several processes or, without `ranks`, by one alone."""

    def __init__(self, plan: Plan, model: nn.Module, ranks: Ranks | None):
        self.plan, self.ranks = plan, ranks
        self.rank, self.world = (0, 1) if ranks is None else (ranks.rank, ranks.world)
        self.runner = SceneRunner(model, plan)
        self.results = Results(plan, self.runner.digests())

    def meet(self, work: Callable[[], Any] = lambda: None) -> None:
        """Do some work in the first process, for which the others wait; where it fails all fail."""

        def describe() -> tuple[None, dict[str, str]]:
            if self.rank == 0:
                work()
            return None, {"settings": json.dumps(self.results.settings)}

        describe() if self.ranks is None else self.ranks.agree(describe)

    def run(self) -> dict[str, Any]:
        """Run the scenes of this process, and sum up those of all."""
        self.meet(self.results.open)
        left = [job for job in self.plan.jobs if not self.results.has(job)]
        own = [job for job in self.plan.jobs[self.rank :: self.world] if job in left]
        if left:
            self.meet(lambda: self.runner.calibrate(self.results.calibration))  # from here on scenes are done
            if self.rank:
                self.runner.calibrate(self.results.calibration)
        if own:
            try:
                self.run_scenes(own)
            except KeyboardInterrupt as stop:
                done, total = sum(map(self.results.has, self.plan.jobs)), len(self.plan.jobs)
                stop.args = (
                    f"interrupted after {done} of {total} scenes: the same command goes on from here",
                )
                raise
        self.meet()
        results = [self.results.read(job) for job in self.plan.jobs]
        summary = summarise(self.results.settings, results)
        if self.rank == 0:
            self.results.write(self.results.folder / SUMMARY, summary)
            with result_file(self.results.folder / TABLE) as temporary:
                temporary.write_text(markdown(summary), encoding="utf-8")
            with writing(self.results.folder / PICTURE):
                save_changes(self.results.folder / PICTURE, results)
        return summary

    def run_scenes(self, jobs: Sequence[Job]) -> None:
        """Run these scenes, the first one once more before all: kernels, compilation and calibration are not timed."""
        from tqdm import tqdm

        clip = self.plan.load(jobs[0])
        passes = (1 + len(jobs)) * self.runner.sides
        first = self.rank == 0
        with naming(jobs[0].name):
            seconds = self.runner.estimate(clip, 1 + len(jobs))
        if first and seconds is not None:
            print(f"{passes} runs: about {seconds:.0f} s, and measuring on top", file=sys.stderr)
        with tqdm(total=passes, unit="run", disable=not first) as bar:
            for number, job in enumerate(jobs):
                bar.set_description(job.name)
                if number:
                    clip = self.plan.load(job)
                with naming(job.name):
                    if number == 0:
                        for _ in self.runner.run(clip, bar.update):
                            pass
                    self.results.save(job, self.runner.judge(job, clip, bar.update))
