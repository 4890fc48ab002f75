"""Heads of global attention that see all tokens: against attention written out, and the stock model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hosts import assert_equal, random_images, tiny_vggt
from safetensors.torch import load_file
from test_dense_frames import regression

from pacevggt_patch import PaceError, PaceWeights, UnsupportedModelError, WeightsError, accelerate, summary
from pacevggt_patch.calibration import full_heads as finding
from pacevggt_patch.method.block_deltas import BlockAdaptation
from pacevggt_patch.method.full_heads import attend
from pacevggt_patch.method.propagation import following
from pacevggt_patch.patching.install import retune
from pacevggt_patch.runtime.attention import InAttention
from pacevggt_patch.training import calibrate

BLOCKS, HEADS = 4, 2  # of the tiny model
ALL = tuple((block, head) for block in range(BLOCKS) for head in range(HEADS))


def with_heads(model, *heads) -> PaceWeights:
    return replace(PaceWeights.new(model, dense_frames=True), matching=tuple(heads))


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attend_by_hand(query, key, value, seeing, followed):
    """One head and one token at a time, in float64; the regression by least squares."""
    batch, heads, tokens, width = query.shape
    per_clip, length = len(followed.index) // batch, tokens * batch // len(followed.index)
    q, k, v, read = (t.double().numpy() for t in (query, key, value, followed.weights))
    out = np.zeros(q.shape)
    kept = read.shape[2]
    for clip in range(batch):
        index = followed.index[clip * per_clip : (clip + 1) * per_clip].numpy()
        rows = (index + length * np.arange(per_clip)[:, None]).reshape(-1)
        known = v[clip].transpose(1, 0, 2).reshape(per_clip, length, -1)  # what all heads read of a token
        few = np.take_along_axis(known, index[..., None], 1)[:, -kept:]
        others = [head for head in range(heads) if head not in seeing]
        values = {}
        for head in range(heads):
            some = np.arange(tokens) if head in seeing else rows
            scores = q[clip, head, some] @ k[clip, head, some].T / np.sqrt(width)
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
                own = known[s, token] - read[clip * per_clip + s, token] @ few[s]
                dense[token] = (
                    read[clip * per_clip + s, token] @ joined[s, -kept:] + slope.double().numpy() @ own
                )
            dense[index[s]] = joined[s]
            for i, head in enumerate(others):
                out[clip, head, s * length : (s + 1) * length] = dense[:, i * width : (i + 1) * width]
    return torch.from_numpy(out)


def slope_by_hand(tokens, values):
    """`regression` of values on tokens, in place of changes; padded to the channels of the tokens."""
    channels, wide = tokens[0].shape[1], values[0].shape[1]
    padded = [F.pad(v, (0, channels - wide)) for v in values]
    return regression(tokens, [t + v for t, v in zip(tokens, padded, strict=True)])[:wide]


@pytest.mark.parametrize("seeing", [(), (1,), (2, 0), (0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("keep", [1, 3])
def test_attention_written_out(seeing, batch, keep):
    generator = torch.Generator().manual_seed(0)
    frames, patches, n, heads, width = 3, 6, 2, 3, 4
    query, key, value = torch.randn(3, batch, heads, frames * (n + patches), width, generator=generator)
    features = torch.randn(batch * frames, patches, 5, generator=generator)
    kept = torch.stack([torch.randperm(patches, generator=generator)[:keep].sort().values for _ in features])
    followed = following(features, kept, (2, 3), n, torch.float32)
    found = attend(query, key, value, seeing, followed, F.scaled_dot_product_attention)
    assert found.dtype == torch.float32 and found.shape == query.shape
    wanted = attend_by_hand(query, key, value, seeing, followed)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("keep_ratio", [0.05, 0.5])
@torch.inference_mode()
def test_if_all_heads_see_all_tokens_it_is_the_stock_model(group, keep_ratio):
    model, images = tiny_vggt(group=group), random_images(3, batch=2)
    stock = model(images)
    accelerate(model, keep_ratio, weights=with_heads(model, *ALL), dense_frames=True)
    found = model(images)
    for name in ("pose_enc", "depth", "depth_conf", "world_points"):
        torch.testing.assert_close(found[name], stock[name], rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_the_more_heads_see_all_tokens_the_nearer_to_the_stock_model():
    model, images = tiny_vggt(), random_images(4)
    stock = model.aggregator(images)[0][3]

    def error(*heads):
        accelerate(model, 0.2, weights=with_heads(model, *heads), dense_frames=True)
        return (model.aggregator(images)[0][3] - stock).norm() / stock.norm()

    errors = [error(), error(*ALL[:4]), error(*ALL[:-1])]
    assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize("group", [1, 2])
@torch.inference_mode()
def test_blocks_without_such_heads_see_the_kept_tokens_alone(group):
    model, images = tiny_vggt(group=group), random_images(3)
    lengths = []
    for block in model.aggregator.global_blocks:
        block.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    accelerate(model, 0.3, weights=with_heads(model, (1, 0)), dense_frames=True)(images)
    few, whole = 3 * 11, 3 * 25
    assert lengths == {1: [few, whole, few, few], 2: [whole, whole, few, few]}[group]


@pytest.mark.parametrize(
    ("heads", "shapes"),
    [
        # (heads, queries) of each attention in global blocks; blocks 0 and 1 run together, as do 2 and 3.
        ([(1, 0)], [(2, 33), (1, 75), (1, 33), (2, 33), (2, 33)]),
        ([(2, 1), (2, 0)], [(2, 33), (2, 33), (2, 75), (2, 33)]),
        ([(0, 1), (3, 1)], [(1, 75), (1, 33), (2, 33), (2, 33), (1, 75), (1, 33)]),
    ],
)
@torch.inference_mode()
def test_blocks_that_run_together_are_told_apart(heads, shapes):
    model, images = tiny_vggt(group=2), random_images(3)
    seen = []

    def look(number, query, key, value, scale):
        seen.append((query.shape[1], query.shape[2]))
        return query, key, value

    accelerate(model, 0.3, weights=with_heads(model, *heads), dense_frames=True)
    with InAttention(look):
        model.aggregator(images)
    assert [shape for shape in seen if shape[1] in (33, 75)] == shapes


def eager(q, k, v, **_):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def masked(q, k, v, **_):
    return F.scaled_dot_product_attention(q, k, v, torch.ones(q.shape[2], q.shape[2], dtype=torch.bool))


def grouped(q, k, v, **_):
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


def in_parts(q, k, v, **_):
    half = q.shape[2] // 2
    return torch.cat(
        [F.scaled_dot_product_attention(part, k, v) for part in (q[:, :, :half], q[:, :, half:])], 2
    )


def twice(q, k, v, **_):
    return (F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(q, k, v)) / 2


NOT_ALL = (
    "global block 1 of this model can't let some heads see all tokens, since its attention {}: pass weights "
)
ONCE = "the global blocks of this model do not call scaled_dot_product_attention once each, so none of their heads"


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (eager, ONCE),
        (twice, ONCE),
        (masked, NOT_ALL.format("has a mask, or shares keys between heads")),
        (grouped, NOT_ALL.format("is not over all tokens of a clip at once")),
        (in_parts, NOT_ALL.format("is not over all tokens of a clip at once")),
    ],
)
@torch.inference_mode()
def test_attention_of_another_make_is_refused(attention, message):
    model, images = tiny_vggt(), random_images(3)
    own = model.aggregator.global_blocks[1].attn

    def forward(x, pos=None):
        qkv = own.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = own.q_norm(qkv[0]), own.k_norm(qkv[1]), qkv[2]
        out = attention(own.rope(q, pos), own.rope(k, pos), v)
        return own.proj(out.transpose(1, 2).flatten(2))

    own.forward = forward
    accelerate(model, 0.3, weights=with_heads(model, (2, 0)), dense_frames=True)
    assert model(images)["depth"].isfinite().all()  # that block sees the kept tokens alone, in its own way
    accelerate(model, 0.3, weights=with_heads(model, (1, 0)), dense_frames=True)
    with pytest.raises(UnsupportedModelError) as error:
        model(images)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("trained", [False, True])
def test_hosts_that_checkpoint_by_themselves(trained):
    """As stock VGGT does in training: what is computed once more is computed with the same heads."""
    model, images = tiny_vggt(), random_images(2)
    weights = with_heads(model, (0, 0), (2, 1))
    if not trained:
        weights.adaptation = BlockAdaptation({})
    accelerate(model, 0.4, weights=weights, dense_frames=True)
    parameters = [model.aggregator.global_blocks[0].attn.qkv.weight, model.aggregator.camera_token]
    found = []
    for training in (False, True):
        model.train(training)
        for module in model.aggregator.patch_embed.modules():
            module.training = False  # it drops at random in training
        loss = model.aggregator(images)[0][3].square().mean()
        found.append(torch.autograd.grad(loss, parameters))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@torch.inference_mode()
def test_tokens_read_as_ever():
    model, images = tiny_vggt(all_layers=True), random_images(3, batch=2)
    weights = with_heads(model, (1, 1), (3, 0))
    tokens, start = accelerate(model, 0.3, weights=weights, dense_frames=True).aggregator(images)
    assert [part.slope is None for _, part in sorted(tokens.parts.items())] == [False, True, False, True]
    depth, _ = model.depth_head(tokens, images=images, patch_start_idx=start)
    poses = model.camera_head(tokens)[-1]
    dense = list(tokens)
    for layer in range(BLOCKS):
        assert dense[layer].shape == (2, 3, 25, 64)
        assert torch.equal(tokens.special_tokens(layer), dense[layer][:, :, :5])
        index = torch.cat([torch.arange(5).expand(2, 3, -1), tokens.kept + 5], -1)
        few = dense[layer].gather(2, index[..., None].expand(-1, -1, -1, 64))
        torch.testing.assert_close(tokens.compact[layer], few)
        some = tokens.select(torch.tensor([2, 0]))
        torch.testing.assert_close(some[layer], dense[layer][:, [2, 0]])
    model = tiny_vggt(all_layers=True)
    torch.testing.assert_close(depth, model.depth_head(dense, images=images, patch_start_idx=start)[0])
    torch.testing.assert_close(poses, model.camera_head(dense)[-1])


@torch.inference_mode()
def test_clips_of_a_batch_are_apart():
    model, images = tiny_vggt(), random_images(3, batch=2)
    accelerate(model, 0.3, weights=with_heads(model, (0, 1), (2, 0)), dense_frames=True)
    together = model.aggregator(images)[0][3]
    for clip in range(2):
        alone = model.aggregator(images[clip : clip + 1])[0][3]
        torch.testing.assert_close(together[clip], alone[0], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_fewer_keys_are_those_of_the_heads_that_see_few():
    model, images = tiny_vggt(), random_images(3)
    seen = []

    def look(number, query, key, value, scale):
        seen.append((query.shape[1], query.shape[2], key.shape[2]))
        return query, key, value

    accelerate(model, 0.5, weights=with_heads(model, (1, 0)), dense_frames=True, global_keys=0.5)
    with InAttention(look):
        model.aggregator(images)
    inside = [shape for shape in seen if shape[1] in (3 * 15, 3 * 25)]
    # Block 1 comes in two parts: one head with all tokens, one with the kept ones and half of them as keys.
    assert inside == [(2, 45, 30), (1, 75, 75), (1, 45, 30), (2, 45, 30), (2, 45, 30)]


@torch.inference_mode()
def test_compiled_and_traced():
    model, images = tiny_vggt(), random_images(3)
    weights = with_heads(model, (1, 0))
    wanted = accelerate(model, 0.3, weights=weights, dense_frames=True, min_frames=1)(images)["depth"]
    whole = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(images)["depth"], wanted)
    compiled = accelerate(model, 0.3, weights=weights, dense_frames=True, compile=True)(images)["depth"]
    torch.testing.assert_close(compiled, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_narrow_models(dtype):
    model, images = tiny_vggt(), random_images(3)
    accelerate(model, 0.3, weights=None, dense_frames=True)
    kept = model.aggregator(images)[0].kept
    accelerate(model, 0.3, weights=with_heads(model, *ALL[:3]), dense_frames=True)
    wanted = model.aggregator(images)[0]
    assert torch.equal(wanted.kept, kept)  # which tokens are kept is another matter
    with torch.autocast("cpu", dtype):
        cast = model.aggregator(images)[0]
    error = (cast[3].float() - wanted[3]).norm() / wanted[3].norm()
    assert torch.equal(cast.kept, kept) and error < 0.1
    narrow = model.to(dtype).aggregator(images.to(dtype))[0]
    assert narrow[3].dtype == dtype and narrow[3].isfinite().all()


def test_gradients_are_the_same_with_checkpointing():
    model, images = tiny_vggt(), random_images(2)
    weights = with_heads(model, (0, 0), (2, 1))
    with torch.no_grad():
        for up in weights.adaptation.up.values():
            up.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    accelerate(model, 0.4, weights=weights, dense_frames=True)
    found = []
    for checkpointing in (False, True):
        retune(model, 0.4, checkpointing=checkpointing)
        weights.adaptation.requires_grad_(True)
        loss = model.aggregator(images)[0][3].square().mean()
        found.append(torch.autograd.grad(loss, list(weights.adaptation.parameters())))
    assert sum(bool(gradient.abs().max() > 0) for gradient in found[0]) > len(found[0]) / 2
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# Finding them


def errors_by_hand(model, images, keep):
    """What each head of each block loses, from queries, keys and values that are looked at in the stock model."""
    aggregator, parts, spread = model.aggregator, [], []
    with InAttention(lambda _, q, k, v, scale: (parts.append((q, k, v)), (q, k, v))[1]):
        handles = [
            block.register_forward_pre_hook(lambda _, args: spread.append(args[0].var((0, 1), False).sum()))
            for block in aggregator.global_blocks
        ]
        aggregator(images)
    for handle in handles:
        handle.remove()
    inside = [part for part in parts if part[0].shape[2] == images.shape[1] * 25]
    grid = (4, 5)
    features = finding.backbone.patch_tokens(aggregator, images)
    kept = finding.token_scores(features, grid, keep)[0].topk(keep, -1).indices.sort(-1).values
    followed = following(features[0], kept, grid, 5, torch.float32)
    rows = []
    for block, (q, k, v), variance in zip(aggregator.global_blocks, inside, spread, strict=True):
        whole = F.scaled_dot_product_attention(q, k, v).double()
        few = attend_by_hand(q, k, v, (), followed)
        row = []
        for head in range(HEADS):
            alone = torch.zeros_like(whole)
            alone[:, head] = (whole - few)[:, head]
            matrix = (block.attn.proj.weight * block.ls1.gamma[:, None]).double()
            added = alone.transpose(1, 2).flatten(2) @ matrix.T
            row.append(added.square().sum(-1).mean() / variance)
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("group", [1, 2])
@torch.no_grad()
def test_errors_of_heads(group, monkeypatch):
    model, images = tiny_vggt(group=group), random_images(4, batch=1)
    heads, errors = finding.find_matching_heads(model, [images])
    assert errors.shape == (BLOCKS, HEADS)
    torch.testing.assert_close(errors.double(), errors_by_hand(model, images, 6), rtol=1e-2, atol=1e-7)
    assert len(heads) <= 1  # a sixth of eight heads is one
    # Nobody attends to what the last block gives.
    order = errors[:-1].flatten().argsort(descending=True).tolist()
    monkeypatch.setattr(finding, "MOST", 3 / 8)
    monkeypatch.setattr(finding, "LEAST_ERROR", 0.0)
    best = sorted((i // HEADS, i % HEADS) for i in order[:3])
    assert finding.find_matching_heads(model, [images[0]])[0] == tuple(best)
    monkeypatch.setattr(finding, "MOST", 1.0)
    assert finding.find_matching_heads(model, [images])[0] == ALL[:-HEADS]
    # Of two clips it is the mean.
    other = random_images(4, seed=5)
    both = finding.find_matching_heads(model, [images, other])[1]
    mean = (errors + finding.find_matching_heads(model, [other])[1]) / 2
    torch.testing.assert_close(both, mean)
    monkeypatch.setattr(finding, "LEAST_ERROR", errors.max().item() * 1.01)
    assert finding.find_matching_heads(model, [images])[0] == ()


def test_calibration_finds_them_and_leaves_the_model_alone(monkeypatch):
    monkeypatch.setattr(finding, "LEAST_ERROR", 0.0)
    model, images = tiny_vggt(), random_images(4)
    with torch.inference_mode():
        before = model(images)
    weights = calibrate(model, [images], PaceWeights.new(model, dense_frames=True))
    assert weights.matching == finding.find_matching_heads(model, [images])[0] and len(weights.matching) == 1
    with torch.inference_mode():
        assert_equal(model(images), before)
        accelerate(model, 0.3, weights=weights, dense_frames=True)(images)
    assert "1 matching head" in str(summary(model))


def test_no_clips_and_other_blocks():
    model = tiny_vggt()
    with pytest.raises(PaceError) as error:
        finding.find_matching_heads(model, [])
    assert str(error.value) == "finding the matching heads needs at least one clip, got none"
    with pytest.raises(PaceError) as error:
        finding.find_matching_heads(model, [random_images(1)])
    assert (
        str(error.value) == "which heads find matches between frames can't be told from a clip of one frame"
    )
    blocks = model.aggregator.global_blocks
    matrix, blocks[2].attn.proj.weight = blocks[2].attn.proj.weight, None
    with pytest.raises(UnsupportedModelError) as error:
        finding.find_matching_heads(model, [random_images(2)])
    assert str(error.value) == (
        "global block 2 has no matrix attn.proj.weight in floating point on its device, so what its heads add to the "
        "tokens can't be told: load the model whole and unquantised"
    )
    assert not any(block._forward_pre_hooks for block in blocks)
    blocks[2].attn.proj.weight = matrix
    for block in blocks:
        block.attn.fused_attn = False
    with pytest.raises(UnsupportedModelError) as error:
        finding.find_matching_heads(model, [random_images(2)])
    assert str(error.value) == (
        "4 global blocks of this model called scaled_dot_product_attention 0 times, so what their heads lose can't be "
        "told"
    )


# In files


def test_saved_and_loaded(tmp_path):
    model, file = tiny_vggt(), tmp_path / "pace.safetensors"
    weights = with_heads(model, (1, 0), (3, 1))
    weights.save(file)
    assert PaceWeights.load(file).matching == ((1, 0), (3, 1))
    assert load_file(file).keys() == weights.modules().state_dict().keys()


@pytest.mark.parametrize("head", [(4, 0), (0, 2), (-1, 0), (0, -1)])
def test_heads_that_the_model_does_not_have(head):
    model = tiny_vggt()
    with pytest.raises(WeightsError) as error:
        accelerate(model, weights=with_heads(model, (0, 0), head), dense_frames=True)
    assert str(error.value) == (
        f"pace weights new let head {head[1]} of global block {head[0]} see all tokens, which this model, of 4 blocks "
        "of 2 heads, does not have"
    )


def test_they_are_for_dense_frames_alone():
    model = tiny_vggt()
    weights = replace(PaceWeights.new(model), matching=((0, 0),))
    with pytest.raises(WeightsError) as error:
        accelerate(model, weights=weights)
    assert str(error.value) == "pace weights new have matching heads, which are for dense_frames=True alone"
