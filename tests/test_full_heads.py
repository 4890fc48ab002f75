"""Heads of global attention that see all tokens: against attention written out, and the stock model."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hosts import TORCH, assert_equal, random_deltas, random_images, run, tiny_vggt, with_heads
from safetensors.torch import load_file
from test_global_pruning import regression, stock_parts, stood_for

from pacevggt_patch import (
    PaceError,
    PaceWeights,
    UnsupportedModelError,
    WeightsError,
    accelerate,
    calibrate,
    is_accelerated,
    summary,
)
from pacevggt_patch.calibration.full_heads import find_full_heads
from pacevggt_patch.config import PaceConfig
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.method import few_keys
from pacevggt_patch.method import full_heads as module
from pacevggt_patch.method.full_heads import LEAST_ERROR, MOST, attend, choose_full_heads
from pacevggt_patch.method.global_pruning import Plan
from pacevggt_patch.method.propagation import make_propagation
from pacevggt_patch.method.scoring import token_scores
from pacevggt_patch.patching.install import install, remove
from pacevggt_patch.runtime.attention import InterceptAttention

BLOCKS, HEADS = 4, 2  # of the tiny model
ALL = tuple((block, head) for block in range(BLOCKS) for head in range(HEADS))


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attend_by_hand(query, key, value, seeing, propagation, counted=False, of_full=None):
    """One head and one token at a time, in float64; the regression by least squares.

    With `counted` the key of a kept token counts as often as there are patches that it stands for. `of_full` says how
    often each key counts for heads that see all.
    """
    batch, heads, tokens, width = query.shape
    per_clip, length = len(propagation.index) // batch, tokens * batch // len(propagation.index)
    q, k, v, read = (t.double().numpy() for t in (query, key, value, propagation.weights))
    out = np.zeros(q.shape)
    kept = read.shape[2]
    for clip in range(batch):
        index = propagation.index[clip * per_clip : (clip + 1) * per_clip].numpy()
        rows = (index + length * np.arange(per_clip)[:, None]).reshape(-1)
        counts = []
        for s, places in enumerate(index):
            n = len(places) - kept
            weights = propagation.weights[clip * per_clip + s, n:]
            counts += [1.0] * n + stood_for(weights, (places[n:] - n).tolist())
        known = v[clip].transpose(1, 0, 2).reshape(per_clip, length, -1)  # what all heads read of a token
        few = np.take_along_axis(known, index[..., None], 1)[:, -kept:]
        others = [head for head in range(heads) if head not in seeing]
        values = {}
        for head in range(heads):
            some = np.arange(tokens) if head in seeing else rows
            scores = q[clip, head, some] @ k[clip, head, some].T / np.sqrt(width)
            if counted and head not in seeing:
                scores += np.log(counts)
            if of_full is not None and head in seeing:
                with np.errstate(divide="ignore"):  # no key at all
                    scores += np.log(of_full)
            values[head] = softmax(scores) @ v[clip, head, some]
            if head in seeing:
                out[clip, head] = values[head]
        if not others:
            continue
        joined = np.concatenate([values[head] for head in others], -1).reshape(per_clip, len(index[0]), -1)
        old = [torch.from_numpy(few[s]) for s in range(per_clip)]
        slope = slope_by_hand(old, [torch.from_numpy(joined[s, -kept:]) for s in range(per_clip)])
        for s in range(per_clip):
            dense = np.zeros((length, joined.shape[-1]))
            for token in range(length):
                weights = read[clip * per_clip + s, token]
                own = known[s, token] - weights @ few[s]
                dense[token] = weights @ joined[s, -kept:] + slope.double().numpy() @ own
            dense[index[s]] = joined[s]
            for i, head in enumerate(others):
                out[clip, head, s * length : (s + 1) * length] = dense[:, i * width : (i + 1) * width]
    return torch.from_numpy(out)


def slope_by_hand(tokens, values):
    """`regression` of values on tokens, in place of changes; padded to the channels of the tokens."""
    channels, wide = tokens[0].shape[1], values[0].shape[1]
    padded = [F.pad(v, (0, channels - wide)) for v in values]
    return regression(tokens, [t + v for t, v in zip(tokens, padded, strict=True)])[:wide]


def some_plan(batch, frames, patches, n, keep, grid, generator):
    features = torch.randn(batch * frames, patches, 5, generator=generator)
    kept = torch.stack([torch.randperm(patches, generator=generator)[:keep].sort().values for _ in features])
    return Plan(kept, make_propagation(features, kept, grid, n, torch.float32), batch)


@pytest.mark.parametrize("seeing", [(), (1,), (2, 0), (0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("keep", [1, 3])
def test_attention_is_that_written_out(seeing, batch, keep):
    generator = torch.Generator().manual_seed(0)
    frames, patches, n, heads, width = 3, 6, 2, 3, 4
    query, key, value = torch.randn(3, batch, heads, frames * (n + patches), width, generator=generator)
    plan = some_plan(batch, frames, patches, n, keep, (2, 3), generator)
    found = attend(query, key, value, seeing, plan, F.scaled_dot_product_attention)
    assert found.dtype == torch.float32 and found.shape == query.shape
    wanted = attend_by_hand(query, key, value, seeing, plan.propagation)
    if sorted(seeing) == [0, 1, 2]:
        wanted = F.scaled_dot_product_attention(query, key, value).double()
        found = attend(query, key, value, sorted(seeing), plan, F.scaled_dot_product_attention)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)


def global_block_by_hand(block, x, where, full, plan, of_full):
    """A stock global block on all tokens of clips [B, S * (n + P), C], its attention head by head as above."""
    own = block.attn
    qkv = own.qkv(block.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    q, k = (own.rope(norm(t), where) for norm, t in ((own.q_norm, qkv[0]), (own.k_norm, qkv[1])))
    out = attend_by_hand(q, k, qkv[2], full, plan.propagation, counted=True, of_full=of_full).to(x.dtype)
    x = x + block.ls1(own.proj(out.transpose(1, 2).flatten(2)))
    return x + block.ls2(block.mlp(block.norm2(x)))


def keys_of_full_by_hand(frames, n, patches, count):
    """How often each token of a clip is a key of a full-attention head, `count` being sampled of a frame."""
    weights = np.ones((frames, n + patches))
    period = math.ceil(patches / count)
    for frame in range(1, frames):
        weights[frame, n:] = 0
        for i in range(count):
            weights[frame, n + int((i + frame % period / period) * patches / count)] += patches / count
    return weights.flatten()


@pytest.mark.parametrize("short, count", [(48, 20), (1, 6), (2, 13)])
@pytest.mark.parametrize("way", ["open", "own code"])
@torch.no_grad()
def test_a_block_with_such_heads_is_the_stock_block_with_that_attention(way, short, count, monkeypatch):
    """Also with the keys that they have in clips longer than `short` frames."""
    monkeypatch.setattr(few_keys, "FRAMES_OF_FULL", short)
    model, images = tiny_vggt(), random_images(3, batch=2)
    parts = [stock_parts(model.aggregator, clip[None]) for clip in images]
    tokens, where = torch.cat([torch.cat(part[:2], 1) for part in parts]), parts[0][2]
    features = torch.cat([part[1] for part in parts])
    kept = token_scores(features[None], (4, 5), 6)[0].topk(6, -1).indices.sort(-1).values
    plan = Plan(kept, make_propagation(features, kept, (4, 5), 5, torch.float32), 2)
    inside = model.aggregator.frame_blocks[0](tokens, pos=where.expand(6, -1, -1))
    flat, places = inside.view(2, -1, 32), where.repeat(3, 1).expand(2, -1, -1)
    weights = keys_of_full_by_hand(3, 5, 20, count)
    assert weights.sum() == pytest.approx(3 * 25)
    wanted = global_block_by_hand(model.aggregator.global_blocks[0], flat, places, (1,), plan, weights)
    if way == "own code":
        monkeypatch.setattr("pacevggt_patch.patching.forwards.BlockForward.fits", lambda *_: False)
    found = accelerate(model, 0.3, weights=with_heads(model, (0, 1))).aggregator(images)[0][0][..., 32:]
    torch.testing.assert_close(found.reshape(wanted.shape), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("keep_ratio", [0.05, 0.5])
@torch.inference_mode()
def test_if_all_heads_see_all_tokens_it_is_the_stock_model(group, keep_ratio):
    model, images = tiny_vggt(group=group), random_images(3, batch=2)
    stock = model(images)
    accelerate(model, keep_ratio, weights=with_heads(model, *ALL))
    found = model(images)
    for name in ("pose_enc", "depth", "depth_conf", "world_points"):
        torch.testing.assert_close(found[name], stock[name], rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_the_more_heads_see_all_tokens_the_nearer_to_the_stock_model():
    model, images = tiny_vggt(), random_images(4)
    stock = model.aggregator(images)[0][3]

    def error(*heads):
        accelerate(model, 0.2, weights=with_heads(model, *heads))
        return (model.aggregator(images)[0][3] - stock).norm() / stock.norm()

    errors = [error(), error(*ALL[:4]), error(*ALL[:-1])]
    assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(
    ("heads", "shapes"),
    [
        # (heads, queries) of each attention in global blocks.
        ([(1, 0)], [(2, 33), (1, 75), (1, 33), (2, 33), (2, 33)]),
        ([(2, 1), (2, 0)], [(2, 33), (2, 33), (2, 75), (2, 33)]),
        ([(0, 1), (3, 1)], [(1, 75), (1, 33), (2, 33), (2, 33), (1, 75), (1, 33)]),
    ],
)
@pytest.mark.parametrize("way", ["open", "own code"])
@torch.inference_mode()
def test_no_other_head_sees_more_than_the_kept_tokens(heads, shapes, group, way, monkeypatch):
    if way == "own code":
        monkeypatch.setattr("pacevggt_patch.patching.forwards.BlockForward.fits", lambda *_: False)
    model, images = tiny_vggt(group=group), random_images(3)
    seen = []
    accelerate(model, 0.3, weights=with_heads(model, *heads))
    with InterceptAttention(lambda run, q, k, v, _: (seen.append(tuple(q.shape[1:3])), run(q, k, v))[1]):
        model.aggregator(images)
    assert [shape for shape in seen if shape[1] in (33, 75)] == shapes


# Blocks of another make


def eager(q, k, v, **_):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def masked(q, k, v, **_):
    return F.scaled_dot_product_attention(q, k, v, torch.ones(q.shape[2], q.shape[2], dtype=torch.bool))


def grouped(q, k, v, **_):
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


def in_parts(q, k, v, **_):
    half = q.shape[2] // 2
    parts = (q[:, :, :half], q[:, :, half:])
    return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in parts], 2)


def twice(q, k, v, **_):
    return (F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(q, k, v)) / 2


def with_attention(model, number: int, attention) -> None:
    """Another attention in one global block, on the class of it, as forks have it."""
    own = model.aggregator.global_blocks[number].attn

    def forward(self, x, pos=None):
        qkv = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = self.q_norm(qkv[0]), self.k_norm(qkv[1]), qkv[2]
        out = attention(self.rope(q, pos), self.rope(k, pos), v)
        return self.proj(out.transpose(1, 2).flatten(2))

    own.__class__ = type("Other", (type(own),), {"forward": forward})


GROUPED = pytest.mark.skipif(TORCH < (2, 5), reason="torch has no enable_gqa before 2.5")


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (eager, "global block 1 calls scaled_dot_product_attention 0 times"),
        (twice, "global block 1 calls scaled_dot_product_attention 2 times"),
        (masked, "global block 1 has a mask"),
        pytest.param(grouped, "global block 1 .* not over all tokens head by head", marks=GROUPED),
        (in_parts, "global block 1 .* not over all tokens head by head"),
    ],
)
@torch.inference_mode()
def test_attention_of_another_make_is_refused(attention, message, monkeypatch):
    """Where its outputs are those of stock, the block runs by functions of ours; here it shall not."""
    monkeypatch.setattr("pacevggt_patch.patching.forwards.BlockForward.fits", lambda *_: False)
    model, images = tiny_vggt(), random_images(3)
    with_attention(model, 1, attention)
    accelerate(model, 0.3, weights=with_heads(model, (2, 0)))
    assert model(images)["depth"].isfinite().all()  # that block sees the kept tokens alone, in its own way
    with pytest.raises(UnsupportedModelError, match=message):
        accelerate(model, 0.3, weights=with_heads(model, (1, 0)))


# Gradients, dtypes


@pytest.mark.parametrize("deltas", [0.0, 0.05])
def test_gradients_are_those_of_the_blocks_own_code(deltas, monkeypatch):
    """By the functions of `hosts.blocks`, and by the module's own forward with its attention intercepted."""
    model, images = tiny_vggt(), random_images(2)
    weights = replace(random_deltas(model, deltas), full_heads=((0, 0), (2, 1)))
    accelerate(model, 0.4, weights=weights if deltas else replace(weights, block_deltas=None))
    parameters = [model.aggregator.global_blocks[0].attn.qkv.weight, model.aggregator.camera_token]
    found = []
    for fits in (True, False):
        if not fits:
            monkeypatch.setattr("pacevggt_patch.patching.forwards.BlockForward.fits", lambda *_: False)
        loss = model.aggregator(images)[0][3].square().mean()
        found.append(torch.autograd.grad(loss, parameters))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@torch.inference_mode()
