"""Weight files that come with the package."""

from __future__ import annotations

from pathlib import Path


def bundled_files(pattern: str) -> list[Path]:
    """Bundled weight files whose name matches a glob pattern, sorted by name.

    A wheel holds the checkout's `weights` folder as `_weights`; a checkout and an editable installation have it
    beside the package.
    """
    package = Path(__file__).resolve().parent.parent
    folder = package / "_weights"
    if not folder.is_dir():
        folder = package.parent / "weights"
    return sorted(folder.glob(pattern))
