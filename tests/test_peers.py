"""Published rules that are compared with: against plain masked softmax and loops, and counted pair by pair."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hosts import random_images, tiny_vggt

from pacevggt_patch import PaceError, accelerate

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from peers import AVGGT, RULES, BlockSparse, FastVGGT, GoodTokens, LiteVGGT, Spark3R, spark3r
from peers.base import BLOCKS, Context, Layout, best_of_cells, cell_corners
from peers.good_tokens import farthest_frames
from peers.litevggt import information
from peers.merging import bipartite_merge
from peers.runner import applied

LAYOUT = Layout(frames=6, special=2, grid=(4, 5))
HEADS, WIDTH = 2, 8
EARLY, MIDDLE, LATE = 0, 13, 20  # blocks of a model as deep as VGGT-1B
# Each rule with nothing merged and nothing left out.
WHOLE = [
    FastVGGT(merged=0),
    LiteVGGT(merged=0),
    AVGGT(side=1, early=0),
    Spark3R(outside=1),
    GoodTokens(frames=6, in_frames=0, thinned=0),
    BlockSparse(share=1.0, size=16),
]


def some_inputs(batch=1, layout=LAYOUT, block=MIDDLE, seed=0):
    """Queries, keys, values and a context in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key, value = (draw(batch, HEADS, layout.tokens, WIDTH) for _ in range(3))
    features = draw(batch, layout.frames, layout.patches, 12)
    images = draw(batch, layout.frames, 3, 14 * layout.grid[0], 14 * layout.grid[1]).sigmoid()
    context = Context(layout, block, BLOCKS, draw(batch, layout.tokens, 16), features, images)
    return query, key, value, context


def plain(query, key, value, mask):
    """Softmax over the keys that a mask [..., queries, keys] shows, written out."""
    products = query @ key.mT / math.sqrt(query.shape[-1])
    return products.masked_fill(~mask, -math.inf).softmax(-1) @ value


def mask_by(sees, layout=LAYOUT, batch=1):
    """A mask [B, 1, T, T] of `sees(clip, query's frame, its token, key's frame, its token)`, in loops."""
    places = [(frame, token) for frame in range(layout.frames) for token in range(layout.length)]
    return torch.tensor(
        [[[[sees(clip, *q, *k) for k in places] for q in places]] for clip in range(batch)], dtype=torch.bool
    )


def corner(token, side, layout=LAYOUT):
    """Whether a token is special, or the first patch of a cell."""
    y, x = divmod(token - layout.special, layout.grid[1])
    return token < layout.special or (y % side == 0 and x % side == 0)


def check(rule, mask, batch=1, block=MIDDLE, layout=LAYOUT):
    """The rule gives attention with that mask, and counts its pairs."""
    *inputs, context = some_inputs(batch, layout, block)
    found = rule(*inputs, context)
    torch.testing.assert_close(found.output, plain(*inputs, mask))
    assert found.pairs == mask.expand(batch, HEADS, -1, -1).sum()


def same_frame(clip, qf, qt, kf, kt):
    return qf == kf


def test_blocks_stand_for_those_of_vggt_1b_as_deep():
    context = some_inputs()[-1]
    eight = [replace(context, block=block, depth=8).block_of_large for block in range(8)]
    assert eight == [1, 4, 7, 10, 13, 16, 19, 22]
    assert [replace(context, block=block).block_of_large for block in range(24)] == list(range(24))


# ---- which keys a query sees


@pytest.mark.parametrize("rule", [AVGGT(), GoodTokens()])
def test_early_blocks_attend_within_frames(rule):
    check(rule, mask_by(same_frame, batch=2), batch=2, block=EARLY)


