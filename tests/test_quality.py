"""What pruning costs VGGT-mini with the bundled weights."""

import statistics

import pytest
import torch

from pacevggt_patch import accelerate, remove
from pacevggt_patch.evaluation import evaluate_predictions
from pacevggt_patch.mini import build_mini
from pacevggt_patch.mini.scenes.rooms import render_room

SETTINGS = {
    "stock": {"keep_ratio": 1.0},
    "default": {},
    "pre-aa": {"mode": "pre-aa"},
}


@pytest.fixture(scope="module")
def rooms():
    return [render_room(1_000_000 + i, 8) for i in range(4)]


def measured(model, rooms) -> dict[str, float]:
    """Means over the rooms."""
    with torch.inference_mode():
        found = [evaluate_predictions(model(room.images), room) for room in rooms]
    return {key: statistics.fmean(one[key] for one in found) for key in ("auc30", "absrel")}


@pytest.fixture(scope="module")
def results(rooms):
    model = build_mini()
    return {
        name: measured(accelerate(remove(model), **settings), rooms) for name, settings in SETTINGS.items()
    }


def loss(results, name: str) -> tuple[float, float]:
    """Shares of AUC@30 lost and of AbsRel gained."""
    stock, other = results["stock"], results[name]
    return 1 - other["auc30"] / stock["auc30"], other["absrel"] / stock["absrel"] - 1


def test_the_unpruned_model_is_a_real_one(results):
    assert results["stock"]["auc30"] > 75
    assert results["stock"]["absrel"] < 0.07


def test_the_default_loses_little(results):
    cameras, depth = loss(results, "default")
    assert cameras < 0.03 and depth < 0.08


def test_pre_aa_pruning_loses_more(results):
    cameras, depth = loss(results, "pre-aa")
    assert loss(results, "default")[0] < cameras < 0.12
    assert loss(results, "default")[1] < depth < 0.35
