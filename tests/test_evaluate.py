"""`pacevggt evaluate`, with a small VGGT-mini of random weights on tiny scenes in the layouts of both data sets."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hosts_doubles import DOUBLES
from scannet import mesh_points, write_scene
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation
from seven_scenes import write_scene as write_seven_scenes
from test_clouds import voxel_means_by_hand
from test_metrics import evo_errors, in_other_world, nudge

import pacevggt_patch
from pacevggt_patch import PaceError, is_accelerated
from pacevggt_patch.cli.main import main
from pacevggt_patch.clips import Clip, load_scannet, load_seven_scenes, save_clip
from pacevggt_patch.clips.seven_scenes import Calibration
from pacevggt_patch.compare.runs import Prediction, memory_kept
from pacevggt_patch.evaluate import evaluate, protocols
from pacevggt_patch.evaluate.picture import differences, save_changes
from pacevggt_patch.evaluate.plan import Options, frame_size, make_plan
from pacevggt_patch.evaluate.protocols import METRICS, choose_frames, measure, published_points
from pacevggt_patch.evaluate.runs import SceneRunner
from pacevggt_patch.evaluate.summary import format_table, markdown, summarise
from pacevggt_patch.evaluation import evaluate_predictions
from pacevggt_patch.evaluation.clouds import sample
from pacevggt_patch.evaluation.geometry import camera_to_world, thinned
from pacevggt_patch.evaluation.intervals import change_of_mean
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.mini import MiniConfig, build_mini, save_mini
from pacevggt_patch.mini.scenes.rooms import render_room

SMALL = MiniConfig(28, 14, 32, 2, 1, 4, (0, 1, 2, 3), 1, 2, 8, (8, 8, 8, 8))
ROOT = Path(__file__).parents[1]
NAMES = ("scene0000_00", "scene0001_00", "scene0002_01")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A checkpoint of a VGGT-mini of a few thousand parameters."""
    path = tmp_path_factory.mktemp("backbone") / "small.safetensors"
    save_mini(build_mini(False, SMALL), path)
    return str(path)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Three scenes of ScanNet with meshes; in the second one two frames lost tracking."""
    folder = tmp_path_factory.mktemp("scans")
    for number, name in enumerate(NAMES):
        write_scene(folder / name, 6 + number, lost=(0, 3) if number == 1 else (), mesh=True)
    return folder


@pytest.fixture
def own_scans(scans, tmp_path):
    """The same, to be broken."""
    return shutil.copytree(scans, tmp_path / "scans")


def run(data, out, backbone, dataset="scannet", **given):
    """An evaluation that is over soon."""
    width = None if given.get("protocol") == "published" else 56
    given = {"weights": None, "frames": 4, "width": width, **given}
    return evaluate(data, dataset, out=out, backbone=backbone, device="cpu", **given)


def result_of(out, scene):
    return json.loads((out / "scenes" / f"{scene}.json").read_text())


@pytest.fixture(scope="module")
def evaluated(backbone, scans, tmp_path_factory):
    """What was written about the three scenes, and the summary."""
    out = tmp_path_factory.mktemp("evaluated")
    return out, run(scans, out, backbone, keep_ratios=[0.5, 0.25])


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes most of the time of a tiny run: that of `evaluated`, which is there before, does it."""
    monkeypatch.setattr("pacevggt_patch.evaluate.command.save_changes", lambda *_: None)


# ---- what is written


def test_every_scene_is_measured_and_written(evaluated):
    out, summary = evaluated
    assert sorted(path.name for path in out.iterdir()) == [
        "changes.png",
        "run.json",
        "scenes",
        "summary.json",
        "summary.md",
    ]
    assert sorted(path.name for path in (out / "scenes").iterdir()) == [f"{name}.json" for name in NAMES]
    assert json.loads((out / "summary.json").read_text()) == summary
    assert (summary["scenes"], summary["frames"], summary["frames_left_out"]) == (
        3,
        {"least": 4, "most": 4},
        2,
    )
    found = result_of(out, NAMES[1])
    assert (found["frames_with_pose"], found["frames_left_out"], found["frame_numbers"]) == (
        5,
        2,
        [0, 1, 3, 4],
    )
    assert [side["name"] for side in found["sides"]] == ["stock", "global 0.5", "global 0.25"]
    assert [side["kept_tokens"] for side in found["sides"]] == [16, 8, 4]
    for side in found["sides"]:
        assert side["fits"] and side["seconds"] > 0
        assert set(side["metrics"]) == set(METRICS)
        assert all(value is not None and np.isfinite(value) for value in side["metrics"].values())


@pytest.mark.filterwarnings("ignore:.*left out")
def test_metrics_are_those_of_the_model_called_by_hand(evaluated, scans, backbone):
    out, _ = evaluated
    model = build_mini(backbone)
    clip = load_scannet(scans / NAMES[1], width=56, mode="square").select([0, 1, 3, 4])
    with torch.inference_mode():
        expected = evaluate_predictions(model(clip.images), clip)
        pacevggt_patch.accelerate(model, 0.25, weights=None, min_frames=1)
        accelerated = evaluate_predictions(model(clip.images), clip)
    sides = result_of(out, NAMES[1])["sides"]
    for key in ("auc5", "auc15", "auc30", "absrel", "delta125"):
        assert sides[0]["metrics"][key] == pytest.approx(expected[key], rel=1e-4)
        assert sides[2]["metrics"][key] == pytest.approx(accelerated[key], rel=1e-4)
    assert sides[0]["metrics"]["absrel"] != sides[2]["metrics"]["absrel"]


