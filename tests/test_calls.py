"""Calls of an accelerated model: whole and part by part, in all dtypes, with gradients, compiled."""

import copy
import re
import threading
from functools import partial

import pytest
import torch
from hosts import assert_equal, random_deltas, random_images, run, tiny_vggt, with_heads
from torch import nn

from pacevggt_patch import (
    PaceConfig,
    PaceError,
    PaceWeights,
    UnsupportedModelError,
    accelerate,
    paused,
    summary,
)
from pacevggt_patch.hosts import dpt
from pacevggt_patch.patching.install import retune, state_of

MODES = ["global", "pre-aa"]
NEW_COMPILERS = pytest.mark.skipif(
    torch.__version__ < "2.6", reason="older compilers break the graph in the stock code"
)
KEYS = ("pose_enc", "depth", "depth_conf", "world_points")


@pytest.fixture
def model():
    return tiny_vggt()


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


def learned(model, mode: str) -> PaceWeights:
    """Weights that change all they can."""
    weights = random_deltas(model, mode=mode)
    weights.full_heads = ((1, 0), (2, 1)) if mode == "global" else ()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, module in weights.modules().named_children():
            if name != "block_deltas":
                for parameter in module.parameters():
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return weights


def close(found, expected, keys=KEYS, **tolerances):
    for key in keys:
        torch.testing.assert_close(found[key], expected[key], **tolerances)


# ---- entrances


def test_a_global_model_returns_the_own_list_of_its_aggregator(model):
    images = random_images(3, batch=2)
    with torch.inference_mode():
        stock, start = model.aggregator(images)
        found, same = accelerate(model, 0.3, weights=None).aggregator(images)
    assert type(found) is type(stock) is list and same == start
    for a, b in zip(found, stock, strict=True):
        assert type(a) is torch.Tensor and a.shape == b.shape and a.dtype == b.dtype
        assert not torch.equal(a, b)


@pytest.mark.parametrize(
    "mode,keep_ratio,merge_budget",
    [
        ("global", 0.3, None),
        ("global", 1e-6, None),
        ("pre-aa", 0.3, 0.2),
        ("pre-aa", 1e-6, None),
    ],
)
@pytest.mark.parametrize("frames,batch", [(1, 1), (9, 2)])
def test_separate_calls_equal_the_whole_model(model, mode, keep_ratio, merge_budget, frames, batch):
    images = random_images(frames, batch=batch)
    stock = run(model, images)
    accelerate(model, keep_ratio, merge_budget, weights=None, mode=mode)
    whole = run(model, images)
    assert_equal(run_separately(model, images), whole)
    for key, value in whole.items():
        if isinstance(value, torch.Tensor):
            assert value.shape == stock[key].shape and value.dtype == stock[key].dtype
            assert torch.isfinite(value).all()
    assert not torch.equal(whole["depth"], stock["depth"])


@pytest.mark.parametrize("mode", MODES)
def test_images_without_a_batch_are_one_clip(model, mode):
    images = random_images()
    accelerate(model, weights=None, mode=mode)
    assert_equal(run(model, images[0]), run(model, images))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("all_weights", [False, True])
