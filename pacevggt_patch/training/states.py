"""States of runs on the disk, to go on from."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PaceError, first_line
from ..runtime.files import whole_file

STATE_FILE = "state.pt"


@contextmanager
def writing(path: Path) -> Generator[None]:
    """An error of the disk inside the `with` block becomes a PaceError that names the file."""
    try:
        yield
    except OSError as error:
        raise PaceError(f"{path} can't be written: {error.strerror or error}") from error


@contextmanager
def result_file(path: Path) -> Generator[Path]:
    """A `whole_file`; an error of the disk becomes a PaceError that names the file."""
    with writing(path), whole_file(path) as temporary:
        yield temporary


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write a state, whole or not at all.

    Raises:
        PaceError: it can't be written; an older one is still there.
    """
    content = io.BytesIO()  # writing to the disk itself, torch would not tell why it can't
    torch.save(state, content)
    with result_file(path) as temporary:
        temporary.write_bytes(content.getbuffer())


@contextmanager
def loaded_state(path: Path, device: torch.device) -> Generator[dict[str, Any]]:
    """A state, to be taken over inside the `with` block.

    Raises:
        PaceError: it is damaged, holds NaN or infinity, or what takes it over refuses it.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if not all(tensor.isfinite().all() for tensor in tensors(state)):
            raise ValueError("NaN or infinity in it")
        yield state
    except PaceError as error:
        raise PaceError(f"{path}: {error}") from error
    except Exception as error:  # in how many ways files can be damaged nobody knows
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise PaceError(f"{path} is damaged, start anew with another --out ({reason})") from error


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in dictionaries and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors(inner)


def remove_leftovers(folder: Path, names: Collection[str]) -> None:
    """Remove what killed runs left of files with these names: the temporary ones of `whole_file`."""
    for path in folder.iterdir():
        if re.fullmatch(r"\.[0-9a-f]{8}\.", path.name[:10]) and path.name[10:] in names:
            path.unlink(missing_ok=True)


def results_folder(folder: Path, names: Collection[str] = ()) -> None:
    """Make a folder for results, without what killed runs left there of files with these names.

    Raises:
        PaceError: it can't be made or looked through.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if names:
            remove_leftovers(folder, names)
    except OSError as error:
        raise PaceError(f"{folder} can't be made a folder for the results: {error.strerror}") from error
