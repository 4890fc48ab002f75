"""The budget solver: right on toys whose cost is known, and a guest in the user's model."""

import itertools
import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hosts import assert_equal, random_images, tiny_vggt, with_heads

from pacevggt_patch import (
    PaceConfig,
    PaceError,
    PaceWeights,
    WeightsError,
    accelerate,
    calibrate,
    fit_budget,
    is_accelerated,
    paused,
    summary,
)
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.planning.fit_budget import CostModel, Point, measure_costs, non_negative_least_squares
from pacevggt_patch.weights import cache as kept_calibrations

budget = sys.modules["pacevggt_patch.planning.fit_budget"]
SIZE = (14 * 28, 14 * 37)
SMALL = (28, 42)  # 6 patches
MODES = ["global", "pre-aa"]
PATCHES, SPECIAL = 28 * 37, 5


def large_gpu(frames, kept):
    """Seconds about those of a large GPU, with what the cost model does not know: chunks, launches, slow short runs."""
    tokens = frames * (SPECIAL + kept)
    dino = 1.8e-3 * (frames + 4 * math.ceil(frames / 64)) + 3e-3 * frames
    launches = 2.5e-5 * kept * math.ceil(frames / 250)
    attention = 2.4e-10 * tokens**2 * (1 + 1500 / (tokens + 3000))
    inside = 5e-10 * frames * (SPECIAL + kept) ** 2
    return 0.02 + dino + launches + 4e-6 * tokens + attention + inside


def small_cpu(frames, kept):
    tokens = frames * (SPECIAL + kept)
    return 0.005 + 0.04 * frames + 2e-5 * tokens + 3e-9 * (tokens**2 + tokens * (SPECIAL + kept))


class Toy:
    """Stands in for the calls of a model: every call moves the clock by what the toy says it costs."""

    def __init__(self, model, cost, monkeypatch, noise=0.0):
        self.model, self.cost, self.noise, self.now, self.calls = model, cost, noise, 0.0, []
        monkeypatch.setattr(budget, "device_time", lambda: self.now)

    def __call__(self, images):
        kept = summary(self.model).config.kept_tokens(PATCHES)
        self.calls.append((images.shape[1], kept))
        wobble = 1 + self.noise * (-1) ** len(self.calls)
        self.now += wobble * self.cost(images.shape[1], kept)


@pytest.fixture
def small_images(monkeypatch):
    """Calibration images without their pixels, which the toys do not look at."""
    rand = torch.rand

    def cheap(*shape, **kwargs):
        large = len(shape) == 5 and shape[-2:] == SIZE
        return rand(1, **kwargs).expand(shape) if large else rand(*shape, **kwargs)

    monkeypatch.setattr(torch, "rand", cheap)


@pytest.mark.parametrize("cost", [large_gpu, small_cpu])
@pytest.mark.parametrize("frames", [1, 2, 10, 48, 100, 300, 1000, 3000])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_predictions_are_right_within_15_percent(monkeypatch, small_images, cost, frames, noise):
    model = accelerate(tiny_vggt(), weights=None)
    toy = Toy(model, cost, monkeypatch, noise)
    costs = measure_costs(model, frames, SIZE, run=toy)
    for ratio in (0.05, 0.1, 0.15, 0.3, 0.5, 0.9):
        kept = round(ratio * PATCHES)
        assert costs.seconds(frames, kept) == pytest.approx(cost(frames, kept), rel=0.15)
    # And calibration is short: a few forwards of the pruned clip, and some of a few frames.
    assert toy.now < 5 * cost(frames, round(0.3 * PATCHES)) + 10 * cost(16, PATCHES)
    assert max(n for n, _ in toy.calls) <= max(32, math.ceil(frames / 2))


@pytest.mark.parametrize("frames", [48, 100, 300, 1000])
def test_heads_that_see_all_tokens_cost_however_many_are_kept(monkeypatch, small_images, frames):
    def cost(frames, kept):
        return large_gpu(frames, kept) + 2.4e-10 * (frames * (SPECIAL + PATCHES)) ** 2 / 16

    model = tiny_vggt()
    accelerate(model, weights=with_heads(model, (1, 0)))
    costs = measure_costs(model, frames, SIZE, run=Toy(model, cost, monkeypatch))
    for ratio in (0.05, 0.1, 0.15, 0.3, 0.5, 0.9):
        kept = round(ratio * PATCHES)
        assert costs.seconds(frames, kept) == pytest.approx(cost(frames, kept), rel=0.15)


