"""Attention by a library: called where it can serve, right where it is called, never needed."""

import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hosts import TORCH, random_images, tiny_vggt, with_heads

from pacevggt_patch import accelerate, summary
from pacevggt_patch.runtime import attention, compiling
from pacevggt_patch.runtime.attention import InterceptAttention, faster_attention, is_plain, kernel_name

CPU = torch.device("cpu")


class Fake(types.ModuleType):
    """A library whose attention is computed in float32, in its own layout."""

    def __init__(self, name="fa3_fwd_interface", as_tuple=False):
        super().__init__(name)
        self.calls, self.as_tuple = [], as_tuple

    def flash_attn_func(self, q, k, v, softmax_scale=None, causal=False, return_attn_probs=False):
        self.calls.append((tuple(q.shape), tuple(k.shape), q.dtype))
        assert q.dtype == k.dtype == v.dtype and not causal
        queries, keys, values = (t.float().transpose(1, 2) for t in (q, k, v))  # [B, heads, L, d]
        logits = queries @ keys.mT * softmax_scale
        out = (logits.softmax(-1) @ values).transpose(1, 2).to(q.dtype).contiguous()
        return (out, logits.logsumexp(-1)) if self.as_tuple or return_attn_probs else out


@pytest.fixture
def fake(monkeypatch):
    """The wheel of the forward pass, on a machine with a Hopper card."""
    library = Fake()
    for name in attention.LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)  # can't be imported
    monkeypatch.setitem(sys.modules, library.__name__, library)
    monkeypatch.setattr(attention, "is_hopper", lambda device: True)
    attention._loaded.cache_clear()
    yield library
    attention._loaded.cache_clear()


def inputs(dtype=torch.bfloat16, queries=12, keys=12, width=16, **options):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, n, width) for n in (queries, keys, keys)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_(**options) for shape in shapes]


@pytest.mark.parametrize("scale", [None, 0.4])
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_it_is_called_and_right(fake, scale, by_name, as_tuple):
    fake.as_tuple = as_tuple
    query, key, value = inputs(keys=7, requires_grad=False)
    expected = F.scaled_dot_product_attention(query, key, value, scale=scale)
    with faster_attention(CPU):
        if by_name:
            found = F.scaled_dot_product_attention(value=value, key=key, query=query, scale=scale)
        else:
            found = F.scaled_dot_product_attention(query, key, value, None, 0.0, False, scale=scale)
    assert fake.calls == [((2, 12, 4, 16), (2, 7, 4, 16), torch.bfloat16)]
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_under_autocast_it_takes_what_autocast_casts_to(fake):
    query, key, value = inputs(torch.float32, requires_grad=False)
    with faster_attention(CPU), torch.autocast("cpu", torch.bfloat16):
        found = F.scaled_dot_product_attention(query, key, value.bfloat16())
    assert found.dtype == torch.bfloat16 and fake.calls[0][2] == torch.bfloat16


ALL_ELSE = {
    "mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.ones(12, 12, dtype=torch.bool)),
    "dropout": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "keys that heads share": lambda q, k, v: F.scaled_dot_product_attention(
        q, k[:, :2], v[:, :2], enable_gqa=True
    ),
    "float32": lambda q, k, v: F.scaled_dot_product_attention(q.float(), k.float(), v.float()),
    "float16": lambda q, k, v: F.scaled_dot_product_attention(q.half(), k.half(), v.half()),
    "three dimensions": lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]),
    "odd width": lambda q, k, v: F.scaled_dot_product_attention(q[..., :9], k[..., :9], v[..., :9]),
    "width of values": lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :8]),
    "gradients": lambda q, k, v: F.scaled_dot_product_attention(q.requires_grad_(), k, v),
}


@pytest.mark.parametrize("name", ALL_ELSE)
def test_all_else_is_torchs_own(fake, name):
    if name == "keys that heads share" and TORCH < (2, 5):
        pytest.skip("torch has no enable_gqa before 2.5")
    with faster_attention(CPU):
        ALL_ELSE[name](*inputs(requires_grad=False))
    assert not fake.calls


def test_gradients_that_nobody_takes_do_not_matter(fake):
    with torch.no_grad(), faster_attention(CPU):
        F.scaled_dot_product_attention(*inputs(requires_grad=True))
    assert len(fake.calls) == 1


def test_who_switches_flash_attention_off_has_it_off(fake):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with torch.no_grad(), faster_attention(CPU), sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(*inputs())
        assert kernel_name(CPU, torch.bfloat16) == "torch SDPA"
    assert fake.calls == []


def test_absent_and_broken_libraries(fake, monkeypatch):
    assert kernel_name(CPU, torch.bfloat16) == "flash-attention 3 (fa3_fwd_interface)"
    assert (
        kernel_name(CPU, torch.float32)
        == "torch SDPA; under autocast to bfloat16 flash-attention 3 (fa3_fwd_interface)"
    )
    monkeypatch.setattr(attention, "is_hopper", lambda device: False)
    assert kernel_name(CPU, torch.bfloat16) == "torch SDPA"
    with faster_attention(CPU):
        F.scaled_dot_product_attention(*inputs(requires_grad=False))
    assert fake.calls == []
    monkeypatch.setattr(attention, "is_hopper", lambda device: True)
    monkeypatch.setitem(sys.modules, fake.__name__, None)
    attention._loaded.cache_clear()
    assert attention.library(CPU) is None and kernel_name(CPU, torch.bfloat16) == "torch SDPA"

    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError("built for another torch")

    upstream = Fake("flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", Broken("flash_attn_interface"))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    attention._loaded.cache_clear()
    assert attention.library(CPU).name == "fa3_fwd_interface"
    monkeypatch.setitem(sys.modules, "flash_attn_interface", upstream)
    attention._loaded.cache_clear()
    assert kernel_name(CPU, torch.float16) == "flash-attention 3 (flash_attn_interface)"


