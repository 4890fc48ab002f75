"""Global blocks on the kept tokens, frame blocks on all: against a loop over tokens, and stock VGGT."""

import numpy as np
import pytest
import torch
from hosts import random_deltas, random_images, run, tiny_vggt, with_heads
from hypothesis import given
from hypothesis import strategies as st

from pacevggt_patch import PaceError, accelerate, summary
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.method import propagation as module
from pacevggt_patch.method.propagation import RIDGE, ROWS, Propagation, make_propagation
from pacevggt_patch.method.scoring import token_scores
from pacevggt_patch.runtime import chunks


def regression(tokens, after):
    """Changes of kept tokens on the tokens, less the means of their frames, by numpy in float64: [C, C]."""
    x = torch.cat([t - t.mean(0) for t in tokens]).double().numpy()
    y = torch.cat([(b - a) - (b - a).mean(0) for a, b in zip(tokens, after, strict=True)]).double().numpy()
    level = RIDGE * np.trace(x.T @ x) / x.shape[1]
    if level == 0:  # one token a frame
        return tokens[0].new_zeros(x.shape[1], x.shape[1])
    # Ridge regression is least squares with rows that say 0.
    rows = np.concatenate([x, np.sqrt(level) * np.eye(x.shape[1])])
    slope = np.linalg.lstsq(rows, np.concatenate([y, np.zeros((x.shape[1],) * 2)]), rcond=None)[0]
    return torch.from_numpy(slope.T).to(tokens[0])