@pytest.mark.parametrize("frames,seconds", [(300, 5.0), (300, 2.5), (1000, 24.0), (20, 0.3)])
def test_the_keep_ratio_is_the_largest_that_fits(monkeypatch, small_images, frames, seconds):
    model = tiny_vggt()
    toy = Toy(model, large_gpu, monkeypatch)
    plan = fit_budget(model, frames, SIZE, seconds=seconds, weights=None, run=toy)
    kept = PaceConfig(plan.keep_ratio).kept_tokens(PATCHES)
    assert plan.keep_ratio == kept / PATCHES
    assert plan.seconds <= seconds
    assert large_gpu(frames, kept) == pytest.approx(seconds, rel=0.15)
    assert (plan.frames, plan.size, plan.memory_gib) == (frames, SIZE, None)
    assert plan.calibration_seconds > 0


def test_everything_fits(monkeypatch, small_images):
    model = tiny_vggt()
    toy = Toy(model, large_gpu, monkeypatch)
    assert fit_budget(model, 4, SIZE, seconds=1e6, weights=None, run=toy).keep_ratio == 1
    accelerate(model, 0.2, 0.4, weights=None)  # the merge budget stays, and leaves 0.6 to keep
    plan = fit_budget(model, 4, SIZE, seconds=1e6, run=Toy(model, large_gpu, monkeypatch))
    assert plan.keep_ratio == math.floor(0.6 * PATCHES) / PATCHES
    assert (plan.merge_budget, plan.mode) == (0.4, "pre-aa")
    accelerate(model, plan, weights=None)


def test_nothing_fits(monkeypatch, small_images):
    model = accelerate(tiny_vggt(), weights=None)
    toy = Toy(model, large_gpu, monkeypatch)
    least = measure_costs(model, 300, SIZE, run=toy).seconds(300, 1)
    with pytest.raises(PaceError) as error:
        fit_budget(model, 300, SIZE, seconds=0.5, run=toy)
    for named in ("seconds=0.5", f"{least:.3g}", "300 frames", "392x518"):
        assert named in str(error.value)


@pytest.mark.parametrize(
    "arguments,named",
    [
        (dict(), "budget"),
        (dict(seconds=0), "seconds must be a positive number, got 0"),
        (dict(seconds=math.nan), "seconds must be a number, got nan"),
        (dict(seconds=math.inf), "got inf"),
        (dict(seconds=True), "got True"),
        (dict(seconds="1"), "got '1'"),
        (dict(seconds=1, memory_gib=-2), "memory_gib must be a positive number, got -2"),
        (dict(memory_gib=8), "memory_gib needs a CUDA device"),
        (dict(seconds=1, frames=0), "frames must be a whole number of at least 1, got 0"),
        (dict(seconds=1, frames=2.5), "got 2.5"),
        (dict(seconds=1, frames="2", config=PaceConfig(min_frames=3)), "got '2'"),
        (dict(seconds=1, size=(56, 60)), "56x60"),
        (dict(seconds=1, size=(0, 56)), "size must be height and width"),
        (dict(seconds=1, size=56), "height and width"),
    ],
)
def test_bad_arguments(arguments, named):
    model = tiny_vggt()
    with pytest.raises(PaceError) as error:
        fit_budget(model, **{"frames": 2, "size": (28, 28), "weights": None, **arguments})
    assert named in str(error.value)
    assert not is_accelerated(model)


# ---- a plan is of what then runs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("given", [False, True])
def test_a_plan_goes_straight_in(mode, given):
    """It is a config, with all settings that were planned with."""
    model = tiny_vggt()
    merge = 0.25 if mode == "pre-aa" else None
    config = PaceConfig(0.5, merge, mode if given else None, min_frames=1, head_dtype=torch.bfloat16)
    weights = PaceWeights.new(model, mode=mode)
    plan = fit_budget(model, 3, SMALL, seconds=1e6, config=config, weights=weights)
    assert isinstance(plan, PaceConfig)
    assert plan.plain() == replace(config, mode=mode, keep_ratio=4 / 6 if merge else 1.0)
    accelerate(model, plan, weights=weights)
    assert summary(model).config == plan.plain() and type(summary(model).config) is PaceConfig
    with torch.inference_mode():
        model(random_images(3, height=28, width=42))
    again = fit_budget(model, 3, SMALL, seconds=1e6)
    assert again.plain() == plan.plain()