def test_the_summary_has_means_and_changes_of_all_scenes(evaluated):
    out, summary = evaluated
    results = [result_of(out, name) for name in NAMES]
    for key in METRICS:
        stock = [result["sides"][0]["metrics"][key] for result in results]
        other = [result["sides"][2]["metrics"][key] for result in results]
        found = summary["sides"][2]["metrics"][key]
        assert found["mean"] == pytest.approx(statistics.fmean(other)) and found["scenes"] == 3
        assert found["change"] == (lambda change: change and change._asdict())(change_of_mean(stock, other))
        assert summary["sides"][0]["metrics"][key]["change"] is None
    assert summary["sides"][0]["speedup"] == 1
    page = (out / "summary.md").read_text()
    assert page == markdown(summary)
    for text in ("camera AUC@30", "chamfer clipped", "global 0.25", "2 frames without a pose", "corrected"):
        assert text in page and text in format_table(summary)
    assert (out / "changes.png").read_bytes()[:4] == b"\x89PNG"


def test_test_sequences_of_7_scenes_are_scenes(backbone, tmp_path):
    folder = tmp_path / "data"
    write_seven_scenes(folder / "chess", {3: 5}, (3,), Calibration())
    write_seven_scenes(folder / "heads", {1: 4}, (1,), Calibration())
    summary = run(folder, tmp_path / "out", backbone, "7scenes")
    assert summary["settings"]["scenes"] == {"chess/seq-03": 5, "heads/seq-01": 4}
    assert sorted(path.name for path in (tmp_path / "out" / "scenes").iterdir()) == [
        "chess-seq-03.json",
        "heads-seq-01.json",
    ]
    model = build_mini(backbone)
    clip = load_seven_scenes(folder / "heads", sequence=1, width=56, mode="square")
    with torch.inference_mode():
        expected = evaluate_predictions(model(clip.images), clip)
    found = result_of(tmp_path / "out", "heads-seq-01")["sides"][0]["metrics"]
    assert found["absrel"] == pytest.approx(expected["absrel"], rel=1e-4)


