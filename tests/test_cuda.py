"""What only a GPU can show: no host syncs, graphs, mixed devices. Skipped without CUDA."""

import copy
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conformance import assert_close, assert_equal, assert_pruned, prune
from depth_anything_double import DOUBLES as VIEWS
from hosts import random_deltas, random_images, tiny_vggt, with_heads
from hosts_doubles import DOUBLES

from pacevggt_patch import (
    PaceError,
    PaceWeights,
    accelerate,
    calibrate,
    fit_budget,
    is_accelerated,
    remove,
    summary,
)
from pacevggt_patch.hosts import blocks
from pacevggt_patch.method import full_heads
from pacevggt_patch.planning.fit_budget import measure_costs
from pacevggt_patch.runtime import chunks
from pacevggt_patch.runtime.attention import faster_attention, library

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


MODES = ["global", "pre-aa"]
HEADS = ((1, 0), (2, 1))
# Training-free, with deltas, with full-attention heads, with both.
KINDS = ["none", "deltas", "heads", "both"]


@pytest.fixture
def model():
    return tiny_vggt().cuda()


def make(model, kind: str, mode: str = "global"):
    """Weights of a kind of KINDS."""
    if kind == "none":
        return None
    weights = random_deltas(model.cpu(), mode=mode) if kind in ("deltas", "both") else with_heads(model)
    model.cuda()
    return replace(weights, full_heads=HEADS if kind in ("heads", "both") else ())


