"""The reader of 7-Scenes, on a scene that is known in closed form."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from seven_scenes import (
    HEIGHT,
    SMALL,
    WIDTH,
    colour_pose,
    colours,
    pose_of,
    seen,
    write_scene,
)

from pacevggt_patch.clips import load_seven_scenes
from pacevggt_patch.clips.seven_scenes import Calibration, split_sequences, warp_depth
from pacevggt_patch.errors import ClipError, PaceError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Sequences 1 and 3 for testing, 2 for training."""
    return write_scene(tmp_path_factory.mktemp("scenes") / "office", {1: 5, 2: 2, 3: 3}, test=(1, 3))


@pytest.fixture
def scene(made, tmp_path):
    """The same, to be broken."""
    return shutil.copytree(made, tmp_path / "office")


def load(scene, **given):
    return load_seven_scenes(scene, **{"width": WIDTH, "calibration": SMALL, **given})


def shift(depth: np.ndarray, true: np.ndarray) -> np.ndarray:
    """How many pixels right and down a depth map lies off the true one: the best fit on smooth surfaces."""
    down, right = np.gradient(true)
    smooth = (depth > 0) & (np.abs(np.gradient(down, axis=0)) + np.abs(np.gradient(right, axis=1)) < 2e-3)
    smooth &= np.abs(depth - true) < 0.1  # not across an edge
    assert smooth.mean() > 0.5
    slopes = np.stack([right[smooth], down[smooth]], 1)
    return -np.linalg.lstsq(slopes, (depth - true)[smooth], rcond=None)[0]


def test_depth_is_moved_to_the_colour_camera(made):
    clip = load(made, sequence=1)
    assert (len(clip), clip.height, clip.width, clip.name) == (5, HEIGHT, WIDTH, "office seq-01")
    assert clip.depth is not None and clip.valid is not None
    for index in range(5):
        true, _ = seen(colour_pose(index), SMALL.colour_focal, SMALL.colour_centre)
        found, valid = clip.depth[index].numpy(), clip.valid[index].numpy()
        assert 0.7 < valid.mean() < 0.99
        assert np.abs(shift(found, true)).max() < 0.1
        # A point lies at most half a pixel beside its pixel; at edges that may be another surface.
        slope = sum(np.abs(np.gradient(true, axis=axis)) for axis in (0, 1))
        close = np.abs(found - true) < 0.75 * slope + 0.002
        assert close[valid].mean() > 0.99
        # The near surface hides the far one.
        assert (found[valid] > true[valid] + 0.3).mean() < 0.002
    unaligned = load(made, sequence=1, aligned=False)
    true, _ = seen(colour_pose(0), SMALL.colour_focal, SMALL.colour_centre)
    both = unaligned.valid[0].numpy()
    assert np.median(np.abs(unaligned.depth[0].numpy() - true)[both]) > 0.02


def test_depth_cameras_and_pictures_agree(made):
    """Each pixel's point, by the clip's own cameras, has the colour that the scene has there."""
    clip = load(made)
    assert len(clip) == 8
    for index in (0, 4, 7):
        rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
        inverse = np.linalg.inv(clip.intrinsics[index].numpy().astype(float))
        rays = np.stack([columns, rows, np.ones_like(rows)], -1) @ inverse.T
        rotation, offset = (
            clip.world_to_camera[index].numpy().astype(float).T[:3].T,
            clip.world_to_camera[index, :, 3],
        )
        points = (rays * clip.depth[index].numpy()[..., None] - offset.numpy()) @ rotation
        wrong = np.abs(colours(points) - clip.images[index].permute(1, 2, 0).numpy()).max(-1)
        assert np.median(wrong[clip.valid[index].numpy()]) < 0.01


def test_poses_are_those_of_the_camera_and_exact(made):
    for aligned, expected in ((True, colour_pose), (False, pose_of)):
        clip = load(made, sequence=3, aligned=aligned)
        for index, matrix in enumerate(clip.world_to_camera.double()):
            rotation = matrix[:, :3]
            assert torch.allclose(rotation @ rotation.T, torch.eye(3, dtype=torch.float64), atol=2e-7)
            true = np.linalg.inv(expected(index))
            assert np.abs(matrix.numpy() - true[:3]).max() < 5e-4  # what the stored ones were off by


def test_as_published(made):
    clip = load(made, sequence=1, frames=1, aligned=False)
    stored = np.asarray(Image.open(made / "seq-01" / "frame-000000.depth.png"))
    known = (stored != 0) & (stored != 65535)
    assert not known[:10].any() and not known[-5:].any()
    assert np.array_equal(clip.valid[0].numpy(), known)
    assert np.allclose(clip.depth[0].numpy()[known], stored[known] / 1000)
    matrix = clip.intrinsics[0]
    assert matrix[0, 0].item() == pytest.approx(SMALL.depth_focal)
    assert matrix[0, 2].item() == pytest.approx(SMALL.depth_centre[0] + 0.5)


def test_which_frames(made):
    def numbers(**given):
        found = load(made, aligned=False, **given).world_to_camera[:, :, 3]
        return [round(-(np.linalg.inv(pose_of(0)[:3, :3]) @ t.numpy())[0] / 0.05) for t in found]

    every = load(made, aligned=False)
    assert split_sequences(made, "train") == [2] and len(load(made, split="train")) == 2
    assert torch.equal(load(made, aligned=False, start=1, stride=3).images, every.images[[1, 4, 7]])
    assert torch.equal(load(made, aligned=False, sequence=3).images, every.images[5:])
    assert torch.equal(load(made, aligned=False, sequence=1, stride=2, frames=2).images, every.images[[0, 2]])