def test_folders_need_cameras_but_neither_depth_nor_metres(backbone, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")  # left over from elsewhere: this process is the only one
    data = tmp_path / "data"
    room = render_room(3, 5, 56, 56)
    save_clip(Clip("a room", room.images, room.intrinsics, room.world_to_camera), data / "bare")
    description = json.loads((data / "bare" / "clip.json").read_text())
    (data / "bare" / "clip.json").write_text(json.dumps({**description, "pose_unit": "arbitrary"}))
    save_clip(room, data / "whole")
    arguments = ["--dataset", "folder", "--backbone", backbone, "--weights", "none", "--device", "cpu"]
    arguments += ["--stride", "1", "--frames", "5", "--keep-ratios", "0.5", "--out", str(tmp_path / "out")]
    assert main(["evaluate", str(data), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "not measured in 1 scene (bare): there is no true depth" in printed
    assert "not measured in 1 scene (bare): poses are not in metres" in printed
    assert "1 of 2 scenes" in printed and str(tmp_path / "out") in printed
    bare, whole = (result_of(tmp_path / "out", name)["sides"][1]["metrics"] for name in ("bare", "whole"))
    assert {key for key, value in bare.items() if value is None} == {
        *(
            "absrel",
            "delta125",
            "accuracy",
            "completeness",
            "chamfer",
            "chamfer_clipped",
            "normal_consistency",
        ),
        *("ate", "rpe_translation"),
    }
    assert all(value is not None for value in whole.values())

    (data / "whole" / "clip.json").unlink()
    assert main(["evaluate", str(data), *arguments[:-1], str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert "scene whole" in said and "no images" in said


@pytest.mark.parametrize("subject", DOUBLES, ids=lambda subject: subject.name)
def test_other_families_are_evaluated(subject, tmp_path):
    save_clip(render_room(3, 4, 64, 80), tmp_path / "room")
    width = 4 * subject.patch_size
    summary = run(
        tmp_path / "room", tmp_path / "out", subject.model(), "folder", width=width, keep_ratios=[0.5]
    )
    for side in summary["sides"]:
        assert all(found["mean"] is not None for found in side["metrics"].values())
    side = result_of(tmp_path / "out", "room")["sides"][1]
    assert side["kept_tokens"] < side["patches"]


# ---- going on


def test_an_interrupted_run_goes_on(evaluated, backbone, scans, tmp_path, monkeypatch, capsys):
    out, done = tmp_path / "out", []
    judge = SceneRunner.judge

    def stop_at_the_second(self, job, *others):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(job.name)
        return judge(self, job, *others)

    given = dict(keep_ratios=[0.5, 0.25])
    monkeypatch.setattr(SceneRunner, "judge", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt, match="after 1 of 3 scenes: the same command goes on"):
        run(scans, out, backbone, **given)
    assert not (out / "summary.json").exists()
    first = (out / "scenes" / f"{NAMES[0]}.json").read_bytes()
    # What a kill leaves of a file that was being written.
    (out / "scenes" / f".0123abcd.{NAMES[1]}.json").write_text("{")
    monkeypatch.setattr(SceneRunner, "judge", lambda *args: done.append(args[1].name) or judge(*args))
    summary = run(scans, out, backbone, **given)
    assert done == list(NAMES)
    assert (out / "scenes" / f"{NAMES[0]}.json").read_bytes() == first
    assert sorted(path.name for path in (out / "scenes").iterdir()) == [f"{name}.json" for name in NAMES]
    # As if there had been no interruption.
    for side, other in zip(summary["sides"], evaluated[1]["sides"], strict=True):
        for key in METRICS:
            assert side["metrics"][key] == other["metrics"][key]
    # And once more there is nothing to do but the summary.
    monkeypatch.setattr(SceneRunner, "run", None)
    assert run(scans, out, backbone, **given) == summary


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"frames": 5}, "--frames 4, not 5"),
        ({"keep_ratios": [0.5]}, "keep_ratios"),
        ({"protocol": "published"}, "protocol"),
        ({"most_scenes": 2}, "scenes"),
        ({"precision": "autocast"}, "precision"),
    ],
)
def test_a_folder_of_another_run_is_refused(given, word, evaluated, scans, backbone):
    out, _ = evaluated
    before = (out / "summary.json").read_bytes()
    with pytest.raises(PaceError) as caught:
        run(scans, out, backbone, **{"keep_ratios": [0.5, 0.25], **given})
    assert word in str(caught.value) and "another --out" in str(caught.value)
    assert (out / "summary.json").read_bytes() == before


def test_results_that_are_damaged_or_of_other_weights_are_refused(evaluated, scans, backbone, tmp_path):
    out = shutil.copytree(evaluated[0], tmp_path / "out")
    file = out / "scenes" / f"{NAMES[1]}.json"
    whole = file.read_text()
    file.write_text(whole[:100])
    with pytest.raises(PaceError, match=f"{NAMES[1]}.json"):
        run(scans, out, backbone, keep_ratios=[0.5, 0.25])
    found = json.loads(whole)
    found["sides"][1]["weights"] = "others"  # a name, which does not count
    file.write_text(json.dumps(found))
    run(scans, out, backbone, keep_ratios=[0.5, 0.25])
    found["sides"][1]["weights_digest"] = "others"
    file.write_text(json.dumps(found))
    with pytest.raises(PaceError) as caught:
        run(scans, out, backbone, keep_ratios=[0.5, 0.25])
    assert all(word in str(caught.value) for word in (NAMES[0], NAMES[1], "weights"))


def weights_of(backbone, file, *heads):
    """Weights in which these heads see all tokens."""
    pacevggt_patch.PaceWeights.of_heads(find_host(build_mini(backbone)), heads, {}).save(file)
    return str(file)


def test_files_are_told_by_what_they_hold(backbone, scans, tmp_path):
    """A checkpoint and weights that change under their names, and other folders of the same names, are refused."""
    out, checkpoint = tmp_path / "out", str(shutil.copy(backbone, tmp_path / "small.safetensors"))
    weights = weights_of(backbone, tmp_path / "pace.safetensors", (0, 0))
    given = dict(backbone=checkpoint, weights=weights, protocol="published", meshes=scans)

    def refused(data=scans, **others):
        before = {file: file.read_bytes() for file in out.rglob("*.*")}
        with pytest.raises(PaceError) as caught:
            run(data, out, **{**given, **others})
        assert {file: file.read_bytes() for file in out.rglob("*.*")} == before
        return str(caught.value)

    one = list_of(tmp_path, NAMES[0], NAMES[1])
    summary = run(scans, out, scenes=one, **given)
    # What may be published tells no folder.
    for file in out.rglob("*.json"):
        assert str(tmp_path) not in file.read_text() and str(scans) not in file.read_text()
    assert "pace.safetensors" in summary["sides"][1]["weights"]
    assert (summary["settings"]["backbone"], summary["settings"]["weights"]) == (
        "small.safetensors",
        "pace.safetensors",
    )
    (out / "scenes" / f"{NAMES[1]}.json").unlink()

    other = shutil.copytree(scans, tmp_path / "other" / scans.name)
    assert "another data:" in refused(other, scenes=one)
    assert "another meshes:" in refused(meshes=other, scenes=one)
    weights_of(backbone, tmp_path / "pace.safetensors", (1, 0))
    assert "another weights_digest:" in refused(scenes=one)
    weights_of(backbone, tmp_path / "pace.safetensors", (0, 0))
    head = build_mini(backbone)
    with torch.no_grad():
        next(head.depth_head.parameters()).add_(1)
    save_mini(head, checkpoint)
    assert "another checkpoint_digest:" in refused(scenes=one)
    shutil.copy(backbone, checkpoint)
    assert run(scans, out, scenes=one, **given)["settings"] == summary["settings"]


def test_a_loaded_model_runs_and_is_given_back_but_not_gone_on_with(scans, tmp_path):
    model = build_mini(False, SMALL).train()
    run(scans / NAMES[0], tmp_path / "out", model)
    assert not is_accelerated(model) and model.training
    with pytest.raises(PaceError, match="can't be told"):
        run(scans / NAMES[0], tmp_path / "out", model)


def test_calibration_is_on_the_first_scene_and_kept(scans, tmp_path, backbone):
    """With "auto", a model without weights has one calibration for all scenes, processes and later runs."""
    out = tmp_path / "out"
    run(scans, out, backbone, weights="auto")
    words = {name: result_of(out, name)["sides"][1]["weights"] for name in NAMES}
    assert len(set(words.values())) == 1 and NAMES[0] in words[NAMES[0]]
    heads = pacevggt_patch.PaceWeights.load(out / "calibration.safetensors").full_heads
    assert all(result_of(out, name)["sides"][1]["full_heads"] == len(heads) for name in NAMES)
    before = result_of(out, NAMES[0])
    (out / "scenes" / f"{NAMES[0]}.json").unlink()
    (out / "scenes" / f"{NAMES[2]}.json").unlink()
    run(scans, out, backbone, weights="auto")
    again = result_of(out, NAMES[0])
    assert [side["metrics"] for side in again["sides"]] == [side["metrics"] for side in before["sides"]]
    assert again["sides"][1]["weights"] == words[NAMES[0]]


def test_processes_that_cannot_meet_say_so(scans, backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PaceError, match="torchrun"):
        run(scans, tmp_path / "out", backbone)


# ---- what does not fit


def broken_picture(folder):
    file = folder / NAMES[1] / "color" / "5.jpg"
    file.write_bytes(file.read_bytes()[:2000])


def missing_pose(folder):
    (folder / NAMES[1] / "pose" / "4.txt").unlink()


def test_a_broken_scene_ends_the_run_with_its_name(own_scans, backbone, tmp_path):
    out = tmp_path / "out"
    broken_picture(own_scans)  # whose header is whole, so that only reading it tells
    with pytest.raises(PaceError, match=rf"scene {NAMES[1]}: .*5\.jpg"):
        run(own_scans, out, backbone)
    assert [path.name for path in (out / "scenes").iterdir()] == [f"{NAMES[0]}.json"]
    missing_pose(own_scans)
    with pytest.raises(PaceError, match=f"scene {NAMES[1]}: "):
        run(own_scans, tmp_path / "none", backbone)
    assert not (tmp_path / "none").exists()  # nothing had begun


def test_values_that_are_not_finite_end_the_run_with_the_name(scans, backbone, tmp_path, monkeypatch):
    measured = []

    def nan(self, images):
        outputs = self.model(images)
        measured.append(1)
        return {**outputs, "depth": outputs["depth"] * (np.nan if len(measured) > 8 else 1)}

    monkeypatch.setattr("pacevggt_patch.compare.runs.Runner.forward", nan)
    with pytest.raises(PaceError, match=rf"scene {NAMES[2]}: .*not finite"):
        run(scans, tmp_path / "out", backbone)


def list_of(folder, *names):
    file = folder / "list.txt"
    file.write_text("# the scenes\n" + "".join(f"{name}  # one\n" for name in names))
    return file


def names_of(data, backbone, **given):
    """Names of the scenes that are planned."""
    options = Options(data, "scannet", backbone=backbone, frames=4, device="cpu", **given)
    return [job.name for job in make_plan(options).jobs]


def test_lists_and_shares_of_scenes(scans, backbone, tmp_path):
    assert names_of(scans, backbone) == list(NAMES)
    assert names_of(scans, backbone, scenes=list_of(tmp_path, NAMES[2], NAMES[0])) == [NAMES[0], NAMES[2]]
    # Every floor(3 / 2)-th, at most two.
    assert names_of(scans, backbone, most_scenes=2) == [NAMES[0], NAMES[1]]
    assert names_of(scans, backbone, most_scenes=1) == [NAMES[0]]
    assert names_of(scans / NAMES[2], backbone) == [NAMES[2]]


@pytest.mark.parametrize(
    ("name", "width"), [("mini", 224), ("facebook/VGGT-1B", 518), ("pi3", 518), ("vggt-omega", 512)]
)
def test_the_width_of_frames_is_the_one_that_is_said(name, width, capsys):
    assert frame_size(Options(".", "scannet", backbone=name, protocol="published")).width == width
    page = (ROOT / "docs" / "evaluate.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| width"))
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert str(width) in row.split("|")[3] and str(width) in capsys.readouterr().out


