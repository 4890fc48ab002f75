"""Metrics: hand-worked cases, and SciPy, evo and VGGT's own decoding as references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from pacevggt_patch.clips import Clip
from pacevggt_patch.errors import PaceError
from pacevggt_patch.evaluation import (
    absolute_trajectory_error,
    decode_pose_encoding,
    depth_errors,
    evaluate_predictions,
    pairwise_pose_errors,
    point_error,
    pose_auc,
    similarity_alignment,
    trajectory_errors,
    unproject,
)
from pacevggt_patch.evaluation.geometry import camera_to_world, masked_points
from pacevggt_patch.evaluation.metrics import median
from pacevggt_patch.mini.scenes.rooms import render_room

torch.set_num_threads(1)

KEYS = ["auc5", "auc15", "auc30", "rotation_deg", "translation_deg", "absrel", "delta125", "point_error"]


def random_poses(count: int, seed: int = 0) -> torch.Tensor:
    """`[S, 3, 4]` float64 world-to-camera."""
    rotation = Rotation.random(count, random_state=seed).as_matrix()
    translation = np.random.default_rng(seed).normal(size=(count, 3, 1))
    return torch.from_numpy(np.concatenate([rotation, translation], axis=2))


def nudge(poses: torch.Tensor, degrees: float, metres: float, seed: int = 0) -> torch.Tensor:
    """The poses, each turned and moved a little in its own way."""
    random = np.random.default_rng(seed)
    turn = Rotation.from_rotvec(np.radians(degrees) * random.normal(size=(len(poses), 3))).as_matrix()
    nudged = torch.from_numpy(turn) @ poses
    nudged[:, :, 3] += metres * torch.from_numpy(random.normal(size=(len(poses), 3)))
    return nudged


def in_other_world(poses: torch.Tensor, scale: float, seed: int = 9) -> torch.Tensor:
    """The same cameras in a world that is turned, moved and scaled: x_world = (R x + t) / scale."""
    rotation = torch.from_numpy(Rotation.random(random_state=seed).as_matrix())
    turned = torch.cat([poses[:, :, :3] @ rotation, poses[:, :, 3:]], dim=2)
    turned[:, :, 3] += poses[:, :, :3] @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    turned[:, :, 3] *= scale
    return turned


# Pose encoding


def test_decoding_agrees_with_vggt():
    pose_enc = pytest.importorskip("vggt.utils.pose_enc")
    encoding = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    encoding[..., 7:] = torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(1)) + 0.5
    expected_pose, expected_intrinsics = pose_enc.pose_encoding_to_extri_intri(encoding, (168, 224))
    world_to_camera, intrinsics = decode_pose_encoding(encoding, 168, 224)
    torch.testing.assert_close(world_to_camera, expected_pose, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(intrinsics, expected_intrinsics, atol=1e-4, rtol=1e-5)


def test_decoding_by_hand_and_by_scipy():
    quaternions = torch.from_numpy(np.random.default_rng(0).normal(size=(20, 4)))
    encoding = torch.cat(
        [torch.ones(20, 3), quaternions, torch.full((20, 1), math.pi / 2), torch.ones(20, 1)], dim=1
    )
    world_to_camera, intrinsics = decode_pose_encoding(encoding, 100, 60)
    assert world_to_camera.dtype == torch.float64
    np.testing.assert_allclose(
        world_to_camera[:, :, :3], Rotation.from_quat(quaternions).as_matrix(), atol=1e-12
    )
    # 90 degrees from top to bottom: half the height is as far as the focal length.
    expected = [[30 / math.tan(0.5), 0, 30], [0, 50, 50], [0, 0, 1]]
    np.testing.assert_allclose(intrinsics[3], expected, rtol=1e-6)


# Relative poses


def test_pair_errors_agree_with_scipy():
    truth, predicted = random_poses(6), nudge(random_poses(6), 10, 0.2)
    errors = pairwise_pose_errors(predicted, truth)
    pairs = [(i, j) for i in range(6) for j in range(i + 1, 6)]
    assert len(errors.rotation) == len(errors.translation) == len(pairs)
    for (i, j), rotation, translation in zip(pairs, *errors, strict=True):
        relative = []
        for poses in (predicted.numpy(), truth.numpy()):
            four = np.tile(np.eye(4), (6, 1, 1))
            four[:, :3] = poses
            relative.append(four[i] @ np.linalg.inv(four[j]))
        turn = Rotation.from_matrix(relative[0][:3, :3]) * Rotation.from_matrix(relative[1][:3, :3]).inv()
        assert rotation.item() == pytest.approx(np.degrees(turn.magnitude()), abs=1e-6)
        a, b = (pose[:3, 3] / np.linalg.norm(pose[:3, 3]) for pose in relative)
        assert translation.item() == pytest.approx(np.degrees(np.arccos(abs(a @ b))), abs=1e-5)


def test_pair_errors_do_not_depend_on_the_world():
    truth, predicted = random_poses(5), nudge(random_poses(5), 5, 0.1)
    errors = pairwise_pose_errors(predicted, truth)
    elsewhere = pairwise_pose_errors(in_other_world(predicted, 3.0), truth)
    torch.testing.assert_close(elsewhere.rotation, errors.rotation)
    torch.testing.assert_close(elsewhere.translation, errors.translation)


@pytest.mark.parametrize("degrees", [0.0, 1e-6, 30.0, 179.999999, 180.0])
def test_rotation_error_is_exact_at_both_ends(degrees):
    turn = Rotation.from_rotvec(np.radians(degrees) * np.array([0.6, 0.0, 0.8])).as_matrix()
    poses = torch.eye(4, dtype=torch.float64)[:3].repeat(2, 1, 1)
    turned = poses.clone()
    turned[1, :, :3] = torch.from_numpy(turn)
    assert pairwise_pose_errors(turned, poses).rotation.item() == pytest.approx(degrees, abs=1e-9)


def test_translation_error_knows_no_sign_and_no_baseline_counts_as_wrong():
    still = torch.eye(4, dtype=torch.float64)[:3].repeat(2, 1, 1)

    def error(predicted, truth):
        first, second = still.clone(), still.clone()
        first[1, :, 3], second[1, :, 3] = torch.tensor(predicted).double(), torch.tensor(truth).double()
        return pairwise_pose_errors(first, second).translation.item()

    assert error([1.0, 1, 0], [2.0, 0, 0]) == pytest.approx(45)
    assert error([-1.0, -1, 0], [2.0, 0, 0]) == pytest.approx(45)
    assert error([0.0, 0, 0], [2.0, 0, 0]) == 90
    assert error([0.0, 0, 0], [0.0, 0, 0]) == 90


def test_poses_of_different_shape_are_refused():
    with pytest.raises(ValueError, match="poses must be") as caught:
        pairwise_pose_errors(random_poses(3), random_poses(4))
    assert str(caught.value) == "poses must be [S, 3, 4] both, got [3, 3, 4] and [4, 3, 4]"


def test_auc_by_hand():
    # Of three pairs one is within 1 degree, two within 2 and up to 5: (1 + 2 + 2 + 2 + 2) / (3 * 5).
    assert pose_auc(torch.tensor([0.5, 1.5, 40.0]), 5) == pytest.approx(60)
    assert pose_auc(torch.zeros(4), 30) == 100
    assert pose_auc(torch.tensor([5.0]), 5) == pytest.approx(20)  # the last bin is closed
    assert pose_auc(torch.tensor([5.001, math.nan]), 5) == 0
    assert pose_auc(torch.zeros(0), 5) is None


@settings(max_examples=50, deadline=None)
@given(errors=st.lists(st.floats(0, 180), min_size=1, max_size=40), threshold=st.integers(1, 40))
def test_auc_is_the_mean_accuracy(errors, threshold):
    accuracy = [np.mean([error < limit for error in errors]) for limit in range(1, threshold)]
    accuracy.append(np.mean([error <= threshold for error in errors]))
    assert pose_auc(torch.tensor(errors, dtype=torch.float64), threshold) == pytest.approx(
        100 * np.mean(accuracy)
    )


def test_median():
    assert median(torch.tensor([3.0, 1.0, 2.0, 10.0])) == 2.5
    assert median(torch.zeros(0)) is None


# Trajectories


def test_trajectory_error_is_that_of_the_camera_centres():
    truth, predicted = random_poses(8), in_other_world(nudge(random_poses(8), 3, 0.1), 0.4)
    centres = [torch.stack([-pose[:, :3].T @ pose[:, 3] for pose in poses]) for poses in (predicted, truth)]
    scale, rotation, translation = similarity_alignment(*centres)
    residual = scale * centres[0] @ rotation.T + translation - centres[1]
    expected = residual.square().sum(dim=1).mean().sqrt().item()
    assert 0.01 < expected < 0.5
    assert absolute_trajectory_error(predicted, truth) == pytest.approx(expected, rel=1e-6)
    assert absolute_trajectory_error(in_other_world(truth, 5.0), truth) == pytest.approx(0, abs=1e-9)


def test_cameras_turned_on_the_spot_have_no_trajectory_error():
    truth = random_poses(6)
    turned = torch.from_numpy(Rotation.random(6, random_state=3).as_matrix()) @ truth
    assert absolute_trajectory_error(turned, truth) == pytest.approx(0, abs=1e-9)


def test_trajectory_error_where_alignment_is_not_determined():
    truth = random_poses(5)
    assert absolute_trajectory_error(truth[:2], truth[:2]) is None
    on_a_line = torch.eye(4, dtype=torch.float64)[:3].repeat(5, 1, 1)
    on_a_line[:, 0, 3] = torch.arange(5.0)
    assert absolute_trajectory_error(truth, on_a_line) is None
    collapsed = torch.eye(4, dtype=torch.float64)[:3].repeat(5, 1, 1)
    centres = torch.stack([-pose[:, :3].T @ pose[:, 3] for pose in truth]).numpy()
    expected = math.sqrt(((centres - centres.mean(0)) ** 2).sum(1).mean())
    assert absolute_trajectory_error(collapsed, truth) == pytest.approx(expected)


def evo_errors(predicted: torch.Tensor, truth: torch.Tensor, align_origin: bool = False) -> dict[str, float]:
    """ATE, ARE and RPE of trajectories `[S, 4, 4]`, as evo's command line computes them.

    Both alignments in turn are what evo did until 1.31, and still does step by step.
    """
    from evo.core.metrics import APE, RPE, PoseRelation, Unit
    from evo.core.trajectory import PosePath3D

    reference, estimate = (PosePath3D(poses_se3=list(poses.numpy())) for poses in (truth, predicted))
    estimate.align(reference, correct_scale=True)
    if align_origin:
        estimate.align_origin(reference)
    found = {}
    for name, metric in {
        "ate": APE(PoseRelation.translation_part),
        "are_deg": APE(PoseRelation.rotation_angle_deg),
        "rpe_translation": RPE(PoseRelation.translation_part, 1, Unit.frames, all_pairs=True),
        "rpe_rotation_deg": RPE(PoseRelation.rotation_angle_deg, 1, Unit.frames, all_pairs=True),
    }.items():
        metric.process_data((reference, estimate))
        found[name] = float(np.sqrt(np.mean(np.square(metric.error))))
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_trajectory_errors_agree_with_evo(seed):
    truth = camera_to_world(random_poses(9, seed))
    predicted = camera_to_world(in_other_world(nudge(random_poses(9, seed), 6, 0.2, seed), 0.4))
    errors = trajectory_errors(predicted, truth)
    assert errors is not None
    expected = evo_errors(predicted, truth)
    assert errors._asdict() == pytest.approx(expected, rel=1e-6)
    assert min(expected.values()) > 0.01
    # Matrices from world to camera, too, if somebody compares them as they are.
    swapped = trajectory_errors(torch.linalg.inv(predicted), torch.linalg.inv(truth))
    assert swapped._asdict() == pytest.approx(
        evo_errors(torch.linalg.inv(predicted), torch.linalg.inv(truth)), rel=1e-6
    )
    assert abs(swapped.ate - errors.ate) > 0.01
    from_first = trajectory_errors(predicted, truth, align_origin=True)
    assert from_first._asdict() == pytest.approx(evo_errors(predicted, truth, align_origin=True), rel=1e-6)
    assert from_first.ate > errors.ate


def test_a_trajectory_in_another_world_has_no_error():
    truth = random_poses(7)
    errors = trajectory_errors(camera_to_world(in_other_world(truth, 5.0)), camera_to_world(truth))
    assert errors == pytest.approx((0, 0, 0, 0), abs=1e-6)


def test_orientation_error_is_not_told_by_positions_on_a_line():
    truth, predicted = camera_to_world(random_poses(6)), camera_to_world(random_poses(6))
    predicted[:, :3, 3] = torch.arange(6.0)[:, None] * torch.tensor([1.0, 2.0, 0.0])
    errors = trajectory_errors(predicted, truth)
    assert errors is not None and errors.are_deg is None and errors.ate > 0
    # The first pose tells it.
    errors = trajectory_errors(predicted, truth, align_origin=True)
    turns = [
        Rotation.from_matrix((poses[0, :3, :3].T @ poses[:, :3, :3]).numpy()) for poses in (predicted, truth)
    ]
    angles = np.rad2deg((turns[0].inv() * turns[1]).magnitude())
    assert errors is not None and errors.are_deg == pytest.approx(np.sqrt(np.mean(angles**2)), rel=1e-6)


# Depth


def test_depth_errors_by_hand():
    truth = torch.tensor([[[1.0, 2.0, 4.0, 9.0]]])
    predicted = torch.tensor([[[1.0, 2.0, 2.0, 50.0]]])
    valid = torch.tensor([[[True, True, True, False]]])
    errors = depth_errors(predicted, truth, valid)
    assert errors.absrel == pytest.approx(0.5 / 3)
    assert errors.delta125 == pytest.approx(200 / 3)
    # An even number of pixels: the scale is 1.5, the mean of the middle two of 1, 1, 2, 3.
    errors = depth_errors(
        torch.ones(1, 1, 4), torch.tensor([[[1.0, 1.0, 2.0, 3.0]]]), torch.ones(1, 1, 4).bool()
    )
    assert errors.absrel == pytest.approx((0.5 + 0.5 + 0.25 + 0.5) / 4)


def test_depth_errors_take_one_scale_for_the_clip():
    truth = 1 + torch.rand(2, 6, 7, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 6, 7).bool()
    assert depth_errors(0.1 * truth, truth, valid).absrel == pytest.approx(0, abs=1e-6)
    assert depth_errors(0.1 * truth, truth, valid).delta125 == 100
    two_scales = truth * torch.tensor([1.0, 2.0])[:, None, None]
    assert depth_errors(two_scales, truth, valid).absrel > 0.3
    assert depth_errors(truth, truth, ~valid) is None


# Points


def test_unprojected_points_project_back_to_the_pixel_centres():
    clip = render_room(2, 3, 28, 42)
    points = unproject(clip.depth, clip.intrinsics, clip.world_to_camera)
    assert points.shape == (3, 28, 42, 3)
    for frame, row, column in [(0, 0, 0), (1, 27, 41), (2, 13, 5)]:
        pose = clip.world_to_camera[frame]
        seen = clip.intrinsics[frame] @ (pose[:, :3] @ points[frame, row, column] + pose[:, 3])
        expected = torch.tensor([column + 0.5, row + 0.5, 1]) * clip.depth[frame, row, column]
        torch.testing.assert_close(seen, expected, atol=1e-3, rtol=1e-4)


def test_masked_points_are_those_of_the_mask_in_its_order():
    clip = render_room(2, 3, 28, 42)
    mask = torch.rand(3, 28, 42, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[1] = False
    points = unproject(clip.depth, clip.intrinsics, clip.world_to_camera)
    found = masked_points(clip.depth, clip.intrinsics, clip.world_to_camera, mask)
    torch.testing.assert_close(found, points[mask])


def test_similarity_agrees_with_evo():
    from evo.core.geometry import umeyama_alignment

    random = np.random.default_rng(0)
    for reflected in (False, True):
        source = random.normal(size=(30, 3))
        target = (
            2.5 * source @ Rotation.random(random_state=1).as_matrix()
            + [1, 2, 3]
            + 0.3 * random.normal(size=(30, 3))
        )
        target = target * [1, 1, -1] if reflected else target
        scale, rotation, translation = similarity_alignment(
            torch.from_numpy(source), torch.from_numpy(target)
        )
        expected_rotation, expected_translation, expected_scale = umeyama_alignment(
            source.T, target.T, with_scale=True
        )
        assert scale.item() == pytest.approx(expected_scale)
        np.testing.assert_allclose(rotation, expected_rotation, atol=1e-10)
        np.testing.assert_allclose(translation, expected_translation, atol=1e-10)


def test_point_error_by_hand():
    cube = torch.tensor([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
    assert point_error(3 * cube + 5, cube) == pytest.approx(0, abs=1e-6)
    # All points in one place: the best that scale 0 can do is the middle, sqrt(3) from each corner.
    assert point_error(torch.ones(8, 3), cube) == pytest.approx(math.sqrt(3))
    assert point_error(cube[:3], cube[:3]) is None


# Everything together


def exact_predictions(clip: Clip, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """What a model without error would return: poses in a world of its own, in a unit of its own."""
    poses = in_other_world(clip.world_to_camera.double(), scale)
    quaternion = torch.from_numpy(Rotation.from_matrix(poses[:, :, :3].numpy()).as_quat())
    height, width = clip.height / 2 / clip.intrinsics[:, 1, 1], clip.width / 2 / clip.intrinsics[:, 0, 0]
    field_of_view = 2 * torch.atan(torch.stack([height, width], dim=1).double())
    encoding = torch.cat([poses[:, :, 3], quaternion, field_of_view], dim=1).float()
    return {"pose_enc": encoding[None], "depth": (scale * clip.depth)[None, ..., None]}


def test_exact_predictions_have_no_error():
    clip = render_room(1, 5, 42, 56)
    result = evaluate_predictions(exact_predictions(clip, scale=0.3), clip)
    assert list(result) == KEYS
    assert [result[key] for key in ("auc5", "auc15", "auc30", "delta125")] == [100] * 4
    assert result["rotation_deg"] < 1e-3
    assert result["translation_deg"] < 1e-2
    assert result["absrel"] < 1e-6
    assert result["point_error"] < 1e-4


def test_errors_grow_with_what_is_wrong():
    clip = render_room(1, 5, 42, 56)
    predictions = exact_predictions(clip)
    predictions["pose_enc"][0, 2, :3] += 0.5
    predictions["depth"][0, 1] *= 1.5
    result = evaluate_predictions(predictions, clip)
    assert result["auc30"] < 95
    assert result["rotation_deg"] < 1e-3
    # A fifth of the pixels is off by a half.
    assert result["absrel"] == pytest.approx(0.1, abs=1e-4)
    assert result["delta125"] == pytest.approx(80)
    assert result["point_error"] > 0.1


def test_many_points_are_sampled_evenly():
    clip = render_room(1, 6, 224, 224)
    predictions = exact_predictions(clip)
    predictions["depth"] = predictions["depth"] * (1 + 0.1 * torch.sin(40 * predictions["depth"]))
    pose, intrinsics = decode_pose_encoding(predictions["pose_enc"][0], 224, 224)
    every_point = point_error(
        unproject(predictions["depth"][0, ..., 0], intrinsics, pose).view(-1, 3),
        unproject(clip.depth, clip.intrinsics, clip.world_to_camera).view(-1, 3),
    )
    assert evaluate_predictions(predictions, clip)["point_error"] == pytest.approx(every_point, rel=0.01)


def test_what_is_not_known_is_none():
    clip = render_room(1, 3, 28, 28)
    predictions = exact_predictions(clip)
    bare = evaluate_predictions(predictions, Clip("bare", clip.images))
    assert bare == dict.fromkeys(KEYS)
    assert evaluate_predictions({}, clip) == dict.fromkeys(KEYS)

    no_depth = evaluate_predictions({"pose_enc": predictions["pose_enc"]}, clip)
    assert [key for key in KEYS if no_depth[key] is None] == ["absrel", "delta125", "point_error"]
    no_poses = evaluate_predictions({"depth": predictions["depth"]}, clip)
    assert [key for key in KEYS if no_poses[key] is not None] == ["absrel", "delta125"]

    single = evaluate_predictions({key: value[:, :1] for key, value in predictions.items()}, clip.select([0]))
    assert [key for key in KEYS if single[key] is None] == KEYS[:5]
    assert single["absrel"] < 1e-6

    unmeasured = Clip(
        "dark", clip.images, clip.intrinsics, clip.world_to_camera, torch.zeros_like(clip.depth)
    )
    dark = evaluate_predictions(predictions, unmeasured)
    assert [key for key in KEYS if dark[key] is None] == ["absrel", "delta125", "point_error"]


def test_predictions_that_do_not_belong_to_the_clip_are_refused():
    clip = render_room(1, 3, 28, 28)
    predictions = exact_predictions(clip)
    with pytest.raises(PaceError) as caught:
        evaluate_predictions(predictions, clip.select([0, 1]))
    assert str(caught.value) == "predictions['pose_enc'] must be [1, 2, 9] for this clip, got [1, 3, 9]"
    predictions["depth"][0, 1, 2, 3] = math.nan
    with pytest.raises(PaceError) as caught:
        evaluate_predictions(predictions, clip)
    assert str(caught.value) == "predictions['depth'] holds values that are not finite"
