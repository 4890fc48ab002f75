"""The closed-form calibration against a least-squares solver in float64, and what it leaves of the model."""

import pytest
import torch
from hosts import random_images, tiny_vggt

import pacevggt_patch
from pacevggt_patch import PaceError, PaceWeights, accelerate, remove
from pacevggt_patch.calibration import calibrate as module
from pacevggt_patch.method.restoration import interpolation_weights
from pacevggt_patch.training import calibrate


def clips(count: int = 3, frames: int = 3):
    return [random_images(frames, seed=i)[0] for i in range(count)]


def least_squares(model, images, ratio, layer, ridge):
    """The matrix of one layer, from rows collected token by token."""
    rows, targets = [], []
    for clip in images:
        with torch.no_grad():
            dense = model.aggregator(clip[None])[0]
            accelerate(model, ratio, weights=None)
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
def test_the_fit_equals_least_squares(ridge):
    model = tiny_vggt()
    weights = calibrate(model, clips(), keep_ratios=(0.3,), ridge=ridge)
    for layer in (0, 3):
        expected = least_squares(model, clips(), 0.3, layer, ridge)
        found = weights.restoration.linear[layer].weight.double()
        assert torch.allclose(found, expected, atol=1e-3 * expected.abs().max().item())


def test_frames_are_taken_in_chunks_and_batches(monkeypatch):
    model = tiny_vggt()
    whole = calibrate(model, clips())
    monkeypatch.setattr(module, "FRAMES", 2)
    chunked = calibrate(model, clips())
    batched = calibrate(model, [torch.stack(clips()[:2]), clips()[2]])
    for a, b, c in zip(*(w.restoration.linear for w in (whole, chunked, batched)), strict=True):
        assert torch.allclose(a.weight, b.weight, atol=1e-4)
        assert torch.allclose(a.weight, c.weight, atol=1e-4)


def test_it_brings_the_restored_tokens_nearer_to_the_unpruned_ones():
    model, images = tiny_vggt(), clips(6)
    weights = calibrate(model, images, keep_ratios=(0.3,))
    assert weights.keep_ratios == (0.3,)

    def distance(chosen) -> float:
        with torch.no_grad():
            dense = model.aggregator(images[0][None])[0]
            accelerate(model, 0.3, weights=chosen)
            restored = list(model.aggregator(images[0][None])[0])
            remove(model)
        return sum((a - b).square().mean().item() for a, b in zip(dense, restored, strict=True))

    assert distance(weights) < 0.97 * distance(None)


def test_the_model_is_left_as_it_was():
    model = tiny_vggt()
    model.train()
    model.aggregator.patch_embed.eval()
    model.depth_head.requires_grad_(False)
    flags = [module.training for module in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    calibrate(model, clips(1))
    for broken in ([torch.zeros(3, 3, 15, 14)], []):
        with pytest.raises(PaceError):
            calibrate(model, broken)
    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not pacevggt_patch.is_accelerated(model)
    assert all("forward" not in module.__dict__ and not module._forward_hooks for module in model.modules())


def test_all_but_the_linear_part_stays_and_calibrating_twice_is_calibrating_once():
    model = tiny_vggt()
    weights = PaceWeights.new(model)
    with torch.no_grad():
        weights.scorer.out.weight.normal_(generator=torch.Generator().manual_seed(0))
    before = {name: t.clone() for name, t in weights.modules().state_dict().items()}
    assert calibrate(model, clips(), weights) is weights
    first = {name: t.clone() for name, t in weights.modules().state_dict().items()}
    changed = {name for name in before if not torch.equal(before[name], first[name])}
    assert changed == {f"restoration.linear.{i}.weight" for i in range(4)}
    calibrate(model, clips(), weights)
    assert all(torch.equal(t, first[name]) for name, t in weights.modules().state_dict().items())


@pytest.mark.parametrize("frames", [1, 2])
def test_one_frame_and_one_kept_token(frames):
    weights = calibrate(tiny_vggt(), clips(2, frames), keep_ratios=(0.01,))
    assert all(torch.isfinite(t).all() for t in weights.modules().state_dict().values())
    assert weights.restoration.linear[0].weight.abs().max() > 0


@pytest.mark.parametrize(("images", "message"), [
    ([], "^calibration needs at least one clip, got none$"),
    ([torch.zeros(1, 3, 15, 14)], "^image height and width must be multiples of 14, got 15x14"),
])  # fmt: skip
def test_clips_that_do_not_fit_are_refused(images, message):
    with pytest.raises(PaceError, match=message):
        calibrate(tiny_vggt(), images)


def test_an_accelerated_model_is_refused():
    model = accelerate(tiny_vggt(), weights=None)
    with pytest.raises(PaceError) as caught:
        calibrate(model, clips(1))
    assert str(caught.value) == (
        "this model is accelerated already: call pacevggt_patch.remove(model) before training"
    )
    assert pacevggt_patch.is_accelerated(model)