def test_a_clip_does_not_depend_on_its_batch():
    model, images = tiny_vggt(), random_images(3, batch=2)
    accelerate(model, 0.3, weights=with_heads(model, (0, 1), (2, 0)))
    together = model.aggregator(images)[0][3]
    for clip in range(2):
        alone = model.aggregator(images[clip : clip + 1])[0][3]
        torch.testing.assert_close(together[clip], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_narrow_models_are_near_the_wide_one(dtype):
    model, images = tiny_vggt(), random_images(3)
    accelerate(model, 0.3, weights=with_heads(model, *ALL[:3]))
    wanted = model.aggregator(images)[0]
    kept = summary(model).kept
    with torch.autocast("cpu", dtype):
        cast = model.aggregator(images)[0]
    same = (summary(model).kept == kept).all(-1)  # rounding may keep others
    error = (cast[3].float() - wanted[3])[same].norm() / wanted[3][same].norm()
    assert same.any() and error < 0.1
    narrow = model.to(dtype).aggregator(images.to(dtype))[0]
    assert narrow[3].dtype == dtype and narrow[3].isfinite().all()


# Finding them


def errors_by_hand(model, images, keep):
    """What each head of each block loses, from queries, keys and values that are looked at in the stock model."""
    aggregator, parts, spread = model.aggregator, [], []
    handles = [
        block.register_forward_pre_hook(lambda _, args: spread.append(args[0].var((0, 1), False).sum()))
        for block in aggregator.global_blocks
    ]
    with InterceptAttention(lambda run, q, k, v, _: (parts.append((q, k, v)), run(q, k, v))[1]):
        aggregator(images)
    for handle in handles:
        handle.remove()
    inside = [part for part in parts if part[0].shape[2] == images.shape[1] * 25]
    features = stock_parts(aggregator, images)[1]
    kept = token_scores(features[None], (4, 5), keep)[0].topk(keep, -1).indices.sort(-1).values
    made = make_propagation(features, kept, (4, 5), 5, torch.float32)
    rows = []
    for block, (q, k, v), variance in zip(aggregator.global_blocks, inside, spread, strict=True):
        whole = F.scaled_dot_product_attention(q, k, v).double()
        few = attend_by_hand(q, k, v, (), made, counted=True)
        row = []
        for head in range(HEADS):
            alone = torch.zeros_like(whole)
            alone[:, head] = (whole - few)[:, head]
            matrix = (block.attn.proj.weight * block.ls1.gamma[:, None]).double()
            added = alone.transpose(1, 2).flatten(2) @ matrix.T
            row.append(added.square().sum(-1).mean() / variance)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def found_heads(model, clips):
    """`find_full_heads` of a stock model."""
    install(model, find_host(model), PaceConfig(mode="global", min_frames=1), None)
    try:
        return find_full_heads(model, clips)
    finally:
        remove(model)


@pytest.mark.parametrize("group", [1, 2])
@torch.no_grad()
def test_errors_of_heads_are_those_written_out(group):
    model, images = tiny_vggt(group=group), random_images(4, batch=1)
    heads, errors = found_heads(model, [images])
    assert errors.shape == (BLOCKS, HEADS)
    torch.testing.assert_close(errors.double(), errors_by_hand(model, images, 6), rtol=1e-2, atol=1e-7)
    assert heads == choose_full_heads(errors)
    # Of two clips it is the mean.
    other = random_images(4, seed=5)
    both = found_heads(model, [images, other])[1]
    torch.testing.assert_close(both, (errors + found_heads(model, [other])[1]) / 2)


def test_the_heads_with_the_largest_errors_are_chosen():
    """Those above LEAST_ERROR, a sixth of all at most, none of the last block: nobody attends to what it gives."""
    errors = torch.zeros(6, 4)
    assert choose_full_heads(errors) == ()
    errors[1, 2], errors[3, 0], errors[5, 1] = 1.01 * LEAST_ERROR, 0.5, 0.9
    errors[2, 2] = 0.99 * LEAST_ERROR
    assert choose_full_heads(errors) == ((1, 2), (3, 0))
    errors[:4] = torch.arange(16.0).view(4, 4) + 1
    assert int(MOST * 24) == 4 and choose_full_heads(errors) == ((3, 0), (3, 1), (3, 2), (3, 3))
    assert choose_full_heads(torch.ones(2, 2)) in (((0, 0),), ((0, 1),))  # one where a sixth is less than one
    assert choose_full_heads(torch.ones(1, 4)) == ()


@torch.no_grad()
def test_calibration_finds_them_and_leaves_the_model_alone(monkeypatch):
    monkeypatch.setattr(module, "LEAST_ERROR", 0.0)
    model, images = tiny_vggt().train(), random_images(4)
    for part in model.aggregator.patch_embed.modules():
        part.training = False
    flags = [m.training for m in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = calibrate(model, images)
    assert not is_accelerated(model) and [m.training for m in model.modules()] == flags
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert weights.mode == "global" and len(weights.full_heads) == 1
    assert weights.full_heads == found_heads(model.eval(), [images])[0]
    assert not len(list(weights.modules().parameters()))
    accelerate(model, 0.3, weights=weights)(images)
    assert "1 full-attention head;" in str(summary(model))


@torch.no_grad()
def test_calibration_takes_clips_in_all_shapes(monkeypatch):
    monkeypatch.setattr(module, "LEAST_ERROR", 0.0)
    model, images = tiny_vggt(), random_images(4)
    wanted = calibrate(model, images).full_heads
    seen = []

    def call(images):
        seen.append(images.shape)
        return model(images)

    for clips in (images[0], [images[0]], iter([images, images])):
        assert calibrate(model, clips, run=call).full_heads == wanted
    assert seen == [(1, 4, 3, 56, 70)] * 4


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ([], "at least one clip"),
        ([random_images(1)], "a clip of one frame: give two or more"),
        ([torch.rand(3, 56, 70)], "clips must be images"),
        (["clip"], "clips must be images"),
        ([random_images(2, height=50)], "multiples of 14"),
    ],
)
def test_clips_that_tell_nothing_are_refused(clips, message):
    model = tiny_vggt()
    with pytest.raises(PaceError, match=message):
        calibrate(model, clips)
    assert not is_accelerated(model)


