"""The demo and the command line, on tiny clips."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from plyfile import PlyData

from pacevggt_patch.cli.demo import BUNDLED_CLIP, format_table, load_evenly, run_demo
from pacevggt_patch.cli.main import main as cli
from pacevggt_patch.cli.main import pictures
from pacevggt_patch.clips import load_clip, save_clip
from pacevggt_patch.evaluation.timing import time_interleaved
from pacevggt_patch.method.selection import KEPT, MERGED, PRUNED
from pacevggt_patch.mini.scenes.rooms import render_room
from pacevggt_patch.runtime.files import whole_file, write_json

REAL_CLIPS = os.environ.get("PACEVGGT_REAL_CLIPS")
KEYS = {
    "dense_frames",
    "backbone", "clip", "frames", "keep_ratio", "merge_budget", "weights", "seconds_stock", "seconds_pace", "speedup",
    "seconds_range_stock", "seconds_range_pace", "stock", "pace", "environment",
}  # fmt: skip
FILES = ["depth.png", "points.ply", "points.png", "report.json", "tokens.png"]


def write_photos(folder: Path, count: int) -> Path:
    for i, image in enumerate(render_room(5, count).images):
        pixels = (image.permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(pixels).resize((120, 90)).save(folder / f"photo{i}.jpg")
    return folder


def test_report_and_pictures(tmp_path):
    report, written, skipped = run_demo(tmp_path / "out", frames=3, weights=None, repeats=1, device="cpu")
    assert sorted(written) == FILES and skipped == []
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert report.keys() == KEYS
    assert (report["backbone"], report["frames"], report["keep_ratio"]) == ("vggt-mini", 3, 0.3)
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
    monkeypatch.setattr("pacevggt_patch.patching.install.pruning_pays", lambda *_: False)
    report, written, _ = run_demo(tmp_path, frames=2, weights=None, repeats=1, device="cpu")
    assert "tokens.png" in written and report["stock"] != report["pace"]


def test_dense_frames(tmp_path, capsys):
    arguments = ["demo", "--frames", "2", "--out", str(tmp_path), "--dense-frames", "--device", "cpu"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "keep ratio 0.3, dense frames, weights bundled pace-vggt-mini-dense-frames" in printed
    assert json.loads((tmp_path / "report.json").read_text())["dense_frames"] is True


def test_folder_of_images_has_no_ground_truth(tmp_path, capsys):
    status = cli.main(
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


def test_keeping_everything_is_stock(tmp_path):
    report = run_demo(tmp_path, frames=2, keep_ratio=1.0, weights=None, repeats=1, device="cpu").report
    assert report["stock"] == report["pace"]


@pytest.mark.parametrize("name", ["redkitchen", "herzjesu_p25", "fox"])
@pytest.mark.skipif(
    not REAL_CLIPS, reason="set PACEVGGT_REAL_CLIPS to a folder of real clips with ground truth"
)
def test_real_clips(name, tmp_path):
    report = run_demo(
        tmp_path, Path(str(REAL_CLIPS)) / name, frames=4, weights=None, repeats=1, device="cpu"
    ).report
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
    "arguments,message",
    [
        (["--clip", "no_such_folder"], "pacevggt: no_such_folder is not a folder"),
        (["--keep-ratio", "7"], "pacevggt: keep_ratio must be in (0, 1], got 7"),
        (["--frames", "99"], "not the 99 asked for"),
        (["--frames", "0"], "pacevggt: frames must be at least 1, got 0"),
        (["--weights", "missing.safetensors"], "pacevggt: missing.safetensors does not exist"),
        (["--device", "abacus"], "pacevggt: device 'abacus' can't be used"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_nothing_is_written(arguments, message, tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert cli.main(["demo", "--frames", "2", "--out", str(tmp_path / "out")]) == 2
    message = f"pacevggt: {tmp_path / 'out'} can't be made a folder for the results: File exists\n"
    assert capsys.readouterr().err.endswith(message)
    assert (tmp_path / "out").read_text() == "mine"


def test_interrupt_leaves_no_half_written_file(tmp_path, monkeypatch, capsys):
    def interrupted(figure, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, path, **_: interrupted(figure, path)
    )
    assert cli.main(["demo", "--frames", "2", "--out", str(tmp_path / "out"), "--weights", "none"]) == 130
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


def test_overlay_shows_roles():
    image = torch.full((3, 28, 42), 0.5)
    drawn = pictures.overlay_roles(image, torch.tensor([KEPT, MERGED, PRUNED, PRUNED, MERGED, KEPT]), (2, 3))
    assert torch.equal(drawn[:, :14, :14], image[:, :14, :14])
    assert drawn[2, 5, 20] > drawn[0, 5, 20]  # blue
    assert drawn[:, 5, 40].max() < 0.2  # dark
    assert torch.equal(drawn[:, 20, 40], image[:, 20, 40])


def test_nearer_points_hide_farther_ones():
    centre = torch.tensor([0.0, 0.0, 1.0])
    eye = torch.tensor([0.0, -0.9, -0.9])
    points = torch.stack([torch.lerp(eye, centre, t) for t in (1.0, 0.5, 1.5)])
    colours = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    image = pictures.splat(points, colours, centre, 40, 60)
    assert image[20, 30].tolist() == [0, 1, 0]
    assert (image != 1).any(-1).sum() == 4


def test_without_drawing_libraries_the_table_still_comes(monkeypatch, tmp_path, capsys):
    for name in ("matplotlib", "plyfile"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["demo", "--frames", "2", "--out", str(tmp_path), "--weights", "none"]) == 0
    shown = capsys.readouterr()
    assert "speed-up" in shown.out and f"wrote {tmp_path}/: report.json" in shown.out
    for name, library in (("tokens.png: pictures", "matplotlib"), ("points.ply: point clouds", "plyfile")):
        assert f"left out: {name} need {library}: pip install 'pacevggt-patch[demo]'" in shown.err
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_runs_are_interleaved_and_the_first_is_not_counted():
    calls = []
    timings = time_interleaved(
        {"a": lambda: calls.append("a") or len(calls), "b": lambda: calls.append("b")}, 2, "cpu"
    )
    assert calls == ["a", "b"] * 3
    assert len(timings["a"].seconds) == 2 and timings["a"].median > 0
    assert timings["a"].result == 5 and timings["a"].peak_gib is None


def test_module_and_version():
    shown = subprocess.run(
        [sys.executable, "-m", "pacevggt_patch.cli.main", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.startswith("pacevggt-patch ")


@pytest.mark.parametrize("name", ["one_line", "separate_calls"])
def test_examples(name):
    script = Path(__file__).resolve().parent.parent / "examples" / f"{name}.py"
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", script], capture_output=True, text=True, check=True
    )
    assert (
        "depth" if name == "one_line" else "dense tokens of the last layer: [1, 8, 261, 512]"
    ) in shown.stdout
