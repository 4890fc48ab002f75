"""Models that are accelerated, changed, copied, wrapped, interrupted and called in every way."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from hosts import random_deltas, random_images, tiny_vggt
from test_selection import reference_assign
from torch import Tensor, distributed, nn

import pacevggt_patch
from pacevggt_patch import (
    PaceConfig,
    PaceError,
    PaceWeights,
    accelerate,
    is_accelerated,
    paused,
    remove,
    summary,
)
from pacevggt_patch.method.selection import assign
from pacevggt_patch.patching.install import forwards_of

from . import Trial, campaign

MODES = ("global", "pre-aa")


def outputs(model: Any, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model(images)
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def differ(first: dict[str, Tensor], second: dict[str, Tensor]) -> str | None:
    """Where two outputs are not the same to the bit, or None."""
    if first.keys() != second.keys():
        return f"outputs {sorted(second)} instead of {sorted(first)}"
    off = [name for name in first if not torch.equal(first[name], second[name])]
    return f"{off[0]} differs" if off else None


def traces(model: nn.Module) -> tuple:
    """What `remove` must leave as it was."""
    modules = (
        (name, tuple(module.__dict__), tuple(module._parameters), tuple(module._modules), module.training)
        for name, module in model.named_modules()
    )
    return (*modules, tuple(model.state_dict()), torch.random.get_rng_state().sum().item())


def settings_of(numbers: random.Random, weights: dict[str, Any]) -> dict[str, Any]:
    """Some settings that `accelerate` takes."""
    keep, mode = numbers.choice([0.05, 0.3, 0.5, 0.77, 1.0]), numbers.choice(MODES)
    chosen: dict[str, Any] = {"keep_ratio": keep, "mode": mode, "min_frames": numbers.choice([None, 1, 3])}
    if mode == "pre-aa" and numbers.random() < 0.5:
        chosen["merge_budget"] = numbers.uniform(0, 1 - keep)
    chosen["weights"] = numbers.choice([None, weights[mode]])
    chosen["head_dtype"] = numbers.choice([None, None, torch.bfloat16])
    chosen["output_device"] = numbers.choice([None, "cpu"])
    return chosen


@campaign(
    "after each cycle of accelerate, re-tune and remove the model is the stock one to the bit, without a trace"
)
def cycles(quick: bool) -> Iterator[Trial]:
    count, numbers = 12 if quick else 1000, random.Random(0)
    model, images = tiny_vggt(), random_images(2)
    weights = {mode: random_deltas(model, mode=mode) for mode in MODES}
    stock, before = outputs(model, images), traces(model)
    objects = 0
    for number in range(count):
        problem = None
        for _ in range(numbers.randint(1, 3)):
            accelerate(model, **settings_of(numbers, weights))
            found = outputs(model, images)
            if any(not value.isfinite().all() for value in found.values()):
                problem = "outputs that are not finite"
        with paused(model):
            problem = problem or differ(stock, outputs(model, images))
        remove(model)
        problem = problem or differ(stock, outputs(model, images))
        if traces(model) != before:
            problem = problem or "something is left behind"
        if number == 10 or number == count - 1:
            gc.collect()
            now = len(gc.get_objects())
            if number == count - 1 and now > objects + 200:
                problem = problem or f"{now - objects} objects more than {number - 10} cycles before"
            objects = objects or now
        yield Trial(f"cycle {number}", problem)


@campaign(
    "kept, merged and pruned tokens are those of a brute-force reference, and their numbers those of the budget"
)
def budgets(quick: bool) -> Iterator[Trial]:
    numbers = random.Random(0)
    for _ in range(200 if quick else 2000):
        frames, patches = numbers.randint(1, 8), numbers.randint(1, 14)
        keep = numbers.randint(1, patches)
        merge = numbers.randint(0, frames * (patches - keep))
        most = numbers.choice([0, 2, 1000])
        scores = [[float(numbers.randint(0, most)) for _ in range(patches)] for _ in range(frames)]
        found = assign(torch.tensor([scores]), keep, merge)
        kept, roles, _ = reference_assign(scores, keep, merge)
        same = found.kept[0].tolist() == kept and found.role[0].tolist() == roles
        yield Trial(f"{frames} x {patches}, keep {keep}, merge {merge}", None if same else "another choice")


class Broken(Exception):
    """What is raised on purpose."""


@contextmanager
def failing(owner: Any, name: str, at: int) -> Generator[None]:
    """The `at`-th call of an attribute fails inside the `with` block."""
    real, calls = getattr(owner, name), [0]

    def call(*args, **kwargs):
        calls[0] += 1
        if calls[0] == at:
            raise Broken
        return real(*args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, real)


def breakable(mode: str) -> list[tuple[Any, str]]:
    """Functions that a forward pass calls on its way."""
    from pacevggt_patch.hosts import blocks, dpt
    from pacevggt_patch.method import global_pruning, pre_aa, propagation, scoring
    from pacevggt_patch.patching import forwards, global_attention, heads, state

    found: list[tuple[Any, str]] = [
        (state.State, "begin"), (scoring, "coverage_scores"), (heads, "room"), (dpt, "dense_head"),
        (torch.nn.functional, "scaled_dot_product_attention"), (torch.nn.functional, "gelu"),
        (torch.nn.functional, "layer_norm"), (torch.nn.functional, "interpolate"), (forwards, "rotate"),
        (forwards, "run_dense_head"),
    ]  # fmt: skip
    if mode == "global":
        found += [
            (state, "keep_best"), (state, "make_propagation"), (state, "joined"), (forwards, "run_on_kept"),
            (global_attention, "joined_heads"), (propagation, "solve_ridge"), (blocks, "before_attention"),
            (blocks, "after_attention"), (global_pruning, "token_scores"),
        ]  # fmt: skip
    else:
        found += [
            (pre_aa, "choose_tokens"),
            (pre_aa, "entering_tokens"),
            (pre_aa, "alternate"),
            (pre_aa, "assign"),
        ]
        found += [(forwards, "run_camera_head")]
    return found


@campaign(
    "an error in any stage comes out as it is; afterwards the model gives what it gave, and can be removed"
)
def faults_in_stages(quick: bool) -> Iterator[Trial]:
    images = random_images(3)
    for mode in MODES:
        model = tiny_vggt()
        stock, before = outputs(model, images), traces(model)
        weights = random_deltas(model, mode=mode)
        if mode == "global":
            weights.full_heads = ((1, 0),)
        accelerate(model, 0.3, weights=weights, mode=mode)
        wanted = outputs(model, images)
        for owner, name in breakable(mode):
            for at in (1, 2) if quick else (1, 2, 3, 5, 8, 13):
                problem = None
                with failing(owner, name, at):
                    try:
                        outputs(model, images)
                    except Broken:
                        pass
                    except Exception as error:
                        problem = f"{type(error).__name__} instead"
                problem = problem or differ(wanted, outputs(model, images))
                yield Trial(f"{mode}: call {at} of {name}", problem)
        remove(model)
        left = differ(stock, outputs(model, images)) or (None if traces(model) == before else "traces")
        yield Trial(f"{mode}: removed", left)


@campaign("threads that run, pause and share one model get what they would get alone")
def threads(quick: bool) -> Iterator[Trial]:
    for mode in MODES:
        model, clips = tiny_vggt(), [random_images(frames, seed=frames) for frames in (2, 3, 4)]
        stock = [outputs(model, clip) for clip in clips]
        accelerate(model, 0.4, weights=None, mode=mode)
        fast = [outputs(model, clip) for clip in clips]
        problems: list[str] = []

        def work(number: int, model=model, clips=clips, stock=stock, fast=fast, problems=problems) -> None:
            numbers = random.Random(number)
            for _ in range(4 if quick else 40):
                chosen = numbers.randrange(len(clips))
                try:
                    if numbers.random() < 0.4:
                        with paused(model):
                            off = differ(stock[chosen], outputs(model, clips[chosen]))
                    else:
                        off = differ(fast[chosen], outputs(model, clips[chosen]))
                except Exception as error:
                    off = repr(error)
                problems += [off] if off else []

        for round_ in range(2 if quick else 10):
            problems.clear()
            running = [threading.Thread(target=work, args=(10 * round_ + i,)) for i in range(4)]
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
            yield Trial(f"{mode}: four threads, round {round_}", problems[0] if problems else None)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved_whole(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@campaign("a copy of an accelerated model works alone and can be removed; the model does not notice")
def copies(quick: bool) -> Iterator[Trial]:
    images = random_images(3)
    for mode in MODES:
        for way in (copy.deepcopy, pickled, saved_whole):
            for accelerated_before in (False, True):
                model = tiny_vggt()
                stock = outputs(model, images)
                accelerate(model, 0.4, weights=random_deltas(model, mode=mode), mode=mode)
                fast = outputs(model, images) if accelerated_before else None
                other = way(model)
                fast = fast or outputs(model, images)
                problem = differ(fast, outputs(other, images))
                remove(model)
                problem = (
                    problem or differ(fast, outputs(other, images)) or differ(stock, outputs(model, images))
                )
                remove(other)
                problem = problem or differ(stock, outputs(other, images))
                if is_accelerated(other) or forwards_of(other):
                    problem = problem or "the copy stays accelerated"
                yield Trial(
                    f"{mode}: {way.__name__}, {'after' if accelerated_before else 'before'} a pass", problem
                )


@contextmanager
def one_process() -> Generator[None]:
    """A group of this process alone."""
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        distributed.init_process_group("gloo", init_method=f"file://{file.name}.group", rank=0, world_size=1)
        try:
            yield
        finally:
            distributed.destroy_process_group()


def in_ddp(model: nn.Module) -> Any:
    return nn.parallel.DistributedDataParallel(model)


def in_fsdp(model: nn.Module) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def sharded(model: nn.Module) -> Any:
    from torch.distributed.fsdp import fully_shard

    mesh = distributed.init_device_mesh("cpu", (1,))
    for block in model.get_submodule("aggregator.global_blocks").children():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def quantised(model: nn.Module) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)  # ty: ignore[deprecated]


def compiled_whole(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def compiled_blocks(model: nn.Module) -> Any:
    for kind in ("frame_blocks", "global_blocks"):
        blocks = model.get_submodule(f"aggregator.{kind}")
        for name, block in list(blocks.named_children()):
            setattr(blocks, name, torch.compile(block, backend="eager"))
    return model


def compiled_in_place(model: nn.Module) -> Any:
    for block in model.get_submodule("aggregator.global_blocks").children():
        block.compile(backend="eager")
    return model


def hooked(model: nn.Module) -> Any:
    for module in model.modules():
        module.register_forward_hook(lambda module, args, out: None)
        module.register_forward_pre_hook(lambda module, args: None)
    return model


def parametrised(model: nn.Module) -> Any:
    for module in list(model.get_submodule("aggregator").modules()):
        if isinstance(module, nn.Linear):
            nn.utils.parametrizations.weight_norm(module)
    return model


class LowRank(nn.Module):
    """A linear layer with a change beside it, as PEFT puts it in."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer, self.up = base, nn.Parameter(torch.zeros(base.out_features, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x[..., :1] @ self.up.mT


