"""Sensor effects: each does what it says, to the frame that it is asked for, on any run."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pacevggt_patch.mini.scenes.sensor import (
    SensorEffects,
    apply_sensor,
    cosine_transform,
    defocus_blur,
    jpeg,
    motion_blur,
    normal_noise,
    sample_effects,
    soften,
)

torch.set_num_threads(1)


def images(frames: int = 2, size: int = 32) -> torch.Tensor:
    """Smooth random images within [0.1, 0.9]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(frames, 3, 5, 5, generator=generator) * 0.8 + 0.1
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)


def with_effect(frames: int = 2, **values) -> SensorEffects:
    """The perfect camera but for some parameters, which take effect on the first frame only."""
    effects = vars(SensorEffects.none(frames)).copy()
    for name, value in values.items():
        changed = effects[name].clone()
        changed[0] = torch.as_tensor(value)
        effects[name] = changed
    return SensorEffects(**effects)


def test_the_perfect_camera_changes_nothing():
    clean = images()
    torch.testing.assert_close(apply_sensor(clean, SensorEffects.none(2)), clean)


@pytest.mark.parametrize(
    "values",
    [
        {"gain": [1.2, 1.0, 0.8]},
        {"vignetting": 0.4},
        {"defocus": 1.5},
        {"motion": [6.0, 0.0]},
        {"softness": 1.0},
        {"noise": [0.05, 0.0]},
        {"tone": [1.4, 1.0, 1.0]},
        {"tone": [1.0, 0.6, 1.0]},
        {"tone": [1.0, 1.0, 0.2]},
        {"jpeg": 20.0},
    ],
)
def test_each_effect_changes_its_own_frame_only(values):
    sharp = images() + 0.05 * torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    changed = apply_sensor(sharp, with_effect(**values))
    assert (changed[0] - sharp[0]).abs().mean() > 2e-3
    torch.testing.assert_close(changed[1], sharp[1])
    assert changed.min() >= 0
    assert changed.max() <= 1


def test_exposure_and_white_balance_are_factors():
    clean = images() * 0.5
    changed = apply_sensor(clean, with_effect(gain=[1.5, 1.0, 0.5]))
    torch.testing.assert_close(changed[0], clean[0] * torch.tensor([1.5, 1.0, 0.5])[:, None, None])


def test_vignetting_takes_its_share_in_the_corners_and_nothing_in_the_middle():
    flat = torch.full((1, 3, 64, 64), 0.5)
    changed = apply_sensor(flat, with_effect(1, vignetting=0.4))[0, 0]
    assert changed[31, 31] == pytest.approx(0.5, abs=1e-3)
    assert changed[0, 0] == pytest.approx(0.5 * 0.6, abs=0.01)
    assert changed[0, 31] == pytest.approx(0.5 * 0.8, abs=0.01)


def test_defocus_has_the_variance_it_says_and_keeps_the_light():
    point = torch.zeros(2, 3, 15, 15)
    point[:, :, 7, 7] = 1.0
    spread = defocus_blur(point, torch.tensor([0.0, 0.8]))
    torch.testing.assert_close(spread[0], point[0])
    assert spread[1, 0].sum() == pytest.approx(1.0, abs=1e-5)
    offset = torch.arange(15) - 7.0
    assert (spread[1, 0].sum(0) * offset.square()).sum() == pytest.approx(0.64, rel=0.07)
    torch.testing.assert_close(spread[1, 0], spread[1, 0].T)


def test_motion_blur_runs_along_its_direction():
    point = torch.zeros(2, 3, 17, 17)
    point[:, :, 8, 8] = 1.0
    trail = motion_blur(point, torch.tensor([[8.0, 0.0], [0.0, 4.0]]))
    assert (trail[0, 0, 8, 4:13] > 0).all()  # nine pixels, one a tap
    assert trail[0, 0].sum() == pytest.approx(1.0, abs=1e-5)
    assert (trail[0, 0].sum(1) > 0).sum() == 1
    assert (trail[1, 0].sum(1) > 0).sum() == 5
    assert (trail[1, 0].sum(0) > 0).sum() == 1


