"""Which keys kept tokens see, and attention in which keys count several times: against loops and plain softmax."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hosts import random_images, tiny_vggt, with_heads

from pacevggt_patch import accelerate, remove
from pacevggt_patch.method import few_keys as module
from pacevggt_patch.method.few_keys import (
    FRAMES,
    FRAMES_OF_FULL,
    FewKeys,
    few_keys,
    full_keys,
    keys_of_clip,
    keys_of_frame,
    keys_of_full,
)
from pacevggt_patch.method.global_pruning import Plan, joined
from pacevggt_patch.method.propagation import Propagation, make_propagation
from pacevggt_patch.patching.global_attention import FewKeysAttention, by_host
from pacevggt_patch.runtime import attention as runtime
from pacevggt_patch.runtime.attention import InterceptAttention, Repeats, attention

SPECIAL, GRID = 2, (4, 5)
PATCHES = GRID[0] * GRID[1]


def some_plan(frames, keep, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch * frames, PATCHES, 6, generator=generator)
    kept = torch.stack([torch.randperm(PATCHES, generator=generator)[:keep].sort().values for _ in features])
    return Plan(kept, make_propagation(features, kept, GRID, SPECIAL, torch.float32), batch)


def keys_by_hand(plan, count):
    """Places of the keys, one by one, and how often each counts."""
    batch, kept = plan.batch, plan.kept.shape[1]
    frames = len(plan.kept) // batch
    weights, length = plan.propagation.weights.numpy(), SPECIAL + kept
    whole = frames * SPECIAL + PATCHES + (frames - 1) * count >= frames * length
    found = []
    for clip in range(batch):
        places = []
        for frame in range(frames):
            places += [(frame * length + n, 1.0) for n in range(SPECIAL)]
            if frame == 0 or whole:
                patches, weight = range(PATCHES), 1.0
            else:
                period, weight = math.ceil(PATCHES / count), PATCHES / count
                shift = np.float32(frame % period) / np.float32(period)
                patches = [int((np.float32(i) + shift) * np.float32(weight)) for i in range(count)]
            for patch in patches:
                best = int(weights[clip * frames + frame, SPECIAL + patch].argmax())
                places.append((frame * length + SPECIAL + best, weight))
        found.append(places)
    return found


def told(keys, clip):
    """Places and counts of the keys of a clip."""
    if keys.index is None:
        return range(keys.counts.shape[1]), keys.counts[clip].tolist()
    alone, weight = keys.counts
    places = keys.index[clip].tolist()
    return places, [1.0] * alone + [weight] * (len(places) - alone)


def bag(places, weights):
    """What a set of keys is: how often each place counts, whatever their order."""
    total = {}
    for place, weight in zip(places, weights, strict=True):
        total[place] = total.get(place, 0.0) + weight
    return total


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("frames", [1, 2, 7, 30, 96, 200])
@pytest.mark.parametrize("keep", [1, 6, 19])
def test_keys_are_those_of_a_loop(batch, frames, keep):
    plan = some_plan(frames, keep, batch)
    found = few_keys(plan.propagation, batch)
    count = keys_of_frame(frames, keep, FRAMES)
    for clip, wanted in enumerate(keys_by_hand(plan, count)):
        places, counts = told(found, clip)
        assert len(places) == keys_of_clip(frames, SPECIAL, PATCHES, keep)
        # All together stand for all tokens of the clip.
        assert sum(counts) == pytest.approx(frames * (SPECIAL + PATCHES))
        ours, theirs = bag(places, counts), bag(*zip(*wanted, strict=True))
        assert ours.keys() == theirs.keys()
        for place, weight in theirs.items():
            assert ours[place] == pytest.approx(weight)


def test_a_kept_token_stands_for_itself():
    plan = some_plan(30, 6)
    keys = few_keys(plan.propagation).index[0][30 * SPECIAL :][:PATCHES]  # of the first frame
    assert keys[plan.kept[0]].tolist() == [SPECIAL + i for i in range(6)]


def test_longer_clips_have_fewer_keys_a_frame_and_more_in_all():
    patches, kept = 1036, 311
    counts = [keys_of_frame(frames, kept, FRAMES) for frames in range(1, 3001)]
    assert counts == sorted(counts, reverse=True) and counts[23] == kept > counts[24]
    assert all(count <= kept / 4 for count in counts[95:])
    totals = [keys_of_clip(frames, 5, patches, kept) for frames in (1, 24, 96, 300, 1000, 3000)]
    assert totals == sorted(totals) and totals[-1] < 20 * totals[1]
    assert keys_of_frame(10**6, 1, FRAMES) == 1


def test_full_attention_heads_see_all_of_short_clips_and_more_of_long_ones():
    assert full_keys(48, 5, 1036, 1, torch.device("cpu")) is None
    counts = [keys_of_frame(frames, 1036, FRAMES_OF_FULL) for frames in (48, 49, 96, 300, 1000)]
    assert counts == [1036, 1014, 518, 354, 237]
    for frames in (49, 96, 300):
        index, (alone, weight), _ = full_keys(frames, 5, 1036, 2, torch.device("cpu"))
        assert index.shape == (2, keys_of_full(frames, 5, 1036)) and torch.equal(index[0], index[1])
        assert alone == frames * 5 + 1036 and alone + weight * (index.shape[1] - alone) == pytest.approx(
            frames * 1041
        )
        # Special tokens and the first frame come first, each once.
        first = index[0, :alone]
        assert first.unique().numel() == alone
        assert set(range(1041)) <= set(first.tolist())
        assert ((first % 1041 < 5) | (first < 1041)).all()
        # The others are patch tokens of all other frames, no two the same.
        frame, token = index[0, alone:] // 1041, index[0, alone:] % 1041
        assert (token >= 5).all() and index[0].unique().numel() == index.shape[1]
        assert frame.bincount(minlength=frames)[1:].unique().tolist() == [
            keys_of_frame(frames, 1036, FRAMES_OF_FULL)
        ]


def softmax_attention(query, key, value, weights, scale):
    """Attention in float64, each key counting `weights` times."""
    query, key, value, weights = (t.double() for t in (query, key, value, weights))
    logits = scale * query @ key.mT
    parts = weights * (logits - logits.amax(-1, keepdim=True)).exp()
    return parts / parts.sum(-1, keepdim=True) @ value


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("alone", [1, 5, 8])
@pytest.mark.parametrize("weight", [0.5, 1.0, 13.3])
def test_keys_count_several_times(dtype, alone, weight):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 7, 8, generator=generator, dtype=torch.float64).to(dtype)
    key, value = torch.randn(2, 2, 3, 9, 8, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.ones(9, dtype=torch.float64)
    weights[alone:] = weight
    for scale in (None, 0.2):
        found = attention(query, key, value, Repeats(alone, weight), scale)
        assert found.dtype == dtype
        wanted = softmax_attention(query, key, value, weights, 8**-0.5 if scale is None else scale)
        torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_each_key_counts_for_itself():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 7, 8, generator=generator)
    key, value = torch.randn(2, 2, 3, 9, 8, generator=generator)
    counts = 1 + 9 * torch.rand(2, 9, generator=generator)
    found = attention(query, key, value, counts, 0.3)
    for clip, wanted in enumerate(found):
        one = slice(clip, clip + 1)
        by_hand = softmax_attention(query[one], key[one], value[one], counts[clip], 0.3)
        torch.testing.assert_close(wanted[None].double(), by_hand, rtol=1e-5, atol=1e-5)


def test_a_library_is_asked_twice_and_its_answers_joined(monkeypatch):
    """The library is one in name only: what it gives is computed here."""

    def run(query, key, value, scale):
        logits = scale * torch.einsum("blhd,bmhd->bhlm", query, key)
        return torch.einsum("bhlm,bmhd->blhd", logits.softmax(-1), value), logits.logsumexp(-1)

    library = runtime.Library("mine", lambda *inputs: run(*inputs)[0], (torch.float32,), run)
    monkeypatch.setattr(runtime, "library", lambda device: library)
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 9, 8, generator=generator)
    weights = torch.tensor([1.0] * 4 + [6.5] * 5)
    with torch.no_grad():
        found = attention(query, key, value, Repeats(4, 6.5))
    torch.testing.assert_close(
        found.double(), softmax_attention(query, key, value, weights, 8**-0.5), rtol=1e-5, atol=1e-5
    )
    # One that gives no sums is not asked.
    monkeypatch.setattr(runtime, "library", lambda device: library._replace(run_with_sums=None))
    torch.testing.assert_close(attention(query, key, value, Repeats(4, 6.5)), found)


def test_keys_of_a_clip_are_its_own():
    """A batch of two clips gives what each gives alone."""
    plan = some_plan(40, 6, batch=2)
    whole = plan.propagation
    apart = [
        Plan(plan.kept[part], Propagation(whole.index[part], whole.columns[part], 6))
        for part in (slice(40), slice(40, 80))
    ]
    together = joined([plan], 2).keys
    for clip, part in enumerate(apart):
        torch.testing.assert_close(together.index[clip], joined([part], 1).keys.index[0])
    generator = torch.Generator().manual_seed(1)
    query, key, value = torch.randn(3, 2, 3, 40 * (SPECIAL + 6), 4, generator=generator)
    both = together.attend(query, key, value, attention)
    for clip, part in enumerate(apart):
        one = slice(clip, clip + 1)
        alone = joined([part], 1).keys.attend(query[one], key[one], value[one], attention)
        torch.testing.assert_close(both[one], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [(), ((0, 1), (2, 0))])
@torch.inference_mode()
def test_a_block_of_its_own_code_gives_what_an_open_one_gives(heads, monkeypatch):
    model, images = tiny_vggt(), random_images(40)
    weights = with_heads(model, *heads) if heads else None
    accelerate(model, 0.3, weights=weights, min_frames=1)
    closed = model.aggregator(images)[0][-1]
    monkeypatch.setattr("pacevggt_patch.patching.forwards.BlockForward.fits", lambda *_: False)
    torch.testing.assert_close(model.aggregator(images)[0][-1], closed, rtol=1e-3, atol=1e-4)
    # And it is not what all keys would give.
    monkeypatch.setattr(module, "keys_of_frame", lambda frames, tokens, short=None: tokens)
    others = model.aggregator(images)[0][-1]
    assert (others - closed).abs().max() > 1e-3
    remove(model)


def test_other_forms_of_attention_keep_their_keys():
    keys = FewKeys(torch.tensor([[0, 3]]), Repeats(1, 5.0))
    said = []
    few = FewKeysAttention(keys, 3, 1, 6, False, said.append)
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 6, 4, generator=generator)
    mask = torch.rand(1, 1, 6, 6, generator=generator) > 0.3
    mask |= torch.eye(6, dtype=torch.bool)
    others = (
        ((query, key[:, :, :5], value[:, :, :5]), {}),
        (tuple(t.expand(2, -1, -1, -1) for t in (query, key, value)), {}),
    )
    for inputs, options in (((query, key, value), {"attn_mask": mask}), *others):
        with InterceptAttention(few.closed) as mode:
            found = F.scaled_dot_product_attention(*inputs, **options)
        few.check(mode.calls)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(*inputs, **options))
    assert len(said) == 3
    with InterceptAttention(few.closed) as mode:
        found = F.scaled_dot_product_attention(query, key, value, scale=0.1)
    few.check(mode.calls)
    assert len(said) == 3
    wanted = softmax_attention(query, key[:, :, [0, 3]], value[:, :, [0, 3]], torch.tensor([1.0, 5.0]), 0.1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_hosts_own_call_serves_where_no_key_counts_several_times():
    asked = []

    def run(*inputs):
        asked.append(inputs)
        return inputs[0]

    attends = by_host(run, {"scale": 0.5})
    query = torch.ones(1, 1, 2, 4)
    assert attends(query, query, query) is query and len(asked) == 1
    attends(query, query, query, Repeats(1, 2.0))
    assert len(asked) == 1
