"""Render the clip that `pacevggt demo` runs on, and write it where the package bundles it.

    python benchmarks/make_demo_clip.py

The output is a `clip.json` folder (JPEG frames, 16-bit depth, cameras) of about 1 MB; running this again
replaces it with the same clip.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from pacevggt_patch.clips import load_clip, save_clip
from pacevggt_patch.mini.scenes.rooms import render_room

# Chosen among the first seeds: much of it is seen from several places, and VGGT-mini does on it
# about as well as on the average room.
SEED = 1
FRAMES = 24
SIZE = 224
QUALITY = 92

DEFAULT_OUTPUT = Path(__file__).parents[1] / "pacevggt_patch" / "data" / "room"


def main() -> None:
    """Render, write, read back, and report how large the folder is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    output = parser.parse_args().output
    clip = render_room(SEED, FRAMES, SIZE, SIZE)
    shutil.rmtree(output, ignore_errors=True)
    save_clip(clip, output, quality=QUALITY)

    stored = load_clip(output, width=SIZE)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"{output}: {len(stored)} frames, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
