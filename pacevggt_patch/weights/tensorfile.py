"""Safetensors files whose metadata is JSON: how every weight file of this package is read and written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import WeightsError
from ..runtime.files import whole_file

DIGEST = "digest"
ROW_SCALE = ".row_scale"  # appended to the name of a tensor in 8 bits
SMALLEST_SCALE = 2.0**-24  # above zero in float16


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
    path = Path(path).expanduser()
    if not path.parent.is_dir():
        raise WeightsError(
            f"can't save {kind} to {path}: the folder {path.parent} does not exist, create it first"
        )
    _check_finite(path, tensors)
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        metadata = {
            name: json.dumps(value) for name, value in {"kind": kind, "format": version, **fields}.items()
        }
    except (TypeError, ValueError) as error:
        raise WeightsError(f"can't save {kind} to {path}: its metadata is not JSON: {error}") from error
    metadata[DIGEST] = json.dumps(digest(metadata, whole))
    content = save(whole, metadata)
    try:
        with whole_file(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise WeightsError(f"can't save {kind} to {path}: {error}") from error


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
    with _open(path, kind) as file:
        raw = file.metadata() or {}
    return _fields(path, raw, kind, newest, oldest)


def read(path: str | PathLike[str], kind: str, version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a weight file of one format, which has a digest.

    Args:
        path: the file.
        kind: what it should hold, in words.
        version: its format version.

    Returns:
        What `read_metadata` and `read_tensors` return.

    Raises:
        WeightsError: as they do, or there is no digest.
    """
    with _open(path, kind) as file:
        metadata = file.metadata() or {}
        fields = _fields(path, metadata, kind, version, version)
        raw = _raw(path, file)
    _check_digest(path, metadata, raw)
    return fields, _expanded(path, raw)


def _fields(
    path: str | PathLike[str], raw: Mapping[str, str], kind: str, newest: int, oldest: int
) -> dict[str, Any]:
    try:
        fields = {name: json.loads(text) for name, text in raw.items()}
    except ValueError:
        fields = {}
    found, version = fields.get("kind"), fields.get("format")
    if found != kind or type(version) is not int:
        what = f"it says it holds {found}" if isinstance(found, str) else "its metadata does not say so"
        raise WeightsError(f"{path} does not hold {kind}: {what}")
    if version > newest:
        raise WeightsError(
            f"{path} has format {version}, this version of pacevggt-patch reads up to {newest}: "
            "upgrade with `pip install -U pacevggt-patch`"
        )
    if version < oldest:
        raise WeightsError(
            f"{path} has format {version}, this version of pacevggt-patch reads {oldest} and later: "
            "make the file anew with this version"
        )
    return fields


def in_8_bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors for `write` in half the size of float16: matrices as int8, with a float16 scale for each row.

    A row is all but the first dimension, flattened: most often what makes one output channel. Vectors, and what is one
    row only, become float16.
    `read_tensors` undoes it, up to rounding.
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
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def read_tensors(path: str | PathLike[str], kind: str) -> dict[str, Tensor]:
    """All tensors of a weight file, as float32 on the CPU; those in 8 bits are expanded, see `in_8_bits`.

    They are copies: the file may change or vanish afterwards.

    Raises:
        WeightsError: not a safetensors file, damaged, not what its digest says, or a tensor with NaN or infinity.
    """
    with _open(path, kind) as file:
        metadata, raw = file.metadata() or {}, _raw(path, file)
    if DIGEST in metadata:
        _check_digest(path, metadata, raw)
    return _expanded(path, raw)


def _raw(path: str | PathLike[str], file: Any) -> dict[str, Tensor]:
    """The tensors of an open file as they are written."""
    try:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (safetensors.SafetensorError, RuntimeError, AttributeError, TypeError) as error:
        raise WeightsError(f"{path} is damaged, or has tensors of a kind unknown here: {error}") from error


def _check_digest(path: str | PathLike[str], metadata: Mapping[str, str], raw: Mapping[str, Tensor]) -> None:
    if metadata.get(DIGEST) != json.dumps(digest(metadata, raw)):
        raise WeightsError(f"{path} is damaged: its content is not what its digest says, so get it anew")


def _expanded(path: str | PathLike[str], raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in float32, those in 8 bits expanded, see `in_8_bits`."""
    tensors = {name: tensor.to(torch.float32, copy=True) for name, tensor in raw.items()}
    _check_finite(path, tensors)
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith(ROW_SCALE)}
    for name, scale in scales.items():
        tensor = tensors.get(name.removesuffix(ROW_SCALE))
        if tensor is None or len(tensor) != len(scale):
            raise WeightsError(f"{path} is damaged: {name} belongs to no tensor")
        tensor *= scale.view(-1, *[1] * (tensor.ndim - 1))
    return tensors


def check_tensors(path: str | PathLike[str], tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]):
    """Check names and shapes against those of `wanted` (which may be on the meta device).

    Raises:
        WeightsError: names what is missing, unknown, or of another shape.
    """
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in wanted]
    problems += [
        f"{name} is {list(tensors[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise WeightsError(f"{path} has the wrong tensors: {', '.join(problems[:4])}{more}")


def _check_finite(path: str | PathLike[str], tensors: Mapping[str, Tensor]):
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise WeightsError(f"{path}: NaN or infinity in {', '.join(broken[:4])}")


def _open(path: str | PathLike[str], kind: str) -> Any:
    if not os.path.exists(path):
        raise WeightsError(f"{path} does not exist")
    if os.path.isdir(path):
        raise WeightsError(f"{path} is a folder: pass the file with the {kind} in it")
    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a safetensors file, or is damaged: {error}") from error
