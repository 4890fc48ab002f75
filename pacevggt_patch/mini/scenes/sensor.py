"""What a camera does to a picture: blur, exposure, white balance, vignetting, noise, tone, softness, JPEG.

Everything is a pure function of the image and of `[F, ...]` parameters, one row a frame, with no random state: noise
comes from a hash of the pixel's number and the frame's seed, so that a frame is the same on any device, at any time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...training.tensors import total
from ..compiling import faster
from .sampling import Sampler

BLUR_REACH = 2  # pixels to either side that defocus blur looks at
MOTION_TAPS = 9
JPEG_BLOCK = 8
# The luminance and chrominance tables of Annex K of the JPEG standard (ITU-T T.81), for quality 50.
LUMINANCE_STEPS = torch.tensor(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    dtype=torch.float32,
)
CHROMINANCE_STEPS = torch.full((8, 8), 99.0)
CHROMINANCE_STEPS[:4, :4] = torch.tensor(
    [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]], dtype=torch.float32
)


@dataclass(frozen=True)
class SensorEffects:
    """What the camera does to each of F frames.

    Attributes:
        gain: `[F, 3]` exposure times white balance, a factor on red, green and blue.
        vignetting: `[F]` share of the light that is lost in the corners.
        defocus: `[F]` standard deviation of a Gaussian blur, pixels; 0 is none.
        motion: `[F, 2]` way that the image travels during the exposure, pixels right and down.
        softness: `[F]` share in [0, 1] of an image that was halved in size and enlarged again.
        noise: `[F, 2]` standard deviation of the noise: in the dark, and what is added to its square at full light.
        tone: `[F, 3]` gamma, contrast about middle grey, and saturation; 1 leaves each as it is.
        jpeg: `[F]` quality of JPEG compression, 1 to 100; above 100 there is none.
        seed: `[F]` whole numbers below 2^24, of the noise.
    """

    gain: Tensor
    vignetting: Tensor
    defocus: Tensor
    motion: Tensor
    softness: Tensor
    noise: Tensor
    tone: Tensor
    jpeg: Tensor
    seed: Tensor

    @classmethod
    def none(cls, frames: int, device: torch.device | str = "cpu") -> SensorEffects:
        """The perfect camera."""
        zeros, ones = torch.zeros(frames, device=device), torch.ones(frames, 3, device=device)
        return cls(ones, zeros, zeros, zeros[:, None].expand(-1, 2), zeros, zeros[:, None].expand(-1, 2), ones,
                   zeros + 101, zeros)  # fmt: skip

    def packed(self) -> Tensor:
        """`[F, 15]` all parameters of a frame in a row; see `unpack`."""
        values = [getattr(self, field.name) for field in fields(self)]
        return torch.cat([value if value.ndim == 2 else value[:, None] for value in values], 1)

    @classmethod
    def unpack(cls, rows: Tensor) -> SensorEffects:
        """The effects whose `packed` rows `[F, 15]` these are."""
        gain, vignetting, defocus, motion, softness, noise, tone, jpeg, seed = rows.split(
            [3, 1, 1, 2, 1, 2, 3, 1, 1], 1
        )
        return cls(
            gain, vignetting[:, 0], defocus[:, 0], motion, softness[:, 0], noise, tone, jpeg[:, 0], seed[:, 0]
        )


def apply_sensor(images: Tensor, effects: SensorEffects) -> Tensor:
    """Images `[F, 3, H, W]` as the camera delivers them, in [0, 1]; H and W must be even.

    The order is the light's: lens (blur, vignetting), exposure, noise, then the camera's processing.
    """
    on_gpu = images.is_cuda
    images = faster(defocus_blur, on_gpu)(images, effects.defocus)
    images = faster(motion_blur, on_gpu)(images, effects.motion)
    images = faster(expose, on_gpu)(
        images, effects.gain, effects.vignetting, effects.noise, effects.tone, effects.seed
    )
    images = soften(images, effects.softness)
    return jpeg(images, effects.jpeg, faster(quantise, on_gpu)).clamp(0, 1)


def defocus_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with a standard deviation for each frame, `[F]` pixels; the border goes on beyond the image."""
    offsets = torch.arange(-BLUR_REACH, BLUR_REACH + 1, device=images.device)
    weights = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-2)[:, None]).square())  # [F, n]
    weights = (weights / weights.sum(1, keepdim=True))[:, :, None, None, None]
    height, width = images.shape[2:]
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    taps = range(2 * BLUR_REACH + 1)
    shifted = [images[:, :, (rows + i - BLUR_REACH).clamp(0, height - 1)] for i in taps]
    images = total(weights[:, i] * shifted[i] for i in taps)
    shifted = [images[:, :, :, (columns + i - BLUR_REACH).clamp(0, width - 1)] for i in taps]
    return total(weights[:, i] * shifted[i] for i in taps)