def stock_parts(aggregator, images):
    """Special tokens [S, n, C], DINO patch tokens [S, P, C] and positions [n + P, 2], by the stock parts alone."""
    a, (height, width) = aggregator, images.shape[-2:]
    normalised = (images - a._resnet_mean) / a._resnet_std
    features = a.patch_embed(normalised.flatten(0, 1))["x_norm_patchtokens"]
    special = [torch.cat([a.camera_token[0, w], a.register_token[0, w]]) for w in (0, 1)]
    special = torch.stack([special[min(s, 1)] for s in range(len(features))])
    cells = [[y + 1, x + 1] for y in range(height // 14) for x in range(width // 14)]
    return special, features, torch.tensor([[0, 0]] * special.shape[1] + cells)


def stood_for(read, kept):
    """How many patches each kept token [K] stands for: itself, and those that take most from it, by `read` [P, K]."""
    best = read.argmax(-1).tolist()
    for number, patch in enumerate(kept):
        best[patch] = number
    return [float(best.count(number)) for number in range(len(kept))]


def block_by_hand(block, x, where, counts):
    """A global block on tokens [1, L, C], the key of each of which counts so many times [L]."""
    own = block.attn
    q, k, v = own.qkv(block.norm1(x)).unflatten(-1, (3, own.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = own.rope(own.q_norm(q), where), own.rope(own.k_norm(k), where)
    logits = q.double() @ k.double().mT * q.shape[-1] ** -0.5 + torch.tensor(counts).double().log()
    out = (logits.softmax(-1) @ v.double()).to(x.dtype)
    x = x + block.ls1(own.proj(out.transpose(1, 2).flatten(2)))
    return x + block.ls2(block.mlp(block.norm2(x)))


def by_hand(aggregator, images, keep):
    """The forward pass written out with lists, for clips [1, S, 3, H, W]: layer -> [S, n + P, 2C]."""
    frames, n = images.shape[1], int(aggregator.patch_start_idx)
    grid = images.shape[-2] // 14, images.shape[-1] // 14
    special, features, where = stock_parts(aggregator, images)
    order = token_scores(features[None], grid, keep).argsort(dim=-1, descending=True, stable=True)[0]
    kept = [sorted(row[:keep].tolist()) for row in order]
    tokens = [torch.cat([s, f]) for s, f in zip(special, features, strict=True)]
    reads = []
    for s in range(frames):
        unit = torch.nn.functional.normalize(features[s].float(), dim=-1)
        cells = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).float()
        squared = (cells[:, None] - cells[kept[s]][None]).square().sum(-1)
        variance = 0.75**2 * len(unit) / keep
        reads.append((20.0 * unit @ unit[kept[s]].T - squared / (2 * variance)).softmax(-1))
    counts = [c for read, k in zip(reads, kept, strict=True) for c in [1.0] * n + stood_for(read, k)]
    layers = []
    for frame_block, global_block in zip(aggregator.frame_blocks, aggregator.global_blocks, strict=True):
        inside = [frame_block(t[None], pos=where[None])[0] for t in tokens]
        few = [torch.cat([t[:n], t[n:][k]]) for t, k in zip(inside, kept, strict=True)]
        places = torch.cat([torch.cat([where[:n], where[n:][k]]) for k in kept])
        after = block_by_hand(global_block, torch.cat(few)[None], places[None], counts)[0].split(n + keep)
        slope = regression([t[n:] for t in few], [t[n:] for t in after])
        tokens = []
        for before, old, new, k, read in zip(inside, few, after, kept, reads, strict=True):
            read = read.to(before.dtype)
            own = (before[n:] - read @ old[n:]) @ slope.T  # what a token changes by since it differs itself
            patches = before[n:] + read @ (new - old)[n:] + own
            patches[k] = new[n:]
            tokens.append(torch.cat([new[:n], patches]))
        layers.append(torch.stack([torch.cat(pair, -1) for pair in zip(inside, tokens, strict=True)]))
    return layers, kept


@pytest.mark.parametrize(("frames", "keep"), [(1, 6), (3, 1), (3, 6), (3, 19)])
@pytest.mark.parametrize(("dtype", "all_layers"), [(torch.float32, False), (torch.float64, True)])
@torch.inference_mode()
def test_it_is_the_forward_written_out(frames, keep, dtype, all_layers):
    model, images = tiny_vggt(all_layers=all_layers).to(dtype), random_images(frames).to(dtype)
    expected, kept = by_hand(model.aggregator, images, keep)
    accelerate(model, keep / 20, weights=None)
    tokens, start = model.aggregator(images)
    assert start == 5 and isinstance(tokens, list) and len(tokens) == 4
    for layer, wanted in enumerate(expected):
        torch.testing.assert_close(tokens[layer], wanted[None], rtol=1e-4, atol=1e-5)
    assert summary(model).kept[0].tolist() == kept


@torch.inference_mode()
def test_every_clip_of_a_batch_is_the_forward_written_out():
    model, images = tiny_vggt(), random_images(3, batch=3)
    expected = [by_hand(model.aggregator, clip[None], 6) for clip in images]
    tokens, _ = accelerate(model, 0.3, weights=None).aggregator(images)
    for layer in range(4):
        wanted = torch.stack([layers[layer] for layers, _ in expected])
        torch.testing.assert_close(tokens[layer], wanted, rtol=1e-4, atol=1e-5)
    assert summary(model).kept.tolist() == [kept for _, kept in expected]


@given(st.integers(1, 12), st.integers(0, 3), st.data())
def test_dropped_tokens_take_their_change_from_kept_ones(patches, special, data):
    keep = data.draw(st.integers(1, patches))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    kept = torch.stack([torch.randperm(patches, generator=generator)[:keep].sort().values for _ in range(2)])
    before = torch.randn(2, special + patches, 3, generator=generator, dtype=torch.float64)
    features = torch.randn(2, patches, 5, generator=generator)
    made = make_propagation(features, kept, (1, patches), special, torch.float64)
    assert made.index.tolist() == [[*range(special), *(i + special for i in row)] for row in kept.tolist()]
    read = made.weights[:, special:].sum(-1)
    torch.testing.assert_close(read, torch.ones_like(read), rtol=0, atol=1e-5)
    old = made.gather(before)
    flat = before.new_zeros(1, 3, 3)
    assert torch.equal(made.propagate(before, old, flat), before)  # nobody moves
    # If all kept tokens move by the same, so do all others; special ones move alone.
    new = old + torch.tensor([9.0] * special + [2.0] * keep).view(-1, 1)
    expected = before + torch.tensor([9.0] * special + [2.0] * patches).view(-1, 1)
    torch.testing.assert_close(made.propagate(before, new, flat), expected, rtol=0, atol=1e-5)
    assert torch.equal(made.gather(made.propagate(before, new, flat)), new)


def test_special_tokens_are_never_dropped():
    tokens = torch.arange(2 * 6 * 1.0).view(2, 6, 1)
    halves = torch.nn.functional.pad(torch.full((2, 4, 2), 0.5), (0, 0, 2, 0))
    made = Propagation(torch.tensor([[0, 1, 3, 5], [0, 1, 2, 4]]), halves, 2)
    assert made.gather(tokens).flatten(1).tolist() == [[0, 1, 3, 5], [6, 7, 8, 10]]
    after = made.gather(tokens) + torch.tensor([100.0, 200.0, 1.0, 3.0]).view(1, 4, 1)
    alone = tokens.new_zeros(2, 1, 1)
    assert made.propagate(tokens, after, alone)[0, :, 0].tolist() == [100, 201, 2 + 2, 3 + 1, 4 + 2, 5 + 3]


@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
def test_a_change_that_depends_on_the_token_is_found(keep, clips, seed):
    """If kept tokens change by a linear map of themselves and something of the frame, so do all others."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    frames, patches, special, channels = 2, 9, 2, 6  # few enough that all are looked at
    kept = torch.stack(
        [torch.randperm(patches, generator=generator)[:keep].sort().values for _ in range(clips * frames)]
    )
    features = normal(clips * frames, patches, 5).float()
    made = make_propagation(features, kept, (3, 3), special, torch.float64)
    before, maps = normal(clips, frames, special + patches, channels), normal(clips, 1, channels, channels)
    after = (before + before @ maps.mT + normal(clips, frames, 1, channels)).flatten(0, 1)
    before = before.flatten(0, 1)
    few = made.gather(after)
    slope = made.slope(made.gather(before).requires_grad_(True), few, clips)
    assert not slope.requires_grad and slope.shape == (clips, channels, channels)
    tokens, new = (t.view(clips, frames, -1, channels) for t in (made.gather(before), few))
    for clip in range(clips):
        by_lists = regression(list(tokens[clip, :, special:]), list(new[clip, :, special:]))
        torch.testing.assert_close(slope[clip], by_lists)
    exact = made.propagate(before, few, maps[:, 0])
    torch.testing.assert_close(exact[:, special:], after[:, special:], rtol=0, atol=1e-5)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 99))
def test_filled_values_are_a_linear_guess_and_what_it_misses(keep, width, seed):
    """`fill` against sums over kept tokens, one dropped token at a time."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.stack([torch.randperm(9, generator=generator)[:keep].sort().values for _ in range(2)])
    made = make_propagation(torch.randn(2, 9, 5, generator=generator), kept, (3, 3), 1, torch.float64)
    tokens = torch.randn(2, 10, 6, generator=generator, dtype=torch.float64)
    values = torch.randn(2, 1 + keep, width, generator=generator, dtype=torch.float64)
    slope = torch.randn(1, width, 6, generator=generator, dtype=torch.float64)
    found = made.fill(tokens, values, slope)
    for frame in range(2):
        for i in range(10):
            place = made.index[frame].tolist()
            if i in place:
                assert torch.equal(found[frame, i], values[frame, place.index(i)])
                continue
            wanted = slope[0] @ tokens[frame, i]
            for j, number in enumerate(kept[frame].tolist()):
                missed = values[frame, 1 + j] - slope[0] @ tokens[frame, 1 + number]
                wanted = wanted + made.weights[frame, i, j] * missed
            torch.testing.assert_close(found[frame, i], wanted, rtol=1e-5, atol=1e-5)


def test_a_few_frames_tell_the_slope():
    generator = torch.Generator().manual_seed(0)
    kept = torch.arange(4).expand(40, -1)
    made = make_propagation(torch.randn(40, 6, 5, generator=generator), kept, (2, 3), 1, torch.float32)
    before, after = torch.randn(2, 40, 5, 2, generator=generator)
    assert ROWS == 4
    frames = [0, 10]  # of 20 in each clip: 2 of 4 tokens are 4 for each of 2 channels
    found = made.slope(before, after, 2)
    for clip in range(2):
        chosen = [20 * clip + i for i in frames]
        alone = made._replace(index=made.index[chosen], columns=made.columns[chosen])
        torch.testing.assert_close(found[clip], alone.slope(before[chosen], after[chosen], 1)[0])


def test_the_ridge_leaves_a_half_of_a_plain_slope():
    """At the mean eigenvalue, a regression on tokens that vary alike in all directions finds half of what there is."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.linalg.qr(torch.randn(64, 4, generator=generator, dtype=torch.float64)).Q
    tokens = torch.linalg.qr(tokens - tokens.mean(0)).Q  # orthogonal columns of mean 0
    made = make_propagation(torch.randn(1, 64, 5), torch.arange(64)[None], (8, 8), 0, torch.float64)
    maps = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    slope = made.slope(tokens[None], tokens[None] + tokens[None] @ maps.T, 1)[0]
    torch.testing.assert_close(slope, maps / (1 + RIDGE))
    assert RIDGE == 1


@pytest.mark.parametrize(
    ("tokens", "weights"), [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16")]
)
def test_what_all_tokens_share_is_not_rounded_into_them(tokens, weights):
    """Large models have channels of a size that dwarfs all others."""
    narrow = getattr(torch, tokens)
    generator = torch.Generator().manual_seed(0)
    kept = torch.stack([torch.randperm(30, generator=generator)[:12].sort().values for _ in range(4)])
    features = torch.randn(4, 30, 8, generator=generator)
    made = make_propagation(features, kept, (5, 6), 2, getattr(torch, weights))
    before = torch.randn(4, 32, 16, generator=generator)
    before[..., 0] += 1000
    before = before.to(narrow)
    after = made.gather(before) + (0.3 * torch.randn(4, 14, 16, generator=generator)).to(narrow)
    slope = torch.randn(1, 16, 16, generator=generator) / 8
    wide = made._replace(columns=made.columns.double())
    exact = wide.propagate(before.double(), after.double(), slope.double())
    found = made.propagate(before, after, slope)
    assert found.dtype == narrow
    change = (exact - before.double())[..., 1:]
    error = (found.double() - exact)[..., 1:].norm() / change.norm()
    assert error < 0.03


def test_tokens_that_are_the_same_tell_no_slope():
    kept = torch.arange(7).expand(4, -1)
    made = make_propagation(torch.randn(4, 9, 5), kept, (3, 3), 1, torch.float32)
    same = torch.randn(8).expand(4, 8, 8)
    slope = made.slope(same, same + torch.randn(4, 8, 8), 1)
    assert slope.abs().max() < 1e-2
    assert made.slope(torch.zeros(4, 8, 8), torch.ones(4, 8, 8), 1).abs().max() == 0


def test_the_layout_of_tokens_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 6, 5, generator=generator)
    made = make_propagation(features, torch.tensor([[0, 2, 5]] * 3), (2, 3), 1, torch.float32)
    before = torch.randn(7, 3, 4, generator=generator).transpose(0, 1)
    after = torch.randn(3, 4, 4, generator=generator)
    slope = torch.randn(1, 4, 4, generator=generator)
    wanted = made.propagate(before.contiguous(), after, slope)
    assert torch.equal(made.propagate(before, after, slope), wanted)
    assert torch.equal(made.gather(wanted), after)


@torch.inference_mode()
def test_each_block_of_a_group_is_pruned_for_itself():
    """With two frame blocks in a row, then two global ones, against the same written out."""
    model, images = tiny_vggt(group=2, all_layers=True), random_images(3)
    special, features, where = stock_parts(model.aggregator, images)
    kept = token_scores(features[None], (4, 5), 6)[0].topk(6, -1).indices.sort(-1).values
    made = make_propagation(features, kept, (4, 5), 5, torch.float32)
    tokens = torch.cat([special, features], 1)
    read = made.weights[:, 5:]
    counts = [c for r, k in zip(read, kept.tolist(), strict=True) for c in [1.0] * 5 + stood_for(r, k)]
    wanted, places = [], made.gather(where.expand(3, -1, -1).float()).long()
    for first in (0, 2):
        insides = []
        for block in model.aggregator.frame_blocks[first : first + 2]:
            insides.append(tokens := block(tokens, pos=where.expand(3, -1, -1)))
        for inside, block in zip(insides, model.aggregator.global_blocks[first : first + 2], strict=True):
            few = made.gather(tokens)
            after = block_by_hand(block, few.view(1, -1, 32), places.view(1, -1, 2), counts).view(few.shape)
            tokens = made.propagate(tokens, after, made.slope(few, after, 1))
            wanted.append(torch.cat([inside, tokens], -1)[None])
    found, _ = accelerate(model, 0.3, weights=None).aggregator(images)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_narrow_models_are_near_the_wide_one(dtype):
    model, images = tiny_vggt(), random_images(3)
    accelerate(model, 0.3, weights=None)
    tokens, _ = model.aggregator(images)
    kept = summary(model).kept
    narrow, _ = model.to(dtype).aggregator(images.to(dtype))
    assert narrow[3].dtype == dtype
    same = (summary(model).kept == kept).all(-1)  # rounding may keep others
    error = (narrow[3].float() - tokens[3])[same].norm() / tokens[3][same].norm()
    assert same.any() and error < 0.1
    with torch.autocast("cpu", dtype):
        cast, _ = model.float().aggregator(images)
    assert cast[3].isfinite().all()


@pytest.mark.parametrize("heads", [(), ((1, 0), (3, 1)), ((2, 0), (2, 1))])
@pytest.mark.parametrize("compile", [False, True])
@torch.inference_mode()
def test_frames_in_chunks_change_nothing(heads, compile, monkeypatch):
    if compile:
        monkeypatch.setattr("pacevggt_patch.patching.forwards.compiled", lambda function, *_: function)
    model, images = tiny_vggt(), random_images(5, batch=2)
    weights = random_deltas(model)
    weights.full_heads = heads
    accelerate(model, 0.3, weights=weights, compile=compile)
    whole = model(images)
    monkeypatch.setitem(chunks.HIDDEN_BYTES, "cpu", 1)
    monkeypatch.setattr(module, "FRAMES_PER_CHUNK", 4)
    seen, real = [], Propagation._fill
    monkeypatch.setattr(Propagation, "_fill", lambda *args: seen.append(len(args[1])) or real(*args))
    parts = model(images)
    assert max(seen) == 2 * 2  # two frames of each clip
    for key in ("pose_enc", "depth", "world_points"):
        torch.testing.assert_close(parts[key], whole[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("learned", [False, True])
def test_no_frame_block_and_no_embedding_sees_more_frames_than_a_chunk(learned, monkeypatch):
    model, images = tiny_vggt(), random_images(5)
    monkeypatch.setitem(chunks.HIDDEN_BYTES, "cpu", 16 * 25 * 32 * 2)  # two frames
    model.aggregator.patch_embed.register_forward_pre_hook(lambda _, args: args)
    seen = {"embedding": [], "frame": []}
    embed = type(model.aggregator.patch_embed).forward_features
    monkeypatch.setattr(
        type(model.aggregator.patch_embed),
        "forward_features",
        lambda self, x, *a: seen["embedding"].append(len(x)) or embed(self, x, *a),
    )
    expected = run(accelerate(tiny_vggt(), 0.3, weights=None), images)["depth"]
    accelerate(model, 0.3, weights=random_deltas(model, 0.0) if learned else None)
    run(model, images)  # the first time a frame tells what the embedding gives
    seen["embedding"].clear()
    for block in model.aggregator.frame_blocks:
        block.mlp.register_forward_hook(lambda _, args, __: seen["frame"].append(args[0].shape[0]))
    torch.testing.assert_close(run(model, images)["depth"], expected, rtol=1e-4, atol=1e-4)
    assert sum(seen["embedding"]) == 5 and max(seen["embedding"]) <= 2
    assert sum(seen["frame"]) == 4 * 5 and max(seen["frame"]) <= 2


@torch.inference_mode()
def test_frame_blocks_see_all_tokens_and_global_blocks_the_kept_ones():
    model, images = tiny_vggt(), random_images(3)
    seen = {"frame": [], "global": []}
    for kind, lengths in seen.items():
        for block in getattr(model.aggregator, f"{kind}_blocks"):
            block.attn.register_forward_hook(
                lambda _, args, __, lengths=lengths: lengths.append(args[0].shape[:2])
            )
    accelerate(model, 0.3, weights=None)(images)
    assert seen == {"frame": [(3, 25)] * 4, "global": [(1, 3 * 11)] * 4}
    assert "frame attention sees all tokens" in str(summary(model))


@torch.inference_mode()
def test_compiled_blocks_give_the_same(monkeypatch):
    monkeypatch.setattr("pacevggt_patch.runtime.compiling.BACKEND", "eager")
    model, images = tiny_vggt(), random_images(3)
    plain = accelerate(model, 0.3, weights=None)(images)["depth"]
    compiled = accelerate(model, 0.3, weights=None, compile=True)(images)["depth"]
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_blocks_may_be_called_by_hand():
    """Pipelines that walk through the blocks themselves are pruned, too, and one pass is not another's."""
    model, images = tiny_vggt(), random_images(3)
    accelerate(model, 0.3, weights=None)
    wanted = [model.aggregator(clip)[0][3] for clip in (images, random_images(2, seed=1))]
    for clip, expected in zip((images, random_images(2, seed=1)), wanted, strict=True):
        special, features, where = stock_parts(model.aggregator, clip)
        tokens = torch.cat([special, features], 1)
        frames, length = tokens.shape[:2]
        for frame_block, global_block in zip(
            model.aggregator.frame_blocks, model.aggregator.global_blocks, strict=True
        ):
            inside = tokens = frame_block(tokens, pos=where.expand(frames, -1, -1))
            flat = where.repeat(frames, 1)[None]
            tokens = global_block(tokens.reshape(1, -1, 32), pos=flat).view(frames, length, -1)
        torch.testing.assert_close(torch.cat([inside, tokens], -1)[None], expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_all_heads_of_a_global_block_that_see_all_tokens_are_the_stock_block():
    """Nothing but the other blocks is pruned then."""
    model, images = tiny_vggt(), random_images(3)
    special, features, where = stock_parts(model.aggregator, images)
    tokens = torch.cat([special, features], 1)
    inside = model.aggregator.frame_blocks[0](tokens, pos=where.expand(3, -1, -1))
    wanted = model.aggregator.global_blocks[0](inside.view(1, -1, 32), pos=where.repeat(3, 1)[None])
    accelerate(model, 0.3, weights=with_heads(model, (0, 0), (0, 1)))
    found = model.aggregator(images)[0][0][..., 32:]
    torch.testing.assert_close(found.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-4)


def test_images_of_too_many_patches_are_refused():
    model = accelerate(tiny_vggt(), 0.3, weights=None)
    with pytest.raises(PaceError, match="14336"):
        model.aggregator(torch.zeros(1, 1, 3, 14, 14 * 1024))


def test_hosts_tell_their_blocks_in_the_order_in_which_they_run():
    host = find_host(tiny_vggt(group=2))
    assert [(kind, index) for kind, index, _ in host.blocks] == [
        (kind, first + i) for first in (0, 2) for kind in ("frame", "global") for i in (0, 1)
    ]


@pytest.mark.parametrize(
    "keep, special, columns", [(8, 5, 8), (11, 5, 16), (10, 5, 10), (3, 5, 8), (7, 0, 7)]
)
def test_rows_of_the_weights_are_aligned_by_special_tokens(keep, special, columns):
    """Special tokens lend columns of zeros where there are enough of them; what is propagated is the same."""
    generator = torch.Generator().manual_seed(keep)
    features = torch.randn(2, 20, 5, generator=generator)
    kept = torch.stack([torch.randperm(20, generator=generator)[:keep].sort().values for _ in range(2)])
    made = make_propagation(features, kept, (4, 5), special, torch.float64)
    assert made.columns.shape == (2, special + 20, columns)
    assert made.columns[..., : columns - keep].count_nonzero() == 0
    before = torch.randn(2, special + 20, 6, generator=generator, dtype=torch.float64)
    after = torch.randn(2, special + keep, 6, generator=generator, dtype=torch.float64)
    slope = torch.randn(1, 6, 6, generator=generator, dtype=torch.float64)
    exact = made._replace(columns=made.weights)
    torch.testing.assert_close(made.propagate(before, after, slope), exact.propagate(before, after, slope))


def test_infinite_special_tokens_stay_where_they_are():
    """In float16 a large register token is infinite: it lends a column, and nothing else."""
    features = torch.randn(2, 20, 5, generator=torch.Generator().manual_seed(0))
    made = make_propagation(features, torch.tensor([[1, 4, 9], [0, 7, 19]]), (4, 5), 5, torch.float16)
    assert made.columns.shape[2] == 8
    before, after = torch.randn(2, 25, 6), torch.randn(2, 8, 6)
    before[:, :5], after[:, :5] = 1e5, 1e6  # more than float16 holds
    moved = made.propagate(before, after, torch.eye(6)[None])
    assert moved.isfinite().all() and torch.equal(moved[:, :5], after[:, :5])
