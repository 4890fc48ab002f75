"""Arguments of public functions, checked before work starts."""

from __future__ import annotations

import math
import operator
import os
import reprlib
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .errors import PaceError

LARGEST = 2**31  # of whole numbers


def number(name: str, value: Any) -> float:
    """A number that is not NaN, as a float.

    Raises:
        PaceError: it is none, or too large for a float.
    """
    try:
        if not isinstance(value, bool) and isinstance(value, Real) and not math.isnan(value):
            return float(value)
    except OverflowError:
        pass
    raise PaceError(f"{name} must be a number, got {shown(value)}")


def whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least `least`.

    Raises:
        PaceError: it is none, or too large.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= value < LARGEST:
        raise PaceError(f"{name} must be a whole number of at least {least}, got {shown(value)}")
    return operator.index(value)


def several(name: str, values: Any) -> list[Any]:
    """The values of something iterable that is no text.

    Raises:
        PaceError: it is no such thing.
    """
    try:
        if not isinstance(values, (str, bytes)):
            return list(values)
    except TypeError:
        pass
    raise PaceError(f"{name} must be several values, got {shown(values)}")


def file_path(name: str, value: Any) -> Path:
    """A path, `~` expanded.

    Raises:
        PaceError: it is none, or empty.
    """
    if (
        not isinstance(value, (str, os.PathLike))
        or not isinstance(os.fspath(value), str)
        or not os.fspath(value)
    ):
        raise PaceError(f"{name} must be a path or a string, got {shown(value)}")
    return Path(os.path.expanduser(value))


def shown(value: Any) -> str:
    """A value in a message, in short."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python does not write thousands of digits
        return "one of too many digits"
