"""The patch on stock VGGTs with random weights: equal to stock where it must be, gone without a trace."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from fork_doubles import build_merging
from hosts import assert_equal, fork_of_vggt, random_deltas, random_images, run, tiny_vggt, with_heads
from torch import nn

from pacevggt_patch import (
    PaceConfig,
    PaceError,
    PaceWeights,
    UnsupportedModelError,
    WeightsError,
    accelerate,
    is_accelerated,
    paused,
    remove,
    summary,
)
from pacevggt_patch.patching import forwards, install
from pacevggt_patch.patching.install import forwards_of, retune, state_of

MODES = ["global", "pre-aa"]


@pytest.fixture
def model():
    return tiny_vggt()


def snapshot(model: nn.Module):
    """All that is in the `__dict__` of every module, and its class."""
    names = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            names[name, key] = dict(value) if isinstance(value, dict) else value
        names[name, "class"] = type(module)
    return names


# ---- equal to stock


@pytest.mark.parametrize("frames,batch,height,width", [(3, 2, 42, 70), (17, 1, 28, 14), (1, 1, 14, 14)])
@pytest.mark.parametrize("all_layers", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_keeping_everything_is_stock_to_the_bit(frames, batch, height, width, all_layers, mode):
    model = tiny_vggt(all_layers=all_layers)
    images = random_images(frames, batch=batch, height=height, width=width)
    stock = run(model, images)
    with torch.inference_mode():
        layers, start = model.aggregator(images)
    for weights in (PaceWeights.new(model, mode=mode), None)[: 1 + all_layers]:
        accelerate(model, keep_ratio=1, weights=weights, mode=mode)
        assert_equal(run(model, images), stock)
        with torch.inference_mode():
            found, same = model.aggregator(images)
        assert same == start and len(found) == len(layers)
        assert all(a is None if b is None else torch.equal(a, b) for a, b in zip(found, layers, strict=True))


@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_groups_of_blocks_are_stock_to_the_bit(group, mode):
    model = tiny_vggt(group=group)
    images = random_images()
    stock = run(model, images)
    assert_equal(run(accelerate(model, 1.0, weights=None, mode=mode), images), stock)


@pytest.mark.parametrize("mode", MODES)
def test_the_other_order_of_blocks_is_stock_to_the_bit(mode):
    model, images = tiny_vggt(), random_images()
    model.aggregator.aa_order = ["global", "frame"]
    stock = run(model, images)
    assert_equal(run(accelerate(model, 1.0, weights=None, mode=mode), images), stock)
    fast = run(accelerate(model, 0.3, weights=None, mode=mode), images)
    assert fast["depth"].isfinite().all() and not torch.equal(fast["depth"], stock["depth"])


# ---- a guest: nothing is left behind


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compile", [False, True])
def test_remove_leaves_no_trace(model, training, mode, compile):
    model.train(training)
    calls = []
    handles = [
        m.register_forward_hook(lambda *_: calls.append(1)) for m in (model.aggregator, model.depth_head)
    ]
    images = random_images()
    with torch.no_grad():
        stock = model(images)
    before, keys = snapshot(model), list(model.state_dict())
    values = {k: v.clone() for k, v in model.state_dict().items()}
    flags = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark, torch.get_num_threads())
    random_state = torch.get_rng_state()

    calls.clear()
    weights = random_deltas(model, mode=mode)
    accelerate(model, 0.3, weights=weights, compile=compile)
    assert not calls  # the trial is of another model
    if not compile:
        with torch.no_grad():
            model(images)
        assert len(calls) == 2  # hooks run on the accelerated forwards
    assert list(model.state_dict()) == keys
    assert model.training is training
    remove(model)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert flags == (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.get_num_threads(),
    )
    after = snapshot(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value is after[key] or key[1] == "frequency_cache" or value == after[key], key
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        assert_equal(model(images), stock)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("mode", MODES)
def test_cycles_leak_nothing(model, mode):
    images = random_images(2, height=28, width=28)
    run(accelerate(model, 0.3, weights=None, mode=mode), images)
    state = weakref.ref(state_of(model))
    remove(model)
    gc.collect()
    assert state() is None
    before = len(gc.get_objects())
    for i in range(10):
        accelerate(model, 0.3 + 0.01 * i, weights=None, mode=mode)
        if i % 5 == 0:
            run(model, images)
        remove(model)
    gc.collect()
    assert len(gc.get_objects()) - before < 10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_pass_leaves_no_tokens_behind(model, mode, gradients):
    """What is kept of the last one is which tokens it kept."""
    accelerate(model, 0.3, weights=with_heads(model, (1, 0)) if mode == "global" else None, mode=mode)
    images = random_images(3, batch=2)
    shapes = {(2, 75, 32), (6, 25, 32), (2, 3, 25, 64), (2, 3, 11, 64), (6, 20, 32), (2, 33, 32), (6, 11, 32)}

    def held():  # tensors proper: what compilers made for other tests has shapes without values
        gc.collect()
        return sum(type(t) is torch.Tensor and tuple(t.shape) in shapes for t in gc.get_objects())

    before = held()
    with torch.set_grad_enabled(gradients):
        model(images)
    threads = state_of(model).threads
    assert threads.clip is None and not threads.embedding
    kept = summary(model).kept
    assert kept.shape == (2, 3, 6) and kept.dtype == torch.int64
    assert held() == before
    assert not state_of(model).recomputed.clips


@pytest.mark.parametrize("mode", MODES)
def test_other_instances_are_untouched(model, mode):
    other, images = tiny_vggt(seed=1), random_images()
    stock = run(other, images)
    accelerate(model, 0.3, weights=None, mode=mode)
    assert not is_accelerated(other)
    assert_equal(run(other, images), stock)


@pytest.mark.parametrize("mode", MODES)
def test_accelerate_again_retunes_and_remove_is_idempotent(model, mode):
    images = random_images()
    stock = run(model, images)
    first = run(accelerate(model, 0.5, weights=None, mode=mode), images)
    run(accelerate(model, 0.2, weights=None, mode=mode), images)
    assert_equal(run(accelerate(model, 0.5, weights=None, mode=mode), images), first)
    assert remove(model) is model and remove(model) is model
    assert not is_accelerated(model)
    assert_equal(run(model, images), stock)


def test_modes_follow_one_another(model):
    images = random_images()
    stock = run(model, images)
    first = {mode: run(accelerate(tiny_vggt(), 0.5, weights=None, mode=mode), images) for mode in MODES}
    for mode in (*MODES, *MODES):
        assert_equal(run(accelerate(model, 0.5, weights=None, mode=mode), images), first[mode])
        assert summary(model).config.mode == mode
    assert_equal(run(remove(model), images), stock)


@pytest.mark.parametrize(
    "bad",
    [dict(keep_ratio=2), dict(weights="no/such/file.safetensors"), dict(merge_budget=0.9), dict(mode="x")],
)
def test_a_failed_accelerate_changes_nothing(model, bad):
    images = random_images()
    accelerate(model, 0.5, weights=None)
    before, state = run(model, images), state_of(model)
    with pytest.raises(PaceError):
        accelerate(model, **{"weights": None, **bad})
    assert state_of(model) is state
    assert_equal(run(model, images), before)


def test_a_model_that_fails_the_trial_is_left_alone(model):
    def forward(self, images):
        tokens, start = super(type(self), self).forward(images)
        return [t if t is None else t + torch.rand(()) for t in tokens], start

    model.aggregator.__class__ = type("Noisy", (type(model.aggregator),), {"forward": forward})
    before = snapshot(model)
    with pytest.raises(PaceError):
        accelerate(model, weights=None)
    assert snapshot(model) == before and not is_accelerated(model)


@pytest.mark.parametrize("mode", MODES)
def test_paused_blocks_run_the_stock_forward(model, mode):
    images = random_images()
    stock = run(model, images)
    accelerate(model, 0.3, weights=None, mode=mode)
    fast = run(model, images)
    with paused(model):
        assert is_accelerated(model) and summary(model).paused
        assert_equal(run(model, images), stock)
        with paused(model):
            assert_equal(run(model, images), stock)
        assert_equal(run(model, images), stock)
    assert_equal(run(model, images), fast)
    with pytest.raises(ZeroDivisionError), paused(model):
        1 / 0  # noqa: B018
    assert_equal(run(model, images), fast)


def test_paused_blocks_may_overlap(model):
    images = random_images()
    stock = run(model, images)
    fast = run(accelerate(model, 0.3, weights=None), images)
    first, second = paused(model), paused(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert_equal(run(model, images), stock)
    second.__exit__(None, None, None)
    assert_equal(run(model, images), fast)


def test_settings_changed_while_paused_come_into_force_afterwards(model):
    images = random_images()
    stock = run(model, images)
    wanted = run(accelerate(tiny_vggt(), 0.4, weights=None), images)
    accelerate(model, 0.3, weights=None)
    with paused(model):
        accelerate(model, 0.4, weights=None)
        assert summary(model).paused
        assert_equal(run(model, images), stock)
    assert_equal(run(model, images), wanted)


def test_a_pause_is_of_its_own_thread(model):
    images = random_images()
    stock = run(model, images)
    fast = run(accelerate(model, 0.3, weights=None), images)
    with paused(model), ThreadPoolExecutor(1) as pool:
        assert_equal(pool.submit(run, model, images).result(), fast)
        assert_equal(run(model, images), stock)


@pytest.mark.parametrize("mode", MODES)
def test_copies_are_accelerated_models_of_their_own(model, mode):
    images = random_images()
    stock = run(model, images)
    weights = random_deltas(model, mode=mode)
    if mode == "global":
        weights.full_heads = ((1, 0), (2, 1))
    fast = run(accelerate(model, 0.3, weights=weights), images)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for other in copies:
        assert is_accelerated(other)
        ours = {id(module) for module in other.modules()}
        assert all(id(forward.module) in ours for forward in forwards_of(other))
        assert state_of(other) is not state_of(model)
        assert_equal(run(other, images), fast)
        assert_equal(run(remove(other), images), stock)
        assert is_accelerated(model)
    accelerate(copy.deepcopy(model), 0.9, weights=None)
    assert summary(model).config.keep_ratio == 0.3
    assert_equal(run(model, images), fast)


def test_a_copy_made_while_paused_is_not_paused(model):
    images = random_images()
    fast = run(accelerate(model, 0.3, weights=None), images)
    with paused(model):
        other = copy.deepcopy(model)
    assert_equal(run(other, images), fast)


@pytest.mark.parametrize("all_layers", [False, True])
def test_a_vendored_copy_of_vggt_is_accelerated(tmp_path, monkeypatch, all_layers):
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    name = fork_of_vggt(tmp_path, f"vendored_vggt_{int(all_layers)}")
    fork, images = tiny_vggt(name, all_layers=all_layers), random_images(9)
    assert type(fork).__module__.startswith(name)
    stock = run(fork, images)
    for mode in MODES:
        assert_equal(run(accelerate(fork, 1, weights=None, mode=mode), images), stock)
        fast = run(accelerate(fork, 0.3, weights=None, mode=mode), images)
        own = accelerate(tiny_vggt(all_layers=all_layers), 0.3, weights=None, mode=mode)
        assert_equal(fast, run(own, images))
    assert_equal(run(remove(fork), images), stock)


def test_a_head_alone_does_not_carry_the_model(model):
    before = len(pickle.dumps(model.camera_head))
    accelerate(model, 0.3, weights=None)
    assert len(pickle.dumps(model.camera_head)) < before + 5_000


def test_a_wrapper_of_two_models_can_be_cleaned_at_once(model):
    pair = nn.ModuleDict({"a": accelerate(model, weights=None), "b": accelerate(tiny_vggt(), weights=None)})
    remove(pair)
    assert not is_accelerated(pair["a"]) and not is_accelerated(pair["b"])


# ---- forwards of others


def replaced(module: nn.Module, calls: list):
    own = module.forward

    def theirs(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    module.forward = theirs
    return theirs


@pytest.mark.parametrize("name", ["aggregator.global_blocks.2", "aggregator.frame_blocks.0", "depth_head"])
@pytest.mark.parametrize("mode", MODES)
def test_a_forward_that_somebody_put_there_before_us_still_runs(model, name, mode):
    images, calls = random_images(), []
    expected = run(accelerate(tiny_vggt(), 0.3, weights=None, mode=mode), images)
    module = model.get_submodule(name)
    theirs = replaced(module, calls)
    accelerate(model, 0.3, weights=None, mode=mode)
    calls.clear()
    found = run(model, images)
    assert calls
    for key in ("pose_enc", "depth"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-4)
    remove(model)
    assert module.__dict__["forward"] is theirs


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_of_the_aggregator_that_is_bound_to_this_instance_is_refused(model, mode):
    """The trial is of another instance, and pre-AA pruning has a forward of its own there."""
    calls = []
    theirs = replaced(model.aggregator, calls)
    with pytest.raises(UnsupportedModelError, match="aggregator.* undo"):
        accelerate(model, 0.3, weights=None, mode=mode)
    assert model.aggregator.forward is theirs and not is_accelerated(model)


@pytest.mark.parametrize(
    "name", ["aggregator.forward", "aggregator.patch_embed.forward_features", "aggregator.rope.forward"]
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_forward_that_somebody_put_over_ours_is_not_taken_out_from_under(model, name, wrapped):
    accelerate(model, weights=None)
    module, attribute = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    ours, whole = getattr(module, attribute), nn.ModuleDict({"model": model}) if wrapped else model

    def theirs(*args):
        return ours(*args)

    setattr(module, attribute, theirs)
    for call in [remove] + [lambda m: accelerate(m, 0.5, weights=None)] * (not wrapped):
        with pytest.raises(PaceError, match=f"{name} was replaced after accelerate"):
            call(whole)
    assert is_accelerated(model)
    setattr(module, attribute, ours)
    assert not is_accelerated(remove(whole))


def test_other_parameters_after_accelerate_are_warned_of(model):
    """Once, and not where the values are the same."""
    accelerate(model, weights=with_heads(model, (1, 0)))
    images = random_images()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(model, images)
        model.load_state_dict(tiny_vggt().state_dict())
        run(model, images)
    model.load_state_dict(tiny_vggt(seed=1).state_dict())
    with pytest.warns(UserWarning, match="other parameters after accelerate"):
        run(model, images)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(model, images)
    with pytest.raises(WeightsError, match="another checkpoint"):
        accelerate(model, weights=with_heads(tiny_vggt(), (1, 0)))


def test_a_model_that_is_loaded_later_is_tried_then():
    """Nothing can be tried on the meta device."""
    model = build_merging()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    accelerate(model.to("meta"), 0.5, weights=None)
    model.load_state_dict(values, assign=True)
    with pytest.raises(UnsupportedModelError):
        accelerate(model, 0.5, weights=None)


# ---- weights in force


def values(weights: PaceWeights):
    return {name: value.clone() for name, value in weights.modules().state_dict().items()}


@pytest.mark.parametrize("mode", MODES)
def test_weights_of_the_user_are_left_alone(model, mode):
    weights, images = random_deltas(model, mode=mode), random_images()
    weights.scorer.train()
    weights.scorer.out.weight.requires_grad_(False)
    flags = {n: (p.requires_grad, p.device) for n, p in weights.modules().named_parameters()}
    before, modules = values(weights), dict(weights.modules().named_children())
    accelerate(model, 0.3, weights=weights)
    first = run(model, images)
    assert {n: (p.requires_grad, p.device) for n, p in weights.modules().named_parameters()} == flags
    assert dict(weights.modules().named_children()) == modules and weights.scorer.training
    assert all(torch.equal(value, before[name]) for name, value in weights.modules().state_dict().items())
    with torch.no_grad():
        for parameter in weights.modules().parameters():
            parameter.add_(1.0)
    assert_equal(run(model, images), first)  # what is in force is a copy


@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_model_with_weights_gives_outputs_without_gradients(model, mode):
    model.requires_grad_(False)
    accelerate(model, 0.3, weights=random_deltas(model, mode=mode))
    out = model(random_images())
    assert not any(value.requires_grad for value in out.values() if isinstance(value, torch.Tensor))


def test_a_model_that_moves_takes_its_weights_along(model):
    """Weights in force are parameters of nothing: `state_dict` and `parameters` are those of the stock model."""
    names = [name for name, _ in model.named_parameters()]
    accelerate(model, 0.3, weights=random_deltas(model))
    assert [name for name, _ in model.named_parameters()] == names
    expected = run(model, random_images())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    other = tiny_vggt(seed=1)
    other.load_state_dict(state)
    assert_equal(run(accelerate(other, 0.3, weights=random_deltas(other)), random_images()), expected)


# ---- what training uses


@pytest.mark.parametrize("mode", MODES)
def test_retune_changes_the_settings_and_nothing_else(mode):
    model, images = tiny_vggt(), random_images()
    merge = 0.2 if mode == "pre-aa" else None
    with torch.inference_mode():
        accelerate(model, 0.3, merge, weights=PaceWeights.new(model, mode=mode))
        expected = model(images)
        retune(model, 1.0)
        stock = model(images)
        retune(model, 0.3, merge)
        assert_equal(expected, model(images))
        remove(model)
        assert_equal(stock, model(images))
    with pytest.raises(PaceError, match="this model is not accelerated"):
        retune(model, 0.5)
    accelerate(model, weights=None)
    with pytest.raises(PaceError, match="keep_ratio"):
        retune(model, 2)
    assert summary(model).config.keep_ratio == 0.3


# ---- threads


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("learned", [False, True])
def test_two_threads_at_once_get_what_each_gets_alone(model, mode, learned):
    """Clips of different size, pruned ones and unpruned ones, which meet in the middle of their passes."""
    weights = None
    if learned:
        weights = random_deltas(model, mode=mode)
        weights.full_heads = ((1, 0),) if mode == "global" else ()
    accelerate(model, 0.3, weights=weights, mode=mode, min_frames=2)
    clips = [
        random_images(2, height=28, width=28),
        random_images(3, height=70, width=56),
        random_images(1),
        random_images(2, batch=2, seed=3),
    ]
    expected = [run(model, clip) for clip in clips]
    barrier = Barrier(len(clips))

    def meet(clip):
        barrier.wait()
        return run(model, clip)

    with ThreadPoolExecutor(len(clips)) as pool:
        for _ in range(3):
            for found, wanted in zip(pool.map(meet, clips), expected, strict=True):
                assert_equal(found, wanted)


def test_a_config_is_taken_in_place_of_loose_settings(model):
    images = random_images()
    expected = run(accelerate(model, 0.4, 0.1, weights=None, min_frames=2), images)
    config = PaceConfig(0.4, 0.1, min_frames=2)
    assert_equal(run(accelerate(model, config, weights=None), images), expected)
    found = summary(model).config
    assert (found.keep_ratio, found.merge_budget, found.min_frames, found.mode) == (0.4, 0.1, 2, "pre-aa")
    assert config.mode is None


def test_settings_that_can_not_be_met_leave_the_model_as_it_was(model, monkeypatch):
    images = random_images()
    accelerate(model, 0.4, weights=None)
    expected = run(model, images)
    monkeypatch.setattr("pacevggt_patch.hosts.blocks.is_block", lambda *_: False)
    monkeypatch.setattr("pacevggt_patch.patching.install.is_dense_head", lambda *_: False)
    with pytest.raises(UnsupportedModelError, match="compile=True"):
        accelerate(model, 0.2, weights=None, compile=True)
    assert summary(model).config.keep_ratio == 0.4
    assert_equal(run(model, images), expected)


@pytest.mark.parametrize("mode", MODES)
def test_each_dense_head_is_judged_once(model, monkeypatch, mode):
    """It runs on a copy for that, which takes a good part of the time of `accelerate`."""
    judged, judge = [], install.is_dense_head
    monkeypatch.setattr(
        install, "is_dense_head", lambda head, *size: judged.append(head) or judge(head, *size)
    )
    accelerate(model, 0.4, weights=None, mode=mode)
    assert sorted(map(id, judged)) == sorted(map(id, (model.point_head, model.depth_head)))


def other_storage(model, values):
    for name, parameter in model.named_parameters():
        parameter.data = values[name]


def loaded(model, values):
    model.load_state_dict(values)


@pytest.mark.parametrize("change", [other_storage, loaded])
def test_each_change_of_parameters_after_each_accelerate_is_warned_of(model, change):
    for seed in (1, 2):
        accelerate(model, weights=with_heads(model, (1, 0)))
        change(model, tiny_vggt(seed=seed).state_dict())
        with pytest.warns(UserWarning, match="other parameters after accelerate"):
            run(model, random_images())


@pytest.mark.parametrize("mode", ["global", "pre-aa"])
@pytest.mark.parametrize("kind", ["frame_blocks", "global_blocks"])
def test_a_block_that_is_replaced_afterwards_is_named(model, kind, mode):
    accelerate(model, 0.5, weights=None, mode=mode)
    blocks = model.get_submodule(f"aggregator.{kind}")
    blocks[2] = tiny_vggt(seed=1).get_submodule(f"aggregator.{kind}")[2]
    with pytest.warns(UserWarning, match=f"aggregator.{kind}.2 was replaced after accelerate"):
        run(model, random_images())
    accelerate(model, 0.5, weights=None, mode=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(model, random_images())


@pytest.mark.parametrize("mode", ["global", "pre-aa"])
def test_a_trunk_that_is_replaced_afterwards_is_named(model, mode):
    accelerate(model, 0.5, weights=None, mode=mode)
    model.aggregator = tiny_vggt(seed=1).aggregator
    assert not is_accelerated(model)
    with pytest.raises(PaceError, match="not accelerated"):
        summary(model)
    with pytest.warns(UserWarning, match="aggregator was replaced after accelerate"):
        run(model, random_images())
    accelerate(model, 0.5, weights=None, mode=mode)
    assert is_accelerated(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(model, random_images())
    stock = tiny_vggt()
    stock.aggregator = tiny_vggt(seed=1).aggregator
    assert_equal(run(remove(model), random_images()), run(stock, random_images()))


@pytest.mark.parametrize("mode", ["global", "pre-aa"])
def test_a_trunk_that_is_wrapped_afterwards_stays_accelerated(model, mode):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args):
            return self.inner(*args)

    expected = run(accelerate(model, 0.5, weights=None, mode=mode), random_images())
    model.aggregator = Wrapper(model.aggregator)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_equal(run(model, random_images()), expected)
    assert is_accelerated(model)


def test_a_paused_block_may_be_closed_by_another_thread(model):
    accelerate(model, 0.5, weights=None)
    block = paused(model)
    block.__enter__()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(block.__exit__, None, None, None).result()
        assert not summary(model).paused

        def inside():
            with paused(model):
                return summary(model).paused

        assert pool.submit(inside).result()


def test_one_tensor_may_be_given_to_blocks_again(model):
    """Only the backward pass repeats a call."""
    accelerate(model, 0.5, weights=None)
    images, x, where = random_images(), torch.rand(3, 25, 32), torch.ones(3, 25, 2, dtype=torch.long)
    block = model.aggregator.global_blocks[0]
    with paused(model):
        block(x, pos=where)
    assert not model.aggregator.training
    seen = []
    block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    assert torch.isfinite(
        block(x, pos=where)
    ).all()  # outside of a forward pass, and no repetition of the paused call
    model(images)
    assert len(seen) == 2 and summary(model).kept is not None


class Tables(nn.Module):
    """A patch embedding that gives more than one row a frame."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding, self.more = embedding, {}

    def forward(self, images):
        return self.embedding(images) | self.more


@pytest.mark.parametrize(
    "more", [{}, {"table": torch.ones(7, 2)}, {"scalar": torch.tensor(1.0)}, {"name": "x"}]
)
def test_what_an_embedding_gives_beside_tokens_stays_in_chunks(model, more, monkeypatch):
    model.aggregator.patch_embed = Tables(model.aggregator.patch_embed)
    model.aggregator.patch_embed.more = more
    accelerate(model, 0.5, weights=None)
    images = random_images(5)
    whole = run(model, images)
    found = []
    model.aggregator.patch_embed.register_forward_hook(lambda module, args, out: found.append(out))
    monkeypatch.setattr(forwards, "chunk_rows", lambda *_: 2)
    parts = run(model, images)
    assert {k: getattr(v, "shape", v) for k, v in found[-1].items() if k in more} == {
        k: getattr(v, "shape", v) for k, v in more.items()
    }
    for name in ("depth", "pose_enc"):
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-5)
