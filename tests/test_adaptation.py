"""Learned changes of the attention blocks, against a model whose own parameters were changed by hand."""

import copy
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hosts import assert_equal, random_adaptation, random_images, tiny_vggt

from pacevggt_patch import PaceWeights, UnsupportedModelError, WeightsError, accelerate, paused, remove
from pacevggt_patch.hosts.vggt import all_block_parameters
from pacevggt_patch.method import scoring as scorer_module
from pacevggt_patch.method.block_deltas import RANK, BlockAdaptation
from pacevggt_patch.patching.install import retune
from pacevggt_patch.training.guest import guest
from pacevggt_patch.weights.pace import pace as weights_module


@pytest.fixture(params=[1, 2], ids=["single", "in pairs"])
def model(request):
    return tiny_vggt(group=request.param)


def changed_by_hand(model, adaptation: BlockAdaptation, factor: float):
    """A copy of the model whose block parameters are W + factor * up @ down and b + factor * shift, made one by one."""
    changed = copy.deepcopy(model)
    parameters = dict(changed.aggregator.named_parameters())
    with torch.no_grad():
        for name, up in adaptation.up.items():
            change = factor * (up.double() @ adaptation.down[name].double())
            parameters[name.replace("/", ".")].add_(change)
        for name, shift in adaptation.shift.items():
            parameters[name.replace("/", ".")].add_(factor * shift.double())
    return changed


def predictions(model, images):
    with torch.no_grad():
        return model(images)


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.8])
def test_equals_a_model_changed_by_hand(model, ratio):
    weights, images = random_adaptation(model), random_images(3, batch=2)
    by_hand = changed_by_hand(model, weights.adaptation, weights.adaptation.strength(ratio))
    expected = predictions(accelerate(by_hand, ratio, weights=None), images)
    found = predictions(accelerate(model, ratio, weights=weights), images)
    plain = predictions(accelerate(model, ratio, weights=None), images)
    for name in ("pose_enc", "depth", "world_points"):
        assert torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-4), name
        assert not torch.allclose(found[name], plain[name], rtol=1e-3, atol=1e-4), name


def test_every_parameter_of_every_block_is_changed(model):
    own = all_block_parameters(model.aggregator)
    changed = random_adaptation(model).adaptation(own)
    assert changed.keys() == own.keys()
    assert all(not torch.equal(changed[name], own[name]) for name in own)
    names = [name for name, _ in model.aggregator.named_parameters() if "_blocks." in name]
    assert sorted(own) == sorted(names) and len(names) > 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_stay_narrow(dtype):
    model = tiny_vggt().to(dtype)
    own = all_block_parameters(model.aggregator)
    adaptation = random_adaptation(model).adaptation
    changed = adaptation(own)
    by_hand = dict(changed_by_hand(model.double(), adaptation, 1.0).aggregator.named_parameters())
    assert changed.keys() == own.keys()
    for name, parameter in changed.items():
        assert parameter.dtype == dtype
        # The change is rounded, and so is the sum.
        largest = by_hand[name].abs().max().item()
        assert (parameter - by_hand[name]).abs().max() <= 2 * torch.finfo(dtype).eps * largest, name


def test_untrained_changes_nothing(model):
    images = random_images()
    plain = predictions(accelerate(model, 0.3, weights=None), images)
    assert_equal(plain, predictions(accelerate(model, 0.3, weights=PaceWeights.new(model)), images))


def test_the_unpruned_model_runs_with_its_own_parameters(model):
    images = random_images()
    stock = predictions(model, images)
    accelerate(model, 1.0, weights=random_adaptation(model))
    assert_equal(stock, predictions(model, images))
    accelerate(model, 0.3, weights=random_adaptation(model))
    with paused(model):
        assert_equal(stock, predictions(model, images))
    assert_equal(stock, predictions(remove(model), images))


def test_the_parameters_of_the_host_are_never_touched(model):
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    accelerate(model, 0.3, weights=random_adaptation(model))
    predictions(model, random_images())

    def fail(*_):
        raise RuntimeError("a hook failed")

    handle = model.aggregator.global_blocks[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="a hook failed"):
        model(random_images())
    handle.remove()
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1]), name


def test_strength_fades_towards_the_stock_model():
    adaptation = BlockAdaptation({}, full_strength=0.25)
    assert [adaptation.strength(ratio) for ratio in (0.05, 0.25)] == [1, 1]
    assert adaptation.strength(0.5) == pytest.approx(0.5)  # half of the way, by the logarithm
    assert adaptation.strength(1.0) == 0
    for wrong in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="full_strength must lie between 0 and 1"):
            BlockAdaptation({}, full_strength=wrong)


