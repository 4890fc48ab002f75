"""Clips: frames of one scene with what is known of their cameras and depth, and where they come from."""

from .bundled import BUNDLED_CLIP
from .clip import Clip
from .folder import count_frames, load_clip, save_clip
from .scannet import load_scannet
from .seven_scenes import load_seven_scenes

__all__ = [
    "BUNDLED_CLIP",
    "Clip",
    "count_frames",
    "load_clip",
    "load_scannet",
    "load_seven_scenes",
    "save_clip",
]
