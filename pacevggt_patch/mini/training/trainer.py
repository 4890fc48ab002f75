"""One training step of VGGT-mini: sample scenes, render them, compare, and update, on the CPU or as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...arguments import LARGEST, number, whole
from ...errors import PaceError
from ...hosts.dpt import dense_head, dense_tables
from ...training.cuda_graphs import Recorder
from ...training.losses import camera_losses, pair_losses
from ...training.seeds import mixed_seed
from ...training.sources import MOST_VIEWS, to_device
from ...training.tensors import total
from ..compiling import faster
from ..model import MiniConfig, build_mini
from ..scenes.layout import PLAIN
from ..scenes.raycast import render_frames
from ..scenes.sensor import SensorEffects, apply_sensor, sample_effects
from ..scenes.textures import TextureAtlas
from ..scenes.training_scenes import SceneBatch, sample_scenes
from .forward import FastForward, layer_list
from .losses import (
    WEIGHTS,
    AuxiliaryHeads,
    correspondence_loss,
    depth_losses,
    first_camera_points,
    make_targets,
    point_loss,
)
from .optim import FlatOptimizer

VIEWS = (2, 4, 8, 12, 24)
VIEW_SHARES = (0.12, 0.2, 0.38, 0.16, 0.14)


@dataclass(frozen=True)
class Settings:
    """What a run does. Learning rates, numbers of frames and of dense frames are for one process.

    Attributes:
        frames: frames of a step; divisible by every number of views.
        dense: frames of a step, of all its clips together, on which the depth and point heads are trained.
        views: numbers of views of a clip; each step has one of them.
        size: pixels a side.
        muon_rate: learning rate of the matrices in blocks.
        adam_rate: learning rate of all else.
        warm_up: steps over which the learning rates rise.
        decay: share of the run over which they fall, at its end.
        seed: of the scenes.
        procedural: number of procedural textures.
    """

    frames: int = 144
    dense: int = 36
    views: tuple[int, ...] = VIEWS
    size: int = 224
    muon_rate: float = 1.6e-3
    adam_rate: float = 1e-3
    warm_up: int = 300
    decay: float = 0.25
    seed: int = 0
    procedural: int = 512

    def __post_init__(self) -> None:
        for name, least in dict(frames=1, dense=1, size=1, procedural=1, warm_up=0, seed=-LARGEST).items():
            whole(name, getattr(self, name), least)
        for name in ("muon_rate", "adam_rate"):
            if not 0 <= number(name, getattr(self, name)) <= 1:
                raise PaceError(f"{name} must be between 0 and 1, got {getattr(self, name):g}")
        if not self.views or any(v < 2 or v > MOST_VIEWS or self.frames % v for v in self.views):
            raise PaceError(
                f"frames ({self.frames}) must be divisible by each number of views {list(self.views)}"
            )
        if not 1 <= self.dense <= self.frames:
            raise PaceError(f"dense must be between 1 and frames ({self.frames}), got {self.dense}")
        if self.size % 28:
            raise PaceError(f"size must be a multiple of 28, an even number of patches, got {self.size}")
        if not 0 <= self.decay <= 1:
            raise PaceError(f"decay is a share of the run between 0 and 1, got {self.decay}")


@dataclass(frozen=True)
class Inputs:
    """Everything random of one step, on the CPU or in a buffer on the GPU: scenes, effects and dense frames."""

    scenes: SceneBatch
    effects: SensorEffects
    dense: Tensor  # [dense] numbers of frames

    def packed(self) -> Tensor:
        """One flat float32 tensor; see `unpack`."""
        parts = [getattr(self.scenes, field.name) for field in fields(SceneBatch)]
        return torch.cat([part.flatten().float() for part in (*parts, self.effects.packed(), self.dense)])

    def unpack(self, flat: Tensor) -> Inputs:
        """Inputs of the same shapes from their `packed` tensor, as views of it."""
        parts, start = [], 0
        own = [getattr(self.scenes, field.name) for field in fields(SceneBatch)]
        for part in (*own, self.effects.packed(), self.dense):
            parts.append(flat[start : start + part.numel()].view(part.shape))
            start += part.numel()
        return Inputs(SceneBatch(*parts[:-2]), SensorEffects.unpack(parts[-2]), parts[-1])


def sample_inputs(settings: Settings, views: int, seed: int, atlas_size: int, photographs: int) -> Inputs:
    """The inputs of a step with clips of `views` views."""
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(settings.frames // views, views, generator, atlas_size, photographs)
    effects = sample_effects(scenes.kind == PLAIN, views, generator)
    dense = torch.randperm(settings.frames, generator=generator)[: settings.dense].sort().values
    return Inputs(scenes, effects, dense.float())


def render(inputs: Inputs, atlas: TextureAtlas, size: int) -> tuple[Tensor, Tensor]:
    """Images `[F, 3, H, W]` as the camera delivers them, and depth `[F, H, W]`, `size` pixels a side, on the device of
    inputs and atlas."""
    images, depth = render_frames(inputs.scenes.frame_scenes(), atlas, size, size)
    return apply_sensor(images, inputs.effects), depth


def step_views(settings: Settings, step: int) -> int:
    """Number of views of a step, the same in all processes."""
    shares = dict(zip(VIEWS, VIEW_SHARES, strict=True))
    weights = torch.tensor([shares.get(v, 0.2) for v in settings.views])
    generator = torch.Generator().manual_seed(mixed_seed(settings.seed, step, -1))
    return settings.views[int(torch.multinomial(weights, 1, generator=generator))]


def activated(
    activate: Callable[..., tuple[Tensor, Tensor]], out: Tensor, **kinds: str
) -> tuple[Tensor, Tensor]:
    """Values and confidence in float32 of a dense head's last convolution, whatever that was computed in."""
    return activate(out.float(), **kinds)


