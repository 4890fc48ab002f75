"""Weight files that must be refused, made from one that is right: each differs from it in one thing.

Where an edit could be told by the digest alone, the digest is made anew, so that what refuses it is another check.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load

from pacevggt_patch.weights.tensorfile import DIGEST, digest

BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
}
BYTES |= {"U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}
FLOATS = {"F16", "BF16", "F32"}
DEEP = "[" * 100_000 + "]" * 100_000
HUGE = "1" + "0" * 400


def cost(call: Callable[[], object]) -> tuple[float, int]:
    """Seconds of the processor, and bytes of memory at the peak above those before; 0 where the system tells none."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kilobytes(name: str) -> int:
        lines = status.read_text().splitlines() if reset.exists() else [f"{name}: 0 kB"]
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

    if reset.exists():
        reset.write_text("5")  # the peak begins anew
    before, began = kilobytes("VmRSS"), time.process_time()
    call()
    return time.process_time() - began, 1024 * (kilobytes("VmHWM") - before)


class File:
    """A safetensors file taken apart: metadata, and dtype, shape and bytes of each tensor."""

    def __init__(self, content: bytes):
        length = int.from_bytes(content[:8], "little")
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        self.metadata: dict[str, str] = header.pop("__metadata__")
        self.tensors: dict[str, tuple[str, list[int], bytes]] = {
            name: (part["dtype"], part["shape"], data[slice(*part["data_offsets"])])
            for name, part in header.items()
        }

    def content(self, sign: bool = True) -> bytes:
        """The bytes of the file, with a digest that is right."""
        if sign:
            # What safetensors does not read has none.
            with suppress(safetensors.SafetensorError, KeyError, AttributeError, TypeError, RuntimeError):
                self.metadata[DIGEST] = json.dumps(digest(self.metadata, load(self.content(False))))
        header: dict[str, Any] = {"__metadata__": self.metadata}
        position = 0
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
            position += len(data)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in self.tensors.values())


