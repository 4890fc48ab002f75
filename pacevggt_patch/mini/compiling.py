"""Compile on a GPU only: on the CPU compiling takes longer than a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..runtime.compiling import compiled


def faster(function: Any, on_gpu: bool) -> Callable[..., Any]:
    """The function, compiled if `on_gpu`."""
    return compiled(function) if on_gpu else function
