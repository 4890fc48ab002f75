"""What `accelerate` promises of every family of models: checks that take a subject and know nothing else of it.

A family makes a `Subject` of a small model with random weights and runs `CHECKS` on it. Checks ask the model and what
it returns, and look at attention from outside. They do not ask the adapter.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from test_no_waiting import Looks, no_lists
from torch import Tensor, distributed, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from pacevggt_patch import (
    PaceError,
    PaceWeights,
    UnsupportedModelError,
    WeightsError,
    accelerate,
    calibrate,
    fit_budget,
    is_accelerated,
    paused,
    remove,
    summary,
)
from pacevggt_patch.calibration import full_heads as by_call
from pacevggt_patch.hosts import blocks
from pacevggt_patch.hosts.base import Host, find_host
from pacevggt_patch.method.full_heads import choose_full_heads
from pacevggt_patch.patching import first_clip as by_blocks
from pacevggt_patch.runtime import compiling

KEEP = 0.3
FRAMES, ROWS, COLUMNS = 4, 4, 5


@dataclass(frozen=True)
class Subject:
    """A small model of one family.

    Attributes:
        name: for the test's report.
        family: as pace weights name it.
        build: a model in evaluation mode, its random weights told by a seed.
        patch_size: pixels a side of a patch.
        special: tokens in front of a frame's patch tokens in global attention.
        call: runs a model on images [B, S, 3, H, W] in [0, 1], and returns what a user gets.
        inner: runs what can be run under autocast on the CPU, which not all heads can.
        pre_aa: whether it can be pruned before alternating attention.
        compiles: how many blocks `accelerate(compile=True)` compiles; 0 where it must refuse.
        gradients: whether its own forward can be run with gradients in evaluation mode.
        special_blocks: numbers of the blocks between frames that special tokens alone enter.
        refused: settings that `accelerate` must refuse.
        variant: whether it has another shape than a subject of its family before it: it runs `CHECKS_OF_SHAPE` alone.
        missing: why the model is not here, or None.
    """

    name: str
    family: str
    build: Callable[[int], nn.Module]
    patch_size: int
    special: int
    call: Callable[[Any, Tensor], Any] = lambda model, images: model(images)
    inner: Callable[[Any, Tensor], Any] = lambda model, images: model(images)
    pre_aa: bool = False
    compiles: int = 1
    gradients: bool = True
    special_blocks: tuple[int, ...] = ()
    refused: tuple[str, ...] = ()
    variant: bool = False
    missing: str | None = None

    def model(self, seed: int = 0) -> nn.Module:
        if self.missing is not None:
            pytest.skip(self.missing)
        return copy.deepcopy(_built(self.build, seed))

    def images(
        self, frames: int = FRAMES, *, batch: int = 1, grid: tuple[int, int] = (ROWS, COLUMNS), seed: int = 0
    ) -> Tensor:
        """Images [B, S, 3, H, W] of a grid of patches."""
        height, width = (side * self.patch_size for side in grid)
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(batch, frames, 3, height, width, generator=generator)

    def run(self, model: Any, images: Tensor) -> list[Tensor]:
        """All tensors that a call gives, in order."""
        with torch.inference_mode():
            return tensors(self.call(model, images))


@cache
def _built(build: Callable[[int], nn.Module], seed: int) -> nn.Module:
    """A model that nobody runs: copies of it take a tenth of the time that making it does."""
    return build(seed)


def tensors(output: Any) -> list[Tensor]:
    """The tensors in nested outputs."""
    return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]


def prune(model: Any, keep: float = KEEP, **settings: Any) -> Any:
    """The model, accelerated, however short its clips."""
    return accelerate(model, keep, **{"weights": None, "min_frames": 1} | settings)


def assert_equal(found: list[Tensor], stock: list[Tensor]) -> None:
    """The same to the bit."""
    assert len(found) == len(stock) > 0
    for number, (a, b) in enumerate(zip(found, stock, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape, number
        assert torch.equal(a, b), f"output {number} differs by {(a.double() - b.double()).abs().max():.2e}"


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-3) -> None:
    """The same but for rounding, by the norm of each output."""
    assert [t.shape for t in found] == [t.shape for t in expected]
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        error = float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12))
        assert error <= tolerance, f"output {number} differs by {error:.2e} of its norm"


def assert_pruned(found: list[Tensor], stock: list[Tensor]) -> None:
    """Other values in the same form."""
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in stock]
    assert all(bool(t.isfinite().all()) for t in (*found, *stock) if t.is_floating_point())
    assert any(not torch.equal(a, b) for a, b in zip(found, stock, strict=True))


class _LargestAttention(TorchFunctionMode):
    """Keeps the largest number of pairs of queries and keys that attention is given at once."""

    def __init__(self):
        super().__init__()
        self.pairs = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            query, key = (
                args[i] if len(args) > i else (kwargs or {})[n] for i, n in enumerate(("query", "key"))
            )
            self.pairs = max(self.pairs, query.shape[-2] * key.shape[-2])
        return func(*args, **(kwargs or {}))


def most_tokens(subject: Subject, model: Any, images: Tensor) -> float:
    """The largest number of tokens that attend to each other in a call."""
    with _LargestAttention() as seen:
        subject.run(model, images)
    return seen.pairs**0.5


@contextmanager
def every_head_counts() -> Generator[None]:
    """Calibration takes all heads, however little they lose."""
    module = "pacevggt_patch.method.full_heads."
    with mock.patch(module + "LEAST_ERROR", 0.0), mock.patch(module + "MOST", 1.0):
        yield


def snapshot(model: nn.Module) -> dict[Any, Any]:
    """All that is in the `__dict__` of every module, by `id` where it can't be compared, and its class."""
    found: dict[Any, Any] = {}
    for name, module in model.named_modules():
        found[name, "class"] = type(module)
        for key, value in module.__dict__.items():
            known = {k: id(v) for k, v in value.items()} if isinstance(value, dict) else value
            found[name, key] = known if isinstance(known, (dict, int, float, str, tuple)) else id(known)
    return found


