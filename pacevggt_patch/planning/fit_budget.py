"""Find the keep ratio that fits a time and a memory budget, from a short calibration on the user's device.

What a forward costs is known up to a few coefficients. With N frames of L tokens each (special and kept ones):

    seconds = a + b N + c N L + d (N L^2 + (N L)^2)

- b N does not depend on pruning: DINO and heads, on the whole grid.
- c N L is the linear layers of the blocks.
- d is attention, inside frames and across the clip.

Memory is a + b N + c N L in each stage, and the largest stage counts.
The coefficients are fitted to a few short forwards. These reach the clip's sequence lengths N L with fewer frames, by
keeping more of each: attention, which grows fastest, is measured where it will run.
"""

from __future__ import annotations

import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import number, shown, whole
from ..config import PRE_AA, PaceConfig
from ..errors import PaceError, UnsupportedModelError
from ..hosts.base import Host, find_host
from ..patching.guest import as_it_was
from ..patching.install import accelerate, is_accelerated, remove, state_of
from ..patching.state import State
from ..patching.summary import StageTimer, current_device, device_time
from ..weights.pace import PaceWeights

LOGGER = logging.getLogger("pacevggt_patch")
PATIENCE = 5.0  # seconds after which it says how far it is
# Keep ratios that are tried, as shares of the largest that the merge budget leaves, and shares of the clip's frames.
CALIBRATION = ((0.9, 1 / 4), (0.9, 1 / 8), (0.3, 1 / 4), (0.3, 1 / 8), (0.1, 1 / 2), (0.1, 1 / 8))
# A shorter clip counts as one of so many frames: a call has costs that are not those of a frame.
LEAST_FRAMES = 64
# Sequences are no longer than this, whose attention fills any device, or than this share of the unpruned clip.
MOST_TOKENS, MOST_SHARE = 65536, 1 / 20
# Timed runs of a setting; one is enough where it takes so long that nothing disturbs it.
REPEATS, LONG_SECONDS = 3, 2.0


@dataclass(frozen=True)
class Point:
    """One calibration setting and what it cost.

    Attributes:
        frames: N.
        kept: K, patch tokens of a frame that entered alternating attention.
        seconds: median wall time of a forward.
        memory_gib: peak CUDA memory in each stage, by name; empty if it was not measured.
    """

    frames: int
    kept: int
    seconds: float
    memory_gib: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CostModel:
    """Fitted costs of one model, image size and device.

    Attributes:
        special: special tokens of a frame.
        time: coefficients of `_time_terms`.
        memory: of `_memory_terms`, for each stage; empty if it was not measured.
        points: what was measured.
        calibration_seconds: wall time that measuring took.
    """

    special: int
    time: tuple[float, ...]
    memory: dict[str, tuple[float, ...]]
    points: tuple[Point, ...]
    calibration_seconds: float = 0.0

    @classmethod
    def fit(
        cls, points: list[Point], special: int, calibration_seconds: float = 0.0, full_heads: bool = False
    ) -> CostModel:
        """Fit the coefficients to measured points; `full_heads` says whether some heads see all tokens."""
        terms = [_time_terms(point.frames, special + point.kept, full_heads) for point in points]
        # Relative errors count: a long forward must not drown a short one.
        weights = [1 / point.seconds for point in points]
        rows = [[w * term for term in row] for w, row in zip(weights, terms, strict=True)]
        times = non_negative_least_squares(rows, [1.0] * len(points))
        room = [_memory_terms(point.frames, special + point.kept) for point in points]
        memory = {
            stage: non_negative_least_squares(room, [point.memory_gib[stage] for point in points])
            for stage in points[0].memory_gib
            if all(stage in point.memory_gib for point in points)
        }
        return cls(special, times, memory, tuple(points), calibration_seconds)

    def seconds(self, frames: int, kept: int) -> float:
        """Predicted wall time of one forward, with `kept` patch tokens of each of `frames` frames."""
        return _dot(self.time, _time_terms(frames, self.special + kept, len(self.time) > 4))

    def memory_gib(self, frames: int, kept: int) -> float | None:
        """Predicted peak CUDA memory in GiB, weights included; None if it was not measured."""
        terms = _memory_terms(frames, self.special + kept)
        return max((_dot(c, terms) for c in self.memory.values()), default=None)


