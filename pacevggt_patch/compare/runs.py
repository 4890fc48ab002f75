"""The runs: one model on one clip, stock and with each setting in turn, timed, with what each of them gave."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..clips import Clip
from ..config import PaceConfig
from ..errors import PaceError
from ..evaluation import decode_pose_encoding
from ..evaluation.geometry import encode_cameras
from ..evaluation.timing import Timing, time_interleaved
from ..hosts.base import find_host
from ..patching.install import accelerate, is_accelerated, paused, remove, state_of, summary
from ..planning.fit_budget import non_negative_least_squares
from ..training.backbones import load_backbone
from ..weights import cache
from .plan import Plan, in_words, runs_mini

STOCK = "stock"


@dataclass(frozen=True)
class Prediction:
    """What a model gave for a clip of S frames, float32, on the CPU.

    Attributes:
        pose_encoding: [S, 9], as VGGT encodes cameras.
        world_to_camera: [S, 3, 4].
        intrinsics: [S, 3, 3], pixels.
        depth: [S, H, W] z-depth, in the model's own unit.
        confidence: [S, H, W].
    """

    pose_encoding: Tensor
    world_to_camera: Tensor
    intrinsics: Tensor
    depth: Tensor
    confidence: Tensor

    def outputs(self) -> dict[str, Tensor]:
        """Cameras and depth under the names and in the shapes of VGGT's own outputs."""
        return {"pose_enc": self.pose_encoding[None], "depth": self.depth[None, ..., None]}


@dataclass
class Side:
    """One side of a comparison: the stock model, or the model with a setting.

    Attributes:
        name: in words.
        config: the setting; None for stock.
        weights: which weights ran, in words; "" for stock.
        full_heads: number of full-attention heads.
        kept_count: K, patch tokens of a frame that were kept, or None where all were.
        kept: [S, K] their numbers in each frame of the clip. None where all were kept, and of a model that puts the
            frames into an order of its own: which row is of which frame is not known then.
        prediction: None where it did not fit into memory.
        timing: its runs; without seconds where it did not fit.
    """

    name: str
    config: PaceConfig | None = None
    weights: str = ""
    full_heads: int = 0
    kept_count: int | None = None
    kept: Tensor | None = None
    prediction: Prediction | None = None
    timing: Timing = field(default_factory=Timing)

    @property
    def fits(self) -> bool:
        """Whether it ran to its end."""
        return self.prediction is not None and bool(self.timing.seconds)


