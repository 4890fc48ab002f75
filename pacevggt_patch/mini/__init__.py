"""VGGT-mini: a small VGGT built from the stock classes, with trained weights in the package."""

from .model import MiniConfig, build_mini, save_mini

__all__ = ["MiniConfig", "build_mini", "save_mini"]
