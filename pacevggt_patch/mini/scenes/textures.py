"""Image textures for rendered scenes: many squares in one tensor, at all their mip levels."""

from __future__ import annotations

import io
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...arguments import file_path
from ...clips.images import MOST_BYTES, image_names, listed, opened, read_rgb
from ...errors import ClipError, first_line
from .rooms import Hits, Scene, move, sample_scene, surface_colour

LARGE = 2**24  # pixels of pictures of which one is held at a time
SMALLEST_LEVEL = 4
PROCEDURAL_SPAN = 2.4  # metres on one side of a procedural square


@dataclass(frozen=True)
class TextureAtlas:
    """N square textures. `texels` is flat: texture by texture, level by level (finest first), row by row.

    Attributes:
        texels: `[N * texels_per_texture]` int32, `red << 16 | green << 8 | blue`.
        side: pixels on a side of the finest level, a power of two.
        photographs: how many of the N, the first ones, are photographs; the others are procedural.
    """

    texels: Tensor
    side: int
    photographs: int

    @property
    def levels(self) -> int:
        """Number of mip levels L; level l has `side >> l` pixels on a side."""
        return (self.side // SMALLEST_LEVEL).bit_length()

    @property
    def texels_per_texture(self) -> int:
        """Pixels of one texture over all levels."""
        return (4 * self.side * self.side - SMALLEST_LEVEL * SMALLEST_LEVEL) // 3

    def __len__(self) -> int:
        """Number of textures N."""
        return len(self.texels) // self.texels_per_texture

    def to(self, device: torch.device | str) -> TextureAtlas:
        """The atlas on another device."""
        return TextureAtlas(self.texels.to(device), self.side, self.photographs)


def level_offset(level: Tensor, side: int) -> Tensor:
    """Where integer `level` starts within a texture: the pixels of all finer levels."""
    # side^2 (1 + 1/4 + ... ) as a geometric sum in whole numbers.
    whole = 4 * side * side
    return (whole - torch.bitwise_right_shift(torch.full_like(level, whole), 2 * level)) // 3


def build_atlas(squares: Tensor, photographs: int) -> TextureAtlas:
    """An atlas of squares `[N, 3, side, side]` in [0, 1], the first `photographs` of which are photographs.

    Raises:
        ClipError: the squares are not square, or their side is not a power of two of at least `SMALLEST_LEVEL`.
    """
    height, side = squares.shape[2:]
    if height != side or side < SMALLEST_LEVEL or side & (side - 1):
        raise ClipError(f"textures must be squares whose side is a power of two, got {height} x {side}")
    parts = []
    # A few at a time: all levels of thousands in float32 would take gigabytes.
    for part in squares.split(256):
        level, levels = part, []
        while level.shape[-1] >= SMALLEST_LEVEL:
            levels.append(pack_colours(level).flatten(1))
            level = F.avg_pool2d(level, 2)
        parts.append(torch.cat(levels, 1))
    return TextureAtlas(torch.cat(parts).flatten(), side, photographs)


def pack_colours(images: Tensor) -> Tensor:
    """`[..., H, W]` int32 of RGB `[..., 3, H, W]` in [0, 1]."""
    red, green, blue = (images.clamp(0, 1) * 255).round().to(torch.int32).unbind(-3)
    return (red << 16) | (green << 8) | blue


def load_photographs(path: str | Path, side: int = 256, limit: int | None = None) -> Tensor:
    """`[N, 3, side, side]` uint8 squares of the images in a zip file or a folder, in the order of their names.

    Args:
        path: a zip file with images in it, as `fetch_textures` writes, or a folder with images.
        side: pixels on a side; other sizes are resized, and of other shapes the central square is taken.
        limit: take at most so many, spread evenly.

    Raises:
        ClipError: there is nothing at `path`, it has no images, or one cannot be read. The message names the file.
    """
    path = file_path("path", path)
    with ThreadPoolExecutor(4) as pool, ExitStack() as stack:
        if os.path.isdir(path):
            archive, names = None, sorted(files_below(path))
        else:
            archive = stack.enter_context(opened_archive(path))
            names = sorted(set(archive.namelist()))
        names = image_names(path, names)
        if limit is not None and limit < len(names):
            names = [names[i * len(names) // limit] for i in range(limit)]

        one_at_a_time = Lock()

        def square(name: str) -> Tensor:
            file = path / name if archive is None else unpacked(archive, name)
            with opened(file, f"{path}: {name}") as image:
                large = image.width * image.height > LARGE
            if not isinstance(file, Path):
                file.seek(0)
            with one_at_a_time if large else nullcontext():
                return central_square(read_rgb(file, f"{path}: {name}"), side)

        return torch.stack(list(pool.map(square, names)))


def files_below(folder: Path) -> list[str]:
    """Paths of the files below a folder, relative to it, without hidden ones; links to folders are not followed."""
    files, folders = listed(folder)
    inner = [name for name in folders if not os.path.islink(folder / name)]
    return files + [f"{name}/{file}" for name in inner for file in files_below(folder / name)]


def opened_archive(path: Path) -> zipfile.ZipFile:
    """A zip file to read from; `ClipError` if it is none."""
    wrong = f"{path} is neither a folder nor a zip file of textures"
    if not os.path.isfile(path):  # opening what is no plain file may never end
        raise ClipError(wrong)
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # damaged archives raise whatever their reader trips over
        raise ClipError(f"{wrong}: {first_line(error)}") from error


def unpacked(archive: zipfile.ZipFile, name: str) -> io.BytesIO:
    """A file in an archive; `ClipError` if it is too large, encrypted, damaged or packed in an unknown way."""
    try:
        if archive.getinfo(name).file_size > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB")
        return io.BytesIO(archive.read(name))
    except Exception as error:  # as above
        raise ClipError(f"{archive.filename}: {name} cannot be unpacked: {first_line(error)}") from error


def central_square(image: Image.Image, side: int) -> Tensor:
    """`[3, side, side]` uint8 of the central square of an RGB image."""
    if image.size != (side, side):
        shorter = min(image.size)
        left, top = (image.width - shorter) // 2, (image.height - shorter) // 2
        box = (left, top, left + shorter, top + shorter)
        image = image.resize((side, side), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def procedural_squares(
    count: int, side: int = 256, seed: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """`[count, 3, side, side]` uint8 slices, `PROCEDURAL_SPAN` wide, through the solid textures of synthetic rooms."""
    generator = torch.Generator().manual_seed(seed)
    centres = (torch.arange(side, device=device) + 0.5) * (PROCEDURAL_SPAN / side) - PROCEDURAL_SPAN / 2
    vertical, horizontal = torch.meshgrid(centres, centres, indexing="ij")
    squares: list[Tensor] = []
    while len(squares) < count:
        scene: Scene = move(sample_scene(generator), device)
        for surface in range(min(len(scene.textures.colours), count - len(squares))):
            height = torch.rand((), generator=generator).to(device).expand(side * side)
            point = torch.stack([horizontal.flatten(), vertical.flatten(), height])  # [3, side^2]
            hits = Hits(height, torch.full((side * side,), surface, device=device), point, point)
            squares.append((surface_colour(scene, hits) * 255).round().to(torch.uint8).view(3, side, side))
    return torch.stack(squares)


def texture_atlas(
    photographs: Tensor | None,
    procedural: int = 512,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> TextureAtlas:
    """An atlas of photographs `[N, 3, side, side]` uint8, if there are any, and procedural textures after them.

    Dark photographs are brightened part of the way to middle grey: game textures are painted for bright lamps.
    """
    side = photographs.shape[-1] if photographs is not None else 256
    own = procedural_squares(procedural, side, seed, device)
    atlases = [build_atlas(part.float() / 255, 0) for part in own.split(512)]
    if photographs is not None:
        lit = (brightened(part.to(device).float() / 255) for part in photographs.split(512))
        atlases = [build_atlas(part, 0) for part in lit] + atlases
    return TextureAtlas(
        torch.cat([atlas.texels for atlas in atlases]), side, 0 if photographs is None else len(photographs)
    )


def brightened(squares: Tensor) -> Tensor:
    """Squares `[N, 3, side, side]` whose mean came most of the way up to middle grey, if it was darker."""
    mean = squares.mean((1, 2, 3), keepdim=True).clamp(min=0.02)
    return (squares * (0.42 / mean).clamp(1, 16) ** 0.6).clamp(0, 1)


def sample_texture(
    atlas: TextureAtlas, texture: Tensor, u: Tensor, v: Tensor, level: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Trilinear look-up: red, green and blue in [0, 1], each shaped as `u`.

    Args:
        atlas: the textures.
        texture: number of the texture, integers.
        u: from left to right in widths of the texture; textures repeat, every other time mirrored.
        v: from top to bottom, likewise.
        level: mip level, any number; between two levels both are blended.
    """
    level = level.clamp(0, atlas.levels - 1)
    finer = level.floor().clamp(max=atlas.levels - 2)
    share = level - finer
    start = texture.int() * atlas.texels_per_texture
    near = bilinear(atlas, start, mirrored(u), mirrored(v), finer.int())
    far = bilinear(atlas, start, mirrored(u), mirrored(v), finer.int() + 1)
    red, green, blue = (torch.lerp(a, b, share) / 255 for a, b in zip(near, far, strict=True))
    return red, green, blue


def mirrored(position: Tensor) -> Tensor:
    """Position in [0, 1] within a texture that repeats mirrored."""
    return 1 - (position - 2 * (position / 2).floor() - 1).abs()


def bilinear(atlas: TextureAtlas, start: Tensor, u: Tensor, v: Tensor, level: Tensor) -> list[Tensor]:
    """Bilinear look-up in one level of the texture that begins at `start`; colours in [0, 255]."""
    size = torch.bitwise_right_shift(torch.full_like(level, atlas.side), level)
    # Pixel centres lie on halves; beyond the outer ones the border pixel goes on.
    x = (u * size - 0.5).clamp(min=0).minimum(size - 1.0)
    y = (v * size - 0.5).clamp(min=0).minimum(size - 1.0)
    left, top = x.floor().int(), y.floor().int()
    right, bottom = (left + 1).minimum(size - 1), (top + 1).minimum(size - 1)
    x, y = x - left, y - top
    first = start + level_offset(level, atlas.side)
    corners = [
        colours(atlas.texels[first + row * size + column])
        for row, column in ((top, left), (top, right), (bottom, left), (bottom, right))
    ]
    return [
        torch.lerp(torch.lerp(a, b, x), torch.lerp(c, d, x), y) for a, b, c, d in zip(*corners, strict=True)
    ]


def colours(packed: Tensor) -> list[Tensor]:
    """Red, green and blue in [0, 255] of packed texels."""
    return [((packed >> shift) & 255).float() for shift in (16, 8, 0)]