def with_adapters(model: nn.Module) -> Any:
    for block in model.get_submodule("aggregator.global_blocks").children():
        attention: Any = block.attn
        attention.proj = LowRank(attention.proj)
    return model


def offloaded(model: nn.Module) -> Any:
    """Parameters of blocks come when a block runs and go afterwards, as accelerate's hooks do it."""
    for block in model.get_submodule("aggregator.global_blocks").children():
        values = {name: p.detach().clone() for name, p in block.named_parameters()}

        def load(module, args, values=values):
            for name, value in values.items():
                owner, _, last = name.rpartition(".")
                module.get_submodule(owner)._parameters[last] = nn.Parameter(value, requires_grad=False)

        def drop(module, args, out):
            for owner in module.modules():
                for name, p in owner._parameters.items():
                    owner._parameters[name] = (
                        None if p is None else nn.Parameter(p.to("meta"), requires_grad=False)
                    )

        drop(block, None, None)
        block.register_forward_pre_hook(load)
        block.register_forward_hook(drop)
    return model


def in_parallel(model: nn.Module) -> Any:
    return nn.DataParallel(model)


WRAPPERS: list[Any] = [
    in_ddp, in_fsdp, sharded, quantised, compiled_whole, compiled_blocks, compiled_in_place, hooked, parametrised,
    with_adapters, offloaded, in_parallel,
]  # fmt: skip