# ---- all tokens kept, and the stock model


def keeping_everything_is_stock_to_the_bit(subject: Subject) -> None:
    for images in (
        subject.images(),
        subject.images(3, batch=2),
        subject.images(1),
        subject.images(grid=(3, 7)),
    ):
        model = subject.model()
        stock = subject.run(model, images)
        assert all(bool(t.isfinite().all()) for t in stock if t.is_floating_point())
        assert_equal(subject.run(prune(model, 1.0), images), stock)


def removal_leaves_no_trace(subject: Subject) -> None:
    model, images = subject.model(), subject.images()
    stock = subject.run(model, images)  # fills the model's own caches
    before, state = snapshot(model), model.state_dict()
    prune(model)
    assert is_accelerated(model) and [*model.state_dict()] == [*state]
    subject.run(model, images)
    remove(model)
    assert not is_accelerated(model) and snapshot(model) == before
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert_equal(subject.run(model, images), stock)


def acceleration_fills_no_cache(subject: Subject) -> None:
    """What a trial on a tiny clip would leave behind may be of another device than that of the next clip."""
    model = subject.model()
    before = dictionaries(model)
    remove(prune(model))
    assert dictionaries(model) == before


def dictionaries(model: nn.Module) -> dict[Any, int]:
    """Lengths of the dictionaries that modules hold, and that objects in their attributes do."""
    found = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            held = {"": value} if isinstance(value, dict) else getattr(value, "__dict__", {})
            found |= {(name, key, own): len(part) for own, part in held.items() if isinstance(part, dict)}
    return found


def a_pause_runs_the_stock_model(subject: Subject) -> None:
    model, images = subject.model(), subject.images()
    stock = subject.run(model, images)
    pruned = subject.run(prune(model), images)
    with paused(model):
        assert_equal(subject.run(model, images), stock)
    assert_equal(subject.run(model, images), pruned)


# ---- pruned


def fewer_tokens_attend(subject: Subject) -> None:
    model, images = subject.model(), subject.images()
    stock, whole = subject.run(model, images), most_tokens(subject, model, images)
    assert whole == FRAMES * (subject.special + ROWS * COLUMNS)
    found = subject.run(prune(model), images)
    assert_pruned(found, stock)
    kept = round(KEEP * ROWS * COLUMNS)
    assert most_tokens(subject, model, images) == FRAMES * (subject.special + kept)
    numbers = summary(model).kept
    assert numbers is not None and numbers.shape == (1, FRAMES, kept)
    assert int(numbers.min()) >= 0 and int(numbers.max()) < ROWS * COLUMNS


def heads_that_all_see_everything_are_stock(subject: Subject) -> None:
    """With all heads of all blocks but the last, the outputs come far nearer to the stock model's."""
    model, images = subject.model(), subject.images()
    stock = subject.run(model, images)
    few = subject.run(prune(model), images)
    remove(model)
    with every_head_counts():
        weights = calibrate(model, images)
    heads = {head for _, head in weights.full_heads}
    blocks = {block for block, _ in weights.full_heads}
    assert len(weights.full_heads) == len(heads) * len(blocks) > 1
    many = subject.run(prune(model, weights=weights), images)

    def errors(found: list[Tensor]) -> list[float]:
        return [float((a.double() - b.double()).norm()) for a, b in zip(found, stock, strict=True)]

    pairs = [(a, b) for a, b in zip(errors(many), errors(few), strict=True) if b > 0]
    assert pairs and sum(a < b for a, b in pairs) > len(pairs) / 2