@pytest.mark.parametrize("side", [2, 3])
def test_avggt_sees_a_grid_itself_and_one_mean_key(side):
    *inputs, context = some_inputs(2)
    query, key, value = inputs
    shared = [
        frame == 0 or corner(token, side) for frame in range(LAYOUT.frames) for token in range(LAYOUT.length)
    ]
    shared = torch.tensor(shared)
    means = [t[:, :, ~shared].mean(2, keepdim=True) for t in (key, value)]
    own = torch.eye(LAYOUT.tokens, dtype=torch.bool) | shared
    mask = F.pad(own, (0, 1), value=True)[None, None]
    found = AVGGT(side=side)(*inputs, context)
    wanted = plain(query, *(torch.cat(both, 2) for both in zip((key, value), means, strict=True)), mask)
    torch.testing.assert_close(found.output, wanted)
    assert found.pairs == 2 * HEADS * mask.sum()


@pytest.mark.parametrize(("block", "step"), [(MIDDLE, 2), (LATE, 6)])
def test_spark3r_sees_every_so_many_patch_tokens(block, step):
    def sees(clip, qf, qt, kf, kt):
        return kt < LAYOUT.special or (kf * LAYOUT.patches + kt - LAYOUT.special) % step == 0

    check(Spark3R(times=2), mask_by(sees, batch=2), batch=2, block=block)


