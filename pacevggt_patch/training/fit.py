"""Training of pace weights: settings, what a step does, and a state from which a run goes on as if never stopped.

Stage 1 (distil) teaches the scorer which tokens the unpruned model attends to. Between the stages the linear part of
the restoration is fitted in closed form. Stage 2 (refine) trains merge, block deltas and restoration, and the scorer on
demand. It teaches the pruned model what the unpruned one says, and the truth where it is known. Keep ratios and merge
budgets are drawn from a few.

Everything random of a step follows from the seed, the number of the step and of the process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..arguments import LARGEST, number, several, whole
from ..calibration.full_heads import find_full_heads
from ..calibration.restoration import KEEP_RATIOS, fit_linear
from ..config import GLOBAL, check_mode
from ..errors import PaceError
from ..evaluation.metrics import decode_pose_encoding, pairwise_pose_errors
from ..hosts.base import find_host
from ..method.block_deltas import FULL_STRENGTH
from ..method.propagation import RIDGE as RIDGE_OF_SLOPES
from ..method.scoring import DISTINCTNESS_WEIGHT
from ..runtime.attention import half_precision
from ..weights.pace import FIELDS, PaceWeights
from .attention_target import attention_target
from .cuda_graphs import Recorder
from .losses import distillation_loss, token_losses, total_loss, truth_target
from .passes import Outputs, run
from .seeds import mixed_seed
from .sources import SWEEPS, ClipSource, Sample, Truth, to_device

# Keep ratios that the steps of a run have: few, so that steps of one kind come again and can be replayed.
RATIOS = 6
ALL_MERGED = 0.75  # share of steps in which all that is not kept is merged, as it is by default
MERGED_OTHERWISE = (0.0, 0.5)  # shares of them, one of which is merged in the other steps
# What a run draws from and how its weights run: one where that was something else can't go on as this one.
KINDS = [RATIOS, ALL_MERGED, *MERGED_OTHERWISE, SWEEPS, FULL_STRENGTH, RIDGE_OF_SLOPES, DISTINCTNESS_WEIGHT]
LARGEST_NORM = 1.0  # of the gradient
# Numbers in place of a process's, for clips that no step draws.
CALIBRATION, CHECK, COMMON = -1, -2, -3

# Shows how far a run is with clips, given what it does with them and how many there are.
Watch = Callable[[Iterable[Sample], str, int], Iterable[Sample]]


def unwatched(clips: Iterable[Sample], _what: str, _count: int) -> Iterable[Sample]:
    return clips


@dataclass(frozen=True)
class Settings:
    """What a run does.

    Attributes:
        steps: gradient steps in all; 0 calibrates only.
        distil: share of the steps that stage 1 gets.
        clips: clips of a step, in each process, if they have the smallest number of frames; longer ones are fewer, so
            that a step has about as many frames whatever their number.
        views: numbers of frames of a clip; each step has one of them.
        supervised: frames of a clip on which depth, points and dense tokens are compared.
        keep_ratios: least and largest keep ratio of a step.
        rate: learning rate.
        scorer_rate: that of the scorer in stage 2 over `rate`. 0 leaves it as stage 1 made it. The gradient that
            reaches it through the weights of the merge made the selection worse. After 250 steps, AUC@30 on 24 rooms at
            keep ratio 0.15 was 38.9 with that scorer, 44.1 with none, 41.2 training-free.
        adaptation_rate: learning rate of the changes of attention blocks over `rate`; 0 leaves the blocks as they are.
        warm_up: steps over which it rises at the start of each stage; it falls by a cosine from there.
        weight_decay: decoupled.
        truth: how much of the camera, depth and point losses is against ground truth where clips have it.
        calibration: clips that the closed-form fit takes.
        checks: clips that no step draws, on which the run is judged.
        mode: "global" or "pre-aa", see `PaceConfig`.
        seed: of everything random.
    """

    steps: int = 4000
    distil: float = 0.0
    clips: int = 1
    views: tuple[int, ...] = (8,)
    supervised: int = 4
    keep_ratios: tuple[float, float] = (0.1, 0.6)
    rate: float = 2e-3
    scorer_rate: float = 0.0
    adaptation_rate: float = 0.5
    warm_up: int = 50
    weight_decay: float = 0.01
    truth: float = 0.5
    calibration: int = 8
    checks: int = 4
    mode: str = GLOBAL
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "warm_up"):
            whole(name, getattr(self, name), 0)
        for name in ("clips", "supervised", "calibration", "checks"):
            whole(name, getattr(self, name))
        whole("seed", self.seed, -LARGEST)
        if not [whole("views", views) for views in several("views", self.views)]:
            raise PaceError("views is empty: give at least one number of frames")
        for name in ("distil", "truth", "rate", "scorer_rate", "adaptation_rate", "weight_decay"):
            if not 0 <= number(name, getattr(self, name)) <= 1:
                raise PaceError(f"{name} must be between 0 and 1, got {getattr(self, name):g}")
        low, high = self.keep_ratios
        if not 0 < low <= high < 1:
            raise PaceError(
                f"keep ratios of training must lie between 0 and 1, low to high, got {low:g} to {high:g}"
            )
        check_mode(self.mode)
        if self.mode == GLOBAL and self.scorer_rate:
            raise PaceError(
                "of global pruning the refinement has no gradient for the scorer: leave --scorer-rate at 0"
            )

    def clips_of(self, views: int) -> int:
        """Clips of a step if they have `views` frames."""
        return max(1, self.clips * min(self.views) // views)

    @property
    def distil_steps(self) -> int:
        """Steps of stage 1."""
        return round(self.steps * self.distil)


@dataclass(frozen=True)
class StepPlan:
    """What one step of stage 2 does, the same in all processes."""

    views: int
    keep_ratio: float
    merge_budget: float | None
    frames: list[int]


def step_plan(settings: Settings, step: int) -> StepPlan:
    """The random choices of a step: views, keep ratio (one of RATIOS, uniform in its logarithm), merge budget, and
    the frames that are compared."""
    generator = torch.Generator().manual_seed(mixed_seed(settings.seed, step, COMMON))

    def below(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    low, high = settings.keep_ratios
    ratio = low * (high / low) ** (below(RATIOS) / (RATIOS - 1))
    all_merged = torch.rand((), generator=generator).item() < ALL_MERGED
    share = MERGED_OTHERWISE[below(len(MERGED_OTHERWISE))]
    budget = None if all_merged or settings.mode == GLOBAL else share * (1 - ratio)
    views = settings.views[below(len(settings.views))]
    frames = torch.randperm(views, generator=generator)[: settings.supervised].sort().values.tolist()
    return StepPlan(views, ratio, budget, frames)


def learning_rate(settings: Settings, step: int) -> float:
    """The learning rate of a step: in each stage up in a line, then down by half a cosine."""
    first, end = (
        (0, settings.distil_steps)
        if step < settings.distil_steps
        else (settings.distil_steps, settings.steps)
    )
    rise = min(1.0, (step - first + 1) / max(settings.warm_up, 1))
    return settings.rate * rise * 0.5 * (1 + math.cos(math.pi * (step - first) / max(end - first, 1)))


class Fit:
    """Pace weights in training. The model must be accelerated with them (see `guest`).

    Args:
        model: the VGGT.
        weights: on its device.
        source: of clips.
        settings: what to do.
        checkpointing: compute attention blocks and heads once more for the backward pass instead of keeping them.
        rank: number of this process.
        world: number of processes; gradients and losses are averaged over them.
    """

    def __init__(
        self,
        model: Any,
        weights: PaceWeights,
        source: ClipSource,
        settings: Settings,
        *,
        checkpointing: bool = False,
        rank: int = 0,
        world: int = 1,
    ):
        self.model, self.weights, self.source, self.settings = model, weights, source, settings
        self.checkpointing, self.rank, self.world = checkpointing, rank, world
        self.device = model.aggregator.camera_token.device
        self.dtype = model.aggregator.camera_token.dtype
        self.modules = weights.modules()
        self.modules.requires_grad_(True)
        self.parameters = list(self.modules.parameters())
        # All gradients in one tensor, of which those of the parameters are views: one exchange, one norm, one address.
        sizes = [parameter.numel() for parameter in self.parameters]
        self.gradient = torch.zeros(sum(sizes), device=self.device, dtype=self.parameters[0].dtype)
        for parameter, part in zip(self.parameters, self.gradient.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        # Computing blocks twice is for models whose steps are long, and recorded steps would hold much memory.
        host = find_host(model)
        waits = host.rope is None and getattr(host.trunk, "rope", None) is not None
        records = self.device.type == "cuda" and not checkpointing and not waits
        self.recorder = Recorder(records)
        self.step_number = 0
        self.optimizer = self.new_optimizer()
        self.names: list[str] = []  # of the losses
        self.logs = torch.zeros(1)  # their values, and the norm of the gradient

    def new_optimizer(self) -> torch.optim.Optimizer:
        """An optimizer without a past, for the stage that begins."""
        weights = self.weights
        modules = (weights.scorer,), (weights.merge, weights.restoration), (weights.block_deltas,)
        groups = [
            [p for module in group if module is not None for p in module.parameters()] for group in modules
        ]
        settings = self.settings
        return torch.optim.AdamW(
            [{"params": group} for group in groups],
            settings.rate,
            weight_decay=settings.weight_decay,
            fused=self.device.type == "cuda",
        )

    def set_rates(self) -> None:
        """Give the optimizer the learning rates of the step to come: of scorer, of merge and restoration, of blocks."""
        rate = learning_rate(self.settings, self.step_number)
        refines = self.step_number >= self.settings.distil_steps
        settings = self.settings
        factors = (settings.scorer_rate, 1.0, settings.adaptation_rate) if refines else (1.0, 0.0, 0.0)
        for group, factor in zip(self.optimizer.param_groups, factors, strict=True):
            group["lr"] = rate * factor

    # Clips

    def draw(self, step: int) -> Any:
        """The first part of making the clips of a step of this process; may be called in other threads."""
        seed = mixed_seed(self.settings.seed, step, self.rank)
        views = step_plan(self.settings, step).views
        return self.source.draw(seed, self.settings.clips_of(views), views)

    def finish(self, drawn: Any) -> Sample:
        """The second part."""
        sample = self.source.finish(drawn, self.device)
        # A float32 model takes float32 images whatever autocast does; a narrow one its own.
        return sample._replace(images=sample.images.to(self.dtype))

    def reserved(self, purpose: int, count: int) -> Iterator[Sample]:
        """Clips that no step draws, `count` in all, one by one, the same in all processes.

        Of each length in turn; with fewer clips than lengths, of the first ones.
        """
        settings = self.settings
        for i, views in enumerate(settings.views):
            left = len(range(i, count, len(settings.views)))
            together = settings.clips_of(views) if self.source.compiled else 1
            for batch in range(math.ceil(left / together)):
                seed = mixed_seed(settings.seed, batch, i, purpose)
                sample = self.finish(self.source.draw(seed, together, views))
                yield from sample.clips()[: left - batch * together]

    # Steps

    def distil_loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of stage 1 and its parts, of images [B, S, 3, H, W]."""
        with half_precision(images):
            features, attention = attention_target(self.model, images)
        assert self.weights.scorer is not None
        loss = distillation_loss(self.weights.scorer(features), attention)
        return loss, {"distil": loss}

    def refine_loss(
        self, sample: Sample, plan: StepPlan, frames: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of stage 2 and its parts; `frames` are those of the plan, if they are on the device already."""
        images = sample.images
        if frames is None:
            frames = to_device(torch.tensor(plan.frames), self.device)
        with torch.no_grad():
            teacher = run(self.model, images, frames, 1.0)
            truth = None
            if sample.truth is not None and self.settings.truth:
                truth = truth_target(sample.truth, frames, teacher)
        student = run(
            self.model, images, frames, plan.keep_ratio, plan.merge_budget, checkpointing=self.checkpointing
        )
        return total_loss(student, teacher, truth, self.settings.truth, self.weights.backbone.cached_layers)

    def differentiate(self, loss: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Leave the gradient of the loss in `gradient`; returns the losses, those of `names`."""
        # Not by `backward`, which would add them up parameter by parameter.
        gradients = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        with torch.no_grad():  # zeros that stand for no gradient ask for one in older torch
            torch.cat([gradient.reshape(-1) for gradient in gradients], out=self.gradient)
        self.names = ["total", *parts]
        return torch.stack([loss, *parts.values()]).detach()

    def step(self, drawn: Any) -> None:
        """Train on what `draw` gave for this step."""
        sample = self.finish(drawn)
        if self.step_number < self.settings.distil_steps:
            losses = self.differentiate(*self.distil_loss(sample.images))
        else:
            plan = step_plan(self.settings, self.step_number)
            frames = to_device(torch.tensor(plan.frames), self.device)
            # Whether there is a truth is told by the inputs.
            kind = plan.views, plan.keep_ratio, plan.merge_budget

            def refine(frames: Tensor, images: Tensor, *truth: Tensor) -> list[Tensor]:
                inputs = Sample(images, Truth(*truth) if truth else None)
                return [self.differentiate(*self.refine_loss(inputs, plan, frames))]

            (losses,) = self.recorder(kind, refine, [frames, sample.images, *(sample.truth or ())])
        if self.world > 1:
            dist.all_reduce(self.gradient)
            self.gradient /= self.world
            losses = losses / self.world
            dist.all_reduce(losses)
        norm = self.gradient.norm()
        self.gradient *= LARGEST_NORM / norm.clamp(min=LARGEST_NORM)
        self.set_rates()
        self.optimizer.step()
        self.logs = torch.cat([losses, norm[None]])
        self.step_number += 1

    def begin_refinement(self, watch: Watch = unwatched) -> None:
        """What lies between the stages: the closed-form fit, and an optimizer without a past."""
        if self.weights.mode != GLOBAL:  # which heads these are does not depend on the scorer
            self.calibrate(watch)
        self.optimizer = self.new_optimizer()

    def calibrate(self, watch: Watch = unwatched) -> None:
        """Fit the linear part of the restoration, or find the full-attention heads where there is none."""
        count = self.settings.calibration
        clips = (sample.images for sample in watch(self.reserved(CALIBRATION, count), "calibrating", count))
        if self.weights.mode == GLOBAL:
            # One process decides: others might see an error just above the limit where this one sees it just below.
            found: list[Any] = [find_full_heads(self.model, clips)[0] if self.rank == 0 else None]
            if self.world > 1:
                dist.broadcast_object_list(found, 0, device=self.device)
            self.weights.full_heads = found[0]
            return
        fit_linear(self.model, clips, self.weights, KEEP_RATIOS)
        if self.world > 1:
            for value in self.modules.state_dict().values():
                dist.broadcast(value, 0)

    def latest_losses(self) -> dict[str, float]:
        """Losses of the last step by name, and the norm of its gradient; waits for the device."""
        return dict(zip([*self.names, "norm"], self.logs.tolist(), strict=True))

    @torch.no_grad()
    def check(self, what: str = "comparing", watch: Watch = unwatched) -> dict[str, dict[str, float]]:
        """How far the pruned model is from the unpruned one on clips that no step draws, by keep ratio.

        Processes share the clips, and all get the figures of one process.

        Of each a mean over clips: `rotation_deg` and `direction_deg`, medians over frame pairs of the difference in
        relative rotation and translation direction; `depth`, mean relative difference after one scale for the clip;
        `tokens`, see `token_losses`.
        """
        found: dict[int, dict[str, dict[str, float]]] = {}  # number of the clip -> ratio -> row
        count = self.settings.checks
        for index, sample in enumerate(watch(self.reserved(CHECK, count), what, count)):
            if index % self.world != self.rank:
                continue
            row = found[index] = {}
            frames = torch.arange(min(self.settings.supervised, sample.images.shape[1]), device=self.device)
            teacher = run(self.model, sample.images, frames, 1.0)
            for ratio in KEEP_RATIOS:
                student = run(self.model, sample.images, frames, ratio)
                row[f"{ratio:g}"] = difference(student, teacher, self.weights.backbone.cached_layers)
        if self.world > 1:
            every: list[Any] = [None] * self.world
            dist.all_gather_object(every, found)
            found = {index: row for part in every for index, row in part.items()}
        rows = [found[index] for index in range(count)]  # in one order, whatever the number of processes
        return {
            ratio: {name: sum(row[ratio][name] for row in rows) / count for name in of_first}
            for ratio, of_first in rows[0].items()
        }

    # To go on

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step_number,
            "settings": asdict(self.settings),
            "fingerprints": self.weights.fingerprints,
            "full_heads": self.weights.full_heads,
            "source": self.source.description,
            "kinds": KINDS,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a `state`.

        Raises:
            PaceError: it is of another run.
            ValueError: it does not fit; states that are damaged raise other errors, too.
        """
        own = {
            **asdict(self.settings),
            "backbone": self.weights.fingerprints,
            "source": self.source.description,
            "version of the library": KINDS,
        }
        theirs = {
            **state["settings"],
            "backbone": state["fingerprints"],
            "source": state["source"],
        }
        theirs["version of the library"] = state["kinds"]
        other = [name for name, value in own.items() if theirs.get(name) != value]
        if other:
            raise PaceError(
                f"can't resume: the run was started with other settings ({', '.join(sorted(other))}): pass the same, "
                "or start anew with another --out"
            )
        if not FIELDS["full_heads"]([list(head) for head in state["full_heads"]]):
            raise ValueError(f"full-attention heads {state['full_heads']}")
        self.modules.load_state_dict(state["modules"])
        self.weights.full_heads = tuple(state["full_heads"])
        self.weights.check(find_host(self.model))
        # How the optimizer runs is told by settings and device, which may be another one.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        for parameter, moments in self.optimizer.state.items():
            alike = all(moments[name].shape == parameter.shape for name in ("exp_avg", "exp_avg_sq"))
            if not alike or moments["step"].numel() != 1:
                raise ValueError("an optimizer of other parameters")
        self.step_number = whole("step", state["step"], 0)
        if self.step_number > self.settings.steps:
            raise ValueError(f"step {self.step_number} of {self.settings.steps}")
        if len(self.optimizer.state) != len(self.parameters) * (self.step_number > 0):
            raise ValueError("an optimizer of fewer parameters")


def difference(student: Outputs, teacher: Outputs, layers: Collection[int]) -> dict[str, float]:
    """One clip's row of `Fit.check`."""
    row = {}
    if teacher.poses and teacher.poses[-1].shape[1] > 1:
        found, wanted = (decode_pose_encoding(out.poses[-1][0], 1, 1)[0] for out in (student, teacher))
        errors = pairwise_pose_errors(found, wanted)
        row["rotation_deg"] = errors.rotation.median().item()
        row["direction_deg"] = errors.translation.median().item()
    if teacher.depth is not None and student.depth is not None:
        ratio = student.depth[0] / teacher.depth[0]
        row["depth"] = (ratio / ratio.median() - 1).abs().mean().item()
    row["tokens"] = token_losses(student, teacher, layers)["dense"].item()
    return row
