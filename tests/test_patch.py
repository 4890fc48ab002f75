"""The patch on stock VGGTs with random weights: equal to stock where it must be, gone without a trace."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hosts import assert_equal, fork_of_vggt, random_images, tiny_vggt
from torch import nn

import pacevggt_patch
from pacevggt_patch import (
    PaceConfig,
    PaceError,
    PaceWeights,
    UnsupportedModelError,
    accelerate,
    is_accelerated,
    paused,
    remove,
    summary,
)
from pacevggt_patch.method import restored_tokens as tokens_module
from pacevggt_patch.method.restored_tokens import RestoredTokens
from pacevggt_patch.patching.install import retune

warnings.filterwarnings("ignore", message=".*torch.cuda.amp.autocast.*")


@pytest.fixture
def model():
    return tiny_vggt()


def run(model: nn.Module, images: torch.Tensor, **kwargs):
    with torch.inference_mode():
        return model(images, **kwargs)


def run_separately(model: nn.Module, images: torch.Tensor):
    """The calls of pipelines that use aggregator and heads one by one."""
    with torch.inference_mode():
        tokens, start = model.aggregator(images)
        pose = model.camera_head(tokens)
        depth, depth_conf = model.depth_head(tokens, images, start)
        points, points_conf = model.point_head(
            aggregated_tokens_list=tokens, images=images, patch_start_idx=start
        )
    return {
        "pose_enc": pose[-1], "pose_enc_list": pose, "depth": depth, "depth_conf": depth_conf,
        "world_points": points, "world_points_conf": points_conf, "images": images,
    }  # fmt: skip


# ---- equal to stock


@pytest.mark.parametrize(
    "frames,batch,height,width", [(1, 1, 56, 56), (3, 2, 42, 70), (17, 1, 28, 14), (2, 1, 14, 14)]
)
@pytest.mark.parametrize("all_layers", [False, True])
def test_keeping_everything_is_stock_to_the_bit(frames, batch, height, width, all_layers):
    model = tiny_vggt(all_layers=all_layers)
    images = random_images(frames, batch=batch, height=height, width=width)
    stock = run(model, images)
    accelerate(model, keep_ratio=1, merge_budget=0, weights=None)
    assert_equal(run(model, images), stock)
    assert_equal(run_separately(model, images), stock)


@pytest.mark.parametrize("group", [2, 4])
def test_groups_of_blocks(group):
    model = tiny_vggt(group=group)
    images = random_images()
    stock = run(model, images)
    assert_equal(run(accelerate(model, 1.0, 0.0, weights=None), images), stock)


def test_track_head_keeping_everything_is_stock_to_the_bit():
    model = tiny_vggt(track=True)
    images, points = random_images(9), torch.tensor([[10.0, 20.0], [40.0, 33.0]])
    stock = run(model, images, query_points=points)
    accelerate(model, 1.0, 0.0, weights=None)
    assert_equal(run(model, images, query_points=points), stock)
    accelerate(model, 0.4, weights=None)
    pruned = run(model, images, query_points=points)
    assert all(torch.isfinite(pruned[key]).all() for key in ("track", "vis", "conf"))
    assert not torch.equal(pruned["track"], stock["track"])
    assert "track_head.feature_extractor" in summary(model).patched


@pytest.mark.parametrize(
    "keep_ratio,merge_budget", [(0.3, 0.2), (0.3, 0.7), (0.5, 0.0), (1e-6, 0.5), (0.95, 0.05)]
)
@pytest.mark.parametrize("frames,batch", [(1, 1), (3, 2), (11, 1)])
def test_separate_calls_equal_the_whole_model(model, keep_ratio, merge_budget, frames, batch):
    images = random_images(frames, batch=batch)
    stock = run(model, images)
    accelerate(model, keep_ratio, merge_budget, weights=None)
    whole = run(model, images)
    assert_equal(run_separately(model, images), whole)
    for key, value in whole.items():
        if isinstance(value, torch.Tensor):
            assert value.shape == stock[key].shape and value.dtype == stock[key].dtype
            assert torch.isfinite(value).all()
    assert not torch.equal(whole["depth"], stock["depth"])


def test_images_without_batch_dimension(model):
    images = random_images()
    accelerate(model, weights=None)
    assert_equal(run(model, images[0]), run(model, images))


def test_clips_of_a_batch_do_not_mix(model):
    images = random_images(3, batch=2)
    accelerate(model, 0.4, weights=None)
    both = run(model, images)
    for b in range(2):
        alone = run(model, images[b : b + 1])
        assert torch.allclose(both["depth"][b], alone["depth"][0], atol=1e-4)
        assert torch.allclose(both["pose_enc"][b], alone["pose_enc"][0], atol=1e-4)


def test_compact_outputs_equal_the_hosts_blocks_run_by_hand(model):
    """Alternating attention on kept tokens, spelled out with the host's own blocks and RoPE."""
    images = random_images(3, batch=2)
    accelerate(model, 0.4, 0.0, weights=None)
    with torch.inference_mode():
        tokens, start = model.aggregator(images)
        a = model.aggregator
        normalised = (images - a._resnet_mean) / a._resnet_std
        features = a.patch_embed(normalised.flatten(0, 1))["x_norm_patchtokens"].view(2, 3, 20, 32)
        x, pos = [], []
        for b in range(2):
            for s in range(3):
                i = tokens.kept[b, s]
                assert len(i) == 8 and start == 5
                which = 0 if s == 0 else 1
                x.append(torch.cat([a.camera_token[0, which], a.register_token[0, which], features[b, s, i]]))
                pos.append(
                    torch.cat([torch.zeros(5, 2, dtype=torch.long), torch.stack([i // 5, i % 5], -1) + 1])
                )
        x, pos = torch.stack(x), torch.stack(pos)
        for layer in range(4):
            frame = x = a.frame_blocks[layer](x, pos=pos)
            x = a.global_blocks[layer](x.reshape(2, -1, 32), pos=pos.reshape(2, -1, 2)).reshape(x.shape)
            expected = torch.cat([frame, x], -1).view(2, 3, 13, 64)
            assert torch.allclose(tokens.compact[layer], expected, atol=1e-5)


@pytest.mark.parametrize("all_layers", [False, True])
def test_restored_tokens_read_like_the_stock_list(all_layers):
    model = tiny_vggt(all_layers=all_layers)
    model.aggregator.__dict__.pop("cached_layer_indices", None) if all_layers else None
    if not all_layers:
        model.aggregator.cached_layer_indices = {1, 3}
        for head in (model.depth_head, model.point_head):
            head.intermediate_layer_idx = [1, 3, 1, 3]
    images = random_images(9)
    with torch.inference_mode():
        stock, _ = model.aggregator(images)
        tokens, start = accelerate(model, 0.4, weights=None).aggregator(images)
        assert isinstance(tokens, RestoredTokens) and start == 5
        assert len(tokens) == len(stock) == len(list(tokens)) == 4
        for i, layer in enumerate(stock):
            assert (tokens[i] is None) == (layer is None) == (tokens[i - 4] is None)
            if layer is not None:
                assert tokens[i].shape == layer.shape and tokens[i].dtype == layer.dtype
                assert torch.equal(tokens[i][:, 2:5], tokens.frames(2, 5, [i])[i])
                assert torch.equal(tokens[i][:, :, :5], tokens.compact[i][:, :, :5])
        assert [t is None for t in tokens[1:]] == [t is None for t in stock[1:]]
        with pytest.raises(IndexError):
            tokens[4]
        # The stock head reads the dense layers too, on a model that was never accelerated.
        other = tiny_vggt(all_layers=all_layers)
        other.depth_head.intermediate_layer_idx = model.depth_head.intermediate_layer_idx
        dense = other.depth_head(tokens, images, start)[0]
        assert torch.allclose(dense, model.depth_head(tokens, images, start)[0], atol=1e-5)


# ---- a guest: nothing is left behind


def snapshot(model: nn.Module):
    names = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            names[name, key] = dict(value) if isinstance(value, dict) else value
        names[name, "class"] = type(module)
    return names


@pytest.mark.parametrize("training", [False, True])
def test_remove_leaves_no_trace(model, training):
    model.train(training)
    calls = []
    handles = [
        m.register_forward_hook(lambda *_: calls.append(1)) for m in (model.aggregator, model.depth_head)
    ]
    images = random_images()
    with torch.no_grad():
        stock = model(images)
    before, keys = snapshot(model), list(model.state_dict())
    values = {k: v.clone() for k, v in model.state_dict().items()}
    flags = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark, torch.get_num_threads())
    random_state = torch.get_rng_state()

    calls.clear()
    accelerate(model, 0.3, weights=None)
    with torch.no_grad():
        model(images)
    assert len(calls) == 2  # hooks run on the accelerated forwards
    assert list(model.state_dict()) == keys
    assert model.training is training
    remove(model)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert flags == (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.get_num_threads(),
    )
    after = snapshot(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value is after[key] or key[1] == "frequency_cache" or value == after[key], key
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        assert_equal(model(images), stock)
    for handle in handles:
        handle.remove()


def test_cycles_leak_nothing(model):
    images = random_images(2, height=28, width=28)
    run(accelerate(model, 0.3, weights=None), images)
    state = weakref.ref(model.aggregator.forward)
    remove(model)
    gc.collect()
    assert state() is None
    before = len(gc.get_objects())
    for i in range(200):
        accelerate(model, 0.3 + 0.001 * i, weights=None)
        if i % 50 == 0:
            run(model, images)
        remove(model)
    gc.collect()
    assert len(gc.get_objects()) - before < 50


def test_other_instances_are_untouched(model):
    other, images = tiny_vggt(seed=1), random_images()
    stock = run(other, images)
    accelerate(model, 0.3, weights=None)
    assert not is_accelerated(other)
    assert_equal(run(other, images), stock)


def test_accelerate_again_retunes_and_remove_is_idempotent(model):
    images = random_images()
    stock = run(model, images)
    first = run(accelerate(model, 0.5, weights=None), images)
    run(accelerate(model, 0.2, weights=None), images)
    assert_equal(run(accelerate(model, 0.5, weights=None), images), first)
    assert remove(model) is model and remove(model) is model
    assert not is_accelerated(model)
    assert_equal(run(model, images), stock)


def test_failed_accelerate_changes_nothing(model):
    images = random_images()
    accelerate(model, 0.5, weights=None)
    before = run(model, images)
    for bad in (dict(keep_ratio=2), dict(weights="no/such/file.safetensors"), dict(merge_budget=0.9)):
        with pytest.raises(PaceError):
            accelerate(model, **{"weights": None, **bad})
    assert_equal(run(model, images), before)


def test_paused(model):
    images = random_images()
    stock = run(model, images)
    accelerate(model, 0.3, weights=None)
    fast = run(model, images)
    with paused(model):
        assert is_accelerated(model) and summary(model).paused
        assert_equal(run(model, images), stock)
        with paused(model):
            assert_equal(run(model, images), stock)
        assert_equal(run(model, images), stock)
    assert_equal(run(model, images), fast)
    with pytest.raises(ZeroDivisionError), paused(model):
        1 / 0  # noqa: B018
    assert_equal(run(model, images), fast)


def test_deepcopy_pickle_and_save(model):
    images = random_images()
    stock = run(model, images)
    fast = run(accelerate(model, 0.3, weights=None), images)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for other in copies:
        assert is_accelerated(other)
        assert_equal(run(other, images), fast)
        assert_equal(run(remove(other), images), stock)
        assert is_accelerated(model)
    accelerate(copy.deepcopy(model), 0.9, weights=None)
    assert summary(model).config.keep_ratio == 0.3
    assert_equal(run(model, images), fast)


@pytest.mark.parametrize("all_layers", [False, True])
def test_vendored_copy_of_vggt(tmp_path, monkeypatch, all_layers):
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    name = fork_of_vggt(tmp_path, f"vendored_vggt_{int(all_layers)}")
    fork, images = tiny_vggt(name, all_layers=all_layers), random_images(9)
    assert type(fork).__module__.startswith(name)
    stock = run(fork, images)
    assert_equal(run(accelerate(fork, 1, 0, weights=None), images), stock)
    fast = run(accelerate(fork, 0.3, weights=None), images)
    assert_equal(fast, run(accelerate(tiny_vggt(all_layers=all_layers), 0.3, weights=None), images))
    assert_equal(run(remove(fork), images), stock)


def test_a_head_alone_does_not_carry_the_model(model):
    before = len(pickle.dumps(model.camera_head))
    accelerate(model, 0.3, weights=None)
    assert len(pickle.dumps(model.camera_head)) < before + 5_000


def test_remove_from_a_wrapper_of_two_models(model):
    pair = nn.ModuleDict({"a": accelerate(model, weights=None), "b": accelerate(tiny_vggt(), weights=None)})
    remove(pair)
    assert not is_accelerated(pair["a"]) and not is_accelerated(pair["b"])


# ---- dtypes, autocast, gradients, compilation


def test_narrower_images_are_promoted_as_in_stock(model):
    images = random_images().half()
    stock = run(model, images)
    assert_equal(run(accelerate(model, 1, 0, weights=None), images), stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_in_other_dtypes(model, dtype):
    model, images = model.to(dtype), random_images(9).to(dtype)
    # The stock heads add a float32 position embedding: with half-precision weights they need autocast.
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float64):
        stock = run(model, images)
        assert_equal(run(accelerate(model, 1, 0, weights=None), images), stock)
        fast = run(accelerate(model, 0.3, weights=None), images)
        assert_equal(run_separately(model, images), fast)
        tokens, _ = model.aggregator(images)
    assert tokens[3].dtype == tokens.compact[3].dtype
    for key in ("pose_enc", "depth", "world_points"):
        assert fast[key].dtype == stock[key].dtype and torch.isfinite(fast[key]).all()


def test_aggregator_alone_in_half_precision(model):
    images = random_images(3).bfloat16()
    model.aggregator.to(torch.bfloat16)
    stock, _ = model.aggregator(images)
    tokens, _ = accelerate(model, 0.3, weights=None).aggregator(images)
    assert tokens[3].dtype == stock[3].dtype == torch.bfloat16
    assert torch.isfinite(tokens[3]).all()


def test_autocast(model):
    images = random_images(9)
    with torch.autocast("cpu", torch.bfloat16):
        stock = run(model, images)
        assert_equal(run(accelerate(model, 1, 0, weights=None), images), stock)
        fast = run(accelerate(model, 0.3, weights=None), images)
        assert_equal(run_separately(model, images), fast)
    assert {k: v.dtype for k, v in fast.items() if k != "pose_enc_list"} == {
        k: v.dtype for k, v in stock.items() if k != "pose_enc_list"
    }
    full = run(model, images)
    assert torch.allclose(fast["depth"].float(), full["depth"], rtol=0.2, atol=0.2)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_equal_stock_when_everything_is_kept(model, training):
    model.train(training)
    images = random_images(2)

    def gradients():
        model.zero_grad()
        out = model(images)
        (out["depth"].mean() + out["pose_enc"].square().mean()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    stock = gradients()
    accelerate(model, 1, 0, weights=None)
    ours = gradients()
    assert stock.keys() == ours.keys()
    assert all(torch.allclose(ours[n], stock[n], atol=1e-6) for n in stock)
    accelerate(model, 0.3, weights=None)
    pruned = gradients()
    assert pruned.keys() == stock.keys()
    assert pruned["aggregator.patch_embed.pos_embed"].abs().sum() > 0


def test_no_step_depends_on_the_data(model):
    """Fake tensors have no values: a host sync (`.item()`, a boolean of a tensor, a data-dependent shape) raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    accelerate(model, 0.3, weights=None, check_finite=False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        out = model(mode.from_tensor(random_images(9)))
    assert out["depth"].shape == (1, 9, 56, 70, 1)


@pytest.mark.skipif(torch.__version__ < "2.6", reason="older dynamo trips over it")
def test_torch_compile(model):
    images = random_images()
    fast = run(accelerate(model, 0.3, weights=None), images)
    # With fullgraph a graph break is an error.
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    out = run(compiled, images)
    assert torch.allclose(out["depth"], fast["depth"], atol=1e-5)
    torch._dynamo.reset()


def test_threads_do_not_meet(model):
    """Two clips of different size through one model at once, as in stock."""
    accelerate(model, 0.3, weights=None)
    clips = [random_images(2, height=28, width=28), random_images(2, height=140, width=140)]
    expected = [run(model, clip)["depth"] for clip in clips]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            outputs = list(pool.map(lambda clip: run(model, clip)["depth"], clips))
            assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


# ---- forks that do things their own way


def test_fork_with_its_own_attention(model):
    """Blocks that see one frame at a time, by an override of the host's own function."""

    class Windowed(type(model.aggregator)):
        def _process_global_attention(self, tokens, B, S, P, C, idx, pos=None):
            return self._process_frame_attention(tokens, B, S, P, C, idx, pos=pos)

    model.aggregator.__class__ = Windowed
    images = random_images()
    stock = run(model, images)
    assert not torch.equal(stock["depth"], run(tiny_vggt(), images)["depth"])
    assert_equal(run(accelerate(model, 1, 0, weights=None), images), stock)


def test_fork_with_its_own_rope(model):
    class Stretched(type(model.aggregator.rope)):
        def forward(self, tokens, positions):
            return super().forward(tokens, positions * 2)

    model.aggregator.rope.__class__ = Stretched
    images = random_images()
    stock = run(model, images)
    assert_equal(run(accelerate(model, 1, 0, weights=None), images), stock)
    assert "aggregator.rope" not in summary(model).patched


def replace_head(model: nn.Module, forward) -> None:
    model.depth_head.__class__ = type("ForkHead", (type(model.depth_head),), {"forward": forward})


def test_fork_head_that_looks_at_the_whole_clip(model):
    def forward(self, tokens, images, patch_start_idx):
        depth, conf = self._forward_impl(tokens, images, patch_start_idx)
        return depth - depth.mean(), conf

    replace_head(model, forward)
    images = random_images(17)
    stock = run(model, images)
    assert_equal(run(accelerate(model, 1, 0, weights=None), images), stock)
    assert run(accelerate(model, 0.3, weights=None), images)["depth"].shape == stock["depth"].shape


def test_fork_head_with_other_outputs(model):
    stock_forward = type(model.depth_head).forward

    def forward(self, tokens, images, patch_start_idx, frames_chunk_size=8):
        depth, conf = stock_forward(self, tokens, images, patch_start_idx, frames_chunk_size)
        return [{"depth": depth, "none": None}, conf]

    images = random_images(17)
    accelerate(model, 0.3, weights=None)
    tokens, start = model.aggregator(images)
    depth, conf = model.depth_head(tokens, images, start)
    replace_head(model, forward)
    named, same_conf = model.depth_head(tokens, images, start)
    assert named["none"] is None
    torch.testing.assert_close(named["depth"], depth)
    torch.testing.assert_close(same_conf, conf)

    def flat(self, tokens, images, patch_start_idx, frames_chunk_size=8):
        return stock_forward(self, tokens, images, patch_start_idx, frames_chunk_size)[0].flatten(0, 1)

    replace_head(model, flat)
    with pytest.raises(PaceError) as error:
        model.depth_head(tokens, images, start)
    assert str(error.value) == (
        "ForkHead returned a tensor [8, 56, 70, 1] for 8 frames, which can't be joined over frames: "
        "call it with frames_chunk_size=None"
    )
    assert model.depth_head(tokens, images, start, frames_chunk_size=None).shape == (17, 56, 70, 1)


@pytest.mark.parametrize("chunk", [1, 3, 8, 17, 100, None])
def test_chunk_size_of_the_caller(model, chunk, monkeypatch):
    accelerate(model, 0.3, weights=None)
    images = random_images(17)
    with torch.inference_mode():
        tokens, start = model.aggregator(images)
        expected = model.depth_head(tokens, images, start)[0]
        restored = []
        real = tokens_module.restore
        monkeypatch.setattr(tokens_module, "restore", lambda o, *a: restored.append(len(o[3])) or real(o, *a))
        depth = model.depth_head(tokens, images, start, frames_chunk_size=chunk)[0]
    assert torch.allclose(depth, expected, atol=1e-5)
    assert sum(restored) == 17 and max(restored) == min(
        chunk or 17, 17
    )  # no more dense frames than that at once


def test_stock_errors_stay(model):
    accelerate(model, 0.3, weights=None)
    images = random_images(3)
    tokens, start = model.aggregator(images)
    with pytest.raises(AssertionError):
        model.depth_head(tokens, images, start, frames_chunk_size=-1)


# ---- with learned weights


@pytest.fixture
def weights(model):
    """Weights as training would leave them: not zero any more."""
    made = PaceWeights.new(model, keep_ratios=(0.3,))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in (made.scorer, made.restoration):
            for parameter in module.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return made


def test_learned_weights_change_the_outputs_and_travel_along(model, weights):
    images = random_images(9)
    free = run(accelerate(model, 0.3, weights=None), images)
    fast = run(accelerate(model, 0.3, weights=weights), images)
    assert not torch.allclose(fast["depth"], free["depth"], atol=1e-3)
    assert not torch.allclose(fast["pose_enc"], free["pose_enc"], atol=1e-3)
    assert_equal(run_separately(model, images), fast)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(run(other, images), fast)
    untrained = run(accelerate(model, 0.3, weights=PaceWeights.new(model)), images)
    assert torch.allclose(untrained["depth"], free["depth"], atol=1e-5)


def test_retuning_keeps_the_weights_in_force(model, weights):
    accelerate(model, 0.3, weights=weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(model, 0.5)
    assert model.aggregator.forward.state.weights is weights
    with paused(model):
        accelerate(model, 0.4, weights=None)
        assert summary(model).paused
    assert "training-free" in summary(model).weights


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_reach_the_restoration(model, weights, autocast):
    accelerate(model, 0.3, weights=weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(random_images(2))["depth"].mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in weights.restoration.parameters())


@pytest.mark.parametrize("how", ["new", "load"])
def test_weights_made_in_inference_mode_can_be_trained(model, weights, how, tmp_path):
    weights.save(tmp_path / "pace.safetensors")
    with torch.inference_mode():
        made = PaceWeights.new(model) if how == "new" else PaceWeights.load(tmp_path / "pace.safetensors")
        model(random_images(2)) if how == "new" else accelerate(model, 0.3, weights=made)(random_images(2))
    accelerate(model, 0.3, weights=made)
    model(random_images(2))["depth"].mean().backward()
    assert made.restoration.out[0].weight.grad is not None


# ---- what it says


def test_summary(model):
    accelerate(model, 0.3, weights=None)
    assert "stages        none yet" in str(summary(model))
    report = summary(model, random_images(3))
    stages = {stage.name: stage for stage in report.stages}
    assert stages["keep and merge"].tokens_in == 60 and stages["keep and merge"].tokens_out == 18
    assert stages["alternating attention"].tokens_in == 3 * (5 + 6)
    assert stages["depth_head"].tokens_out == 60
    assert all(stage.seconds > 0 for stage in report.stages)
    assert set(report.patched) == {"aggregator", "aggregator.rope", "camera_head", "point_head", "depth_head"}
    text = str(report)
    assert "training-free" in text and "C=32, 4+4 blocks" in text and "keep and merge" in text
    with torch.inference_mode():
        tokens, _ = model.aggregator(random_images(2))
        for _ in range(3):
            model.camera_head(tokens)
    assert [stage.name for stage in summary(model).stages].count("camera_head") == 1
    run(model, random_images(2))
    assert all(stage.seconds is None for stage in summary(model).stages)


def test_package_version():
    assert pacevggt_patch.__version__


# ---- errors: one clear sentence


@pytest.mark.parametrize(
    "settings,message",
    [
        (
            dict(keep_ratio=0),
            "keep_ratio must be in (0, 1], got 0: 0.3 keeps 30 % of each frame's patch tokens",
        ),
        (
            dict(keep_ratio=1.5),
            "keep_ratio must be in (0, 1], got 1.5: 0.3 keeps 30 % of each frame's patch tokens",
        ),
        (dict(keep_ratio=float("nan")), "keep_ratio must be a number, got nan"),
        (dict(keep_ratio="0.3"), "keep_ratio must be a number, got '0.3'"),
        (dict(keep_ratio=True), "keep_ratio must be a number, got True"),
        (
            dict(keep_ratio=0.3, merge_budget=0.8),
            "merge_budget must be in [0, 1 - keep_ratio] = [0, 0.7], got 0.8: "
            "it is the share of the clip's patch tokens that is merged into kept ones",
        ),
        (dict(check_finite="yes"), "check_finite must be True, False or None, got 'yes'"),
    ],
)
def test_settings_out_of_range(model, settings, message):
    with pytest.raises(PaceError) as error:
        accelerate(model, weights=None, **settings)
    assert str(error.value) == message
    assert not is_accelerated(model)


def test_budgets_of_a_config():
    config = PaceConfig(0.3)
    assert (config.kept_tokens(256), config.merged_tokens(24, 256)) == (77, 24 * (256 - 77))
    assert PaceConfig(0.3, 0.2).merged_tokens(24, 256) == 1229
    assert PaceConfig(0.9).merge_share == pytest.approx(0.1) and PaceConfig(0.9, 0.05).merge_share == 0.05
    assert PaceConfig(0.3).merged_tokens(300, 784) == 300 * (
        784 - 235
    )  # all, where rounding a share would miss some
    assert PaceConfig(1e-9).kept_tokens(256) == 1
    assert PaceConfig(0.3, 0.7).merged_tokens(3, 5) == 3 * (5 - 2)


def test_models_that_do_not_fit(model):
    with pytest.raises(UnsupportedModelError) as error:
        accelerate("VGGT")
    assert str(error.value) == "expected a VGGT model (torch.nn.Module), got str"
    with pytest.raises(UnsupportedModelError) as error:
        accelerate(nn.Linear(2, 2))
    assert str(error.value) == "Linear has no submodule 'aggregator', so it is not a VGGT"
    with pytest.raises(UnsupportedModelError) as error:
        accelerate(model.aggregator)
    assert str(error.value) == (
        "Aggregator has no submodule 'aggregator', so it is not a VGGT: pass the VGGT that holds it"
    )
    with pytest.raises(UnsupportedModelError) as error:
        accelerate(nn.DataParallel(model))
    assert str(error.value) == "DataParallel wraps the model: pass the model itself (model.module)"
    with pytest.raises(UnsupportedModelError) as error:
        accelerate(torch.compile(model, backend="eager"))
    assert str(error.value) == "OptimizedModule wraps the model: pass the model itself (model._orig_mod)"

    del model.aggregator.register_token
    with pytest.raises(UnsupportedModelError) as error:
        accelerate(model)
    assert str(error.value) == (
        "VGGT.aggregator lacks register_token: only VGGT's alternating-attention aggregator is supported"
    )


@pytest.mark.parametrize(
    "change,message",
    [
        (
            lambda m: setattr(m.aggregator, "aa_order", ["global"]),
            "VGGT.aggregator.aa_order is ['global']: expected one 'frame' and one 'global'",
        ),
        (
            lambda m: m.aggregator.frame_blocks.append(nn.Identity()),
            "VGGT.aggregator has 5 frame and 4 global blocks: expected as many of each",
        ),
        (
            lambda m: setattr(m.aggregator, "patch_start_idx", 6),
            "VGGT.aggregator has 5 camera and register tokens, but patch_start_idx is 6: "
            "other special tokens are not supported",
        ),
        (
            lambda m: m.depth_head.intermediate_layer_idx.append(7),
            "VGGT.depth_head reads layers [7], but the aggregator has 4",
        ),
    ],
)
def test_hosts_with_unknown_insides(model, change, message):
    change(model)
    with pytest.raises(UnsupportedModelError) as error:
        accelerate(model, weights=None)
    assert str(error.value) == message


def test_a_forward_that_somebody_else_replaced(model):
    def theirs(images):
        return None

    model.aggregator.forward = theirs
    with pytest.raises(UnsupportedModelError) as error:
        accelerate(model, weights=None)
    assert str(error.value) == (
        f"aggregator.forward is already replaced on this instance by {theirs!r}: undo that patch first"
    )
    assert model.aggregator.forward is theirs


def test_a_forward_that_somebody_replaced_after_us(model):
    accelerate(model, weights=None)
    ours = model.aggregator.forward

    def theirs(images):
        return ours(images)

    model.aggregator.forward = theirs
    with pytest.raises(PaceError) as error:
        remove(model)
    assert (
        str(error.value)
        == f"aggregator.forward was replaced after accelerate by {theirs!r}: undo that patch first"
    )
    assert is_accelerated(model)
    model.aggregator.forward = ours
    assert not is_accelerated(remove(model))


@pytest.mark.parametrize(
    "images,message",
    [
        ([1], "images must be a tensor [B, S, 3, H, W] in [0, 1], got list"),
        (
            torch.rand(1, 2, 1, 28, 28),
            "images must be [B, S, 3, H, W] with at least one frame, got [1, 2, 1, 28, 28]",
        ),
        (
            torch.rand(1, 0, 3, 28, 28),
            "images must be [B, S, 3, H, W] with at least one frame, got [1, 0, 3, 28, 28]",
        ),
        (torch.rand(3, 28, 28), "images must be [B, S, 3, H, W] with at least one frame, got [3, 28, 28]"),
        (
            torch.rand(1, 2, 3, 30, 28),
            "image height and width must be multiples of 14, got 30x28: resize or crop the images",
        ),
        (
            torch.zeros(1, 2, 3, 28, 28, dtype=torch.uint8),
            "images must be floating point in [0, 1], got torch.uint8: divide 8-bit images by 255",
        ),
        (
            torch.rand(1, 2, 3, 28, 28).double(),
            "images are torch.float64 but the model is torch.float32: call images.to(torch.float32), "
            "or run under torch.autocast",
        ),
        (
            torch.full((1, 2, 3, 28, 28), float("nan")),
            "images hold NaN or infinity: check how they were loaded",
        ),
    ],
)
def test_bad_images(model, images, message):
    accelerate(model, weights=None)
    with pytest.raises(PaceError) as error:
        model.aggregator(images)
    assert str(error.value) == message


def test_finite_check_can_be_switched_off(model):
    images = torch.full((1, 2, 3, 28, 28), float("nan"))
    out = run(accelerate(model, weights=None, check_finite=False), images)
    assert out["depth"].isnan().any()


def test_heads_called_with_other_images(model):
    accelerate(model, weights=None)
    images = random_images(3)
    tokens, start = model.aggregator(images)
    with pytest.raises(PaceError) as error:
        model.depth_head(tokens, images[:, :2], start)
    assert str(error.value) == "DPTHead got 2 images for the tokens of 3"


def test_images_on_another_device(model):
    accelerate(model, weights=None)
    with pytest.raises(PaceError) as error:
        model.aggregator(random_images().to("meta"))
    assert str(error.value) == (
        'images are on meta but the model is on cpu: call images.to("cpu") '
        "(torch.nn.DataParallel can't run an accelerated model: use one process per GPU)"
    )


def test_patch_embedding_with_other_tokens(model):
    stock_forward = type(model.aggregator.patch_embed).forward

    def forward(self, images):
        return {"x_norm_patchtokens": stock_forward(self, images)["x_norm_patchtokens"][:, 1:]}

    model.aggregator.patch_embed.__class__ = type(
        "Fewer", (type(model.aggregator.patch_embed),), {"forward": forward}
    )
    with pytest.raises(UnsupportedModelError) as error:
        accelerate(model, weights=None)(random_images())
    assert str(error.value) == (
        "the patch embedding gave 19 tokens for a grid of 4x5 patches: "
        "only hosts with one token for each patch are supported"
    )


def test_aggregator_with_more_arguments(model):
    accelerate(model, weights=None)
    with pytest.raises(UnsupportedModelError, match="called with more than images"):
        model.aggregator(random_images(), "mask")


@pytest.mark.parametrize("call", [summary, lambda m: paused(m).__enter__()])
def test_calls_that_need_an_accelerated_model(model, call):
    with pytest.raises(PaceError) as error:
        call(model)
    assert str(error.value) == "this model is not accelerated: call pacevggt_patch.accelerate(model) first"


# --- what training uses


def test_retune_changes_the_settings_and_nothing_else():
    model, images = tiny_vggt(), random_images()
    weights = PaceWeights.new(model)
    with torch.inference_mode():
        accelerate(model, 0.3, 0.2, weights=weights, check_finite=False)
        expected = model(images)
        retune(model, 1.0)
        stock = model(images)
        retune(model, 0.3, 0.2)
        assert_equal(expected, model(images))
        remove(model)
        assert_equal(stock, model(images))
    with pytest.raises(PaceError, match="this model is not accelerated"):
        retune(model, 0.5)
    accelerate(model, weights=None)
    with pytest.raises(PaceError, match=r"keep_ratio must be in \(0, 1\], got 2"):
        retune(model, 2)
    assert summary(model).config.keep_ratio == 0.3


def test_selected_frames_are_those_frames():
    model, images = tiny_vggt(), random_images(5, batch=2)
    accelerate(model, 0.3, weights=PaceWeights.new(model))
    with torch.inference_mode():
        tokens, start = model.aggregator(images)
        frames = torch.tensor([3, 0])
        some = tokens.select(frames)
        for layer, dense in enumerate(tokens):
            torch.testing.assert_close(some[layer], dense[:, frames])
        depth, _ = model.depth_head(some, images[:, frames], start)
        whole, _ = model.depth_head(tokens, images, start)
    torch.testing.assert_close(depth, whole[:, frames])