def test_nearest_changes_of_a_lower_rank(model):
    adaptation = random_adaptation(model).adaptation
    for rank in (1, 5, RANK):
        nearest = adaptation.nearest(rank)
        assert nearest.rank == rank and nearest.full_strength == adaptation.full_strength
        for name, up in adaptation.up.items():
            wanted = (up @ adaptation.down[name]).detach().double()
            found = (nearest.up[name] @ nearest.down[name]).detach().double()
            left = (
                torch.linalg.svdvals(wanted)[rank:].square().sum().sqrt()
            )  # no matrix of that rank is nearer
            assert (found - wanted).norm() == pytest.approx(
                left.item(), rel=1e-3, abs=1e-4 * wanted.norm().item()
            )
            assert nearest.up[name].shape[1] == len(nearest.down[name]) == rank
        assert all(torch.equal(shift, adaptation.shift[name]) for name, shift in nearest.shift.items())
    assert adaptation.rank == RANK
    for wrong in (0, RANK + 1):
        with pytest.raises(ValueError, match=f"rank must lie between 1 and {RANK}, got {wrong}"):
            adaptation.nearest(wrong)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_part(model, checkpointing):
    weights = random_adaptation(model)
    with guest(model, weights):
        retune(model, 0.3, checkpointing=checkpointing)
        tokens, _ = model.aggregator(random_images())
        sum(value.square().mean() for value in tokens.compact.values()).backward()
    for name, parameter in weights.adaptation.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        # A constant added to all keys cancels in the softmax, so some gradients may be nearly 0, but not all of one.
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_with_and_without_checkpointing_are_the_same(model):
    found = []
    for checkpointing in (False, True):
        weights = random_adaptation(model)
        with guest(model, weights):
            retune(model, 0.3, checkpointing=checkpointing)
            tokens, _ = model.aggregator(random_images())
            tokens.compact[3].square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in weights.adaptation.parameters()]))
    assert torch.allclose(*found, rtol=1e-4, atol=1e-7)


def test_round_trip(model, tmp_path):
    weights = random_adaptation(model)
    weights.save(tmp_path / "pace.safetensors")
    loaded = PaceWeights.load(tmp_path / "pace.safetensors").adaptation
    assert loaded.rank == RANK and loaded.shapes() == weights.adaptation.shapes()
    for name, parameter in weights.adaptation.named_parameters():
        assert torch.equal(dict(loaded.named_parameters())[name], parameter)


def test_files_from_before_there_was_an_adaptation(model, tmp_path, monkeypatch):
    path = tmp_path / "pace.safetensors"
    weights = replace(random_adaptation(model), adaptation=BlockAdaptation({}, 0))
    monkeypatch.setattr(weights_module, "FORMAT", 1)
    weights.save(path)
    monkeypatch.undo()
    accelerate(model, 0.3, weights=path)
    found = predictions(model, random_images())
    monkeypatch.setattr(scorer_module, "DISTINCTNESS_WEIGHT", 0.0)  # nor was there distinctness
    assert_equal(predictions(accelerate(model, 0.3, weights=None), random_images()), found)


def test_blocks_of_another_shape_are_refused(model):
    weights = random_adaptation(model)
    shapes = weights.adaptation.shapes()
    name = "global_blocks.2.mlp.fc1.weight"
    shapes[name] = (shapes[name][0] // 2, shapes[name][1])
    shapes["global_blocks.9.mlp.fc1.bias"] = (128,)
    message = (
        f"pace weights new change {name} and 1 other parameters that this model's attention blocks do not have in "
        "that shape"
    )
    with pytest.raises(WeightsError, match=re.escape(message)):
        accelerate(model, 0.3, weights=replace(weights, adaptation=BlockAdaptation(shapes)))


@pytest.mark.skipif(torch.__version__ < "2.6", reason="older compilers break the graph in the stock code")
def test_compiles_in_one_graph(model):
    images = random_images()
    accelerate(model, 0.3, weights=random_adaptation(model))
    expected = predictions(model, images)
    assert_equal(expected, predictions(torch.compile(model, backend="eager", fullgraph=True), images))


def test_threads_do_not_meet(model):
    """Many passes through one model at once, pruned ones and unpruned ones."""
    weights = random_adaptation(model)
    accelerate(model, 0.3, weights=weights, min_frames=3)
    clips = [random_images(3), random_images(2), random_images(4, seed=1), random_images(1)]
    expected = [predictions(model, clip) for clip in clips]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda clip: predictions(model, clip), clips * 6))
    for one, other in zip(found, expected * 6, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("where", ["block", "part", "aggregator"])
def test_forwards_that_somebody_replaced_on_an_instance_see_the_changes(model, where):
    weights, images = random_adaptation(model), random_images()
    expected = predictions(accelerate(model, 0.3, weights=weights), images)
    calls = []

    def counted(function):
        def call(*args, **kwargs):
            calls.append(1)
            return function(*args, **kwargs)

        return call

    if where == "aggregator":
        model.aggregator._process_global_attention = counted(model.aggregator._process_global_attention)
    else:
        block = model.aggregator.global_blocks[2]
        part = block if where == "block" else block.mlp.fc1
        part.forward = counted(part.forward)
    assert_equal(expected, predictions(model, images))
    assert calls
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: predictions(model, images), range(24)):
            assert_equal(expected, found)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1]), name