class Runner:
    """A model with the settings that it is run with.

    Args:
        model: on its device, in evaluation mode.
        plan: what to run.

    Raises:
        PaceError: the model, a setting or the weights do not fit.
    """

    def __init__(self, model: nn.Module, plan: Plan):
        self.model, self.plan, self.host = model, plan, find_host(model)
        self.weights: dict[PaceConfig, Any] = dict.fromkeys(plan.configs, plan.options.weights)
        self.in_force: PaceConfig | None = None
        # A setting without a mode now has that of the weights.
        self.configs = tuple(dict.fromkeys(self.install(config) for config in plan.configs))
        self.weights = dict.fromkeys(self.configs, plan.options.weights)
        self.heads = self.host.spec().num_heads * len(self.host.of_kind("global"))
        self.patch_size = self.host.patch_size

    def install(self, config: PaceConfig) -> PaceConfig:
        """Put a setting in force; returns it as it is in force."""
        if self.in_force != config:
            with warnings.catch_warnings():
                # That no weights are bundled for pre-AA pruning is said by the report, once.
                warnings.filterwarnings(
                    "ignore", message="no weights of pre-AA pruning", category=UserWarning
                )
                accelerate(self.model, config, weights=self.weights[config])
            self.in_force = config
        return state_of(self.model).config

    def estimate(self, clips: list[Clip]) -> float | None:
        """Seconds that all runs on the clips will take at most: those of as many runs of the stock model.

        Two short stock runs tell what a frame and what a pair of frames costs. None where not even these fit.
        """
        shortest = min(clips, key=len)
        counts = [max(1, len(shortest) // 8), max(1, len(shortest) // 4)]
        rows, seconds = [], []
        for count in [counts[0], *dict.fromkeys(counts)]:  # the first one warms up
            images = self.images(shortest)[:count]
            start = time.perf_counter()
            with memory_kept(self.plan.device) as fits, paused(self.model):
                self.forward(images)
            if not fits:
                return None
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            rows.append([float(count), float(count**2)])
            seconds.append(time.perf_counter() - start)
        of_frame, of_pair = non_negative_least_squares(rows[1:], seconds[1:])
        passes = (1 + self.plan.options.repeats) * (1 + len(self.configs))
        return passes * sum(of_frame * len(clip) + of_pair * len(clip) ** 2 for clip in clips)

    def images(self, clip: Clip) -> Tensor:
        """[S, 3, H, W] on the model's device, in the dtype that the precision wants."""
        dtype = torch.bfloat16 if self.plan.precision == "bfloat16" else torch.float32
        return clip.images.to(self.plan.device, dtype)

    def forward(self, images: Tensor) -> dict[str, Any]:
        """One full prediction, as a user has it."""
        given = self.host.model_images(images)
        if self.plan.precision == "bfloat16":
            return self.host.run_narrow(given)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.plan.precision == "autocast"):
            return self.model(given)

    def run(self, clip: Clip, update: Callable[[], Any]) -> list[Side]:
        """Run a clip: each side once for what it gives, then all in turn for their times.

        Args:
            clip: on the CPU.
            update: called after every run.

        Returns:
            The sides, stock first. One that runs out of memory has no prediction or no times.
        """
        images = None
        with memory_kept(self.plan.device):
            images = self.images(clip)
        sides = [Side(STOCK), *(Side(in_words(config), config) for config in self.configs)]
        by_name = {side.name: side for side in sides}
        if images is None:  # not even the clip itself fits
            return sides
        for side in sides:
            self.prepare(side)
            with memory_kept(self.plan.device) as fits:
                side.prediction = self.predict(side, images, clip)
            if fits and side.config is not None:
                self.describe(side)
            update()

        def time_one(side: Side) -> None:
            with memory_kept(self.plan.device) as fits:
                self.outputs(side, images)
            if not fits:
                side.prediction = None

        runs = {side.name: lambda side=side: time_one(side) for side in sides if side.prediction is not None}
        timings = time_interleaved(
            runs,
            self.plan.options.repeats,
            self.plan.device,
            keep_results=False,
            warm_up=False,
            update=update,
            prepare=lambda name: self.prepare(by_name[name]),
        )
        for name, timing in timings.items():
            if by_name[name].prediction is not None:
                by_name[name].timing = timing
        return sides

    def prepare(self, side: Side) -> None:
        """Put the setting of a side in force; the stock model runs whatever is."""
        if side.config is not None:
            self.install(side.config)

    def outputs(self, side: Side, images: Tensor) -> dict[str, Any]:
        """What a side gives for images [S, 3, H, W], on their device."""
        with paused(self.model) if side.config is None else contextlib.nullcontext():
            return self.forward(images)

    def predict(self, side: Side, images: Tensor, clip: Clip) -> Prediction | None:
        """What a side gives for a clip; a first run, which also compiles and calibrates."""
        return self.prediction(self.outputs(side, images), side, clip)

    def prediction(self, outputs: Any, side: Side, clip: Clip) -> Prediction:
        """What the model returned for a clip, by names that are those of all families."""
        try:
            named = self.host.predictions(outputs)
        except (KeyError, TypeError) as error:
            raise PaceError(
                f"{side.name} returned outputs without cameras and depth ({error}), so they can't be compared"
            ) from error
        return prediction_of(named, clip, side.name)

    def describe(self, side: Side) -> None:
        """Take down what ran, right after a run of the setting."""
        assert side.config is not None
        found, state = summary(self.model), state_of(self.model)
        side.weights = "none (this clip could not be calibrated on)" if state.pending else found.weights
        side.weights = without_paths(side.weights)
        if found.kept is not None:
            side.kept_count = found.kept.shape[-1]
            side.kept = None if self.host.reorders_frames else found.kept[0].cpu()
        if state.weights is not None:
            side.full_heads = len(state.weights.full_heads)
            self.weights[side.config] = state.weights  # once calibrated, a setting stays so


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that the device ran out of memory; cuBLAS and cuDNN have errors of their own."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


@contextmanager
def memory_kept(device: torch.device) -> Generator[list[bool]]:
    """Ends the block where the device runs out of memory, and frees what was taken; yields [True] until then."""
    fits = [True]
    try:
        yield fits
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fits.clear()
    if not fits and device.type == "cuda":  # the error itself, which holds the tensors, is gone by now
        gc.collect()
        torch.cuda.empty_cache()


def to_device(backbone: str | nn.Module, plan: Plan) -> nn.Module:
    """The model in evaluation mode on the device, in the dtype that the precision wants.

    Raises:
        PaceError: it can't be loaded, is accelerated already, can't run in that precision, or does not fit into the
            device's memory.
    """
    if isinstance(backbone, str):
        if not runs_mini(backbone):
            print(f"loading {backbone}", file=sys.stderr)
        model = load_backbone(backbone)
    elif is_accelerated(backbone):
        raise PaceError("this model is accelerated already: call pacevggt_patch.remove(model) first")
    else:
        model = backbone.eval()
    host = find_host(model)
    if plan.precision == "bfloat16" and not host.narrow_weights:
        raise PaceError(
            f"heads of {type(model).__name__} run in float32, so its weights can't be bfloat16: use "
            "--precision autocast"
        )
    if plan.precision == "float32" and plan.device.type == "cuda" and host.own_autocast:
        raise PaceError(
            f"{type(model).__name__} switches autocast on by itself on a GPU, so it can't run in float32 there: use "
            "--precision autocast"
        )
    try:
        return model.to(plan.device, torch.bfloat16 if plan.precision == "bfloat16" else None)
    except torch.cuda.OutOfMemoryError as error:
        raise PaceError(f"the model itself does not fit into the memory of {plan.device}") from error


def prediction_of(outputs: Mapping[str, Any], clip: Clip, name: str) -> Prediction:
    """Cameras, depth and confidence of a model's outputs, as `Host.predictions` names them.

    Raises:
        PaceError: one is missing, has another shape, or is not finite.
    """
    frames, height, width = len(clip), clip.height, clip.width
    encoded = "world_to_camera" not in outputs
    cameras = {"world_to_camera": (1, frames, 3, 4), "intrinsics": (1, frames, 3, 3)}
    shapes = {
        **({"pose_enc": (1, frames, 9)} if encoded else cameras),
        "depth": (1, frames, height, width, 1),
        "depth_conf": (1, frames, height, width),
    }
    found = {}
    for key, shape in shapes.items():
        value = outputs.get(key)
        if not isinstance(value, Tensor) or value.shape != shape:
            raise PaceError(
                f"the model must return {key!r} as a tensor {list(shape)} to be compared, and {name} did not"
            )
        found[key] = value[0].detach().float().cpu()
        if not bool(found[key].isfinite().all()):
            raise PaceError(
                f"{name} returned {key!r} with values that are not finite on clip {clip.name!r}: try another precision"
            )
    if encoded:
        world_to_camera, intrinsics = decode_pose_encoding(found["pose_enc"].double(), height, width)
    else:
        world_to_camera, intrinsics = found["world_to_camera"], found["intrinsics"]
        found["pose_enc"] = encode_cameras(world_to_camera, intrinsics, height, width)
    return Prediction(
        found["pose_enc"],
        world_to_camera.float(),
        intrinsics.float(),
        found["depth"][..., 0],
        found["depth_conf"],
    )


def without_paths(words: str) -> str:
    """Weights in words, without the folder on the user's machine that calibrations are kept in."""
    folder = cache.folder()
    return words if folder is None else words.replace(f"{folder}/", "")


@contextmanager
def borrowed(backbone: str | nn.Module, plan: Plan) -> Generator[nn.Module]:
    """A backbone as `to_device` gives it, run quietly inside the `with` block; after it stock, and as it was given."""
    training = isinstance(backbone, nn.Module) and backbone.training
    model = to_device(backbone, plan)
    try:
        with quiet():
            yield model
    finally:
        remove(model).train(training)


@contextmanager
def quiet() -> Generator[None]:
    """No gradients, and none of the warnings that stock code gives on every machine, which would tear the bars."""
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.cuda.amp.autocast", category=FutureWarning)
        warnings.filterwarnings("ignore", message="User provided device_type of 'cuda'", category=UserWarning)
        yield