def test_a_clip_does_not_depend_on_its_batch(model, mode, all_weights):
    images = random_images(4, batch=3)
    images[1] *= 0.1  # another brightness, so that the clips are far apart
    accelerate(model, 0.4, weights=learned(model, mode) if all_weights else None, mode=mode)
    together = run(model, images)
    kept = summary(model).kept
    for b in range(3):
        alone = run(model, images[b : b + 1])
        assert torch.equal(summary(model).kept[0], kept[b])
        for key in KEYS:
            torch.testing.assert_close(together[key][b], alone[key][0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_the_track_head_reads_what_the_others_read(mode):
    model = tiny_vggt(track=True)
    images, points = random_images(9), torch.tensor([[10.0, 20.0], [40.0, 33.0]])
    stock = run(model, images, query_points=points)
    accelerate(model, 1.0, weights=None, mode=mode)
    assert_equal(run(model, images, query_points=points), stock)
    accelerate(model, 0.4, weights=None, mode=mode)
    found = run(model, images, query_points=points)
    assert all(torch.isfinite(found[key]).all() for key in ("track", "vis", "conf"))
    assert not torch.equal(found["track"], stock["track"])
    assert "track_head.feature_extractor" in summary(model).patched
    if mode == "global":  # by the stock head, on the same tokens
        with torch.inference_mode():
            tokens, start = model.aggregator(images)
            wanted = tiny_vggt(track=True).track_head(tokens, images, start, query_points=points[None])
        torch.testing.assert_close(found["track"], wanted[0][-1], rtol=1e-3, atol=1e-2)


def test_heads_give_what_the_stock_heads_give_of_the_same_tokens(model):
    images = random_images(9)
    accelerate(model, 0.3, weights=None)
    with torch.inference_mode():
        tokens, start = model.aggregator(images)
        found = run_separately(model, images)
        other = tiny_vggt()
        wanted = {
            "pose_enc": other.camera_head(tokens)[-1],
            "depth": other.depth_head(tokens, images, start)[0],
        }
        # Also where they were changed in between.
        changed = [t.clone() for t in tokens]
        changed[3] += torch.linspace(0, 1, 64)
        again = model.depth_head(changed, images, start)[0]
        torch.testing.assert_close(again, other.depth_head(changed, images, start)[0], rtol=1e-4, atol=1e-4)
    close(found, wanted, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(again, found["depth"], atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 8, 100, None])
@pytest.mark.parametrize("mode", MODES)
def test_the_chunk_size_of_the_caller_bounds_the_frames_at_a_time(model, chunk, mode, monkeypatch):
    accelerate(model, 0.3, weights=None, mode=mode)
    images = random_images(17)
    with torch.inference_mode():
        tokens, start = model.aggregator(images)
        expected = model.depth_head(tokens, images, start)[0]
        frames, real = [], dpt.dense_head
        monkeypatch.setattr(
            dpt,
            "dense_head",
            lambda head, layers, *a, **k: frames.append(len(layers[0])) or real(head, layers, *a, **k),
        )
        depth = model.depth_head(tokens, images, start, frames_chunk_size=chunk)[0]
    assert torch.allclose(depth, expected, atol=1e-5)
    assert sum(frames) == 17 and max(frames) == min(chunk or 17, 17)


def test_stock_errors_stay(model):
    accelerate(model, 0.3, weights=None)
    images = random_images(3)
    tokens, start = model.aggregator(images)
    with pytest.raises(AssertionError):
        model.depth_head(tokens, images, start, frames_chunk_size=-1)


def replace_head(model: nn.Module, forward) -> None:
    model.depth_head.__class__ = type("ForkHead", (type(model.depth_head),), {"forward": forward})


@pytest.mark.parametrize("mode", MODES)
def test_a_head_that_looks_at_the_whole_clip_gets_all_of_it(model, mode):
    def forward(self, tokens, images, patch_start_idx):
        depth, conf = self._forward_impl(tokens, images, patch_start_idx)
        return depth - depth.mean(), conf

    replace_head(model, forward)
    images = random_images(17)
    stock = run(model, images)
    assert_equal(run(accelerate(model, 1, weights=None, mode=mode), images), stock)
    found = run(accelerate(model, 0.3, weights=None, mode=mode), images)["depth"]
    assert found.shape == stock["depth"].shape and found.mean().abs() < 1e-4


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("mode", MODES)
def test_a_head_with_other_outputs_gives_them_for_all_frames(model, mode, device):
    stock_forward = type(model.depth_head).forward

    def forward(self, tokens, images, patch_start_idx, frames_chunk_size=8):
        depth, conf = stock_forward(self, tokens, images, patch_start_idx, frames_chunk_size)
        return [{"depth": depth, "none": None}, conf]

    images = random_images(17)
    accelerate(model, 0.3, weights=None, mode=mode, output_device=device)
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
    if mode == "pre-aa" or device:  # it is called for a part of the frames at a time
        with pytest.raises(PaceError, match="ForkHead .* frames_chunk_size=None"):
            model.depth_head(tokens, images, start)
    assert model.depth_head(tokens, images, start, frames_chunk_size=None).shape == (17, 56, 70, 1)


# ---- dtypes and autocast


@pytest.mark.parametrize("mode", MODES)
def test_narrower_images_are_promoted_as_in_stock(model, mode):
    images = random_images().half()
    stock = run(model, images)
    assert_equal(run(accelerate(model, 1, weights=None, mode=mode), images), stock)
    found = run(accelerate(model, 0.3, weights=None, mode=mode), images)
    assert found["depth"].dtype == stock["depth"].dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_models_in_other_dtypes_keep_them(model, dtype, mode):
    weights = learned(model, mode)
    model, images = model.to(dtype), random_images(9).to(dtype)
    # The stock heads add a float32 position embedding: with half-precision weights they need autocast.
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float64):
        stock = run(model, images)
        assert_equal(run(accelerate(model, 1, weights=None, mode=mode), images), stock)
        fast = run(accelerate(model, 0.3, weights=None, mode=mode), images)
        assert_equal(run_separately(model, images), fast)
        changed = run(accelerate(model, 0.3, weights=weights, mode=mode), images)
        with torch.inference_mode():
            tokens, _ = model.aggregator(images)
    for key in ("pose_enc", "depth", "world_points"):
        assert fast[key].dtype == changed[key].dtype == stock[key].dtype
        assert torch.isfinite(fast[key]).all() and torch.isfinite(changed[key]).all()
    accelerate(model, 1.0, weights=None, mode=mode)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float64), torch.inference_mode():
        assert tokens[3].dtype == model.aggregator(images)[0][3].dtype


