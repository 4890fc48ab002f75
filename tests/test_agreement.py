"""How far two predictions are apart: SciPy and numpy in float64 as references, and cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from pacevggt_patch.evaluation import camera_agreement, depth_agreement, point_agreement, unproject
from pacevggt_patch.evaluation.agreement import LEAST_BASELINE, cloud_size, moved, moved_cameras, vector_angle
from pacevggt_patch.evaluation.geometry import Similarity, camera_centres


def random_poses(count: int, seed: int = 0) -> torch.Tensor:
    """[S, 3, 4] float64 world-to-camera."""
    rotation = Rotation.random(count, random_state=seed).as_matrix()
    translation = np.random.default_rng(seed).normal(size=(count, 3, 1))
    return torch.from_numpy(np.concatenate([rotation, translation], axis=2))


def nudged(poses: torch.Tensor, degrees: float, seed: int = 0) -> torch.Tensor:
    """The cameras, each turned and moved a little in its own way."""
    random = np.random.default_rng(seed)
    turn = Rotation.from_rotvec(np.radians(degrees) * random.normal(size=(len(poses), 3))).as_matrix()
    result = torch.from_numpy(turn) @ poses
    result[:, :, 3] += torch.from_numpy(0.05 * random.normal(size=(len(poses), 3)))
    return result


def random_similarity(seed: int = 4) -> Similarity:
    rotation = torch.from_numpy(Rotation.random(random_state=seed).as_matrix())
    return Similarity(
        torch.tensor(1.7, dtype=torch.float64), rotation, torch.tensor([0.5, -2.0, 1.0]).double()
    )


def by_hand(poses: torch.Tensor) -> dict[tuple[int, int], tuple[Rotation, np.ndarray]]:
    """Of each pair, the rotation and the translation from camera j to camera i, by 4x4 matrices."""
    whole = [np.vstack([pose, [0, 0, 0, 1]]) for pose in poses.numpy()]
    pairs = {}
    for i in range(len(whole)):
        for j in range(i + 1, len(whole)):
            relative = whole[i] @ np.linalg.inv(whole[j])
            pairs[i, j] = Rotation.from_matrix(relative[:3, :3]), relative[:3, 3]
    return pairs


def test_angles_of_pairs_equal_scipys():
    stock = random_poses(6)
    other = nudged(stock, 5)
    found = camera_agreement(stock, other)
    expected = by_hand(stock)
    theirs = by_hand(other)
    turns, ways = [], []
    for pair, (rotation, way) in expected.items():
        turned, moved_way = theirs[pair]
        turns.append(np.degrees((rotation.inv() * turned).magnitude()))
        cosine = way @ moved_way / np.linalg.norm(way) / np.linalg.norm(moved_way)
        ways.append(np.degrees(np.arccos(cosine)))
    np.testing.assert_allclose(found.rotation, turns, atol=1e-9)
    np.testing.assert_allclose(found.direction, ways, atol=1e-6)
    assert found.left_out == 0
    # Of each frame, the median over its five pairs.
    for frame in range(6):
        own = [n for n, pair in enumerate(expected) if frame in pair]
        assert found.rotation_of_frame[frame] == pytest.approx(np.median(np.array(turns)[own]))
        assert found.direction_of_frame[frame] == pytest.approx(np.median(np.array(ways)[own]), abs=1e-6)


def test_another_world_and_scale_change_nothing():
    stock = random_poses(5)
    other = nudged(stock, 3)
    found, again = (
        camera_agreement(stock, poses) for poses in (other, moved_cameras(other, random_similarity()))
    )
    torch.testing.assert_close(found.rotation, again.rotation, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.direction, again.direction, atol=1e-6, rtol=0)


def test_a_translation_the_other_way_is_180_degrees_off():
    stock = torch.eye(3, 4, dtype=torch.float64).repeat(2, 1, 1)
    other = stock.clone()
    stock[1, 0, 3], other[1, 0, 3] = 1.0, -1.0
    found = camera_agreement(stock, other)
    assert found.direction.tolist() == [180.0] and found.rotation.tolist() == [0.0]
    angles = vector_angle(torch.tensor([[1.0, 0, 0]] * 2), torch.tensor([[0, 2.0, 0], [3.0, 3.0, 0]]))
    assert angles.tolist() == pytest.approx([90, 45])


def test_pairs_with_next_to_no_baseline_have_no_direction():
    stock = torch.eye(3, 4, dtype=torch.float64).repeat(3, 1, 1)
    stock[1, 0, 3], stock[2, 0, 3] = 2.0, 2.0 + 0.9 * LEAST_BASELINE * 10
    found = camera_agreement(stock, stock, size=10.0)
    assert found.left_out == 1 and found.direction.isnan().tolist() == [False, False, True]
    assert camera_agreement(stock, stock, size=8.0).left_out == 0
    still = torch.eye(3, 4).repeat(3, 1, 1)
    found = camera_agreement(still, stock)
    assert found.left_out == 3 and found.direction_of_frame == [None] * 3


def test_a_single_frame_has_no_pairs():
    found = camera_agreement(random_poses(1), random_poses(1, 3))
    assert len(found.rotation) == 0 and found.rotation_of_frame == [None] and found.left_out == 0
    with pytest.raises(ValueError, match="3, 4"):
        camera_agreement(random_poses(2), random_poses(3))


def test_depth_equals_numpys_after_one_scale():
    random = np.random.default_rng(1)
    stock = random.uniform(1, 5, size=(3, 4, 5))
    other = 0.5 * stock * random.uniform(0.9, 1.1, size=stock.shape)
    found = depth_agreement(torch.from_numpy(stock), torch.from_numpy(other))
    assert found is not None
    scale = np.median(stock / other)
    difference = np.abs(scale * other - stock) / stock
    assert found.scale == pytest.approx(scale) and scale == pytest.approx(2, rel=0.05)
    assert found.median == pytest.approx(np.median(difference))
    assert found.mean == pytest.approx(difference.mean())
    assert found.of_frame == pytest.approx([np.median(frame) for frame in difference])
    np.testing.assert_allclose(found.difference, difference, rtol=1e-5, atol=1e-7)


def test_pixels_without_depth_are_left_out():
    stock, other = torch.full((2, 2, 2), 2.0), torch.full((2, 2, 2), 1.0)
    stock[0, 0, 0], other[1] = 0.0, 0.0
    found = depth_agreement(stock, other)
    assert found is not None and found.scale == 2 and found.median == found.mean == 0
    assert found.of_frame == [0, None]
    assert found.difference.isnan().sum() == 5
    assert depth_agreement(stock, torch.zeros(2, 2, 2)) is None
    with pytest.raises(ValueError, match="S, H, W"):
        depth_agreement(stock, other[:1])


def test_points_are_aligned_before_they_are_compared():
    random = np.random.default_rng(2)
    stock = torch.from_numpy(random.normal(size=(400, 3)))
    found = point_agreement(stock, moved(stock, random_similarity()), torch.arange(400) % 4, 4)
    assert found is not None and found.median < 1e-6 and max(found.of_frame) < 1e-6
    noise = torch.from_numpy(0.01 * random.normal(size=(400, 3)))
    noise[::4] *= 5  # frame 0
    found = point_agreement(stock, moved(stock + noise, random_similarity()), torch.arange(400) % 4, 4)
    assert found is not None
    points = stock.numpy()
    size = np.median(np.linalg.norm(points - torch.from_numpy(points).median(0).values.numpy(), axis=1))
    assert found.size == pytest.approx(size) == pytest.approx(cloud_size(stock))
    # Kabsch by SciPy, with the scale that belongs to it.
    other = moved(stock + noise, random_similarity()).numpy()
    centred, target = other - other.mean(0), points - points.mean(0)
    turn, _ = Rotation.align_vectors(target, centred)
    turned = turn.apply(centred)
    aligned = (turned * target).sum() / (turned**2).sum() * turned
    percent = 100 * np.linalg.norm(aligned - target, axis=1) / size
    assert found.median == pytest.approx(np.median(percent), rel=1e-6)
    assert found.of_frame == pytest.approx([np.median(percent[i::4]) for i in range(4)], rel=1e-6)
    assert found.of_frame[0] > 2 * found.of_frame[1]


def test_clouds_that_say_nothing():
    assert point_agreement(torch.rand(3, 3), torch.rand(3, 3), torch.zeros(3), 1) is None
    assert point_agreement(torch.ones(9, 3), torch.rand(9, 3), torch.zeros(9), 1) is None
    assert point_agreement(torch.ones(0, 3), torch.ones(0, 3), torch.zeros(0), 1) is None


def test_moved_cameras_see_what_they_saw():
    poses, similarity = random_poses(3), random_similarity()
    intrinsics = torch.tensor([[50.0, 0, 20], [0, 60, 15], [0, 0, 1]]).double().expand(3, 3, 3)
    depth = torch.rand(3, 30, 40).double() + 1
    points = unproject(depth, intrinsics, poses)
    again = unproject(similarity.scale * depth, intrinsics, moved_cameras(poses, similarity))
    torch.testing.assert_close(again, moved(points, similarity))
    centres = camera_centres(moved_cameras(poses, similarity))
    torch.testing.assert_close(centres, moved(camera_centres(poses), similarity))