@pytest.mark.parametrize("mode", MODES)
def test_what_is_measured_are_the_weights_and_the_mode_that_then_run(mode):
    model, seen = tiny_vggt(), set()
    weights = calibrate(model, random_images(3)[0], mode=mode)

    def call(images):
        found = summary(model)
        seen.add((found.weights, found.config.mode))
        return model(images)

    plan = fit_budget(model, 3, SMALL, seconds=1e6, weights=weights, run=call)
    assert seen == {(str(weights), mode)} and plan.mode == mode
    assert not is_accelerated(model)


def test_weights_of_another_mode_than_the_config_are_refused():
    model = tiny_vggt()
    with pytest.raises(WeightsError, match="pre-aa"):
        fit_budget(
            model,
            3,
            SMALL,
            seconds=1,
            config=PaceConfig(mode="global"),
            weights=PaceWeights.new(model, mode="pre-aa"),
        )
    assert not is_accelerated(model)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("keep_ratio", [0.3, 1.0])
def test_a_model_that_is_not_calibrated_yet_is_refused(accelerated, keep_ratio):
    """Even one that keeps all tokens now: its plan would run with heads that nobody knows yet."""
    model = tiny_vggt()
    if accelerated:
        accelerate(model, keep_ratio)
    with pytest.raises(PaceError, match="calibrate"):
        fit_budget(model, 4, SMALL, seconds=1, config=None if accelerated else PaceConfig(keep_ratio))
    assert is_accelerated(model) == accelerated
    if accelerated:
        assert "none yet" in summary(model).weights or keep_ratio == 1
    # In pre-AA mode nothing is calibrated by itself.
    other = tiny_vggt()
    assert fit_budget(other, 4, SMALL, seconds=1e6, config=PaceConfig(mode="pre-aa")).keep_ratio == 1


def test_a_calibration_that_is_kept_is_planned_with(cache):
    model = tiny_vggt()
    path = kept_calibrations.store(PaceWeights.of_heads(find_host(model), ((1, 0),), {}))
    seen = set()

    def call(images):
        seen.add(summary(model).weights)
        return model(images)

    plan = fit_budget(model, 3, SMALL, seconds=1e6, run=call)
    assert len(seen) == 1 and str(path) in seen.pop()
    accelerate(model, plan)
    assert str(path) in summary(model).weights


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"config": PaceConfig(mode="pre-aa")}, 'mode="pre-aa"'),
        ({"config": PaceConfig(0.3, 0.2)}, 'mode="pre-aa"'),
        ({"weights": None}, "weights"),
        ({"weights": "other.safetensors"}, "weights"),
    ],
)
def test_an_accelerated_model_is_planned_with_its_own_mode_and_weights(arguments, named):
    model = accelerate(tiny_vggt(), weights=None)
    with pytest.raises(PaceError, match=named):
        fit_budget(model, 3, SMALL, seconds=1, **arguments)
    assert summary(model).config == PaceConfig(mode="global")
    plan = fit_budget(model, 3, SMALL, seconds=1e6, config=PaceConfig(min_frames=2, head_dtype=torch.float16))
    assert plan.plain() == PaceConfig(1.0, None, "global", 2, head_dtype=torch.float16)
    assert summary(model).config == PaceConfig(mode="global")


def test_clips_that_would_run_unpruned_have_no_plan():
    model = tiny_vggt()
    with pytest.raises(PaceError, match="min_frames=9"):
        fit_budget(model, 8, SMALL, seconds=1, config=PaceConfig(min_frames=9), weights=None)
    assert (
        fit_budget(model, 9, SMALL, seconds=1e6, config=PaceConfig(min_frames=9), weights=None).min_frames
        == 9
    )


# ---- a guest


@pytest.mark.parametrize("accelerated", [False, True])
def test_the_model_is_left_as_it_was(accelerated):
    model, images = tiny_vggt(), random_images(3)
    model.depth_head.train()  # flags need not agree
    if accelerated:
        accelerate(model, 0.3, 0.2, weights=None)
    flags = [module.training for module in model.modules()]
    called = []
    model.register_forward_hook(lambda *_: called.append(1))
    with torch.no_grad():
        before = model(images)
    random = torch.get_rng_state()
    plan = fit_budget(model, 3, SMALL, seconds=1e6, weights="auto" if accelerated else None)
    assert plan.keep_ratio == (1 - 0.2 * accelerated if not accelerated else 4 / 6)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == flags
    assert is_accelerated(model) == accelerated
    with torch.no_grad():
        assert_equal(model(images), before)
    if accelerated:
        assert summary(model).config == PaceConfig(0.3, 0.2, "pre-aa")
        with paused(model):
            fit_budget(model, 3, SMALL, seconds=1e6)
            assert summary(model).paused
    assert len(called) > 2  # hooks are still there


