"""The DPT head as a function of patch tokens, against stock heads of every kind."""

import copy
from typing import NamedTuple

import pytest
import torch
from hosts import random_images, tiny_vggt
from torch import nn
from vggt.heads.dpt_head import DPTHead

from pacevggt_patch import accelerate, paused, summary
from pacevggt_patch.hosts import dpt
from pacevggt_patch.method.restored_tokens import RestoredTokens
from pacevggt_patch.patching import heads
from pacevggt_patch.patching.heads import TokenList
from pacevggt_patch.patching.install import retune

LAYERS = [0, 1, 2, 3]
MODES = ["global", "pre-aa"]
KINDS = {
    "depth": {"output_dim": 2, "activation": "exp"},
    "points": {"output_dim": 4, "activation": "inv_log"},
    "sigmoid": {"output_dim": 3, "activation": "sigmoid", "conf_activation": "expp0"},
    "no positions": {"output_dim": 2, "activation": "relu", "pos_embed": False},
    "half size": {"output_dim": 4, "activation": "norm_exp", "down_ratio": 2},
    "track features": {"feature_only": True, "down_ratio": 2, "pos_embed": False},
    "features with positions": {"feature_only": True},
}
# Rounding of a few dozen layers; bfloat16 has 8 bits of fraction.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}


def pruned(model, keep_ratio: float = 0.4, mode: str = "global", **settings):
    """The model, accelerated training-free, however short the clip."""
    return accelerate(model, keep_ratio, weights=None, mode=mode, **{"min_frames": 1, **settings})


def make_head(kind: str, channels: tuple[int, ...] = (8, 12, 16, 8)) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"features": 16, "out_channels": list(channels), "intermediate_layer_idx": LAYERS}
        return DPTHead(dim_in=24, **options, **KINDS[kind]).eval()


def inputs(grid: tuple[int, int], frames: int = 2, batch: int = 1):
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randn(batch, frames, 5 + grid[0] * grid[1], 24, generator=generator) for _ in LAYERS]
    return tokens, torch.zeros(batch, frames, 3, 14 * grid[0], 14 * grid[1])


def ours(head, tokens, grid, by_products: bool = False):
    layers = [t[:, :, 5:].flatten(0, 1) for t in tokens]
    outputs = dpt.dense_head(head, layers, grid, dpt.dense_tables(head, grid), by_products)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return tuple(o.unflatten(0, tokens[0].shape[:2]) for o in outputs)


def stock(head, tokens, images):
    outputs = head(list(tokens), images, 5, frames_chunk_size=None)
    return (outputs,) if isinstance(outputs, torch.Tensor) else outputs


def assert_close(found, expected, tolerance: float) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (3, 5), (6, 4)])
@pytest.mark.parametrize("by_products", [False, True])
def test_it_does_what_the_stock_head_does(kind, grid, by_products):
    head, (tokens, images) = make_head(kind), inputs(grid, frames=3)
    with torch.no_grad():
        assert_close(ours(head, tokens, grid, by_products), stock(head, tokens, images), 1e-5)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("kind", ["depth", "points", "track features", "features with positions"])
def test_in_every_precision(kind, dtype):
    """float64 and float32 weights as they are, and float32 weights under bfloat16 autocast."""
    head, (tokens, images) = make_head(kind), inputs((3, 5))
    if dtype == torch.float64:
        head, tokens = head.double(), [t.double() for t in tokens]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert_close(ours(head, tokens, (3, 5)), stock(head, tokens, images), TOLERANCE[dtype])


def test_bfloat16_is_as_far_from_float32_as_the_stock_head():
    head, (tokens, images) = make_head("points"), inputs((4, 6), frames=4)
    with torch.no_grad():
        exact = stock(head, tokens, images)[0]
        with torch.autocast("cpu", torch.bfloat16):
            theirs, mine = stock(head, tokens, images)[0], ours(head, tokens, (4, 6))[0]
    noise = (theirs.float() - exact).square().mean().sqrt()
    assert 0 < (mine.float() - exact).square().mean().sqrt() < 1.2 * noise


