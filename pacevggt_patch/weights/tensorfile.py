"""Safetensors files whose metadata is JSON: how every weight file of this package is read and written."""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Mapping
from os import PathLike
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from ..arguments import file_path
from ..errors import WeightsError
from ..runtime.files import whole_file

DIGEST = "digest"
ROW_SCALE = ".row_scale"  # appended to the name of a tensor in 8 bits
SMALLEST_SCALE = 2.0**-24  # above zero in float16
DTYPES = ("F32", "F16", "BF16", "I8")
# Far above what any model needs, and what lies below is read in a second.
LARGEST_FILE, LONGEST_HEADER, DEEPEST_JSON = 2**30, 2**20, 50


def write(
    path: str | PathLike[str], tensors: Mapping[str, Tensor], kind: str, version: int, fields: dict[str, Any]
):
    """Write a weight file at once or not at all.

    Args:
        path: the file; its folder must exist.
        tensors: finite tensors, written in the dtype they have.
        kind: what the file holds, in words; `read_metadata` asks for the same words.
        version: format version of that kind.
        fields: everything else that the file should say, as JSON values.

    Raises:
        WeightsError: no such folder, a tensor with NaN or infinity, a field that is not JSON, or a failed write.
    """
    path = file_path("path", path)
    if not path.parent.is_dir():
        what = "is not a folder" if path.parent.exists() else "does not exist, create it first"
        raise WeightsError(f"can't save {kind} to {path}: the folder {path.parent} {what}")
    _check_finite(path, tensors)
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        metadata = {
            name: json.dumps(value) for name, value in {"kind": kind, "format": version, **fields}.items()
        }
        for text in metadata.values():
            _json(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise WeightsError(f"can't save {kind} to {path}: its metadata is not JSON: {error}") from error
    metadata[DIGEST] = json.dumps(digest(metadata, whole))
    content = save(whole, metadata)
    if len(content) > LARGEST_FILE or int.from_bytes(content[:8], "little") > LONGEST_HEADER:
        raise WeightsError(f"can't save {kind} to {path}: it is too large to be read again")
    try:
        with whole_file(path) as temporary:
            temporary.write_bytes(content)
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"can't save {kind} to {path}: {getattr(error, 'strerror', None) or error}"
        ) from error


def read_metadata(path: str | PathLike[str], kind: str, newest: int, oldest: int = 1) -> dict[str, Any]:
    """Metadata of a weight file, without reading its tensors and so without a look at its digest.

    Args:
        path: the file.
        kind: what it should hold, in words.
        newest: the newest format version that this package knows.
        oldest: the oldest one.

    Raises:
        WeightsError: not a weight file of that kind, damaged, or of a format that this version does not know.
    """
    return WeightFile(path, kind).fields(newest, oldest)


