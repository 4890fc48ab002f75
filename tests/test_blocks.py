"""Compiled blocks: the host's own arithmetic in every precision, and the host's own code where they do not fit."""

import copy
import pickle
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hosts import assert_equal, random_deltas, random_images, run, tiny_vggt
from torch import nn
from vggt.layers.swiglu_ffn import SwiGLUFFNFused

from pacevggt_patch import (
    PaceError,
    PaceWeights,
    UnsupportedModelError,
    accelerate,
    is_accelerated,
    paused,
    remove,
    summary,
)
from pacevggt_patch.hosts import blocks
from pacevggt_patch.hosts.rope import static_rope
from pacevggt_patch.patching.install import retune, state_of
from pacevggt_patch.runtime import compiling
from pacevggt_patch.runtime.attention import MORE, InterceptAttention
from pacevggt_patch.training.compiling import works

MODES = ["global", "pre-aa"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Traced as for any backend, but not translated to C++, which takes long."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")


@pytest.fixture
def model():
    return tiny_vggt()


def pruned(model, keep_ratio=0.4, *, weights=None, **settings):
    """The model, accelerated, however short the clip."""
    return accelerate(model, keep_ratio, weights=weights, **{"min_frames": 1, **settings})


def compiled_model(compile=True, **settings):
    return pruned(tiny_vggt(), compile=compile, **settings)