@pytest.mark.parametrize("by_products", [False, True])
def test_gradients_are_those_of_the_stock_head(by_products):
    head, (tokens, images) = make_head("depth").double(), inputs((3, 5))
    tokens = [t.double().requires_grad_() for t in tokens]
    expected, found = (
        torch.autograd.grad(sum(o.square().mean() for o in outputs), [*head.parameters(), *tokens])
        for outputs in (stock(head, tokens, images), ours(head, tokens, (3, 5), by_products))
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_it_compiles_in_one_graph():
    head, (tokens, _) = make_head("points"), inputs((2, 3))
    layers, tables = [t[0, :, 5:] for t in tokens], dpt.dense_tables(head, (2, 3))
    with torch.no_grad():
        expected = dpt.dense_head(head, layers, (2, 3), tables)
        compiled = torch.compile(dpt.dense_head, backend="aot_eager", fullgraph=True)
        found = compiled(head, layers, (2, 3), tables)
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected)


def test_the_input_is_left_alone():
    head, (tokens, _) = make_head("depth"), inputs((2, 2))
    before = [t.clone() for t in tokens]
    with torch.no_grad():
        ours(head, tokens, (2, 2))
    assert all(map(torch.equal, tokens, before))


# ---- which heads it fits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_stock_heads_are_known(kind, dtype):
    head = make_head(kind).to(dtype)
    calls = []
    for module in head.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    before = {name: value.clone() for name, value in head.state_dict().items()}
    assert dpt.is_dense_head(head, 24, 4)
    assert not calls and all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    assert head.training is False and all(len(module._forward_hooks) == 1 for module in head.modules())


def test_a_head_in_training_is_tried_without_touching_it_or_the_random_state():
    head = make_head("depth")
    parts = [head.scratch.layer1_rn, nn.BatchNorm2d(16), nn.Dropout(0.5)]
    head.scratch.layer1_rn = nn.Sequential(*parts)
    head.train()
    before, random = copy.deepcopy(head.state_dict()), torch.get_rng_state()
    assert dpt.is_dense_head(head, 24, 4)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    assert all(module.training for module in head.modules()) and torch.equal(torch.get_rng_state(), random)


def test_heads_are_known_whatever_torch_makes_tensors_of():
    head = make_head("points")
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        assert dpt.is_dense_head(head, 24, 4)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def corners(stage):
    stage.align_corners = False


def subclass(module: nn.Module, **methods) -> None:
    module.__class__ = type("Fork", (type(module),), methods)


def changed_outputs(head: nn.Module, change) -> None:
    def forward(self, tokens, images, patch_start_idx, frames_chunk_size=8):
        return change(DPTHead.forward(self, tokens, images, patch_start_idx, frames_chunk_size))

    subclass(head, forward=forward)


class Named(NamedTuple):
    values: torch.Tensor
    confidence: torch.Tensor


def louder_fusion(stage: nn.Module) -> None:
    stock_forward = type(stage).forward
    subclass(stage, forward=lambda self, *xs, size=None: 1.01 * stock_forward(self, *xs, size=size))