@dataclass(frozen=True)
class BudgetPlan(PaceConfig):
    """The settings that fit a budget: a `PaceConfig` to pass to `accelerate`, with what it is expected to cost.

    Attributes:
        seconds: predicted wall time of one forward.
        memory_gib: predicted peak CUDA memory in GiB, weights and inputs included; None if no memory budget was given.
        frames: N, frames of the clip it is for.
        size: height and width it is for, in pixels.
        calibration_seconds: wall time that measuring took.
    """

    seconds: float = 0.0
    memory_gib: float | None = None
    frames: int = 0
    size: tuple[int, int] = (0, 0)
    calibration_seconds: float = 0.0


def fit_budget(
    model: nn.Module,
    frames: int,
    size: tuple[int, int],
    *,
    seconds: float | None = None,
    memory_gib: float | None = None,
    config: PaceConfig | None = None,
    weights: str | PathLike[str] | PaceWeights | None = "auto",
    run: Callable[[Tensor], Any] | None = None,
) -> BudgetPlan:
    """Find the largest keep ratio whose forward fits a time or memory budget on the model's device.

    Runs the model on random images of that size: up to six settings, four times each. From 64 frames on these clips
    have at most half as many frames. All of it takes as long as a few pruned forwards of a clip of hundreds of frames,
    or a few dozen of a short one. The model is left as it was.

    Apply the plan with `accelerate(model, plan, weights=weights)`, with the weights that were planned with.

    Args:
        model: on its device. If it is accelerated, its weights and settings are planned with.
        frames: N, frames of the clip to come.
        size: its height and width in pixels.
        seconds: wall time that one forward may take.
        memory_gib: peak CUDA memory that PyTorch may allocate, in GiB, weights included. The driver and fragments of
            the allocator take more. Measuring it resets PyTorch's peak statistics.
        config: settings to plan with, but for the keep ratio. None takes those of an accelerated model, else the
            defaults. A mode in it must be that of an accelerated model.
        weights: as in `accelerate`. An accelerated model has its own already: leave it at "auto".
        run: how the model is called, given images [1, n, 3, H, W] in the dtype of the weights. None is `model(images)`.
            Autocast that is on at this call is on during the measurement, too.

    Raises:
        PaceError: no budget is given, or it is not positive; memory can't be measured here; settings or weights are
            not those of the accelerated model. Or the model has not calibrated yet, clips of so few frames run
            unpruned, or nothing fits: the message gives the smallest possible figure.
    """
    budgets = {"seconds": seconds, "memory_gib": memory_gib}
    for name, value in budgets.items():
        if value is None:
            continue
        if not 0 < number(name, value) < math.inf:
            raise PaceError(f"{name} must be a positive number, got {value!r}")
    if seconds is memory_gib is None:
        raise PaceError("give a budget: seconds, memory_gib, or both")
    whole("frames", frames)
    if config is not None and not isinstance(config, PaceConfig):
        raise PaceError(f"config must be a PaceConfig or None, got {shown(config)}")
    if run is not None and not callable(run):
        raise PaceError(f"run must be a function of images, got {shown(run)}")
    host = find_host(model)
    device = host.reference.device
    if any(p.is_meta for p in model.parameters()):
        raise UnsupportedModelError(
            "the model's parameters hold no values, so nothing can be measured: load it first"
        )
    if memory_gib is not None and device.type != "cuda":
        raise PaceError(
            f"memory_gib needs a CUDA device, where PyTorch counts what it allocates; the model is on {device}: "
            "give seconds alone"
        )
    patches = _patches(host, size)
    with _as_it_was(model):
        if is_accelerated(model):
            if state_of(model).ranks is not None:
                raise PaceError(
                    "fit_budget plans for one process: call it before accelerate(model, process_group=...)"
                )
            _plan_with(state_of(model), config, weights)
        else:
            accelerate(model, config or PaceConfig(), weights=weights)
        state = state_of(model)
        if state.pending or (state.auto and state.weights is None and state.config.keep_ratio == 1):
            raise PaceError(
                "this model has no weights yet, so it is not known how many of its heads see all tokens: on the stock "
                "model, pass weights=pacevggt_patch.calibrate(model, clips), or None to plan without such heads"
            )
        settings, most = state.config, _largest_keep(state.config, patches)
        if settings.min_frames is not None and frames < settings.min_frames:
            raise PaceError(
                f"clips of {frames} frames run unpruned with min_frames={settings.min_frames}: plan with a smaller one"
            )
        costs = measure_costs(model, frames, size, run=run, memory=memory_gib is not None)

    def costs_of(kept: int) -> dict[str, float | None]:
        return {"seconds": costs.seconds(frames, kept), "memory_gib": costs.memory_gib(frames, kept)}

    def exceeds(cost: float | None, budget: float | None) -> bool:
        return cost is not None and budget is not None and cost > budget

    def fits(kept: int) -> bool:
        return not any(exceeds(cost, budgets[name]) for name, cost in costs_of(kept).items())

    if not fits(1):
        missed = [
            f"{name}={budgets[name]:g} (the smallest possible is about {least:.3g})"
            for name, least in costs_of(1).items()
            if least is not None and exceeds(least, budgets[name])
        ]
        raise PaceError(
            f"{frames} frames of {size[0]}x{size[1]} do not fit {' and '.join(missed)}: "
            "use fewer or smaller frames"
        )
    low, high = 1, most  # costs grow with the kept tokens: halve
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    own: dict[str, Any] = {f.name: getattr(settings, f.name) for f in fields(PaceConfig)}
    own["keep_ratio"] = low / patches
    return BudgetPlan(
        **own,
        seconds=costs.seconds(frames, low),
        memory_gib=costs.memory_gib(frames, low),
        frames=frames,
        size=(size[0], size[1]),
        calibration_seconds=costs.calibration_seconds,
    )


