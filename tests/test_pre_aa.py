"""Pre-AA pruning: alternating attention on kept tokens alone, the grid restored for whoever looks."""

import copy
import pickle

import pytest
import torch
from hosts import assert_equal, random_deltas, random_images, run, tiny_vggt

from pacevggt_patch import PaceError, PaceWeights, UnsupportedModelError, accelerate, paused, remove, summary
from pacevggt_patch.method import restored_tokens as tokens_module
from pacevggt_patch.method.restored_tokens import RestoredTokens
from pacevggt_patch.patching.guest import guest


@pytest.fixture
def model():
    return tiny_vggt()


@pytest.fixture
def weights(model):
    """Weights as training would leave them: not zero any more."""
    made = PaceWeights.new(model, mode="pre-aa", keep_ratios=(0.3,))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in (made.scorer, made.restoration):
            for parameter in module.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return made


def test_compact_outputs_equal_the_hosts_blocks_run_by_hand(model):
    """Alternating attention on kept tokens, spelled out with the host's own blocks and RoPE."""
    images = random_images(3, batch=2)
    accelerate(model, 0.4, 0.0, weights=None)
    with torch.inference_mode():
        tokens, start = model.aggregator(images)
    assert torch.equal(summary(model).kept, tokens.kept)
    remove(model)
    with torch.inference_mode():
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
    if not all_layers:
        model.aggregator.cached_layer_indices = {1, 3}
        for head in (model.depth_head, model.point_head):
            head.intermediate_layer_idx = [1, 3, 1, 3]
    images = random_images(9)
    with torch.inference_mode():
        stock, _ = model.aggregator(images)
        tokens, start = accelerate(model, 0.4, weights=None, mode="pre-aa").aggregator(images)
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


def test_selected_frames_are_those_frames():
    model, images = tiny_vggt(), random_images(5, batch=2)
    accelerate(model, 0.3, weights=PaceWeights.new(model, mode="pre-aa"))
    with torch.inference_mode():
        tokens, start = model.aggregator(images)
        frames = torch.tensor([3, 0])
        some = tokens.select(frames)
        for layer, dense in enumerate(tokens):
            torch.testing.assert_close(some[layer], dense[:, frames])
        depth, _ = model.depth_head(some, images[:, frames], start)
        whole, _ = model.depth_head(tokens, images, start)
    torch.testing.assert_close(depth, whole[:, frames])


@pytest.mark.parametrize("chunk", [1, 3, 17, None])
def test_no_more_dense_frames_exist_at_once_than_a_chunk(model, chunk, monkeypatch):
    accelerate(model, 0.3, weights=None, mode="pre-aa")
    images, restored, real = random_images(17), [], tokens_module.restore
    with torch.inference_mode():
        tokens, start = model.aggregator(images)
        monkeypatch.setattr(tokens_module, "restore", lambda o, *a: restored.append(len(o[3])) or real(o, *a))
        model.depth_head(tokens, images, start, frames_chunk_size=chunk)
    assert sum(restored) == 17 and max(restored) == (chunk or 17)


def test_heads_called_with_other_images_say_so(model):
    accelerate(model, weights=None, mode="pre-aa")
    images = random_images(3)
    tokens, start = model.aggregator(images)
    with pytest.raises(PaceError, match="2 images for the tokens of 3"):
        model.depth_head(tokens, images[:, :2], start)


def test_an_aggregator_called_with_more_than_images_says_so(model):
    accelerate(model, weights=None, mode="pre-aa")
    with pytest.raises(UnsupportedModelError, match="called with more than images"):
        model.aggregator(random_images(), "mask")


def test_a_fork_whose_global_blocks_see_a_frame_at_a_time_is_refused(model):
    """The rewritten forward calls the blocks, not the host's own functions around them."""

    class Windowed(type(model.aggregator)):
        def _process_global_attention(self, tokens, B, S, P, C, idx, pos=None):
            return self._process_frame_attention(tokens, B, S, P, C, idx, pos=pos)

    model.aggregator.__class__ = Windowed
    with pytest.raises(UnsupportedModelError, match='mode="global"'):
        accelerate(model, weights=None, mode="pre-aa")


def test_a_trunk_without_stock_parts_is_refused(model):
    del model.aggregator.register_token
    with pytest.raises(UnsupportedModelError, match="register_token"):
        accelerate(model, weights=None, mode="pre-aa")


# ---- learned weights


def test_learned_weights_change_the_outputs_and_travel_along(model, weights):
    images = random_images(9)
    free = run(accelerate(model, 0.3, weights=None, mode="pre-aa"), images)
    fast = run(accelerate(model, 0.3, weights=weights), images)
    assert summary(model).config.mode == "pre-aa"
    assert not torch.allclose(fast["depth"], free["depth"], atol=1e-3)
    assert not torch.allclose(fast["pose_enc"], free["pose_enc"], atol=1e-3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(run(other, images), fast)
    untrained = run(accelerate(model, 0.3, weights=PaceWeights.new(model, mode="pre-aa")), images)
    assert torch.allclose(untrained["depth"], free["depth"], atol=1e-5)


def test_weights_are_asked_for_anew_in_every_call(model, weights):
    accelerate(model, 0.3, weights=weights)
    accelerate(model, 0.5, mode="pre-aa")
    assert "training-free" in summary(model).weights
    with paused(model):
        accelerate(model, 0.4, weights=weights)
    assert "parameters" in summary(model).weights


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_reach_the_restoration_in_training(model, weights, autocast):
    with guest(model, weights):
        from pacevggt_patch.patching.install import retune

        retune(model, 0.3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(random_images(2))["depth"].mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in weights.restoration.parameters())


@pytest.mark.parametrize("how", ["new", "load"])
def test_weights_made_in_inference_mode_can_be_trained(model, weights, how, tmp_path):
    weights.save(tmp_path / "pace.safetensors")
    with torch.inference_mode():
        if how == "new":
            made = PaceWeights.new(model, mode="pre-aa")
        else:
            made = PaceWeights.load(tmp_path / "pace.safetensors")
        accelerate(model, 0.3, weights=made)(random_images(2))
    remove(model)
    with guest(model, made):
        model(random_images(2))["depth"].mean().backward()
    assert made.restoration.out[0].weight.grad is not None


def test_merging_reads_the_tokens_that_are_merged(model):
    images = random_images(3)
    free = [run(accelerate(model, 0.3, merge, weights=None), images)["pose_enc"] for merge in (0.0, 0.3, 0.7)]
    everything = run(accelerate(model, 0.3, weights=None, mode="pre-aa"), images)["pose_enc"]
    assert torch.equal(everything, free[2])
    assert not torch.allclose(free[0], free[1], atol=1e-5) and not torch.allclose(free[1], free[2], atol=1e-5)
    deltas = random_deltas(model, mode="pre-aa")
    with torch.no_grad():
        deltas.merge.out.bias += 1.0
    changed = run(accelerate(model, 0.3, 0.0, weights=deltas), images)["pose_enc"]
    assert not torch.allclose(changed, free[0], atol=1e-3)
