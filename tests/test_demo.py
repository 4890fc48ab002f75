"""The demo and the command line, on tiny clips."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hosts import tiny_vggt
from PIL import Image
from plyfile import PlyData

from pacevggt_patch import PaceConfig, PaceWeights
from pacevggt_patch.cli import demo, pictures
from pacevggt_patch.cli.demo import BUNDLED_CLIP, format_table, load_evenly, run_demo
from pacevggt_patch.cli.main import main
from pacevggt_patch.clips import load_clip, save_clip
from pacevggt_patch.evaluation.timing import time_interleaved
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.mini.scenes.rooms import render_room
from pacevggt_patch.runtime.files import whole_file, write_json

REAL_CLIPS = os.environ.get("PACEVGGT_REAL_CLIPS")
KEYS = {
    "mode",
    "backbone", "clip", "frames", "keep_ratio", "merge_budget", "weights", "seconds_stock", "seconds_pace", "speedup",
    "seconds_range_stock", "seconds_range_pace", "stock", "pace", "environment",
}  # fmt: skip
FILES = ["depth.png", "points.ply", "points.png", "report.json", "tokens.png"]


@pytest.fixture(autouse=True)
def once(monkeypatch):
    """Each run is timed once, whatever the command asks for."""
    monkeypatch.setattr(
        demo, "time_interleaved", lambda runs, _, *args, **kw: time_interleaved(runs, 1, *args, **kw)
    )


def write_photos(folder: Path, count: int) -> Path:
    for i, image in enumerate(render_room(5, count).images):
        pixels = (image.permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(pixels).resize((120, 90)).save(folder / f"photo{i}.jpg")
    return folder


def test_report_and_pictures(tmp_path):
    for name in FILES:  # of an earlier demo
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes(b"")
    report = run_demo(tmp_path / "out", frames=3, weights=None, repeats=1, device="cpu")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert report.keys() == KEYS
    assert (report["backbone"], report["frames"], report["keep_ratio"]) == ("vggt-mini", 3, 0.3)
    assert (report["mode"], report["merge_budget"], report["weights"]) == (
        "global",
        None,
        "none (training-free)",
    )
    assert report["speedup"] == pytest.approx(report["seconds_stock"] / report["seconds_pace"])
    for side in ("stock", "pace"):
        assert report[side].keys() == {"auc30", "rotation_deg", "absrel"}
        assert 0 <= report[side]["auc30"] <= 100 and 0 < report[side]["absrel"] < 0.3
    assert report["stock"] != report["pace"]
    for name in ("tokens.png", "depth.png", "points.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert np.asarray(image.convert("L")).std() > 10
    vertices = PlyData.read(tmp_path / "out" / "points.ply")["vertex"]
    assert vertices.count == pytest.approx(3 * 224 * 224 / 2, rel=0.01)
    assert np.isfinite(vertices["x"]).all() and vertices["red"].std() > 5
    table = format_table(report)
    assert "camera AUC@30" in table and f"{report['speedup']:.1f}x" in table


def test_clips_too_short_to_gain_are_pruned_all_the_same(tmp_path, monkeypatch):
    """As on a GPU, where a few frames of VGGT-mini would run the stock aggregator."""
    monkeypatch.setattr("pacevggt_patch.patching.state.pruning_pays", lambda *_: False)
    report = run_demo(tmp_path, frames=2, weights=None, repeats=1, device="cpu")
    assert (tmp_path / "tokens.png").is_file() and report["stock"] != report["pace"]


@pytest.mark.parametrize(
    ("arguments", "mode", "merge"),
    [
        ([], "global", None),
        (["--mode", "pre-aa"], "pre-aa", None),
        (["--merge-budget", "0.2"], "pre-aa", 0.2),
    ],
)
def test_the_bundled_weights_of_the_mode_are_shown(tmp_path, capsys, arguments, mode, merge):
    given = ["demo", "--frames", "2", "--out", str(tmp_path), "--device", "cpu", *arguments]
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert f"keep ratio 0.3, {mode} pruning, weights bundled pace-vggt-mini-{mode}" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["mode"], report["merge_budget"]) == (mode, merge)
    assert report["stock"] != report["pace"]


def test_folder_of_images_has_no_ground_truth(tmp_path, capsys):
    status = main(
        [
            "demo",
            "--clip",
            str(write_photos(tmp_path, 2)),
            "--out",
            str(tmp_path / "out"),
            "--weights",
            "none",
        ]
    )
    assert status == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["stock"] == report["pace"] == {"auc30": None, "rotation_deg": None, "absrel": None}
    assert report["frames"] == 2
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.split() == ["camera", "AUC@30", "(percent,", "higher", "is", "better)", "-", "-"]
        for line in lines
    )


@pytest.mark.parametrize("mode", ["global", "pre-aa"])
def test_keeping_everything_is_stock(tmp_path, mode):
    report = run_demo(tmp_path, frames=2, keep_ratio=1.0, mode=mode, repeats=1, device="cpu")
    assert report["stock"] == report["pace"] and sorted(p.name for p in tmp_path.iterdir()) == FILES


@pytest.mark.parametrize("name", ["redkitchen", "herzjesu_p25", "fox"])
@pytest.mark.skipif(
    not REAL_CLIPS, reason="set PACEVGGT_REAL_CLIPS to a folder of real clips with ground truth"
)
def test_real_clips(name, tmp_path):
    report = run_demo(tmp_path, Path(str(REAL_CLIPS)) / name, frames=4, weights=None, repeats=1, device="cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES
    assert report["pace"]["auc30"] is not None
    assert (report["pace"]["absrel"] is not None) == (name == "redkitchen")


@pytest.mark.parametrize(
    "total,frames,taken", [(9, 3, [0, 4, 8]), (9, 4, [0, 2, 4, 6]), (9, None, range(9)), (9, 1, [0])]
)
def test_frames_are_spread_over_the_clip(tmp_path, total, frames, taken):
    save_clip(render_room(3, total, 28, 28), tmp_path)
    every = load_clip(tmp_path, width=224, mode="square")
    assert torch.equal(load_evenly(tmp_path, frames).images, every.images[list(taken)])


def test_bundled_clip_has_24_frames():
    assert len(load_evenly(BUNDLED_CLIP, None)) == 24


@pytest.mark.parametrize(
    "arguments,named",
    [
        (["--clip", "no_such_folder"], "no_such_folder does not exist"),
        (["--keep-ratio", "7"], "keep_ratio"),
        (["--mode", "global", "--merge-budget", "0.2"], "merge_budget"),
        (["--frames", "99"], "99"),
        (["--frames", "0"], "frames"),
        (["--weights", "missing.safetensors"], "missing.safetensors does not exist"),
        (["--device", "abacus"], "'abacus'"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_nothing_is_written(arguments, named, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("pacevggt: ") and named in error
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert main(["demo", "--frames", "2", "--out", str(tmp_path / "out")]) == 2
    assert f"pacevggt: {tmp_path / 'out'}" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_interrupt_leaves_no_half_written_file(tmp_path, monkeypatch, capsys):
    def interrupted(figure, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, path, **_: interrupted(figure, path)
    )
    assert main(["demo", "--frames", "2", "--out", str(tmp_path / "out"), "--weights", "none"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.json"]


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


def test_kept_tokens_are_bright_and_others_dark():
    image = torch.full((3, 28, 42), 0.5)
    drawn = pictures.overlay_kept(image, torch.tensor([0, 5]), (2, 3))
    for row, column, bright in ((5, 5, True), (5, 20, False), (5, 40, False), (20, 5, False), (20, 40, True)):
        assert (drawn[:, row, column] == 0.5).all() if bright else drawn[:, row, column].max() < 0.2
    assert (drawn[:, :14, :14] == 0.5).all() and (drawn[:, 14:, 28:] == 0.5).all()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, ["kept patch tokens (25%)", "take part in global attention", "take their change from them"]),
        (PaceConfig(0.25, mode="global"), ["take their change from them"]),
        (PaceConfig(0.25, mode="pre-aa"), ["frame and global attention", "the others, merged into them"]),
        (PaceConfig(0.25, 0.375, "pre-aa"), ["50% of them merged", "the rest pruned"]),
        (PaceConfig(0.25, 0.0, "pre-aa"), ["0% of them merged"]),
    ],
)
def test_the_picture_of_tokens_says_what_became_of_them(config, said, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, _: titles.append(figure.get_suptitle()))
    images, kept = torch.rand(8, 3, 28, 56), torch.tensor([[0, 7]] * 8)
    pictures.save_token_picture(tmp_path / "tokens.png", images, kept, (2, 4), config)
    assert all(words in titles[0] for words in said)


def test_nearer_points_hide_farther_ones():
    centre = torch.tensor([0.0, 0.0, 1.0])
    eye = torch.tensor([0.0, -0.9, -0.9])
    points = torch.stack([torch.lerp(eye, centre, t) for t in (1.0, 0.5, 1.5)])
    colours = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    image = pictures.splat(points, colours, centre, 40, 60)
    assert image[20, 30].tolist() == [0, 1, 0]
    assert (image != 1).any(-1).sum() == 4


def test_a_full_disk_is_named(monkeypatch, tmp_path, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert main(["demo", "--frames", "2", "--out", str(tmp_path), "--weights", "none"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("pacevggt: ") and "tokens.png" in error and "No space left" in error
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


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
