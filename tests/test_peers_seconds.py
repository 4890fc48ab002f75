"""Seconds of rules and of this package at a model's shape: which settings are timed, and which heads see all."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
from hosts import tiny_vggt

from pacevggt_patch import PaceError, is_accelerated
from pacevggt_patch.hosts.base import find_host

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

frontier = importlib.import_module("frontier")
peers_seconds = importlib.import_module("peers_seconds")


def test_heads_of_a_larger_model_are_as_many_and_as_deep():
    small = find_host(tiny_vggt()).spec()
    large = dataclasses.replace(small, depth=3 * small.depth, num_heads=2 * small.num_heads)
    heads = peers_seconds.same_depth(((1, 0), (2, 1)), small, large)
    assert heads == (
        *[(block, head) for block in (3, 4, 5) for head in (0, 1)],
        *[(block, head) for block in (6, 7, 8) for head in (2, 3)],
    )
    assert peers_seconds.same_depth(((1, 0),), small, small) == ((1, 0),)
    with pytest.raises(PaceError, match="multiples"):
        peers_seconds.same_depth(((1, 0),), small, dataclasses.replace(small, depth=small.depth + 1))


def test_every_setting_is_timed_once_and_the_model_is_left_as_it_was(tmp_path, monkeypatch):
    model, ran = tiny_vggt(), []
    spec = find_host(model).spec()
    monkeypatch.setattr(peers_seconds, "build", lambda *arguments: model)
    monkeypatch.setattr(peers_seconds, "bundled_heads", lambda: (((1, 0),), spec))

    def forward(some, precision):
        def run(images):
            ran.append((len(images[0]), is_accelerated(some), "forward" in some.aggregator.__dict__))
            some(images)

        return run

    monkeypatch.setattr(peers_seconds, "forward", forward)
    file = tmp_path / "seconds.json"
    arguments = ["--backbone", "mini", "--device", "cpu", "--precision", "float32", "--size", "70x56"]
    assert (
        peers_seconds.main(
            [*arguments, "--frames", "3", "--repeats", "2", "--no-warm-up", "--json", str(file)]
        )
        == 0
    )
    report = json.loads(file.read_text())
    assert report["full_heads"] == {"training-free": 0, "calibrated": 1, "bundled weights": 1}
    rows = report["rows"]
    untimed = {"bundled weights", "block-sparse"}
    expected = {(one.line, one.value) for one in frontier.settings(3, True)}
    expected = {(line, value) for line, value in expected if line not in untimed}
    assert {(row["line"], row["value"]) for row in rows} == expected | {("unpruned", 1.0)}
    assert len(rows) == 1 + len(expected) and rows[0]["speedup"] == 1
    assert all(row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"] for row in rows)
    assert len(ran) == 1 + 2 * len(rows)
    file.write_text(json.dumps(report | {"rows": rows[:-1]}))  # it goes on behind what is there
    assert (
        peers_seconds.main(
            [*arguments, "--frames", "3", "--repeats", "2", "--no-warm-up", "--json", str(file)]
        )
        == 0
    )
    again = json.loads(file.read_text())["rows"]
    assert again[:-1] == rows[:-1] and again[-1]["line"] == rows[-1]["line"]
    assert len(ran) == 2 + 2 * (len(rows) + 1)
    for content in ("[]", json.dumps(report | {"seed": 5})):
        file.write_text(content)
        with pytest.raises(PaceError, match="seconds.json"):
            peers_seconds.main([*arguments, "--frames", "3", "--repeats", "2", "--json", str(file)])
    del ran[1 + 2 * len(rows) :]
    assert sum(accelerated for _, accelerated, _ in ran) == 2 * 2 * len(frontier.RATIOS)  # two lines of ours
    assert not is_accelerated(model) and "forward" not in model.aggregator.__dict__