def nothing_is_read_back(subject: Subject, monkeypatch: Any) -> None:
    """On a GPU each look at a value would make the host wait for the device."""
    model, images = subject.model(), subject.images()
    weights = replace(random_deltas(model), full_heads=some_heads(subject, model))
    monkeypatch.setattr(Host, "check_images", lambda *_: None)  # a CPU gets a look, a GPU does not
    prune(model, weights=weights)
    with torch.no_grad(), no_lists(), Looks():
        assert tensors(subject.call(model, images))


def clips_of_a_batch_do_not_meet(subject: Subject) -> None:
    model, images = subject.model(), subject.images(batch=2)
    prune(model)
    both = subject.run(model, images)
    for clip in range(2):
        alone = subject.run(model, images[clip : clip + 1])
        assert_close([t[clip : clip + 1] for t in both], alone)


def grids_may_be_odd(subject: Subject) -> None:
    for grid in ((3, 7), (5, 2)):
        model, images = subject.model(), subject.images(5, grid=grid)
        stock = subject.run(model, images)
        assert_pruned(subject.run(prune(model), images), stock)


def autocast_is_followed(subject: Subject, monkeypatch: Any) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    model, images = subject.model(), subject.images()
    inner = replace(subject, call=subject.inner)
    with torch.autocast("cpu", torch.bfloat16):
        stock = inner.run(model, images)
        assert_equal(inner.run(prune(model, 1.0), images), stock)
        found = inner.run(prune(model), images)
        assert_pruned(found, stock)
        if subject.compiles and not subject.variant:
            assert_close(inner.run(prune(model, compile=True), images), found, 0.05)


def gradients_are_those_of_what_runs(subject: Subject) -> None:
    if not subject.gradients:
        pytest.skip("its own forward has no gradients in evaluation mode")
    model, images = subject.model(), subject.images()
    prune(model)
    floats = [t for t in tensors(subject.call(model, images)) if t.requires_grad]
    sum(t.double().square().mean() for t in floats).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(bool(g.isfinite().all()) for g in gradients)
    with torch.no_grad():
        assert_close(
            tensors(subject.call(model, images)), [t.detach() for t in tensors(subject.call(model, images))]
        )


def another_call_changes_the_settings(subject: Subject) -> None:
    model, images = subject.model(), subject.images()
    fresh = subject.run(prune(subject.model(), 0.6), images)
    first = subject.run(prune(model), images)
    assert_equal(subject.run(prune(model, 0.6), images), fresh)
    assert_equal(subject.run(prune(model), images), first)


def copies_are_accelerated_apart(subject: Subject) -> None:
    model, images = subject.model(), subject.images()
    prune(model)
    found = subject.run(model, images)
    second = copy.deepcopy(model)
    remove(model)
    assert is_accelerated(second) and not is_accelerated(model)
    assert_equal(subject.run(second, images), found)


# ---- weights


def calibration_finds_heads(subject: Subject) -> None:
    model, images = subject.model(), subject.images()
    stock = subject.run(model, images)
    with mock.patch("pacevggt_patch.method.full_heads.LEAST_ERROR", 0.0):
        weights = calibrate(model, images)
    assert weights.backbone.family == subject.family and weights.full_heads
    assert_equal(subject.run(model, images), stock)
    assert_pruned(subject.run(prune(model, weights=weights), images), stock)
    # The heads see all keys.
    assert most_tokens(subject, model, images) == FRAMES * (subject.special + ROWS * COLUMNS)