def _plan_with(state: State, config: PaceConfig | None, weights: Any) -> None:
    """Put settings to plan with in force on an accelerated model.

    Raises:
        PaceError: they or the weights are not those of the model.
    """
    mode = state.config.mode
    asked = None if config is None else config.mode or (None if config.merge_budget is None else PRE_AA)
    if asked not in (None, mode) or not (isinstance(weights, str) and weights == "auto"):
        what = f'mode="{asked}"' if asked not in (None, mode) else "weights"
        raise PaceError(
            f"this model is accelerated already, with {mode} pruning, and its own weights are planned with: leave out "
            f"{what}, or call pacevggt_patch.remove(model) first"
        )
    if config is not None:
        state.config = replace(config.plain(), mode=mode)


def measure_costs(
    model: nn.Module,
    frames: int,
    size: tuple[int, int],
    *,
    run: Callable[[Tensor], Any] | None = None,
    memory: bool = False,
) -> CostModel:
    """Measure what an accelerated model costs on clips of about `frames` frames; the arguments are `fit_budget`'s.

    Args:
        memory: measure the stages' peak memory, too (CUDA only).
    """
    whole("frames", frames)
    start = time.perf_counter()
    with _as_it_was(model):
        state = state_of(model)
        host, token = state.host, state.host.reference
        patches, special = _patches(host, size), host.special_tokens
        state.checkpointing = False
        points = []
        settings = _settings(frames, patches, _largest_keep(state.config, patches), special)
        for kept, n in settings:
            # Every clip is pruned here, however short: what is fitted is the cost of a pruned one.
            state.config = replace(state.config, keep_ratio=kept / patches, min_frames=1)
            generator = torch.Generator(token.device).manual_seed(0)
            images = torch.rand(1, n, 3, *size, generator=generator, device=token.device).to(token.dtype)
            points.append(_measure(state, images, kept, run or model, memory))
            del images
            if time.perf_counter() - start > PATIENCE:
                LOGGER.warning(
                    f"pacevggt-patch measures what this model costs: {len(points)} of {len(settings)} settings done"
                )
    return CostModel.fit(
        points,
        special,
        time.perf_counter() - start,
        state.weights is not None and bool(state.weights.full_heads),
    )


