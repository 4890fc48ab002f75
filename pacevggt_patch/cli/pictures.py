"""Pictures of what the patch did: tokens, depth, points. Each is written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import PRE_AA, PaceConfig
from ..runtime.files import whole_file
from ..runtime.plotting import load_extra, load_pyplot, save_figure

FRAMES_SHOWN = 6


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


def save_token_picture(
    path: Path, images: Tensor, kept: Tensor, grid: tuple[int, int], config: PaceConfig | None = None
) -> None:
    """Frames above, and below them which patch tokens were kept: bright, all others dark.

    Args:
        path: a PNG.
        images: [S, 3, H, W] in [0, 1].
        kept: [S, K] numbers of the kept patch tokens of each frame, as `summary(model).kept[0]` has them.
        grid: patch rows and columns.
        config: the settings that were in force, for the title; None is global pruning.
    """
    plt = load_pyplot()
    shown = spread(len(images))
    size = (2.4 * len(shown), 5.2)
    figure, axes = plt.subplots(2, len(shown), figsize=size, squeeze=False, layout="constrained")
    for column, index in enumerate(shown):
        axes[0, column].imshow(_rgb(images[index]))
        axes[0, column].set_title(f"frame {index}", fontsize=9)
        axes[1, column].imshow(_rgb(overlay_kept(images[index], kept[index], grid)))
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle(token_title(kept.shape[1], grid[0] * grid[1], len(images), config), fontsize=9, wrap=True)
    save_figure(figure, path)


def token_title(kept: int, patches: int, frames: int, config: PaceConfig | None) -> str:
    """What the bright and the dark patch tokens of a picture are, in words."""
    bright = f"bright: kept patch tokens ({kept / patches:.0%})"
    if config is None or config.mode != PRE_AA:
        return f"{bright}, which take part in global attention\ndark: the others, which take their change from them"
    others = frames * (patches - kept)
    merged = config.merged_tokens(frames, patches) / max(others, 1)
    what = (
        "merged into them" if merged == 1 else f"{merged:.0%} of them merged into kept ones, the rest pruned"
    )
    return f"{bright}, which enter frame and global attention\ndark: the others, {what}"


def save_depth_picture(path: Path, images: Tensor, stock: Tensor, pace: Tensor) -> None:
    """Frame, stock depth, accelerated depth, and their relative difference, one row a frame.

    Args:
        path: a PNG.
        images: [S, 3, H, W] in [0, 1].
        stock, pace: depth [S, H, W].
    """
    plt = load_pyplot()
    shown = spread(len(images), 4)
    difference = (pace - stock).abs() / stock
    size = (10, 2.4 * len(shown) + 0.4)
    figure, axes = plt.subplots(len(shown), 4, figsize=size, squeeze=False, layout="constrained")
    for row, index in enumerate(shown):
        low, high = stock[index].quantile(torch.tensor([0.02, 0.98]).to(stock)).tolist()
        axes[row, 0].imshow(_rgb(images[index]))
        for column, depth in ((1, stock), (2, pace)):
            drawn = axes[row, column].imshow(depth[index].cpu().numpy(), vmin=low, vmax=high, cmap="turbo")
        figure.colorbar(drawn, ax=axes[row, 2], shrink=0.8)
        drawn = axes[row, 3].imshow(difference[index].cpu().numpy(), vmin=0, vmax=0.3, cmap="magma")
        figure.colorbar(drawn, ax=axes[row, 3], shrink=0.8)
    titles = ("frame", "depth, stock", "depth, accelerated", "relative difference")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.axis("off")
    save_figure(figure, path)


def save_points_picture(path: Path, points: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Point clouds side by side, seen from behind and above the first camera.

    Args:
        path: a PNG.
        points: title -> points [N, 3] in the first camera's frame (x right, y down, z forward), RGB [N, 3] in [0, 1].
    """
    plt = load_pyplot()
    figure, axes = plt.subplots(
        1, len(points), figsize=(6 * len(points), 4.8), squeeze=False, layout="constrained"
    )
    centre = next(iter(points.values()))[0].median(dim=0).values
    for axis, (title, (cloud, colours)) in zip(axes[0], points.items(), strict=True):
        axis.imshow(splat(cloud, colours, centre))
        axis.set_title(f"points, {title}", fontsize=9)
        axis.axis("off")
    save_figure(figure, path)


def splat(points: Tensor, colours: Tensor, centre: Tensor, height: int = 480, width: int = 600) -> np.ndarray:
    """Draw points on white, [height, width, 3] in [0, 1], from behind and above the origin, looking at `centre`."""
    eye = -0.9 * centre + torch.tensor([0.0, -0.9, 0.0]).to(points) * centre.norm()
    forward = torch.nn.functional.normalize(centre - eye, dim=0)
    right = torch.nn.functional.normalize(
        torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]).to(points), forward), dim=0
    )
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward])  # rows: the viewer's axes
    seen = (points - eye) @ rotation.T  # [N, 3]
    ahead = seen[:, 2] > 0.05 * centre.norm()
    seen, colours = seen[ahead], colours[ahead]
    far_first = seen[:, 2].argsort(descending=True)
    seen, colours = seen[far_first], colours[far_first]
    focal = 1.1 * width
    columns = (seen[:, 0] / seen[:, 2] * focal + width / 2).round().long()
    rows = (seen[:, 1] / seen[:, 2] * focal + height / 2).round().long()
    image = torch.ones(height, width, 3)
    for down in (0, 1):  # a point is 2 x 2 pixels
        for along in (0, 1):
            row, column = rows + down, columns + along
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            # One after another, nearest last: numpy keeps the last of several writes to a pixel.
            image.numpy()[row[inside].cpu().numpy(), column[inside].cpu().numpy()] = (
                colours[inside].cpu().numpy()
            )
    return image.numpy()


def save_points(path: Path, points: Tensor, colours: Tensor) -> None:
    """Write a coloured point cloud as binary PLY.

    Args:
        path: a .ply.
        points: [N, 3].
        colours: RGB [N, 3] in [0, 1].
    """
    plyfile = load_extra("plyfile", "point clouds")
    names = [(name, "<f4") for name in ("x", "y", "z")] + [(name, "u1") for name in ("red", "green", "blue")]
    vertices = np.empty(len(points), dtype=names)
    for i, (name, _) in enumerate(names):
        values = points[:, i] if i < 3 else (colours[:, i - 3] * 255).round()
        vertices[name] = values.cpu().numpy()
    with whole_file(path) as temporary:
        plyfile.PlyData([plyfile.PlyElement.describe(vertices, "vertex")]).write(temporary)


def _rgb(image: Tensor) -> np.ndarray:
    return image.clamp(0, 1).permute(1, 2, 0).cpu().numpy()
