"""The reader of ScanNet, on a scene that is known in closed form."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scannet import COLOUR, COLOUR_SIZE, DEPTH, DEPTH_SIZE, matrix_text, pose_of, write_scene
from seven_scenes import along, colours

from pacevggt_patch.clips import load_scannet
from pacevggt_patch.clips.scannet import Camera, ScanNetScene, resample
from pacevggt_patch.errors import ClipError, PaceError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Twelve frames, so that 10 follows 9 and not 1; tracking was lost in two of them."""
    return write_scene(tmp_path_factory.mktemp("scans") / "scene0000_00", 12, lost=(0, 3))


@pytest.fixture
def scene(made, tmp_path):
    """The same, to be broken."""
    return shutil.copytree(made, tmp_path / "scene0000_00")


KEPT = [1, 2, 4, 5, 6, 7, 8, 9, 10, 11]


def load(scene, **given):
    with pytest.warns(UserWarning, match=r"left out 2 of 12 frames"):
        return load_scannet(scene, **{"width": 140, **given})


def test_frames_without_a_pose_are_left_out(made):
    clip = load(made)
    assert (len(clip), clip.height, clip.width, clip.name) == (10, 98, 140, "scene0000_00")
    for matrix, number in zip(clip.world_to_camera.double(), KEPT, strict=True):
        assert np.abs(matrix.numpy() - np.linalg.inv(pose_of(number))[:3]).max() < 1e-5
    found = ScanNetScene(made)
    assert (len(found), found.left_out) == (10, 2)
    assert [file.stem for file in found.colours] == [str(number) for number in KEPT]


def test_which_frames(made):
    every = load(made)
    assert torch.equal(load(made, start=1, stride=4).images, every.images[[1, 5, 9]])
    assert torch.equal(load(made, stride=3, frames=2).images, every.images[[0, 3]])
    # As the command takes them, in any order and spacing.
    chosen = ScanNetScene(made).load([0, 1, 7], 140, "crop")
    assert torch.equal(chosen.depth, every.depth[[0, 1, 7]])


def test_depth_lies_on_the_pictures(made):
    """Each pixel has the depth that the surfaces have there, to within the pixel of the depth camera that it is in."""
    clip = load(made)
    assert clip.depth is not None and clip.valid is not None
    for index, number in enumerate(KEPT[:4]):
        matrix = clip.intrinsics[index].double().numpy()
        centre = matrix[0, 2] - 0.5, matrix[1, 2] - 0.5
        assert matrix[0, 0] != matrix[1, 1]  # heights are rounded to patches
        rows, columns = np.mgrid[: clip.height, : clip.width]
        rays = np.stack(
            [(columns - centre[0]) / matrix[0, 0], (rows - centre[1]) / matrix[1, 1], np.ones_like(rows)], -1
        )
        true, _ = along(pose_of(number), rays)
        found, valid = clip.depth[index].numpy(), clip.valid[index].numpy()
        assert 0.9 < valid.mean() < 0.96  # three rows were not measured
        slope = sum(np.abs(np.gradient(true, axis=axis)) for axis in (0, 1))
        close = np.abs(found - true) < 2 * slope + 0.002
        assert close[valid].mean() > 0.98
        # Half a pixel of either camera, by which conventions differ, would be seen.
        down, right = np.gradient(true)
        smooth = valid & (slope < 0.03) & (np.abs(found - true) < 0.1)
        shift = np.linalg.lstsq(
            np.stack([right[smooth], down[smooth]], 1), (found - true)[smooth], rcond=None
        )[0]
        assert np.abs(shift).max() < 0.26


def test_pictures_cameras_and_depth_agree(made):
    """Each pixel's point, by the clip's own cameras, has the colour that the scene has there."""
    clip = load(made, mode="square", width=98)
    rows, columns = np.mgrid[:98, :98] + 0.5
    for index in (0, 9):
        inverse = np.linalg.inv(clip.intrinsics[index].double().numpy())
        pose = clip.world_to_camera[index].double().numpy()
        rays = np.stack([columns, rows, np.ones_like(rows)], -1) @ inverse.T
        points = (rays * clip.depth[index].numpy()[..., None] - pose[:, 3]) @ pose[:, :3]
        wrong = np.abs(colours(points) - clip.images[index].permute(1, 2, 0).numpy()).max(-1)
        assert np.median(wrong[clip.valid[index].numpy()]) < 0.02


def test_the_flat_layout_gives_the_same(made, tmp_path):
    flat = write_scene(tmp_path / "scene0000_00", 12, lost=(0, 3), flat=True)
    clip, expected = load(flat), load(made)
    for key in ("images", "depth", "intrinsics", "world_to_camera"):
        assert torch.equal(getattr(clip, key), getattr(expected, key)), key
    (tmp_path / "moved" / "sensor_data").mkdir(parents=True)
    for file in flat.iterdir():
        file.rename(tmp_path / "moved" / "sensor_data" / file.name)
    assert torch.equal(load(tmp_path / "moved").depth, expected.depth)


def test_cameras_may_lie_beside_the_folders(scene, made):
    for part in ("color", "depth"):
        (scene / "intrinsic" / f"intrinsic_{part}.txt").rename(scene / f"intrinsics_{part}.txt")
    assert torch.equal(load(scene).depth, load(made).depth)


def test_without_depth_there_are_pictures_and_poses(scene, made):
    shutil.rmtree(scene / "depth")
    shutil.rmtree(scene / "intrinsic")
    clip = load(scene)
    assert clip.depth is None and clip.intrinsics is None
    assert torch.equal(clip.world_to_camera, load(made).world_to_camera)