def test_importing_the_package_imports_no_library():
    names = ", ".join(map(repr, attention.LIBRARIES))
    program = f"import sys, pacevggt_patch; assert not {{{names}}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("scale", [None, 0.4])
def test_our_own_calls_go_to_the_library_too(fake, scale):
    query, key, value = inputs(keys=7, requires_grad=False)
    found = attention.attention(query, key, value, scale=scale)
    assert len(fake.calls) == 1
    expected = F.scaled_dot_product_attention(query, key, value, scale=scale)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    wide = [tensor.float() for tensor in (query, key, value)]
    assert torch.equal(attention.attention(*wide), F.scaled_dot_product_attention(*wide))
    assert len(fake.calls) == 1


@pytest.mark.parametrize("by_name", [False, True])
def test_an_interceptor_is_handed_every_call_as_it_was_made(by_name):
    query, key, value = inputs(torch.float32, requires_grad=False)
    mask, seen = torch.ones(12, 12, dtype=torch.bool).tril(), []

    def look(run, *tensors_and_options):
        *tensors, options = tensors_and_options
        seen.append((tensors, options))
        return 2 * run(*tensors)

    expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3)
    with InterceptAttention(look) as mode:
        if by_name:
            found = F.scaled_dot_product_attention(
                value=value, key=key, query=query, attn_mask=mask, scale=0.3
            )
        else:
            found = F.scaled_dot_product_attention(query, key, value, mask, 0.0, scale=0.3)
        torch.softmax(query, -1)
    assert mode.calls == len(seen) == 1
    (tensors, options) = seen[0]
    assert all(a is b for a, b in zip(tensors, (query, key, value), strict=True))
    assert options["attn_mask"] is mask and options["scale"] == 0.3 and not is_plain(options)
    torch.testing.assert_close(found, 2 * expected)


@pytest.mark.parametrize("mode", ["global", "pre-aa"])
def test_it_leaves_a_model_that_keeps_all_tokens_alone(fake, mode):
    model, images = tiny_vggt().bfloat16(), random_images(3).bfloat16()
    with torch.inference_mode():
        stock = model.aggregator(images)[0][3]
        accelerate(model, 1.0, weights=None, mode=mode)
        fake.calls.clear()  # those of the trial
        assert torch.equal(model.aggregator(images)[0][3], stock) and not fake.calls


# Sequences and their tokens: of DINO, of frame blocks, of global blocks, and the keys of those. In a clip of 30 frames
# special tokens and the first frame count once, and there are 6 keys of each other frame.
SHAPES = {
    "global": [(30, 25), (30, 25), (1, 390), (1, 30 * 5 + 20), (1, 29 * 6)],
    "pre-aa": [(3, 25), (3, 13), (1, 39), (1, 39)],
}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("mode", SHAPES)
def test_it_serves_dino_frame_and_global_blocks(fake, compile, mode, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    model, images = tiny_vggt().bfloat16(), random_images(SHAPES[mode][0][0]).bfloat16()
    accelerate(model, 0.4, weights=None, mode=mode, min_frames=1, compile=compile)
    assert "attention     flash-attention 3 (fa3_fwd_interface)" in str(summary(model))
    fake.calls.clear()  # those of the trial
    with torch.inference_mode():
        tokens = list(model.aggregator(images)[0])
        kept = summary(model).kept
        dino, frame, whole, *keys = ((*shape, 2, 16) for shape in SHAPES[mode])
        of_pair = [(frame, frame), *((whole, some) for some in keys)]
        calls = [(dino, dino)] * 2 + of_pair * 4
        assert [call[:2] for call in fake.calls] == calls
        monkeypatch.setattr(attention, "is_hopper", lambda device: False)
        other = list(model.aggregator(images)[0])
    assert len(fake.calls) == len(calls)
    assert torch.equal(kept, summary(model).kept)
    torch.testing.assert_close(tokens[3], other[3], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_serves_heads_that_see_all_tokens(fake, compile, autocast, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    model, images = tiny_vggt(), random_images(3)
    if not autocast:
        model, images = model.bfloat16(), images.bfloat16()
    accelerate(model, 0.4, weights=with_heads(model, (1, 0)), min_frames=1, compile=compile)
    fake.calls.clear()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        tokens = model.aggregator(images)[0]
        shapes = [call[0] for call in fake.calls]
        monkeypatch.setattr(attention, "is_hopper", lambda device: False)
        other = model.aggregator(images)[0]
    # In block 1 one head sees all 75 tokens. The others have 8 channels more, which say how often keys count.
    assert shapes.count((1, 75, 1, 16)) == shapes.count((1, 39, 1, 24)) == 1
    assert shapes.count((1, 39, 2, 24)) == 3 and len(shapes) == 2 + 4 + 3 + 2
    torch.testing.assert_close(tokens[3].float(), other[3].float(), rtol=0.1, atol=0.1)


def test_its_own_attention_is_what_training_looks_at(fake):
    """A look at attention in an unpruned block is taken of torch's call, before a library serves it."""
    from pacevggt_patch.training.attention_target import attention_target

    model, images = tiny_vggt().bfloat16(), random_images(3).bfloat16()
    accelerate(model, 0.4, weights=None, min_frames=1)
    _, found = attention_target(model, images)
    assert found.shape == (1, 3, 20) and 0 < found.sum() < 1
