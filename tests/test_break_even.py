"""From how many frames on pruning is used, and what runs below."""

import math

import pytest
import torch
from hosts import assert_equal, random_images, tiny_vggt

from pacevggt_patch import PaceWeights, accelerate, is_accelerated, summary
from pacevggt_patch.method.restored_tokens import RestoredTokens
from pacevggt_patch.patching import install as patch
from pacevggt_patch.planning.break_even import pruning_pays, saved_flops

VGGT_1B = {"patches": 1036, "kept": 311, "special": 5, "channels": 1024, "blocks": 24}


def test_saved_operations_of_a_clip_counted_one_by_one():
    def flops(frames, tokens, channels):
        count = 0
        for sequences, length in ((frames, tokens), (1, frames * tokens)):  # a frame and a global block
            for rows, columns in ((1, 3), (1, 1), (1, 4), (4, 1)):  # qkv, projection, MLP
                count += 2 * sequences * length * rows * columns * channels**2
            count += 2 * (2 * sequences * length**2 * channels)  # queries @ keys, weights @ values
        return count

    expected = 3 * (flops(7, 5 + 20, 32) - flops(7, 5 + 6, 32))
    assert saved_flops(7, 20, 6, 5, 32, 3) == expected


def test_the_cpu_prunes_from_one_frame_on():
    assert pruning_pays("cpu", 1, 1, **VGGT_1B)


def test_vggt_1b_on_a_gpu():
    """Measured on an H100: stock is the faster one below 6 frames."""
    assert [pruning_pays("cuda", 1, n, **VGGT_1B) for n in (1, 5, 6, 7, 1000)] == [
        False,
        False,
        True,
        True,
        True,
    ]
    assert pruning_pays("cuda", 1, 5, **(VGGT_1B | {"kept": 155}))  # fewer picks, and more is saved
    assert pruning_pays("cuda", 1, 1, **(VGGT_1B | {"kept": 1036}))  # nothing is picked


def test_the_clips_of_a_batch_share_the_picks():
    few = saved_flops(3, 1036, 311, 5, 1024, 24)
    enough = math.ceil(311 * 25e9 / few)
    assert enough > 1
    assert [pruning_pays("cuda", n, 3, **VGGT_1B) for n in (enough - 1, enough)] == [False, True]


@pytest.mark.parametrize(("batch", "frames"), [(1, 3), (4, 2)])
def test_the_model_is_asked_about_its_own_sizes(batch, frames, monkeypatch):
    asked = []
    monkeypatch.setattr(patch, "pruning_pays", lambda *sizes: asked.append(sizes) or len(asked) > 1)
    model = accelerate(tiny_vggt(), 0.4, weights=None)
    images = random_images(frames, batch=batch)
    with torch.inference_mode():
        kinds = [type(model.aggregator(images)[0]) for _ in range(2)]
    assert kinds == [list, RestoredTokens]
    assert asked == [("cpu", batch, frames, 20, 8, 5, 32, 4, False, [])] * 2
    weights = PaceWeights.new(model, dense_frames=True)
    weights.matching = ((1, 0), (3, 0), (3, 1))  # of two heads
    accelerate(model, 0.4, weights=weights, dense_frames=True)
    with torch.inference_mode():
        model.aggregator(images)
    assert asked[2:] == [("cpu", batch, frames, 20, 8, 5, 32, 4, True, [0.5, 1.0])]


@pytest.mark.parametrize("frames", [1, 3])
def test_clips_of_fewer_frames_run_the_stock_model(frames):
    model = tiny_vggt()
    few, enough = random_images(frames), random_images(4)
    with torch.inference_mode():
        stock = model(few)
        accelerate(model, 0.3, weights=None, min_frames=4)
        assert_equal(model(few), stock)
        tokens, start = model.aggregator(few)
        assert isinstance(tokens, list) and start == 5
        text = str(summary(model, few))
        assert f"stock aggregator (few frames)     {frames * 25:>12,d}{frames * 25:>12,d}" in text
        assert "alternating attention" not in text and is_accelerated(model)
        assert isinstance(model.aggregator(enough)[0], RestoredTokens)
        assert "stock aggregator" not in str(summary(model, enough))
        accelerate(model, 0.3, weights=None, min_frames=1)
        assert isinstance(model.aggregator(few)[0], RestoredTokens)
