"""The clip that comes with the package."""

from pathlib import Path

BUNDLED_CLIP = Path(__file__).resolve().parent.parent / "data" / "room"
