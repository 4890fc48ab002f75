"""Accelerate VGGT models in place by token pruning: one call, the same inputs and outputs."""

from .config import ClipError, PaceConfig, PaceError, UnsupportedModelError, WeightsError
from .patch import accelerate, is_accelerated, paused, remove, summary
from .version import __version__
from .weights import PaceWeights

__all__ = [
    "ClipError",
    "PaceConfig",
    "PaceError",
    "PaceWeights",
    "UnsupportedModelError",
    "WeightsError",
    "__version__",
    "accelerate",
    "is_accelerated",
    "paused",
    "remove",
    "summary",
]