def _patches(host: Host, size: Any) -> int:
    """Patch tokens of a frame of `size`."""
    patch = host.patch_size
    try:
        height, width = (whole("size", side) for side in size)
        fits = not (height % patch or width % patch) and min(height, width) >= patch
    except (TypeError, ValueError):
        raise PaceError(f"size must be height and width in pixels, got {shown(size)}") from None
    if not fits:
        raise PaceError(f"height and width must be multiples of {patch}, got {height}x{width}")
    return (height // patch) * (width // patch)


def _largest_keep(config: PaceConfig, patches: int) -> int:
    """The most tokens of a frame that may be kept beside the merge budget in force."""
    return max(1, math.floor((1 - (config.merge_budget or 0.0)) * patches + 1e-9))


def _settings(frames: int, patches: int, most: int, special: int) -> list[tuple[int, int]]:
    """Kept tokens and frames of the calibration, without repetitions, small ones first."""
    found = set()
    for ratio, share in CALIBRATION:
        kept = min(most, max(1, round(ratio * most)), max(1, patches - 1))
        tokens = max(MOST_TOKENS, MOST_SHARE * frames * patches)
        longest = max(1, int(tokens // (special + kept)))
        found.add((kept, min(frames, longest, math.ceil(share * max(frames, LEAST_FRAMES)))))
    return sorted(found, key=lambda setting: (special + setting[0]) * setting[1])


def _measure(state: State, images: Tensor, kept: int, run: Callable[[Tensor], Any], memory: bool) -> Point:
    """Time `run` on images; the first run, which is not timed, warms up and takes the memory of the stages."""
    with torch.inference_mode():
        state.timer = timer = _MemoryTimer() if memory else StageTimer()
        run(images)
        state.timer = StageTimer()
        seconds = []
        while not seconds or (len(seconds) < REPEATS and seconds[0] < LONG_SECONDS):
            start = device_time()
            run(images)
            seconds.append(device_time() - start)
    peaks = timer.peaks if isinstance(timer, _MemoryTimer) else {}
    return Point(images.shape[1], kept, statistics.median(seconds), peaks)


class _MemoryTimer(StageTimer):
    """Takes the peak CUDA memory of every stage, in GiB."""

    def __init__(self):
        super().__init__()
        self.peaks: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, tokens_in: int, tokens_out: int, add: bool = False) -> Generator[None]:
        torch.cuda.reset_peak_memory_stats()
        with super().stage(name, tokens_in, tokens_out, add):
            yield
        # A stage that runs more than once, in chunks, has its largest.
        self.peaks[name] = max(self.peaks.get(name, 0.0), torch.cuda.max_memory_allocated() / 2**30)


@contextmanager
def _as_it_was(model: nn.Module) -> Generator[None]:
    """Evaluation mode, on the model's device, inside the `with` block; then model and random state are as before."""
    accelerated = is_accelerated(model)
    before = dict(vars(state_of(model))) if accelerated else None
    pauses = [] if before is None else before["threads"].pauses[:]
    device = find_host(model).reference.device
    random = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with random, current_device(device), as_it_was(model):
        try:
            if before is not None:
                before["threads"].pauses.clear()
            yield
        finally:
            if before is not None:
                before["threads"].pauses[:] = pauses
                vars(state_of(model)).update(before)
            else:
                remove(model)


def _time_terms(frames: int, length: int, full_heads: bool) -> list[float]:
    """What the seconds of a forward are made of, for `frames` frames of `length` tokens."""
    terms = [1.0, frames, frames * length, frames * length**2 + (frames * length) ** 2]
    # Heads that see all tokens see them however many are kept.
    return [*terms, frames**2] if full_heads else terms


def _memory_terms(frames: int, length: int) -> list[float]:
    """What the memory of a stage is made of."""
    return [1.0, frames, frames * length]


def _dot(coefficients: tuple[float, ...], terms: list[float]) -> float:
    return sum(c * t for c, t in zip(coefficients, terms, strict=True))


def non_negative_least_squares(rows: list[list[float]], target: list[float]) -> tuple[float, ...]:
    """The x >= 0 with the smallest |rows @ x - target|, by trying all sets of columns that may be positive.

    Args:
        rows: one for each equation, of a handful of non-negative columns.
        target: right-hand sides.
    """
    matrix = torch.tensor(rows, dtype=torch.float64)
    right = torch.tensor(target, dtype=torch.float64)
    scale = matrix.abs().amax(0).clamp(min=torch.finfo(torch.float64).tiny)
    columns, best = matrix.shape[1], (float(right.square().sum()), [0.0] * matrix.shape[1])
    for count in range(1, columns + 1):
        for chosen in itertools.combinations(range(columns), count):
            part = matrix[:, chosen] / scale[list(chosen)]
            found = torch.linalg.lstsq(part, right[:, None], driver="gelsd").solution[:, 0]
            error = float((part @ found - right).square().sum())
            # Fewer terms unless more explain something.
            if bool((found >= 0).all()) and error < best[0] * (1 - 1e-9):
                x = [0.0] * columns
                for i, value in zip(chosen, (found / scale[list(chosen)]).tolist(), strict=True):
                    x[i] = value
                best = (error, x)
    return tuple(best[1])
