"""Weight files: their format, where they come from, and whether they fit a model."""

from .pace import PaceWeights

__all__ = ["PaceWeights"]