@contextmanager
def no_waiting():
    """Whatever makes the host wait for the device inside is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def images():
    return random_images(9).cuda()


@pytest.mark.parametrize("mode", MODES)
def test_close_to_the_cpu(model, images, mode):
    """Selection depends on comparisons, so everything is kept here: rounding must not flip a choice."""
    with torch.inference_mode():
        stock = model(images)
        exact = accelerate(model, 1, weights=None, mode=mode)(images)
        assert torch.equal(exact["pose_enc"], stock["pose_enc"])
        assert torch.allclose(exact["depth"], stock["depth"], rtol=1e-3, atol=1e-4)
        cpu = accelerate(tiny_vggt(), 1, weights=None, mode=mode)(images.cpu())
    assert torch.allclose(exact["depth"].cpu(), cpu["depth"], rtol=0.02, atol=0.02)


def run_all(model, images):
    """Aggregator, camera head and a dense head, called one by one: the tokens, too."""
    tokens, start = model.aggregator(images)
    return tokens, model.camera_head(tokens), model.point_head(tokens, images, start)


@pytest.mark.parametrize(
    ("mode", "kind"), [("global", kind) for kind in KINDS] + [("pre-aa", "none"), ("pre-aa", "deltas")]
)
@pytest.mark.parametrize(("autocast", "compile"), [(False, False), (True, False), (True, True)])
def test_nothing_waits_for_the_device(model, images, mode, kind, autocast, compile):
    accelerate(model, 0.3, weights=make(model, kind, mode), mode=mode, min_frames=1, compile=compile)
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        run_all(model, images)  # fills the host's caches, and compiles
        with no_waiting():
            tokens, *_ = run_all(model, images)
            if mode == "pre-aa":
                tokens.frames(0, 4, [3])


def test_merging_some_tokens_waits_for_nothing(model, images):
    accelerate(model, 0.3, 0.4, weights=PaceWeights.new(model, mode="pre-aa"), min_frames=1)
    with torch.inference_mode():
        run_all(model, images)
        with no_waiting():
            run_all(model, images)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    ("mode", "kind"), [("global", "none"), ("global", "both"), ("pre-aa", "none"), ("pre-aa", "deltas")]
)
def test_aggregator_in_a_cuda_graph(model, images, mode, kind, compile):
    accelerate(model, 0.3, weights=make(model, kind, mode), mode=mode, min_frames=1, compile=compile)
    with torch.inference_mode():
        expected = model.aggregator(images)[0][3].clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model.aggregator(images)
        torch.cuda.current_stream().wait_stream(stream)
        graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(images)
        static.copy_(images)
        with torch.cuda.graph(graph):
            found = model.aggregator(static)[0][3]
        static.zero_()
        graph.replay()
        assert not torch.allclose(found, expected, atol=1e-3)
        static.copy_(images)
        graph.replay()
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_clip_under_recording_does_not_calibrate(model, images):
    """The heads are found in a pass that waits for the device, so not while a graph is being recorded."""
    static, graph = images.clone(), torch.cuda.CUDAGraph()
    with torch.inference_mode():
        # Caches are filled on another stream, before anything is recorded.
        accelerate(model, 0.3, weights=None, min_frames=1)
        with torch.cuda.stream(torch.cuda.Stream()):
            model.aggregator(images)
        torch.cuda.synchronize()
        accelerate(model, 0.3, min_frames=1)
        with pytest.warns(UserWarning, match="CUDA graph"), torch.cuda.graph(graph):
            model.aggregator(static)
    assert "none yet" in summary(model).weights
    with torch.inference_mode():
        model(images)
    assert "calibrated on the first clip" in summary(model).weights


def test_the_first_clip_calibrates_and_then_nothing_waits(model, images, monkeypatch):
    monkeypatch.setattr(full_heads, "LEAST_ERROR", 0.0)
    accelerate(model, 0.3, min_frames=1)
    with torch.inference_mode():
        run_all(model, images)
        assert "calibrated on the first clip" in summary(model).weights
        run_all(model, images)
        with no_waiting():
            run_all(model, images)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_is_close(model, images, autocast, mode):
    """Everything is kept where autocast rounds: rounding must not flip a choice."""
    keep = 1.0 if autocast else 0.4
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        expected = accelerate(model, keep, weights=None, mode=mode, min_frames=1)(images)
        found = accelerate(model, keep, weights=None, mode=mode, min_frames=1, compile=True)(images)
    for key in ("pose_enc", "depth", "world_points"):
        error = (found[key] - expected[key]).norm() / expected[key].norm()
        assert found[key].dtype == expected[key].dtype and error < (0.05 if autocast else 2e-3)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_global_pruning_agrees_with_the_cpu(model, images, autocast, compile, kind, monkeypatch):
    monkeypatch.setitem(chunks.HIDDEN_BYTES, "gpu", 16 * 32 * 25)  # one frame at a time
    weights = make(model, kind)
    with torch.inference_mode():
        # Another instance: a stock VGGT keeps positions on the device that it ran on first.
        other = accelerate(copy.deepcopy(model).cpu(), 0.4, weights=weights, min_frames=1)
        expected, kept = other(images.cpu()), summary(other).kept
        accelerate(model, 0.4, weights=weights, min_frames=1, compile=compile)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            tokens, _ = model.aggregator(images)
            found = model(images)
    assert all(layer.dtype == torch.float32 for layer in tokens)
    assert autocast or torch.equal(summary(model).kept.cpu(), kept)
    for key in ("pose_enc", "depth", "world_points"):
        assert found[key].isfinite().all()
        error = (found[key].cpu() - expected[key]).norm() / expected[key].norm()
        assert autocast or error < 2e-3, key  # rounding to bfloat16 may flip a choice


@pytest.mark.parametrize("mode", MODES)
def test_a_calibration_is_that_of_the_cpu(model, images, mode, monkeypatch):
    monkeypatch.setattr(full_heads, "LEAST_ERROR", 0.0)
    other = copy.deepcopy(model).cpu()
    found, expected = calibrate(model, images, mode=mode), calibrate(other, images.cpu(), mode=mode)
    assert found.full_heads == expected.full_heads
    for name, value in expected.modules().state_dict().items():
        other = found.modules().state_dict()[name]
        assert other.is_cuda
        assert (other.cpu() - value).norm() <= 0.2 * value.norm() + 1e-5, name  # bfloat16 against float32


def test_errors_of_heads_are_those_of_the_cpu(model, images):
    from pacevggt_patch.calibration.full_heads import find_full_heads

    accelerate(model, weights=None, min_frames=1)
    other = copy.deepcopy(model).cpu()  # before it runs: a stock VGGT keeps positions on its first device
    heads, errors = find_full_heads(model, [images])
    expected = find_full_heads(other, [images.cpu()])
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["none", "both"])
def test_the_library_serves_our_blocks(model, images, mode, kind, monkeypatch):
    """In DINO, in frame and global blocks, and in heads that see all tokens, under autocast to bfloat16."""
    from pacevggt_patch.runtime import attention

    device = torch.device("cuda", torch.cuda.current_device())
    found = library(device)
    if found is None:
        pytest.skip("needs FlashAttention-3 and a Hopper GPU")
    seen = []

    def run(query, key, value, scale):
        seen.append(tuple(query.shape))
        return found.run(query, key, value, scale)

    weights = None if kind == "none" else make(model, "both" if mode == "global" else "deltas", mode)
    accelerate(model, 0.4, weights=weights, mode=mode, min_frames=1)
    monkeypatch.setattr(attention, "_loaded", lambda: found._replace(run=run))
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        tokens = list(model.aggregator(images)[0])
        monkeypatch.setattr(attention, "is_hopper", lambda device: False)
        other = list(model.aggregator(images)[0])
    # Heads that see all tokens are two calls of one head each.
    assert len(seen) == 2 + 4 + 4 + (len(HEADS) if kind == "both" and mode == "global" else 0)
    torch.testing.assert_close(tokens[3].float(), other[3].float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("mode", MODES)
def test_model_moved_after_accelerate(mode):
    model = tiny_vggt()
    accelerate(model, 0.3, weights=random_deltas(model, mode=mode), min_frames=1)
    model.cuda()
    with torch.inference_mode():
        assert model(random_images(2).cuda())["depth"].is_cuda
    remove(model.cpu())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_on_the_cpu_are_the_same(model, images, autocast, mode, monkeypatch):
    monkeypatch.setattr(
        "pacevggt_patch.patching.heads.GPU_BYTES", 2 * 8 * 56 * 70 * 4
    )  # chunks of two frames
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        expected = accelerate(model, 0.3, weights=None, mode=mode, min_frames=1)(images)
        found = accelerate(model, 0.3, weights=None, mode=mode, min_frames=1, output_device="cpu")(images)
    for key in ("depth", "depth_conf", "world_points", "world_points_conf"):
        assert found[key].device.type == "cpu" and found[key].is_pinned()
        assert torch.equal(found[key], expected[key].cpu())
    assert found["pose_enc"].is_cuda


def test_values_of_images_are_not_looked_at_on_the_device(model):
    """That would make the host wait; on the CPU they are."""
    images = torch.full((1, 2, 3, 28, 28), float("nan"), device="cuda")
    with torch.inference_mode():
        assert accelerate(model, weights=None)(images)["depth"].isnan().any()
        with pytest.raises(PaceError, match="NaN or infinity"):
            accelerate(tiny_vggt(), weights=None)(images.cpu())


def test_images_on_another_device_are_named(model):
    accelerate(model, weights=None)
    with torch.inference_mode(), pytest.raises(PaceError, match="images are on cpu but the model is on cuda"):
        model(random_images(2))


def test_summary_times_the_device(model, images):
    accelerate(model, 0.3, weights=with_heads(model, *HEADS), mode="global", min_frames=1)
    stages = summary(model, images).stages
    assert stages and all(stage.seconds is not None and stage.seconds > 0 for stage in stages)


def test_a_memory_budget_is_measured_and_kept(model):
    plan = fit_budget(model, 40, (112, 112), memory_gib=1, weights=None)
    assert plan.keep_ratio == 1 and 0 < plan.memory_gib < 1
    accelerate(model, plan, weights=None)
    remove(model)
    assert not is_accelerated(model)
    with pytest.raises(PaceError, match=r"memory_gib=0\.001 \(the smallest possible is about"):
        fit_budget(model, 40, (112, 112), memory_gib=0.001, weights=None)
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
            "frame blocks",
            "global blocks",
            "depth_head",
        } <= seconds.keys()
        assert min(seconds.values()) >= 0
        assert host_syncs(lambda: model.aggregator(images), device) == 0
        assert host_syncs(lambda: images.sum().item(), device) == 1
        assert torch.cuda.get_sync_debug_mode() == mode
        rows = kernels(lambda: model(images), device)
    assert 0 < sum(row["share"] for row in rows) <= 1 + 1e-6 and all(row["calls"] > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kind", ["none", "both"])
def test_a_model_on_another_than_the_current_device_is_measured_there(kind):
    model = tiny_vggt().to("cuda:1")
    pace = None if kind == "none" else replace(random_deltas(tiny_vggt()), full_heads=HEADS)
    accelerate(model, 0.3, weights=pace, min_frames=1)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    with torch.cuda.device(0):
        costs = measure_costs(model, 40, (112, 112), memory=True)
        assert torch.cuda.current_device() == 0
    assert all(gib >= weights for point in costs.points for gib in point.memory_gib.values())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compile", [False, True])
def test_two_models_on_two_devices_give_the_same(images, mode, compile):
    """Each with its own weights, whichever device is the current one."""
    found = []
    for device in ("cuda:0", "cuda:1"):
        model = tiny_vggt().to(device)
        weights = random_deltas(tiny_vggt(), mode=mode)
        weights.full_heads = HEADS if mode == "global" else ()
        accelerate(model, 0.4, weights=weights, min_frames=1, compile=compile)
        with torch.inference_mode(), torch.cuda.device(0):
            found.append(model(images.to(device)))
        assert found[-1]["depth"].device == torch.device(device)
    for key in ("pose_enc", "depth", "world_points"):
        torch.testing.assert_close(found[0][key].cpu(), found[1][key].cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_training_runs_on_the_device(tmp_path, mode):
    """Rendered on the device, bfloat16 autocast, both stages, with and without computing blocks twice."""
    from pacevggt_patch.mini.scenes.textures import texture_atlas
    from pacevggt_patch.mini.sources import RenderedScenes
    from pacevggt_patch.patching.guest import guest
    from pacevggt_patch.training.fit import Fit, Settings

    model = tiny_vggt().cuda()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = PaceWeights.new(model, mode=mode)
    weights.full_heads = HEADS if mode == "global" else ()
    source = RenderedScenes(56, texture_atlas(None, 3, device="cuda"))
    settings = Settings(
        steps=6, distil=0.34, clips=2, views=(3,), supervised=2, calibration=2, checks=1, mode=mode
    )
    with guest(model, weights):
        for checkpointing in (False, True):
            fit = Fit(model, weights, source, settings, checkpointing=checkpointing)
            for step in range(6):
                if step == settings.distil_steps:
                    fit.begin_refinement()
                fit.step(fit.draw(step))
            assert all(torch.isfinite(torch.tensor(value)) for value in fit.latest_losses().values())
    trained = next(iter(weights.block_deltas.up.values())) if mode == "global" else weights.merge.out.weight
    assert trained.is_cuda and trained.any()
    weights.save(tmp_path / "pace.safetensors")
    assert PaceWeights.load(tmp_path / "pace.safetensors").scorer.out.weight.any()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_recorded_calls_are_replayed_with_new_inputs():
    from pacevggt_patch.training.cuda_graphs import Recorder

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


@pytest.mark.parametrize(
    ("mode", "compile"), [("pre-aa", False), ("pre-aa", True), ("global", False), ("global", True)]
)
def test_recorded_and_compiled_steps_train_as_others_do(mode, compile, monkeypatch):
    from pacevggt_patch.mini.scenes.textures import texture_atlas
    from pacevggt_patch.mini.sources import RenderedScenes
    from pacevggt_patch.patching.guest import guest
    from pacevggt_patch.training.fit import Fit, Settings

    ran, real = [], blocks.run_block

    def watched(module, x, rotation, sequences, dtype, speed=None, *args, **kwargs):
        ran.append(speed is not None)
        return real(module, x, rotation, sequences, dtype, speed, *args, **kwargs)

    monkeypatch.setattr(blocks, "run_block", watched)
    model = tiny_vggt().cuda()
    source = RenderedScenes(56, texture_atlas(None, 3, device="cuda"))
    settings = Settings(
        steps=12,
        distil=0,
        keep_ratios=(0.3, 0.3),
        views=(3,),
        supervised=2,
        calibration=1,
        checks=1,
        mode=mode,
    )
    losses = []
    for recorded in (False, True):
        weights = PaceWeights.new(model, mode=mode)
        weights.full_heads = ((1, 0),) if mode == "global" else ()
        ran.clear()
        with guest(model, weights, recorded and compile):
            fit = Fit(model, weights, source, settings)
            fit.recorder.on = source.recorder.on = recorded
            rows = []
            for step in range(12):
                fit.step(fit.draw(step))
                rows.append(list(fit.latest_losses().values()))
            assert bool(fit.recorder.recordings) is recorded
            assert any(ran) is (recorded and compile)
        losses.append(torch.tensor(rows))
    torch.testing.assert_close(losses[0][:, 0], losses[1][:, 0], rtol=0.02, atol=0)


@pytest.mark.parametrize("subject", [*DOUBLES, *VIEWS], ids=lambda subject: subject.name)
def test_other_families_on_the_device(subject):
    """The stock model to the bit where all tokens are kept; compiled the same but for rounding; half precision runs."""
    model, images = subject.model().cuda(), subject.images().cuda()
    stock = subject.run(model, images)
    assert_equal(subject.run(prune(model, 1.0), images), stock)
    found = subject.run(prune(model), images)
    assert_pruned(found, stock)
    assert_close(subject.run(prune(model, compile=True), images), found, 1e-2)
    with torch.autocast("cuda", torch.bfloat16):
        assert all(bool(t.isfinite().all()) for t in subject.run(model, images) if t.is_floating_point())
