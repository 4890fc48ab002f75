"""From how many frames on pruning is used, and what runs below."""

import pytest
import torch
from hosts import assert_equal, random_images, tiny_vggt

from pacevggt_patch import accelerate, is_accelerated, summary
from pacevggt_patch.break_even import fewest_frames, saved_flops
from pacevggt_patch.tokens import RestoredTokens

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
    assert fewest_frames("cpu", **VGGT_1B) == 1


def test_vggt_1b_on_a_gpu():
    """Measured on an H100: stock is the faster one below 6 frames."""
    assert fewest_frames("cuda", **VGGT_1B) == 6
    assert fewest_frames("cuda", **(VGGT_1B | {"kept": 155})) < 6
    assert (
        fewest_frames("cuda", **(VGGT_1B | {"kept": 1036})) == 1
    )  # nothing is pruned, so nothing is to be had
    few, many = (saved_flops(n, 1036, 311, 5, 1024, 24) for n in (5, 6))
    assert few < 311 * 25e9 <= many


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