def the_first_clip_calibrates(subject: Subject, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PACEVGGT_CACHE", str(folder))
    model, images = subject.model(), subject.images()
    with every_head_counts():
        given = calibrate(model, images)
        accelerate(model, KEEP, min_frames=1)
        assert "calibrates on the first clip" in str(summary(model))
        first = subject.run(model, images)
    assert "calibrated on the first clip" in str(summary(model))
    assert_close(first, subject.run(prune(subject.model(), weights=given), images), 1e-5)
    (file,) = folder.glob("*.safetensors")
    assert PaceWeights.load(file).full_heads == given.full_heads
    again = subject.model()
    assert "calibration kept in" in str(summary(accelerate(again, KEEP, min_frames=1)))
    assert_close(subject.run(again, images), first, 1e-5)


def calibrations_by_both_ways_agree(subject: Subject) -> None:
    """By the model's own call, and block by block on the first clip: what else blocks are given is right there."""
    model, images, errors = subject.model(), subject.images(6), []

    def look(found: Tensor, blocks: Any) -> Any:
        errors.append(found)
        return choose_full_heads(found, blocks)

    with mock.patch.object(by_call, "choose_full_heads", look):
        calibrate(model, images)
    with mock.patch.object(by_blocks, "choose_full_heads", look):
        subject.run(accelerate(model, KEEP, min_frames=1), images)
    assert len(errors) == 2
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-3, atol=1e-5 * float(errors[0].max()))


def weights_go_to_a_file_and_back(subject: Subject, folder: Path) -> None:
    model, images = subject.model(), subject.images()
    weights = replace(random_deltas(model), full_heads=some_heads(subject, model))
    weights.save(folder / "pace.safetensors")
    found = subject.run(prune(model, weights=weights), images)
    assert_pruned(found, subject.run(prune(subject.model()), images))
    assert_equal(subject.run(prune(model, weights=folder / "pace.safetensors"), images), found)
    assert_equal(
        subject.run(prune(model, 1.0, weights=weights), images), subject.run(subject.model(), images)
    )


def weights_of_another_checkpoint_are_refused(subject: Subject) -> None:
    weights = PaceWeights.new(subject.model(1))
    with pytest.raises(WeightsError, match="another checkpoint"):
        prune(subject.model(), weights=weights)


def weights_of_another_family_are_refused_by_name(subject: Subject, other: Subject) -> None:
    weights = PaceWeights.new(other.model())
    model = subject.model()
    with pytest.raises(WeightsError) as caught:
        prune(model, weights=weights)
    assert other.family in str(caught.value) and subject.family in str(caught.value)
    assert not is_accelerated(model)


def untrained_weights_change_nothing(subject: Subject) -> None:
    model, images = subject.model(), subject.images()
    plain = subject.run(prune(model), images)
    assert_close(subject.run(prune(model, weights=PaceWeights.new(model)), images), plain, 1e-5)


def heads_of_blocks_that_are_not_pruned_are_refused(subject: Subject) -> None:
    model = subject.model()
    weights = PaceWeights.new(model)
    for block in (*subject.special_blocks, 1000):
        with pytest.raises(WeightsError, match=f"global block {block}"):
            prune(model, weights=replace(weights, full_heads=((block, 0),)))


def random_deltas(model: nn.Module, size: float = 0.05) -> PaceWeights:
    """Weights that change the blocks and nothing else."""
    weights = PaceWeights.new(model)
    assert weights.block_deltas is not None
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in weights.block_deltas.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return weights


