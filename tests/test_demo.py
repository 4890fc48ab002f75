"""`pacevggt demo`, which is `compare` with VGGT-mini and the bundled clip, and the rest of the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import tiny_vggt

from pacevggt_patch import PaceWeights
from pacevggt_patch.cli.main import main
from pacevggt_patch.compare import compare
from pacevggt_patch.evaluation.timing import time_interleaved
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.runtime.files import whole_file, write_json

REAL_CLIPS = os.environ.get("PACEVGGT_REAL_CLIPS")
FILES = ["report.html", "report.json"]


def test_the_demo_shows_the_bundled_weights_of_both_modes(tmp_path, capsys):
    given = ["demo", "--frames", "3", "--repeats", "1", "--out", str(tmp_path), "--device", "cpu"]
    assert main([*given, "--mode", "global,pre-aa"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    (clip,) = report["clips"]
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert report["backbone"] == "VGGT-mini" and clip["path"] is None and clip["frames"] == 3
    for setting, mode, full in zip(clip["settings"], ("global", "pre-aa"), (5, 0), strict=True):
        assert setting["weights"].startswith(f"bundled pace-vggt-mini-{mode} (")
        assert setting["weights"] in printed and setting["full_heads"] == full
        # A trained model and its accelerated one see the same room.
        assert setting["agreement"]["rotation_deg"]["median"] < 10 and setting["truth"]["absrel"] < 0.3
        assert setting["agreement"]["depth"]["median"] < 0.1 and setting["truth"] != clip["stock"]["truth"]
    assert (
        clip["settings"][0]["agreement"]["depth"]["median"]
        < clip["settings"][1]["agreement"]["depth"]["median"]
    )


def test_clips_too_short_to_gain_are_pruned_all_the_same(tmp_path, monkeypatch):
    """As on a GPU, where a few frames of VGGT-mini would run the stock aggregator."""
    monkeypatch.setattr("pacevggt_patch.patching.state.pruning_pays", lambda *_: False)
    given = ["--weights", "none", "--device", "cpu", "--merge-budget", "0.2"]
    assert main(["demo", "--frames", "2", "--repeats", "1", "--out", str(tmp_path), *given]) == 0
    (setting,) = json.loads((tmp_path / "report.json").read_text())["clips"][0]["settings"]
    assert (setting["mode"], setting["merge_budget"], setting["kept_tokens"]) == ("pre-aa", 0.2, 77)
    assert setting["agreement"]["depth"]["median"] > 0


@pytest.mark.parametrize("name", ["redkitchen", "herzjesu_p25", "fox"])
@pytest.mark.skipif(
    not REAL_CLIPS, reason="set PACEVGGT_REAL_CLIPS to a folder of real clips with ground truth"
)
def test_real_clips(name, tmp_path):
    folder = Path(str(REAL_CLIPS)) / name
    report = compare("mini", [folder], out=tmp_path, frames=4, weights=None, repeats=1, device="cpu")
    (clip,) = report["clips"]
    (setting,) = clip["settings"]
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert setting["truth"]["auc30"] is not None
    assert (setting["truth"]["absrel"] is not None) == (name == "redkitchen")
    assert setting["agreement"]["depth"]["median"] > 0


def test_whole_file_keeps_the_old_one_when_writing_fails(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(file, {"a": float("nan")})

    def fill_up():
        with whole_file(file) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fill_up()
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_runs_are_interleaved_and_the_first_is_not_counted():
    calls = []
    timings = time_interleaved(
        {"a": lambda: calls.append("a") or len(calls), "b": lambda: calls.append("b")}, 2, "cpu"
    )
    assert calls == ["a", "b"] * 3
    assert len(timings["a"].seconds) == 2 and timings["a"].median > 0
    assert timings["a"].result == 5 and timings["a"].peak_gib is None


@pytest.mark.parametrize("module", ["pacevggt_patch", "pacevggt_patch.cli.main"])
def test_module_and_version(module):
    shown = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith("pacevggt-patch ")


def test_the_cache_is_shown_and_cleared(cache, capsys):
    from pacevggt_patch.weights.cache import store

    assert main(["cache"]) == 0
    assert f"0 kept in {cache}" in capsys.readouterr().out
    paths = [store(PaceWeights.of_heads(find_host(tiny_vggt(seed=seed)), ((0, 1),), {})) for seed in range(2)]
    (cache / "notes.txt").write_text("mine")
    assert main(["cache"]) == 0
    printed = capsys.readouterr().out
    assert f"2 kept in {cache}" in printed and all(path.name in printed for path in paths)
    assert main(["cache", "--clear"]) == 0
    assert f"deleted 2 from {cache}" in capsys.readouterr().out
    assert [path.name for path in cache.iterdir()] == ["notes.txt"]


def test_a_cache_that_is_off(monkeypatch, capsys):
    monkeypatch.setenv("PACEVGGT_CACHE", "off")
    assert main(["cache", "--clear"]) == 0
    assert "PACEVGGT_CACHE is off" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["one_line", "separate_calls"])
def test_examples(name):
    script = Path(__file__).resolve().parent.parent / "examples" / f"{name}.py"
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", script], capture_output=True, text=True, check=True
    )
    tokens = "tokens of the last layer: [1, 8, 261, 512] | kept of each frame: 77"
    assert ("depth" if name == "one_line" else tokens) in shown.stdout
