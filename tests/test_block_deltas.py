"""Learned changes of the attention blocks, against a model whose own parameters were changed by hand."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hosts import TORCH, assert_equal, random_deltas, random_images, tiny_vggt

from pacevggt_patch import PaceWeights, UnsupportedModelError, WeightsError, accelerate, paused, remove
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.method.block_deltas import RANK, BlockDeltas
from pacevggt_patch.patching.guest import guest
from pacevggt_patch.patching.install import retune


@pytest.fixture(params=["global", "pre-aa"])
def mode(request):
    return request.param


@pytest.fixture(params=[1, 2], ids=["single", "in pairs"])
def group(request):
    return request.param


@pytest.fixture
def model():
    return tiny_vggt()


def changed_by_hand(model, deltas: BlockDeltas, factor: float):
    """A copy of the model whose block parameters are W + factor * up @ down and b + factor * shift, made one by one."""
    changed = copy.deepcopy(model)
    parameters = dict(changed.aggregator.named_parameters())
    with torch.no_grad():
        for name, up in deltas.up.items():
            change = factor * (up.double() @ deltas.down[name].double())
            parameters[name.replace("/", ".")].add_(change)
        for name, shift in deltas.shift.items():
            parameters[name.replace("/", ".")].add_(factor * shift.double())
    return changed


def predictions(model, images):
    with torch.no_grad():
        return model(images)


def block_parameters(model):
    """All of them by their names in the aggregator."""
    return {name: p for name, p in model.aggregator.named_parameters() if "_blocks." in name}


@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_it_equals_a_model_changed_by_hand(group, mode, ratio):
    model, images = tiny_vggt(group=group), random_images(3, batch=2)
    weights = random_deltas(model, mode=mode)
    by_hand = changed_by_hand(model, weights.block_deltas, weights.block_deltas.strength(ratio))
    expected = predictions(accelerate(by_hand, ratio, weights=None, mode=mode), images)
    found = predictions(accelerate(model, ratio, weights=weights), images)
    plain = predictions(accelerate(model, ratio, weights=None, mode=mode), images)
    for name in ("pose_enc", "depth", "world_points"):
        assert torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-4), name
        assert not torch.allclose(found[name], plain[name], rtol=1e-3, atol=1e-4), name


def test_blocks_run_by_their_own_code_equal_it_too(model, mode, monkeypatch):
    images, weights = random_images(3, batch=2), random_deltas(model, mode=mode)
    weights.full_heads = ((1, 0),) if mode == "global" else ()
    expected = predictions(accelerate(model, 0.3, weights=weights), images)
    monkeypatch.setattr("pacevggt_patch.patching.forwards.BlockForward.fits", lambda *_: False)
    found = predictions(model, images)
    for name in ("pose_enc", "depth"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


def test_every_parameter_of_every_block_is_changed(model):
    deltas = random_deltas(model).block_deltas
    host = find_host(model)
    own = {}
    for kind, index, _ in host.blocks:
        own |= host.block_parameters(kind, index)
    changed = deltas(own)
    assert changed.keys() == own.keys() == set(deltas.names) == block_parameters(model).keys()
    assert all(not torch.equal(changed[name], own[name]) for name in own)
    assert len(own) == len(deltas) > 100
    assert deltas.shapes() == host.block_shapes() == {n: tuple(p.shape) for n, p in own.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_stay_narrow(dtype):
    model = tiny_vggt().to(dtype)
    own, deltas = block_parameters(model), random_deltas(model).block_deltas
    changed = deltas(own)
    by_hand = dict(changed_by_hand(model.double(), deltas, 1.0).aggregator.named_parameters())
    assert changed.keys() == own.keys()
    for name, parameter in changed.items():
        assert parameter.dtype == dtype
        # The change is rounded, and so is the sum.
        largest = by_hand[name].abs().max().item()
        assert (parameter - by_hand[name]).abs().max() <= 2 * torch.finfo(dtype).eps * largest, name


def test_untrained_ones_change_nothing(model, mode):
    images = random_images()
    plain = predictions(accelerate(model, 0.3, weights=None, mode=mode), images)
    found = predictions(accelerate(model, 0.3, weights=PaceWeights.new(model, mode=mode)), images)
    for name in ("pose_enc", "depth"):
        torch.testing.assert_close(found[name], plain[name], rtol=1e-4, atol=1e-5)


def test_the_unpruned_model_runs_with_its_own_parameters(model, mode):
    images = random_images()
    stock = predictions(model, images)
    weights = random_deltas(model, mode=mode)
    assert_equal(stock, predictions(accelerate(model, 1.0, weights=weights), images))
    assert_equal(stock, predictions(accelerate(model, 0.3, weights=weights, min_frames=4), images))
    accelerate(model, 0.3, weights=weights)
    with paused(model):
        assert_equal(stock, predictions(model, images))
    assert_equal(stock, predictions(remove(model), images))


def test_the_parameters_of_the_host_are_never_touched(model, mode):
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    accelerate(model, 0.3, weights=random_deltas(model, mode=mode))
    predictions(model, random_images())

    def fail(*_):
        raise RuntimeError("a hook failed")

    handle = model.aggregator.global_blocks[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="a hook failed"):
        model(random_images())
    handle.remove()
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1]), name


def test_a_pass_that_failed_leaves_the_next_one_alone(model, mode):
    images = random_images(3)
    expected = predictions(accelerate(model, 0.3, weights=random_deltas(model, mode=mode)), images)

    def fail(*_):
        raise RuntimeError("a hook failed")

    for block in (
        model.aggregator.patch_embed,
        model.aggregator.frame_blocks[0],
        model.aggregator.global_blocks[3],
    ):
        handle = block.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="a hook failed"):
            predictions(model, random_images(2, seed=1))
        handle.remove()
        assert_equal(predictions(model, images), expected)


def test_strength_fades_towards_the_stock_model():
    deltas = BlockDeltas({}, full_strength=0.25)
    assert [deltas.strength(ratio) for ratio in (0.05, 0.25)] == [1, 1]
    assert deltas.strength(0.5) == pytest.approx(0.5)  # half of the way, by the logarithm
    assert deltas.strength(1.0) == 0
    for wrong in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="full_strength"):
            BlockDeltas({}, full_strength=wrong)


def test_nearest_changes_of_a_lower_rank(model):
    deltas = random_deltas(model).block_deltas
    for rank in (1, 5, RANK):
        nearest = deltas.nearest(rank)
        assert nearest.rank == rank and nearest.full_strength == deltas.full_strength
        for name, up in deltas.up.items():
            wanted = (up @ deltas.down[name]).detach().double()
            found = (nearest.up[name] @ nearest.down[name]).detach().double()
            # No matrix of that rank is nearer.
            left = torch.linalg.svdvals(wanted)[rank:].square().sum().sqrt().item()
            norm = wanted.norm().item()
            assert (found - wanted).norm() == pytest.approx(left, rel=1e-3, abs=1e-4 * norm)
            assert nearest.up[name].shape[1] == len(nearest.down[name]) == rank
        assert all(torch.equal(shift, deltas.shift[name]) for name, shift in nearest.shift.items())
    assert deltas.rank == RANK
    for wrong in (0, RANK + 1):
        with pytest.raises(ValueError, match=f"rank must lie between 1 and {RANK}, got {wrong}"):
            deltas.nearest(wrong)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_part(model, mode, checkpointing):
    weights = random_deltas(model, mode=mode)
    weights.full_heads = ((1, 0),) if mode == "global" else ()
    with guest(model, weights):
        retune(model, 0.3, checkpointing=checkpointing)
        tokens, _ = model.aggregator(random_images())
        sum(value.square().mean() for value in tokens).backward()
    for name, parameter in weights.block_deltas.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        # A constant added to all keys cancels in the softmax, so some gradients may be nearly 0, but not all of one.
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_with_and_without_checkpointing_are_the_same(group, mode):
    found, model = [], tiny_vggt(group=group)
    for checkpointing in (False, True):
        weights = random_deltas(model, mode=mode)
        weights.full_heads = ((0, 0), (2, 1)) if mode == "global" else ()
        with guest(model, weights):
            retune(model, 0.3, checkpointing=checkpointing)
            tokens, _ = model.aggregator(random_images())
            tokens[3].square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in weights.block_deltas.parameters()]))
    assert found[0].abs().max() > 0 and torch.allclose(*found, rtol=1e-4, atol=1e-7)


def test_saved_ones_are_loaded(model, tmp_path):
    weights = random_deltas(model)
    weights.save(tmp_path / "pace.safetensors")
    loaded = PaceWeights.load(tmp_path / "pace.safetensors").block_deltas
    assert loaded.rank == RANK and loaded.shapes() == weights.block_deltas.shapes()
    for name, parameter in weights.block_deltas.named_parameters():
        assert torch.equal(dict(loaded.named_parameters())[name], parameter)


def test_blocks_of_another_shape_are_refused(model, mode):
    weights = random_deltas(model, mode=mode)
    shapes = weights.block_deltas.shapes()
    name = "global_blocks.2.mlp.fc1.weight"
    shapes[name] = (shapes[name][0] // 2, shapes[name][1])
    shapes["global_blocks.9.mlp.fc1.bias"] = (128,)
    with pytest.raises(WeightsError, match=f"{name} and 1 other"):
        accelerate(model, 0.3, weights=replace(weights, block_deltas=BlockDeltas(shapes)))


def test_threads_do_not_meet(model, mode):
    """Many passes through one model at once, pruned ones and unpruned ones."""
    weights = random_deltas(model, mode=mode)
    accelerate(model, 0.3, weights=weights, min_frames=3)
    clips = [random_images(3), random_images(2), random_images(4, seed=1), random_images(1)]
    expected = [predictions(model, clip) for clip in clips]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda clip: predictions(model, clip), clips * 4))
    for one, other in zip(found, expected * 4, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("where", ["block", "part", "method"])
def test_forwards_that_somebody_replaced_on_an_instance_see_the_changes(model, mode, where):
    """That of a block before us; parts of blocks and methods of the aggregator after us, too."""
    weights, images = random_deltas(model, mode=mode), random_images()
    expected = predictions(accelerate(model, 0.3, weights=weights), images)
    remove(model)
    calls = []

    def counted(function):
        def call(*args, **kwargs):
            calls.append(1)
            return function(*args, **kwargs)

        return call

    if where == "method":
        accelerate(model, 0.3, weights=weights)
        own = model.aggregator._process_global_attention
        model.aggregator._process_global_attention = counted(own)
        calls += [1] * (mode == "pre-aa")  # which has no use for it
    elif where == "block":
        block = model.aggregator.global_blocks[2]
        block.forward = counted(block.forward)
        accelerate(model, 0.3, weights=weights)
        calls.clear()
    else:
        accelerate(model, 0.3, weights=weights)
        part = model.aggregator.global_blocks[2].mlp.fc1
        part.forward = counted(part.forward)
    found = predictions(model, images)
    assert calls
    for name in ("pose_enc", "depth"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    with ThreadPoolExecutor(4) as pool:
        for other in pool.map(lambda _: predictions(model, images), range(8)):
            assert_equal(other, found)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1]), name


def test_hooks_run_once_each(model, mode):
    calls, mlp = [], model.aggregator.frame_blocks[1].mlp
    handle = mlp.register_forward_hook(lambda module, *_: calls.append(module))
    accelerate(model, 0.3, weights=random_deltas(model, mode=mode))
    predictions(model, random_images())
    handle.remove()
    assert len(calls) == 1 and calls[0] is mlp


@pytest.mark.skipif(TORCH < (2, 4), reason="torch 2.3 can't trace dataclasses")
@pytest.mark.parametrize("kind", ["frame", "global"])
def test_compiled_blocks_see_the_changes(model, mode, kind):
    weights, images = random_deltas(model, mode=mode), random_images()
    expected = predictions(accelerate(model, 0.3, weights=weights), images)
    blocks = getattr(model.aggregator, f"{kind}_blocks")
    blocks[1] = torch.compile(blocks[1], backend="eager")
    found = predictions(model, images)
    torch.testing.assert_close(found["depth"], expected["depth"], rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


class Wrapper(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_parts_wrapped_afterwards_are_refused_rather_than_left_alone(model, mode):
    accelerate(model, 0.3, weights=random_deltas(model, mode=mode))
    attention = model.aggregator.global_blocks[3].attn
    attention.proj = Wrapper(attention.proj)
    with pytest.raises(UnsupportedModelError, match=r"global_blocks\.3\.attn\.proj"):
        model(random_images())


def test_blocks_wrapped_afterwards_see_the_changes(model, mode):
    images = random_images()
    expected = predictions(accelerate(model, 0.3, weights=random_deltas(model, mode=mode)), images)
    model.aggregator.global_blocks[3] = Wrapper(model.aggregator.global_blocks[3])
    assert_equal(predictions(model, images), expected)


def test_offloaded_blocks_are_refused(model, mode):
    accelerate(model, 0.3, weights=random_deltas(model, mode=mode))
    model.aggregator.frame_blocks[0].to("meta")
    with pytest.raises(UnsupportedModelError, match=r"^frame_blocks\.0\.\S+ is offloaded"):
        model(random_images())


def test_only_floating_matrices_and_vectors_are_changed(model):
    block = model.aggregator.frame_blocks[0]
    block.kernel = torch.nn.Parameter(torch.zeros(2, 2, 3, 3))
    block.codes = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    names = PaceWeights.new(model).block_deltas.shapes()
    assert not any("kernel" in name or "codes" in name for name in names)
    accelerate(model, 0.3, weights=random_deltas(model))
    predictions(model, random_images())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_changed_too(model, mode, copied):
    images = random_images()
    expected = predictions(accelerate(model, 0.3, weights=random_deltas(model, mode=mode)), images)
    assert_equal(expected, predictions(copied(model), images))


def test_autocast_rounds_them_and_no_more(model, mode):
    images = random_images()
    accelerate(model, 0.3, weights=random_deltas(model, mode=mode))
    expected = predictions(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        found = predictions(model, images)
        plain = predictions(accelerate(model, 0.3, weights=None, mode=mode), images)
    error = (found["depth"] - expected["depth"]).abs().mean()
    # Rounding may keep other tokens; without the changes it would be all of it.
    assert error < 0.5 * (plain["depth"] - expected["depth"]).abs().mean()
