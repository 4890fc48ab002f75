"""What pruning costs VGGT-mini with the bundled weights."""

import statistics

import pytest
import torch

from pacevggt_patch import accelerate, calibrate, remove
from pacevggt_patch.evaluation import evaluate_predictions
from pacevggt_patch.method import full_heads, propagation
from pacevggt_patch.mini import build_mini
from pacevggt_patch.mini.scenes.rooms import render_room

SETTINGS = [{"keep_ratio": 1.0}, {}, {"mode": "pre-aa"}]


@pytest.fixture(scope="module")
def rooms():
    return [render_room(1_000_000 + i, 8) for i in range(3)]


def measured(model, rooms) -> dict[str, float]:
    """Means over the rooms."""
    with torch.inference_mode():
        found = [evaluate_predictions(model(room.images), room) for room in rooms]
    return {key: statistics.fmean(one[key] for one in found) for key in ("auc30", "absrel")}


def loss(stock, other) -> tuple[float, float]:
    """Shares of AUC@30 lost and of AbsRel gained."""
    return 1 - other["auc30"] / stock["auc30"], other["absrel"] / stock["absrel"] - 1


def test_the_default_loses_little_and_pre_aa_pruning_more(rooms):
    """One test, so that processes which share the tests do not measure twice."""
    model = build_mini()
    stock, default, pre_aa = (measured(accelerate(remove(model), **settings), rooms) for settings in SETTINGS)
    assert stock["auc30"] > 75 and stock["absrel"] < 0.07  # the unpruned model is a real one
    cameras, depth = loss(stock, default)
    assert cameras < 0.03 and depth < 0.08
    assert cameras < loss(stock, pre_aa)[0] < 0.12
    assert depth < loss(stock, pre_aa)[1] < 0.35


# ---- what the constants were chosen for


@pytest.fixture(scope="module")
def calibrated(rooms):
    """Weights that say which heads see all tokens, and nothing else."""
    return calibrate(build_mini(), rooms[0].images)


def absrel(rooms, weights) -> float:
    return measured(accelerate(build_mini(), weights=weights), rooms[:2])["absrel"]


@pytest.fixture(scope="module")
def chosen(rooms, calibrated):
    """AbsRel with these weights and the constants as they are."""
    return absrel(rooms, calibrated)


def test_the_ridge_of_the_regression(rooms, calibrated, chosen, monkeypatch):
    """A weaker one costs a model without full-attention heads, a stronger one a model with them."""
    alone = absrel(rooms, None)
    monkeypatch.setattr(propagation, "RIDGE", propagation.RIDGE * 30)
    assert absrel(rooms, calibrated) > 1.015 * chosen
    monkeypatch.setattr(propagation, "RIDGE", propagation.RIDGE / 900)
    assert absrel(rooms, None) > 1.015 * alone


def test_the_error_from_which_on_a_head_sees_all_tokens(rooms, calibrated, chosen, monkeypatch):
    """The five heads pay; with a larger error two are left, and depth is lost."""
    monkeypatch.setattr(full_heads, "LEAST_ERROR", full_heads.LEAST_ERROR * 3)
    fewer = calibrate(build_mini(), rooms[0].images)
    assert len(fewer.full_heads) < len(calibrated.full_heads) == 5
    assert absrel(rooms, fewer) > 1.05 * chosen
