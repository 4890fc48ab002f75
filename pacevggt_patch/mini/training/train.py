"""Train VGGT-mini on rendered scenes.

    python -m pacevggt_patch.mini.training.train --out DIR --seconds 1000 --textures textures.zip
    torchrun --nproc-per-node 2 -m pacevggt_patch.mini.training.train --out DIR --seconds 1000 --textures textures.zip

Scenes are drawn by the number of the step, so a run that was killed goes on with `--resume` as if it had not been. A
run that a signal ends, such as Ctrl-C, writes its state first. The learning rate rises, stays level, and falls to zero
over the last part of the run. The weights from before that fall are kept in `level.safetensors`, from which
`--from-weights` goes on training another time. On several GPUs, gradients are averaged over the processes that torchrun
starts.

`DIR` receives `mini.safetensors` (the model, as `build_mini` reads it), `level.safetensors`, `state.pt` (to resume),
`curve.json` and `curve.png`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...arguments import number, whole
from ...errors import PaceError
from ...runtime.device import usable_device
from ...runtime.ranks import place_of_torchrun
from ...training.seeds import mixed_seed
from ...training.signals import Signals, Stopped
from ...training.states import STATE_FILE, loaded_state, result_file, results_folder, save_state
from ...weights.tensorfile import read_tensors
from ..model import MiniConfig, save_mini
from ..scenes.textures import load_photographs, texture_atlas
from .held_out import HELD_OUT_SEED, HELD_OUT_VIEWS, evaluate, held_out_rooms
from .journal import Journal, Timer
from .optim import learning_rate
from .trainer import VIEWS, Inputs, Settings, Trainer, sample_inputs

PREFETCH = 6  # steps sampled ahead
AGREE_EVERY = 10  # steps after which the processes agree on when to end
LOG_EVERY = 50
FILES = (STATE_FILE, "mini.safetensors", "level.safetensors", "curve.json", "curve.png")


@dataclass
class Plan:
    """When the learning rate begins to fall and when the run ends, in steps; None while that is open."""

    decay_start: int | None = None
    end: int | None = None

    @classmethod
    def of_steps(cls, first: int, steps: int, decay: float) -> Plan:
        """The plan of `steps` steps from number `first` on, the last share `decay` with a falling rate."""
        return cls(first + steps - round(steps * decay), first + steps)

    def decide(self, step: int, left: float, decay: float, seconds_per_step: float | None) -> None:
        """Let the learning rate fall from `step` on if only `decay` seconds are left, and end when none are.

        The end is estimated anew each time, and not before it is known how long a step takes: the first ones compile.
        """
        if left > decay or (seconds_per_step is None and left > 0):
            return
        if self.decay_start is None:
            self.decay_start = step
        steps_left = int(left / seconds_per_step) if seconds_per_step is not None and left > 0 else 0
        self.end = max(step + steps_left, self.decay_start + 1)

    def rate(self, trainer: Trainer) -> float:
        """Factor on the learning rates of the trainer's next step."""
        # What starts from given weights warms up anew.
        warm = learning_rate(trainer.since_start, trainer.settings.warm_up, None, None)
        return warm * learning_rate(trainer.step_number, 0, self.decay_start, self.end)