# Wrappers with which nothing is in the way.
MUST_RUN = (in_ddp, hooked, compiled_blocks, compiled_whole)
# Weights are not for a block whose parameters are others.
CHANGING = (with_adapters, quantised, parametrised, offloaded)
QUICK = [in_ddp, hooked, parametrised, with_adapters, offloaded]  # torch.compile takes its time


@campaign(
    "a wrapper before or after accelerate gives what it gives without accelerate, pruned, or is refused"
)
def wrappers(quick: bool) -> Iterator[Trial]:
    images = random_images(3)
    with one_process():
        for mode in MODES:
            for wrap in WRAPPERS if not quick else QUICK:
                for first in ("wrapped", "accelerated"):
                    for keep in (1.0, 0.4):
                        if quick and (keep == 1.0 or first == "wrapped") and wrap is not in_ddp:
                            continue
                        name = f"{mode}: {wrap.__name__}, {first} first, keep ratio {keep:g}"
                        good = mode == "global" and wrap in MUST_RUN
                        yield tried(name, partial(in_wrapper, mode, wrap, first, keep, images), good)


def in_wrapper(mode: str, wrap: Callable, first: str, keep: float, images: Tensor) -> str | None:
    torch._dynamo.reset()
    expected = outputs(wrap(tiny_vggt()), images)
    model = tiny_vggt()
    weights = random_deltas(model, mode=mode)
    plain = outputs(accelerate(tiny_vggt(), keep, weights=weights, mode=mode), images)
    if first == "wrapped":
        whole = wrap(model)
        inner = getattr(whole, "module", getattr(whole, "_orig_mod", whole))
        accelerate(inner, keep, weights=None if wrap in CHANGING else weights, mode=mode)
        if wrap in CHANGING:
            plain = outputs(accelerate(wrap(tiny_vggt()), keep, weights=None, mode=mode), images)
    else:
        accelerate(model, keep, weights=weights, mode=mode)
        whole = wrap(model)
    found = outputs(whole, images)
    wanted = expected if keep == 1 else plain
    for name, value in wanted.items():
        most = 0.05 if wrap is quantised else 1e-3
        off = (found[name] - value).norm() / value.norm()
        if not off <= most:
            return f"{name} is off by {off:.1%}"
    return None


