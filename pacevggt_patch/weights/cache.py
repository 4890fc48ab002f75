"""Calibrations that were made on the fly, kept on this machine by the fingerprint of the model.

The folder is `$PACEVGGT_CACHE`, else `pacevggt` in `$XDG_CACHE_HOME` or `~/.cache`. `PACEVGGT_CACHE=off` keeps nothing.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ..errors import PaceError
from ..hosts.base import Host
from .pace import PaceWeights, read

VARIABLE = "PACEVGGT_CACHE"
PATTERN = "heads-*.safetensors"


def folder() -> Path | None:
    """Where calibrations are kept, or None where they are not."""
    chosen = os.environ.get(VARIABLE, "")
    if chosen.lower() in ("off", "0", "none"):
        return None
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        if chosen:
            return Path(chosen).expanduser()
        return (Path(base) if base else Path.home() / ".cache") / "pacevggt"
    except RuntimeError:  # nobody's home
        return None


def entries() -> list[Path]:
    """The files that are kept."""
    where = folder()
    return [] if where is None or not where.is_dir() else sorted(where.glob(PATTERN))


def store(weights: PaceWeights) -> Path | None:
    """Keep a calibration; returns its file, or None where nothing is kept or the folder can't be written.

    Files are written whole or not at all, so that two processes that calibrate one model do not meet.
    """
    where = folder()
    if where is None:
        return None
    dtype = "float32" if "float32" in weights.fingerprints else min(weights.fingerprints)
    path = where / f"heads-{dtype}-{weights.fingerprints[dtype][:16]}.safetensors"
    try:
        where.mkdir(parents=True, exist_ok=True)
        weights.save(path)
    except (OSError, PaceError):
        return None
    return path


def find(host: Host) -> PaceWeights | None:
    """The calibration that is kept for this model, or None. A file that can't be read counts as none."""
    for path in entries():
        with suppress(PaceError):
            return read(path, f"calibration kept in {path}", host)
    return None


def clear() -> int:
    """Delete all that is kept; returns how many files there were."""
    found = entries()
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)