class Trainer:
    """A model, its optimiser and the step that trains it.

    Args:
        settings: what to do.
        config: architecture.
        atlas: textures, on the device to train on.
        rank: number of this process.
        world: number of processes; gradients are averaged over them.
    """

    def __init__(
        self, settings: Settings, config: MiniConfig, atlas: TextureAtlas, rank: int = 0, world: int = 1
    ):
        self.settings, self.config, self.atlas, self.rank, self.world = settings, config, atlas, rank, world
        device = atlas.texels.device
        self.device, self.on_gpu = device, device.type == "cuda"
        # In evaluation mode: training mode would checkpoint every block.
        self.model = build_mini(False, config).to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = list(config.cached_layers[1:])
            self.auxiliary = AuxiliaryHeads(config.embed_dim, layers).to(device)
        self.optimizer = FlatOptimizer([self.model, self.auxiliary])
        side = settings.size // config.patch_size
        half = torch.bfloat16 if self.on_gpu else torch.float32
        self.grid = side, side
        tables = dense_tables(self.model.depth_head, self.grid, half)
        assert tables.activate is not None  # only feature extractors have none
        self.tables = tables._replace(activate=partial(activated, tables.activate))
        self.forward = FastForward(self.model, half)
        self.rates = torch.zeros(3, device=device)  # Muon, AdamW, number of the step
        self.step_number = 0
        self.since_start = 0  # steps since the optimiser state was empty
        self.names: list[str] = []
        self.latest = torch.empty(0), torch.empty(())  # losses by `names` and norm of the last step
        self.recorder = Recorder(self.on_gpu)

    def render(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Images `[F, 3, H, W]` and depth `[F, H, W]` of inputs on the device."""
        return render(inputs, self.atlas, self.settings.size)

    def losses(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Total loss of inputs on the device, and the tensor of all losses by `self.names`, detached."""
        with torch.no_grad():
            clips, views = inputs.scenes.cameras.shape[:2]
            images, depth = self.render(inputs)
            targets = make_targets(inputs.scenes, depth.unflatten(0, (clips, views)), self.config.patch_size)
            chosen = inputs.dense.long()
            truth = targets.depth.flatten(0, 1)[chosen]  # [N, H, W]
            points = first_camera_points(targets.depth, targets.extrinsics, targets.focal, 1, 0)
            points = points.flatten(0, 1)[chosen]
        model, special = self.model, self.model.aggregator.patch_start_idx
        half = torch.autocast("cuda", torch.bfloat16) if self.on_gpu else nullcontext()
        features = self.forward(images.unflatten(0, (clips, views)))
        with half:
            parts = {
                "patch_points": self.auxiliary.point_loss(features.layers, special, targets.patch_points),
            }
            descriptors = self.auxiliary.descriptor(features.patches).unflatten(0, (clips, views))
            parts["correspondence"], found = correspondence_loss(descriptors, targets)
            tokens = [
                features.layers[layer].flatten(0, 1).index_select(0, chosen)[:, special:]
                for layer in self.config.cached_layers
            ]  # [N, P, 2C] each
            dense = faster(dense_head, self.on_gpu)
            depths, confidence = dense(model.depth_head, tokens, self.grid, self.tables, True)
            parts |= depth_losses(depths[..., 0], confidence, truth)
            if model.point_head is not None:
                world, confidence = dense(model.point_head, tokens, self.grid, self.tables, True)
                parts["points"] = point_loss(world, confidence, points, truth)
        # A few tokens only: in full precision for nothing.
        poses = model.camera_head(layer_list(features, self.config.depth))
        parts |= camera_losses(poses, targets.pose) | pair_losses(poses[-1], targets.pose)
        loss = total(WEIGHTS[name] * value for name, value in parts.items())
        self.names = [*parts, "total", "found"]
        return loss, torch.stack([*parts.values(), loss, found]).detach().float()

    def gradients(self, inputs: Inputs) -> tuple[Tensor]:
        """Leave gradients of the mean loss of this process in the optimiser; returns the losses by `self.names`."""
        loss, losses = self.losses(inputs)
        # Not by `backward`, which would add them up parameter by parameter.
        parameters = self.optimizer.parameters
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        torch.cat([gradient.reshape(-1) for gradient in gradients], out=self.optimizer.gradients)
        return (losses,)

    def update(self) -> tuple[Tensor]:
        """Take the step that the gradients say; returns their norm."""
        return (self.optimizer.step(self.rates[0], self.rates[1], self.rates[2]),)

    def sample(self, step: int) -> tuple[int, Inputs, Tensor]:
        """Number of views, inputs and packed inputs of a step; called in other threads."""
        views = step_views(self.settings, step)
        seed = mixed_seed(self.settings.seed, step, self.rank)
        inputs = sample_inputs(self.settings, views, seed, len(self.atlas), self.atlas.photographs)
        return views, inputs, inputs.packed()

    def step(self, sampled: tuple[int, Inputs, Tensor], rate: float) -> None:
        """Train on the sampled inputs of this step, with the learning rates times `rate`."""
        views, inputs, packed = sampled
        self.since_start += 1
        number = min(self.since_start, 10_000)  # the correction of the means is long past there
        rates = torch.tensor([self.settings.muon_rate * rate, self.settings.adam_rate * rate, number])
        self.rates.copy_(rates, non_blocking=True)
        (losses,) = self.recorder(
            views, lambda flat: self.gradients(inputs.unpack(flat)), [to_device(packed, self.device)]
        )
        if self.world > 1:
            dist.all_reduce(self.optimizer.gradients)
            self.optimizer.gradients.div_(self.world)
        (norm,) = self.recorder("update", self.update, [])
        self.latest = losses, norm
        self.step_number += 1

    @torch.no_grad()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pose encodings `[B, S, 9]` and depth `[B, S, H, W]` of images `[B, S, 3, H, W]`, one clip at a time."""
        poses, depths = [], []
        half = torch.autocast("cuda", torch.bfloat16) if self.on_gpu else nullcontext()
        for clip in images:
            with half:
                tokens, start = self.model.aggregator(clip[None])
            tokens = [None if x is None else x.float() for x in tokens]
            poses.append(self.model.camera_head(tokens)[-1][0])
            depths.append(self.model.depth_head(tokens, clip[None], start)[0][0, ..., 0])
        return torch.stack(poses), torch.stack(depths)

    def latest_losses(self) -> dict[str, float]:
        """The losses of the last step by name, and the norm of its gradient; waits for the GPU."""
        named = dict(zip(self.names, self.latest[0].tolist(), strict=True))
        return {**named, "norm": self.latest[1].item()}

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "optimizer": self.optimizer.state(),
            "step": self.step_number,
            "since_start": self.since_start,
            "settings": asdict(self.settings),
            "config": asdict(self.config),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a `state`.

        Raises:
            PaceError: it is of another architecture, or draws other scenes.
            ValueError: it does not fit; states that are damaged raise other errors, too.
        """
        for name, own in (("config", asdict(self.config)), ("settings", asdict(self.settings))):
            # How long a run is may change on the way; what it trains on may not.
            other = {k: v for k, v in own.items() if state[name].get(k) != v and k not in ("decay",)}
            if other:
                raise PaceError(f"can't resume: the run was started with another {', '.join(sorted(other))}")
        theirs, own = state["optimizer"], self.optimizer.state()
        if any(theirs[name].shape != own[name].shape for name in ("momentum", "mean", "square")):
            raise ValueError("an optimizer of other parameters")
        self.optimizer.load(theirs)
        self.step_number = whole("step", state["step"], 0)
        self.since_start = whole("since_start", state["since_start"], 0)
