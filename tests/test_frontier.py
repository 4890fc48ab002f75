"""Quality against cost: what is measured, how pairs are counted, and the report that goes on where it stopped."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from hosts import random_images, tiny_vggt, with_heads

from pacevggt_patch import PaceError, accelerate
from pacevggt_patch.clips import save_clip
from pacevggt_patch.method.few_keys import FRAMES, keys_of_frame
from pacevggt_patch.mini.scenes.rooms import render_room
from pacevggt_patch.runtime.attention import InterceptAttention

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

frontier = importlib.import_module("frontier")
peers = importlib.import_module("peers")


def test_each_rule_is_measured_as_published_and_on_from_there():
    whole, quick = frontier.settings(300, False), frontier.settings(300, True)
    assert {type(one.rule) for one in quick if one.rule} == set(peers.RULES)
    for found in (whole, quick):
        assert len({(one.line, one.value) for one in found}) == len(found)
        for rule in peers.RULES:  # its fields as they are
            (first,) = (one for one in found if one.rule == rule())
            assert next(one for one in found if one.line == first.line) == first
        ours = {(one.line, one.value) for one in found if one.rule is None}
        assert ours == {(line, ratio) for line in frontier.OURS for ratio in frontier.RATIOS}
    assert all(
        sum(one.line == line for one in quick) == 2 for line in {one.line for one in quick if one.rule}
    )
    (more,) = (
        one for one in frontier.settings(24, True) if one.rule is None and one.value not in frontier.RATIOS
    )
    assert more == frontier.Setting("training-free", frontier.MATCHED[24])
    assert len(frontier.settings(8, False)) < len(whole)  # 25 and 12 key frames are the same there


@pytest.mark.parametrize("frames", [6, 30])
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_pairs_of_ours_are_those_that_are_computed(frames, ratio):
    """At 6 frames all keys are there; at 30 those of other heads are a sample."""
    assert (keys_of_frame(frames, 10, FRAMES) < 10) == (frames == 30)
    model, images, pairs = tiny_vggt(), random_images(frames), 0
    accelerate(model, ratio, weights=with_heads(model, (1, 0), (2, 1)), min_frames=1)

    def count(run, query, key, value, options):
        nonlocal pairs
        if query.shape[2] > 50:  # neither a frame's tokens nor the cameras'
            pairs += query.shape[:3].numel() * key.shape[2]
        return run(query, key, value)

    with torch.inference_mode(), InterceptAttention(count):
        model(images)
    share = frontier.share_of_ours(model, frames, *images.shape[-2:])
    assert share == pytest.approx(pairs / (4 * 2 * (frames * 25) ** 2))


@pytest.fixture
def few(monkeypatch):
    """One rule and one line of ours, on a model that takes no time."""
    monkeypatch.setattr(frontier, "build_mini", lambda checkpoint: tiny_vggt())
    found = [
        frontier.Setting("FastVGGT", 0.9, peers.FastVGGT()),
        frontier.Setting("calibrated", 0.3),
    ]
    monkeypatch.setattr(frontier, "settings", lambda frames, quick: found)
    return found


def test_a_report_is_written_and_gone_on_with(few, tmp_path, capsys, monkeypatch):
    arguments = ["--out", str(tmp_path), "--quick", "--lengths", "2", "--counts", "2"]
    measure, times = frontier.measure, []

    def stops(model, clips, bar=None):
        times.append(len(clips))
        if len(times) == 3:
            raise KeyboardInterrupt
        return measure(model, clips, bar)

    monkeypatch.setattr(frontier, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        frontier.main(arguments)
    file = tmp_path / "frontier-quick.json"
    before = json.loads(file.read_text())["rows"]
    assert [row["line"] for row in before] == ["unpruned", "FastVGGT"]
    assert frontier.main(arguments) == 0
    assert times == [2, 2, 2, 2]  # nothing that was there is measured again
    report = json.loads(file.read_text())
    assert report["rows"][:2] == before
    assert [row["line"] for row in report["rows"]] == ["unpruned", *(one.line for one in few)]
    assert [one["count"] for one in report["lengths"]] == [2]
    for row in report["rows"]:
        assert len(row["per_clip"]) == 2 and row["absrel_change_error"] is not None
        assert row["pairs"] == 1 if row["line"] == "unpruned" else 0 < row["pairs"] < 1
    for name in ("frontier-auc.png", "frontier-absrel.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    captured = capsys.readouterr()
    assert "min" in captured.err and "calibrated" in captured.out
    with pytest.raises(PaceError, match="--out"):
        frontier.main([*arguments, "--seed", "5"])


def test_windows_of_a_folder(few, tmp_path, capsys):
    save_clip(render_room(5, 6, 56, 56), tmp_path / "walk")
    arguments = [
        "--clips",
        str(tmp_path / "walk"),
        "--out",
        str(tmp_path),
        "--stride",
        "2",
        "--starts",
        "0,1",
    ]
    with pytest.raises(PaceError, match="walk"):
        frontier.main([*arguments, "--lengths", "2,4"])  # the folder has 6 frames
    assert not (tmp_path / "frontier.json").exists()
    assert frontier.main([*arguments, "--lengths", "2"]) == 0
    report = json.loads((tmp_path / "frontier.json").read_text())
    (of,) = report["lengths"]
    assert (of["clips"], of["count"], of["starts"], of["stride"]) == ("walk", 2, [0, 1], 2)
    assert [len(row["per_clip"]) for row in report["rows"]] == [2, 2, 2]


def a_row(line, frames, pairs, auc30):
    row = {"line": line, "frames": frames, "pairs": pairs, "value": 1.0, "auc30_change": auc30}
    return row | {"auc30_change_error": None, "absrel_change": None, "absrel_change_error": None}


def test_a_panel_for_each_length_and_a_line_for_each_rule(tmp_path, monkeypatch, capsys):
    figures = []
    monkeypatch.setattr(frontier, "save_figure", lambda figure, path: figures.append(figure))
    rows = [
        a_row("unpruned", 8, 1.0, 0.0),
        a_row("AVGGT", 8, 0.3, -90.0),
        a_row("AVGGT, all blocks global", 8, 0.35, -5.0),
        a_row("calibrated", 8, 0.2, -1.0),
        a_row("calibrated", 8, 0.1, -4.0),
        a_row("calibrated", 24, 0.2, 0.5),
    ]
    clips = [{"frames": frames, "count": 1, "clips": "rooms"} for frames in (8, 24)]
    report = {"lengths": clips, "rows": rows}
    frontier.draw(report, "auc30", frontier.PAIRS, tmp_path / "auc.png")
    first, second = figures[0].axes
    drawn = {bars.get_label(): bars.lines[0] for bars in first.containers}
    assert list(drawn) == ["AVGGT", "AVGGT, all blocks global", "pacevggt-patch, calibrated"]
    assert drawn["pacevggt-patch, calibrated"].get_xydata().tolist() == [[10, 4], [20, 1]]  # percent lost
    assert drawn["AVGGT"].get_color() == drawn["AVGGT, all blocks global"].get_color()
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == list(drawn)
    assert [axis.get_title() for axis in (first, second)] == ["1 room, 8 views", "1 room, 24 views"]
    frontier.draw(report, "absrel", frontier.PAIRS, tmp_path / "absrel.png")
    assert len(figures) == 1 and "absrel.png" in capsys.readouterr().err

    seconds = tmp_path / "seconds.json"
    timed = [
        {"line": line, "value": 1.0, "frames": 8, "speedup": speedup}
        for line, speedup in (("unpruned", 1.0), ("AVGGT", 2.5), ("calibrated", None))
    ]
    seconds.write_text(json.dumps({"rows": timed, "attention": "flash-attention 3 (fa3_fwd_interface)"}))
    fast = frontier.with_speedups(report, seconds)
    assert [(row["line"], row["speedup"]) for row in fast["rows"]] == [("unpruned", 1.0), ("AVGGT", 2.5)]
    frontier.draw(fast, "auc30", frontier.speedup_of(fast), tmp_path / "speedup.png")
    (axis,) = figures[1].axes  # nothing of 24 views was timed
    assert axis.get_xlabel().endswith("(ours with FlashAttention-3)")
    assert frontier.speedup_of(fast | {"attention": "torch SDPA"}) == frontier.SPEEDUP
    assert axis.containers[0].lines[0].get_xydata().tolist() == [[2.5, 90]]


def test_bundled_weights_take_the_time_of_calibrated_ones(tmp_path):
    seconds = tmp_path / "seconds.json"
    seconds.write_text(
        json.dumps(
            {"rows": [{"line": "calibrated", "value": 1.0, "frames": 8, "speedup": 4.0}], "attention": ""}
        )
    )
    rows = [a_row(line, 8, 0.2, -1.0) for line in ("training-free", "bundled weights", "calibrated")]
    found = frontier.with_speedups({"rows": rows}, seconds)["rows"]
    assert [(row["line"], row["speedup"]) for row in found] == [("bundled weights", 4.0), ("calibrated", 4.0)]


def test_a_file_that_is_no_report_is_left_alone(few, tmp_path):
    file = tmp_path / "frontier.json"
    for content in ('{"rows": 1}', "[]", "no JSON"):
        file.write_text(content)
        with pytest.raises(PaceError, match="frontier.json"):
            frontier.main(["--out", str(tmp_path), "--lengths", "2"])
        assert file.read_text() == content


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--out", "missing"], "missing"),
        (["--lengths", "8,24", "--counts", "3"], "--counts"),
        (["--lengths", "8,8", "--counts", "3,3"], "--lengths"),
        (["--lengths", "1"], "--lengths"),
        (["--lengths", "8", "--counts", "0"], "--counts"),
        (["--clips", "folder"], "--lengths"),
        (["--clips", "folder", "--lengths", "8", "--counts", "3"], "--starts"),
        (["--seconds", "missing.json"], "--seconds"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PaceError, match=named):
        frontier.main(["--out", str(tmp_path), *arguments])


def test_the_table_names_the_cheapest_of_ours_that_is_ahead():
    tables = importlib.import_module("write_tables")

    def row(line, pairs, auc30, absrel):
        return {
            "line": line,
            "value": pairs,
            "pairs": pairs,
            "auc30": auc30,
            "absrel": absrel,
        }

    rule = row("FastVGGT", 0.2, 80.0, 0.04)
    rows = [
        rule,
        row("unpruned", 1.0, 88.0, 0.03),
        row("training-free", 0.1, 79.0, 0.03),  # fewer pairs, worse cameras
        row("training-free", 0.15, 81.0, 0.05),  # worse depth
        row("calibrated", 0.25, 85.0, 0.03),  # more pairs
        row("bundled weights", 0.15, 85.0, 0.03),  # trained
    ]
    assert tables.ahead_of(rule, rows) == "none"
    rows += [row("calibrated", 0.2, 85.0, 0.03), row("calibrated", 0.18, 81.0, 0.035)]
    assert tables.ahead_of(rule, rows) == "calibrated 0.18"
