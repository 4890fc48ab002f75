"""`compare`: one after another what the other files of this folder do."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

from torch import nn

from ..arguments import file_path, several
from ..config import DEFAULT_KEEP_RATIO
from ..runtime.files import write_json
from ..runtime.ranks import Ranks
from ..training.states import result_file, results_folder, writing
from .clouds import make_cloud
from .differences import Difference, difference
from .exports import COLMAP_POINTS, save_colmap, save_ply
from .page import Page, as_bytes
from .plan import Options, Plan, Source, make_plan
from .report import clip_report, new_report
from .runs import STOCK, Runner, Side, borrowed
from .shared_runs import SharedRunner

REPORT, PAGE = "report.json", "report.html"
PLY_POINTS = 1_000_000
REPORT_FILES = (REPORT, PAGE)


def compare(
    backbone: str | nn.Module = "mini",
    clips: Sequence[str | PathLike[str]] = (),
    *,
    out: str | PathLike[str] = "runs/compare",
    keep_ratios: Sequence[float] = (DEFAULT_KEEP_RATIO,),
    modes: Sequence[str | None] = (None,),
    merge_budget: float | None = None,
    weights: Any = "auto",
    frames: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    repeats: int = 3,
    compile: bool = False,
    colmap: str | PathLike[str] | None = None,
    ply: bool = False,
    process_group: Any = None,
) -> dict[str, Any]:
    """Run a model stock and accelerated on clips, and write how much faster it is and how far apart the outputs are.

    Writes `report.json` and `report.html` to `out`, each whole or not at all, anew after every clip. Progress goes to
    standard error. Where one side runs out of GPU memory the report says so.

    Args:
        backbone: "mini", a checkpoint file of VGGT-mini or VGGT-1B, a Hub id, or a loaded model. Or the name of another
            family, and after a colon a checkpoint: "pi3", "vggt-omega:FILE". A loaded one is moved to the device, and
            cast to bfloat16 where that is the precision. At the end it is the stock model again.
        clips: folders of images, folders with a `clip.json`, or videos. None: the clip that comes with the package.
        out: folder; made if it is not there.
        keep_ratios, modes: each mode is run with each keep ratio. The mode None is that of the weights.
        merge_budget, weights, compile: as in `accelerate`.
        frames: of a clip, evenly spaced; None takes all, up to 24 on the CPU and 100 on a GPU.
        device: None takes CUDA where there is one.
        precision: "float32", "autocast" or "bfloat16"; None takes float32 on the CPU, else autocast.
        repeats: timed runs of each side, in turn.
        colmap: folder for a COLMAP model of each side; needs the extra `colmap`.
        ply: write the cloud of each side as PLY.
        process_group: as in `accelerate`: each process of the group makes this call, accelerated runs share the frames
            of a clip, and stock runs in the first process alone, which writes.

    Returns:
        The content of report.json; in other processes of a group it has no clips.

    Raises:
        PaceError: a library is missing, or a setting, clip, model or file does not fit; before long work starts.
    """
    options = Options(
        backbone=backbone,
        clips=tuple(several("clips", clips)),
        keep_ratios=tuple(several("keep_ratios", keep_ratios)),
        modes=tuple(several("modes", modes)),
        merge_budget=merge_budget,
        weights=weights,
        frames=frames,
        device=device,
        precision=precision,
        repeats=repeats,
        compile=compile,
        out=out,
        colmap=colmap,
        ply=ply,
    )
    ranks = None if process_group is None else Ranks(process_group)
    return run_plan(make_plan(options), None if ranks is None or ranks.world == 1 else ranks)


def run_plan(plan: Plan, ranks: Ranks | None = None) -> dict[str, Any]:
    """Run what was planned, here or in the processes of a group; see `compare`."""
    with borrowed(plan.options.backbone, plan) as model:
        return Comparison(plan, model, ranks).run()


class Comparison:
    """A plan that is being run."""

    def __init__(self, plan: Plan, model: nn.Module, ranks: Ranks | None = None):
        self.plan, self.options = plan, plan.options
        self.runner = Runner(model, plan) if ranks is None else SharedRunner(model, plan, ranks)
        self.writes = ranks is None or ranks.rank == 0
        self.out = file_path("out", self.options.out)
        self.page, self.report = Page(), new_report(plan, 1 if ranks is None else ranks.world)
        self.exported: list[str] = []

    def run(self) -> dict[str, Any]:
        """Run all clips, and write after each of them."""
        from tqdm import tqdm

        if not self.writes:
            for source in self.plan.sources:
                self.runner.run(source.clip, lambda: None)
            return self.report
        results_folder(self.out, REPORT_FILES)
        if self.options.colmap is not None:
            results_folder(file_path("colmap", self.options.colmap))
        sources = self.plan.sources
        sides = 1 + len(self.runner.configs)
        passes = (1 + self.options.repeats) * sides
        seconds = self.runner.estimate([source.clip for source in sources])
        if seconds is not None:
            more = ", and more for compiling" if self.options.compile else ""
            print(f"{passes * len(sources)} runs: about {seconds:.0f} s or less{more}", file=sys.stderr)
        for source in sources:
            with tqdm(total=passes, desc=f"{source.clip.name}, {len(source.clip)} frames", unit="run") as bar:
                found = self.runner.run(source.clip, bar.update)
                bar.update(bar.total - bar.n)  # what did not fit has not run
            with tqdm(total=3, desc="report", unit="part") as bar:
                self.add(source, found, bar.update)
        return self.report

    def add(self, source: Source, sides: list[Side], update: Callable[[], Any]) -> None:
        """Compare the sides of a clip, and write all there is so far."""
        stock = sides[0].prediction if sides[0].fits else None
        differences: dict[str, Difference] = {}
        for side in sides[1:]:
            if stock is not None and side.fits and side.prediction is not None:
                differences[side.name] = difference(stock, side.prediction)
        entry = clip_report(source, sides, differences, self.runner)
        update()
        self.report["clips"].append(entry)
        sections = len(self.plan.sources) * len(self.runner.configs)
        self.page.add(source.clip, entry, sides, differences, self.runner.patch_size, sections)
        update()
        self.write()
        if self.options.ply or self.options.colmap is not None:  # what can't be written takes nothing along
            self.export(source, sides, len(self.report["clips"]) - 1, differences)
            self.write()
        update()

    def write(self) -> None:
        """Write report and page as they are by now."""
        self.report["files"] = [REPORT, PAGE, *self.exported]
        with writing(self.out / REPORT):
            write_json(self.out / REPORT, self.report)
        with result_file(self.out / PAGE) as temporary:
            temporary.write_bytes(as_bytes(self.page.html(self.report)))

    def export(
        self, source: Source, sides: list[Side], number: int, differences: dict[str, Difference]
    ) -> None:
        """Write PLY files and COLMAP models, where they are asked for."""
        for side in sides:
            if not side.fits or side.prediction is None:
                continue
            name = file_name(side.name) if len(self.plan.sources) == 1 else f"{number}-{file_name(side.name)}"
            found = differences.get(side.name)
            # Both clouds in the frame of stock, so that they can be laid over each other.
            alignment = None if side.name == STOCK or found is None else found.alignment
            if self.options.ply:
                cloud = make_cloud(side.prediction, source.clip.images, alignment, PLY_POINTS)
                file = f"points-{name}.ply"
                save_ply(self.out / file, cloud.points, cloud.colours)
                self.exported.append(file)
            if self.options.colmap is not None:
                cloud = make_cloud(side.prediction, source.clip.images, alignment, COLMAP_POINTS)
                save_colmap(file_path("colmap", self.options.colmap) / name, cloud)


def file_name(name: str) -> str:
    """A name as a part of a file's: letters, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
