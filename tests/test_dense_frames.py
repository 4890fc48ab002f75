"""Frame blocks on all patch tokens, global blocks on the kept ones: against a loop over tokens, and stock VGGT."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hosts import assert_equal, random_adaptation, random_images, tiny_vggt
from hypothesis import given
from hypothesis import strategies as st

from pacevggt_patch import PaceError, PaceWeights, WeightsError, accelerate, remove, summary
from pacevggt_patch.hosts import vggt as backbone
from pacevggt_patch.method.propagation import RIDGE, ROWS, Following, following
from pacevggt_patch.method.restored_tokens import FollowedTokens
from pacevggt_patch.method.scoring import token_scores
from pacevggt_patch.patching.install import retune
from pacevggt_patch.planning.break_even import saved_flops


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


def by_hand(aggregator, images, keep, weights=None):
    """The forward pass written out with lists, for clips [1, S, 3, H, W]: layer -> [S, n + P, 2C]."""
    frames, n = images.shape[1], int(aggregator.patch_start_idx)
    grid = images.shape[-2] // 14, images.shape[-1] // 14
    features = backbone.patch_tokens(aggregator, images)
    order = token_scores(features, grid, keep).argsort(dim=-1, descending=True, stable=True)[0]
    kept = [sorted(row[:keep].tolist()) for row in order]
    places = backbone.rope_positions(aggregator, grid, images.device)
    origin = places.new_zeros(n, 2)
    tokens = [
        torch.cat([s, f])
        for s, f in zip(backbone.special_tokens(aggregator, 1, frames)[0], features[0], strict=True)
    ]
    reads = []
    for s in range(frames):
        unit = torch.nn.functional.normalize(features[0, s].float(), dim=-1)
        cells = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).float()
        squared = (cells[:, None] - cells[kept[s]][None]).square().sum(-1)
        variance = 0.75**2 * len(unit) / keep
        reads.append((20.0 * unit @ unit[kept[s]].T - squared / (2 * variance)).softmax(-1))
    layers = []
    for frame_block, global_block in zip(aggregator.frame_blocks, aggregator.global_blocks, strict=True):
        inside = [frame_block(t[None], pos=torch.cat([origin, places])[None])[0] for t in tokens]
        few = [torch.cat([t[:n], t[n:][k]]) for t, k in zip(inside, kept, strict=True)]
        where = torch.cat([torch.cat([origin, places[k]]) for k in kept])
        after = global_block(torch.cat(few)[None], pos=where[None])[0].split(n + keep)
        slope = regression([t[n:] for t in few], [t[n:] for t in after])
        tokens = []
        for before, old, new, k, read in zip(inside, few, after, kept, reads, strict=True):
            read = read.to(before.dtype)
            own = (before[n:] - read @ old[n:]) @ slope.T  # what a token changes by since it differs itself
            patches = before[n:] + read @ (new - old)[n:] + own
            patches[k] = new[n:]
            tokens.append(torch.cat([new[:n], patches]))
        layers.append(torch.stack([torch.cat(pair, -1) for pair in zip(inside, tokens, strict=True)]))
    return layers


@pytest.mark.parametrize(("frames", "keep"), [(1, 6), (3, 1), (3, 6), (3, 19)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.inference_mode()
def test_it_is_the_forward_written_out(frames, keep, dtype):
    model, images = tiny_vggt().to(dtype), random_images(frames).to(dtype)
    expected = by_hand(model.aggregator, images, keep)
    accelerate(model, keep / 20, weights=None, dense_frames=True)
    tokens, start = model.aggregator(images)
    assert start == 5 and isinstance(tokens, FollowedTokens) and len(tokens) == 4
    for layer, wanted in enumerate(expected):
        torch.testing.assert_close(tokens[layer], wanted[None], rtol=1e-4, atol=1e-5)


@given(st.integers(1, 12), st.integers(0, 3), st.data())
def test_tokens_follow(patches, special, data):
    keep = data.draw(st.integers(1, patches))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    kept = torch.stack([torch.randperm(patches, generator=generator)[:keep].sort().values for _ in range(2)])
    before = torch.randn(2, special + patches, 3, generator=generator, dtype=torch.float64)
    features = torch.randn(2, patches, 5, generator=generator)
    followed = following(features, kept, (1, patches), special, torch.float64)
    assert followed.index.tolist() == [
        [*range(special), *(i + special for i in row)] for row in kept.tolist()
    ]
    read = followed.weights[:, special:].sum(-1)
    torch.testing.assert_close(read, torch.ones_like(read), rtol=0, atol=1e-5)
    old = followed.compact(before)
    flat = before.new_zeros(1, 3, 3)
    assert torch.equal(followed.follow(before, old, flat), before)  # nobody moves
    # If all kept tokens move by the same, so do all that follow; special ones move alone.
    new = old + torch.tensor([9.0] * special + [2.0] * keep).view(-1, 1)
    expected = before + torch.tensor([9.0] * special + [2.0] * patches).view(-1, 1)
    torch.testing.assert_close(followed.follow(before, new, flat), expected, rtol=0, atol=1e-5)
    assert torch.equal(followed.compact(followed.follow(before, new, flat)), new)


def test_special_tokens_are_never_dropped():
    tokens = torch.arange(2 * 6 * 1.0).view(2, 6, 1)
    halves = torch.nn.functional.pad(torch.full((2, 4, 2), 0.5), (0, 0, 2, 0))
    followed = Following(torch.tensor([[0, 1, 3, 5], [0, 1, 2, 4]]), halves)
    assert followed.compact(tokens).flatten(1).tolist() == [[0, 1, 3, 5], [6, 7, 8, 10]]
    after = followed.compact(tokens) + torch.tensor([100.0, 200.0, 1.0, 3.0]).view(1, 4, 1)
    alone = tokens.new_zeros(2, 1, 1)
    assert followed.follow(tokens, after, alone)[0, :, 0].tolist() == [100, 201, 2 + 2, 3 + 1, 4 + 2, 5 + 3]


@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
def test_a_change_that_depends_on_the_token_is_found(keep, clips, seed):
    """If kept tokens change by a linear map of themselves and something of the frame, so do all that follow."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    frames, patches, special, channels = 2, 9, 2, 6  # few enough that all are looked at
    kept = torch.stack(
        [torch.randperm(patches, generator=generator)[:keep].sort().values for _ in range(clips * frames)]
    )
    features = normal(clips * frames, patches, 5).float()
    followed = following(features, kept, (3, 3), special, torch.float64)
    before, maps = normal(clips, frames, special + patches, channels), normal(clips, 1, channels, channels)
    after = (before + before @ maps.mT + normal(clips, frames, 1, channels)).flatten(0, 1)
    before = before.flatten(0, 1)
    few = followed.compact(after)
    slope = followed.slope(followed.compact(before).requires_grad_(True), few, clips)
    assert not slope.requires_grad and slope.shape == (clips, channels, channels)
    tokens, new = (t.view(clips, frames, -1, channels) for t in (followed.compact(before), few))
    for clip in range(clips):
        by_lists = regression(list(tokens[clip, :, special:]), list(new[clip, :, special:]))
        torch.testing.assert_close(slope[clip], by_lists)
    exact = followed.follow(before, few, maps[:, 0])
    torch.testing.assert_close(exact[:, special:], after[:, special:], rtol=0, atol=1e-5)