def test_spark3r_takes_more_from_longer_clips():
    assert [spark3r.key_step(n) for n in (8, 100, 101, 300, 1000)] == [1, 1, 3, 8, 25]
    assert [spark3r.merged_queries(n) for n in (100, 101, 300, 301, 500, 501)] == [1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize(("block", "side"), [(4, 3), (LATE, 1)])
def test_good_tokens_sees_key_frames(block, side):
    chosen = farthest_frames(some_inputs(2)[-1].features, 3)

    def sees(clip, qf, qt, kf, kt):
        return bool(chosen[clip, kf]) and corner(kt, side)

    check(GoodTokens(frames=3), mask_by(sees, batch=2), batch=2, block=block)


def test_key_frames_are_the_farthest_from_those_before():
    features = some_inputs(2)[-1].features
    for clip, found in zip(features, farthest_frames(features, 4), strict=True):
        means = [frame.mean(0) for frame in clip]
        wanted = [0]
        while len(wanted) < 4:
            near = [max(F.cosine_similarity(m, means[w], dim=0).item() for w in wanted) for m in means]
            wanted.append(min((n for n in range(6) if n not in wanted), key=near.__getitem__))
        assert found.nonzero()[:, 0].tolist() == sorted(wanted)


@pytest.mark.parametrize("size", [20, 16])  # the last block is whole, or padded
def test_block_sparse_sees_the_most_similar_blocks(size):
    batch = 2
    *inputs, context = some_inputs(batch)
    special = torch.arange(LAYOUT.tokens) % LAYOUT.length < LAYOUT.special
    patch = (~special).nonzero()[:, 0].split(size)
    take = math.ceil(0.3 * len(patch))
    mask = torch.zeros(batch, HEADS, LAYOUT.tokens, LAYOUT.tokens, dtype=torch.bool)
    mask[..., special] = mask[:, :, special] = True
    for clip in range(batch):
        for head in range(HEADS):
            query, key, _ = (t[clip, head] for t in inputs)
            for rows in patch:
                like = torch.stack([query[rows].mean(0) @ key[block].mean(0) for block in patch])
                for best in like.topk(take).indices:
                    mask[clip, head, rows[:, None], patch[best]] = True
    found = BlockSparse(share=0.3, size=size)(*inputs, context)
    torch.testing.assert_close(found.output, plain(*inputs, mask))
    assert found.pairs == mask.sum()


def test_block_sparse_takes_a_few_blocks_at_a_time_alike(monkeypatch):
    *inputs, context = some_inputs()
    whole = BlockSparse(share=0.3, size=16)(*inputs, context)
    monkeypatch.setattr("peers.block_sparse.GATHERED", 1)
    found = BlockSparse(share=0.3, size=16)(*inputs, context)
    torch.testing.assert_close(found.output, whole.output)
    assert found.pairs == whole.pairs


# ---- merging


def merged_by_hand(tokens, destination, merged):
    """For each token the tokens that it is one with, itself among them."""
    unit = F.normalize(tokens, dim=-1)
    to = [n for n in range(len(unit)) if destination[n]]
    best = {n: max((float(unit[n] @ unit[d]), d) for d in to) for n in range(len(unit)) if not destination[n]}
    joins = sorted(best, key=lambda n: -best[n][0])[:merged]
    leader = [best[n][1] if n in joins else n for n in range(len(unit))]
    return [[other for other, its in enumerate(leader) if its == leader[n]] for n in range(len(unit))]


def attention_by_hand(query, key, value, groups):
    """Means of groups attend to means of groups, and each token gets the output of its group."""
    distinct = [list(one) for one in dict.fromkeys(tuple(group) for group in groups)]
    query, key, value = (
        torch.stack([t[:, group].mean(1) for group in distinct], 1) for t in (query, key, value)
    )
    found = plain(query, key, value, torch.tensor(True))
    return found[:, [distinct.index(group) for group in groups]], len(distinct)


def check_merged(rule, destinations, block, merged):
    """Against loops, clip by clip; destinations are told by `destinations(context)`, [B, S, L]."""
    *inputs, context = some_inputs(2, block=block)
    found = rule(*inputs, context)
    pairs = 0
    for clip, wanted in enumerate(destinations(context).flatten(1)):
        groups = merged_by_hand(context.tokens[clip], wanted, merged)
        output, count = attention_by_hand(*(t[clip] for t in inputs), groups)
        torch.testing.assert_close(found.output[clip], output)
        pairs += HEADS * count**2
    assert found.pairs == pairs


def with_best_of_cells(scores):
    """Destinations [B, S, L]: special tokens, all of frame 0, and the best of each 2 x 2 cell, in loops."""
    found = torch.ones(*scores.shape[:2], LAYOUT.length, dtype=torch.bool)
    rows, columns = LAYOUT.grid
    for clip, frames in enumerate(scores):
        for frame in range(1, LAYOUT.frames):
            found[clip, frame, LAYOUT.special :] = False
            for y in range(0, rows, 2):
                for x in range(0, columns, 2):
                    cell = [(j, i) for j in range(y, min(y + 2, rows)) for i in range(x, min(x + 2, columns))]
                    patches = [j * columns + i for j, i in cell]
                    best = max(patches, key=frames[frame].__getitem__)
                    found[clip, frame, LAYOUT.special + best] = True
    return found


@pytest.mark.parametrize("merged", [0.9, 0.2])
def test_fastvggt_merges_into_one_of_each_cell(merged):
    def destinations(context):
        generator = torch.Generator().manual_seed(context.block)
        return with_best_of_cells(
            torch.rand(LAYOUT.frames, LAYOUT.patches, generator=generator).expand(2, -1, -1)
        )

    check_merged(FastVGGT(merged), destinations, MIDDLE, int(merged * LAYOUT.tokens))


def test_litevggt_merges_into_the_token_with_most_information():
    def destinations(context):
        return with_best_of_cells(information(context.images, context.features, LAYOUT))

    check_merged(LiteVGGT(), destinations, MIDDLE, LAYOUT.tokens)


def test_information_is_steep_pixels_and_varied_tokens():
    *_, context = some_inputs()
    images, features = torch.zeros_like(context.images), torch.zeros_like(context.features)
    images[..., 20:22, 20:22] = 1.0  # in patch (1, 1)
    scores = information(images, features, LAYOUT)
    assert (scores.argmax(2) == 6).all() and (scores == 0).sum() == 6 * 19
    features[:, :, 18] = 1.0  # patch (3, 3): tokens vary in it and around it
    around = information(torch.zeros_like(images), features, LAYOUT).view(6, *LAYOUT.grid)
    assert (around[:, 2:, 2:] > 0).all() and (around[:, :2] == 0).all() and (around[:, :, :2] == 0).all()


def test_litevggt_keeps_merges_for_the_blocks_that_follow():
    query, key, value, first = some_inputs(block=6)
    *_, other = some_inputs(seed=1)
    rule = LiteVGGT()
    rule(query, key, value, first)
    merge = first.memory["merge"]
    later = replace(first, block=14, tokens=other.tokens)
    rule(query, key, value, later)
    assert later.memory["merge"] is merge
    anew = replace(later, block=15)
    rule(query, key, value, anew)
    assert not torch.equal(anew.memory["merge"].place, merge.place)


def test_spark3r_merges_queries_within_groups_of_frames(monkeypatch):
    """Two groups of frames; keys stay as they are."""
    monkeypatch.setattr(spark3r, "GROUP", 4)
    monkeypatch.setattr(spark3r, "MERGED", ((5, 1), (6, 2)))
    *inputs, context = some_inputs(2)
    query, key, value = inputs
    found = Spark3R()(*inputs, context)  # MIDDLE is sensitive: all keys
    pairs = 0
    for clip in range(2):
        groups = []
        for first, frames in ((0, 4), (4, 2)):
            start = first * LAYOUT.length
            destination = [
                token < LAYOUT.special or (frame * LAYOUT.patches + token - LAYOUT.special) % 2 == 0
                for frame in range(frames)
                for token in range(LAYOUT.length)
            ]
            tokens = context.tokens[clip, start : start + frames * LAYOUT.length]
            some = merged_by_hand(tokens, destination, len(destination))
            groups += [[start + n for n in group] for group in some]
        means = torch.stack([query[clip][:, group].mean(1) for group in groups], 1)
        torch.testing.assert_close(
            found.output[clip], plain(means, key[clip], value[clip], torch.tensor(True))
        )
        pairs += HEADS * len({tuple(group) for group in groups}) * LAYOUT.tokens
    assert found.pairs == pairs


def test_merging_takes_a_few_rows_at_a_time_alike(monkeypatch):
    *_, context = some_inputs(2)
    destination = torch.arange(LAYOUT.tokens).expand(2, -1) % 3 == 0
    whole = bipartite_merge(context.tokens, destination, 40)
    monkeypatch.setattr("peers.merging.PRODUCTS", 1)
    assert torch.equal(bipartite_merge(context.tokens, destination, 40).place, whole.place)
    assert whole.count == LAYOUT.tokens - 40 == whole.place.max() + 1


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_every_cell_has_one_patch(side):
    grid = (5, 7)
    generator = torch.Generator().manual_seed(0)
    found = best_of_cells(torch.rand(2, 3, 35, generator=generator), grid, side)
    for mask in (*found.flatten(0, 1), cell_corners(grid, side, torch.device("cpu"))):
        cells = [(n // 7 // side, n % 7 // side) for n in mask.nonzero()[:, 0].tolist()]
        assert sorted(cells) == [
            (y, x) for y in range(math.ceil(5 / side)) for x in range(math.ceil(7 / side))
        ]


# ---- on a model


@pytest.mark.parametrize("rule", WHOLE, ids=lambda rule: rule.name)
def test_with_nothing_left_out_a_rule_is_the_stock_model(rule):
    model, images = tiny_vggt(), random_images(6)
    with torch.inference_mode():
        wanted = model(images)
        with applied(model, rule) as pairs:
            found = model(images)
    assert pairs.computed == pairs.unpruned == 4 * 2 * (6 * 25) ** 2
    for name in ("pose_enc", "depth", "world_points"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-4)


def test_all_rules_are_tried():
    assert {type(rule) for rule in WHOLE} == set(RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_changes_the_model_inside_its_block_alone(rule):
    model, images = tiny_vggt(), random_images(6)
    with torch.inference_mode():
        wanted = model(images)["depth"]
        with applied(model, rule()) as pairs:
            assert not torch.equal(model(images)["depth"], wanted)
        assert torch.equal(model(images)["depth"], wanted)
    assert 0 < pairs.share < 1
    assert not any(
        "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks
        for module in model.modules()
    )


def test_batches_are_clips_by_themselves():
    model, images = tiny_vggt(), random_images(6, batch=2)
    for rule in RULES:
        with torch.inference_mode(), applied(model, rule()):
            both = model(images)["depth"]
            alone = torch.cat([model(clip[None])["depth"] for clip in images])
        torch.testing.assert_close(both, alone, rtol=1e-3, atol=1e-4)


def test_an_accelerated_model_is_refused():
    model = accelerate(tiny_vggt(), weights=None)
    with pytest.raises(PaceError, match="remove"), applied(model, FastVGGT()):
        pass