@pytest.mark.parametrize("mode", MODES)
def test_an_aggregator_alone_may_be_narrow(model, mode):
    images = random_images(3).bfloat16()
    model.aggregator.to(torch.bfloat16)
    stock, _ = model.aggregator(images)
    tokens, _ = accelerate(model, 0.3, weights=None, mode=mode).aggregator(images)
    assert tokens[3].dtype == stock[3].dtype == torch.bfloat16
    assert torch.isfinite(tokens[3]).all()


@pytest.mark.parametrize("mode", MODES)
def test_autocast_gives_the_dtypes_of_stock(model, mode):
    images = random_images(9)
    with torch.autocast("cpu", torch.bfloat16):
        stock = run(model, images)
        assert_equal(run(accelerate(model, 1, weights=None, mode=mode), images), stock)
        fast = run(accelerate(model, 0.3, weights=None, mode=mode), images)
        assert_equal(run_separately(model, images), fast)
        kept = summary(model).kept
    dtypes = [{k: v.dtype for k, v in out.items() if k != "pose_enc_list"} for out in (fast, stock)]
    assert dtypes[0] == dtypes[1]
    full = run(model, images)
    same = (summary(model).kept == kept).all(-1)[0]  # rounding may keep other tokens
    assert same.any()
    error = (fast["depth"].float() - full["depth"])[0, same].abs().mean() / full["depth"].abs().mean()
    assert error < 0.05


def test_heads_under_another_dtype_give_float32(model):
    images = random_images(3)
    plain = run(accelerate(model, 0.3, weights=None), images)
    narrow = run(accelerate(model, 0.3, weights=None, head_dtype=torch.bfloat16), images)
    assert torch.equal(narrow["pose_enc"], plain["pose_enc"])
    assert narrow["depth"].dtype == torch.float32 and not torch.equal(narrow["depth"], plain["depth"])
    torch.testing.assert_close(narrow["depth"], plain["depth"], rtol=0.1, atol=0.1)


# ---- gradients


