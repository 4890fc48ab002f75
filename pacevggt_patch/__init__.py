"""Accelerate VGGT and its siblings in place by token pruning: one call, the same inputs and outputs."""

from .calibration.calibrate import calibrate
from .config import PaceConfig
from .errors import ClipError, PaceError, UnsupportedModelError, WeightsError
from .patching.install import accelerate, is_accelerated, paused, remove, summary
from .patching.summary import Summary
from .planning.fit_budget import BudgetPlan, fit_budget
from .runtime.ranks import gather_outputs, split_frames
from .version import __version__
from .weights.pace import PaceWeights

__all__ = [
    "BudgetPlan",
    "ClipError",
    "PaceConfig",
    "PaceError",
    "PaceWeights",
    "Summary",
    "UnsupportedModelError",
    "WeightsError",
    "__version__",
    "accelerate",
    "calibrate",
    "fit_budget",
    "gather_outputs",
    "is_accelerated",
    "paused",
    "remove",
    "split_frames",
    "summary",
]
