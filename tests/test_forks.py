"""What accelerate promises, on the stock VGGT and on doubles of its public forks."""

import copy
from contextlib import contextmanager

import pytest
import torch
from fork_doubles import (
    CAUSAL,
    FORKS,
    REFUSED,
    STOCK,
    Block,
    RewrittenMaskTrunk,
    SoftmaxMaskBlock,
    StreamBlock,
    StreamTrunk,
    Trunk,
    TwoEntrances,
    build_argument,
    call_entrances,
    call_images,
    call_stream,
    join_heads,
    split_heads,
    tensors,
    tiny,
)
from hosts import random_images, run, tiny_vggt, with_heads
from torch import distributed, nn

try:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
except ImportError:  # torch before 2.5
    from torch.distributed._tensor import Shard, distribute_tensor, init_device_mesh

from pacevggt_patch import UnsupportedModelError, accelerate, is_accelerated, paused, remove, summary
from pacevggt_patch.patching.install import state_of
from pacevggt_patch.weights import cache

KEEP = 0.3
PATCHES, KEPT = 20, 6  # of a frame of `images`

by_name = dict(ids=lambda double: double.name)
every_host = pytest.mark.parametrize("double", [*STOCK, *FORKS], **by_name)
every_fork = pytest.mark.parametrize("double", FORKS, **by_name)


def patch(double, model, keep=KEEP, **settings):
    accelerate(double.target(model), keep, weights=None, min_frames=1, **settings)
    return model


