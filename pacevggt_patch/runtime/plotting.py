"""Pictures by matplotlib, written to files."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ..errors import PaceError
from .files import whole_file


def install_hint(extra: str = "") -> str:
    """How to install this package with one of its extras; it is on no index."""
    return "in the folder of the checkout: pip install " + (f"'.[{extra}]'" if extra else ".")


def load_extra(name: str, what: str, extra: str = "compare") -> Any:
    """A module that is not always installed.

    Args:
        name: of the module.
        what: needs it, in words, a plural.
        extra: of this package, which brings the module.

    Raises:
        PaceError: there is none.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PaceError(f"{what} need {name}; {install_hint(extra)}") from error


def load_pyplot() -> Any:
    """matplotlib's pyplot, drawing to files.

    Raises:
        PaceError: there is no matplotlib.
    """
    load_extra("matplotlib", "pictures").use("Agg")
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