def test_a_frame_of_the_depth_camera_itself_keeps_each_pixel():
    depth = np.random.default_rng(0).uniform(0.5, 3, (52, 70)).astype(np.float32)
    camera = Camera((62.0, 61.0), (35.0, 26.0))
    matrix = torch.tensor([[62.0, 0, 35.0], [0, 61.0, 26.0], [0, 0, 1]])
    assert np.array_equal(resample(depth, camera, matrix, (52, 70)), depth)
    # One that sees more has nothing there; one of twice the focal length has each pixel of the middle twice.
    wide = resample(depth, camera, matrix + torch.tensor([[0, 0, 5.0], [0, 0, 0], [0, 0, 0]]), (52, 80))
    assert np.array_equal(wide[:, 5:75], depth) and not wide[:, :5].any() and not wide[:, 75:].any()
    near = resample(depth, camera, matrix * torch.tensor([[2.0, 1, 2], [1, 2, 2], [1, 1, 1]]), (104, 140))
    assert np.array_equal(near, depth.repeat(2, 0).repeat(2, 1))


def no_pose(scene):
    (scene / "pose" / "5.txt").unlink()


def all_lost(scene):
    for file in (scene / "pose").iterdir():
        np.savetxt(file, np.full((4, 4), np.nan))


def scaled_pose(scene):
    np.savetxt(scene / "pose" / "5.txt", np.diag([1.1, 1.1, 1.1, 1]))


def small_picture(scene):
    Image.new("RGB", (70, 52)).save(scene / "color" / "5.jpg")


def small_pictures(scene):
    for file in (scene / "color").iterdir():
        Image.new("RGB", (70, 52)).save(file)


def small_depth(scene):
    Image.fromarray(np.ones((26, 35), np.uint16)).save(scene / "depth" / "5.png")


def moved_camera(scene):
    motion = np.eye(4)
    motion[0, 3] = 0.025
    np.savetxt(scene / "intrinsic" / "extrinsic_color.txt", motion)


def write(name, text):
    return lambda scene: (scene / name).write_text(text)


def cut(name):
    return lambda scene: (scene / name).write_bytes((scene / name).read_bytes()[:200])


BROKEN = {
    "no pictures": (lambda s: shutil.rmtree(s / "color"), ["scene0000_00", "color/*.jpg"]),
    "no poses": (lambda s: shutil.rmtree(s / "pose"), ["scene0000_00", "pose", "12 of 12"]),
    "no pose": (no_pose, ["scene0000_00", "pose", "1 of 12", "5"]),
    "no depth map": (lambda s: (s / "depth" / "7.png").unlink(), ["depth", "1 of 12", "7"]),
    "all lost": (all_lost, ["scene0000_00", "12 frames", "lost"]),
    "a scaled pose": (scaled_pose, ["5.txt", "rotation"]),
    "text for a pose": (write("pose/5.txt", "lost"), ["5.txt", "4 x 4"]),
    "three rows": (write("pose/5.txt", "1 0 0 0\n" * 3), ["5.txt", "4 x 4", "12"]),
    "a cut picture": (cut("color/5.jpg"), ["5.jpg"]),
    "a cut depth map": (cut("depth/5.png"), ["5.png"]),
    "a small picture": (small_picture, ["5.jpg", "70x52", "140x104"]),
    "small pictures": (small_pictures, ["1.jpg", "70x52", "scale the intrinsics"]),
    "a small depth map": (small_depth, ["5.png", "35x26", "70x52"]),
    "no colour camera": (
        lambda s: (s / "intrinsic" / "intrinsic_color.txt").unlink(),
        ["intrinsic_color.txt"],
    ),
    "a camera of zeros": (write("intrinsic/intrinsic_depth.txt", "0 " * 16), ["intrinsic_depth.txt", "fx"]),
    "cameras in two places": (moved_camera, ["extrinsic_color.txt", "one place"]),
}


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("case", sorted(BROKEN))
def test_what_is_broken_is_named(case, scene):
    harm, words = BROKEN[case]
    harm(scene)
    with pytest.raises(ClipError) as caught:
        load_scannet(scene)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["a small picture", "a small depth map"])
def test_a_look_at_the_headers_finds_other_sizes(case, scene):
    harm, words = BROKEN[case]
    harm(scene)
    found = ScanNetScene(scene)
    found.check([0, 1], 140, "crop")
    with pytest.raises(ClipError) as caught:
        found.check(range(10), 140, "crop")
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"frames": 11}, ["10 frames", "11"]),
        ({"start": 10}, ["no frame 10"]),
        ({"width": 100}, ["multiple of 14"]),
        ({"mode": "wide"}, ["mode", "crop, square"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*left out")
def test_arguments_that_do_not_fit(given, words, made):
    with pytest.raises(PaceError) as caught:
        load_scannet(made, **given)
    assert all(word in str(caught.value) for word in words)


def test_the_fixture_is_in_the_layout_of_the_data_set(made):
    assert {path.name for path in made.iterdir()} == {"color", "depth", "pose", "intrinsic"}
    assert np.loadtxt(made / "intrinsic" / "intrinsic_color.txt").shape == (4, 4)
    assert np.isinf(np.loadtxt(made / "pose" / "0.txt")).all()
    assert Image.open(made / "color" / "0.jpg").size == COLOUR_SIZE
    assert Image.open(made / "depth" / "0.png").size == DEPTH_SIZE
    assert matrix_text(DEPTH).split()[0] == f"{DEPTH[0]:.6f}" and COLOUR[0] > DEPTH[0]