def test_noise_is_normal_and_that_of_its_seed():
    noise = normal_noise(torch.tensor([1.0, 1.0, 2.0]), (3, 64, 64))
    assert torch.equal(noise[0], noise[1])
    assert noise[0].mean().abs() < 0.03
    assert noise[0].std() == pytest.approx(1.0, abs=0.03)
    assert noise[0].abs().max() > 3
    pairs = torch.stack([noise[0].flatten(), noise[2].flatten()])
    assert torch.corrcoef(pairs)[0, 1].abs() < 0.04
    row = noise[0, 0]
    assert torch.corrcoef(torch.stack([row[:, 1:].flatten(), row[:, :-1].flatten()]))[0, 1].abs() < 0.06


def test_noise_grows_with_the_light_as_it_says():
    flat = torch.cat([torch.full((1, 3, 64, 64), 0.2), torch.full((1, 3, 64, 64), 0.8)])
    rows = SensorEffects.none(2).packed()
    rows[:, 8], rows[:, 9] = 0.01, 0.04  # noise in the dark and at full light
    noisy = apply_sensor(flat, SensorEffects.unpack(rows))
    for frame, light in ((0, 0.2), (1, 0.8)):
        expected = (0.01**2 + 0.04**2 * light) ** 0.5
        assert noisy[frame].std() == pytest.approx(expected, rel=0.05)


def test_tone_is_gamma_contrast_and_saturation():
    grey = torch.full((1, 3, 8, 8), 0.25)
    torch.testing.assert_close(apply_sensor(grey, with_effect(1, tone=[0.5, 1.0, 1.0])), grey.sqrt())
    torch.testing.assert_close(apply_sensor(grey, with_effect(1, tone=[1.0, 2.0, 1.0])), grey * 0)
    coloured = images(1)
    faded = apply_sensor(coloured, with_effect(1, tone=[1.0, 1.0, 0.0]))
    torch.testing.assert_close(faded[:, 0], faded[:, 2])
    luminance = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    torch.testing.assert_close((faded * luminance).sum(1), (coloured * luminance).sum(1))


def test_softness_takes_the_finest_detail_away():
    checker = torch.zeros(1, 3, 16, 16)
    checker[..., ::2, ::2] = checker[..., 1::2, 1::2] = 1.0
    torch.testing.assert_close(soften(checker, torch.tensor([1.0])), torch.full_like(checker, 0.5))
    torch.testing.assert_close(soften(checker, torch.tensor([0.0])), checker)


def test_the_cosine_transform_is_orthonormal():
    matrix = cosine_transform()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(8), atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix[0], torch.full((8,), 8**-0.5))


@pytest.mark.parametrize("quality", [30, 75])
def test_jpeg_loses_what_a_real_encoder_loses(quality):
    generator = torch.Generator().manual_seed(2)
    clean = (images(1, 64) + 0.06 * torch.randn(1, 3, 64, 64, generator=generator)).clamp(0, 1)
    clean = (clean * 255).round() / 255
    buffer = io.BytesIO()
    array = (clean[0].permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(array).save(buffer, "JPEG", quality=quality, subsampling=2)
    real = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)[None] / 255
    ours = jpeg(clean, torch.tensor([float(quality)])).clamp(0, 1)
    loss, difference = (real - clean).std(), (ours - real).std()
    # The same tables and transform; the rest is rounding and how colour is enlarged.
    assert difference < 0.25 * loss
    assert torch.equal(jpeg(clean, torch.tensor([101.0])), clean)


def test_odd_numbers_of_blocks_are_padded():
    clean = images(1, 28)
    loss = (jpeg(clean, torch.tensor([95.0])) - clean).abs()
    assert loss.shape == clean.shape
    # The rest of a block that sticks out is no worse off than whole blocks.
    assert loss[..., 24:].mean() < 2 * loss[..., :24].mean()
    assert loss.mean() < 0.02


def test_parameters_pack_and_unpack():
    effects = sample_effects(torch.tensor([True, False]), 3, torch.Generator().manual_seed(4))
    again = SensorEffects.unpack(effects.packed())
    for name, value in vars(effects).items():
        assert torch.equal(value, getattr(again, name)), name


def test_sampled_effects_are_those_of_the_seed_and_leave_the_global_state_alone():
    state = torch.get_rng_state()
    plain = torch.tensor([True] * 100 + [False] * 100)
    first, second = (sample_effects(plain, 2, torch.Generator().manual_seed(7)).packed() for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.isfinite().all()
    blurred = (SensorEffects.unpack(first).defocus > 0).view(200, 2)[:, 0]
    # Half of the plain clips come from a perfect camera, and a quarter of the others is sharp.
    assert 0.25 < blurred[:100].float().mean() < 0.55
    assert 0.6 < blurred[100:].float().mean() < 0.9