def motion_blur(images: Tensor, motion: Tensor) -> Tensor:
    """Mean over the way `motion` `[F, 2]` (pixels right and down), centred, in steps to the nearest pixel."""
    frames, _, height, width = images.shape
    rows = torch.arange(height, device=images.device)[None, :, None]
    columns = torch.arange(width, device=images.device)[None, None, :]
    flat = images.flatten(2)

    def shifted(tap: int) -> Tensor:
        step = ((tap / (MOTION_TAPS - 1) - 0.5) * motion).round().long()  # [F, 2]
        row = (rows + step[:, 1, None, None]).clamp(0, height - 1)
        column = (columns + step[:, 0, None, None]).clamp(0, width - 1)
        return flat.gather(2, (row * width + column).flatten(1)[:, None].expand(-1, 3, -1))

    return (total(map(shifted, range(MOTION_TAPS))) / MOTION_TAPS).view(frames, 3, height, width)


def hashed(number: Tensor, seed: Tensor) -> Tensor:
    """Numbers in [0, 2^24) that look random, of int32 numbers and seeds (which broadcast)."""
    mixed = number * 1597334677 ^ (seed + 1) * 1431374979
    for factor in (1274126177, 668265263):
        mixed = (mixed ^ ((mixed >> 15) & 0x1FFFF)) * factor
    return ((mixed ^ ((mixed >> 13) & 0x7FFFF)) >> 7) & 0xFFFFFF


