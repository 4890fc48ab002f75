"""Clips: frames of one scene with what is known of their cameras and depth, and where they come from."""

from ..mini.scenes.rooms import render_room
from .clip import Clip
from .folder import count_frames, load_clip, save_clip

__all__ = ["Clip", "count_frames", "load_clip", "render_room", "save_clip"]
