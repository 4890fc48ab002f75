"""Distances between clouds and intervals of changes, against the same written out, and SciPy's bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from scipy.stats import bootstrap

from pacevggt_patch.errors import PaceError
from pacevggt_patch.evaluation import clouds
from pacevggt_patch.evaluation.clouds import (
    box_of,
    cloud_errors,
    fit_to_box,
    normals,
    sample,
    tree_of,
    voxel_means,
)
from pacevggt_patch.evaluation.intervals import change_of_mean


def surface(count: int, seed: int = 0) -> np.ndarray:
    """[N, 3] points of a wavy floor, two metres wide."""
    random = np.random.default_rng(seed)
    places = random.uniform(-1, 1, (count, 2))
    return np.column_stack([places, 0.2 * np.sin(3 * places[:, 0])])


# ---- voxels


def voxel_means_by_hand(points, size):
    low = [min(p[axis] for p in points) - size / 2 for axis in range(3)]
    cells = {}
    for point in points:
        key = tuple(math.floor((point[axis] - low[axis]) / size) for axis in range(3))
        cells.setdefault(key, []).append(point)
    return sorted(tuple(np.mean(held, axis=0)) for held in cells.values())


def test_voxels_hold_the_means_of_their_points():
    points = np.random.default_rng(0).normal(size=(400, 3)) * [0.3, 0.1, 2]
    found = voxel_means(points, 0.25)
    assert 50 < len(found) < 300
    np.testing.assert_allclose(sorted(map(tuple, found)), voxel_means_by_hand(points, 0.25), atol=1e-12)
    # One point so far off that its voxel has no number in 64 bits.
    far = voxel_means(np.concatenate([points, [[1e18, 1e18, -1e18]]]), 0.05)
    assert np.isfinite(far).all()


def test_voxels_of_few_points_are_the_points():
    points = np.array([[0.0, 0, 0], [1, 0, 0], [0, 2, 0]])
    assert sorted(map(tuple, voxel_means(points, 0.05))) == sorted(map(tuple, points))
    np.testing.assert_allclose(voxel_means(points, 50.0), points.mean(0)[None])


# ---- distances


def distances_by_hand(points, others):
    """Distance to the nearest, and which it is, for each point, one after another."""
    found = []
    for point in points:
        squares = [sum((a - b) ** 2 for a, b in zip(point, other, strict=True)) for other in others]
        found.append((math.sqrt(min(squares)), squares.index(min(squares))))
    return found


def normal_by_hand(point, points, count):
    """The direction in which the nearest points of a cloud spread least."""
    near = sorted(points, key=lambda other: ((other - point) ** 2).sum())[:count]
    centred = np.array(near) - np.mean(near, axis=0)
    return np.linalg.svd(centred)[2][2]


def test_errors_agree_with_brute_force(monkeypatch):
    monkeypatch.setattr(clouds, "NEIGHBOURS", 8)
    predicted = surface(300) + np.random.default_rng(1).normal(scale=0.02, size=(300, 3))
    predicted[:10] += [0, 0, 1.5]  # beyond the clip
    truth = surface(250, seed=5)[:, [0, 1, 2]] * [1.2, 1, 1]
    found = cloud_errors(predicted, truth, voxel=0.1, clip=0.4)

    predicted = np.array(voxel_means_by_hand(predicted, 0.1))
    truth = np.array(voxel_means_by_hand(truth, 0.1))
    there, back = distances_by_hand(predicted, truth), distances_by_hand(truth, predicted)
    accuracy = sum(d for d, _ in there) / len(there)
    completeness = sum(d for d, _ in back) / len(back)
    clipped = sum(min(d, 0.4) for d, _ in there) / len(there) + sum(min(d, 0.4) for d, _ in back) / len(back)
    own = [normal_by_hand(point, predicted, 8) for point in predicted]
    true = [normal_by_hand(point, truth, 8) for point in truth]
    cosines = [abs(own[i] @ true[j]) for i, (_, j) in enumerate(there)]
    back_cosines = [abs(true[i] @ own[j]) for i, (_, j) in enumerate(back)]
    assert found == pytest.approx(
        (
            accuracy,
            completeness,
            accuracy + completeness,
            clipped,
            (np.mean(cosines) + np.mean(back_cosines)) / 2,
        ),
        rel=1e-9,
    )
    assert found.chamfer_clipped < found.chamfer


def test_a_cloud_is_no_distance_from_itself():
    points = surface(2000)
    found = cloud_errors(points, points)
    assert found == pytest.approx((0, 0, 0, 0, 1), abs=1e-12)


def test_accuracy_and_completeness_are_told_apart():
    points = surface(4000)
    half = points[points[:, 0] < 0]
    found, swapped = cloud_errors(half, points), cloud_errors(points, half)
    assert found.accuracy < 0.03 and found.completeness > 0.2
    assert (swapped.accuracy, swapped.completeness) == pytest.approx((found.completeness, found.accuracy))


def test_without_points_there_is_no_error_and_with_few_no_normal():
    nothing, points = np.zeros((0, 3)), surface(50)
    assert cloud_errors(nothing, points) is None and cloud_errors(points, nothing) is None
    found = cloud_errors(points[:2], points)
    assert found.normal_consistency is None and found.chamfer > 0


def test_normals_of_a_plane_stand_on_it():
    turn = Rotation.random(random_state=0).as_matrix()
    places = np.random.default_rng(0).uniform(-1, 1, (200, 3)) * [1, 1, 0]
    points = places @ turn.T + 3
    found = normals(points, tree_of(points))
    np.testing.assert_allclose(np.abs(found @ turn[:, 2]), 1, atol=1e-9)


def test_scipy_is_asked_for_by_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.spatial", None)
    with pytest.raises(PaceError, match=r"\[eval\]"):
        cloud_errors(surface(10), surface(10))


# ---- the published alignment


def test_boxes_are_fitted_by_diagonal_and_centre():
    points, target = surface(100), surface(100, seed=3) * 4 + [7, -2, 1]
    found = fit_to_box(points, box_of(points), box_of(target))
    for ends in (found, target):
        assert ends.shape == (100, 3)
    np.testing.assert_allclose(found.min(0) + found.max(0), target.min(0) + target.max(0))
    lengths = [np.linalg.norm(ends.max(0) - ends.min(0)) for ends in (found, target)]
    assert lengths[0] == pytest.approx(lengths[1])
    scale = (found[1] - found[0]) / (points[1] - points[0])
    np.testing.assert_allclose(scale, scale[0])  # one for all axes
    # Some of the points go where they would go among all.
    assert np.array_equal(fit_to_box(points[::7], box_of(points), box_of(target)), found[::7])
    one = np.ones((5, 3))
    assert np.allclose(fit_to_box(one, box_of(one), box_of(target)), (target.min(0) + target.max(0)) / 2)


def test_samples_are_the_same_every_time_and_without_repetition():
    points = surface(1000)
    found = sample(points, 300)
    assert np.array_equal(found, sample(points, 300)) and not np.array_equal(found, sample(points, 300, 1))
    assert len(np.unique(found, axis=0)) == 300 == len(found)
    assert {tuple(point) for point in found} <= {tuple(point) for point in points}
    assert sample(points, 1000) is points


# ---- intervals


def values(count: int, seed: int, change: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    before = random.gamma(4, 1, count)
    return before, change * before * random.normal(1, 0.1, count)


def test_intervals_agree_with_scipy():
    before, after = values(30, 0, 1.2)
    found = change_of_mean(before, after)
    assert found.percent == pytest.approx(100 * (after.mean() / before.mean() - 1))

    def statistic(first, second, axis):
        return 100 * (second.mean(axis) / first.mean(axis) - 1)

    expected = bootstrap(
        (before, after), statistic, paired=True, vectorized=True, method="percentile", n_resamples=10_000
    ).confidence_interval
    wide = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.06 * wide)
    assert found.high == pytest.approx(expected.high, abs=0.06 * wide)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    held = 0
    for seed in range(100):
        found = change_of_mean(*values(20, seed, 1.1))
        held += found.low <= 10 <= found.high
    assert 85 <= held <= 99


def test_intervals_are_the_same_at_every_call_and_narrower_for_more_scenes():
    found = change_of_mean(*values(10, 0))
    assert found == change_of_mean(*values(10, 0))
    many = change_of_mean(*values(1000, 0))
    assert found.low <= found.percent <= found.high
    assert many.high - many.low < (found.high - found.low) / 4
    before, _ = values(10, 0)
    assert change_of_mean(before, 1.5 * before) == pytest.approx((50, 50, 50))


def test_where_there_is_no_interval_or_no_change():
    assert change_of_mean([], []) is None
    assert change_of_mean([0.0, 0.0], [1.0, 2.0]) is None
    assert change_of_mean([2.0], [3.0]) == (50.0, None, None)
    # Samples whose mean is 0 before say nothing.
    found = change_of_mean([0.0, 1.0], [1.0, 1.0])
    assert found.percent == 100 and math.isfinite(found.low) and math.isfinite(found.high)
