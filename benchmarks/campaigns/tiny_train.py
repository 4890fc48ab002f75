"""`pacevggt train` of a tiny model, as a process of its own that can be killed: python tiny_train.py ARGUMENT ..."""

import os
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "tests"))

import torch
from hosts import tiny_vggt

from pacevggt_patch.cli.main import main
from pacevggt_patch.method import full_heads
from pacevggt_patch.training import run

if __name__ == "__main__":
    torch.set_num_threads(1)
    setattr(run, "load_backbone", lambda _: tiny_vggt())  # noqa: B010
    full_heads.LEAST_ERROR = 0.0  # finds a head
    if limit := os.environ.get("LARGEST_FILE"):
        # A write beyond it fails as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    sys.exit(main(["train", *sys.argv[1:]]))