def test_a_few_frames_tell_the_slope():
    generator = torch.Generator().manual_seed(0)
    kept = torch.arange(4).expand(40, -1)
    followed = following(torch.randn(40, 6, 5, generator=generator), kept, (2, 3), 1, torch.float32)
    before, after = torch.randn(2, 40, 5, 2, generator=generator)
    assert ROWS == 4
    frames = [0, 10]  # of 20 in each clip: 2 of 4 tokens are 4 for each of 2 channels
    found = followed.slope(before, after, 2)
    for clip in range(2):
        chosen = [20 * clip + i for i in frames]
        alone = followed._replace(index=followed.index[chosen], weights=followed.weights[chosen])
        torch.testing.assert_close(found[clip], alone.slope(before[chosen], after[chosen], 1)[0])


@pytest.mark.parametrize(
    ("tokens", "weights"), [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16")]
)
def test_what_all_tokens_share_is_not_rounded_into_them(tokens, weights):
    """Large models have channels of a size that dwarfs all others."""
    narrow = getattr(torch, tokens)
    generator = torch.Generator().manual_seed(0)
    kept = torch.stack([torch.randperm(30, generator=generator)[:12].sort().values for _ in range(4)])
    followed = following(torch.randn(4, 30, 8, generator=generator), kept, (5, 6), 2, getattr(torch, weights))
    before = torch.randn(4, 32, 16, generator=generator)
    before[..., 0] += 1000
    before = before.to(narrow)
    after = followed.compact(before) + (0.3 * torch.randn(4, 14, 16, generator=generator)).to(narrow)
    slope = torch.randn(1, 16, 16, generator=generator) / 8
    exact = Following(followed.index, followed.weights.double()).follow(
        before.double(), after.double(), slope.double()
    )
    found = followed.follow(before, after, slope)
    assert found.dtype == narrow
    change = (exact - before.double())[..., 1:]
    error = (found.double() - exact)[..., 1:].norm() / change.norm()
    assert error < 0.03


def test_tokens_that_are_the_same_tell_no_slope():
    kept = torch.arange(7).expand(4, -1)
    followed = following(torch.randn(4, 9, 5), kept, (3, 3), 1, torch.float32)
    same = torch.randn(8).expand(4, 8, 8)
    slope = followed.slope(same, same + torch.randn(4, 8, 8), 1)
    assert slope.abs().max() < 1e-2
    assert followed.slope(torch.zeros(4, 8, 8), torch.ones(4, 8, 8), 1).abs().max() == 0


def test_other_layouts_of_tokens():
    generator = torch.Generator().manual_seed(0)
    followed = following(
        torch.randn(3, 6, 5, generator=generator), torch.tensor([[0, 2, 5]] * 3), (2, 3), 1, torch.float32
    )
    before, after = (
        torch.randn(7, 3, 4, generator=generator).transpose(0, 1),
        torch.randn(3, 4, 4, generator=generator),
    )
    slope = torch.randn(1, 4, 4, generator=generator)
    wanted = followed.follow(before.contiguous(), after, slope)
    assert torch.equal(followed.follow(before, after, slope), wanted)
    assert torch.equal(followed.compact(wanted), after)


@torch.inference_mode()
def test_it_compiles_into_one_graph():
    model, images = tiny_vggt(), random_images(3)
    accelerate(model, 0.3, weights=None, dense_frames=True, min_frames=1)
    wanted = model(images)["depth"]
    whole = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(images)["depth"], wanted)


