"""Share pace weights on the Hugging Face Hub, and accelerate a model with them.

    hf auth login
    python examples/hub_roundtrip.py USER/REPO

calibrates VGGT-mini on four frames, uploads the pace weights to the repository USER/REPO, which is created if need be,
and loads them back by id, as anybody else would. `pacevggt push FILE USER/REPO` does the same, with a model card.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from huggingface_hub import HfApi

from pacevggt_patch import accelerate, calibrate, summary
from pacevggt_patch.clips import BUNDLED_CLIP, load_clip
from pacevggt_patch.mini import build_mini
from pacevggt_patch.weights.hub import HUB_FILE


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Share pace weights on the Hugging Face Hub and load them back."
    )
    parser.add_argument("repo", metavar="USER/REPO", help="model repository, created if it does not exist")
    repo = parser.parse_args().repo

    model = build_mini()
    weights = calibrate(model, load_clip(BUNDLED_CLIP, width=224, mode="square", frames=4).images)
    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / HUB_FILE
        weights.save(path)
        commit = api.upload_file(path_or_fileobj=path, path_in_repo=HUB_FILE, repo_id=repo)
    print(f"uploaded {HUB_FILE} to {repo}, commit {commit.oid[:12]}")

    # The commit pins the very file; "USER/REPO" alone takes the newest.
    accelerate(model, keep_ratio=0.3, weights=f"{repo}@{commit.oid}")
    with torch.inference_mode():
        predictions = model(torch.rand(2, 3, 224, 224))
    print(f"depth {list(predictions['depth'].shape)}")
    print(summary(model))


if __name__ == "__main__":
    main()
