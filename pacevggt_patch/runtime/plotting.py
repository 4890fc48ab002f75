"""Pictures by matplotlib, written to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import PaceError
from .files import whole_file


def load_pyplot() -> Any:
    """matplotlib's pyplot, drawing to files.

    Raises:
        PaceError: there is no matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise PaceError("pictures need matplotlib: pip install 'pacevggt-patch[demo]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all, and close it."""
    from matplotlib import pyplot

    try:
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=110)
    finally:
        pyplot.close(figure)
