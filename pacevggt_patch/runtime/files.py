"""Files that people and scripts read: written whole or not at all, with the environment they came from."""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import PaceError
from ..version import __version__


@contextmanager
def whole_file(path: str | Path) -> Generator[Path]:
    """A temporary path beside `path` to write to; renamed to it when the block ends, deleted when it fails.

    A symbolic link stays, and what it leads to is written. A file that is there keeps its permissions.

    Raises:
        PaceError: a folder, a device or a pipe is there.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not target.is_file():
        raise PaceError(f"{path} is there and no plain file, so it can't be replaced by one")
    # The suffix stays last: writers choose the format by it.
    temporary = target.with_name(f".{secrets.token_hex(4)}.{target.name}")
    try:
        yield temporary
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON, whole or not at all. NaN and infinity are refused: they are not JSON."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def environment(device: str | torch.device) -> dict[str, Any]:
    """Hardware and versions that a measured figure depends on."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "pacevggt_patch": __version__,
    }


def cpu_name() -> str:
    """The processor's model name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