def assert_same(found, stock):
    assert len(found) == len(stock)
    for number, (a, b) in enumerate(zip(found, stock, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape, number
        assert torch.equal(a, b), f"output {number} differs by {(a - b).abs().max():.2e}"


def differs(found, stock):
    return any(not torch.equal(a, b) for a, b in zip(found, stock, strict=True))


def assert_pruned(found, stock):
    """Other values in the same form."""
    assert [t.shape for t in found] == [t.shape for t in stock]
    assert [t.dtype for t in found] == [t.dtype for t in stock]
    assert all(torch.isfinite(t).all() for t in found)
    assert differs(found, stock)


@contextmanager
def counting(aggregator):
    """Numbers of tokens that enter each global block, call by call."""
    counts = []
    hooks = [
        block.norm1.register_forward_hook(lambda _, args, out: counts.append(args[0].shape[1]))
        for block in aggregator.global_blocks
    ]
    yield counts
    for hook in hooks:
        hook.remove()


def snapshot(model):
    """All that is in the `__dict__` of every module, and its class."""
    found = {}
    for name, module in model.named_modules():
        found[name, "class"] = type(module)
        for key, value in module.__dict__.items():
            found[name, key] = dict(value) if isinstance(value, dict) else value
    return found


@pytest.fixture
def images():
    return random_images()


# ---- all tokens kept


@every_host
def test_keeping_everything_is_stock_to_the_bit(double, images):
    model = double.build()
    stock = double.call(model, images)
    assert_same(double.call(patch(double, model, 1.0), images), stock)


@every_host
@pytest.mark.parametrize("height,width", [(42, 98), (70, 14)])
def test_other_grids(double, height, width):
    images, model = random_images(4, height=height, width=width), double.build()
    stock = double.call(model, images)
    assert_same(double.call(patch(double, model, 1.0), images), stock)
    assert_pruned(double.call(patch(double, model), images), stock)


@every_host
def test_batches(double):
    if not double.batches:
        pytest.skip("takes one clip")
    images, model = random_images(batch=2), double.build()
    stock = double.call(model, images)
    assert_same(double.call(patch(double, model, 1.0), images), stock)
    found = double.call(patch(double, model), images)
    assert_pruned(found, stock)
    if double.name == "vggt-slam":
        return  # its second call looks at the first clip alone
    for clip in range(2):
        alone = double.call(model, images[clip : clip + 1])
        for a, b in zip(found, alone, strict=True):
            torch.testing.assert_close(a[clip : clip + 1], b, rtol=1e-3, atol=1e-3)


# ---- undo


@every_host
def test_remove_leaves_no_trace(double, images):
    model = double.build()
    stock = double.call(model, images)
    before, keys = snapshot(model), list(model.state_dict())
    values = {name: value.clone() for name, value in model.state_dict().items()}
    double.call(patch(double, model), images)
    assert list(model.state_dict()) == keys
    remove(double.target(model))
    assert not is_accelerated(model)
    after = snapshot(model)
    assert before.keys() == after.keys()
    caches = ("frequency_cache", "position_cache")  # the host fills them
    for key, value in before.items():
        assert value is after[key] or key[1] in caches or value == after[key], key
    assert list(model.state_dict()) == keys
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert_same(double.call(model, images), stock)


@every_host
def test_accelerate_twice(double, images):
    model = patch(double, double.build())
    once = double.call(model, images)
    assert_same(double.call(patch(double, model), images), once)
    remove(double.target(model))
    assert not is_accelerated(model)
    assert_same(double.call(model, images), double.call(double.build(), images))


@every_host
def test_paused_is_stock(double, images):
    model = double.build()
    stock = double.call(model, images)
    fast = double.call(patch(double, model), images)
    with paused(double.target(model)):
        assert_same(double.call(model, images), stock)
    assert_same(double.call(model, images), fast)


# ---- pruned


@every_host
def test_kept_tokens_alone_enter_global_blocks(double, images):
    model = double.build()
    aggregator = double.aggregator(model)
    special = aggregator.patch_start_idx
    with counting(aggregator) as all_tokens:
        stock = double.call(model, images)
    patch(double, model)
    with counting(aggregator) as counts:
        found = double.call(model, images)
    assert_pruned(found, stock)
    assert counts == [count // (special + PATCHES) * (special + KEPT) for count in all_tokens]


@every_host
def test_the_same_clip_gives_the_same(double, images):
    model, other = patch(double, double.build()), random_images(4, height=42, width=28, seed=1)
    once = double.call(model, images)
    assert differs(once, double.call(model, random_images(seed=2)))
    double.call(model, other)
    assert_same(double.call(model, images), once)


@every_host
def test_a_clip_that_fails_leaves_nothing_behind(double, images):
    model = patch(double, double.build())
    once = double.call(model, images)

    def fail(*_):
        raise KeyboardInterrupt

    hook = double.aggregator(model).global_blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        double.call(model, random_images(4, height=42, width=28))
    hook.remove()
    assert_same(double.call(model, images), once)


@every_host
def test_bfloat16_autocast(double, images):
    model = double.build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = double.call(model, images)
        assert_same(double.call(patch(double, model, 1.0), images), stock)
        assert_pruned(double.call(patch(double, model), images), stock)


@every_host
def test_images_are_left_alone(double, images):
    before = images.clone()
    double.call(patch(double, double.build()), images)
    assert torch.equal(images, before)


# ---- other instances, copies, hooks


@every_host
def test_a_copy_works_alone(double, images):
    model = double.build()
    stock = double.call(model, images)
    fast = double.call(patch(double, model), images)
    twin = copy.deepcopy(model)
    remove(double.target(model))
    assert_same(double.call(model, images), stock)
    assert_same(double.call(twin, images), fast)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(double.call(twin, images), fast)
    remove(double.target(twin))
    assert_same(double.call(twin, images), stock)


@every_host
def test_two_instances_do_not_interfere(double, images):
    first, second, third = double.build(), double.build(), double.build()
    stock = double.call(third, images)
    few = double.call(patch(double, first, 0.3), images)
    more = double.call(patch(double, second, 0.6), images)
    assert differs(few, more)
    assert_same(double.call(first, images), few)
    assert_same(double.call(third, images), stock)
    remove(double.target(first))
    assert_same(double.call(second, images), more)


@every_host
def test_hooks_on_global_blocks_fire(double, images):
    """Before and after acceleration as often, on all tokens."""
    model, seen = double.build(), []

    def watch(module, args, out):
        out = out[0] if isinstance(out, tuple) else out
        seen.append((tuple(args[0].shape), tuple(out.shape)))

    hooks = [block.register_forward_hook(watch) for block in double.aggregator(model).global_blocks]
    double.call(model, images)
    stock = seen.copy()
    seen.clear()
    patch(double, model)
    assert not seen  # the trial is of another model
    double.call(model, images)
    assert stock and seen == stock
    for hook in hooks:
        hook.remove()


def test_gradients_behind_a_checkpoint_are_of_their_own_clip(images):
    """A block that runs again for the backward pass must not take the plan of a later clip."""
    (double,) = (d for d in FORKS if d.name == "anysplat")
    grads = []
    for between in (False, True):
        model = patch(double, double.build())
        loss = sum(t.square().mean() for t in tensors(model(images)))
        if between:
            double.call(model, random_images(4, height=42, width=28, seed=1))
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert grads[0]
    assert_same(grads[1], grads[0])


# ---- what single forks need


def test_windows_of_frames_that_were_embedded_before(images):
    """Attention to some frames uses the features of these frames, whatever was embedded last."""
    (double,) = (d for d in FORKS if d.name == "swiftvggt")
    model = patch(double, double.build())
    images = random_images(5)
    found, alone = call_entrances(model, images), call_entrances(model, images, at_once=False)
    for a, b in zip(found, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("double", CAUSAL, **by_name)
@pytest.mark.parametrize("keep", [KEEP, 0.6, 1.0])
def test_a_causal_host_stays_causal(double, keep, images):
    model = patch(double, double.build(), keep)
    other = images.clone()
    other[:, 2] = random_images(1, seed=5)[:, 0]
    with torch.no_grad():
        if double.name == "streamvggt-cache":
            per_frame = [double.call(model, clip) for clip in (images, other)]
            count = len(per_frame[0]) // 3
            found = [clip[: 2 * count] for clip in per_frame]
            last = [clip[2 * count :] for clip in per_frame]
        else:
            per_frame = [double.call(model, clip) for clip in (images, other)]
            found = [[t[:, :2] for t in clip] for clip in per_frame]
            last = [[t[:, 2:] for t in clip] for clip in per_frame]
    assert_same(found[0], found[1])
    assert differs(last[0], last[1])


def test_frame_two_sees_frame_zero(images):
    """The mask that is followed is the host's own: what it allows is still seen."""
    for double in CAUSAL:
        model = patch(double, double.build())
        other = images.clone()
        other[:, 0] = random_images(1, seed=5)[:, 0]
        first, second = double.call(model, images), double.call(model, other)
        if double.name == "streamvggt-cache":
            first, second = first[len(first) // 3 * 2 :], second[len(second) // 3 * 2 :]
        else:
            first, second = ([t[:, 2] for t in clip] for clip in (first, second))
        assert differs(first, second)


def test_masks_of_keys_are_followed(images):
    """A token that is no key of a global block can't change others there."""
    (double,) = (d for d in FORKS if d.name == "mask-of-keys")
    model = patch(double, double.build())
    seen = []

    def watch(module, args, kwargs):
        _, positions, mask = args
        seen.append((positions.shape[1], mask.shape[-1], mask.float().mean()))

    # What enters the block's own code, under the forward that stands in.
    block = model.aggregator.global_blocks[0]
    own = type(block).forward
    try:
        type(block).forward = lambda self, *args: (watch(self, args, {}), own(self, *args))[1]
        double.call(model, images)
    finally:
        type(block).forward = own
    tokens = 3 * (model.aggregator.patch_start_idx + KEPT)
    assert seen and all(positions == mask == tokens for positions, mask, _ in seen)
    assert all(0 < share < 1 for _, _, share in seen)


@pytest.mark.parametrize(
    "argument",
    [
        ("extra", "N", 32),
        ("extra", "N", 1),
        ("extra", 1, "N", 32),
        ("extra", "B", "N", 1),
        ("extra", "B", 1, 32),
        ("mask", "N", "N"),
        ("mask", 2, "N", "N"),
        ("mask", 1, 1, "N", "N"),
        ("mask", "B", 2, "N", "N"),
        ("mask", "B", 1, 1, "N"),
    ],
    ids=lambda argument: "-".join(map(str, argument)),
)
@pytest.mark.parametrize("batch", [2, 3])
def test_arguments_of_blocks_are_followed_clip_by_clip(argument, batch):
    """With as many clips as heads, a mask of each head may be refused: it could be one of each clip."""
    images, model = random_images(batch=batch), build_argument(*argument)
    stock = call_images(model, images)
    accelerate(model, 1.0, weights=None, min_frames=1)
    assert_same(call_images(model, images), stock)
    accelerate(model, KEEP, weights=None, min_frames=1)
    try:
        found = call_images(model, images)
    except UnsupportedModelError:
        assert argument == ("mask", 2, "N", "N") and batch == 2
        return
    assert_pruned(found, stock)
    for clip in range(batch):
        alone = call_images(model, images[clip : clip + 1])
        for a, b in zip(found, alone, strict=True):
            torch.testing.assert_close(a[clip : clip + 1], b, rtol=1e-3, atol=1e-3)


def test_a_mask_that_the_host_rewrites_is_followed_as_it_is(images):
    found = []
    for fresh in (True, False):
        model = tiny(RewrittenMaskTrunk, block=SoftmaxMaskBlock)
        model.aggregator.fresh = fresh
        accelerate(model, KEEP, weights=None, min_frames=1)
        found.append(call_images(model, images))
    assert_same(found[1], found[0])


def test_a_cache_has_the_positions_of_its_frame(images):
    """StreamVGGT gives the positions of the frame at hand to the keys of all frames: they must be the same."""
    (double,) = (d for d in FORKS if d.name == "streamvggt-cache")
    model = patch(double, double.build())
    rope, positions = model.aggregator.rope, []

    def watch(module, args):
        positions.append(args[1])

    hook = rope.register_forward_pre_hook(watch)
    double.call(model, images)
    hook.remove()
    kept = [p for p in positions if p.shape[1] == model.aggregator.patch_start_idx + KEPT]  # queries
    assert len(kept) >= 3 * model.aggregator.depth
    assert all(torch.equal(p, kept[0]) for p in kept)


# ---- refusals


@pytest.mark.parametrize("double", REFUSED, **by_name)
def test_hosts_that_can_not_be_followed_are_refused(double, images):
    model = double.build()
    stock, before = double.call(model, images), snapshot(model)
    with pytest.raises(UnsupportedModelError, match=double.refused):
        patch(double, model)
    assert not is_accelerated(model)
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert all(
        before[key] is after[key] or before[key] == after[key] for key in before if "cache" not in key[1]
    )
    assert_same(double.call(model, images), stock)


def test_merging_is_refused_as_it_comes_and_with_its_grid_set(images):
    (double,) = (d for d in REFUSED if d.name == "fastvggt")
    model = double.build()  # set to 28 x 37 patches, as the fork is
    with pytest.raises(UnsupportedModelError, match=double.refused):
        patch(double, model)
    for block in model.aggregator.global_blocks:
        block.rows, block.columns = 2, 3  # the grid of the trial, maybe
    with pytest.raises(UnsupportedModelError, match=double.refused):
        patch(double, model)


def test_a_wrapper_is_refused_with_a_hint():
    (double,) = (d for d in FORKS if d.name == "map-anything")
    with pytest.raises(UnsupportedModelError, match=r"\.model"):
        accelerate(double.build(), KEEP, weights=None)


def test_no_aggregator_is_refused():
    for model in (nn.Linear(2, 2), tiny_vggt().camera_head):
        with pytest.raises(UnsupportedModelError, match="parts of none"):
            accelerate(model, KEEP, weights=None)


def test_meta_parameters_are_refused_where_weights_are_looked_for():
    with pytest.raises(UnsupportedModelError, match="meta"):
        accelerate(tiny_vggt().to("meta"), KEEP)
    accelerate(tiny_vggt().to("meta"), KEEP, weights=None)  # its values may come later


def test_sharded_parameters_are_refused():
    model = tiny_vggt()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = model.aggregator.global_blocks[0].mlp.fc1.weight
        sharded = distribute_tensor(weight.detach(), mesh, [Shard(0)])
        model.aggregator.global_blocks[0].mlp.fc1.weight = nn.Parameter(sharded)
        with pytest.raises(UnsupportedModelError, match="(?i)shard"):
            accelerate(model, KEEP, weights=None)
        assert not is_accelerated(model)
    finally:
        distributed.destroy_process_group()


@every_fork
def test_pre_aa_is_refused_where_the_aggregator_is_another(double, images):
    """Where it gives what the stock one gives, both is right."""
    model = double.build()
    stock = double.call(model, images)
    if double.like_stock:
        pytest.skip("gives what the stock aggregator gives")
    with pytest.raises(UnsupportedModelError, match='(?i)aggregator|mode="global"'):
        patch(double, model, mode="pre-aa")
    assert not is_accelerated(model)
    assert_same(double.call(model, images), stock)


@pytest.mark.parametrize("double", STOCK, **by_name)
def test_pre_aa_works_on_stock(double, images):
    model = double.build()
    stock = double.call(model, images)
    assert_same(double.call(patch(double, model, 1.0, mode="pre-aa"), images), stock)
    assert_pruned(double.call(patch(double, model, mode="pre-aa"), images), stock)
    remove(model)
    assert_same(double.call(model, images), stock)


# ---- attention of another make, entrances beside the forward, streams


class OwnAttentionBlock(Block):
    """Attention written out, which nobody can look into."""

    def forward(self, x, pos=None):
        a = self.attn
        q, k, v = split_heads(a, self.norm1(x))
        q, k = a.rope(a.q_norm(q), pos), a.rope(a.k_norm(k), pos)
        weights = (q @ k.mT * a.scale).softmax(-1)
        x = x + self.ls1(join_heads(a, weights @ v)) + 1e-3  # not what a stock block does
        return x + self.ls2(self.mlp(self.norm2(x)))


def test_heads_that_cannot_be_told_apart_are_refused_or_left_out(tmp_path, monkeypatch):
    """Full-attention heads need `scaled_dot_product_attention`; weights that ask for them are no use without."""
    model, weights = tiny(Trunk, block=OwnAttentionBlock), with_heads(tiny_vggt(), (1, 0))
    with pytest.raises(UnsupportedModelError, match="scaled_dot_product_attention"):
        accelerate(model, 0.5, weights=weights)
    assert not is_accelerated(model)
    monkeypatch.setenv("PACEVGGT_CACHE", str(tmp_path))
    cache.store(weights)
    with pytest.warns(UserWarning, match="calibration kept in .* can't be used"):
        accelerate(model, 0.5)
    run(model, random_images(5))
    assert summary(model).kept is not None and state_of(model).weights is None
    # The stock model of the same checkpoint takes what is kept.
    assert state_of(accelerate(tiny_vggt(), 0.5)).weights.full_heads == ((1, 0),)


def test_entrances_beside_the_forward_decide_for_each_sequence():
    """A sequence that failed, or ran unpruned, says nothing of the next."""
    model, images = tiny(TwoEntrances), random_images(4)[0]
    accelerate(model, 0.5, weights=None, min_frames=3)
    trunk = model.aggregator

    def call(frames):
        with torch.no_grad():
            trunk.forward_attention(trunk.forward_embedding(images[:frames]), *images.shape[-2:])
        return summary(model).kept

    def fail(*_):
        raise ZeroDivisionError

    for part in (trunk.frame_blocks[1], trunk.global_blocks[0].attn):
        hook = part.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            call(2)
        hook.remove()
        assert call(4).shape[:2] == (1, 4)
        assert call(2) is None
        assert call(3).shape[:2] == (1, 3)


def test_the_summary_of_a_stream_tells_what_took_part():
    model, seen = tiny(StreamTrunk, block=StreamBlock), []
    accelerate(model, 0.4, weights=None)
    special = model.aggregator.patch_start_idx
    block = model.aggregator.global_blocks[0].norm1
    block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1] - special))
    call_stream(model, random_images(2))
    first = summary(model).kept
    assert seen == [first.shape[-1]] * 2
    call_stream(model, random_images(2, seed=5))
    assert torch.equal(summary(model).kept, first)  # the same tokens of every frame, whatever it shows