def test_smaller_and_square_frames(made):
    square = load(made, sequence=3, width=140, mode="square")
    assert square.images.shape[2:] == square.depth.shape[1:] == (140, 140)
    scale, whole = 140 / HEIGHT, load(made, sequence=3)
    assert square.intrinsics[0, 0, 0] == pytest.approx(whole.intrinsics[0, 0, 0].item() * scale)
    assert square.intrinsics[0, 0, 2] == pytest.approx((whole.intrinsics[0, 0, 2].item() - 35) * scale)


def test_the_same_camera_leaves_depth_alone():
    same = replace(SMALL, colour_focal=SMALL.depth_focal, colour_centre=SMALL.depth_centre)
    same = replace(same, rotation=(0.0, 0.0, 0.0), translation=(0.0, 0.0, 0.0))
    depth = np.random.default_rng(0).uniform(0.5, 3, (HEIGHT, WIDTH)).astype(np.float32)
    depth[3, 4] = 0
    assert np.allclose(warp_depth(depth, same), depth, atol=1e-6)


def nan_pose(scene):
    np.savetxt(scene / "seq-01" / "frame-000002.pose.txt", np.full((4, 4), np.nan))


def small_depth(scene):
    Image.fromarray(np.ones((50, 60), np.uint16)).save(scene / "seq-01" / "frame-000002.depth.png")


def grey_depth(scene):
    Image.fromarray(np.ones((HEIGHT, WIDTH), np.uint8)).save(scene / "seq-01" / "frame-000002.depth.png")


def cut_picture(scene):
    file = scene / "seq-01" / "frame-000002.color.png"
    file.write_bytes(file.read_bytes()[:3000])


def scaled_pose(scene):
    pose = pose_of(2)
    pose[:3, :3] *= 1.1
    np.savetxt(scene / "seq-01" / "frame-000002.pose.txt", pose)


BROKEN = {
    "no pose": (lambda s: (s / "seq-01" / "frame-000002.pose.txt").unlink(), ["frame-000002.pose.txt"]),
    "no depth": (lambda s: (s / "seq-01" / "frame-000002.depth.png").unlink(), ["frame-000002.depth.png"]),
    "no picture": (lambda s: (s / "seq-01" / "frame-000002.color.png").unlink(), ["frame-000002.color.png"]),
    "a cut picture": (cut_picture, ["frame-000002.color.png"]),
    "lost tracking": (nan_pose, ["frame-000002.pose.txt", "rotation"]),
    "a scaled pose": (scaled_pose, ["frame-000002.pose.txt", "rotation"]),
    "text for a pose": (
        lambda s: (s / "seq-01" / "frame-000002.pose.txt").write_text("lost\n"),
        ["pose.txt", "4 x 4"],
    ),
    "bytes for a pose": (
        lambda s: (s / "seq-01" / "frame-000002.pose.txt").write_bytes(b"\xff"),
        ["pose.txt"],
    ),
    "small depth": (small_depth, ["frame-000002.depth.png", "60x50", f"{WIDTH}x{HEIGHT}"]),
    "8-bit depth": (grey_depth, ["frame-000002.depth.png", "16-bit"]),
    "no split": (lambda s: (s / "TestSplit.txt").unlink(), ["TestSplit.txt", "folder of one scene"]),
    "a broken split": (
        lambda s: (s / "TestSplit.txt").write_text("seq-01\n"),
        ["TestSplit.txt", "sequence1"],
    ),
    "an empty split": (lambda s: (s / "TestSplit.txt").write_text("\n"), ["TestSplit.txt", "sequence1"]),
    "no sequence": (lambda s: shutil.rmtree(s / "seq-03"), ["seq-03", "unpack seq-03.zip"]),
    "no frames": (lambda s: [f.unlink() for f in (s / "seq-03").iterdir()], ["seq-03", "no frames"]),
}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_what_is_broken_is_named(case, scene):
    harm, words = BROKEN[case]
    harm(scene)
    with pytest.raises(ClipError) as caught:
        load(scene)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sequence": 2}, ["TestSplit.txt", "sequence 2", "[1, 3]"]),
        ({"sequence": "1"}, ["sequence", "whole number"]),
        ({"split": "validation"}, ["split", "train, test", "validation"]),
        ({"frames": 9}, ["8 frames"]),
        ({"start": 8}, ["no frame 8"]),
        ({"width": 100}, ["multiple of 14"]),
        ({"calibration": None}, ["frame-000000.color.png", f"{WIDTH}x{HEIGHT}", "640x480"]),
    ],
)
def test_arguments_that_do_not_fit(given, words, made):
    with pytest.raises(PaceError) as caught:
        load(made, **given)
    assert all(word in str(caught.value) for word in words)


def test_another_folder(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ClipError, match=str(path)):
            load(path)


def test_the_published_size_is_the_default():
    assert Calibration().size == (640, 480)
    assert np.allclose(Calibration().colour_from_depth[:3, 3], [-0.023, 0.004, 0])