def mutations(content: bytes, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each mutation of a pace weight file with tensors in 8 bits."""
    yield from damaged(content, random.Random(seed))
    for name, change in [*of_tensors(File(content)), *of_metadata(File(content))]:
        file = File(content)
        change(file)
        yield name, file.content()
    for name in (DIGEST, "kind", "format"):
        file = File(content)
        del file.metadata[name]
        yield f"without {name}", file.content(sign=name != DIGEST)


def damaged(content: bytes, generator: random.Random, flips: int = 120) -> Iterator[tuple[str, bytes]]:
    """Bits that flipped, ends that are missing, and wrong lengths."""
    length = int.from_bytes(content[:8], "little")
    parts = ((0, 8), (8, 8 + length), (8 + length, len(content)))
    for i in range(flips):
        position, bit = generator.randrange(*parts[i % 3]), generator.randrange(8)
        flipped = bytearray(content)
        flipped[position] ^= 1 << bit
        yield f"bit {bit} of byte {position}", bytes(flipped)
    for size in [
        0,
        1,
        7,
        8,
        9,
        8 + length,
        len(content) - 1,
        *(generator.randrange(len(content)) for _ in range(12)),
    ]:
        yield f"cut to {size}", content[:size]
    yield "a byte more", content + b"\0"
    for number in (0, 1, length - 1, length + 1, len(content), 10**8, 2**31, 2**60, 2**64 - 1):
        yield f"header of {number}", number.to_bytes(8, "little") + content[8:]


def of_tensors(file: File) -> Iterator[tuple[str, Callable[[File], object]]]:
    """Tensors of another dtype or shape, those that are missing, and those that nobody knows."""
    for name, (dtype, shape, data) in file.tensors.items():
        count = len(data) // BYTES[dtype]
        scaled = name.endswith(".row_scale") or dtype == "I8"
        for other, size in BYTES.items():
            if other != dtype and (scaled or other not in FLOATS):
                yield f"{name} as {other}", setting(name, other, shape, bytes(count * size))
        shapes = [
            [*shape, 1],
            [count + 1],
            [0],
            [1, *shape],
            *([[count], shape[::-1]] if len(shape) > 1 else []),
        ]
        for other in shapes:
            if other != shape:
                size = BYTES[dtype] * (count if 0 not in other else 0) + BYTES[dtype] * (other == [count + 1])
                yield f"{name} with shape {other}", setting(name, dtype, other, bytes(size))
        yield f"without {name}", lambda file, name=name: file.tensors.pop(name)
        if dtype != "I8":
            yield (
                f"{name}.row_scale",
                setting(f"{name}.row_scale", "F16", shape[:1], bytes(2 * (shape or [1])[0])),
            )
    yield "an unknown tensor that is empty", setting("unknown", "F32", [0, 2**63], b"")
    yield "an unknown tensor", setting("unknown", "F32", [1], bytes(4))
    yield "no tensors", lambda file: file.tensors.clear()
    for value in (b"\x00\x7c", b"\x00\x7e"):
        name = next(name for name, (dtype, _, _) in file.tensors.items() if dtype == "F16")
        dtype, shape, data = file.tensors[name]
        yield f"{name} with {value.hex()}", setting(name, dtype, shape, value + data[2:])


def setting(name: str, dtype: str, shape: list[int], data: bytes) -> Callable[[File], object]:
    return lambda file: file.tensors.update({name: (dtype, shape, data)})


def of_metadata(file: File) -> Iterator[tuple[str, Callable[[File], object]]]:
    """Fields that are missing, of another type, huge or deep."""
    values = {name: json.loads(text) for name, text in file.metadata.items() if name != DIGEST}
    for name in values:
        for what, text in {"deep": DEEP, "no JSON": "{", "empty": "", "51 deep": "[" * 51 + "]" * 51}.items():
            yield f"{name} {what}", lambda file, name=name, text=text: file.metadata.update({name: text})
    for path, value in paths(values):
        for wrong in wrong_values(value):
            yield f"{'.'.join(path)} {wrong[:40]}", replacing(values, path, wrong)
    several = {
        ("backbone", "cached_layers"): ["[0, 0]", str(list(range(100_000)))],
        ("keep_ratios",): ["[0]", "[NaN]", "[1.5]", "[true]", '["most"]'],
        ("full_heads",): ["[[1, 0], [1, 0]]", "[1]", "[[1]]", "[[1, 0, 0]]", "[[-1, 0]]", "[[1.0, 0]]"],
        ("fingerprints",): ["{}", '{"float32": null}', '{"float32": 5}'],
        ("modules",): ["{}", '{"tracker": {"hidden_dim": 3}}'],
        ("modules", "block_deltas", "shapes"): [
            json.dumps({f"global_blocks.{i}.bias": [1] for i in range(20_000)}),
            '{"": [1]}',
            '{"global_blocks.0.attn.proj.bias": []}',
            '{"global_blocks.0.attn.proj.weight": [1, 2, 3]}',
            '{"training": [32]}',
        ],
        ("mode",): ['"dense"'],
        ("format",): ["99", "-1"],
        ("kind",): ['"a VGGT-mini checkpoint"'],
    }
    for path, texts in several.items():
        for text in texts:
            yield f"{'.'.join(path)} {text[:40]}", replacing(values, path, text)


def paths(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All places in metadata, but for those in the notes on training."""
    for name, inner in value.items():
        yield (*path, name), inner
        if isinstance(inner, dict) and name != "training":
            yield from paths(inner, (*path, name))


def wrong_values(value: Any) -> list[str]:
    """JSON that can't stand for a value."""
    texts = ["null", "true", "[[]]", '{"a": {"b": []}}', "-1", "1e999", HUGE]
    if not isinstance(value, str):
        texts += ['"text"', "1000000000", "-1.5"]
    if isinstance(value, str):
        texts += [r'"\ud800"', r'"two\nlines"', "0.5"]
    return [text for text in texts if not (isinstance(value, dict) and text.startswith("{"))]


def replacing(values: dict[str, Any], path: tuple[str, ...], text: str) -> Callable[[File], object]:
    """Put JSON at a place in the metadata. As text: JSON of numbers that Python writes otherwise."""

    def change(file: File) -> None:
        copy = json.loads(json.dumps(values[path[0]]))
        if len(path) == 1:
            file.metadata[path[0]] = text
            return
        inner = copy
        for name in path[1:-1]:
            inner = inner[name]
        inner[path[-1]] = "(here)"
        file.metadata[path[0]] = json.dumps(copy).replace('"(here)"', text)

    return change