def normal_noise(seed: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """`[F, *shape]` standard normal noise for seeds `[F]`, by Box and Muller."""
    count = shape[0] * shape[1] * shape[2]
    number = torch.arange(count, device=seed.device, dtype=torch.int32)
    seed = seed.round().to(torch.int32)[:, None]
    first, second = hashed(number, 2 * seed), hashed(number, 2 * seed + 1)
    radius = (-2 * ((first + 0.5) / 2**24).log()).sqrt()
    return (radius * torch.cos(second * (2 * math.pi / 2**24))).view(-1, *shape)


def expose(
    images: Tensor,
    gain: Tensor,
    vignetting: Tensor,
    noise: Tensor,
    tone: Tensor,
    seed: Tensor,
) -> Tensor:
    """Vignetting, exposure, white balance, noise and tone, clipped to [0, 1]; the arguments are the effects' own."""
    height, width = images.shape[2:]
    y = ((torch.arange(height, device=images.device) + 0.5) / height * 2 - 1)[:, None]
    x = (torch.arange(width, device=images.device) + 0.5) / width * 2 - 1
    light = (
        images
        * (1 - vignetting[:, None, None, None] * (x.square() + y.square()) / 2)
        * gain[:, :, None, None]
    )
    dark, bright = noise[:, 0, None, None, None], noise[:, 1, None, None, None]
    spread = (dark.square() + bright.square() * light.clamp(0, 1)).sqrt()
    light = (light + spread * normal_noise(seed, (3, height, width))).clamp(0, 1)
    gamma, contrast, saturation = (tone[:, i, None, None, None] for i in range(3))
    light = light.clamp(min=1e-4) ** gamma
    grey = 0.299 * light[:, :1] + 0.587 * light[:, 1:2] + 0.114 * light[:, 2:]
    light = grey + saturation * (light - grey)
    return (0.5 + contrast * (light - 0.5)).clamp(0, 1)


def soften(images: Tensor, amount: Tensor) -> Tensor:
    """Blend in the image halved in size and enlarged again, by `amount` `[F]` in [0, 1]."""
    small = F.avg_pool2d(images, 2)
    soft = F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
    return torch.lerp(images, soft, amount[:, None, None, None])


@functools.cache
def cosine_transform(device: torch.device | str = "cpu") -> Tensor:
    """`[8, 8]` orthonormal discrete cosine transform (type II): frequencies by places."""
    place, frequency = torch.arange(JPEG_BLOCK, device=device) + 0.5, torch.arange(JPEG_BLOCK, device=device)
    matrix = torch.cos(math.pi / JPEG_BLOCK * frequency[:, None] * place) * math.sqrt(2 / JPEG_BLOCK)
    return matrix * torch.where(frequency == 0, math.sqrt(0.5), 1.0)[:, None]


@functools.cache
def on_device(luminance: bool, device: torch.device) -> Tensor:
    """The table of luminance or of chrominance, copied once: a CUDA graph can record no copy from the host."""
    return (LUMINANCE_STEPS if luminance else CHROMINANCE_STEPS).to(device)


def quantise(blocks: Tensor, steps: Tensor, matrix: Tensor) -> Tensor:
    """Blocks `[F, n, 8, 8]` with their cosine coefficients rounded to multiples of `steps` `[F, 1, 8, 8]`."""
    coefficients = matrix @ blocks @ matrix.T
    return matrix.T @ ((coefficients / steps).round() * steps) @ matrix


def quantise_channel(channel: Tensor, steps: Tensor, quality: Tensor, function: Callable[..., Any]) -> Tensor:
    """A channel `[F, H, W]` around 0, in units of 1/255, after the loss of JPEG at `quality` `[F]`."""
    frames, height, width = channel.shape
    # As libjpeg scales the tables.
    percent = torch.where(quality < 50, 5000 / quality.clamp(min=1), 200 - 2 * quality.clamp(max=100))
    scaled = (on_device(steps is LUMINANCE_STEPS, channel.device) * percent[:, None, None] / 100).clamp(
        1, 255
    )[:, None]  # [F, 1, 8, 8]
    more = (-height % JPEG_BLOCK, -width % JPEG_BLOCK)
    padded = F.pad(channel[:, None], (0, more[1], 0, more[0]), mode="replicate")[:, 0]
    rows, columns = padded.shape[1] // JPEG_BLOCK, padded.shape[2] // JPEG_BLOCK
    blocks = (
        padded.view(frames, rows, JPEG_BLOCK, columns, JPEG_BLOCK).transpose(2, 3).flatten(1, 2).contiguous()
    )
    done = function(blocks, scaled, cosine_transform(channel.device))
    done = done.view(frames, rows, columns, JPEG_BLOCK, JPEG_BLOCK).transpose(2, 3).reshape_as(padded)
    return done[:, :height, :width]


def jpeg(images: Tensor, quality: Tensor, function: Callable[..., Any] = quantise) -> Tensor:
    """Images `[F, 3, H, W]` after JPEG compression at `quality` `[F]`, colour at half the resolution (4:2:0)."""
    red, green, blue = (images * 255 - 128).unbind(1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    blueness, redness = 0.564 * (blue - grey), 0.713 * (red - grey)
    halved = F.avg_pool2d(torch.cat([blueness, redness])[:, None], 2)[:, 0]
    grey = quantise_channel(grey, LUMINANCE_STEPS, quality, function)
    colour = quantise_channel(halved, CHROMINANCE_STEPS, quality.repeat(2), function)
    colour = F.interpolate(colour[:, None], size=images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    blueness, redness = colour.chunk(2)
    red, blue = grey + redness / 0.713, grey + blueness / 0.564
    green = (grey - 0.299 * red - 0.114 * blue) / 0.587
    lossy = (torch.stack([red, green, blue], 1) + 128) / 255
    return torch.where((quality > 100)[:, None, None, None], images, lossy)


def sample_effects(plain: Tensor, views: int, generator: torch.Generator) -> SensorEffects:
    """Effects of B cameras on their S views, `[B * S]` frames, on the CPU.

    Args:
        plain: `[B]` bool, clips of plain rooms: half of them come from a perfect camera, but for the exposure.
        views: S.
        generator: a generator on the CPU.
    """
    s = Sampler(generator)
    count = len(plain)
    perfect = (plain & s.chance(count, p=0.5))[:, None]  # [B, 1]
    plain_column = plain[:, None]
    shape = (count, views)

    def some(p: float, value: Tensor) -> Tensor:
        """The value in a share p of the clips, else 0; never from a perfect camera."""
        return torch.where(s.chance(count, 1, p=p) & ~perfect, value, 0.0)

    own = s.log_uniform(count, 1, low=0.8, high=1.5)
    base = torch.where(plain_column, 1.0, own)
    jitter = torch.where(plain_column, 0.12, s.log_uniform(count, 1, low=0.01, high=0.15))
    exposure = base * (1 + jitter * s.normal(*shape).clamp(-2, 2))
    cast = some(0.6, torch.ones(count, 1))[..., None] * (
        0.08 * s.normal(count, 1, 3) + 0.015 * s.normal(*shape, 3)
    )
    direction = s.uniform(*shape, high=2 * math.pi)
    way = some(0.35, s.log_uniform(count, 1, low=0.5, high=5)) * s.uniform(*shape, high=1.6)
    tone = torch.stack(
        [
            torch.exp(some(0.6, 0.25 * s.normal(count, 1)).clamp(-0.7, 0.7)).expand(shape),
            torch.exp(some(0.5, 0.15 * s.normal(count, 1)).clamp(-0.4, 0.4)).expand(shape),
            torch.exp(some(0.5, 0.3 * s.normal(count, 1) - 0.15).clamp(-1.5, 0.5)).expand(shape),
        ],
        2,
    )
    quality = torch.where(s.chance(count, 1, p=0.5) & ~perfect, s.uniform(count, 1, low=45, high=97), 101.0)
    values = (
        exposure[..., None] * (1 + cast),
        some(0.5, s.uniform(count, 1, high=0.45)).expand(shape),
        some(0.75, s.uniform(count, 1, low=0.3, high=1.1)) * s.uniform(*shape, low=0.7, high=1.4),
        torch.stack([way * direction.cos(), way * direction.sin()], 2),
        some(0.4, s.uniform(count, 1)).expand(shape),
        torch.stack(
            [
                torch.where(perfect, 0.004, s.log_uniform(count, 1, low=0.003, high=0.03)).expand(shape),
                some(0.6, s.log_uniform(count, 1, low=0.005, high=0.05)).expand(shape),
            ],
            2,
        ),
        tone,
        quality.expand(shape),
        s.integers(*shape, high=2**24).float(),
    )
    return SensorEffects(*(value.flatten(0, 1) for value in values))