def read_tensors(
    path: str | PathLike[str], kind: str, wanted: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """All tensors of a weight file that may be older than digests, see `WeightFile.read`.

    Names and shapes must be those of `wanted`, where it is given, and are compared before anything is read.
    """
    file = WeightFile(path, kind)
    if wanted is not None:
        check_tensors(path, file.layout(), wanted)
    return file.read(needs_digest=False)


class Part(NamedTuple):
    """What a header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


class WeightFile:
    """A weight file that is open: its header is known, its tensors are not read yet.

    Raises:
        WeightsError: not a safetensors file of a size that can be.
    """

    def __init__(self, path: str | PathLike[str], kind: str):
        self.path, self.kind = path, kind
        self._file = _open(path, kind)
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def fields(self, newest: int, oldest: int = 1) -> dict[str, Any]:
        """Metadata as JSON values, see `read_metadata`."""
        fields, damaged = {}, []
        for name, text in self.metadata.items():
            try:
                fields[name] = _json(text)
            except (ValueError, RecursionError) as error:
                damaged.append(f"{reprlib.repr(name)}: {error}")
        found, version = fields.get("kind"), fields.get("format")
        if found != self.kind or type(version) is not int:
            says = (
                f"it says it holds {found:.60}" if isinstance(found, str) else "its metadata does not say so"
            )
            raise WeightsError(f"{self.path} does not hold {self.kind}: {says}")
        if not oldest <= version <= newest:
            reads, cure = (
                f"up to {newest}",
                "take a newer checkout of pacevggt-patch and `pip install .` in it",
            )
            if version < oldest:
                reads, cure = f"{oldest} and later", "make the file anew with this version"
            raise WeightsError(
                f"{self.path} has format {reprlib.repr(version)}, this version of pacevggt-patch reads {reads}: {cure}"
            )
        if damaged:
            raise WeightsError(f"{self.path} has damaged metadata: {damaged[0]}")
        return fields

    def layout(self) -> dict[str, Part]:
        """The tensors that `read` gives, as the header tells of them.

        Raises:
            WeightsError: one has a dtype that is not written, or 8 bits and scales do not belong together.
        """
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
        parts = {name: Part(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        whole = {name: part for name, part in parts.items() if not name.endswith(ROW_SCALE)}
        for name, part in parts.items():
            of, scale = whole.get(name.removesuffix(ROW_SCALE)), parts.get(name + ROW_SCALE)
            problem = None
            if part.dtype not in DTYPES:
                problem = f"has the dtype {part.dtype}"
            elif of is None or (of is not part and of.dtype != "I8"):
                problem = "belongs to no tensor"
            elif part.dtype == "I8" and (len(part.shape) < 2 or scale != Part("F16", part.shape[:1])):
                problem = "has not one float16 scale for each row"
            if problem:
                raise WeightsError(f"{self.path} is damaged: {name:.99} {problem}")
        return whole

    def read(self, *, needs_digest: bool = True) -> dict[str, Tensor]:
        """All tensors as float32 on the CPU; those in 8 bits are expanded, see `in_8_bits`.

        They are copies: the file may change or vanish afterwards. Nothing is copied before all of it is checked.

        Raises:
            WeightsError: damaged, not what its digest says, without one, or a tensor with NaN or infinity.
        """
        layout = self.layout()
        raw = {name: self._file.get_tensor(name) for name in self._file.keys()}  # noqa: SIM118
        right = self.metadata.get(DIGEST) == json.dumps(digest(self.metadata, raw))
        if not right and (needs_digest or DIGEST in self.metadata):
            raise WeightsError(
                f"{self.path} is damaged: its content is not what its digest says, so get it anew"
            )
        _check_finite(self.path, raw)
        tensors = {name: raw[name].to(torch.float32, copy=True) for name in layout}
        for name in raw.keys() - tensors.keys():
            tensor = tensors[name.removesuffix(ROW_SCALE)]
            tensor *= raw[name].float().view(-1, *[1] * (tensor.ndim - 1))
        return tensors


def in_8_bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors for `write` in half the size of float16: matrices as int8, with a float16 scale for each row.

    A row is all but the first dimension, flattened: most often what makes one output channel. Vectors, and what is one
    row only, become float16.
    `WeightFile.read` undoes it, up to rounding.
    """
    result = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or len(tensor) == 1:
            result[name] = tensor.half()
            continue
        rows = tensor.float().flatten(1)
        scale = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=SMALLEST_SCALE).half()  # [rows, 1]
        whole = (rows / scale.float()).round().clamp(-127, 127)
        result[name] = whole.to(torch.int8).view(tensor.shape)
        result[name + ROW_SCALE] = scale[:, 0]
    return result


def digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over metadata, but for the digest in it, and over names, dtypes, shapes and bytes of tensors."""
    total = hashlib.sha256()
    for name in sorted(metadata.keys() - {DIGEST}):
        total.update(f"{name}={metadata[name]};".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _json(text: str) -> Any:
    """A JSON value; ValueError or RecursionError where it is none, or one so deep that code may trip over it."""
    value = json.loads(text)
    if _depth(value) > DEEPEST_JSON:
        raise ValueError(f"JSON more than {DEEPEST_JSON} deep")
    return value


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def check_tensors(
    path: str | PathLike[str], tensors: Mapping[str, Tensor | Part], wanted: Mapping[str, Tensor]
):
    """Check names and shapes of tensors, or of a layout, against those of `wanted` (which may be on the meta device).

    Raises:
        WeightsError: names what is missing, unknown, or of another shape.
    """
    problems = [f"{name:.99} is missing" for name in wanted if name not in tensors]
    problems += [f"{name:.99} is unknown" for name in tensors if name not in wanted]
    problems += [
        f"{name:.99} is {list(tensors[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise WeightsError(f"{path} has the wrong tensors: {', '.join(problems[:4])}{more}")


def _check_finite(path: str | PathLike[str], tensors: Mapping[str, Tensor]):
    # The extremes are NaN where any value is, and take no memory.
    broken = [n for n, t in tensors.items() if t.numel() and not torch.stack(t.aminmax()).isfinite().all()]
    if broken:
        raise WeightsError(f"{path}: NaN or infinity in {', '.join(broken[:4])}")


def _open(path: str | PathLike[str], kind: str) -> Any:
    if not os.path.exists(path):
        raise WeightsError(f"{path} does not exist")
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        what = "a folder" if os.path.isdir(path) else "no plain file"
        raise WeightsError(f"{path} is {what}: pass the file with the {kind} in it")
    try:
        if os.path.getsize(path) > LARGEST_FILE:
            raise WeightsError(f"{path} is larger than {LARGEST_FILE:,d} bytes, so it does not hold {kind}")
        with open(path, "rb") as file:
            if int.from_bytes(file.read(8), "little") > LONGEST_HEADER:
                raise safetensors.SafetensorError("its header is too long")
        return safetensors.safe_open(path, framework="pt")
    except OSError as error:
        raise WeightsError(f"{path} can't be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path} is not a safetensors file, or is damaged: {error}") from error
