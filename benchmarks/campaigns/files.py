"""Weight files, clips and pictures that are broken or meant badly, and a Hub that answers wrongly."""

from __future__ import annotations

import io
import json
import os
import random
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from hosts import random_deltas, tiny_vggt
from hub import Hub, close_session
from mutations import cost, mutations
from PIL import Image

from pacevggt_patch import PaceError, PaceWeights
from pacevggt_patch.clips import Clip, load_clip
from pacevggt_patch.method.block_deltas import BlockDeltas
from pacevggt_patch.mini.scenes.textures import load_photographs
from pacevggt_patch.training.sources import FolderSource

from . import Trial, campaign

MOST_SECONDS, MOST_BYTES = 10.0, 2**30  # for a picture
SLACK_BYTES, SLACK_SECONDS = 2**24, 2.0  # for a weight file, beside twice its size


@campaign(
    "no weight file that differs from a right one is read, and none takes 2 s or more than twice its size"
)
def weight_files(quick: bool) -> Iterator[Trial]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "pace.safetensors"
        for mode in ("global", "pre-aa"):
            weights = random_deltas(tiny_vggt(), mode=mode)
            if mode == "global":
                weights.full_heads = ((1, 0), (2, 1))
            if quick and weights.block_deltas is not None:
                some = dict(list(weights.block_deltas.shapes().items())[:4])
                weights.block_deltas = BlockDeltas(some, rank=2)
            weights.save(path, eight_bits=True)
            for number, (name, content) in enumerate(list(mutations(path.read_bytes()))):
                if number % 4:
                    continue
                path.write_bytes(content)
                yield read_weights(f"{mode}: {name}", path)


def read_weights(name: str, path: Path) -> Trial:
    problem: list[str] = []

    def read() -> None:
        try:
            PaceWeights.load(path)
            problem.append("is read")
        except PaceError:
            pass
        except Exception as error:
            problem.append(f"{type(error).__name__}: {error}"[:200])

    seconds, size = cost(read)
    if seconds > SLACK_SECONDS or size > 2 * path.stat().st_size + SLACK_BYTES:
        problem.append(f"takes {seconds:.1f} s and {size / 2**20:.0f} MiB")
    return Trial(name, problem[0] if problem else None, refused=not problem)


# ---- pictures