def test_the_model_is_left_as_it_was_when_a_run_fails():
    model = accelerate(tiny_vggt().train(), 0.3, weights=None)

    def fail(_):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fit_budget(model, 3, SMALL, seconds=1, run=fail)
    assert model.training and summary(model).config == PaceConfig(0.3, mode="global")
    assert not summary(model).stages


def test_memory_is_that_of_the_largest_stage():
    stages = {
        "DINO": lambda n, length: 3 + 0.010 * n,
        "alternating attention": lambda n, length: 2.5 + 0.006 * n + 3e-5 * n * length,
        "depth_head": lambda n, length: 4 + 0.004 * n + 1e-5 * n * length,
    }
    points = [
        Point(n, kept, 1.0, {name: room(n, SPECIAL + kept) for name, room in stages.items()})
        for n, kept in [(62, 932), (38, 932), (75, 311), (38, 311), (150, 104), (38, 104)]
    ]
    costs = CostModel.fit(points, SPECIAL)
    for n, kept in itertools.product((10, 300, 1000), (1, 155, 311, 1036)):
        expected = max(room(n, SPECIAL + kept) for room in stages.values())
        assert costs.memory_gib(n, kept) == pytest.approx(expected, rel=1e-6)


def test_a_memory_budget(monkeypatch):
    """On a machine without CUDA the solver is asked with measured costs put in its place."""
    model = tiny_vggt()
    points = [
        Point(n, kept, 0.1 * n, {"alternating attention": 2 + 1e-4 * n * (SPECIAL + kept), "DINO": 2.5})
        for n, kept in [(8, 900), (4, 300), (8, 300), (8, 100)]
    ]
    costs = CostModel.fit(points, SPECIAL)
    monkeypatch.setattr(budget, "measure_costs", lambda *args, **kwargs: costs)
    accelerate(model, weights=None)
    monkeypatch.setattr(budget, "find_host", on_cuda)
    monkeypatch.setattr(budget, "_as_it_was", lambda model: nullcontext())
    plan = fit_budget(model, 100, SIZE, memory_gib=8)
    assert plan.memory_gib == pytest.approx(8, rel=0.01) and plan.memory_gib <= 8
    assert plan.keep_ratio * PATCHES == pytest.approx(6 / 1e-4 / 100 - SPECIAL, abs=1)
    # The tighter of two budgets counts.
    assert fit_budget(model, 100, SIZE, memory_gib=8, seconds=100).keep_ratio == plan.keep_ratio
    with pytest.raises(
        PaceError, match=r"seconds=1 \(the .* 10\) and memory_gib=2 \(the smallest possible is about 2\.5\)"
    ):
        fit_budget(model, 100, SIZE, memory_gib=2, seconds=1)


def on_cuda(model):
    """A host that says that its model is on a GPU."""
    return SimpleNamespace(reference=SimpleNamespace(device=torch.device("cuda")), patch_size=14)


def test_non_negative_least_squares():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = torch.rand(6, 4, generator=generator, dtype=torch.float64)
        exact = torch.tensor([0.5, 0.0, 2.0, 0.0], dtype=torch.float64)
        found = non_negative_least_squares(rows.tolist(), (rows @ exact).tolist())
        assert found == pytest.approx(exact.tolist(), abs=1e-7)
        # Against all sets of entries that may be positive where the target has a part that no x >= 0 gives.
        target = torch.randn(6, generator=generator, dtype=torch.float64)
        best = torch.zeros(4, dtype=torch.float64)
        for free in itertools.product((False, True), repeat=4):
            x = torch.zeros(4, dtype=torch.float64)
            x[list(free)] = torch.linalg.lstsq(rows[:, list(free)], target[:, None]).solution[:, 0]
            if (x >= 0).all() and (rows @ x - target).norm() < (rows @ best - target).norm():
                best = x
        assert non_negative_least_squares(rows.tolist(), target.tolist()) == pytest.approx(
            best.tolist(), abs=1e-7
        )
    assert non_negative_least_squares([[1.0, 2.0], [1.0, 2.0]], [-1.0, -1.0]) == (0.0, 0.0)