def held_out_scenes(trainer: Trainer) -> tuple[Tensor, Tensor, Tensor]:
    """Images, extrinsics and depth of scenes that no step draws: of all kinds, with all effects."""
    settings = trainer.settings
    views = min(settings.views, key=lambda number: abs(number - HELD_OUT_VIEWS))
    seed = mixed_seed(HELD_OUT_SEED)
    inputs = sample_inputs(settings, views, seed, len(trainer.atlas), trainer.atlas.photographs)
    inputs = inputs.unpack(inputs.packed().to(trainer.device))
    images, depth = trainer.render(inputs)
    shape = (settings.frames // views, views)
    return images.unflatten(0, shape), inputs.scenes.world_to_camera(), depth.unflatten(0, shape)


def save_level(trainer: Trainer, path: Path) -> None:
    """Model and auxiliary heads in float16, to start another run from."""
    parts = {"model": trainer.model, "auxiliary": trainer.auxiliary}
    tensors = {
        f"{part}.{name}": value.half().contiguous().cpu()
        for part, module in parts.items()
        for name, value in module.state_dict().items()
    }
    with result_file(path) as temporary:
        save_file(tensors, temporary, {"step": str(trainer.step_number)})


def load_weights(trainer: Trainer, path: Path) -> None:
    """Start from weights: those that `save_level` wrote, or a checkpoint of VGGT-mini, which has no auxiliary heads.

    Raises:
        PaceError: the file is missing, damaged, or of another architecture.
    """
    if not path.is_file():
        raise PaceError(
            f"{path} does not exist: pass the level.safetensors of an earlier run, or a checkpoint"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = read_tensors(path, "weights to start from")
        if "step" in metadata:
            parts = {"model": trainer.model, "auxiliary": trainer.auxiliary}
            for name, module in parts.items():
                own = [key for key in tensors if key.startswith(f"{name}.")]
                module.load_state_dict({key.removeprefix(f"{name}."): tensors[key] for key in own})
        else:
            trainer.model.load_state_dict(tensors)
    except SafetensorError as error:
        raise PaceError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    except RuntimeError as error:
        raise PaceError(f"{path} is of another architecture: {error}") from error
    # Go on to scenes that these weights have not seen.
    steps = metadata.get("step") or json.loads(metadata.get("training", "{}")).get("steps", 0)
    trainer.step_number = int(steps)


def resumed(trainer: Trainer, journal: Journal, path: Path) -> Plan:
    """Take over the state of a run that was stopped; returns its plan."""
    with loaded_state(path, trainer.device) as state:
        trainer.load(state)
        plan = Plan(**state["plan"])
        if plan.end is not None and trainer.step_number > whole("end", plan.end, 0):
            raise ValueError(f"step {trainer.step_number} of {plan.end}")
        journal.records = state["records"]
        # The curve is drawn minutes later, which is late to find them damaged.
        if not all("step" in record and "seconds" in record for record in journal.records):
            raise ValueError("records without their step")
    return plan


def agree(plan: Plan, device: torch.device) -> None:
    """Let all processes have the plan of the first one."""
    known = [-1 if number is None else number for number in (plan.decay_start, plan.end)]
    both = torch.tensor(known, device=device)
    dist.broadcast(both, 0)
    plan.decay_start, plan.end = (None if number < 0 else number for number in both.tolist())


def train(trainer: Trainer, plan: Plan, journal: Journal, args: argparse.Namespace, signals: Signals) -> None:
    """Run the loop until the plan or a signal ends it; only the first process writes."""
    main, folder = trainer.rank == 0, args.out
    frames = trainer.settings.frames * trainer.world
    if main:
        sets = {
            "rooms": held_out_rooms(trainer.settings.size, trainer.device),
            "scenes": held_out_scenes(trainer),
        }
        parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
        journal.say(f"{parameters:.2f} M parameters, {len(trainer.atlas)} textures, {frames} frames a step")

    def measure() -> None:
        journal.measured(
            trainer.step_number, {name: evaluate(trainer.predict, *held) for name, held in sets.items()}
        )
        save_mini(
            trainer.model, folder / "mini.safetensors", {"steps": trainer.step_number, "frames": frames}
        )

    def save() -> None:
        state = {**trainer.state(), "plan": asdict(plan), "records": journal.records}
        save_state(state, folder / STATE_FILE)

    chores = {measure: Timer(args.evaluate_every), save: Timer(args.save_every)} if main else {}
    with signals.held(), ThreadPoolExecutor(2) as pool:
        pending: deque[Future[tuple[int, Inputs, Tensor]]] = deque()
        following = trainer.step_number
        while (plan.end is None or trainer.step_number < plan.end) and not signals.asked():
            while len(pending) < PREFETCH:
                pending.append(pool.submit(trainer.sample, following))
                following += 1
            if trainer.step_number == plan.decay_start and main:
                save_level(trainer, folder / "level.safetensors")
            trainer.step(pending.popleft().result(), plan.rate(trainer))
            step = trainer.step_number
            if step % LOG_EVERY == 0 and main:
                losses = trainer.latest_losses()
                journal.trained(step, frames, losses)
                if not math.isfinite(losses["total"]):
                    raise PaceError(f"the loss is {losses['total']} at step {step}")
            if step % AGREE_EVERY == 0:
                if args.seconds and main:
                    left = args.seconds - journal.elapsed()
                    plan.decide(step, left, args.seconds * trainer.settings.decay, journal.seconds_per_step)
                if trainer.world > 1:
                    agree(plan, trainer.device)
                elif trainer.on_gpu:
                    torch.cuda.synchronize()  # the host must not run far ahead of its own buffers
            for chore, timer in chores.items():
                if timer.is_due():
                    with journal.break_time():
                        chore()
        for future in pending:
            future.cancel()
        if main:
            save()
    if main:
        measure()
        save()
        journal.say(f"{trainer.step_number} steps of {frames} images")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Settings()
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seconds", type=float, help="length of the run, from the start of the program")
    parser.add_argument("--steps", type=int, help="length of the run in steps, instead of --seconds")
    parser.add_argument(
        "--resume", action="store_true", help="go on from DIR/state.pt, if it is there, as planned"
    )
    parser.add_argument(
        "--from-weights",  # torchrun would take --start for an option of its own
        type=Path,
        metavar="FILE",
        help="begin with the weights of a level.safetensors or a checkpoint",
    )
    parser.add_argument("--textures", type=Path, metavar="PATH", help="zip file or folder of photographs")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one if not given)")
    parser.add_argument("--no-graphs", action="store_true", help="launch each operation on the GPU by itself")
    parser.add_argument("--evaluate-every", type=float, default=90.0, metavar="SECONDS")
    parser.add_argument("--save-every", type=float, default=120.0, metavar="SECONDS")
    for name in ("frames", "dense", "size", "warm_up", "seed", "procedural"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    for name in ("muon_rate", "adam_rate", "decay"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(defaults, name))
    parser.add_argument("--views", type=int, nargs="+", default=list(VIEWS))
    parser.add_argument(
        "--config", type=json.loads, default={}, help="MiniConfig fields as JSON, over the defaults"
    )
    args = parser.parse_args(argv)
    if (args.seconds is None) == (args.steps is None):
        parser.error("give either --seconds or --steps")
    if args.steps is not None:
        whole("steps", args.steps)
    for name, least in dict(seconds=1, evaluate_every=0, save_every=0).items():
        value = getattr(args, name)
        if value is not None and not least <= number(name, value) < math.inf:
            raise PaceError(f"{name} must be a number of seconds of at least {least}, got {value:g}")
    args.begun = time.monotonic()
    return args


def architecture(changes: dict[str, Any], size: int) -> MiniConfig:
    """The trained architecture with some fields changed.

    Raises:
        PaceError: there is no such field.
    """
    if not isinstance(changes, dict):
        raise PaceError(f"config must be fields of MiniConfig by name, got {changes!r:.80}")
    known: dict[str, Any] = asdict(MiniConfig())
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise PaceError(f"MiniConfig has no field {', '.join(unknown)}; it has {', '.join(known)}")
    changes = {name: tuple(v) if isinstance(v, list) else v for name, v in changes.items()}
    known |= {"image_size": size, **changes}
    return MiniConfig(**known)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    rank, world = place_of_torchrun()
    args.views = tuple(args.views)
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    config = architecture(args.config, args.size)
    device = usable_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    results_folder(args.out, FILES if rank == 0 else ())
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        photographs = load_photographs(args.textures) if args.textures else None
        atlas = texture_atlas(photographs, settings.procedural, 0, device)
        trainer = Trainer(settings, config, atlas, rank, world)
        trainer.recorder.on &= not args.no_graphs
        journal = Journal(args.out, args.begun, rank == 0)
        if args.from_weights:
            load_weights(trainer, args.from_weights)
        plan = Plan.of_steps(trainer.step_number, args.steps, settings.decay) if args.steps else Plan()
        if args.resume and (args.out / STATE_FILE).is_file():
            plan = resumed(trainer, journal, args.out / STATE_FILE)
        with Signals(world) as signals:
            try:
                train(trainer, plan, journal, args, signals)
            except Stopped as stopped:
                stopped.tell(trainer.step_number, args.out / STATE_FILE)
                raise
    finally:
        if world > 1:
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"train: {error}")
    except Stopped as stopped:
        print(f"train: {stopped}", file=sys.stderr)
        sys.exit(stopped.status)
