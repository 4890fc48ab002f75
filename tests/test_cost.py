"""What pruning saves, from how many frames on it is used, and what runs below."""

import pytest
import torch
from hosts import assert_equal, random_images, run, tiny_vggt, with_heads

from pacevggt_patch import accelerate, is_accelerated, summary
from pacevggt_patch.method.cost import GPU_FLOPS_PER_PICK, pruning_pays, saved_flops
from pacevggt_patch.method.few_keys import keys_of_clip
from pacevggt_patch.method.propagation import ROWS
from pacevggt_patch.patching import state

VGGT_1B = {"patches": 1036, "kept": 311, "special": 5, "channels": 1024, "blocks": 24}


PRE_AA = {**VGGT_1B, "global_alone": False}


def block_flops(sequences, length, channels):
    """Of one block on so many sequences of tokens, counted matrix by matrix."""
    count = 0
    for rows, columns in ((1, 3), (1, 1), (1, 4), (4, 1)):  # qkv, projection, MLP
        count += 2 * sequences * length * rows * columns * channels**2
    return count + 2 * (2 * sequences * length**2 * channels)  # queries @ keys, weights @ values


def test_pre_aa_pruning_saves_in_frames_and_across_them():
    def flops(frames, tokens, channels):
        return block_flops(frames, tokens, channels) + block_flops(1, frames * tokens, channels)

    expected = 3 * (flops(7, 5 + 20, 32) - flops(7, 5 + 6, 32))
    assert saved_flops(7, 20, 6, 5, 32, 3, global_alone=False) == expected


def test_global_pruning_saves_global_attention_alone():
    sizes = dict(frames=10, patches=100, kept=30, special=5, channels=64, blocks=4)
    pairs = 10 * 35 * keys_of_clip(10, 5, 100, 30)  # of queries and keys
    saved = block_flops(1, 10 * 105, 64) - block_flops(1, 10 * 35, 64) + 4 * 64 * ((10 * 35) ** 2 - pairs)
    propagation = 2 * 10 * (100 * 30 * 64 + 140 * 64**2)
    rows = min(10 * 30, ROWS * 64)  # tokens that the regression looks at
    regression = 2 * 2 * rows * 64**2 + 7 * 64**3 // 3
    one = saved_flops(**sizes)
    assert one == pytest.approx(4 * (saved - propagation - regression))
    # With heads that see all tokens: one of four blocks has a half of them, then all heads of all blocks are such.
    some = saved_flops(**sizes, full=[0.5])
    attention = 4 * 64 * (100 * 105**2 - pairs)
    filled = 2 * 10 * 32 * (100 * 30 + 140 * 64) + 2 * 256 * 64 * (64 + 32)
    assert some == pytest.approx(one * 3 / 4 + attention / 2 - filled)
    assert saved_flops(**sizes, full=[1.0] * 4) == 0
    assert one > some > saved_flops(**sizes, full=[0.5] * 4)


def test_the_cpu_prunes_from_one_frame_on():
    assert pruning_pays("cpu", 1, **VGGT_1B) and pruning_pays("cpu", 1, **PRE_AA)


@pytest.mark.parametrize("sizes", [VGGT_1B, PRE_AA])
def test_a_gpu_prunes_from_some_number_of_frames_on(sizes):
    pays = [pruning_pays("cuda", n, **sizes) for n in range(1, 60)]
    first = pays.index(True)
    assert 1 < first < 40 and all(pays[first:])
    saved = [saved_flops(n, **sizes) for n in range(1, 60)]
    assert pays == [value >= GPU_FLOPS_PER_PICK * 311 for value in saved]
    assert pruning_pays("cuda", first, **(sizes | {"kept": 155}))  # fewer picks, and more is saved
    assert pruning_pays("cuda", 1, **(sizes | {"kept": 1036}))  # nothing is picked


def test_vggt_1b_on_a_gpu():
    """Measured on an H200: at 12 frames stock is the faster one, at 16 it is not."""
    assert [pruning_pays("cuda", n, **VGGT_1B) for n in (1, 12, 16, 1000)] == [False, False, True, True]


@pytest.mark.parametrize(("batch", "frames"), [(1, 3), (4, 2)])
@pytest.mark.parametrize("mode", ["global", "pre-aa"])
def test_the_model_is_asked_about_its_own_sizes_and_not_the_batch(batch, frames, mode, monkeypatch):
    asked = []
    monkeypatch.setattr(state, "pruning_pays", lambda *sizes: asked.append(sizes) or False)
    model = accelerate(tiny_vggt(), 0.4, weights=None, mode=mode)
    asked.clear()
    images = random_images(frames, batch=batch)
    with torch.inference_mode():
        stock = tiny_vggt().aggregator(images)[0]
        found = model.aggregator(images)[0]
    assert all(torch.equal(a, b) for a, b in zip(found, stock, strict=True))
    assert asked == [("cpu", frames, 20, 8, 5, 32, 4, mode == "global", [])]


def test_the_model_is_asked_with_its_full_heads(monkeypatch):
    asked = []
    monkeypatch.setattr(state, "pruning_pays", lambda *sizes: asked.append(sizes) or True)
    model = tiny_vggt()
    accelerate(model, 0.4, weights=with_heads(model, (1, 0), (3, 0), (3, 1)))
    asked.clear()
    with torch.no_grad():
        model.aggregator(random_images(3))
    assert asked == [("cpu", 3, 20, 8, 5, 32, 4, True, [0.5, 1.0])]


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("mode", ["global", "pre-aa"])
@pytest.mark.parametrize("batch", [1, 5])
def test_clips_of_fewer_frames_run_the_stock_model(frames, mode, batch):
    model = tiny_vggt()
    few, enough = random_images(frames, batch=batch), random_images(4)
    stock = run(model, few)
    accelerate(model, 0.3, weights=None, mode=mode, min_frames=4)
    assert_equal(run(model, few), stock)
    with torch.inference_mode():
        tokens, start = model.aggregator(few)
        assert isinstance(tokens, list) and start == 5
    assert summary(model, few).kept is None and is_accelerated(model)
    run(model, enough)
    assert summary(model).kept.shape == (1, 4, 6)
    run(model, few)
    assert summary(model).kept is None
    accelerate(model, 0.3, weights=None, mode=mode, min_frames=1)
    run(model, few)
    assert summary(model).kept.shape == (batch, frames, 6)