def losses(model, images):
    """Gradients of all parameters after a backward pass."""
    model.zero_grad()
    out = model(images)
    (out["depth"].mean() + out["pose_enc"].square().mean()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def train(model, training: bool):
    """Training mode but for what drops at random."""
    model.train(training)
    for module in model.aggregator.patch_embed.modules():
        module.training = False
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_equal_stock_when_everything_is_kept(model, training, mode):
    train(model, training)
    images = random_images(2)
    stock = losses(model, images)
    accelerate(model, 1, weights=None, mode=mode)
    ours = losses(model, images)
    assert stock.keys() == ours.keys()
    assert all(torch.allclose(ours[n], stock[n], atol=1e-6) for n in stock)
    accelerate(model, 0.3, weights=None, mode=mode)
    found = losses(model, images)
    assert found.keys() == stock.keys()
    assert found["aggregator.patch_embed.pos_embed"].abs().sum() > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("all_weights", [False, True])
@pytest.mark.parametrize("group", [1, 2])
def test_gradients_of_a_host_in_training_equal_those_without_its_checkpoints(mode, all_weights, group):
    """The stock host runs its blocks once more for the backward pass while it trains."""
    model, images = tiny_vggt(group=group), random_images(2, batch=2)
    accelerate(model, 0.4, weights=learned(model, mode) if all_weights else None, mode=mode)
    without = losses(train(model, False), images)
    again = losses(train(model, True), images)
    assert model.aggregator.training and without.keys() == again.keys()
    for name, gradient in without.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("all_weights", [False, True])
def test_two_forwards_before_one_backward_give_the_sum_of_both(model, training, all_weights):
    weights = learned(model, "global") if all_weights else None
    accelerate(model, 0.4, weights=weights)
    train(model, training)
    clips = [random_images(2), random_images(3, height=42, seed=1)]
    apart = [losses(model, clip) for clip in clips]
    model.zero_grad()
    outs = [model(clip) for clip in clips]
    sum(out["depth"].mean() + out["pose_enc"].square().mean() for out in outs).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            wanted = sum(part[name] for part in apart)
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_the_same_with_our_own_checkpoints(model, mode):
    weights = learned(model, mode)
    accelerate(model, 0.4, weights=weights)
    images, found = random_images(2), []
    for checkpointing in (False, True):
        retune(model, 0.4, checkpointing=checkpointing)
        found.append(losses(model, images))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def call_again(model):
    with torch.no_grad():
        model(random_images(3, seed=4))


def other_settings(model):
    accelerate(model, 0.7, weights=with_heads(model, (0, 1)))


@pytest.mark.parametrize("change", [call_again, other_settings])
def test_settings_may_change_between_forward_and_backward(model, change):
    """What is computed once more is what was computed."""
    images = random_images(2)
    accelerate(model, 0.4, weights=with_heads(model, (1, 0)))
    train(model, True)
    wanted = losses(model, images)
    model.zero_grad()
    out = model(images)
    change(model)
    (out["depth"].mean() + out["pose_enc"].square().mean()).backward()
    check_gradients(model, wanted)


@pytest.mark.parametrize("where", ["inside", "outside", "thread"])
def test_the_backward_pass_of_a_paused_model_is_that_of_stock(model, where):
    """A host in training runs its blocks once more, wherever the backward pass runs."""
    images = random_images(2)
    wanted = losses(train(model, True), images)
    accelerate(model, 0.4, weights=learned(model, "global"))
    model.zero_grad()
    with paused(model):
        out = model(images)
        loss = out["depth"].mean() + out["pose_enc"].square().mean()
        if where == "inside":
            loss.backward()
        elif where == "thread":
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
    if where == "outside":
        loss.backward()
    check_gradients(model, wanted)


def test_reentrant_checkpoints_are_refused(model):
    """They run blocks outside of a forward pass, where nobody knows which tokens were kept."""
    accelerate(model, 0.4, weights=None)
    train(model, True).aggregator.use_reentrant = True
    loss = model(random_images(2).requires_grad_())["depth"].mean()
    with pytest.raises(UnsupportedModelError, match="use_reentrant"):
        loss.backward()


def check_gradients(model, wanted):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5, msg=name)


# ---- compilers


