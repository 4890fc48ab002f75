"""The clip that is bundled: its depth, cameras and pictures agree, and the script makes it again."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pacevggt_patch
from pacevggt_patch.clips import load_clip

BUNDLED = Path(pacevggt_patch.__path__[0]) / "data" / "room"
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def clip():
    return load_clip(BUNDLED, width=224)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("make_demo_clip", BENCHMARKS / "make_demo_clip.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def carried(clip, first: int, second: int, move=(0.0, 0.0, 0.0)) -> tuple[float, float, float]:
    """Points of one frame seen from another one: the share of them that it sees, and the medians there of how far its
    depth is off (relative) and its colour. `move` shifts the second camera, metres."""
    height, width = clip.height, clip.width
    rows, columns = np.mgrid[:height, :width] + 0.5
    matrix = clip.intrinsics[0].numpy().astype(float)
    poses = [
        np.vstack([clip.world_to_camera[i].numpy().astype(float), [0, 0, 0, 1]]) for i in (first, second)
    ]
    rays = np.stack([columns, rows, np.ones_like(rows)], -1) @ np.linalg.inv(matrix).T
    points = np.concatenate([rays * clip.depth[first].numpy()[..., None], np.ones((height, width, 1))], -1)
    there = (points @ (poses[1] @ np.linalg.inv(poses[0])).T)[..., :3] - np.array(move)
    with np.errstate(divide="ignore", invalid="ignore"):
        seen = (there @ matrix.T)[..., :2] / there[..., 2:]
    inside = (there[..., 2] > 0) & (seen > 0).all(-1) & (seen < (width, height)).all(-1)
    column, row = seen[inside].astype(int).T
    off = there[..., 2][inside] / clip.depth[second].numpy()[row, column] - 1
    visible = off < 0.03  # else something stands before it
    images = clip.images.permute(0, 2, 3, 1).numpy()
    colour = np.abs(images[first][inside] - images[second][row, column]).max(-1)
    return visible.sum() / inside.size, np.median(np.abs(off[visible])), np.median(colour[visible])


def test_it_is_small_and_whole(clip):
    assert (len(clip), clip.height, clip.width) == (24, 224, 224)
    assert clip.valid.all() and clip.depth.min() > 0.5 and clip.depth.max() < 8
    assert sum(file.stat().st_size for file in BUNDLED.rglob("*") if file.is_file()) < 1e6
    assert 0.3 < clip.images.mean() < 0.7 and clip.images.std() > 0.15


@pytest.mark.parametrize("first", [0, 7, 12, 20])
def test_depth_and_cameras_agree(first, clip):
    shared, depth, colour = carried(clip, first, first + 2)
    assert shared > 0.6 and depth < 0.005 and colour < 0.05
    _, wrong, _ = carried(clip, first, first + 2, move=(0.0, 0.0, 0.1))
    assert wrong > 3 * depth


def test_frames_overlap_and_cameras_move(clip):
    assert carried(clip, 0, 23)[0] > 0.25
    centres = -(clip.world_to_camera[:, :, :3].transpose(1, 2) @ clip.world_to_camera[:, :, 3:])[..., 0]
    assert 1.0 < (centres[0] - centres[-1]).norm() < 4
    assert (centres[1:] - centres[:-1]).norm(dim=1).min() > 0.02


@pytest.mark.parametrize("index", [0, 17])
def test_the_script_makes_it_again(index, clip, script, monkeypatch):
    (view,), atlas = script.room(range(index, index + 1))
    depth = script.render_frames(view, atlas, 224, 224)[1][0]
    same = (depth - clip.depth[index]).abs() < 6e-4  # stored in millimetres
    assert same.float().mean() > 0.999
    pose = torch.cat([view.orientation[0].T, -(view.orientation[0].T @ view.camera[0])[:, None]], 1)
    assert torch.allclose(pose, clip.world_to_camera[index], atol=1e-5)
    monkeypatch.setattr(script, "FINER", 1)  # a coarse picture will do
    picture = script.lit(view, atlas, 56)[0]

    def away(other: int) -> float:
        return (F.avg_pool2d(clip.images[other], 4) - picture).abs().mean().item()

    assert away(index) < 0.04 < away(index - 5) and away(index) < 0.5 * away((index + 1) % 24)


def test_a_clip_is_written_and_read_back(script, tmp_path, monkeypatch, capsys):
    for name, value in (("FRAMES", 2), ("SIZE", 28), ("FINER", 1)):
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script, "lamps", lambda: script_lamps[:1])
    script_lamps = [(torch.tensor([-2.0, 0.0, 2.0]), torch.ones(3))]
    (tmp_path / "room" / "frames").mkdir(parents=True)
    (tmp_path / "room" / "frames" / "old.jpg").write_bytes(b"")
    script.main(["--output", str(tmp_path / "room")])
    found = load_clip(tmp_path / "room", width=28)
    assert len(found) == 2 and not (tmp_path / "room" / "frames" / "old.jpg").exists()
    assert "2 frames" in capsys.readouterr().out
