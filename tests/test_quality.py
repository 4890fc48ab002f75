"""What pruning costs VGGT-mini, without any training and with the bundled weights."""

import statistics

import pytest
import torch

from pacevggt_patch import accelerate, remove
from pacevggt_patch.cli.demo import BUNDLED_CLIP
from pacevggt_patch.clips import load_clip
from pacevggt_patch.evaluation import evaluate_predictions
from pacevggt_patch.mini import build_mini
from pacevggt_patch.mini.scenes.rooms import render_room

NONE, BUNDLED = None, "auto"  # weights
SETTINGS: list[tuple[float, str | None]] = [(1.0, NONE), (0.5, NONE), (0.3, NONE), (0.3, BUNDLED)]


@pytest.fixture(scope="module")
def results():
    """Metrics of the bundled clip (24 frames) and of four rooms, by keep ratio and weights."""
    model = build_mini()
    clips = [load_clip(BUNDLED_CLIP, width=224), *(render_room(1_000_000 + i, 8) for i in range(4))]
    found = {}
    for ratio, weights in SETTINGS:
        # A model that is accelerated already keeps its weights on "auto".
        accelerate(remove(model), ratio, weights=weights)
        with torch.inference_mode():
            found[ratio, weights] = [evaluate_predictions(model(clip.images), clip) for clip in clips]
    return found


def mean(results, ratio: float, key: str, weights: str | None = NONE) -> float:
    return statistics.fmean(result[key] for result in results[ratio, weights])


def test_unpruned_model_is_a_real_one(results):
    assert mean(results, 1.0, "auc30") > 75
    assert mean(results, 1.0, "absrel") < 0.07


def test_cameras_lose_less_than_a_quarter(results):
    assert mean(results, 0.3, "auc30") > 0.75 * mean(results, 1.0, "auc30")
    assert mean(results, 0.5, "auc30") > mean(results, 0.3, "auc30")
    bundled = {ratio: rows[0]["auc30"] for (ratio, weights), rows in results.items() if weights is NONE}
    assert bundled[0.3] > 0.75 * bundled[1.0]


def test_depth_loses_less_than_two_thirds(results):
    assert mean(results, 0.3, "absrel") < 1.67 * mean(results, 1.0, "absrel")


def test_the_bundled_weights_pay(results):
    assert mean(results, 0.3, "auc30", BUNDLED) > mean(results, 0.3, "auc30")
    assert mean(results, 0.3, "absrel", BUNDLED) < mean(results, 0.3, "absrel")
