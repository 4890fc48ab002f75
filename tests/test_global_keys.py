"""Fewer keys in global attention, against attention with a mask over all of them."""

import pytest
import torch
import torch.nn.functional as F
from hosts import random_images, tiny_vggt

from pacevggt_patch import PaceError, UnsupportedModelError, accelerate
from pacevggt_patch.method.scoring import token_scores
from pacevggt_patch.runtime.attention import FewerKeys, InAttention, key_numbers


def test_the_best_scored_tokens_and_all_special_ones_are_keys():
    scores = torch.tensor([[[0.1, 0.9, 0.5], [0.7, 0.2, 0.7]]])  # [B, S, K]; ties go to the lower index
    assert key_numbers(scores, 2, 1).tolist() == [[0, 1, 3, 5, 6, 7]]
    assert key_numbers(scores, 2, 2).tolist() == [[0, 1, 3, 4, 5, 6, 7, 9]]
    assert key_numbers(scores, 0, 3).tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_it_is_attention_under_a_mask(by_name, scale):
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(
        3, 2, 4, 12, 8, generator=generator, dtype=torch.float64
    )  # [B, heads, L, d]
    index = torch.stack([torch.randperm(12, generator=generator)[:5] for _ in range(2)])
    mask = torch.zeros(2, 12, dtype=torch.bool).scatter_(1, index, True)[:, None, None].expand(-1, 4, 12, -1)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    with InAttention(FewerKeys(index, 12)):
        if by_name:
            found = F.scaled_dot_product_attention(value=value, key=key, query=query, scale=scale)
        else:
            found = F.scaled_dot_product_attention(query, key, value, None, 0.0, False, scale=scale)
        other = F.scaled_dot_product_attention(query[:, :, :7], key[:, :, :7], value[:, :, :7], scale=scale)
    torch.testing.assert_close(found, expected)
    assert torch.equal(
        other, F.scaled_dot_product_attention(query[:, :, :7], key[:, :, :7], value[:, :, :7], scale=scale)
    )


@pytest.mark.parametrize(("keep_ratio", "keys"), [(0.4, 4), (1.0, 10)])
def test_global_blocks_alone_see_fewer_keys(keep_ratio, keys, monkeypatch):
    """Of 8 and of 20 kept tokens a frame; frame blocks see all of them."""
    model, images = tiny_vggt(), random_images(3, batch=2)
    kept, shapes = 2 * keys, []
    real = FewerKeys.__call__

    def watched(self, number, query, key, value, scale):
        query, key, value = real(self, number, query, key, value, scale)
        shapes.append((number, query.shape[2], key.shape[2], value.shape[2]))
        return query, key, value

    monkeypatch.setattr(FewerKeys, "__call__", watched)
    with torch.inference_mode():
        few = accelerate(model, keep_ratio, weights=None, global_keys=0.5)(images)
        assert shapes == [(n, 3 * (5 + kept), 3 * (5 + keys), 3 * (5 + keys)) for n in range(4)]
        every = accelerate(model, keep_ratio, weights=None)(images)
    assert len(shapes) == 4
    assert not torch.allclose(few["pose_enc"], every["pose_enc"], atol=1e-5)


def test_keys_of_an_unpruned_clip_are_spread_over_its_frames(monkeypatch):
    model, images, seen = tiny_vggt(), random_images(2), []
    real = FewerKeys.__init__
    monkeypatch.setattr(FewerKeys, "__init__", lambda self, *a: seen.append(a[0]) or real(self, *a))
    with torch.inference_mode():
        tokens, _ = accelerate(model, 1.0, weights=None, global_keys=0.3)(images) and model.aggregator(images)
    scores = token_scores(tokens.features, tokens.grid, 6)
    assert torch.equal(seen[0], key_numbers(scores, 5, 6))
    patches = seen[0].view(2, 11)[:, 5:] - torch.tensor([[5], [30]])  # numbers in their frames, of 20
    assert (patches < 10).any(1).all() and (patches >= 10).any(1).all()


def test_checkpointing_sees_the_same_keys():
    from pacevggt_patch.patching.install import retune

    model, images = tiny_vggt(), random_images(2)
    accelerate(model, 0.4, weights=None, global_keys=0.5)
    gradients = []
    for checkpointing in (False, True):
        retune(model, 0.4, checkpointing=checkpointing)
        model.zero_grad()
        tokens, _ = model.aggregator(images)
        tokens.compact[3].square().mean().backward()
        gradients.append(model.aggregator.global_blocks[0].attn.qkv.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_a_host_whose_keys_can_not_be_chosen_is_refused():
    class Windowed(type(tiny_vggt().aggregator)):
        def _process_global_attention(self, tokens, B, S, P, C, idx, pos=None):
            return self._process_frame_attention(tokens, B, S, P, C, idx, pos=pos)

    model = tiny_vggt()
    model.aggregator.__class__ = Windowed
    with pytest.raises(UnsupportedModelError) as error:
        accelerate(model, 0.4, weights=None, global_keys=0.5)(random_images(3))
    assert str(error.value) == (
        "the global blocks of this model do not call scaled_dot_product_attention over the whole clip, so their keys "
        "can't be chosen: pass global_keys=1"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"global_keys": 0},
            "global_keys must be in (0, 1], got 0: it is the share of the kept tokens that serve as keys",
        ),
        ({"global_keys": "all"}, "global_keys must be a number, got 'all'"),
        ({"min_frames": 0}, "min_frames must be a whole number of at least 1, or None, got 0"),
        ({"min_frames": True}, "min_frames must be a whole number of at least 1, or None, got True"),
        (
            {"output_device": "disk"},
            "output_device must be a torch device of this machine such as \"cpu\", or None, got 'disk'",
        ),
        (
            {"output_device": "cuda:99"},
            "output_device must be a torch device of this machine such as \"cpu\", or None, got 'cuda:99'",
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(PaceError) as error:
        accelerate(tiny_vggt(), weights=None, **settings)
    assert str(error.value) == message
