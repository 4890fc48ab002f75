"""What only a GPU can show: no host syncs, graphs, mixed devices. Skipped without CUDA."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hosts import random_images, tiny_vggt

from pacevggt_patch import PaceError, PaceWeights, accelerate, fit_budget, is_accelerated, remove, summary
from pacevggt_patch.hosts import vggt as backbone
from pacevggt_patch.planning.fit_budget import measure_costs
from pacevggt_patch.runtime.attention import faster_attention, library

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def model():
    return tiny_vggt().cuda()


@pytest.fixture
def images():
    return random_images(9).cuda()


def test_close_to_the_cpu(model, images):
    """Selection depends on comparisons, so everything is kept here: rounding must not flip a choice."""
    with torch.inference_mode():
        stock = model(images)
        exact = accelerate(model, 1, 0, weights=None)(images)
        assert torch.equal(exact["pose_enc"], stock["pose_enc"])
        assert torch.allclose(exact["depth"], stock["depth"], rtol=1e-3, atol=1e-4)
        cpu = accelerate(tiny_vggt(), 1, 0, weights=None)(images.cpu())
    assert torch.allclose(exact["depth"].cpu(), cpu["depth"], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("autocast", "compile"), [(False, False), (True, False), (True, True)])
def test_nothing_waits_for_the_device(model, images, learned, autocast, compile):
    weights = PaceWeights.new(model) if learned else None
    accelerate(model, 0.3, 0.4, weights=weights, min_frames=1, compile=compile)
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        tokens, _ = model.aggregator(images)  # fills the host's caches, and compiles
        model.camera_head(tokens)
        model.point_head(tokens, images, 5)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            tokens, _ = model.aggregator(images)
            model.camera_head(tokens)
            tokens.frames(0, 4, [3])
            model.point_head(tokens, images, 5)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compile", [False, True])
def test_aggregator_in_a_cuda_graph(model, images, compile):
    accelerate(model, 0.3, weights=None, min_frames=1, compile=compile)
    with torch.inference_mode():
        expected = model.aggregator(images)[0].compact[3].clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model.aggregator(images)
        torch.cuda.current_stream().wait_stream(stream)
        graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(images)
        static.copy_(images)
        with torch.cuda.graph(graph):
            tokens, _ = model.aggregator(static)
        static.zero_()
        graph.replay()
        assert not torch.allclose(tokens.compact[3], expected, atol=1e-3)
        static.copy_(images)
        graph.replay()
    assert torch.allclose(tokens.compact[3], expected, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_is_close(model, images, autocast):
    """Everything is kept where autocast rounds: rounding must not flip a choice."""
    keep = 1.0 if autocast else 0.4
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        expected = accelerate(model, keep, weights=None, min_frames=1)(images)
        found = accelerate(model, keep, weights=None, min_frames=1, compile=True)(images)
    for key in ("pose_enc", "depth", "world_points"):
        error = (found[key] - expected[key]).norm() / expected[key].norm()
        assert found[key].dtype == expected[key].dtype and error < (0.05 if autocast else 2e-3)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("matching", [(), ((1, 0), (2, 1))])
def test_dense_frames_never_wait_and_agree_with_the_cpu(
    model, images, autocast, compile, matching, monkeypatch
):
    monkeypatch.setitem(backbone.HIDDEN_BYTES, "gpu", 4 * 32 * 25 * 4)  # one frame at a time
    weights = replace(PaceWeights.new(model, dense_frames=True), matching=matching)
    settings = dict(weights=weights, min_frames=1, dense_frames=True, check_finite=False)
    with torch.inference_mode():
        expected = accelerate(model.cpu(), 0.4, **settings)(images.cpu())
        accelerate(model.cuda(), 0.4, compile=compile, **settings)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            model(images)
            torch.cuda.set_sync_debug_mode("error")
            try:
                tokens, _ = model.aggregator(images)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            found = model(images)
    assert tokens[3].dtype == torch.float32
    for key in ("pose_enc", "depth", "world_points"):
        assert found[key].isfinite().all()
        error = (found[key].cpu() - expected[key]).norm() / expected[key].norm()
        assert autocast or error < 2e-3, key  # rounding to bfloat16 may flip a choice


def test_errors_of_heads_are_those_of_the_cpu(model, images):
    from pacevggt_patch.calibration.full_heads import find_matching_heads

    heads, errors = find_matching_heads(model, [images])
    expected = find_matching_heads(model.cpu(), [images.cpu()])
    assert heads == expected[0]
    torch.testing.assert_close(errors.cpu(), expected[1], rtol=0.2, atol=1e-5)  # bfloat16 against float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_library_for_attention_is_close_to_torch(dtype):
    device = torch.device("cuda", torch.cuda.current_device())
    found = library(device)
    if found is None or dtype not in found.dtypes:
        pytest.skip("needs FlashAttention-3 and a Hopper GPU")
    joint = torch.randn(2, 77, 3, 4, 64, device=device, dtype=dtype)
    query, key, value = (part.transpose(1, 2) for part in joint.unbind(2))
    expected = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    with faster_attention(device):
        out = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)


def test_model_moved_after_accelerate():
    model = tiny_vggt()
    accelerate(model, 0.3, weights=PaceWeights.new(model), min_frames=1)
    model.cuda()
    with torch.inference_mode():
        assert model(random_images(2).cuda())["depth"].is_cuda
    remove(model.cpu())


@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_on_the_cpu_are_the_same(model, images, autocast, monkeypatch):
    monkeypatch.setattr(
        "pacevggt_patch.patching.heads.GPU_BYTES", 2 * 8 * 56 * 70 * 4
    )  # chunks of two frames
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        expected = accelerate(model, 0.3, weights=None, min_frames=1)(images)
        found = accelerate(model, 0.3, weights=None, min_frames=1, output_device="cpu")(images)
    for key in ("depth", "depth_conf", "world_points", "world_points_conf"):
        assert found[key].device.type == "cpu" and found[key].is_pinned()
        assert torch.equal(found[key], expected[key].cpu())
    assert found["pose_enc"].is_cuda


def test_finite_check_only_when_asked(model):
    images = torch.full((1, 2, 3, 28, 28), float("nan"), device="cuda")
    with torch.inference_mode():
        assert accelerate(model, weights=None)(images)["depth"].isnan().any()
        with pytest.raises(PaceError, match="NaN or infinity"):
            accelerate(model, weights=None, check_finite=True)(images)


def test_summary_times_the_device(model, images):
    accelerate(model, 0.3, weights=None, min_frames=1)
    stages = summary(model, images).stages
    assert stages and all(stage.seconds is not None and stage.seconds > 0 for stage in stages)


def test_a_memory_budget_is_measured_and_kept(model):
    plan = fit_budget(model, 40, (112, 112), memory_gib=1)
    assert plan.keep_ratio == 1 and 0 < plan.memory_gib < 1
    assert not is_accelerated(model)
    with pytest.raises(PaceError, match=r"memory_gib=0\.001 \(the smallest possible is about"):
        fit_budget(model, 40, (112, 112), memory_gib=0.001)
    accelerate(model, 0.3, weights=None, min_frames=1)
    costs = measure_costs(model, 40, (112, 112), memory=True)
    with torch.inference_mode():
        images = torch.rand(1, 40, 3, 112, 112, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        model(images)
    assert costs.memory_gib(40, 19) == pytest.approx(torch.cuda.max_memory_allocated() / 2**30, rel=0.15)


def test_benchmark_watches_the_device(model, images, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
    from stages import host_syncs, kernels, stages_and_syncs

    accelerate(model, 0.3, weights=None, min_frames=1)
    device, mode = torch.device("cuda"), torch.cuda.get_sync_debug_mode()
    with torch.inference_mode():
        seconds, _ = stages_and_syncs(model, lambda: model(images), device)
        assert {
            "DINO",
            "scores",
            "frame blocks",
            "global blocks",
            "restoration",
            "depth_head",
        } <= seconds.keys()
        assert min(seconds.values()) >= 0
        assert host_syncs(lambda: model.aggregator(images), device) == 0
        assert host_syncs(lambda: images.sum().item(), device) == 1
        assert torch.cuda.get_sync_debug_mode() == mode
        rows = kernels(lambda: model(images), device)
    assert 0 < sum(row["share"] for row in rows) <= 1 + 1e-6 and all(row["calls"] > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_another_than_the_current_device_is_measured_there():
    model = tiny_vggt().to("cuda:1")
    accelerate(model, 0.3, weights=None, min_frames=1)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    with torch.cuda.device(0):
        costs = measure_costs(model, 40, (112, 112), memory=True)
        assert torch.cuda.current_device() == 0
    assert all(gib >= weights for point in costs.points for gib in point.memory_gib.values())


def test_training_runs_on_the_device(tmp_path):
    """Rendered on the device, bfloat16 autocast, both stages, with and without computing blocks twice."""
    from pacevggt_patch import PaceWeights
    from pacevggt_patch.mini.scenes.textures import texture_atlas
    from pacevggt_patch.mini.sources import RenderedScenes
    from pacevggt_patch.training.fit import Fit, Settings
    from pacevggt_patch.training.guest import guest

    model = tiny_vggt().cuda()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = PaceWeights.new(model)
    source = RenderedScenes(56, texture_atlas(None, 3, device="cuda"))
    settings = Settings(steps=6, distil=0.34, clips=2, views=(3,), dense=2, calibration=2, checks=1)
    with guest(model, weights):
        for checkpointing in (False, True):
            fit = Fit(model, weights, source, settings, checkpointing=checkpointing)
            for step in range(6):
                if step == settings.distil_steps:
                    fit.begin_refinement()
                fit.step(fit.draw(step))
            assert all(torch.isfinite(torch.tensor(value)) for value in fit.latest_losses().values())
    assert weights.merge.out.weight.is_cuda and weights.merge.out.weight.any()
    weights.save(tmp_path / "pace.safetensors")
    assert PaceWeights.load(tmp_path / "pace.safetensors").scorer.out.weight.any()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_recorded_calls_are_replayed_with_new_inputs():
    from pacevggt_patch.runtime.cuda_graphs import Recorder

    recorder, runs = Recorder(True), []

    def function(factor, x):
        runs.append(factor)
        return [factor * x + 1, x.sum()]

    found = []
    for step in range(4):
        for factor in (2, 3):
            x = torch.full((5,), float(step), device="cuda")
            found.append((factor, step, recorder(factor, lambda x, f=factor: function(f, x), [x])))
    assert runs == [2, 3, 2, 3]  # as it is, then recorded, then replayed
    for factor, step, (scaled, total) in found:  # looked at afterwards: no replay wrote on what another gave
        assert torch.equal(scaled.cpu(), torch.full((5,), factor * step + 1.0)) and total.item() == 5 * step


@pytest.mark.parametrize(("dense_frames", "compile"), [(False, False), (False, True), (True, True)])
def test_recorded_and_compiled_steps_train_as_others_do(dense_frames, compile, monkeypatch):
    from pacevggt_patch.hosts import vggt as backbone
    from pacevggt_patch.mini.scenes.textures import texture_atlas
    from pacevggt_patch.mini.sources import RenderedScenes
    from pacevggt_patch.training.fit import Fit, Settings
    from pacevggt_patch.training.guest import guest

    ran, real = [], backbone.run_fast_block
    monkeypatch.setattr(backbone, "run_fast_block", lambda *args: ran.append(True) or real(*args))
    model = tiny_vggt().cuda()
    source = RenderedScenes(56, texture_atlas(None, 3, device="cuda"))
    settings = Settings(
        steps=12,
        distil=0,
        keep_ratios=(0.3, 0.3),
        views=(3,),
        dense=2,
        calibration=1,
        checks=1,
        dense_frames=dense_frames,
    )
    losses = []
    for recorded in (False, True):
        weights = PaceWeights.new(model, dense_frames=dense_frames)
        weights.matching = ((1, 0),) if dense_frames else ()
        with guest(model, weights, recorded and compile):
            fit = Fit(model, weights, source, settings)
            fit.recorder.on = source.recorder.on = recorded
            rows = []
            for step in range(12):
                fit.step(fit.draw(step))
                rows.append(list(fit.latest_losses().values()))
            assert bool(fit.recorder.recordings) is recorded
            assert bool(ran) is (recorded and compile)
        losses.append(torch.tensor(rows))
    torch.testing.assert_close(losses[0][:, 0], losses[1][:, 0], rtol=0.02, atol=0)