def close(found, expected, tolerance=1e-4):
    """Predictions are the same but for rounding."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype
            torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance * value.abs().max())


@pytest.fixture
def runs(monkeypatch):
    """Counts the accelerated blocks that ran by the functions of `hosts.blocks`."""
    count, real = Counter(), blocks.run_block

    def counted(module, *args, **kwargs):
        if "forward" in module.__dict__:  # a trial runs bare copies
            count[module] += 1
        return real(module, *args, **kwargs)

    monkeypatch.setattr(blocks, "run_block", counted)
    return count


PRECISIONS = {
    "float64": (torch.float64, None, 1e-12),
    "float32": (torch.float32, None, 1e-5),
    "bfloat16": (torch.bfloat16, None, 0.03),
    "float16": (torch.float16, None, 0.004),
    "autocast": (torch.float32, torch.bfloat16, 0.02),
    "bfloat16 under autocast": (torch.bfloat16, torch.bfloat16, 0.03),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["patch_embed.blocks.0", "global_blocks.1", "gated"])
@pytest.mark.parametrize("rows", [3, 100])
def test_a_block_does_what_the_host_does(model, kind, precision, rows):
    """However many of the 14 tokens pass at a time what is not attention."""
    weights, autocast, tolerance = PRECISIONS[precision]
    block = model.aggregator.get_submodule("global_blocks.1" if kind == "gated" else kind)
    if kind == "gated":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            block.mlp = SwiGLUFFNFused(32, 128)
    model = model.to(weights)
    assert blocks.is_block(block, 32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 32, generator=generator, dtype=torch.float64).to(weights)
    positions = torch.randint(0, 5, (2, 7, 2), generator=generator)
    where, turned = {}, None
    if not kind.startswith("patch"):
        where = {"pos": positions}
        dtype = weights if autocast is None else torch.promote_types(weights, torch.float32)
        turned = blocks.flat_rotation(static_rope(model.aggregator.rope), positions, 16, dtype)
    seen = {}

    def speed(function, *key):
        def call(*args):
            seen.setdefault(function.__name__, []).append(len(args[0]))
            return compiling.compiled(function, *key)(*args)

        return call

    with torch.no_grad(), torch.autocast("cpu", autocast, enabled=autocast is not None):
        expected = block(x, **where)
        flat = blocks.run_block(block, x.flatten(0, 1), turned, 2, autocast or weights, speed, rows=rows)
    found = flat.view(x.shape)
    assert seen == dict.fromkeys(
        ("before_attention", "after_attention"), [2, 3, 3, 3, 3] if rows == 3 else [14]
    )
    assert found.dtype == expected.dtype
    assert (found - expected).norm() <= tolerance * (expected - x).norm()


def test_other_tensors_take_the_place_of_parameters(model):
    block, generator = model.aggregator.global_blocks[1], torch.Generator().manual_seed(0)
    others = {n: torch.randn(p.shape, generator=generator) * 0.2 for n, p in block.named_parameters()}
    x, positions = torch.randn(2, 7, 32, generator=generator), torch.ones(2, 7, 2, dtype=torch.long)
    turned = blocks.flat_rotation(static_rope(model.aggregator.rope), positions, 16, torch.float32)
    with torch.no_grad():
        found = blocks.run_block(block, x.flatten(0, 1), turned, 2, torch.float32, others=others)
        expected = torch.func.functional_call(block, others, (x,), {"pos": positions})
    torch.testing.assert_close(found.view(x.shape), expected)


WEIGHTS = {"none": None, "deltas": (), "deltas and heads": ((1, 0), (2, 1))}


@pytest.mark.parametrize("keep_ratio", [0.4, 1.0])
@pytest.mark.parametrize(
    ("mode", "kind"), [("global", kind) for kind in WEIGHTS] + [("pre-aa", "none"), ("pre-aa", "deltas")]
)
def test_the_model_gives_the_same(model, keep_ratio, mode, kind, runs):
    images, weights = random_images(3, batch=2), None
    if WEIGHTS[kind] is not None:
        weights = replace(random_deltas(model, mode=mode), full_heads=WEIGHTS[kind])
    pruned(model, keep_ratio, weights=weights, mode=mode)
    runs.clear()  # those of the trial
    expected = run(model, images)
    # Uncompiled they serve where something is changed, as keys are in global blocks, and nothing is in the stock model.
    without = 4 if mode == "global" else 0
    assert len(runs) == (0 if keep_ratio == 1 else without if weights is None else 8)
    pruned(model, keep_ratio, weights=weights, mode=mode, compile=True)
    runs.clear()
    found = run(model, images)
    assert sorted(runs.values()) == [1] * 10
    close(found, expected)
    if weights is not None:
        plain = run(pruned(model, keep_ratio, mode=mode, compile=True), images)
        assert (keep_ratio == 1) == torch.allclose(plain["depth"], found["depth"], rtol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_autocast(model, runs, mode):
    """All is kept: rounding must not flip a choice."""
    images = random_images()
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(pruned(model, 1.0, mode=mode), images)
        pruned(model, 1.0, mode=mode, compile=True)
        runs.clear()  # those of the trial
        found = run(model, images)
    assert len(runs) == 10
    close(found, expected, 0.05)


@pytest.mark.parametrize("mode", MODES)
def test_other_numbers_of_frames_do_not_compile_blocks_again(model, mode):
    torch._dynamo.reset()
    pruned(model, mode=mode, compile=True)

    def graphs(images):
        counters = torch._dynamo.utils.counters["stats"]
        before = counters["unique_graphs"]
        with torch.inference_mode():
            model.aggregator(images)
        return counters["unique_graphs"] - before

    assert graphs(random_images(3)) == 4  # before and after attention, of DINO and of alternating attention
    for frames, batch, width in ((5, 1, 70), (2, 3, 70), (4, 1, 42)):
        assert graphs(random_images(frames, batch=batch, width=width)) == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(model, learned, checkpointing, mode, runs, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    found, images = [], random_images(2)
    for compile in (False, True):
        weights = None
        if learned:
            weights = replace(
                random_deltas(model, mode=mode), full_heads=((1, 0),) if mode == "global" else ()
            )
        pruned(model, weights=weights, mode=mode, compile=compile)
        retune(model, 0.4, checkpointing=checkpointing)
        model.zero_grad()
        tokens, _ = model.aggregator(images)
        tokens[3].square().mean().backward()
        parameters = [*model.aggregator.global_blocks.parameters()]
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert runs
    assert torch.allclose(*found, rtol=1e-3, atol=1e-6)


def test_inductor(model, monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    images = random_images()
    expected = run(pruned(model), images)
    with torch.inference_mode():
        pruned(model, compile=True)
        tokens, _ = model.aggregator(images)
        found = model.camera_head(tokens)[-1]
    torch.testing.assert_close(found, expected["pose_enc"], rtol=1e-4, atol=1e-4)


# ---- what runs as it is


def changed_linear(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.aggregator.global_blocks[1].mlp.fc1.__class__ = Doubled


def changed_activation(model):
    model.aggregator.global_blocks[1].mlp.act = nn.ReLU()


def changed_block(model):
    kind = type(model.aggregator.global_blocks[1])

    class Halved(kind):
        def forward(self, x, pos=None):
            return super().forward(x, pos=pos) / 2

    model.aggregator.global_blocks[1].__class__ = Halved


def changed_attention(model):
    model.aggregator.global_blocks[1].attn.fused_attn = False
    model.aggregator.global_blocks[1].attn.scale = 0.3


def own_rope(model):
    model.aggregator.global_blocks[1].attn.rope = copy.deepcopy(model.aggregator.rope)


CHANGES = [changed_linear, changed_activation, changed_block, changed_attention, own_rope]


@pytest.mark.parametrize(
    ("change", "when"),
    # Settings, as the last two are, are looked at by accelerate alone.
    [(change, "before") for change in CHANGES] + [(change, "after") for change in CHANGES[:3]],
)
def test_blocks_of_another_make_run_as_they_are(model, change, when, runs):
    images, other = random_images(), tiny_vggt()
    change(other)
    expected = run(pruned(other, 0.4), images)
    if when == "before":
        change(model)
    pruned(model, 0.4, compile=True)
    if when == "after":
        change(model)
    runs.clear()
    close(run(model, images), expected)
    assert len(runs) == 9 and model.aggregator.global_blocks[1] not in runs


@pytest.mark.parametrize("what", ["hook", "pre-hook", "forward", "compiled part", "dropout", "drop path"])
def test_watched_blocks_run_as_they_are(model, what, runs):
    images, block, calls = random_images(), model.aggregator.frame_blocks[2], []
    expected = run(pruned(model, 0.4), images)
    pruned(model, 0.4, compile=True)
    if what == "hook":
        block.mlp.register_forward_hook(lambda *_: calls.append(1))
    elif what == "pre-hook":
        block.attn.proj.register_forward_pre_hook(lambda *_: calls.append(1))
    elif what == "forward":
        real = block.norm1.forward
        block.norm1.forward = lambda x: calls.append(1) or real(x)
    elif what == "compiled part":
        block.mlp.compile(backend="eager")
    elif what == "dropout":
        block.attn.proj_drop.p = 0.5
        block.train()
    else:
        block.sample_drop_ratio = 1e-9
        block.drop_path1 = type("DropPath", (nn.Identity,), {})()
        block.train()
    runs.clear()
    found = run(model, images)
    if what != "dropout":
        close(found, expected)
    assert len(runs) == 9 and block not in runs
    assert bool(calls) == (what in ("hook", "pre-hook", "forward"))


def test_hooks_on_a_block_run(model, runs):
    calls, block = [], model.aggregator.frame_blocks[2]
    block.register_forward_hook(lambda *_: calls.append(1))
    run(pruned(model, 0.4, compile=True), random_images())
    assert calls == [1] and block in runs


def test_a_replaced_forward_of_a_block_is_kept(model, runs):
    block, calls = model.aggregator.frame_blocks[2], []
    block.forward = lambda *a, **k: calls.append(1) or type(block).forward(block, *a, **k)
    run(pruned(model, 0.4, compile=True), random_images())
    assert calls and block not in runs
    remove(model)
    assert "forward" in block.__dict__


@pytest.mark.skipif(torch.__version__ < "2.6", reason="older dynamo trips over it")
def test_a_user_who_compiles_gets_one_graph(model):
    images = random_images()
    expected = run(pruned(model, 0.3), images)
    pruned(model, 0.3, compile=True)
    close(run(torch.compile(model, backend="eager", fullgraph=True), images), expected)


def test_quantised_and_unknown_modules_are_no_blocks():
    for module in (nn.Linear(4, 4), nn.Identity()):
        assert not blocks.is_block(module, 4)


def test_the_trial_leaves_the_host_alone(model):
    model.aggregator.global_blocks[0].attn.qkv.register_forward_hook(lambda *_: pytest.fail("was run"))
    rope = model.aggregator.rope
    rope.frequency_cache.clear()
    state = torch.get_rng_state()
    aggregator = model.aggregator
    every = [*aggregator.frame_blocks, *aggregator.global_blocks, *aggregator.patch_embed.blocks]
    assert len(blocks.stock_blocks(every, 32, rope)) == 10
    assert torch.equal(torch.get_rng_state(), state) and not rope.frequency_cache


def test_the_trial_is_done_once_for_blocks_of_a_make(model, monkeypatch):
    seen, real = [], blocks.is_block
    monkeypatch.setattr(blocks, "is_block", lambda module, *a: seen.append(module) or real(module, *a))
    accelerate(model, weights=None, compile=True)
    assert len({*seen} & {*model.modules()}) == 2  # of DINO, and of alternating attention


# ---- a guest


def test_remove_pause_copy_and_settings(model):
    images = random_images()
    stock = run(model, images)
    expected = run(pruned(model, 0.4), images)
    pruned(model, 0.4, compile=True)
    found = run(model, images)
    with paused(model):
        assert_equal(run(model, images), stock)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(run(other, images), found)
        assert_equal(run(remove(other), images), stock)
    retune(model, 0.6)
    close(run(model, images), run(pruned(tiny_vggt(), 0.6), images))
    pruned(model, 0.4)
    assert_equal(run(model, images), expected)
    remove(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert_equal(run(model, images), stock)


def test_summary_says_what_is_compiled(model):
    assert "compiled      no" in str(summary(accelerate(model, weights=None)))
    found = summary(accelerate(model, weights=None, compile=True))
    assert "compiled      10 blocks, depth_head, point_head" in str(found)
    names = ["aggregator", "aggregator.patch_embed", "aggregator.rope", "depth_head", "point_head"]
    assert sorted(found.patched) == names
    assert "camera_head" in summary(accelerate(model, weights=None, mode="pre-aa", compile=True)).patched


@pytest.mark.parametrize(("mode", "tokens"), [("global", 25), ("pre-aa", 13)])
def test_attention_between_the_compiled_parts_can_be_seen(model, mode, tokens):
    seen = []

    def look(attend, query, key, value, options):
        seen.append(tuple(query.shape))
        return attend(query, key, value)

    pruned(model, mode=mode, compile=True)
    with torch.inference_mode(), InterceptAttention(look):
        model.aggregator(random_images(3))
    wide = 16 + (MORE if mode == "global" else 0)  # there channels say how often keys count
    assert seen == [(3, 2, 25, 16)] * 2 + [(3, 2, tokens, 16), (1, 2, 39, wide)] * 4
    assert F.scaled_dot_product_attention.__name__ == "scaled_dot_product_attention"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"compile": "yes"}, "compile .* 'yes'"),
        ({"head_dtype": torch.float32}, r"head_dtype .* torch\.float32"),
    ],
)
def test_bad_settings(model, settings, named):
    with pytest.raises(PaceError, match=named):
        accelerate(model, weights=None, **settings)


def test_hooks_that_come_after_the_first_call_are_called():
    model, images = compiled_model(), random_images(2)
    parts = (
        model.aggregator.rope,
        model.aggregator.frame_blocks[1].mlp.fc1,
        model.depth_head.scratch.output_conv1,
    )
    with torch.inference_mode():
        before = model(images)["depth"].clone()
        for part in parts:
            calls = []
            handle = part.register_forward_hook(lambda module, inputs, out, calls=calls: calls.append(module))
            model(images)
            handle.remove()
            assert calls
        handle = parts[2].register_forward_hook(lambda module, inputs, out: 2 * out)
        assert not torch.allclose(model(images)["depth"], before)
        handle.remove()
        calls = []
        handle = torch.nn.modules.module.register_module_forward_hook(lambda m, i, o: calls.append(m))
        try:
            model(images)
        finally:
            handle.remove()
        assert parts[1] in calls and parts[2] in calls
        assert torch.equal(model(images)["depth"], before)


def test_modes_of_others_see_what_runs():
    class Count(torch.overrides.TorchFunctionMode):
        seen = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            Count.seen += func is torch.nn.functional.linear
            return func(*args, **(kwargs or {}))

    counts = []
    for options in ({"compile": False}, {}):
        model, Count.seen = compiled_model(**options), 0
        with torch.inference_mode(), Count():
            model(random_images(2))
        counts.append(Count.seen)
    assert counts[0] == counts[1] > 0


def test_settings_that_are_no_plain_values_are_tried_block_by_block():
    class Gained(torch.nn.Linear):
        gain = ()

        def forward(self, x):
            return super().forward(x) * (self.gain[0] if self.gain else 1.0)

    model = tiny_vggt()
    for i, block in enumerate(model.aggregator.frame_blocks):
        block.mlp.fc1.__class__ = Gained
        block.mlp.fc1.gain = [1.0 if i == 0 else 3.0]
    pruned(model, 0.4, compile=True)
    opened = [b.__dict__["forward"].kinds is not None for b in model.aggregator.frame_blocks]
    assert opened == [True, *[False] * (len(opened) - 1)]


def test_a_dropout_that_trains_in_a_block_that_does_not():
    model = compiled_model()
    drop = model.aggregator.global_blocks[0].mlp.drop
    drop.p, drop.training = 0.5, True
    with torch.inference_mode():
        tokens = [model.aggregator(random_images(2))[0][3] for _ in range(2)]
    assert not torch.equal(*tokens)


def test_nothing_to_compile_is_refused(monkeypatch):
    monkeypatch.setattr("pacevggt_patch.hosts.blocks.is_block", lambda *_: False)
    monkeypatch.setattr("pacevggt_patch.patching.install.is_dense_head", lambda *_: False)
    model = tiny_vggt()
    with pytest.raises(UnsupportedModelError, match="compile=False"):
        accelerate(model, weights=None, compile=True)
    assert not is_accelerated(model)


def test_a_compiler_that_fails_is_named(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler")

    model = compiled_model()
    monkeypatch.setattr(compiling, "BACKEND", broken)
    with (
        torch.inference_mode(),
        pytest.raises(PaceError, match=r"torch.compile failed on this machine .*compile=False"),
    ):
        model(random_images(2))


def test_whether_compiling_works_is_tried(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler")

    for backend, expected in (("eager", True), (broken, False)):
        monkeypatch.setattr(compiling, "BACKEND", backend)
        assert works(torch.device("cpu")) is expected


def test_a_block_that_is_compiled_afterwards_can_be_taken_off():
    model = compiled_model()
    block = model.aggregator.frame_blocks[0]
    model.aggregator.frame_blocks[0] = torch.compile(block, backend="eager")
    remove(model)
    assert "forward" not in block.__dict__ and not is_accelerated(model)


def test_more_ways_than_the_limit_of_recompilations(monkeypatch, caplog):
    """With and without gradients, frozen or not, with pace weights or without: none falls back to uncompiled code."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")  # what counts them comes before
    model, images = tiny_vggt(), random_images(2)
    for weights in (None, PaceWeights.new(tiny_vggt())):
        for frozen in (False, True):
            model.requires_grad_(not frozen)
            pruned(model, 0.4, weights=weights, compile=True)
            for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
                with mode():
                    model(images)
    assert "recompile_limit" not in caplog.text


def test_summary_times_what_is_compiled_already(monkeypatch):
    model, graphs = compiled_model(), []

    def backend(graph, inputs):
        graphs.append(state_of(model).timer.timing)
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", backend)
    stages = summary(model, random_images(2)).stages
    assert graphs and not any(graphs)
    assert len(stages) == len({stage.name for stage in stages}) and all(stage.seconds for stage in stages)
