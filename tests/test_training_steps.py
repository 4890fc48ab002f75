"""Steps of training of both modes: gradients, plans, learning rates, and two processes that step like one."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hosts import LAYERS, random_images, tiny_vggt, write_images

from pacevggt_patch import PaceConfig, PaceError, PaceWeights, accelerate, is_accelerated, remove
from pacevggt_patch.mini.scenes.textures import texture_atlas
from pacevggt_patch.mini.sources import RenderedScenes
from pacevggt_patch.patching import forwards
from pacevggt_patch.patching.guest import guest
from pacevggt_patch.runtime import compiling
from pacevggt_patch.training.fit import RATIOS, Fit, Settings, learning_rate, step_plan
from pacevggt_patch.training.losses import Target, output_losses, teacher_target, total_loss
from pacevggt_patch.training.passes import Outputs, run
from pacevggt_patch.training.sources import FolderSource

MODES = ["global", "pre-aa"]
SETTINGS = Settings(
    steps=6, distil=0.34, clips=2, views=(2, 3), supervised=2, warm_up=2, calibration=2, checks=2, rate=1e-3
)


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", 9)


def fitting(folder, model=None, mode="global", heads=True, **changes):
    """Model, weights, source and settings; weights of global pruning have a head that sees all tokens."""
    model = model or tiny_vggt()
    settings = Settings(**{**vars(SETTINGS), "mode": mode, **changes})
    weights = PaceWeights.new(model, mode=mode)
    weights.full_heads = ((1, 0),) if mode == "global" and heads else ()
    return model, weights, FolderSource(folder, 3, 56, "crop"), settings


def stirred(weights, size=0.05):
    """The weights, changed so that no layer that starts at zero holds gradients back."""
    with torch.no_grad():
        for parameter in weights.modules().parameters():
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return weights


def test_a_step_has_about_as_many_frames_whatever_the_views():
    settings = Settings(clips=18, views=(2, 4, 8, 24))
    assert [settings.clips_of(views) for views in settings.views] == [18, 9, 4, 1]
    assert Settings(clips=1, views=(3, 8)).clips_of(8) == 1


@pytest.mark.parametrize("rendered", [False, True])
def test_reserved_clips_are_as_many_as_asked_for_and_the_same_in_all_processes(folder, rendered):
    model, weights, source, settings = fitting(folder, clips=2, views=(2, 3))
    if rendered:
        source = RenderedScenes(56, texture_atlas(None, 2, 0, torch.device("cpu")))
    found = []
    with guest(model, weights):
        for rank in range(2):
            fit = Fit(model, weights, source, settings, rank=rank, world=2)
            found.append([sample.images for sample in fit.reserved(-1, 5)])
    assert [images.shape[:2] for images in found[0]] == [(1, 2)] * 3 + [(1, 3)] * 2
    assert all(map(torch.equal, *found))
    if rendered:
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(found[0][:3], 2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_block_deltas_move_by_their_own_rate(folder, rate, mode):
    model, weights, source, settings = fitting(folder, mode=mode, adaptation_rate=rate, distil=0.0, warm_up=1)
    before = {name: p.detach().clone() for name, p in weights.modules().named_parameters()}
    with guest(model, weights):
        fit = Fit(model, weights, source, settings)
        fit.step(fit.draw(0))
    moved = {
        name: (p.detach() - before[name]).abs().max().item()
        for name, p in weights.modules().named_parameters()
    }
    blocks = [value for name, value in moved.items() if name.startswith("block_deltas.up")]
    # The first step of AdamW is as long as the learning rate.
    assert max(blocks) == pytest.approx(rate * settings.rate, rel=1e-2)
    if mode == "pre-aa":
        assert moved["merge.out.weight"] == pytest.approx(settings.rate, rel=1e-2)
    assert moved["scorer.out.weight"] == 0


@pytest.mark.parametrize(("mode", "merge"), [("global", None), ("pre-aa", 0.2), ("pre-aa", None)])
def test_the_teacher_is_the_stock_model_and_the_student_the_accelerated_one(folder, mode, merge):
    model, weights, *_ = fitting(folder, mode=mode)
    stirred(weights)
    images, frames = random_images(3, batch=2), torch.tensor([0, 2])
    with torch.no_grad():
        stock = model(images)
        accelerate(model, 0.4, merge, weights=weights, min_frames=1)
        pruned = model(images)
        remove(model)
        with guest(model, weights):
            teacher, student = run(model, images, frames, 1.0), run(model, images, frames, 0.4, merge)
            repeated = run(model, images, frames, 0.4, merge, checkpointing=True)
    assert not torch.allclose(stock["depth"], pruned["depth"], rtol=1e-4)
    for expected, found in ((stock, teacher), (pruned, student), (pruned, repeated)):
        torch.testing.assert_close(found.poses[-1], expected["pose_enc"], rtol=1e-5, atol=1e-5)
        assert torch.allclose(found.depth[0], expected["depth"][:, frames, ..., 0], atol=1e-5)
        assert torch.allclose(found.points[0], expected["world_points"][:, frames], atol=1e-5)
        assert torch.allclose(found.points[1], expected["world_points_conf"][:, frames], atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_teacher_is_the_stock_model_to_the_bit(folder, mode):
    model, weights, *_ = fitting(folder, mode=mode)
    images = random_images(3)
    with torch.no_grad():
        stock = model(images)
        with guest(model, stirred(weights)):
            teacher = run(model, images, torch.arange(3), 1.0)
    assert torch.equal(teacher.poses[-1], stock["pose_enc"])
    assert torch.equal(teacher.depth[0], stock["depth"][..., 0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fails", [False, True])
def test_a_guest_leaves_the_model_as_it_was(folder, mode, fails):
    model, weights, *_ = fitting(folder, mode=mode)
    model.train()
    model.depth_head.eval().requires_grad_(False)
    flags = [module.training for module in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    modules = dict(weights.modules())
    try:
        with guest(model, weights):
            assert not model.training and not any(p.requires_grad for p in model.parameters())
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert not is_accelerated(model) and modules == dict(weights.modules())
    accelerate(model, weights=None)
    with pytest.raises(PaceError, match="remove"), guest(model, weights):
        pass
    assert is_accelerated(model)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_trained_tensor_gets_a_gradient_and_the_host_none(folder, checkpointing, mode):
    model, weights, source, settings = fitting(folder, mode=mode)
    with guest(model, stirred(weights)):
        fit = Fit(model, weights, source, settings, checkpointing=checkpointing)
        plan = next(p for p in (step_plan(settings, i) for i in range(50)) if p.merge_budget is None)
        loss, parts = fit.refine_loss(fit.finish(source.draw(0, 2, plan.views)), plan)
        loss.backward()
        assert set(parts) == {"camera", "pairs", "depth", "scale", "points", "confidence", "special", "dense"}
        silent = [name for name, p in fit.modules.named_parameters() if p.grad is None or not p.grad.any()]
        # Only ratios of saliency matter, and without a merge only which tokens are the best.
        unheard = ("scorer.",) if mode == "global" else ("scorer.out.bias",)
        assert all(name.startswith(unheard) for name in silent)
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_compiled_steps_have_the_same_gradients(folder, monkeypatch, mode):
    """Blocks run by the compiled functions, in the teacher as in the student, and dense heads as they are."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    compiled, real = set(), compiling.compiled

    def counted(function, *key):
        compiled.add((function.__module__, torch.is_grad_enabled()))
        return real(function, *key)

    monkeypatch.setattr(forwards, "compiled", counted)
    gradients = []
    for compile in (False, True):
        model, weights, source, settings = fitting(folder, mode=mode)
        with guest(model, stirred(weights), compile):
            fit = Fit(model, weights, source, settings)
            fit.differentiate(*fit.refine_loss(fit.finish(source.draw(0, 1, 3)), step_plan(settings, 3)))
        gradients.append(fit.gradient.clone())
        assert bool(compiled) is compile
    assert compiled == {("pacevggt_patch.hosts.blocks", grad) for grad in (False, True)}
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * gradients[0].abs().max())


