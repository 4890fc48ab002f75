"""`pacevggt train`: from a folder of images to a pace weight file."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..calibration.restoration import KEEP_RATIOS
from ..config import GLOBAL
from ..errors import PaceError, WeightsError
from ..hosts.base import find_host
from ..runtime.device import usable_device
from ..runtime.files import environment, whole_file, write_json
from ..version import __version__
from ..weights.hub import HUB_FILE
from ..weights.pace import PaceWeights
from .backbones import is_mini, load_backbone
from .compiling import works
from .curve import save_training_curve
from .fit import Fit, Settings
from .guest import guest
from .sources import ClipSource, FolderSource

PREFETCH = 4  # steps drawn ahead
LOG_EVERY = 20  # steps
STATE_FILE, REPORT_FILE, CURVE_FILE = "state.pt", "report.json", "curve.png"
# From this width on a backbone is large: its blocks are computed twice rather than kept, and no CPU trains it.
LARGE = 512
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
    """Train pace weights and write them to `options.out`; the first process alone writes.

    Writes `calibrated.safetensors` and `distilled.safetensors` (what the earlier stages gave, where there were any),
    `pace.safetensors` (the result), `report.json`, `curve.png`, and `state.pt` to resume from, each whole or not at
    all.

    Returns:
        The content of report.json.

    Raises:
        PaceError: images, backbone, device or settings do not fit, or the loss is not finite.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    name = options.device
    if name is None and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = usable_device(name)
    settings = options.settings
    check_options(options)
    if options.resume and not (options.out / STATE_FILE).is_file() and rank == 0:
        print(f"{options.out} holds no run to resume: starting anew")
    # What is on the disk is looked at before a large model is loaded.
    begun = None if options.start is None else weights_to_start(options.start, settings.mode)
    mini = options.backbone == "mini" or is_mini(Path(options.backbone))
    source = make_source(options, mini, device)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PaceError(f"{options.out} can't be made a folder for the results: {error.strerror}") from error
    model = load_backbone(options.backbone)
    large = model.aggregator.camera_token.shape[-1] >= LARGE
    if large and options.device is None and device.type == "cpu" and settings.steps:
        raise PaceError(
            "there is no CUDA device, and training for a model of this size would take weeks on the CPU: run it where "
            "there is a GPU, pass --calibrate, which takes minutes, or --device cpu to insist"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        model.to(device)
        weights = PaceWeights.new(model, mode=settings.mode)
        if begun is not None:
            begun.check(find_host(model))
            weights = completed(begun, weights).to(device)
        # In large models few kernels are short.
        pays = device.type == "cuda" and not large and settings.steps >= COMPILES_FROM
        compile = pays and works(device)
        if pays and not compile:
            print("torch.compile does not work on this machine: steps will take half as long again")
        with guest(model, weights, compile):
            fit = Fit(model, weights, source, settings, checkpointing=large, rank=rank, world=world)
            return Run(fit, options).go()
    finally:
        if world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def check_options(options: Options) -> None:
    """Check what needs neither model nor images.

    Raises:
        PaceError: options do not go together, or `out` holds an earlier run.
    """
    settings = options.settings
    if options.images is None and options.rooms is None:
        raise PaceError("training needs images: pass --images DIR, or --rooms for rendered ones")
    if options.images is not None and options.rooms is not None:
        raise PaceError("training takes its frames from one place: pass --images or --rooms, not both")
    if options.textures is not None and options.rooms != "all":
        raise PaceError(
            "--textures are photographs for rendered scenes of all kinds: pass --rooms, or leave them out"
        )
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
            f"the first stage, {settings.distil_steps} steps, would undo what the weights to start from have learned: "
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
    if options.images is not None:
        mode = "square" if mini else "crop"
        return FolderSource(
            options.images, max(options.settings.views), options.width or (224 if mini else 518), mode
        )
    width = options.width or (224 if mini else 504)  # an even number of patches
    from ..mini.sources import rendered_source  # its renderer is for rooms alone

    return rendered_source(options.rooms == "plain", width, options.textures, device)


class Run:
    """A run of `Fit` with its files, its bar and its records."""

    def __init__(self, fit: Fit, options: Options):
        self.fit, self.options, self.out = fit, options, options.out
        self.writes = fit.rank == 0
        self.losses: list[dict[str, float]] = []
        self.checks: list[dict[str, Any]] = []
        self.seconds_before = 0.0
        self.begun = time.monotonic()

    def go(self) -> dict[str, Any]:
        """Train to the end; returns the report."""
        from tqdm import tqdm

        fit, steps = self.fit, self.fit.settings.steps
        if self.options.resume and (self.out / STATE_FILE).is_file():
            self.load()
        elif self.options.start is not None:
            self.check("start")
        else:
            self.check("training-free")
            self.say(f"calibrating on {fit.settings.calibration} clips")
            fit.calibrate()
            self.save_weights("calibrated.safetensors")
            self.check("calibrated")
        saved = time.monotonic()
        with (
            ThreadPoolExecutor(2) as pool,
            tqdm(
                total=steps, initial=fit.step_number, unit="step", disable=not (self.writes and steps)
            ) as bar,
        ):
            pending: deque[Future[Any]] = deque()
            following = fit.step_number
            try:
                while fit.step_number < steps:
                    while len(pending) < PREFETCH and following < steps:
                        pending.append(pool.submit(fit.draw, following))
                        following += 1
                    drawn = pending.popleft().result()
                    if 0 < fit.step_number == fit.settings.distil_steps:
                        self.change_stage()
                    fit.step(drawn)
                    bar.update()
                    if fit.step_number % LOG_EVERY == 0 or fit.step_number == steps:
                        self.log(bar)
                    if self.writes and time.monotonic() - saved >= self.options.save_every:
                        self.save_state()
                        saved = time.monotonic()
            finally:
                for future in pending:
                    future.cancel()
        if self.checks[-1]["step"] != steps:  # a finished run that is resumed has been here
            if steps == fit.settings.distil_steps:
                self.change_stage()
            else:
                self.check("refined")
        return self.finish()

    def change_stage(self) -> None:
        """End stage 1: fit the linear part, if there is one, anew, to the tokens that the scorer now keeps."""
        self.fit.begin_refinement()
        self.save_weights("distilled.safetensors")
        self.check("distilled")

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
        self.say(f"{stage}: comparing {self.fit.settings.checks} clips with the unpruned model")
        self.checks.append({"stage": stage, "step": self.fit.step_number, "ratios": self.fit.check()})

    def say(self, what: str) -> None:
        """Tell what takes long and has no bar."""
        from tqdm import tqdm

        if self.writes:
            tqdm.write(what)

    def seconds(self) -> float:
        """Seconds of work, those before a resumption among them."""
        return self.seconds_before + time.monotonic() - self.begun

    def save_weights(self, name: str) -> None:
        """Write the weights as they are; before the first step without what only steps change."""
        if not self.writes:
            return
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
        changed.save(self.out / name)

    def save_state(self) -> None:
        """Write the state to resume from."""
        state = {
            **self.fit.state(),
            "start": self.options.start,
            "losses": self.losses,
            "checks": self.checks,
            "seconds": self.seconds(),
        }
        with whole_file(self.out / STATE_FILE) as temporary:
            torch.save(state, temporary)

    def load(self) -> None:
        """Take over the state of a run that was stopped."""
        path = self.out / STATE_FILE
        try:
            state = torch.load(path, map_location=self.fit.device, weights_only=True)
        except Exception as error:  # pickle and zip trip over a damaged file in many ways
            raise PaceError(f"{path} is damaged: start anew with another --out") from error
        if state.get("start") != self.options.start:
            raise PaceError(
                f"can't resume: the run began with {state.get('start') or 'untrained weights'}: pass the same --start, "
                "or start anew with another --out"
            )
        self.fit.load(state)
        self.losses, self.checks, self.seconds_before = state["losses"], state["checks"], state["seconds"]

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
            "parameters": sum(p.numel() for p in fit.modules.parameters()),
            "mode": fit.weights.mode,
            "full_heads": [list(head) for head in fit.weights.full_heads],
            "checks": self.checks,
            "losses": self.losses[-1] if self.losses else None,
            "environment": environment(fit.device),
        }
        if self.writes:
            self.save_state()
            self.save_weights(HUB_FILE)
            write_json(self.out / REPORT_FILE, report)
            attempt(lambda: save_training_curve(self.out / CURVE_FILE, self.losses, self.checks))
        return report


def attempt(write: Callable[[], None]) -> None:
    """Write a picture, unless the library for it is missing: the weights are there, and that is what matters."""
    try:
        write()
    except PaceError as error:
        print(f"left out: {error}")


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
