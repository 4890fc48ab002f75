"""`pacevggt train`: from a folder of images to a pace weight file."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..arguments import shown
from ..calibration.restoration import KEEP_RATIOS
from ..config import GLOBAL
from ..errors import PaceError, WeightsError
from ..hosts.base import find_host
from ..patching.guest import guest
from ..runtime.device import usable_device
from ..runtime.files import environment, write_json
from ..runtime.ranks import Ranks, place_of_torchrun, processes_of_torchrun
from ..version import __version__
from ..weights.hub import HUB_FILE
from ..weights.pace import PaceWeights
from .backbones import is_mini, load_backbone, package_of
from .compiling import works
from .curve import save_training_curve
from .fit import Fit, Settings
from .signals import Signals, Stopped
from .sources import MOST_VIEWS, ClipSource, FolderSource
from .states import STATE_FILE, loaded_state, results_folder, save_state, writing

PREFETCH = 4  # steps drawn ahead
LOG_EVERY = 20  # steps
REPORT_FILE, CURVE_FILE = "report.json", "curve.png"
CALIBRATED, DISTILLED = "calibrated.safetensors", "distilled.safetensors"
FILES = (STATE_FILE, REPORT_FILE, CURVE_FILE, CALIBRATED, DISTILLED, HUB_FILE)
# From this width on a backbone is large: its blocks are computed twice rather than kept, and no CPU trains it.
LARGE = 512
WIDEST = 2016  # pixels of rendered frames
# Steps from about which on faster ones win back the minute or two that compiling takes.
COMPILES_FROM = 2000


@dataclass(frozen=True)
class Options:
    """What `pacevggt train` is asked for.

    Attributes:
        out: folder for the results.
        backbone: see `backbones.load_backbone`.
        images: folder of images or of clips, see `sources.FolderSource`; or None, with
        rooms: "plain" for plain rooms, "all" for rooms and facades with textures.
        textures: zip file or folder of photographs for "all".
        width: pixels; None takes 224 for VGGT-mini, else 518 for images and 504 for rooms.
        device: None takes CUDA where there is one.
        start: pace weights to begin with, as `PaceWeights.load` takes them, in place of untrained ones; what they lack
            is untrained.
        resume: go on from `out`, if a run was stopped there.
        save_every: seconds between two states.
        settings: of the training.
    """

    out: Path
    backbone: str = "mini"
    images: Path | None = None
    rooms: str | None = None
    textures: Path | None = None
    width: int | None = None
    device: str | None = None
    start: str | None = None
    resume: bool = False
    save_every: float = 60.0
    settings: Settings = field(default_factory=Settings)


def run_training(options: Options) -> dict[str, Any]:
    """Train pace weights and write them to `options.out`. Only the first process writes.

    The result is `pace.safetensors`; `calibrated.safetensors` and `distilled.safetensors` are those of earlier stages.
    `report.json` and `curve.png` describe the run, and `state.pt` resumes it. Each is written whole or not at all.

    Returns:
        The content of report.json.

    Raises:
        PaceError: images, backbone, device or settings do not fit, the loss is not finite, or a file can't be written.
        Stopped: by a signal, when the step was done and its state written.
    """
    rank, world = place_of_torchrun()
    settings = options.settings
    check_options(options)
    device = usable_device(options.device)
    if options.resume and not (options.out / STATE_FILE).is_file() and rank == 0:
        print(f"{options.out} holds no run to resume: starting anew", file=sys.stderr)
    # What is on the disk is looked at before a large model is loaded.
    begun = None if options.start is None else weights_to_start(options.start, settings.mode)
    mini = options.backbone == "mini" or is_mini(Path(options.backbone))
    source = make_source(options, mini, device)
    results_folder(options.out, FILES if rank == 0 else ())
    if not mini and rank == 0:
        print(f"loading {options.backbone}", file=sys.stderr)
    model = load_backbone(options.backbone)
    large = model.aggregator.camera_token.shape[-1] >= LARGE
    if large and options.device is None and device.type == "cpu" and settings.steps:
        raise PaceError(
            "training for a model of this size takes weeks on the CPU, and there is no CUDA device: use a machine with "
            "a GPU, pass --calibrate, which takes minutes, or --device cpu to insist"
        )
    with processes_of_torchrun(device) as ranks:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        model.to(device)
        weights = PaceWeights.new(model, mode=settings.mode)
        if begun is not None:
            begun.check(find_host(model))
            weights = completed(begun, weights).to(device)
        # In large models few kernels are short.
        pays = device.type == "cuda" and not large and settings.steps >= COMPILES_FROM
        compile = pays and works(device)
        if pays and not compile:
            print(
                "torch.compile does not work on this machine: steps will take half as long again",
                file=sys.stderr,
            )
        with guest(model, weights, compile), Signals(world) as signals:
            fit = Fit(model, weights, source, settings, checkpointing=large, rank=rank, world=world)
            return Run(fit, options, signals, ranks).go()


def check_options(options: Options) -> None:
    """Check what needs neither model nor images.

    Raises:
        PaceError: options do not go together, or `out` holds an earlier run.
    """
    settings = options.settings
    if package_of(options.backbone) is not None:
        raise PaceError(
            f"training is for VGGT, and {options.backbone} is of another family: find its full-attention heads with "
            "pacevggt_patch.calibrate"
        )
    if options.images is None and options.rooms is None:
        raise PaceError("training needs images: pass --images DIR, or --rooms for rendered ones")
    if options.images is not None and options.rooms is not None:
        raise PaceError("training takes its frames from one place: pass --images or --rooms, not both")
    if options.textures is not None and options.rooms != "all":
        raise PaceError(
            "--textures are photographs for rendered scenes of all kinds: pass --rooms, or leave them out"
        )
    if options.rooms is not None and options.width is not None:
        # Of an odd number of patches only plain rooms can be rendered.
        step = 14 if options.rooms == "plain" else 28
        if not step <= options.width <= WIDEST or options.width % step:
            raise PaceError(
                f"width must be a multiple of {step} up to {WIDEST} for rendered scenes, got {shown(options.width)}"
            )
    if options.rooms == "all" and not all(2 <= views <= MOST_VIEWS for views in settings.views):
        raise PaceError(
            f"views must be between 2 and {MOST_VIEWS} for rendered scenes, got {list(settings.views)}"
        )
    if settings.mode == GLOBAL and options.start is None and min(settings.views) < 2:
        raise PaceError("views must be at least 2 to tell which heads find matches between frames, got 1")
    if (options.out / STATE_FILE).is_file() and not options.resume:
        raise PaceError(
            f"{options.out} holds an earlier run: pass --resume to go on with it, or another --out"
        )
    if options.start is not None and not settings.steps:
        raise PaceError(
            "weights to start from are trained on, not calibrated anew: leave out --start or --calibrate"
        )
    if options.start is not None and settings.distil_steps:
        raise PaceError(
            f"the distillation, {settings.distil_steps} steps, would undo what the weights to start from have learned: "
            "leave out --distil, or pass 0"
        )


def weights_to_start(source: str, mode: str) -> PaceWeights:
    """Weights to go on with.

    Raises:
        WeightsError: they can't be had, or are for the other mode.
    """
    weights = PaceWeights.load(source)
    if weights.mode != mode:
        raise WeightsError(
            f"{source} is for {weights.mode} pruning: pass --mode {weights.mode}, or other weights"
        )
    return weights


def completed(weights: PaceWeights, fresh: PaceWeights) -> PaceWeights:
    """Weights with the untrained modules of others in place of those that they lack, as a calibration does."""
    lacking = {name: module for name, module in fresh.modules().items() if getattr(weights, name) is None}
    return replace(weights, **lacking)


def make_source(options: Options, mini: bool, device: torch.device) -> ClipSource:
    """Where the clips come from. VGGT-mini was trained on squares."""
    width = options.width
    if options.images is not None:
        if width is None:
            width = 224 if mini else 518
        return FolderSource(options.images, max(options.settings.views), width, "square" if mini else "crop")
    if width is None:
        width = 224 if mini else 504  # an even number of patches
    from ..mini.sources import rendered_source  # its renderer is for rooms alone

    return rendered_source(options.rooms == "plain", width, options.textures, device)


class Run:
    """A run of `Fit` with its files, its bar and its records."""

    def __init__(self, fit: Fit, options: Options, signals: Signals, ranks: Ranks | None = None):
        self.fit, self.options, self.out, self.signals = fit, options, options.out, signals
        self.writes, self.ranks = fit.rank == 0, ranks
        self.losses: list[dict[str, float]] = []
        self.checks: list[dict[str, Any]] = []
        self.seconds_before = 0.0
        self.begun = time.monotonic()

    def go(self) -> dict[str, Any]:
        """Train to the end; returns the report."""
        fit, settings = self.fit, self.fit.settings
        try:
            resumes = self.options.resume and (self.out / STATE_FILE).is_file()
            begin = partial(self.begin, resumes)
            begin() if self.ranks is None else self.ranks.agree(begin)
            if not resumes and self.options.start is not None:
                self.check("start")
                self.save_state()
            elif not resumes:
                self.check("training-free")
                fit.calibrate(self.watch)
                self.save_weights(CALIBRATED)
                self.check("calibrated")
                self.save_state()
            if settings.steps:
                self.train(settings.distil_steps)
                # What the last check was of is told by the state, and a finished run that is resumed has all of them.
                if fit.step_number == settings.distil_steps > self.checks[-1]["step"]:
                    fit.begin_refinement(self.watch)
                    self.save_weights(DISTILLED)
                    self.check("distilled")
                self.train(settings.steps)
                if self.checks[-1]["step"] != settings.steps:
                    self.check("refined")
            return self.finish()
        except Stopped as stopped:
            stopped.tell(fit.step_number, self.out / STATE_FILE)
            raise

    def begin(self, resumes: bool) -> tuple[None, dict[str, str]]:
        """Take over a state where there is one; tells what must be the same in all processes."""
        if resumes:
            self.load()
        fit = self.fit
        return None, {
            "settings": str(fit.settings),
            "images": fit.source.description,
            "type of device": fit.device.type,
            "model": " ".join(value[:12] for value in fit.weights.fingerprints.values()),
            "weights": fit.weights.digest()[:12],
            "steps done": str(fit.step_number) if resumes else "none",
        }

    def train(self, end: int) -> None:
        """Steps up to number `end`, and the state after the last one, also where a signal makes it an earlier one."""
        fit, saved = self.fit, time.monotonic()
        following = first = fit.step_number
        if first >= end:
            return
        bar = tqdm(total=self.fit.settings.steps, initial=first, unit="step", disable=not self.writes)
        with self.signals.held(), ThreadPoolExecutor(2) as pool, bar:
            pending: deque[Future[Any]] = deque()
            try:
                while fit.step_number < end and not self.signals.asked():
                    while len(pending) < PREFETCH and following < end:
                        pending.append(pool.submit(fit.draw, following))
                        following += 1
                    fit.step(pending.popleft().result())
                    bar.update()
                    if fit.step_number % LOG_EVERY == 0 or fit.step_number == fit.settings.steps:
                        self.log(bar)
                    if time.monotonic() - saved >= self.options.save_every:
                        self.save_state()
                        saved = time.monotonic()
            finally:
                for future in pending:
                    future.cancel()
            if fit.step_number > first:
                self.save_state()

    def log(self, bar: Any) -> None:
        """Record the losses, show them, and stop if they are no numbers."""
        losses = self.fit.latest_losses()
        self.losses.append({"step": self.fit.step_number, **losses})
        bar.set_postfix(
            {name: f"{losses[name]:.3f}" for name in ("total", "camera", "depth") if name in losses}
        )
        if not math.isfinite(losses["total"]):
            raise PaceError(
                f"the loss is {losses['total']} at step {self.fit.step_number}: start anew with a smaller --rate"
            )

    def check(self, stage: str) -> None:
        """Record how far the pruned model is from the unpruned one."""
        ratios = self.fit.check(f"{stage}: comparing with the unpruned model", self.watch)
        self.checks.append({"stage": stage, "step": self.fit.step_number, "ratios": ratios})

    def watch(self, clips: Iterable[Any], what: str, count: int) -> Iterable[Any]:
        """Clips with a bar that shows how many there were."""
        return tqdm(clips, what, count, unit="clip", disable=not self.writes)

    def seconds(self) -> float:
        """Seconds of work, those before a resumption among them."""
        return self.seconds_before + time.monotonic() - self.begun

    def weights(self) -> PaceWeights:
        """The weights as they are; before the first step without what only steps change."""
        fit = self.fit
        ratios = fit.settings.keep_ratios if fit.step_number else KEEP_RATIOS
        training = {
            "backbone": self.options.backbone,
            "images": fit.source.description,
            "start": self.options.start,
            "steps": fit.step_number,
            "processes": fit.world,
            "settings": asdict(fit.settings),
            "checks": self.checks,
        }
        changed = replace(
            fit.weights, keep_ratios=tuple(ratios), training=training, library_version=__version__
        )
        if not fit.step_number:  # untrained modules change nothing, and would only cost time
            changed = replace(changed, scorer=None, merge=None, block_deltas=None)
            if changed.mode == GLOBAL:
                changed = replace(changed, keep_ratios=())  # full-attention heads are the same for all
        return changed

    def save_weights(self, name: str) -> None:
        """Write the weights as they are."""
        if self.writes:
            self.weights().save(self.out / name)

    def save_state(self) -> None:
        """Write the state to resume from."""
        if not self.writes:
            return
        state = {
            **self.fit.state(),
            "start": self.options.start,
            "losses": self.losses,
            "checks": self.checks,
            "seconds": self.seconds(),
        }
        save_state(state, self.out / STATE_FILE)

    def load(self) -> None:
        """Take over the state of a run that was stopped."""
        with loaded_state(self.out / STATE_FILE, self.fit.device) as state:
            if state["start"] != self.options.start:
                raise PaceError(
                    f"can't resume: the run began with {state['start'] or 'untrained weights'}: pass the same --start, "
                    "or start anew with another --out"
                )
            self.fit.load(state)
            kept = [list(state["losses"]), list(state["checks"]), float(state["seconds"])]
            self.losses, self.checks, self.seconds_before = json.loads(json.dumps(kept, allow_nan=False))
            # Both will be read at the end of the run, which is late to find them damaged.
            if not all(math.isfinite(record["total"]) and record["step"] for record in self.losses):
                raise ValueError("losses that are no numbers")
            if not 0 <= self.checks[-1]["step"] <= self.fit.step_number:
                raise ValueError("a check of another step")
            format_checks(self.checks)

    def finish(self) -> dict[str, Any]:
        """Write weights, report, curve and state."""
        fit = self.fit
        report = {
            "backbone": self.options.backbone,
            "dimensions": str(fit.weights.backbone),
            "images": fit.source.description,
            "start": self.options.start,
            "settings": asdict(fit.settings),
            "processes": fit.world,
            "steps": fit.step_number,
            "seconds": self.seconds(),
            "parameters": sum(p.numel() for p in self.weights().modules().parameters()),
            "mode": fit.weights.mode,
            "full_heads": [list(head) for head in fit.weights.full_heads],
            "checks": self.checks,
            "losses": self.losses[-1] if self.losses else None,
            "environment": environment(fit.device),
        }
        if self.writes:
            self.save_state()
            self.save_weights(HUB_FILE)
            with writing(self.out / REPORT_FILE):
                write_json(self.out / REPORT_FILE, report)
            self.draw_curve()
        return report

    def draw_curve(self) -> None:
        """Write the curve, unless it can't be: the weights are there, and that is what matters."""
        path = self.out / CURVE_FILE
        try:
            with writing(path):
                path.unlink(missing_ok=True)  # one of an earlier run
                save_training_curve(path, self.losses, self.checks)
        except PaceError as error:
            print(f"left out: {error}", file=sys.stderr)


def format_checks(checks: list[dict[str, Any]]) -> str:
    """What each stage gave, as a table for people: differences from the unpruned model."""
    columns = [("rotation_deg", "rotation", 2), ("direction_deg", "direction", 1), ("depth", "depth", 4)]
    columns += [("tokens", "tokens", 3)]
    lines = [
        "Difference from the unpruned model, on clips that no step drew (degrees, degrees, relative, relative):",
        f"{'keep':>5s}  {'stage':15s}" + "".join(f"{title:>11s}" for _, title, _ in columns),
    ]
    for ratio in checks[0]["ratios"]:
        for check in checks:
            row = check["ratios"][ratio]
            cells = (f"{row[key]:.{digits}f}" if key in row else "-" for key, _, digits in columns)
            lines.append(f"{ratio:>5s}  {check['stage']:15s}" + "".join(f"{cell:>11s}" for cell in cells))
    return "\n".join(lines)