REFUSED = {
    "no such data set": ({"dataset": "kitti"}, ["dataset", "scannet, 7scenes, folder", "kitti"]),
    "no such protocol": ({"protocol": "mine"}, ["protocol", "corrected, published", "mine"]),
    "no number of frames": ({"frames": None}, ["--frames", "--stride"]),
    "three frames": ({"frames": 3}, ["frames", "at least 4"]),
    "a stride that leaves too few": ({"frames": None, "stride": 3}, [NAMES[0], "2 frames"]),
    "published on 7-Scenes": ({"protocol": "published", "dataset": "7scenes"}, ["ScanNet", "7scenes"]),
    "published with a stride": ({"protocol": "published", "stride": 2}, ["published", "stride"]),
    "a width of half a patch": ({"width": 63}, ["width", "14"]),
    "no width": ({"width": 0}, ["width", "0"]),
    "published with a width": ({"protocol": "published", "width": 224}, ["published", "width"]),
    "meshes for corrected": ({"meshes": "."}, ["meshes", "published"]),
    "no such precision": ({"precision": "int8"}, ["precision", "int8"]),
    "no keep ratio": ({"keep_ratios": []}, ["keep ratio"]),
    "another data set": ({"dataset": "7scenes"}, [f"scene {NAMES[0]}", "TestSplit.txt"]),
    "no such backbone": ({"backbone": "none.safetensors"}, ["none.safetensors"]),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_does_not_fit_is_said_before_work_starts(case, scans, backbone, tmp_path):
    given, words = REFUSED[case]
    given = {"dataset": "scannet", "backbone": backbone, **given}
    with pytest.raises(PaceError) as caught:
        run(scans, tmp_path / "out", **given)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_scenes_that_are_missing_are_named(scans, backbone, tmp_path):
    chosen = list_of(tmp_path, NAMES[0], "scene0707_00", "scene0708_00")
    with pytest.raises(PaceError) as caught:
        run(scans, tmp_path / "out", backbone, scenes=chosen)
    assert all(
        word in str(caught.value) for word in ("2 of the 3", "scene0707_00, scene0708_00", str(chosen))
    )
    with pytest.raises(PaceError, match="names no scenes"):
        run(scans, tmp_path / "out", backbone, scenes=list_of(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(PaceError, match="no folders of scenes"):
        run(tmp_path / "empty", tmp_path / "out", backbone)
    with pytest.raises(PaceError, match="does not exist"):
        run(tmp_path / "nowhere", tmp_path / "out", backbone)


def test_folders_with_a_clip_json_are_told_from_other_data_sets(scans, backbone, tmp_path):
    clip = tmp_path / "clips" / "mine"
    clip.mkdir(parents=True)
    (clip / "clip.json").write_text("{}")
    for data, dataset in itertools.product((clip, clip.parent), ("scannet", "7scenes")):
        with pytest.raises(PaceError, match="mine.*clip.json.*--dataset folder"):
            run(data, tmp_path / "out", backbone, dataset)
    (scans / NAMES[0] / "clip.json").write_text("{}")  # beside frames of ScanNet it is nothing but a file
    try:
        assert names_of(scans / NAMES[0], backbone) == [NAMES[0]]
    finally:
        (scans / NAMES[0] / "clip.json").unlink()


def test_a_side_that_does_not_fit_is_told_and_the_other_stands(scans, backbone, tmp_path, monkeypatch):
    outputs = SceneRunner.run_side

    def only_accelerated(self, side, images, clip):
        if side.config is None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        outputs(self, side, images, clip)

    monkeypatch.setattr(SceneRunner, "run_side", only_accelerated)
    summary = run(scans, tmp_path / "out", backbone)
    stock, other = summary["sides"]
    assert stock["did_not_fit"] == list(NAMES) and stock["seconds"] is None and other["did_not_fit"] == []
    assert other["metrics"]["auc30"]["scenes"] == 3 and other["metrics"]["auc30"]["change"] is None
    assert "stock did not fit into memory in 3 scenes" in format_table(summary)

    def nothing(self, side, images, clip):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SceneRunner, "run_side", nothing)
    with pytest.raises(PaceError, match=f"scene {NAMES[0]}: .*take fewer"):
        run(scans, tmp_path / "none", backbone)
    with memory_kept(torch.device("cpu")) as fits:
        nothing(None, None, None, None)
    assert not fits


# ---- frames


@pytest.mark.parametrize("total", [4, 5, 37, 100, 1000])
def test_published_frames(total):
    """The first, then every floor((n - 1) / (N - 1))-th of the others, counted out."""
    for frames in (4, 10, 30):
        others, step = list(range(1, total)), max(1, (total - 1) // (frames - 1))
        expected, place = [0], 0
        while len(expected) < min(frames, total):
            expected.append(others[place])
            place += step
        assert choose_frames("published", total, frames) == expected[:frames]


@pytest.mark.parametrize("total", [4, 5, 37, 1000])
def test_corrected_frames_are_even_from_first_to_last(total):
    for frames in (4, 10, 30):
        found = choose_frames("corrected", total, frames)
        assert found[0] == 0 and found[-1] == total - 1 and len(found) == min(frames, total)
        steps = np.diff(found)
        assert steps.max() - steps.min() <= 1
    assert choose_frames("corrected", 10, None, stride=3) == [0, 3, 6, 9]
    assert choose_frames("corrected", 1000, 4, stride=10) == [0, 330, 660, 990]


# ---- the protocols' measures


def prediction_for(clip: Clip, degrees: float, metres: float, noise: float, scale: float = 0.4) -> Prediction:
    """The truth in another world, at another scale, off by a little."""
    poses = in_other_world(nudge(clip.world_to_camera.double(), degrees, metres), scale)
    random = np.random.default_rng(2)
    factor = torch.from_numpy(random.normal(1, noise, clip.depth.shape)).float()
    confidence = 1 + torch.from_numpy(random.exponential(3, clip.depth.shape)).float()
    quaternion = torch.from_numpy(Rotation.from_matrix(poses[:, :, :3].numpy()).as_quat())
    focal = clip.intrinsics[:, [1, 0], [1, 0]].double()  # y, then x
    size = torch.tensor([clip.height, clip.width])
    field_of_view = 2 * torch.atan(size / 2 / focal)
    encoding = torch.cat([poses[:, :, 3], quaternion, field_of_view], 1).float()
    depth = torch.where(clip.valid, clip.depth, 2.0) * scale * factor
    return Prediction(encoding, poses.float(), clip.intrinsics, depth, confidence)


@pytest.fixture(scope="module")
def room():
    return render_room(4, 5, 28, 42)


def world(depth, intrinsics, world_to_camera):
    """[S, H, W, 3] float64 points, written out."""
    found = np.empty((*depth.shape, 3))
    for frame, (row, column) in ((f, p) for f in range(len(depth)) for p in np.ndindex(depth.shape[1:])):
        k, pose = intrinsics[frame].double().numpy(), world_to_camera[frame].double().numpy()
        z = float(depth[frame, row, column])
        seen = np.array([(column + 0.5 - k[0, 2]) / k[0, 0] * z, (row + 0.5 - k[1, 2]) / k[1, 1] * z, z])
        found[frame, row, column] = pose[:, :3].T @ (seen - pose[:, 3])
    return found


def chamfer_by_hand(predicted, truth, clip=np.inf):
    predicted, truth = (np.array(voxel_means_by_hand(points, 0.05)) for points in (predicted, truth))
    apart = cdist(predicted, truth)
    return np.minimum(apart.min(1), clip).mean(), np.minimum(apart.min(0), clip).mean()


def test_an_exact_prediction_has_no_error(room):
    found = measure("corrected", prediction_for(room, 0, 0, 0), room)
    assert [found[key] for key in ("auc5", "auc15", "auc30", "delta125")] == [100] * 4
    for key in ("ate", "rpe_translation", "absrel", "accuracy", "completeness", "chamfer", "chamfer_clipped"):
        assert found[key] == pytest.approx(0, abs=2e-3), key
    assert found["are_deg"] == pytest.approx(0, abs=0.05)
    assert found["normal_consistency"] > 0.97


def test_corrected_measures_agree_with_the_same_written_out(room):
    from evo.core.geometry import umeyama_alignment

    prediction = prediction_for(room, 4, 0.08, 0.05)
    found = measure("corrected", prediction, room)
    trajectories = [camera_to_world(poses) for poses in (prediction.world_to_camera, room.world_to_camera)]
    assert {
        key: found[key] for key in ("ate", "are_deg", "rpe_translation", "rpe_rotation_deg")
    } == pytest.approx(evo_errors(*trajectories), rel=1e-4)
    own = world(prediction.depth, prediction.intrinsics, prediction.world_to_camera)
    true = world(room.depth, room.intrinsics, room.world_to_camera)
    valid = room.valid.numpy()
    rotation, translation, scale = umeyama_alignment(own[valid].T, true[valid].T, with_scale=True)
    aligned = scale * own[valid] @ rotation.T + translation
    accuracy, completeness = chamfer_by_hand(aligned, true[valid])
    assert found["accuracy"] == pytest.approx(accuracy, rel=1e-3)
    assert found["completeness"] == pytest.approx(completeness, rel=1e-3)
    assert found["chamfer"] == pytest.approx(accuracy + completeness, rel=1e-3)
    assert found["chamfer_clipped"] == pytest.approx(
        sum(chamfer_by_hand(aligned, true[valid], 0.5)), rel=1e-3
    )


def four_rows(poses):
    """[S, 4, 4] float64 of [S, 3, 4]."""
    last = np.broadcast_to([[[0.0, 0.0, 0.0, 1.0]]], (len(poses), 1, 4))
    return np.concatenate([poses.double().numpy(), last], 1)


def from_first(prediction):
    """The same prediction in the frame of its first camera, as VGGT gives it."""
    poses = four_rows(prediction.world_to_camera)
    told = torch.from_numpy(poses @ np.linalg.inv(poses[0]))[:, :3].float()
    return replace(prediction, world_to_camera=told)


def script_errors(prediction, clip):
    """ATE, ARE and RPE by the steps of the published script."""
    # load_poses: from camera to world, moved into the first frame.
    poses = np.linalg.inv(four_rows(clip.world_to_camera))
    poses = np.linalg.inv(poses[0]) @ poses
    # evaluate_scene_and_save: inverted, and compared with what the model gave.
    estimate, reference = four_rows(prediction.world_to_camera), np.linalg.inv(poses)
    # eval_trajectory: align, correct_scale and align_origin are all on.
    return evo_errors(torch.from_numpy(estimate), torch.from_numpy(reference), align_origin=True)


TRAJECTORY = ("ate", "are_deg", "rpe_translation", "rpe_rotation_deg")


@pytest.mark.parametrize("own", [from_first, lambda prediction: prediction], ids=["first camera", "another"])
def test_an_exact_prediction_has_no_published_error_in_any_world(own, room):
    found = measure("published", own(prediction_for(room, 0, 0, 0)), room, mesh_of(room))
    for key in TRAJECTORY:
        assert found[key] == pytest.approx(0, abs=1e-3 if key.endswith("deg") else 1e-5), key


def mesh_of(clip):
    """Vertices near what a clip shows."""
    points = world(clip.depth, clip.intrinsics, clip.world_to_camera)[clip.valid.numpy()]
    return points[::3] + np.array([0.01, 0, 0])


def test_published_measures_are_those_of_the_script(room):
    mesh = mesh_of(room)
    prediction = from_first(prediction_for(room, 4, 0.08, 0.05))
    found = measure("published", prediction, room, mesh)
    expected = script_errors(prediction, room)
    assert {key: found[key] for key in TRAJECTORY} == pytest.approx(expected, rel=1e-4)
    assert found["ate"] != pytest.approx(measure("corrected", prediction, room)["ate"], rel=0.05)

    confident = prediction.confidence.numpy() >= 3
    assert 0.2 < confident.mean() < 0.8
    own = world(prediction.depth, prediction.intrinsics, prediction.world_to_camera)[confident]
    first = np.linalg.inv(four_rows(room.world_to_camera)[0])
    moved = own @ first[:3, :3].T + first[:3, 3]
    ratio = np.linalg.norm(np.ptp(mesh, axis=0)) / np.linalg.norm(np.ptp(moved, axis=0))
    middle = (moved.min(0) + moved.max(0)) / 2
    fitted = (moved - middle) * ratio + (mesh.min(0) + mesh.max(0)) / 2
    assert found["chamfer_clipped"] == pytest.approx(sum(chamfer_by_hand(fitted, mesh, 0.5)), rel=1e-3)
    for key in ("accuracy", "completeness", "chamfer", "normal_consistency"):
        assert found[key] is None


def test_published_measures_do_not_depend_on_the_world_of_a_prediction(room):
    mesh, prediction = mesh_of(room), prediction_for(room, 4, 0.08, 0.05)
    one, other = (measure("published", told, room, mesh) for told in (prediction, from_first(prediction)))
    for key in (*TRAJECTORY, "chamfer_clipped"):
        assert one[key] == pytest.approx(other[key], rel=2e-3), key


def test_published_points_are_scaled_after_they_are_drawn(room, monkeypatch):
    """The result is that of scaling all, without a copy of all in float64."""
    monkeypatch.setattr(protocols, "PUBLISHED_POINTS", 400)
    monkeypatch.setattr(protocols, "PUBLISHED_CONFIDENCE", 1.0)
    prediction, mesh = from_first(prediction_for(room, 4, 0.08, 0.05)), mesh_of(room)
    first = np.linalg.inv(four_rows(room.world_to_camera)[0])
    own = world(prediction.depth, prediction.intrinsics, prediction.world_to_camera).reshape(-1, 3)
    moved = own @ first[:3, :3].T + first[:3, 3]
    ratio = np.linalg.norm(np.ptp(mesh, axis=0)) / np.linalg.norm(np.ptp(moved, axis=0))
    middle = (moved.min(0) + moved.max(0)) / 2
    fitted = (moved - middle) * ratio + (mesh.min(0) + mesh.max(0)) / 2
    expected = sum(chamfer_by_hand(sample(fitted, 400), sample(mesh, 400), 0.5))
    assert published_points(prediction, room, mesh)["chamfer_clipped"] == pytest.approx(expected, rel=1e-3)

    larger = render_room(4, 2, 280, 420)
    prediction = prediction_for(larger, 4, 0.08, 0.05)
    published_points(prediction, larger, mesh)  # what is loaded at first is not counted
    tracemalloc.start()
    published_points(prediction, larger, mesh)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < larger.depth.numel() * 3 * 8


def test_points_are_thinned_evenly(room, monkeypatch):
    mask = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    found = thinned(mask, 100)
    assert not (found & ~mask).any() and 80 <= int(found.sum()) <= 100
    assert int(found[0].sum()) > 20 and int(found[2].sum()) > 20
    assert torch.equal(thinned(mask, 10_000), mask)
    prediction = prediction_for(room, 4, 0.08, 0.05)
    whole = measure("corrected", prediction, room)["chamfer"]
    monkeypatch.setattr(protocols, "ALIGNED_POINTS", 1000)
    assert measure("corrected", prediction, room)["chamfer"] == pytest.approx(whole, rel=0.1)


def test_the_published_protocol_counts_scenes_without_points(scans, backbone, tmp_path, monkeypatch):
    out = tmp_path / "out"
    summary = run(scans, out, backbone, protocol="published", frames=5)
    # Of random weights no pixel is confident: what the published script would leave out of its means, unsaid.
    assert summary["sides"][0]["without_points"] == list(NAMES)
    assert "no point of confidence 3 or more in 3 scenes" in format_table(summary)
    assert summary["sides"][1]["metrics"]["ate"]["scenes"] == 3
    assert summary["sides"][1]["metrics"]["chamfer_clipped"]["mean"] is None
    assert result_of(out, NAMES[2])["frame_numbers"] == [0, 1, 2, 3, 4]
    monkeypatch.setattr(protocols, "PUBLISHED_CONFIDENCE", 1.0)
    summary = run(scans / NAMES[0], tmp_path / "one", backbone, protocol="published", frames=5)
    assert summary["sides"][0]["without_points"] == []
    assert summary["sides"][1]["metrics"]["chamfer_clipped"]["scenes"] == 1


def test_meshes_may_lie_elsewhere_and_must_be_there(own_scans, backbone, tmp_path):
    meshes = tmp_path / "meshes"
    for name in NAMES:
        (meshes / name).mkdir(parents=True)
        (own_scans / name / f"{name}_vh_clean_2.ply").rename(meshes / name / f"{name}_vh_clean_2.ply")
    with pytest.raises(PaceError) as caught:
        run(own_scans, tmp_path / "out", backbone, protocol="published")
    assert all(word in str(caught.value) for word in (f"{NAMES[0]}_vh_clean_2.ply", "meshes", "corrected"))
    summary = run(own_scans / NAMES[0], tmp_path / "out", backbone, protocol="published", meshes=meshes)
    assert summary["scenes"] == 1
    found = protocols.read_mesh(meshes / NAMES[0] / f"{NAMES[0]}_vh_clean_2.ply")
    np.testing.assert_allclose(found, mesh_points(6), atol=1e-6)
    broken = meshes / NAMES[1] / f"{NAMES[1]}_vh_clean_2.ply"
    broken.write_bytes(broken.read_bytes()[:500])
    with pytest.raises(PaceError, match=f"scene {NAMES[1]}: .*PLY"):
        run(own_scans / NAMES[1], tmp_path / "broken", backbone, protocol="published", meshes=meshes)


@pytest.mark.skipif(
    "PACEVGGT_REAL_CLIPS" not in os.environ,
    reason="set PACEVGGT_REAL_CLIPS to a folder of real clips with ground truth",
)
def test_photographs_with_measured_depth(tmp_path):
    """VGGT-mini knows what it sees: numbers are those of a model that works, far from those of random weights."""
    folder = Path(os.environ["PACEVGGT_REAL_CLIPS"]) / "redkitchen"
    summary = evaluate(folder, "folder", out=tmp_path / "out", frames=8, device="cpu")
    for side in summary["sides"]:
        found = {key: metric["mean"] for key, metric in side["metrics"].items()}
        assert found["auc30"] > 20 and found["absrel"] < 0.25 and found["ate"] < 0.7
        assert found["chamfer_clipped"] <= found["chamfer"] < 1 and 0.4 < found["normal_consistency"] < 1


# ---- the summary


def result(scene, *sides, **given):
    """A scene with values of some metrics for each side."""
    table = [
        {
            **dict.fromkeys(
                [
                    "keep_ratio",
                    "mode",
                    "merge_budget",
                    "weights",
                    "weights_digest",
                    "full_heads",
                    "heads",
                    "kept_tokens",
                ]
            ),
            "name": f"side {number}",
            "fits": values is not None,
            "peak_gib": None,
            "seconds": None if values is None else 2.0 / (1 + number),
            "metrics": None if values is None else {**dict.fromkeys(METRICS), **values},
        }
        for number, values in enumerate(sides)
    ]
    whole = {"frames": 4, "frames_left_out": 0, "has_depth": True, "metres": True}
    return {"scene": scene, **whole, "sides": table, **given}


SETTINGS = {
    "protocol": "corrected", "backbone": "a model", "dataset": "scannet", "precision": "float32", "device": "a machine",
    "confidence": None,
}  # fmt: skip


def test_means_are_of_the_same_scenes():
    summary = summarise(
        SETTINGS,
        [
            result("a", {"ate": 1.0, "auc30": 50.0}, {"ate": 2.0, "auc30": 40.0}),
            result("b", {"ate": 3.0, "auc30": 70.0}, {"ate": None, "auc30": 80.0}),
            result("c", {"ate": 5.0, "auc30": 90.0}, None),
        ],
    )
    stock, other = summary["sides"]
    assert (stock["metrics"]["ate"]["mean"], stock["metrics"]["ate"]["scenes"]) == (1.0, 1)
    assert other["metrics"]["ate"]["change"] == {"percent": 100.0, "low": None, "high": None}
    assert (stock["metrics"]["auc30"]["mean"], other["metrics"]["auc30"]["mean"]) == (60.0, 60.0)
    assert other["metrics"]["auc30"]["change"]["percent"] == 0
    assert other["did_not_fit"] == ["c"] and other["speedup"] == 2
    assert "side 1 did not fit into memory in 1 scene (c)" in format_table(summary)
    assert "; 2 of 3 scenes" in format_table(summary)
    assert "too narrow" in format_table(summary)
    many = [result(f"scene{i}", {"ate": 1.0 + i}, {"ate": 2.0 + i}) for i in range(10)]
    assert "too narrow" not in format_table(summarise(SETTINGS, many))


def test_a_table_of_one_side_that_never_fits_still_has_the_other():
    summary = summarise(SETTINGS, [result("a", None, {"ate": 2.0}), result("b", None, {"ate": 4.0})])
    assert summary["sides"][1]["metrics"]["ate"]["mean"] == 3
    assert summary["sides"][0]["metrics"]["ate"] == {"mean": None, "scenes": 0, "change": None}


def test_scenes_run_with_other_sides_are_refused():
    with pytest.raises(PaceError, match="b"):
        summarise(SETTINGS, [result("a", {"ate": 1.0}, {"ate": 2.0}), result("b", {"ate": 1.0})])


def test_the_picture_shows_differences_from_stock(tmp_path):
    results = [
        result("a", {"ate": 1.0}, {"ate": 3.0}, {"ate": 0.5}),
        result("b", {"ate": 1.0}, None, {"ate": None}),
    ]
    np.testing.assert_array_equal(differences("ate", results), [[2, np.nan], [-0.5, np.nan]])
    save_changes(tmp_path / "changes.png", results)
    save_changes(tmp_path / "none.png", [result("a", None, None)])
    assert {path.read_bytes()[:4] for path in tmp_path.iterdir()} == {b"\x89PNG"}


def test_the_legend_shows_means_as_they_are_drawn(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr("pacevggt_patch.evaluate.picture.save_figure", lambda figure, _: kept.append(figure))
    save_changes(tmp_path / "changes.png", [result("a", {"ate": 1.0}, {"ate": 3.0}, {"ate": 0.5})])
    (figure,) = kept
    (legend,) = figure.legends
    explained = [line.get_color() for line in legend.get_lines() if line.get_linestyle() == "--"]
    drawn = [line.get_color() for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert explained == drawn and len(set(drawn)) == 2
    # Nothing that is drawn is cut off by the edges of the picture.
    figure.canvas.draw()
    inner, outer = figure.get_tightbbox(), figure.bbox_inches
    assert outer.x0 < inner.x0 and inner.x1 < outer.x1 and outer.y0 < inner.y0 and inner.y1 < outer.y1
