"""Pictures on disk: which files are pictures, and how one is read. Everything that reads pictures does it by these."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import ClipError, first_line

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
# Pictures, too, but not ones that every Pillow reads or that VGGT's own loader takes.
OTHER_SUFFIXES = (
    ".heic", ".heif", ".avif", ".jxl", ".jp2", ".jpe", ".mpo", ".apng", ".gif", ".ppm", ".pgm", ".tga", ".exr", ".hdr",
    ".dng", ".cr2", ".cr3", ".nef", ".arw",
)  # fmt: skip
# By their content. No others: Pillow hands PostScript to Ghostscript, whatever the file is called.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
# Thumbnails and other things that file managers and archivers leave beside pictures.
HIDDEN = (".", "__MACOSX", "@eaDir")
MOST_PIXELS = 120_000_000  # the sensors of telephones end at 108 million, but for rare ones
MOST_BYTES = 2**28
ORIENTATION = 0x0112
EIGHT_BIT = (np.arange(65536) / 65535 * 255).round().astype(np.uint8)  # of 16-bit grey


def listed(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files (broken links among them) and of the folders in a folder, sorted, without hidden ones."""
    try:
        names = sorted(name for name in os.listdir(folder) if not is_hidden(name))
    except OSError as error:
        raise ClipError(f"{folder} cannot be listed: {error.strerror}") from error
    folders = [name for name in names if os.path.isdir(folder / name)]
    return sorted(set(names) - set(folders)), folders


def is_hidden(name: str) -> bool:
    """Whether a path, relative to where one looks, is of a hidden file or lies in a hidden folder."""
    return any(part.startswith(HIDDEN) for part in name.split("/") if part != ".")


def split_images(source: Path, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names of pictures in a folder or archive that can be read, and of others: of other formats, or no plain files."""
    readable, others = [], []
    for name in names:
        path = source / name  # of what is in an archive nothing exists
        if is_hidden(name) or not name.lower().endswith(IMAGE_SUFFIXES + OTHER_SUFFIXES):
            continue
        known = name.lower().endswith(IMAGE_SUFFIXES) and (os.path.isfile(path) or not os.path.lexists(path))
        (readable if known else others).append(name)
    return readable, others


def image_names(source: Path, names: Iterable[str]) -> list[str]:
    """The readable ones of `split_images`; a warning names the others. Raises `ClipError` if none is readable."""
    readable, others = split_images(source, names)
    if not readable:
        more = f"; {some(others)} cannot be read: convert them to JPEG" if others else ""
        raise ClipError(f"{source} has no images (looked for {' '.join(IMAGE_SUFFIXES)}){more}")
    if others:
        kinds = " ".join(IMAGE_SUFFIXES)
        warnings.warn(f"{source}: left out {some(others)}, no files of the kinds {kinds}", stacklevel=4)
    return readable


def some(names: list[str]) -> str:
    """How many names there are, and the first ones."""
    return f"{len(names)} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"


def check_file(file: Path, most: int = MOST_BYTES) -> None:
    """Raise `ClipError` if this is no plain file, whose opening may never end, or one of more than `most` bytes."""
    if not os.path.isfile(file):
        raise ClipError(f"{file} {'is not a plain file' if os.path.exists(file) else 'does not exist'}")
    if os.path.getsize(file) > most:
        raise ClipError(f"{file} is larger than {most >> 20} MiB: make it smaller")


@contextmanager
def opened(file: Path | BinaryIO, name: str) -> Generator[Image.Image]:
    """The image of a file, of which only the header has been read; what goes wrong within is a `ClipError`."""
    if isinstance(file, Path):
        check_file(file)
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except Image.DecompressionBombError as error:
        raise ClipError(
            f"{name} has more than {MOST_PIXELS // 10**6} million pixels: make it smaller"
        ) from error
    except UnidentifiedImageError as error:
        raise ClipError(f"{name} cannot be read as an image: its format is not known") from error
    except Exception as error:  # Pillow's decoders raise whatever their format trips over
        raise ClipError(f"{name} cannot be read as an image: {first_line(error)}") from error


def read_header(file: Path) -> tuple[tuple[int, int], str]:
    """Width and height of an image, turned as its orientation tag says, and its mode, without decoding it."""
    with opened(file, str(file)) as image:
        # A PNG's own `getexif` decodes it, for tags that stand behind the pixels.
        turned = Image.Image.getexif(image).get(ORIENTATION) in (5, 6, 7, 8)
        if turned and image.format == "TIFF":  # Pillow itself turns these, on opening or on loading
            image.load()
            turned = False
        return image.size[::-1] if turned else image.size, image.mode


def check_content(file: Path) -> None:
    """Raise `ClipError` if an image can't be decoded to its end."""
    with opened(file, str(file)) as image:
        image.draft("L", (1, 1))  # a JPEG is read to its end like this, but faster
        image.load()


def read_image(file: Path | BinaryIO, name: str | None = None) -> Image.Image:
    """An image in its own mode, turned as its orientation tag says; of several pages or moments the first one.

    Raises:
        ClipError: The file, in messages called `name`, is missing, no image, truncated or too large.
    """
    with opened(file, name or str(file)) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return image


def read_rgb(file: Path | BinaryIO, name: str | None = None) -> Image.Image:
    """An image of `read_image` as 8-bit RGB: transparency on white, 16-bit greyscale over its full range."""
    image = read_image(file, name)
    if image.mode.startswith("I"):  # 16-bit greyscale; convert("RGB") would cut it off at 255
        values = np.asarray(image)
        if values.min() >= 0 and values.max() < len(EIGHT_BIT):
            return Image.fromarray(EIGHT_BIT[values]).convert("RGB")
    if image.mode.startswith(("I", "F")):
        raise ClipError(f"{name or file} has grey values of an unknown range: store it as 8 or 16 bit")
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:  # a colour space that Pillow does not convert
        raise ClipError(f"{name or file} cannot be turned into RGB: {error}") from error