def picture(size: tuple[int, int] = (70, 56), mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise in a mode of Pillow's."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        return Image.fromarray((values[..., 0].astype(np.float64) * 257).astype(kind))
    return Image.fromarray(values, "RGBA").convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_tag(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


KINDS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP"}
MODES = {
    "JPEG": ["RGB", "L", "CMYK"], "PNG": ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"], "WEBP": ["RGB", "RGBA"],
    "TIFF": ["RGB", "L", "CMYK", "I;16", "I", "F", "1"], "BMP": ["RGB", "L", "P", "1"],
}  # fmt: skip


def pictures() -> Iterator[tuple[str, Callable[[Path], object]]]:
    """What is put into a folder of three good pictures, as a fourth."""
    for suffix, kind in KINDS.items():
        good = encoded(picture(), kind)
        for mode in MODES[kind]:
            yield f"{kind} in {mode}", writing(f"b.{suffix}", encoded(picture(mode=mode), kind))
        if kind != "BMP":
            for turn in (3, 6, 8, 77):
                size = (56, 70) if turn in (6, 8) else (70, 56)
                turned = encoded(picture(size), kind, exif=with_tag(turn))
                yield f"{kind} turned {turn}", writing(f"b.{suffix}", turned)
        for cut in (0, 1, 10, len(good) // 3, len(good) - 30, len(good) - 1):
            yield f"{kind} cut to {cut}", writing(f"b.{suffix}", good[:cut])
        numbers = random.Random(0)
        for number in range(4):
            broken = bytearray(good)
            for _ in range(20):
                broken[numbers.randrange(len(broken))] = numbers.randrange(256)
            yield f"{kind} with bytes changed {number}", writing(f"b.{suffix}", bytes(broken))
        yield f"garbage called {suffix}", writing(f"b.{suffix}", bytes(range(256)) * 8)
        yield f"a folder called b.{suffix}", lambda folder, suffix=suffix: (folder / f"b.{suffix}").mkdir()
        yield f"a broken link called b.{suffix}", linking(f"b.{suffix}", "nowhere.png")
        yield f"a link to itself called b.{suffix}", linking(f"b.{suffix}", f"b.{suffix}")
        yield f"a pipe called b.{suffix}", lambda folder, suffix=suffix: os.mkfifo(folder / f"b.{suffix}")
        for size in ((1, 16_000), (16_000, 1), (1, 1)):
            yield f"{kind} of {size[0]}x{size[1]}", writing(f"b.{suffix}", encoded(picture(size), kind))
    yield "a row of a million", writing("b.png", encoded(Image.new("L", (1_000_000, 1)), "PNG"))
    yield "a column of a million", writing("b.png", encoded(Image.new("L", (1, 1_000_000)), "PNG"))
    yield "a bomb of 600 million pixels", writing("b.png", encoded(Image.new("1", (30_000, 20_000)), "PNG"))
    yield "20 x 60000", writing("b.png", encoded(Image.new("RGB", (20, 60_000)), "PNG"))
    for name in [
        "b.heic",
        "b.avif",
        "b.jfif",
        "b.JPG",
        "._a.jpg",
        ".hidden.png",
        "Thumbs.db",
        "b.txt",
        "ü.png",
        "b.gif",
    ]:
        yield f"a file called {name}", writing(name, encoded(picture(), "JPEG"))
    yield "PostScript called b.jpg", writing("b.jpg", b"%!PS-Adobe-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    more = {"save_all": True, "append_images": [picture(seed=1)] * 3}
    yield "an animation", writing("b.webp", encoded(picture(), "WEBP", **more))
    yield "pages", writing("b.tif", encoded(picture(), "TIFF", **more))
    yield "no rights", forbidding
    for name in ("__MACOSX", ".thumbnails", "deep/deeper"):
        yield f"pictures in {name}", writing(f"{name}/a.jpg", b"none")


def writing(name: str, content: bytes) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return write


def linking(name: str, target: str) -> Callable[[Path], object]:
    return lambda folder: os.symlink(target, folder / name)


def forbidding(folder: Path) -> None:
    writing("b.png", encoded(picture(), "PNG"))(folder)
    (folder / "b.png").chmod(0)


def right_clip(clip: Clip) -> str | None:
    """What is wrong with a clip that was read, or None."""
    images = clip.images
    if images.dtype != torch.float32 or images.ndim != 4 or images.shape[1] != 3:
        return f"images {list(images.shape)} in {images.dtype}"
    if not bool(images.isfinite().all()) or float(images.min()) < 0 or float(images.max()) > 1:
        return "values out of [0, 1]"
    return None


def bounded(name: str, call: Callable[[], str | None], good: bool = False) -> Trial:
    """A trial in which files are read, or refused in a sentence, in little time and memory."""
    import warnings

    tracemalloc.start()
    start, refused = time.perf_counter(), False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            problem = call()
    except PaceError as error:
        text, refused = str(error), True
        problem = f"says {text[:80]!r}" if "\n" in text or len(text) > 600 else None
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"[:200]
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if seconds > MOST_SECONDS or peak > MOST_BYTES:
        problem = problem or f"takes {seconds:.0f} s and {peak / 2**20:.0f} MiB"
    return Trial(name, problem, refused, good)


def by_load_clip(folder: Path, mode: Any) -> str | None:
    return right_clip(load_clip(folder, width=70, mode=mode))


def by_training(folder: Path) -> str | None:
    source = FolderSource(folder, 2, 70, "square")
    return right_clip(source.draw(0, 1, 2)[0])


def by_textures(path: Path) -> str | None:
    found = load_photographs(path, 16)
    return None if found.shape[1:] == (3, 16, 16) and found.dtype == torch.uint8 else f"{list(found.shape)}"


def is_good(name: str) -> bool:
    """Whether nothing is wrong with a picture, so that it must be read."""
    kind, *words = name.split()
    unknown = words[:1] == ["in"] and words[1] in ("I", "F")  # greys of an unknown range
    return kind in KINDS.values() and words[0] in ("in", "turned") and not unknown


@campaign(
    "every picture is read as a person sees it, left out by name, or refused by name, in bounded time and memory"
)
def hostile_pictures(quick: bool) -> Iterator[Trial]:
    for number, (name, make) in enumerate(pictures()):
        if quick and number % 5:
            continue
        with TemporaryDirectory() as place:
            folder = Path(place)
            for letter in "acd":
                writing(f"{letter}.png", encoded(picture(seed=ord(letter)), "PNG"))(folder)
            make(folder)
            ways: dict[str, Callable[[], str | None]] = {
                "crop": partial(by_load_clip, folder, "crop"), "square": partial(by_load_clip, folder, "square"),
                "training": partial(by_training, folder), "textures": partial(by_textures, folder),
            }  # fmt: skip
            for way, call in ways.items():
                yield bounded(f"{name}, {way}", call, good=is_good(name))
            archive = folder.parent / f"{folder.name}.zip"
            with zipfile.ZipFile(archive, "w") as file:
                for path in sorted(p for p in folder.rglob("*") if p.is_file() and os.access(p, os.R_OK)):
                    file.write(path, path.relative_to(folder).as_posix())
            yield bounded(f"{name}, textures in an archive", partial(by_textures, archive))
            archive.unlink()


# ---- descriptions of clips


DEEP = "[" * 100_000 + "]" * 100_000
WRONG = [
    "null", "true", "[]", "{}", '"1"', "-1", "1.5", "NaN", "1e999", "1" + "0" * 400, DEEP, '"/etc/passwd"',
    '"../a.png"',
]  # fmt: skip


def descriptions() -> Iterator[tuple[str, str]]:
    """Texts of a `clip.json`, one thing in each of them wrong."""
    pose = [[1.0, 0, 0, 0.1], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]]
    good: dict[str, Any] = {
        "name": "clip", "width": 70, "height": 56, "intrinsics": {"fx": 60.0, "fy": 60.0, "cx": 35.0, "cy": 28.0},
        "pose_unit": "metres",
        "frames": [{"file": f"{letter}.png", "depth": f"{letter}-depth.png", "cam_to_world": pose} for letter in "acd"],
    }  # fmt: skip
    yield "right", json.dumps(good)
    places: list[tuple] = [
        ("name",), ("width",), ("height",), ("intrinsics",), ("intrinsics", "fx"), ("intrinsics", "cx"), ("pose_unit",),
        ("frames",), ("frames", 0), ("frames", 1, "file"), ("frames", 1, "depth"), ("frames", 1, "cam_to_world"),
        ("frames", 1, "cam_to_world", 0), ("frames", 1, "cam_to_world", 0, 3), ("frames", 1, "cam_to_world", 2, 2),
    ]  # fmt: skip
    mark = "<here>"
    for place in places:
        changed = json.loads(json.dumps(good))
        owner = changed
        for step in place[:-1]:
            owner = owner[step]
        owner[place[-1]] = mark
        text = json.dumps(changed)
        for wrong in WRONG:
            yield f"{'.'.join(map(str, place))} is {wrong[:20]}", text.replace(f'"{mark}"', wrong)
        del owner[place[-1]]
        yield f"without {'.'.join(map(str, place))}", json.dumps(changed)
    whole = json.dumps(good)
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        yield f"cut to {cut}", whole[:cut]
    for text in ("[]", "null", DEEP, '{"a":' * 50_000, "\x00", "\ufeff" + whole):
        yield f"the text {text[:10]!r}", text


@campaign(
    "a clip.json with something wrong in it is refused with the field named, or read where the field may be so"
)
def descriptions_of_clips(quick: bool) -> Iterator[Trial]:
    with TemporaryDirectory() as place:
        folder = Path(place)
        for letter in "acd":
            writing(f"{letter}.png", encoded(picture(seed=ord(letter)), "PNG"))(folder)
            writing(f"{letter}-depth.png", encoded(picture(mode="I;16", seed=1), "PNG"))(folder)
        for number, (name, text) in enumerate(descriptions()):
            if quick and number % 4:
                continue
            (folder / "clip.json").write_text(text, encoding="utf-8")
            yield bounded(name, partial(by_load_clip, folder, "crop"), good=name == "right")


# ---- the Hub


def answers() -> dict[str, Callable[[Hub], object]]:
    """Ways in which a Hub goes wrong."""

    def status(code: int) -> Callable[[Hub], object]:
        return lambda hub: setattr(hub, "failure", (code, "on purpose"))

    def delivers(change: Callable[[bytes], bytes]) -> Callable[[Hub], object]:
        return lambda hub: setattr(hub, "delivery", change)

    found = {
        f"HTTP status {code}": status(code) for code in (400, 401, 403, 404, 418, 429, 500, 502, 503, 504)
    }
    found["one bit is wrong"] = delivers(
        lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    )
    found["a page instead"] = delivers(lambda content: b"<html>" + b" " * (len(content) - 6))
    found["nothing"] = delivers(lambda content: b"")
    found["half of it"] = delivers(lambda content: content[: len(content) // 2])
    found["the connection breaks off"] = lambda hub: hub.breaks.extend([10] * 20)
    found["nobody listens"] = lambda hub: hub.stop()
    return found


@campaign("a Hub that answers wrongly gives an error in plain words and no weights; the next try works")
def hub_faults(quick: bool) -> Iterator[Trial]:
    import pytest

    weights, everything = random_deltas(tiny_vggt()), answers()
    for name, spoil in everything.items():
        if quick and name not in list(everything)[::3]:
            continue
        hub = Hub()
        with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, hub.serving():
            path = Path(folder) / "pace.safetensors"
            weights.save(path)
            hub.repository("user/pace").commit({"pace.safetensors": path.read_bytes()})
            hub.lead_here(patch, Path(folder) / "cache")
            spoil(hub)
            trial = bounded(name, lambda: "weights all the same" if PaceWeights.load("user/pace") else None)
            if trial.problem is None and name != "nobody listens":
                hub.failure, hub.answer, hub.delivery = None, None, bytes
                hub.breaks.clear()
                again = bounded(name, lambda: None if PaceWeights.load("user/pace") else "nothing")
                problem = "not even the next try works" if again.refused or again.problem else None
                trial = Trial(name, problem, trial.refused)
            yield trial
        close_session()