def some_heads(subject: Subject, model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Heads that calibration chooses, however little they lose."""
    with mock.patch("pacevggt_patch.method.full_heads.LEAST_ERROR", 0.0):
        return calibrate(model, subject.images()).full_heads


# ---- settings


def compiled_blocks_give_the_same(subject: Subject, monkeypatch: Any) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "eager")  # traced as for any, but not translated to C++
    model, images = subject.model(), subject.images()
    if not subject.compiles:
        with pytest.raises(UnsupportedModelError, match="compile"):
            prune(model, compile=True)
        return
    for keep in (KEEP, 1.0):
        plain = subject.run(prune(model, keep), images)
        prune(model, keep, compile=True)
        with mock.patch.object(blocks, "run_block", wraps=blocks.run_block) as run_block:
            assert_close(subject.run(model, images), plain, 1e-4)
    ran = {id(call.args[0]) for call in run_block.call_args_list}
    assert len(ran) == int(summary(model).compiled.split()[0]) == subject.compiles


def blocks_run_by_their_own_code_give_the_same(subject: Subject) -> None:
    """With changed parameters and full-attention heads: blocks that are opened, and those that stay closed."""
    model, images = subject.model(), subject.images()
    weights = replace(random_deltas(model), full_heads=some_heads(subject, model))
    opened = subject.run(prune(model, weights=weights), images)
    with mock.patch.object(blocks, "stock_blocks", return_value=set()):
        prune(model, weights=weights)
    with mock.patch.object(blocks, "run_block", side_effect=AssertionError):
        closed = subject.run(model, images)
    assert_close(closed, opened)


def settings_are_followed_or_refused(subject: Subject) -> None:
    values = {"head_dtype": torch.bfloat16, "output_device": "cpu"}
    for name, value in values.items():
        model, images = subject.model(), subject.images()
        if name in subject.refused:
            with pytest.raises(UnsupportedModelError, match=name):
                prune(model, **{name: value})
            assert not is_accelerated(model)
        else:
            plain = subject.run(prune(model), images)
            assert_close(subject.run(prune(model, **{name: value}), images), plain, 0.05)


def pre_aa_pruning_is_refused(subject: Subject) -> None:
    if subject.pre_aa:
        pytest.skip("it can be pruned before alternating attention")
    model = subject.model()
    with pytest.raises(UnsupportedModelError, match="global"):
        prune(model, mode="pre-aa")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that there are no weights for it is no matter then
        with pytest.raises(UnsupportedModelError, match="global"):
            prune(model, mode="pre-aa", weights="auto")
    assert not is_accelerated(model)


def clips_over_processes_are_refused(subject: Subject, folder: Path) -> None:
    if subject.pre_aa:
        pytest.skip("its clips can be spread over processes")
    store = (folder / "store").as_uri()
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = subject.model()
        with pytest.raises(UnsupportedModelError, match="process_group"):
            prune(model, process_group=True)
        assert not is_accelerated(model)
    finally:
        distributed.destroy_process_group()


def a_budget_is_planned_for(subject: Subject) -> None:
    model, images = subject.model(), subject.images(2)
    stock = subject.run(model, images)
    size = images.shape[-2], images.shape[-1]
    plan = fit_budget(
        model, 2, size, seconds=1000, weights=None, run=lambda images: subject.call(model, images)
    )
    assert plan.keep_ratio == 1.0 and plan.seconds > 0
    assert_equal(subject.run(model, images), stock)
    assert_pruned(subject.run(accelerate(model, replace(plan, keep_ratio=KEEP), weights=None), images), stock)


def images_that_do_not_fit_are_refused(subject: Subject) -> None:
    model, images = subject.model(), subject.images()
    prune(model)
    with pytest.raises(PaceError, match=f"multiples of {subject.patch_size}"):
        subject.run(model, images[..., :-1])
    with pytest.raises(PaceError, match="NaN"):
        subject.run(model, images / 0 * 0)


def a_summary_tells_the_stages(subject: Subject) -> None:
    model = subject.model()
    words = str(summary(prune(model), subject.images()[0]))
    assert "global blocks" in words and f"{subject.special} special tokens" in words
    assert (subject.family in words) == (subject.family != "vggt")
    patched = next(line.split(maxsplit=1)[1] for line in words.splitlines() if line.startswith("patched"))
    trunk = find_host(model).trunk_name or "the model itself"
    assert trunk in patched.split(", ") and "" not in patched.split(", ")


CHECKS = (
    keeping_everything_is_stock_to_the_bit,
    removal_leaves_no_trace,
    acceleration_fills_no_cache,
    a_pause_runs_the_stock_model,
    fewer_tokens_attend,
    heads_that_all_see_everything_are_stock,
    nothing_is_read_back,
    clips_of_a_batch_do_not_meet,
    grids_may_be_odd,
    autocast_is_followed,
    gradients_are_those_of_what_runs,
    another_call_changes_the_settings,
    copies_are_accelerated_apart,
    calibration_finds_heads,
    the_first_clip_calibrates,
    calibrations_by_both_ways_agree,
    weights_go_to_a_file_and_back,
    weights_of_another_checkpoint_are_refused,
    weights_of_another_family_are_refused_by_name,
    untrained_weights_change_nothing,
    heads_of_blocks_that_are_not_pruned_are_refused,
    compiled_blocks_give_the_same,
    blocks_run_by_their_own_code_give_the_same,
    settings_are_followed_or_refused,
    pre_aa_pruning_is_refused,
    clips_over_processes_are_refused,
    a_budget_is_planned_for,
    images_that_do_not_fit_are_refused,
    a_summary_tells_the_stages,
)

# Those that may fail on another shape of a family alone: other blocks, and another order of them.
CHECKS_OF_SHAPE = (
    keeping_everything_is_stock_to_the_bit,
    removal_leaves_no_trace,
    fewer_tokens_attend,
    heads_that_all_see_everything_are_stock,
    nothing_is_read_back,
    clips_of_a_batch_do_not_meet,
    grids_may_be_odd,
    autocast_is_followed,
    gradients_are_those_of_what_runs,
    calibrations_by_both_ways_agree,
    weights_go_to_a_file_and_back,
    compiled_blocks_give_the_same,
    blocks_run_by_their_own_code_give_the_same,
)