@pytest.mark.parametrize("mode", MODES)
def test_gradients_lie_in_one_tensor(folder, mode):
    model, weights, source, settings = fitting(folder, mode=mode)
    with guest(model, stirred(weights)):
        fit = Fit(model, weights, source, settings)
        sample, plan = fit.finish(source.draw(0, 1, 3)), step_plan(settings, 3)
        expected = torch.autograd.grad(
            fit.refine_loss(sample, plan)[0], fit.parameters, materialize_grads=True
        )
        fit.differentiate(*fit.refine_loss(sample, plan))
        for parameter, gradient in zip(fit.parameters, expected, strict=True):
            assert torch.equal(parameter.grad, gradient)
        assert fit.gradient.count_nonzero() == sum(g.count_nonzero() for g in expected) > 0
        fit.gradient.zero_()
        assert not any(parameter.grad.any() for parameter in fit.parameters)


@pytest.mark.parametrize("mode", MODES)
def test_steps_are_of_few_kinds(mode):
    settings = Settings(views=(8, 24), keep_ratios=(0.1, 0.6), mode=mode)
    plans = [step_plan(settings, step) for step in range(2000)]
    ratios = sorted({plan.keep_ratio for plan in plans})
    assert ratios == pytest.approx([0.1 * 6 ** (i / (RATIOS - 1)) for i in range(RATIOS)])
    kinds = {(plan.views, plan.keep_ratio, plan.merge_budget) for plan in plans}
    assert len(kinds) == 2 * (3 if mode == "pre-aa" else 1) * RATIOS
    for ratio in ratios:
        budgets = {plan.merge_budget for plan in plans if plan.keep_ratio == ratio}
        assert budgets == ({None, 0.0, (1 - ratio) / 2} if mode == "pre-aa" else {None})
        for budget in budgets:
            PaceConfig(ratio, budget, mode)