def test_blocks_whose_heads_can_not_be_told_are_refused():
    model = tiny_vggt()
    blocks = model.aggregator.global_blocks
    with pytest.raises(PaceError, match="mode"):
        calibrate(model, random_images(2), mode="dense")
    for block in blocks:
        block.attn.fused_attn = False
    with pytest.raises(PaceError, match="global block 0 calls scaled_dot_product_attention 0 times"):
        calibrate(model, random_images(2))
    for block in blocks:
        block.attn.fused_attn = True
    blocks[2].attn.proj.weight.data = blocks[2].attn.proj.weight.data.double()
    with pytest.raises(Exception, match="dtype|global block 2"):
        calibrate(model, random_images(2))
    assert not is_accelerated(model)
    assert not any(block._forward_pre_hooks or "forward" in block.__dict__ for block in blocks)
    accelerated = accelerate(tiny_vggt(), weights=None)
    with pytest.raises(PaceError, match="accelerated already"):
        calibrate(accelerated, random_images(2))


# In files


def test_saved_heads_are_loaded(tmp_path):
    model, file = tiny_vggt(), tmp_path / "pace.safetensors"
    weights = with_heads(model, (1, 0), (3, 1))
    weights.save(file)
    loaded = PaceWeights.load(file)
    assert loaded.full_heads == ((1, 0), (3, 1))
    assert load_file(file).keys() == weights.modules().state_dict().keys()
    images = random_images()
    wanted = run(accelerate(model, 0.3, weights=weights), images)
    assert_equal(run(accelerate(model, 0.3, weights=file), images), wanted)


@pytest.mark.parametrize("head", [(4, 0), (0, 2), (-1, 0), (0, -1)])
def test_heads_that_the_model_does_not_have_are_refused(head):
    model = tiny_vggt()
    with pytest.raises(
        WeightsError, match=f"head {head[1]} of global block {head[0]} .* of 4 blocks of 2 heads"
    ):
        accelerate(model, weights=with_heads(model, (0, 0), head))
