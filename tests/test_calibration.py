"""`calibrate`: the closed-form fit against a least-squares solver in float64, the heads that lose most, and what it
leaves of the model."""

import pytest
import torch
from hosts import random_images, run, tiny_vggt

import pacevggt_patch
from pacevggt_patch import (
    PaceError,
    PaceWeights,
    UnsupportedModelError,
    accelerate,
    calibrate,
    remove,
    summary,
)
from pacevggt_patch.calibration import restoration as module
from pacevggt_patch.method import full_heads
from pacevggt_patch.method.similarity import interpolation_weights

MODES = ["global", "pre-aa"]


def clips(count: int = 3, frames: int = 3):
    return [random_images(frames, seed=i)[0] for i in range(count)]


def pre_aa(model, images, **options):
    return calibrate(model, images, mode="pre-aa", **options)


# ---- pre-AA pruning: the linear part of the restoration


def least_squares(model, images, ratio, layer, ridge):
    """The linear map of a layer, from rows of dropped tokens made one by one."""
    rows, targets = [], []
    for clip in images:
        with torch.no_grad():
            dense = model.aggregator(clip[None])[0]
            accelerate(model, ratio, weights=None, mode="pre-aa", min_frames=1)
            tokens, start = model.aggregator(clip[None])
            restored = list(tokens)
            remove(model)
        features = tokens.features[0]
        weights = interpolation_weights(features, tokens.kept[0], tokens.grid)
        for s in range(len(clip)):
            kept = tokens.kept[0, s].tolist()
            for p in set(range(features.shape[1])) - set(kept):
                mean = sum(weights[s, p, j].double() * features[s, k].double() for j, k in enumerate(kept))
                rows.append(features[s, p].double() - mean)
                targets.append((dense[layer] - restored[layer])[0, s, start + p].double())
    x, y = torch.stack(rows), torch.stack(targets)
    level = ridge * (x.T @ x).diagonal().mean()
    # Ridge regression as plain least squares with rows added.
    x = torch.cat([x, level.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)])
    y = torch.cat([y, torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(x, y).solution.T


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_the_fit_equals_least_squares(ridge, monkeypatch):
    monkeypatch.setattr(module, "RIDGE", ridge)
    model = tiny_vggt()
    weights = pre_aa(model, clips(), keep_ratios=(0.3,))
    for layer in (0, 3):
        expected = least_squares(model, clips(), 0.3, layer, ridge)
        found = weights.restoration.linear[layer].weight.double()
        assert torch.allclose(found, expected, atol=1e-3 * expected.abs().max().item())


def test_frames_are_taken_in_chunks_and_batches(monkeypatch):
    model = tiny_vggt()
    whole = pre_aa(model, clips())
    monkeypatch.setattr(module, "FRAMES", 2)
    chunked = pre_aa(model, clips())
    batched = pre_aa(model, [torch.stack(clips()[:2]), clips()[2]])
    for a, b, c in zip(*(w.restoration.linear for w in (whole, chunked, batched)), strict=True):
        assert torch.allclose(a.weight, b.weight, atol=1e-4)
        assert torch.allclose(a.weight, c.weight, atol=1e-4)


def test_it_brings_the_restored_tokens_nearer_to_the_unpruned_ones():
    model, images = tiny_vggt(), clips(6)
    weights = pre_aa(model, images, keep_ratios=(0.3,))
    assert weights.keep_ratios == (0.3,)

    def distance(chosen) -> float:
        with torch.no_grad():
            dense = model.aggregator(images[0][None])[0]
            accelerate(model, 0.3, weights=chosen, mode="pre-aa", min_frames=1)
            restored = list(model.aggregator(images[0][None])[0])
            remove(model)
        return sum((a - b).square().mean().item() for a, b in zip(dense, restored, strict=True))

    assert distance(weights) < 0.97 * distance(None)


def test_nothing_but_the_linear_part_is_fitted_and_what_is_untrained_is_left_out():
    weights = pre_aa(tiny_vggt(), clips())
    assert set(weights.modules()) == {"restoration"} and weights.mode == "pre-aa"
    fresh = PaceWeights.new(tiny_vggt(), mode="pre-aa").restoration.state_dict()
    found = weights.restoration.state_dict()
    changed = {name for name, value in fresh.items() if not torch.equal(value, found[name])}
    assert changed == {f"linear.{i}.weight" for i in range(4)}
    again = pre_aa(tiny_vggt(), clips()).restoration.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in found.items())


@pytest.mark.parametrize("frames", [1, 2])
def test_one_frame_and_one_kept_token(frames):
    weights = pre_aa(tiny_vggt(), clips(2, frames), keep_ratios=(0.01,))
    assert all(torch.isfinite(t).all() for t in weights.modules().state_dict().values())
    assert weights.restoration.linear[0].weight.abs().max() > 0


def test_no_keep_ratios_and_wrong_ones_are_refused():
    for wrong in ((), (0.0,), (2,), ("much",)):
        with pytest.raises(PaceError, match="keep_ratio"):
            pre_aa(tiny_vggt(), clips(1), keep_ratios=wrong)


# ---- global pruning: full-attention heads


def test_the_heads_are_those_that_lose_most(monkeypatch):
    monkeypatch.setattr(full_heads, "LEAST_ERROR", 0.0)
    model = tiny_vggt()
    weights = calibrate(model, clips())
    assert weights.mode == "global" and not weights.modules() and weights.keep_ratios == ()
    assert len(weights.full_heads) == 1  # a sixth of eight
    from pacevggt_patch.calibration.full_heads import find_full_heads

    accelerate(model, weights=None, min_frames=1)
    heads, errors = find_full_heads(model, [clip[None] for clip in clips()])
    block, head = divmod(int(errors[:-1].argmax()), 2)
    assert heads == weights.full_heads == ((block, head),)


def test_without_heads_that_lose_much_there_are_none(monkeypatch):
    monkeypatch.setattr(full_heads, "LEAST_ERROR", 1e9)
    assert calibrate(tiny_vggt(), clips(1)).full_heads == ()


def test_the_heads_do_not_depend_on_how_clips_are_given(monkeypatch):
    monkeypatch.setattr(full_heads, "LEAST_ERROR", 0.0)
    one = calibrate(tiny_vggt(), clips())
    for given in (iter(clips()), torch.stack(clips()), [clip[None] for clip in clips()]):
        assert calibrate(tiny_vggt(), given).full_heads == one.full_heads
    single = calibrate(tiny_vggt(), clips()[0])
    assert calibrate(tiny_vggt(), clips()[:1]).full_heads == single.full_heads


def test_the_call_of_the_user_is_used_where_it_is_given():
    model, seen = tiny_vggt(), []

    def call(images):
        seen.append(tuple(images.shape))
        return model(images)

    found = calibrate(model, clips(2), run=call)
    assert seen == [(1, 3, 3, 56, 70)] * 2
    assert found.full_heads == calibrate(model, clips(2)).full_heads
    with pytest.raises(PaceError, match="run="):
        calibrate(model, clips(1), run=lambda images: None)
    assert not pacevggt_patch.is_accelerated(model)


def test_a_single_frame_tells_nothing_of_matches():
    with pytest.raises(PaceError, match="one frame"):
        calibrate(tiny_vggt(), clips(1, 1))


def test_a_model_that_can_not_be_told_from_others_is_refused():
    with pytest.raises(UnsupportedModelError, match="meta device"):
        calibrate(tiny_vggt().to("meta"), clips(1))


# ---- both


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_dtypes(mode, dtype):
    model = tiny_vggt().to(dtype)
    weights = calibrate(model, [clip.to(dtype) for clip in clips()], mode=mode)
    assert all(torch.isfinite(t).all() for t in weights.modules().state_dict().values())
    accelerate(model, 0.3, weights=weights, min_frames=1)
    assert torch.isfinite(run(model, clips()[0][None].to(dtype))["pose_enc"]).all()


@pytest.mark.parametrize("mode", MODES)
def test_what_it_returns_goes_straight_in_and_into_a_file(mode, tmp_path):
    model = tiny_vggt()
    weights = calibrate(model, clips(), mode=mode)
    weights.save(tmp_path / "own.safetensors")
    found = []
    for chosen in (weights, tmp_path / "own.safetensors"):
        accelerate(model, 0.3, weights=chosen, min_frames=1)
        assert summary(model).config.mode == mode and "calibrated" in summary(model).weights
        found.append(run(model, clips()[0])["depth"])
    assert torch.equal(*found)


@pytest.mark.parametrize("mode", MODES)
def test_the_model_is_left_as_it_was(mode):
    model = tiny_vggt()
    model.train()
    model.aggregator.patch_embed.eval()
    model.depth_head.requires_grad_(False)
    flags = [module.training for module in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    calibrate(model, clips(1), mode=mode)
    for broken in ([torch.zeros(3, 3, 15, 14)], [], [torch.zeros(3, 14)], ["clip"]):
        with pytest.raises(PaceError):
            calibrate(model, broken, mode=mode)
    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not pacevggt_patch.is_accelerated(model)
    assert all("forward" not in module.__dict__ and not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("images", "named"), [
    ([], "at least one clip"), ([torch.zeros(2, 3, 15, 14)], "15x14"), ([torch.zeros(2, 14)], "[2, 14]"),
    (["clip"], "str"),
])  # fmt: skip
def test_clips_that_do_not_fit_are_named(mode, images, named):
    with pytest.raises(PaceError) as caught:
        calibrate(tiny_vggt(), images, mode=mode)
    assert named in str(caught.value)


@pytest.mark.parametrize("mode", MODES)
def test_an_accelerated_model_is_refused(mode):
    model = accelerate(tiny_vggt(), weights=None)
    with pytest.raises(PaceError, match="remove"):
        calibrate(model, clips(1), mode=mode)
    assert pacevggt_patch.is_accelerated(model)


def test_another_mode_is_refused():
    with pytest.raises(PaceError, match="'dense'"):
        calibrate(tiny_vggt(), clips(1), mode="dense")