CHANGES = {
    "enlarges otherwise": lambda head: corners(head.scratch.refinenet2),
    "other values": lambda head: changed_outputs(head, lambda out: (out[0] + 0.01, out[1])),
    "a named tuple": lambda head: changed_outputs(head, lambda out: Named(*out)),
    "one output": lambda head: changed_outputs(head, lambda out: out[0]),
    "other fusion": lambda head: louder_fusion(head.scratch.refinenet1),
    "no fourth stage": lambda head: delattr(head.scratch, "refinenet4"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CHANGES)
def test_other_heads_run_their_own_forward(change, mode):
    model, images = tiny_vggt(), random_images(3)
    CHANGES[change](model.depth_head)
    if change == "no fourth stage":
        assert not dpt.is_dense_head(model.depth_head, 64, 4)
        return
    plain = copy.deepcopy(model.depth_head)
    pruned(model, mode=mode)
    assert not dpt.is_dense_head(model.depth_head, 64, 4)
    with torch.inference_mode():
        tokens, start = model.aggregator(images)
        found = model.depth_head(tokens, images, start)
        expected = plain(list(tokens), images, start)
    pairs = [(found, expected)] if isinstance(found, torch.Tensor) else zip(found, expected, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("mode", MODES)
def test_hooks_on_a_bypassed_part_still_run(mode):
    model, images, calls = tiny_vggt(), random_images(3), []
    pruned(model, mode=mode)
    model.depth_head.scratch.refinenet2.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        model(images)
    assert calls == [1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", ["projects.1", "scratch.refinenet3.out_conv"])
def test_hooks_see_what_they_see_in_the_stock_head(part, mode):
    """Where the fast head would write on an output later, or hand a layer smaller maps."""
    images, plain, fast = random_images(3), tiny_vggt(), tiny_vggt()
    seen = []
    for model in (plain, pruned(fast, mode=mode)):
        module = model.depth_head.get_submodule(part)
        module.register_forward_hook(lambda module, inputs, output: seen.append((output, output.clone())))
        module.register_full_backward_hook(lambda module, inputs, outputs: None)
        model(images)["depth"].sum().backward()
    (_, first), (kept, second) = seen
    assert first.shape == second.shape and torch.equal(kept, second)


class Items(dict):
    """A dictionary whose items are attributes, too."""

    __getattr__ = dict.__getitem__


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", [{}, {"output_device": "cpu"}, {"head_dtype": torch.bfloat16}])
@pytest.mark.parametrize(
    "kind", [Named, lambda points, confidence: Items(points=points, confidence=confidence)]
)
def test_outputs_stay_of_their_kind(kind, settings, mode):
    model, images = tiny_vggt(), random_images(9)  # two chunks of the stock head
    expected = type(kind(None, None))
    changed_outputs(model.depth_head, lambda out: kind(*out))
    pruned(model, mode=mode, **settings)
    with torch.inference_mode():
        tokens, start = model.aggregator(images)
        for given in (tokens, list(tokens)):
            found = model.depth_head(given, images, start)
            assert isinstance(found, expected) and found.confidence.shape == (1, 9, 56, 70)


def test_maps_of_too_many_elements_are_enlarged_a_few_at_a_time(monkeypatch):
    x = torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = dpt.enlarged(x, (8, 9))
    calls, real = [], torch.nn.functional.interpolate
    monkeypatch.setattr(
        torch.nn.functional, "interpolate", lambda x, **k: calls.append(len(x)) or real(x, **k)
    )
    monkeypatch.setattr(dpt, "MOST_ELEMENTS", 2 * 3 * 8 * 9 + 1)
    assert torch.equal(dpt.enlarged(x, (8, 9)), expected) and calls == [2, 2, 1]


@pytest.mark.parametrize("mode", MODES)
def test_a_head_put_in_later_is_not_taken_for_the_one_that_was_tried(mode):
    model, images = tiny_vggt(), random_images(3)
    pruned(model, mode=mode)
    changed_outputs(model.depth_head, lambda out: (2 * out[0], out[1]))
    with torch.inference_mode():
        doubled = model(images)["depth"]
        model.depth_head.__class__ = DPTHead
        torch.testing.assert_close(doubled, 2 * model(images)["depth"])


# ---- chunks and where outputs go


@pytest.mark.parametrize("mode", MODES)
def test_accelerated_heads_equal_the_stock_heads_on_the_restored_tokens(mode):
    model, images = tiny_vggt(track=True), random_images(9, batch=2)
    pruned(model, mode=mode)
    plain = tiny_vggt(track=True)
    with torch.inference_mode():
        tokens, start = model.aggregator(images)
        for head, reference in (
            (model.depth_head, plain.depth_head),
            (model.point_head, plain.point_head),
            (model.track_head.feature_extractor, plain.track_head.feature_extractor),
        ):
            outputs = head(tokens, images, start), reference(list(tokens), images, start)
            found, expected = ((o,) if isinstance(o, torch.Tensor) else o for o in outputs)
            assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("budget", "asked", "expected"), [
    (2**40, "default", [9]), (2**40, 4, [4, 4, 1]), (1, "default", [1] * 9), (3.5, "default", [3, 3, 3]),
    (3.5, 2, [2, 2, 2, 2, 1]), (3.5, 100, [3, 3, 3]), (3.5, None, [3, 3, 3]),
])  # fmt: skip
def test_chunks_fit_the_budget_and_the_caller(budget, asked, expected, monkeypatch, mode):
    model, images = tiny_vggt(), random_images(9)
    pruned(model, mode=mode)
    one = 8 * 56 * 70 * 4  # bytes: half of the features, float32
    monkeypatch.setattr(heads, "CPU_BYTES", int(budget * one))
    seen = []
    real = dpt.dense_head
    monkeypatch.setattr(
        dpt, "dense_head", lambda h, layers, *a, **k: seen.append(len(layers[0])) or real(h, layers, *a, **k)
    )
    with torch.inference_mode():
        tokens, start = model.aggregator(images)
        options = {} if asked == "default" else {"frames_chunk_size": asked}
        model.depth_head(tokens, images, start, **options)
    assert seen == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("keep_ratio", [0.4, 1.0])
@pytest.mark.parametrize("min_frames", [1, 100])
def test_outputs_on_another_device_are_the_same(keep_ratio, min_frames, monkeypatch, mode):
    """On this machine the other device is the CPU, too: the values, and that every one is written."""
    monkeypatch.setattr(heads, "CPU_BYTES", 3 * 8 * 56 * 70 * 4)
    model, images = tiny_vggt(track=True), random_images(7, batch=2)
    points = torch.tensor([[[10.0, 20.0]]] * 2)
    with torch.inference_mode():
        pruned(model, keep_ratio, mode, min_frames=min_frames)
        expected = model(images, query_points=points)
        pruned(model, keep_ratio, mode, min_frames=min_frames, output_device="cpu")
        found = model(images, query_points=points)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found if key != "pose_enc_list")
    assert summary(model).config.output_device == torch.device("cpu")


@pytest.mark.parametrize("mode", MODES)
def test_dense_outputs_go_where_they_are_asked_for(mode):
    model, images = tiny_vggt(), random_images(9)
    pruned(model, mode=mode, output_device="meta")
    with torch.inference_mode():
        out = model(images)
    where = {key: value.device.type for key, value in out.items() if key != "pose_enc_list"}
    dense = ("depth", "depth_conf", "world_points", "world_points_conf")
    assert where == {"pose_enc": "cpu", "images": "cpu"} | dict.fromkeys(dense, "meta")


# ---- compiled, and in reduced precision


def compiled_model(monkeypatch, mode="global", **options):
    monkeypatch.setattr("pacevggt_patch.runtime.compiling.BACKEND", "eager")
    monkeypatch.setattr(heads, "CPU_BYTES", 4 * 8 * 56 * 70 * 4)  # chunks of four frames
    return pruned(tiny_vggt(track=True), mode=mode, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frames", [3, 4, 9])
@pytest.mark.parametrize("output_device", [None, "cpu"])
def test_compiled_heads_go_through_a_clip_in_chunks_of_one_size(frames, output_device, monkeypatch, mode):
    images, points = random_images(frames, batch=2), torch.tensor([[[10.0, 20.0]]] * 2)
    monkeypatch.setattr(heads, "CPU_BYTES", 8 * 8 * 56 * 70 * 4)
    with torch.inference_mode():
        expected = pruned(tiny_vggt(track=True), mode=mode)(images, query_points=points)
        model = compiled_model(monkeypatch, mode, compile=True, output_device=output_device)
        monkeypatch.setattr(heads, "CPU_BYTES", 8 * 8 * 56 * 70 * 4)
        kind = TokenList if mode == "global" else RestoredTokens
        seen, real = [], kind.patches
        monkeypatch.setattr(
            kind,
            "patches",
            lambda t, start, stop, i: seen.append((start, stop)) or real(t, start, stop, i),
        )
        found = model(images, query_points=points)
    parts = {3: [(0, 3)], 4: [(0, 4)], 9: [(0, 4), (4, 8), (5, 9)]}[frames]
    assert seen[: 2 * len(parts)] == 2 * parts
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("keep_ratio", [0.4, 1.0])
def test_heads_in_reduced_precision(compile, keep_ratio, monkeypatch, mode):
    images, seen = random_images(5), []
    model = compiled_model(monkeypatch, mode, compile=compile, head_dtype=torch.bfloat16)
    retune(model, keep_ratio)
    model.depth_head.scratch.output_conv1.register_forward_hook(lambda *a: seen.append(a[-1].dtype))
    with torch.inference_mode():
        found = model(images)
        expected = pruned(tiny_vggt(track=True), keep_ratio, mode)(images)
        assert set(seen) == {torch.bfloat16}
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert found[key].dtype == value.dtype == torch.float32
        assert torch.equal(found["pose_enc"], expected["pose_enc"]) or compile
        error = (found["depth"] - expected["depth"]).norm() / expected["depth"].norm()
        assert 0 < error < 0.05
        with paused(model):
            seen.clear()
            model(images)
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("mode", MODES)
def test_reduced_precision_makes_heads_of_narrow_weights_run(monkeypatch, mode):
    model = compiled_model(monkeypatch, mode, head_dtype=torch.bfloat16).bfloat16()
    with torch.inference_mode():
        assert torch.isfinite(model(random_images(2).bfloat16())["depth"]).all()