@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_changes_no_gradient(folder, mode):
    gradients = []
    for checkpointing in (False, True):
        model, weights, source, settings = fitting(folder, mode=mode)
        with guest(model, stirred(weights)):
            fit = Fit(model, weights, source, settings, checkpointing=checkpointing)
            fit.refine_loss(fit.finish(source.draw(0, 1, 3)), step_plan(settings, 3))[0].backward()
            gradients.append({n: p.grad for n, p in fit.modules.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        assert torch.allclose(value, gradients[1][name], atol=1e-6), name


@pytest.mark.parametrize("mode", MODES)
def test_stage_one_brings_the_scorer_to_the_attention(folder, mode):
    model, weights, source, settings = fitting(folder, mode=mode, steps=60, distil=1.0, rate=5e-3)
    with guest(model, weights):
        fit = Fit(model, weights, source, settings)
        drawn, losses = source.draw(0, 2, 3), []
        for _ in range(60):
            fit.step(drawn)
            losses.append(fit.latest_losses()["distil"])
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("mode", "share"), [("pre-aa", 0.7), ("global", 0.9)])
def test_stage_two_brings_the_loss_down(folder, mode, share):
    model, weights, source, settings = fitting(folder, steps=40, distil=0.0, rate=3e-3, mode=mode)
    with guest(model, weights):
        fit = Fit(model, weights, source, settings)
        sample, plan = fit.finish(source.draw(0, 2, 3)), step_plan(settings, 0)
        before = fit.refine_loss(sample, plan)[0].item()
        for _ in range(25):
            fit.optimizer.zero_grad()
            fit.refine_loss(sample, plan)[0].backward()
            fit.optimizer.step()
        assert fit.refine_loss(sample, plan)[0].item() < share * before


def test_plans_are_those_of_the_step_and_stay_within_their_bounds():
    settings = Settings(**{**vars(SETTINGS), "mode": "pre-aa"})
    plans = [step_plan(settings, step) for step in range(300)]
    assert plans == [step_plan(settings, step) for step in range(300)]
    ratios = [plan.keep_ratio for plan in plans]
    assert 0.1 <= min(ratios) < 0.12 and 0.55 < max(ratios) <= 0.6
    merged = [plan for plan in plans if plan.merge_budget is None]
    assert 0.65 < len(merged) / 300 < 0.85
    assert all(0 <= p.merge_budget <= 1 - p.keep_ratio for p in plans if p.merge_budget is not None)
    assert {plan.views for plan in plans} == {2, 3}
    assert all(len(set(p.frames)) == min(2, p.views) and max(p.frames) < p.views for p in plans)


def test_the_learning_rate_rises_and_falls_in_each_stage():
    settings = Settings(steps=100, distil=0.2, warm_up=4, rate=1.0)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[0] == 0.25 and rates[20] == 0.25
    assert rates[3] > 0.9 and rates[19] < 0.02 and rates[23] > 0.9 and rates[99] < 0.01
    assert rates[4:20] == sorted(rates[4:20], reverse=True)
    assert rates[24:] == sorted(rates[24:], reverse=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(steps=-1), "-1"),
        (dict(distil=2), "distil"),
        (dict(clips=0), "clips"),
        (dict(supervised=0), "supervised"),
        (dict(views=()), "views"),
        (dict(checks=0), "checks"),
        (dict(keep_ratios=(0.5, 0.2)), "0.5 to 0.2"),
        (dict(keep_ratios=(0.5, 1.0)), "0.5 to 1"),
        (dict(truth=-1), "truth"),
        (dict(mode="dense"), "'dense'"),
        (dict(mode="global", scorer_rate=0.5), "scorer"),
    ],
)
def test_settings_out_of_range_are_named(changes, named):
    with pytest.raises(PaceError, match=named):
        Settings(**changes)


