"""Collect photographs for the walls and objects of training scenes, from Debian packages.

    python -m pacevggt_patch.mini.scenes.fetch_textures --out textures.zip

The packages are fetched with `apt-get download` and unpacked beside each other in a work folder; nothing is installed.
Their photographs are cut into squares of 256 pixels and written as JPEGs into one zip file, the same ones at each run
over the same package versions. The file is training input: it is not part of this project and not to be committed.
"""

from __future__ import annotations

import argparse
import io
import random
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import PaceError
from ...runtime.files import whole_file

SIDE = 256
JPEG_QUALITY = 72
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tga")
ARCHIVES = (".pk3", ".jar", ".zip")
# Maps of other surface properties than colour lie beside the colour maps, under the same name with one of these.
NOT_COLOUR = re.compile(
    "_(norm|nm|gloss|glow|bump|shirt|pants|sm|gm|pm|local|qei|luma|reflect|spec|height|mq|lq|alpha)$"
)
NOT_A_SURFACE = re.compile("env|sky|skies|font|gfx|levelshot|symbols|sfx|flag|logo|/common/")
LEAST_CONTRAST = 10.0  # standard deviation of grey values, of 255
LEAST_DETAIL = 2.0  # mean difference of neighbouring pixels, of 255


@dataclass(frozen=True)
class Source:
    """A package, how many squares to take from it at most, and how many from each picture."""

    package: str
    most: int
    squares_per_picture: int


SOURCES = (
    Source("gnome-backgrounds", 220, 40),
    Source("mate-backgrounds", 320, 30),
    Source("plasma-workspace-wallpapers", 350, 30),
    Source("ukui-wallpapers", 150, 30),
    Source("nexuiz-textures", 600, 1),
    Source("ufoai-textures", 520, 1),
    Source("openarena-081-textures", 260, 1),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="zip file to write")
    parser.add_argument("--work", type=Path, default=Path("texture-packages"), help="folder for the packages")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    count = 0
    with whole_file(args.out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for source in SOURCES:
            taken = 0
            for name, square in squares(source, unpack(source.package, args.work)):
                # A fixed date keeps the file the same from run to run.
                archive.writestr(zipfile.ZipInfo(f"{source.package}/{name}.jpg"), jpeg(square))
                taken += 1
            if not taken:
                raise PaceError(f"no picture found in the Debian package {source.package}")
            print(f"{source.package}: {taken} squares", flush=True)
            count += taken
    print(f"{args.out}: {count} squares, {args.out.stat().st_size / 2**20:.1f} MiB")
    return 0


def unpack(package: str, work: Path) -> Path:
    """The folder of an unpacked package, fetched if it is not there yet.

    Raises:
        PaceError: apt-get or dpkg fails; the message holds what it printed.
    """
    folder = work / package
    if folder.is_dir():
        return folder
    run(["apt-get", "download", package], work)
    archives = sorted(work.glob(f"{package}_*.deb"))
    run(["dpkg", "-x", archives[-1].name, package], work)
    return folder


def run(command: list[str], folder: Path) -> None:
    """Run a command in a folder; what it prints is shown only if it fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError as error:
        raise PaceError(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        raise PaceError(f"{' '.join(command)} failed: {done.stderr.strip()}")


def squares(source: Source, folder: Path) -> Iterator[tuple[str, Image.Image]]:
    """Names and `SIDE` x `SIDE` squares of a package, spread evenly over its pictures."""
    names = [name for name in picture_names(folder) if is_colour(name)]
    taken = 0
    # A fixed order in which neighbours, often variants of one texture, lie apart.
    for name in sorted(names, key=lambda name: zlib.crc32(name.encode())):
        if taken >= source.most:
            return
        try:
            picture = open_picture(folder, name)
        except (OSError, ValueError, SyntaxError):
            continue  # a few files of these packages are no pictures
        for index, square in enumerate(cut(picture, source.squares_per_picture, zlib.crc32(name.encode()))):
            if taken < source.most and is_detailed(square):
                yield f"{taken:04d}-{index}", square
                taken += 1


def picture_names(folder: Path) -> list[str]:
    """Paths of pictures below a folder; `archive!member` inside archives."""
    names = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.is_symlink():
            names.append(relative)
        elif path.suffix.lower() in ARCHIVES and path.is_file():
            with zipfile.ZipFile(path) as archive:
                inside = [name for name in archive.namelist() if name.lower().endswith(SUFFIXES)]
            names += [f"{relative}!{name}" for name in sorted(inside)]
    return names


def is_colour(name: str) -> bool:
    """Whether a path looks like a surface's colours, rather than its normals, its gloss or a sky."""
    name = name.lower()
    stem = name.rsplit("/", 1)[-1].split(".")[0]
    member = name.split("!")[-1]
    return not NOT_COLOUR.search(stem) and not ("!" in name and NOT_A_SURFACE.search(member))


def open_picture(folder: Path, name: str) -> Image.Image:
    """An RGB picture; transparency is dropped, since games hide masks in it."""
    path, _, member = name.partition("!")
    if not member:
        return Image.open(folder / path).convert("RGB")
    with zipfile.ZipFile(folder / path) as archive:
        return Image.open(io.BytesIO(archive.read(member))).convert("RGB")


def cut(picture: Image.Image, count: int, seed: int) -> Iterator[Image.Image]:
    """Squares of a picture: the central one if `count` is 1, else random ones from `SIDE` pixels to all of it."""
    width, height = picture.size
    side = min(width, height)
    if side < SIDE // 2:
        return
    generator = random.Random(seed)
    for _ in range(count):
        size = side if count == 1 else int(min(SIDE, side) * (side / min(SIDE, side)) ** generator.random())
        left = (width - size) // 2 if count == 1 else generator.randint(0, width - size)
        top = (height - size) // 2 if count == 1 else generator.randint(0, height - size)
        box = (left, top, left + size, top + size)
        yield picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def is_detailed(square: Image.Image) -> bool:
    """Whether there is anything to see on a square."""
    grey = np.asarray(square.convert("L"), dtype=np.float32)
    detail = np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()
    return bool(grey.std() >= LEAST_CONTRAST and detail / 2 >= LEAST_DETAIL)


def jpeg(square: Image.Image) -> bytes:
    """The square as a JPEG file."""
    buffer = io.BytesIO()
    square.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"fetch_textures: {error}")