def test_no_step_depends_on_the_data(model):
    """Fake tensors have no values: a host sync (`.item()`, a boolean of a tensor, a data-dependent shape) raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    accelerate(model, 0.3, weights=learned(model, "global"))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = mode.from_tensor(random_images(9))
        model.aggregator.forward.takes_images = False  # the check of values that a CPU gets
        out = model(fake)
    assert out["depth"].shape == (1, 9, 56, 70, 1)


@pytest.fixture
def one_graph():
    """Compiles a module; a graph break is an error."""
    yield partial(torch.compile, backend="eager", fullgraph=True)
    torch._dynamo.reset()


def small() -> nn.Module:
    """A model that is traced quickly."""
    model = tiny_vggt()
    model.point_head, model.depth_head.intermediate_layer_idx = None, [0, 1, 0, 1]
    model.aggregator.patch_embed.blocks = model.aggregator.patch_embed.blocks[:1]
    a = model.aggregator
    a.frame_blocks, a.global_blocks = a.frame_blocks[:2], a.global_blocks[:2]
    a.depth = a.aa_block_num = 2
    return model


@NEW_COMPILERS
@pytest.mark.parametrize("mode", MODES)
def test_a_model_with_weights_compiles_into_one_graph(mode, one_graph):
    model, images = small(), random_images()
    weights = learned(model, mode)
    weights.full_heads = weights.full_heads[:1]
    fast = run(accelerate(model, 0.3, weights=weights), images)
    assert not torch.allclose(
        run(accelerate(small(), 0.3, weights=None, mode=mode), images)["pose_enc"], fast["pose_enc"]
    )
    close(run(one_graph(model), images), fast, ("pose_enc", "depth"), rtol=1e-4, atol=1e-5)


@NEW_COMPILERS
def test_a_model_that_is_not_calibrated_compiles_without_full_heads(one_graph, caplog):
    model, images = small(), random_images(4)
    expected = run(accelerate(small(), 0.3, weights=None), images)
    accelerate(model, 0.3)
    assert state_of(model).pending
    close(run(one_graph(model), images), expected, ("pose_enc", "depth"), rtol=1e-4, atol=1e-5)
    assert state_of(model).pending
    assert not [record for record in caplog.records if record.name == "pacevggt_patch"]


# ---- what it says


def test_the_summary_of_global_pruning(model):
    accelerate(model, 0.3, weights=None)
    assert "none yet" in str(summary(model)) and summary(model).kept is None
    report = summary(model, random_images(3))
    stages = {stage.name: stage for stage in report.stages}
    assert (stages["selection"].tokens_in, stages["selection"].tokens_out) == (60, 18)
    assert stages["depth_head"].tokens_in == stages["depth_head"].tokens_out == 60
    assert all(stage.seconds > 0 for stage in report.stages)
    assert set(report.patched) == {
        "aggregator", "aggregator.patch_embed", "aggregator.rope", "point_head", "depth_head",
    }  # fmt: skip
    assert report.kept.shape == (1, 3, 6)
    # Five special tokens of each frame, and six of 20 patch tokens in global blocks.
    assert stages["frame blocks"].attend == stages["global blocks"].tokens_in == 3 * (5 + 20)
    assert stages["global blocks"].attend == 3 * (5 + 6) and stages["depth_head"].attend is None
    text = str(report)
    assert re.search(r"^global blocks +75 +33 +75 ", text, re.M)
    assert "training-free" in text and "C=32, 4+4 blocks" in text and "global pruning" in text
    run(model, random_images(2))
    assert all(stage.seconds is None for stage in summary(model).stages)


def test_the_summary_of_pre_aa_pruning(model):
    accelerate(model, 0.3, 0.2, weights=None)
    report = summary(model, random_images(3))
    stages = {stage.name: stage for stage in report.stages}
    assert (stages["selection"].tokens_in, stages["selection"].tokens_out) == (60, 18)
    assert (stages["merging"].tokens_in, stages["merging"].tokens_out) == (60, 18)
    assert stages["global blocks"].tokens_in == stages["frame blocks"].tokens_in == 3 * (5 + 6)
    assert (stages["depth_head"].tokens_in, stages["depth_head"].tokens_out) == (18, 60)
    assert "camera_head" in report.patched and "pre-AA pruning" in str(report)
    with torch.inference_mode():
        tokens, _ = model.aggregator(random_images(2))
        for _ in range(3):
            model.camera_head(tokens)
    assert [stage.name for stage in summary(model).stages].count("camera_head") == 1


def test_the_summary_counts_the_weights(model):
    accelerate(model, 0.3, weights=with_heads(model, (1, 0), (2, 1)))
    assert "2 full-attention heads" in str(summary(model))
    with paused(model):
        assert "paused" in str(summary(model))


@pytest.mark.parametrize("mode", MODES)
def test_the_kept_tokens_are_those_that_enter_global_attention(model, mode):
    images, entered = random_images(3, batch=2), []
    model.aggregator.global_blocks[0].register_forward_hook(lambda _, args, __: entered.append(args[0]))
    accelerate(model, 0.3, weights=None, mode=mode)
    run(model, images)
    kept = summary(model).kept
    assert kept.shape == (2, 3, 6) and (kept.diff(dim=-1) > 0).all() and kept.min() >= 0 and kept.max() < 20
    other = copy.deepcopy(model)
    assert_equal(run(other, images), run(model, images))
    assert torch.equal(summary(other).kept, kept)


def test_budgets_of_a_config_are_whole_tokens():
    config = PaceConfig(0.3)
    assert (config.kept_tokens(256), config.merged_tokens(24, 256)) == (77, 24 * (256 - 77))
    assert PaceConfig(0.3, 0.2).merged_tokens(24, 256) == 1229
    # All, where rounding a share would miss some.
    assert PaceConfig(0.3).merged_tokens(300, 784) == 300 * (784 - 235)
    assert PaceConfig(1e-9).kept_tokens(256) == 1
    assert PaceConfig(0.3, 0.7).merged_tokens(3, 5) == 3 * (5 - 2)