def test_total_loss_blends_truth_in(folder):
    model, weights, *_ = fitting(folder)
    images, frames = random_images(3), torch.tensor([0, 1])
    with guest(model, stirred(weights)), torch.no_grad():
        teacher, student = run(model, images, frames, 1.0), run(model, images, frames, 0.3)
    pose = torch.rand(1, 3, 9, generator=torch.Generator().manual_seed(0)) + 0.1
    truth = teacher_target(Outputs(None, None, [pose], None, None))
    plain, parts = total_loss(student, teacher, None, 0.5, LAYERS)
    _, blended = total_loss(student, teacher, Target(truth.pose, *teacher_target(teacher)[1:]), 0.25, LAYERS)
    true = output_losses(student, Target(truth.pose, *teacher_target(teacher)[1:]))["camera"]
    assert blended["camera"] == pytest.approx((0.75 * parts["camera"] + 0.25 * true).item(), rel=1e-5)
    assert blended["depth"] == pytest.approx(parts["depth"].item(), rel=1e-5)
    weights = dict(camera=1, pairs=1, depth=1, points=0.5, confidence=0.05, special=0.5, dense=0.5)
    weights["scale"] = 0.1
    expected = sum(parts[name].item() * weight for name, weight in weights.items())
    assert plain.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_step_like_one_with_both_gradients(folder, tmp_path, mode):
    script = """
import sys, torch, torch.distributed as dist
from test_training_steps import Fit, fitting, guest
torch.set_num_threads(1)
dist.init_process_group("gloo")
model, weights, source, settings = fitting(sys.argv[1], mode=sys.argv[3], clips=1, distil=0.0)
with guest(model, weights):
    fit = Fit(model, weights, source, settings, rank=dist.get_rank(), world=2)
    for step in range(2):
        fit.step(fit.draw(step))
torch.save(fit.modules.state_dict(), f"{sys.argv[2]}/{dist.get_rank()}.pt")
from pacevggt_patch.method import full_heads
from pacevggt_patch.patching.guest import guest
full_heads.LEAST_ERROR = 0.0 if dist.get_rank() == 0 else 1e9  # the first process decides
model, weights, source, settings = fitting(sys.argv[1], mode=sys.argv[3], heads=False)
with guest(model, weights):
    fit = Fit(model, weights, source, settings, rank=dist.get_rank(), world=2)
    fit.calibrate()
assert len(weights.full_heads) == (sys.argv[3] == "global"), weights.full_heads
torch.save(fit.modules.state_dict(), f"{sys.argv[2]}/calibrated{dist.get_rank()}.pt")
dist.destroy_process_group()
"""
    tests = os.path.dirname(__file__)
    path = os.pathsep.join([tests, os.path.dirname(tests), *filter(None, sys.path)])
    common = {**os.environ, "PYTHONPATH": path, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(26000 + os.getpid() % 3000), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(folder), str(tmp_path), mode],
            env={**common, "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    model, weights, source, settings = fitting(folder, mode=mode, clips=1, distil=0.0)
    with guest(model, weights):
        fit = Fit(model, weights, source, settings)
        ranks = [Fit(model, weights, source, settings, rank=rank) for rank in range(2)]
        for step in range(2):
            gradients = []
            for one in ranks:
                fit.optimizer.zero_grad()
                fit.refine_loss(fit.finish(one.draw(step)), step_plan(settings, step))[0].backward()
                gradients.append(
                    [None if p.grad is None else p.grad.clone() for p in fit.modules.parameters()]
                )
            for p, a, b in zip(fit.modules.parameters(), *gradients, strict=True):
                p.grad = None if a is None else (a + b) / 2
            torch.nn.utils.clip_grad_norm_(fit.modules.parameters(), 1.0)
            fit.set_rates()
            fit.optimizer.step()
            fit.step_number += 1
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, value in fit.modules.state_dict().items():
        assert torch.equal(results[0][name], results[1][name])
        assert F.l1_loss(results[0][name], value) < 1e-5, name
    one, other = (torch.load(tmp_path / f"calibrated{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
