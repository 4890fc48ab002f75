"""What pruning costs VGGT-mini with the bundled weights."""

import statistics

import pytest
import torch

from pacevggt_patch import accelerate, calibrate, remove
from pacevggt_patch.evaluation import evaluate_predictions
from pacevggt_patch.method import full_heads, propagation
from pacevggt_patch.mini import build_mini
from pacevggt_patch.mini.scenes.rooms import render_room

SETTINGS = {
    "stock": {"keep_ratio": 1.0},
    "default": {},
    "pre-aa": {"mode": "pre-aa"},
}


@pytest.fixture(scope="module")
def rooms():
    return [render_room(1_000_000 + i, 8) for i in range(3)]


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


# ---- what the constants were chosen for


@pytest.fixture(scope="module")
def calibrated(rooms):
    """Weights that say which heads see all tokens, and nothing else."""
    return calibrate(build_mini(), rooms[0].images)


def absrel(rooms, weights) -> float:
    return measured(accelerate(build_mini(), weights=weights), rooms[:2])["absrel"]


def test_the_ridge_of_the_regression(rooms, calibrated, monkeypatch):
    """A weaker one costs a model without full-attention heads, a stronger one a model with them."""
    alone, chosen = absrel(rooms, None), absrel(rooms, calibrated)
    monkeypatch.setattr(propagation, "RIDGE", propagation.RIDGE * 30)
    assert absrel(rooms, calibrated) > 1.015 * chosen
    monkeypatch.setattr(propagation, "RIDGE", propagation.RIDGE / 900)
    assert absrel(rooms, None) > 1.015 * alone


def test_the_error_from_which_on_a_head_sees_all_tokens(rooms, calibrated, monkeypatch):
    """The five heads pay; with a larger error two are left, and depth is lost."""
    chosen = absrel(rooms, calibrated)
    monkeypatch.setattr(full_heads, "LEAST_ERROR", full_heads.LEAST_ERROR * 3)
    fewer = calibrate(build_mini(), rooms[0].images)
    assert len(fewer.full_heads) < len(calibrated.full_heads) == 5
    assert absrel(rooms, fewer) > 1.05 * chosen