def tried(name: str, call: Callable[[], str | None], good: bool = False) -> Trial:
    """A trial in which the package may refuse in a sentence, and nothing else may be raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Trial(name, call())
    except PaceError as error:
        text = str(error)
        bad = len(text) < 20 or "\n" in text
        return Trial(name, f"says {text!r}" if bad else None, True, good)
    except Exception as error:
        return Trial(name, f"{type(error).__name__}: {error}".splitlines()[0][:200])


STRANGE: list[Any] = [
    None, True, -1, 0, 3, 2.5, float("nan"), float("inf"), 10**400, "2", "", b"x", [], [1, 2], {}, (), object(), int,
    torch.zeros(2), torch.zeros(0), nn.Linear(2, 2), lambda: None, 1j, range(3),
]  # fmt: skip


@campaign("arguments of wrong types and values are refused with an error that names what is wrong")
def arguments(quick: bool) -> Iterator[Trial]:
    model = tiny_vggt()
    accelerated: Any = accelerate(tiny_vggt(), weights=None)
    images = random_images(2)
    new, budget = PaceWeights.new, pacevggt_patch.fit_budget
    calls: dict[str, Callable[[Any], Any]] = {
        "accelerate(x)": lambda x: accelerate(x),
        "accelerate(keep_ratio)": lambda x: accelerate(model, x),
        "accelerate(merge_budget)": lambda x: accelerate(model, 0.3, x),
        "accelerate(weights)": lambda x: accelerate(model, weights=x),
        "accelerate(mode)": lambda x: accelerate(model, mode=x),
        "accelerate(min_frames)": lambda x: accelerate(model, min_frames=x, weights=None),
        "accelerate(compile)": lambda x: accelerate(model, compile=x, weights=None),
        "accelerate(head_dtype)": lambda x: accelerate(model, head_dtype=x, weights=None),
        "accelerate(output_device)": lambda x: accelerate(model, output_device=x, weights=None),
        "PaceConfig(keep_ratio)": lambda x: PaceConfig(x),
        "remove(x)": lambda x: remove(x),
        "summary(x)": lambda x: summary(x),
        "summary(images)": lambda x: summary(accelerated, x),
        "paused(x)": lambda x: paused(x).__enter__(),
        "is_accelerated(x)": lambda x: is_accelerated(x),
        "calibrate(x)": lambda x: pacevggt_patch.calibrate(x, images),
        "calibrate(clips)": lambda x: pacevggt_patch.calibrate(model, x),
        "calibrate(mode)": lambda x: pacevggt_patch.calibrate(model, images, mode=x),
        "calibrate(keep_ratios)": lambda x: pacevggt_patch.calibrate(
            model, images, mode="pre-aa", keep_ratios=x
        ),
        "calibrate(run)": lambda x: pacevggt_patch.calibrate(model, images, run=x),
        "fit_budget(x)": lambda x: budget(x, 2, (56, 56), seconds=5),
        "fit_budget(frames)": lambda x: budget(model, x, (56, 56), seconds=5, weights=None),
        "fit_budget(size)": lambda x: budget(model, 2, x, seconds=5, weights=None),
        "fit_budget(seconds)": lambda x: budget(model, 2, (56, 56), seconds=x, weights=None),
        "fit_budget(memory_gib)": lambda x: budget(model, 2, (56, 56), memory_gib=x, weights=None),
        "fit_budget(config)": lambda x: budget(model, 2, (56, 56), seconds=5, config=x, weights=None),
        "PaceWeights.new(x)": lambda x: new(x),
        "PaceWeights.new(mode)": lambda x: new(model, mode=x),
        "PaceWeights.new(keep_ratios)": lambda x: new(model, keep_ratios=x),
        "PaceWeights.new(training)": lambda x: new(model, training=x),
        "PaceWeights.load(x)": lambda x: PaceWeights.load(x),
        "PaceWeights.save(path)": lambda x: new(model).save(x),
        "PaceWeights.save(rank)": lambda x: new(model).save("/nowhere/x.safetensors", rank=x),
        "aggregator(images)": lambda x: accelerated.aggregator(x),
    }
    for name, call in calls.items():
        for value in STRANGE if not quick else STRANGE[::2]:
            if name == "calibrate(run)" and callable(value):
                continue  # what it does is the user's
            trial = tried(f"{name} of {value!r:.40}", partial(refuses, call, value))
            yield trial
            remove(model)


def refuses(call: Callable[[Any], Any], value: Any) -> None:
    call(value)  # some values are as good as others: what is not refused must run