@torch.inference_mode()
def test_clips_of_a_batch_are_apart():
    model, images = tiny_vggt(), random_images(3, batch=2)
    accelerate(model, 0.3, weights=None, dense_frames=True)
    together = model.aggregator(images)[0]
    for clip in range(2):
        alone = model.aggregator(images[clip : clip + 1])[0]
        for layer in range(4):
            torch.testing.assert_close(together[layer][clip], alone[layer][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group", [1, 2])
@torch.inference_mode()
def test_all_kept_but_by_another_way_is_the_stock_model(group, monkeypatch):
    """With every token kept nothing follows, so the two ways agree up to rounding; without pruning stock runs."""
    model, images = tiny_vggt(group=group), random_images(3, batch=2)
    stock = model(images)
    assert_equal(accelerate(model, 1.0, weights=None, dense_frames=True)(images), stock)
    everyone = following(torch.randn(6, 20, 8), torch.arange(20).expand(6, -1), (4, 5), 5, torch.float32)
    aggregator = model.aggregator
    positions = torch.cat(
        [torch.zeros(5, 2).long(), backbone.rope_positions(aggregator, (4, 5), images.device)]
    )
    positions = positions.repeat(2, 3, 1, 1)
    everyone = everyone._replace(positions=positions.flatten(0, 1))
    special = backbone.special_tokens(aggregator, 2, 3)
    entering = torch.cat([special, backbone.patch_tokens(aggregator, images)], dim=2)
    remove(model)
    monkeypatch.setitem(backbone.HIDDEN_BYTES, "cpu", 4 * 32 * 25 * 4 * 2)  # two of the six frames at a time
    found = backbone.alternating_attention(aggregator, entering, positions, (3,), following=everyone)[3]
    wanted = aggregator(images)[0][3]
    torch.testing.assert_close(torch.cat([found.frame, found.after], -1), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dense_frames", "read"), [(False, 6), (True, 20)])
def test_summary_counts_the_tokens_that_heads_read(dense_frames, read):
    model = accelerate(tiny_vggt(), 0.3, weights=None, dense_frames=dense_frames)
    stages = {stage.name: stage for stage in summary(model, random_images(3)).stages}
    assert (stages["depth_head"].tokens_in, stages["depth_head"].tokens_out) == (3 * read, 3 * 20)


@torch.inference_mode()
def test_each_block_of_a_group_has_its_own_slope():
    model, images = tiny_vggt(group=2, all_layers=True), random_images(3, batch=2)
    accelerate(model, 0.3, weights=None, dense_frames=True)
    tokens, _ = model.aggregator(images)
    following = tokens._following(0, 3)
    assert sorted(tokens.parts) == list(range(len(tokens)))
    for part in tokens.parts.values():
        few = following.compact(part.before.flatten(0, 1))
        torch.testing.assert_close(part.slope, following.slope(few, part.after.flatten(0, 1), 2))
    assert not torch.allclose(tokens.parts[0].slope, tokens.parts[1].slope)


@torch.inference_mode()
def test_heads_see_the_tokens_that_a_reader_sees():
    model, images = tiny_vggt(), random_images(3, batch=2)
    accelerate(model, 0.3, weights=None, dense_frames=True)
    tokens, start = model.aggregator(images)
    depth, _ = model.depth_head(tokens, images=images, patch_start_idx=start)
    poses = model.camera_head(tokens)[-1]
    remove(model)
    dense = list(tokens)
    wanted, _ = model.depth_head(dense, images=images, patch_start_idx=start)
    torch.testing.assert_close(depth, wanted)
    assert torch.equal(poses, model.camera_head(dense)[-1])
    torch.testing.assert_close(tokens.select(torch.tensor([2, 0]))[1], dense[1][:, [2, 0]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_narrow_models(dtype):
    model, images = tiny_vggt(), random_images(3)
    accelerate(model, 0.3, weights=None, dense_frames=True)
    tokens, _ = model.aggregator(images)
    narrow, _ = model.to(dtype).aggregator(images.to(dtype))
    assert narrow[3].dtype == dtype
    same = (narrow.kept == tokens.kept).all(-1, keepdim=True)[..., None]  # rounding may keep others
    error = ((narrow[3].float() - tokens[3]) * same).norm() / (tokens[3] * same).norm()
    assert same.any() and error < 0.1
    with torch.autocast("cpu", dtype):
        cast, _ = model.float().aggregator(images)
    assert cast._weights.dtype == dtype and cast[3].isfinite().all()


@pytest.mark.parametrize("heads", [(), ((1, 0), (3, 1)), ((2, 0), (2, 1))])
@torch.inference_mode()
def test_frames_in_chunks_change_nothing(heads, monkeypatch):
    model, images = tiny_vggt(), random_images(5, batch=2)
    weights = replace(PaceWeights.new(model, dense_frames=True), matching=heads)
    accelerate(model, 0.3, weights=weights, dense_frames=True)
    whole = model(images)
    monkeypatch.setitem(backbone.HIDDEN_BYTES, "cpu", 1)
    monkeypatch.setattr("pacevggt_patch.method.propagation.FRAMES_PER_CHUNK", 4)
    seen, real = [], Following._spread
    monkeypatch.setattr(Following, "_spread", lambda *args: seen.append(len(args[1])) or real(*args))
    parts = model(images)
    assert max(seen) == 2 * 2  # two frames of each clip
    for key in ("pose_enc", "depth", "world_points"):
        torch.testing.assert_close(parts[key], whole[key], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_frame_blocks_see_all_tokens_and_global_blocks_the_kept_ones():
    model, images = tiny_vggt(), random_images(3)
    seen = {"frame": [], "global": []}
    for kind, lengths in seen.items():
        for block in getattr(model.aggregator, f"{kind}_blocks"):
            block.register_forward_hook(
                lambda _, args, __, lengths=lengths: lengths.append(args[0].shape[:2])
            )
    accelerate(model, 0.3, weights=None, dense_frames=True)(images)
    assert seen == {"frame": [(3, 25)] * 4, "global": [(1, 3 * 11)] * 4}
    assert "all patch tokens; global attention is pruned" in str(summary(model))


@torch.inference_mode()
def test_other_settings_work_beside_it():
    model, images = tiny_vggt(), random_images(3)
    plain = accelerate(model, 0.3, weights=None, dense_frames=True)(images)["depth"]
    fewer = accelerate(model, 0.3, weights=None, dense_frames=True, global_keys=0.5)(images)["depth"]
    assert fewer.isfinite().all() and not torch.allclose(fewer, plain, atol=1e-6)
    compiled = accelerate(model, 0.3, weights=None, dense_frames=True, compile=True)(images)["depth"]
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-3)


def test_gradients_are_the_same_with_checkpointing():
    model, images = tiny_vggt(), random_images(2)
    weights = random_adaptation(model, dense_frames=True)
    accelerate(model, 0.4, weights=weights, dense_frames=True)
    found = []
    for checkpointing in (False, True):
        retune(model, 0.4, checkpointing=checkpointing)
        weights.adaptation.requires_grad_(True)
        tokens, _ = model.aggregator(images)
        loss = tokens[3].square().mean()
        found.append(torch.autograd.grad(loss, list(weights.adaptation.parameters())))
    assert any(gradient.abs().max() > 0 for gradient in found[0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@torch.inference_mode()
def test_weights_are_for_one_setting(tmp_path):
    model, images = tiny_vggt(), random_images(3)
    weights = random_adaptation(model, dense_frames=True)
    assert weights.dense_frames and weights.merge is None and weights.restoration is None
    changed = accelerate(model, 0.3, weights=weights, dense_frames=True)(images)["depth"]
    plain = accelerate(model, 0.3, weights=None, dense_frames=True)(images)["depth"]
    assert not torch.allclose(changed, plain, atol=1e-6)
    weights.save(tmp_path / "dense.safetensors")
    loaded = PaceWeights.load(tmp_path / "dense.safetensors")
    assert (
        loaded.dense_frames and loaded.modules().state_dict().keys() == weights.modules().state_dict().keys()
    )
    again = accelerate(model, 0.3, weights=loaded, dense_frames=True)(images)["depth"]
    assert torch.equal(again, changed)
    with pytest.raises(WeightsError) as error:
        accelerate(model, 0.3, weights=loaded)
    assert str(error.value) == (
        f"pace weights {loaded.source} were trained for dense_frames=True: pass that, or other weights"
    )
    # The weights in force stay where they fit, and are looked for anew where they do not.
    assert torch.equal(accelerate(model, 0.3, dense_frames=True)(images)["depth"], changed)
    with pytest.warns(UserWarning, match="no pace weights are bundled for this checkpoint, so"):
        accelerate(model, 0.3)
    with pytest.warns(
        UserWarning, match="no pace weights are bundled for this checkpoint and dense_frames=True, so"
    ):
        accelerate(remove(model), 0.3, dense_frames=True)


@torch.inference_mode()
def test_what_was_not_found_for_one_setting_is_looked_for_in_the_other():
    model = tiny_vggt()
    for dense_frames in (True, False, True):
        with pytest.warns(UserWarning, match="no pace weights are bundled"):
            accelerate(model, 0.3, dense_frames=dense_frames)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(model, 0.4, dense_frames=True)


@torch.inference_mode()
def test_a_reader_may_be_under_autocast():
    model, images = tiny_vggt(), random_images(3)
    tokens, _ = accelerate(model, 0.3, weights=None, dense_frames=True).aggregator(images)
    with torch.autocast("cpu", torch.bfloat16):
        inside = tokens[3]
    assert torch.equal(inside, tokens[3])
    compact, index = tokens.compact[3], torch.cat([torch.arange(5).expand(1, 3, -1), tokens.kept + 5], -1)
    torch.testing.assert_close(compact, tokens[3].gather(2, index[..., None].expand_as(compact)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dense_frames": 1}, "dense_frames must be True or False, got 1"),
        (
            {"dense_frames": True, "merge_budget": 0.2},
            "merge_budget=0.2 does not go with dense_frames=True, where no token is merged: leave it out",
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(PaceError) as error:
        accelerate(tiny_vggt(), weights=None, **settings)
    assert str(error.value) == message


def test_it_saves_global_attention_alone():
    sizes = dict(frames=10, patches=100, kept=30, special=5, channels=64, blocks=4)
    both, one = saved_flops(**sizes), saved_flops(**sizes, dense_frames=True)
    in_frames = 4 * 10 * (24 * 70 * 64**2 + 4 * 64 * (105**2 - 35**2))
    following = 2 * 10 * (100 * 30 * 64 + 140 * 64**2)
    regression = 4 * 256 * 64**2 + 7 * 64**3 // 3  # 4 tokens for each channel
    assert both - one == pytest.approx(in_frames + 4 * (following + regression))
    # With heads that see all tokens: one of four blocks has a half of them, then all heads of all blocks are such.
    some = saved_flops(**sizes, dense_frames=True, matching=[0.5])
    attention = 4 * 64 * 100 * (105**2 - 35**2)
    filled = 2 * 10 * 32 * (100 * 30 + 140 * 64) + 2 * 256 * 64 * (64 + 32)
    assert some == pytest.approx(one * 3 / 4 + attention / 2 - filled)
    assert saved_flops(**sizes, dense_frames=True, matching=[1.0] * 4) == 0