def test_hooks_run_once_each(model):
    calls, mlp = [], model.aggregator.frame_blocks[1].mlp
    handle = mlp.register_forward_hook(lambda module, *_: calls.append(module))
    accelerate(model, 0.3, weights=random_adaptation(model))
    predictions(model, random_images())
    handle.remove()
    assert len(calls) == 1 and calls[0] is mlp


def test_compiled_blocks_see_the_changes(model):
    weights, images = random_adaptation(model), random_images()
    expected = predictions(accelerate(model, 0.3, weights=weights), images)
    model.aggregator.frame_blocks[1] = torch.compile(model.aggregator.frame_blocks[1], backend="eager")
    found = predictions(model, images)
    assert torch.allclose(found["depth"], expected["depth"], atol=1e-5)


def test_wrapped_blocks_are_refused_rather_than_left_alone(model):
    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    accelerate(model, 0.3, weights=random_adaptation(model))
    model.aggregator.global_blocks[3] = Wrapper(model.aggregator.global_blocks[3])
    message = (
        "the pace weights do not know global_blocks.3.inner.norm1.weight, a parameter of an attention block of this "
        "model: if the block was wrapped after accelerate, undo that, else pass weights=None"
    )
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        model(random_images())


def test_hosts_that_run_other_blocks_than_they_say_are_refused():
    model = tiny_vggt(group=2)
    accelerate(model, 0.3, weights=random_adaptation(model))
    own = model.aggregator._process_frame_attention

    def one_block_more(tokens, batch, frames, length, channels, block, **kwargs):
        tokens, block, outputs = own(tokens, batch, frames, length, channels, block, **kwargs)
        return tokens, block + 1, outputs

    model.aggregator._process_frame_attention = one_block_more
    with pytest.raises(UnsupportedModelError, match="ran 3 blocks where 2 were expected"):
        model(random_images())


def test_offloaded_blocks_are_refused(model):
    accelerate(model, 0.3, weights=random_adaptation(model))
    model.aggregator.frame_blocks[0].to("meta")
    with pytest.raises(
        UnsupportedModelError, match=r"^frame_blocks\.0\.\S+ is offloaded, so the pace weights can't"
    ):
        model(random_images())


def test_only_floating_matrices_and_vectors_are_changed(model):
    block = model.aggregator.frame_blocks[0]
    block.kernel = torch.nn.Parameter(torch.zeros(2, 2, 3, 3))
    block.codes = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    names = PaceWeights.new(model).adaptation.shapes()
    assert not any("kernel" in name or "codes" in name for name in names)
    accelerate(model, 0.3, weights=random_adaptation(model))
    predictions(model, random_images())


@pytest.mark.parametrize("keys", [1.0, 0.4])
def test_gradients_in_training_mode_are_those_of_evaluation_mode(model, keys):
    """The stock host runs blocks again for the backward pass while it trains."""
    found = []
    for training in (False, True):
        weights = random_adaptation(model)
        accelerate(model, 0.3, weights=weights, global_keys=keys)
        model.train(training)
        model.zero_grad()
        tokens, _ = model.aggregator(random_images())
        sum(value.square().mean() for value in tokens.compact.values()).backward()
        parameters = [*weights.adaptation.parameters(), *model.aggregator.global_blocks.parameters()]
        found.append(torch.cat([p.grad.flatten() for p in parameters]))
        assert model.aggregator.training is training
    assert torch.allclose(*found, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_changed_too(model, copied):
    images = random_images()
    expected = predictions(accelerate(model, 0.3, weights=random_adaptation(model)), images)
    assert_equal(expected, predictions(copied(model), images))


def test_autocast(model):
    images = random_images()
    accelerate(model, 0.3, weights=random_adaptation(model))
    expected = predictions(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        found = predictions(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        plain = predictions(accelerate(model, 0.3, weights=None), images)
    error = (found["depth"] - expected["depth"]).abs().mean()
    # Rounding may keep other tokens; without the changes it would be all of it.
    assert error < 0.5 * (plain["depth"] - expected["depth"]).abs().mean()
