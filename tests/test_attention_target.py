"""The attention that patch tokens receive, against the whole matrix in float64."""

import pytest
import torch
import torch.nn.functional as F
from hosts import random_deltas, random_images, tiny_vggt

from pacevggt_patch import UnsupportedModelError, accelerate, summary
from pacevggt_patch.training import attention_target as module
from pacevggt_patch.training.attention_target import attention_received, attention_target, chosen_queries


def accelerated(mode="global", weights=None, dtype=torch.float32, **options):
    return accelerate(tiny_vggt(**options).to(dtype), 0.3, weights=weights, mode=mode, min_frames=1)


def reference(options, images) -> torch.Tensor:
    """Mean over blocks, heads and all queries, from the projections of a float64 copy of the stock model."""
    model, images = tiny_vggt(**options).double(), images.double()
    weights = []

    def record(attention, args, kwargs):
        x, pos = args[0], kwargs.get("pos", args[1] if len(args) > 1 else None)
        batch, length, _ = x.shape
        qkv = attention.qkv(x).reshape(batch, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = attention.q_norm(qkv[0]), attention.k_norm(qkv[1])
        q, k = attention.rope(q, pos), attention.rope(k, pos)
        weights.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1))  # [B, L, L]

    for block in model.aggregator.global_blocks:
        block.attn.register_forward_pre_hook(record, with_kwargs=True)
    with torch.no_grad():
        model.aggregator(images)
    batch, frames = images.shape[:2]
    received = torch.stack(weights).mean(0).mean(1)  # [B, L]
    return received.view(batch, frames, -1)[:, :, 5:]


@pytest.mark.parametrize("mode", ["global", "pre-aa"])
@pytest.mark.parametrize("options", [{}, {"group": 2}, {"all_layers": True}])
@pytest.mark.parametrize(
    ("batch", "frames", "height", "width"), [(1, 3, 56, 70), (2, 2, 28, 14), (1, 1, 14, 42)]
)
def test_it_equals_the_whole_matrix(mode, options, batch, frames, height, width):
    images = random_images(frames, batch=batch, height=height, width=width)
    features, found = attention_target(accelerated(mode, **options), images, patch_queries=10**6)
    expected = reference(options, images)
    assert found.shape == features.shape[:3] == expected.shape
    assert torch.allclose(found.double(), expected, atol=1e-6)
    assert (found > 0).all() and (found.sum((1, 2)) < 1).all()


def test_some_queries_are_a_mean_over_those():
    images = random_images(3)
    model = accelerated()
    queries = chosen_queries(3, 5 + 20, 5, 7, images.device)
    assert len(queries) == 15 + 7 and len(set(queries.tolist())) == 22
    seen = []
    stock_attention = F.scaled_dot_product_attention
    for block in model.aggregator.global_blocks:
        attention = block.attn

        def record(attention, args, kwargs):
            x, pos = args[0], kwargs["pos"]
            q, k, _ = attention.qkv(x).reshape(1, x.shape[1], 3, 2, 16).permute(2, 0, 3, 1, 4)
            q = attention.rope(attention.q_norm(q), pos)
            k = attention.rope(attention.k_norm(k), pos)
            seen.append((q @ k.mT / 4).softmax(-1)[:, :, queries].mean((1, 2)))

        attention.register_forward_pre_hook(record, with_kwargs=True)
    _, found = attention_target(model, images, patch_queries=7)
    expected = torch.stack(seen).mean(0).view(1, 3, -1)[:, :, 5:]
    assert torch.allclose(found, expected, atol=1e-6)
    assert F.scaled_dot_product_attention is stock_attention


@pytest.mark.parametrize("bytes_of_a_chunk", [1, 4 * 2 * 3 * 11 * 2, 2**28])
def test_chunks_do_not_change_it(monkeypatch, bytes_of_a_chunk):
    g = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 3, 7, 4, generator=g), torch.randn(2, 3, 11, 4, generator=g)
    monkeypatch.setattr(module, "CHUNK_BYTES", bytes_of_a_chunk)
    expected = (queries.double() @ keys.double().mT).softmax(-1).mean((1, 2))
    found = attention_received(queries, keys)
    assert torch.allclose(found.double(), expected, atol=1e-6)
    assert torch.allclose(found.sum(1), torch.ones(2))


@pytest.mark.parametrize("mode", ["global", "pre-aa"])
def test_it_is_the_unpruned_model_that_is_looked_at_whatever_weights_change(mode):
    images = random_images()
    plain_features, plain = attention_target(accelerated(), images)
    model = accelerated(mode, random_deltas(tiny_vggt(), 0.2, mode))
    features, found = attention_target(model, images)
    assert torch.equal(plain, found) and not found.requires_grad
    assert torch.equal(plain_features, features)
    with torch.inference_mode():  # and it is over: the next pass is pruned
        model(images)
    assert summary(model).kept.shape == (1, 3, 6)


def test_the_features_are_what_the_scorer_is_given_when_the_model_runs(monkeypatch):
    model, images, given = accelerated(), random_images(batch=2), []
    from pacevggt_patch.patching import state

    real = state.keep_best
    monkeypatch.setattr(state, "keep_best", lambda features, *a: given.append(features) or real(features, *a))
    with torch.inference_mode():
        model(images)
    features, _ = attention_target(model, images)
    assert torch.equal(features.flatten(0, 1), torch.cat(given))


def test_narrow_models():
    images = random_images()
    _, wide = attention_target(accelerated(), images)
    _, narrow = attention_target(accelerated(dtype=torch.bfloat16), images.bfloat16())
    assert narrow.dtype == torch.float32
    assert torch.allclose(narrow, wide, atol=2e-3)


def test_a_host_with_attention_of_its_own_is_refused():
    model = accelerated()
    for block in model.aggregator.global_blocks:
        block.attn.fused_attn = False
    with pytest.raises(UnsupportedModelError, match="scaled_dot_product_attention"):
        attention_target(model, random_images())
