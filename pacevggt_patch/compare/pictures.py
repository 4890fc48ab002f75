"""The other pictures of the page: frames, kept tokens, depth and curves, as images that stand in the page itself."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..runtime.plotting import load_extra, load_pyplot

FRAMES_SHOWN = 5
WIDEST = 400  # pixels of a picture in a grid: twice as wide as it is shown
DEPTH_COLOURS, DIFFERENCE_COLOURS = "turbo", "magma"


def spread(frames: int, shown: int = FRAMES_SHOWN) -> list[int]:
    """Evenly spaced frame numbers, first and last among them."""
    return sorted({round(i) for i in np.linspace(0, frames - 1, min(frames, shown))})


def overlay_kept(image: Tensor, kept: Tensor, grid: tuple[int, int]) -> Tensor:
    """An image [3, H, W] in [0, 1], dark but for its kept patch tokens [K], given by their numbers."""
    patch = image.shape[1] // grid[0]
    cells = torch.zeros(grid[0] * grid[1], dtype=torch.bool, device=image.device)
    cells[kept.to(image.device)] = True
    bright = cells.view(grid).repeat_interleave(patch, 0).repeat_interleave(patch, 1)  # [H, W]
    return torch.where(bright, image, 0.2 * image)


def pixels(image: Tensor) -> np.ndarray:
    """[H, W, 3] uint8 of an image [3, H, W] in [0, 1]."""
    return (image.clamp(0, 1).permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)


def coloured(values: Tensor, low: float, high: float, colours: str) -> np.ndarray:
    """[H, W, 3] uint8 of values [H, W] from `low` to `high` in the colours of matplotlib; grey where there is none."""
    colormap = load_extra("matplotlib", "the pictures").colormaps[colours].with_extremes(bad=(0.6, 0.6, 0.6))
    share = (values.double().numpy() - low) / max(high - low, 1e-12)
    return (colormap(np.ma.masked_invalid(share))[..., :3] * 255).round().astype(np.uint8)


def gradient(colours: str, steps: int = 12) -> str:
    """The same colours as a CSS gradient from left to right."""
    colormap = load_extra("matplotlib", "the pictures").colormaps[colours]
    stops = (colormap(i / (steps - 1))[:3] for i in range(steps))
    return (
        f"linear-gradient(90deg,{','.join('#' + ''.join(f'{round(255 * c):02x}' for c in s) for s in stops)})"
    )


def limits(values: Tensor, low: float, high: float) -> tuple[float, float]:
    """The quantiles `low` and `high` of all finite values, told by at most 100,000 of them."""
    finite = values[values.isfinite()].flatten()
    if not len(finite):
        return 0.0, 1.0
    some = finite[:: max(1, len(finite) // 100_000)].double()
    ends = some.quantile(torch.tensor([low, high], dtype=torch.float64)).tolist()
    return ends[0], ends[1]


def as_jpeg(picture: np.ndarray, widest: int | None = WIDEST) -> str:
    """A data address of a picture [H, W, 3] uint8, reduced to a width."""
    image = Image.fromarray(picture)
    if widest is not None and image.width > widest:
        image = image.resize(
            (widest, max(1, round(image.height * widest / image.width))), Image.Resampling.LANCZOS
        )
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def curves(panels: dict[str, list[float | None]]) -> str:
    """A data address of a drawing with one panel a curve over the frames, by its title; a gap where there is none."""
    pyplot = load_pyplot()
    with pyplot.rc_context({"font.family": "sans-serif", "font.size": 10, "svg.fonttype": "path"}):
        figure, across = pyplot.subplots(
            1, len(panels), figsize=(13.2, 2.7), squeeze=False, layout="constrained"
        )
        for axis, (name, values) in zip(across[0], panels.items(), strict=True):
            heights = [np.nan if value is None else value for value in values]
            axis.plot(range(len(heights)), heights, "o-", color="#1f77b4", markersize=3.5, linewidth=1.4)
            axis.set_title(name, fontsize=10)
            axis.set_xlabel("frame")
            axis.set_ylim(bottom=0)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        content = io.BytesIO()
        try:
            figure.savefig(content, format="svg")
        finally:
            pyplot.close(figure)
    return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode()}"


def grid_of(images: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of patches of images [S, 3, H, W]."""
    return images.shape[-2] // patch, images.shape[-1] // patch


def frame_rows(
    images: Tensor,
    kept: Tensor | None,
    depths: dict[str, Tensor],
    difference: Tensor | None,
    patch: int,
    most_shown: int = FRAMES_SHOWN,
) -> tuple[list[dict[str, Any]], dict[str, tuple[float, float]]]:
    """The pictures of some frames, and the ranges of the colours of depth and difference.

    Args:
        images: [S, 3, H, W] in [0, 1].
        kept: [S, K] numbers of the kept patch tokens; None where all were.
        depths: [S, H, W] of each side, by its name; the first one sets the range.
        difference: [S, H, W] relative difference, or None.
        patch: pixels a side of a patch.
        most_shown: frames.

    Returns:
        For each frame its number as `frame` and pictures by their titles; `depth` and `difference` (in percent).
    """
    shown = spread(len(images), most_shown)
    first = next(iter(depths.values()))[shown]
    low, high = limits(first, 0.01, 0.99)
    most = 100 * limits(difference[shown], 0.0, 0.98)[1] if difference is not None else 1.0
    most = max(1.0, float(np.ceil(most)))
    rows = []
    for index in shown:
        row: dict[str, Any] = {"frame": index, "pictures": {"frame": as_jpeg(pixels(images[index]))}}
        if kept is not None:
            dark = overlay_kept(images[index], kept[index], grid_of(images, patch))
            row["pictures"]["kept patch tokens"] = as_jpeg(pixels(dark))
        for name, depth in depths.items():
            row["pictures"][f"depth, {name}"] = as_jpeg(coloured(depth[index], low, high, DEPTH_COLOURS))
        if difference is not None:
            drawn = coloured(100 * difference[index], 0, most, DIFFERENCE_COLOURS)
            row["pictures"]["difference of depth"] = as_jpeg(drawn)
        rows.append(row)
    return rows, {"depth": (low, high), "difference": (0.0, most)}
