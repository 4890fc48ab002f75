"""Accelerate VGGT models in place by token pruning: one call, the same inputs and outputs."""

from .budget import BudgetPlan, fit_budget
from .config import ClipError, PaceConfig, PaceError, UnsupportedModelError, WeightsError
from .patch import accelerate, is_accelerated, paused, remove, summary
from .version import __version__
from .weights import PaceWeights

__all__ = [
    "BudgetPlan",
    "ClipError",
    "PaceConfig",
    "PaceError",
    "PaceWeights",
    "UnsupportedModelError",
    "WeightsError",
    "__version__",
    "accelerate",
    "fit_budget",
    "is_accelerated",
    "paused",
    "remove",
    "summary",
]
