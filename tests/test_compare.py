"""`pacevggt compare` and `pacevggt view`, with a small VGGT-mini of random weights on tiny clips."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import shlex
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hosts import write_images
from PIL import Image
from plyfile import PlyData

from pacevggt_patch import PaceConfig, PaceError, accelerate, is_accelerated, paused
from pacevggt_patch.cli.main import main, make_parser
from pacevggt_patch.clips import BUNDLED_CLIP, Clip, load_clip, save_clip
from pacevggt_patch.compare import compare
from pacevggt_patch.compare.clouds import (
    Cloud,
    View,
    frusta,
    in_palette,
    make_cloud,
    splat,
    still,
    turned_figure,
    view_of,
)
from pacevggt_patch.compare.differences import changes, confident, difference
from pacevggt_patch.compare.exports import nearest_rotation, save_colmap
from pacevggt_patch.compare.pictures import as_jpeg, coloured, curves, frame_rows, overlay_kept, spread
from pacevggt_patch.compare.plan import Options, load_evenly, make_plan
from pacevggt_patch.compare.report import format_table, outcome, rows, significant
from pacevggt_patch.compare.runs import Prediction, Runner, memory_kept, prediction_of
from pacevggt_patch.evaluation import camera_agreement, evaluate_predictions, unproject
from pacevggt_patch.evaluation.geometry import Similarity
from pacevggt_patch.evaluation.timing import time_interleaved
from pacevggt_patch.mini import MiniConfig, build_mini, save_mini
from pacevggt_patch.mini.scenes.rooms import render_room

CPU = torch.device("cpu")
NAME = '<b>&"room'  # in reports and pages it has to be escaped
SMALL = MiniConfig(28, 14, 32, 2, 1, 4, (0, 1, 2, 3), 1, 2, 8, (8, 8, 8, 8))
SETTINGS = ("global 0.5", "pre-aa 0.5")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A checkpoint of a VGGT-mini of a few thousand parameters."""
    path = tmp_path_factory.mktemp("backbone") / "small.safetensors"
    save_mini(build_mini(False, SMALL), path)
    return str(path)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A clip with cameras and depth, and a name that is not harmless."""
    folder = tmp_path_factory.mktemp("clips") / "room"
    clip = render_room(3, 4, 56, 56)
    save_clip(Clip(NAME, clip.images, clip.intrinsics, clip.world_to_camera, clip.depth), folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A clip without ground truth."""
    folder = tmp_path_factory.mktemp("clips") / "photos"
    folder.mkdir()
    for index, image in enumerate(render_room(5, 5, 56, 84).images):
        Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()).save(folder / f"{index}.jpg")
    return folder


@pytest.fixture(scope="module")
def compared(backbone, room, photos, tmp_path_factory):
    """What was written about two clips and two settings, and the report."""
    out = tmp_path_factory.mktemp("compared")
    report = compare(
        backbone, [room, photos], out=out, keep_ratios=[0.5], modes=["global", "pre-aa"], weights=None, frames=4,
        device="cpu", repeats=2, ply=True,
    )  # fmt: skip
    return out, report


def quick(backbone, clips, out, **given):
    """A comparison that is over soon."""
    return compare(
        backbone, clips, out=out, device="cpu", **{"frames": 2, "repeats": 1, "weights": None, **given}
    )


def out_of_memory(*_, **__):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory")


# ---- the report


def test_the_report_is_what_was_written(compared):
    out, report = compared
    assert json.loads((out / "report.json").read_text()) == report
    files = ["report.json", "report.html"]
    for number in range(2):
        files += [f"points-{number}-{name}.ply" for name in ("stock", "global-0.5", "pre-aa-0.5")]
    assert report["files"] == files and sorted(path.name for path in out.iterdir()) == sorted(files)
    assert [clip["name"] for clip in report["clips"]] == [NAME, "photos"]
    assert [clip["has_truth"]["cameras"] for clip in report["clips"]] == [True, False]
    for clip in report["clips"]:
        assert (clip["frames"], clip["width"], clip["height"]) == (4, 224, 224)
        assert tuple(setting["name"] for setting in clip["settings"]) == SETTINGS
        for side in (clip["stock"], *clip["settings"]):
            assert side["fits"] and len(side["seconds_of_runs"]) == 2 and side["peak_gib"] is None
            assert side["seconds"] == pytest.approx(np.median(side["seconds_of_runs"]))
        for setting in clip["settings"]:
            assert setting["speedup"] == pytest.approx(clip["stock"]["seconds"] / setting["seconds"])
            assert (setting["kept_tokens"], setting["patches"], setting["heads"]) == (128, 256, 8)
            assert setting["weights"] == "none (training-free)"


def test_agreement_and_errors_are_those_of_the_outputs(compared, backbone, room):
    """Of a run apart from the comparison, which has to give the same."""
    _, report = compared
    clip = load_clip(room, width=224, mode="square")
    model = build_mini(backbone)
    accelerate(model, PaceConfig(0.5, mode="global", min_frames=1), weights=None)
    with torch.inference_mode():
        with paused(model):
            stock = model(clip.images)
        other = model(clip.images)
    setting = report["clips"][0]["settings"][0]
    found = setting["agreement"]
    sides = [prediction_of(outputs, clip, "it") for outputs in (stock, other)]
    cameras = camera_agreement(*(side.world_to_camera for side in sides))
    assert found["pairs"] == 6
    assert found["rotation_deg"]["median"] == pytest.approx(np.median(cameras.rotation), rel=1e-4)
    assert found["rotation_deg"]["p90"] == pytest.approx(np.percentile(cameras.rotation, 90), rel=1e-4)
    a, b = (side.depth.double().numpy() for side in sides)
    apart = np.abs(np.median(a / b) * b - a) / a
    assert found["depth"]["median"] == pytest.approx(np.median(apart), rel=1e-4)
    assert found["depth"]["mean"] == pytest.approx(apart.mean(), rel=1e-4)
    assert found["per_frame"]["depth"] == pytest.approx([np.median(frame) for frame in apart], rel=1e-4)
    assert found["points"]["median_percent"] > 0
    for side, outputs in ((report["clips"][0]["stock"], stock), (setting, other)):
        expected = evaluate_predictions(outputs, clip)
        for key, value in side["truth"].items():
            assert value == pytest.approx(expected[key], rel=1e-4)
    before = report["clips"][0]["stock"]["truth"]
    assert setting["truth_change"]["absrel"] == pytest.approx(
        100 * (setting["truth"]["absrel"] / before["absrel"] - 1)
    )


def test_keeping_everything_is_stock(backbone, room, tmp_path):
    report = quick(backbone, [room], tmp_path, keep_ratios=[1.0], modes=["global", "pre-aa"])
    for setting in report["clips"][0]["settings"]:
        found = setting["agreement"]
        assert found["rotation_deg"]["p90"] < 1e-6 and found["depth"]["mean"] == 0
        assert found["points"]["median_percent"] < 1e-4
        assert setting["truth"] == report["clips"][0]["stock"]["truth"]
        assert setting["kept_tokens"] == setting["patches"]
    assert "kept patch tokens" not in (tmp_path / "report.html").read_text()


def test_without_ground_truth_every_cell_is_filled(compared):
    _, report = compared
    table = rows(report["clips"][1])
    names = [name for name, _ in table]
    assert not any("AUC" in name or "error" in name or "memory" in name for name in names)
    for name, cells in table:
        assert len(cells) == 3 and all(any(c.isdigit() for c in cell) for cell in cells), name
    with_truth = [name for name, _ in rows(report["clips"][0])]
    assert sum("AUC" in name or "AbsRel" in name for name in with_truth) == 2
    text = format_table(report)
    assert "None" not in text and "nan" not in text and NAME in text
    for clip in report["clips"]:
        assert clip["settings"][0]["outcome"] in text


def test_a_model_without_weights_calibrates_itself(backbone, room, tmp_path, cache):
    for weights in ("calibrated on the first clip", "calibration kept in heads-"):
        report = quick(backbone, [room], tmp_path, frames=4, weights="auto")
        (setting,) = report["clips"][0]["settings"]
        assert setting["weights"].startswith(weights)
        assert 0 <= setting["full_heads"] <= setting["heads"] // 6
    # Nobody who is sent a report learns where the user keeps things.
    assert str(cache) not in (tmp_path / "report.json").read_text() + (tmp_path / "report.html").read_text()


def test_a_clip_too_short_to_calibrate_on_is_said(backbone, photos, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = quick(backbone, [photos], tmp_path, frames=3, weights="auto")
    (setting,) = report["clips"][0]["settings"]
    assert "could not be calibrated on" in setting["weights"] and setting["full_heads"] == 0


def test_a_loaded_model_is_given_back_as_it_was(photos, tmp_path):
    model = build_mini(False, SMALL)
    images = torch.rand(2, 3, 56, 56)
    with torch.inference_mode():
        before = model(images)["depth"]
    report = quick(model, [photos], tmp_path)
    assert not is_accelerated(model) and report["backbone"] == "VGGT" and report["command"] is None
    with torch.inference_mode():
        assert torch.equal(model(images)["depth"], before)
    accelerate(model, weights=None)
    with pytest.raises(PaceError, match="accelerated already"):
        quick(model, [photos], tmp_path)


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_the_precision_is_that_of_the_layers(photos, tmp_path, precision):
    model, seen = build_mini(False, SMALL), set()
    model.aggregator.global_blocks[1].attn.qkv.register_forward_hook(lambda *given: seen.add(given[2].dtype))
    report = quick(model, [photos], tmp_path, precision=precision)
    assert seen == {torch.float32 if precision == "float32" else torch.bfloat16}
    assert report["precision"] == precision and report["clips"][0]["settings"][0]["agreement"]["pairs"] == 1


# ---- what does not fit


def test_stock_that_does_not_fit_is_said_and_the_rest_stands(backbone, room, tmp_path, monkeypatch):
    own = Runner.outputs
    monkeypatch.setattr(
        Runner, "outputs", lambda *given: out_of_memory() if given[1].config is None else own(*given)
    )
    report = quick(backbone, [room], tmp_path)
    clip = report["clips"][0]
    (setting,) = clip["settings"]
    assert not clip["stock"]["fits"] and clip["stock"]["seconds"] is None
    assert setting["fits"] and setting["seconds"] > 0 and setting["truth"]["absrel"] is not None
    assert setting["speedup"] is setting["agreement"] is setting["truth_change"]["absrel"] is None
    assert "stock did not fit" in setting["outcome"]
    for _, cells in rows(clip):
        assert cells[0] == "did not fit" and cells[1] != "did not fit"
    page = (tmp_path / "report.html").read_text()
    assert "did not fit" in page and "depth, accelerated" in page and "depth, stock" not in page


@pytest.mark.parametrize("fitting", [0, 1])
def test_a_setting_that_does_not_fit_is_said(backbone, room, tmp_path, monkeypatch, fitting):
    """At its first run, or when it is timed."""
    own, count = Runner.outputs, []

    def outputs(runner, side, images):
        if side.config is not None:
            count.append(side)
            if len(count) > fitting:
                out_of_memory()
        return own(runner, side, images)

    monkeypatch.setattr(Runner, "outputs", outputs)
    report = quick(backbone, [room], tmp_path)
    clip = report["clips"][0]
    assert clip["stock"]["fits"] and not clip["settings"][0]["fits"]
    assert "did not fit" in clip["settings"][0]["outcome"] and clip["settings"][0]["agreement"] is None
    assert "There is nothing to show" in (tmp_path / "report.html").read_text()


def test_there_is_no_estimate_where_not_even_a_few_frames_fit(
    backbone, photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Runner, "forward", out_of_memory)
    report = quick(backbone, [photos], tmp_path)
    assert not any(side["fits"] for side in (report["clips"][0]["stock"], *report["clips"][0]["settings"]))
    assert "about" not in capsys.readouterr().err
    assert (
        "did not fit" in format_table(report) and "There is nothing" in (tmp_path / "report.html").read_text()
    )


def test_running_out_of_memory_ends_a_block_and_other_errors_do_not():
    with memory_kept(CPU) as fits:
        out_of_memory()
    assert not fits
    with pytest.raises(RuntimeError, match="other"), memory_kept(CPU):
        raise RuntimeError("other")


def test_outputs_that_cannot_be_compared_are_named():
    clip = Clip("noise", torch.rand(2, 3, 28, 28))
    good = {
        "pose_enc": torch.rand(1, 2, 9), "depth": torch.rand(1, 2, 28, 28, 1), "depth_conf": torch.rand(1, 2, 28, 28),
    }  # fmt: skip
    assert prediction_of(good, clip, "stock").depth.shape == (2, 28, 28)
    with pytest.raises(PaceError, match="'depth'"):
        prediction_of({**good, "depth": None}, clip, "stock")
    with pytest.raises(PaceError, match=r"not finite.*noise"):
        prediction_of({**good, "depth_conf": good["depth_conf"] * torch.nan}, clip, "stock")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--clip", "no_such_folder"], "no_such_folder"),
        (["--backbone", "no_such_file.pt"], "no_such_file.pt"),
        (["--keep-ratios", "0.3,7"], "keep_ratio"),
        (["--modes", "global,local"], "local"),
        (["--modes", "global", "--merge-budget", "0.2"], "merge_budget"),
        (["--frames", "99"], "99"),
        (["--frames", "0"], "frames"),
        (["--repeats", "0"], "repeats"),
        (["--precision", "float8"], "float8"),
        (["--weights", "missing.safetensors"], "missing.safetensors"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line_and_nothing_is_written(given, named, tmp_path, capsys):
    assert main(["compare", "--out", str(tmp_path / "out"), *given]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("pacevggt: ") and named in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("library", "given", "extra"),
    [
        ("matplotlib", [], "compare"),
        ("plotly", [], "compare"),
        ("plyfile", ["--ply"], "compare"),
        ("pycolmap", ["--colmap", "there"], "colmap"),
    ],
)
def test_a_missing_library_is_named_before_anything_runs(
    library, given, extra, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr("pacevggt_patch.compare.runs.load_backbone", out_of_memory)
    assert main(["compare", "--out", str(tmp_path / "out"), *given]) == 2
    error = capsys.readouterr().err
    assert library in error and f"pip install '.[{extra}]'" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "named"),
    [({"clips": "frames"}, "clips"), ({"keep_ratios": 0.3}, "keep_ratios"), ({"modes": "global"}, "modes"),
     ({"modes": []}, "mode"), ({"keep_ratios": []}, "keep ratio"), ({"backbone": 3}, "backbone"), ({"out": 3}, "out")],
)  # fmt: skip
def test_values_that_are_of_another_kind_are_named(given, named, tmp_path):
    with pytest.raises(PaceError, match=named):
        compare(**{"out": tmp_path / "out", "device": "cpu", "frames": 1, **given})
    assert not (tmp_path / "out").exists()


def test_more_frames_than_a_clip_has_are_refused_with_their_number(backbone, photos, tmp_path):
    total = len(list(photos.iterdir()))
    with pytest.raises(PaceError, match=rf"{photos.name} has {total} frames.*--frames {total}\b"):
        quick(backbone, [photos], tmp_path / "out", frames=total + 1)


def test_weights_of_another_checkpoint_are_refused(backbone, photos, tmp_path):
    with pytest.raises(PaceError, match="pace-vggt-mini-global"):
        quick(backbone, [photos], tmp_path / "out", weights="weights/pace-vggt-mini-global.safetensors")
    assert not (tmp_path / "out").exists()


# ---- commands


def test_the_command_in_the_report_makes_it_again(compared, backbone, room, photos):
    out, report = compared
    words = shlex.split(report["command"])
    assert words[:2] == ["pacevggt", "compare"]
    given = make_parser().parse_args(words[1:])
    assert given.clip == [str(room), str(photos)] and given.backbone == backbone
    assert (given.keep_ratios, given.modes, given.weights) == ((0.5,), ("global", "pre-aa"), "none")
    assert (given.frames, given.repeats, given.device, given.out, given.ply) == (4, 2, "cpu", out, True)
    other = Options(merge_budget=0.2, precision="autocast", compile=True, colmap="a b", frames=3)
    again = make_parser().parse_args(shlex.split(other.command)[1:])
    assert (again.merge_budget, again.precision, again.compile, str(again.colmap), again.frames) == (
        0.2, "autocast", True, "a b", 3,
    )  # fmt: skip


def test_the_command_line_prints_an_estimate_and_the_table(backbone, photos, tmp_path, capsys):
    given = [
        "--backbone",
        backbone,
        "--clip",
        str(photos),
        "--frames",
        "2",
        "--repeats",
        "1",
        "--weights",
        "none",
    ]
    assert main(["compare", *given, "--device", "cpu", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "4 runs: about" in printed.err and "photos, 2 frames" in printed.err
    assert f"wrote {tmp_path}/: report.json, report.html" in printed.out
    assert "speed-up" in printed.out and "global 0.3" in printed.out


def test_an_interrupt_keeps_the_clips_that_are_done(backbone, room, photos, tmp_path, monkeypatch, capsys):
    own = Runner.run

    def run(runner, clip, update):
        if clip.name == "photos":
            raise KeyboardInterrupt
        return own(runner, clip, update)

    monkeypatch.setattr(Runner, "run", run)
    given = [
        "--backbone",
        backbone,
        "--clip",
        str(room),
        "--clip",
        str(photos),
        "--frames",
        "2",
        "--repeats",
        "1",
    ]
    assert main(["compare", *given, "--weights", "none", "--device", "cpu", "--out", str(tmp_path)]) == 130
    report = json.loads((tmp_path / "report.json").read_text())
    assert [clip["name"] for clip in report["clips"]] == [NAME]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_an_interrupt_leaves_no_half_written_file(backbone, photos, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pacevggt_patch.compare.command.as_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick(backbone, [photos], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_folder_that_is_a_file_is_named(backbone, photos, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(PaceError, match="out"):
        quick(backbone, [photos], tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("total", "frames", "taken"), [(9, 3, [0, 4, 8]), (9, 4, [0, 2, 4, 6]), (9, None, range(9))]
)
def test_frames_are_spread_over_the_clip(tmp_path, total, frames, taken):
    folder = write_images(tmp_path / "many", total)
    every = load_clip(folder, width=224, mode="square")
    assert torch.equal(load_evenly(folder, frames, CPU, True).images, every.images[list(taken)])


def test_frames_have_the_size_that_the_model_takes_and_the_number_that_the_device_can(tmp_path):
    folder = write_images(tmp_path / "many", 30)
    assert load_evenly(folder, None, CPU, True).images.shape == (24, 3, 224, 224)
    assert load_evenly(folder, 2, CPU, False).images.shape == (2, 3, 392, 518)
    assert len(load_evenly(folder, None, torch.device("cuda"), True)) == 30
    assert len(load_evenly(BUNDLED_CLIP, None, CPU, True)) == 24


def test_each_mode_goes_with_each_keep_ratio(photos):
    options = Options(
        clips=(photos,), keep_ratios=(0.3, 0.15, 0.3), modes=("global", "pre-aa"), frames=2, device="cpu"
    )
    plan = make_plan(options)
    assert [(config.mode, config.keep_ratio) for config in plan.configs] == [
        ("global", 0.3), ("global", 0.15), ("pre-aa", 0.3), ("pre-aa", 0.15),
    ]  # fmt: skip
    assert plan.precision == "float32" and all(config.min_frames == 1 for config in plan.configs)


def test_settings_are_put_in_force_outside_of_the_timed_span():
    calls = []
    time_interleaved(
        {"a": lambda: calls.append("run a"), "b": lambda: calls.append("run b")},
        1,
        "cpu",
        warm_up=False,
        prepare=lambda name: calls.append(f"prepare {name}"),
    )
    assert calls == ["prepare a", "run a", "prepare b", "run b"]


# ---- numbers in words


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [(0.0004, 2, "0"), (0, 2, "0"), (0.00512, 2, "0.0051"), (0.123, 2, "0.12"), (1.234, 2, "1.2"), (12.34, 2, "12"),
     (123.4, 2, "123"), (5.3456, 3, "5.35"), (0.98765, 3, "0.988"), (9.96, 2, "10")],
)  # fmt: skip
def test_numbers_have_the_digits_that_mean_something(value, digits, shown):
    assert significant(value, digits) == shown


def test_the_outcome_names_speed_memory_cameras_and_depth():
    stock = {"fits": True, "peak_gib": 14.3, "seconds_of_runs": [3.4, 3.5]}
    setting = {
        "fits": True, "peak_gib": 10.5, "speedup": 1.71, "seconds": 2.0, "seconds_of_runs": [1.9, 2.1],
        "agreement": {"rotation_deg": {"median": 0.42}, "depth": {"median": 0.012}},
    }  # fmt: skip
    said = outcome(setting, stock)
    assert (
        said
        == "1.7 times as fast; 10.5 GiB in place of 14.3; cameras 0.42° from stock; depth 1.2 % from stock"
    )
    assert (
        outcome({**setting, "agreement": None, "peak_gib": None}, {**stock, "peak_gib": None})
        == "1.7 times as fast"
    )
    assert "2.00 s and 10.5 GiB" in outcome(setting, {"fits": False})
    slow = setting | {"seconds_of_runs": [1.9, 3.4]}
    assert outcome(slow, stock).startswith("about as fast as stock")


def test_memory_has_a_row_on_a_gpu_alone(compared):
    _, report = compared
    clip = json.loads(json.dumps(report["clips"][1]))
    for side in (clip["stock"], *clip["settings"]):
        side["peak_gib"] = 1.25
    assert ("GPU memory, peak GiB", ["1.2", "1.2", "1.2"]) in rows(clip)


def test_changes_are_percent_of_stock():
    assert changes({"a": 2.0, "b": None, "c": 0.0, "d": 1.0}, {"a": 3.0, "b": 1.0, "c": 1.0, "d": None}) == {
        "a": 50.0, "b": None, "c": None, "d": None,
    }  # fmt: skip


# ---- the page


class Reader(html.parser.HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_needs_no_network_and_escapes_what_users_pass(compared):
    out, report = compared
    text = (out / "report.html").read_text()
    assert len(text) < 9e6
    page = Reader(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "base"), tag
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not any(tag == "b" for tag, _ in page.tags) and NAME in page.words
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 2 * 2 * (3 * 5 + 2 + 1) and all(picture["alt"] for picture in pictures)
    assert report["command"] in page.words
    headings = [tag for tag, _ in page.tags if tag in ("h1", "h2")]
    assert headings == ["h1"] + ["h2"] * 6
    first = report["clips"][0]["settings"][0]["outcome"]
    assert any(first[1:] in word for word in page.words)


def test_pictures_show_what_they_say(compared):
    out, _ = compared
    page = Reader((out / "report.html").read_text())
    for attributes in (attributes for tag, attributes in page.tags if tag == "img"):
        kind, content = attributes["src"].split(";base64,")
        decoded = base64.b64decode(content)
        if kind == "data:image/svg+xml":
            assert b"<svg" in decoded and b"</svg>" in decoded
            continue
        with Image.open(io.BytesIO(decoded)) as image:
            # Depths of a model of random weights hardly differ.
            flat = str(attributes["alt"]).startswith("difference")
            assert min(image.size) > 100 and (flat or np.asarray(image.convert("L")).std() > 1)


def test_kept_tokens_are_bright_and_others_dark():
    image = torch.full((3, 28, 42), 0.5)
    drawn = overlay_kept(image, torch.tensor([0, 5]), (2, 3))
    for row, column, bright in ((5, 5, True), (5, 20, False), (5, 40, False), (20, 5, False), (20, 40, True)):
        assert (drawn[:, row, column] == 0.5).all() if bright else drawn[:, row, column].max() < 0.2
    assert (drawn[:, :14, :14] == 0.5).all() and (drawn[:, 14:, 28:] == 0.5).all()


def test_depth_of_both_sides_has_one_range_of_colours():
    images = torch.rand(3, 3, 28, 28)
    stock = torch.linspace(1, 3, 28).expand(3, 28, 28)
    found, ranges = frame_rows(images, None, {"stock": stock, "accelerated": 2 * stock}, None, 14)
    assert [row["frame"] for row in found] == [0, 1, 2]
    assert ranges["depth"] == pytest.approx((1.0, 3.0), abs=0.05)
    assert set(found[0]["pictures"]) == {"frame", "depth, stock", "depth, accelerated"}
    bad = coloured(torch.tensor([[0.0, 1.0, torch.nan]]), 0, 1, "turbo")
    assert (bad[0, 2] == 153).all() and (bad[0, 0] != bad[0, 1]).any()
    assert spread(24) == [0, 6, 12, 17, 23] and spread(2) == [0, 1]


def test_curves_have_gaps_where_there_is_no_value():
    assert curves({"one": [0.5, None, 1.0], "two": [None, 2.0, 3.0]}).startswith("data:image/svg+xml;base64,")
    wide = as_jpeg(np.zeros((10, 1000, 3), np.uint8), 100)
    assert len(wide) < len(as_jpeg(np.zeros((10, 1000, 3), np.uint8), None))


def find_browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for path in map(shutil.which, names) if path), None)


def test_the_page_in_a_browser(compared):
    """No errors, no broken picture, nothing wider than the window, and the clouds are drawn."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    browser_path = find_browser()
    if browser_path is None:
        pytest.skip("needs chromium or google-chrome on the PATH")
    out, _ = compared
    flags = ["--no-sandbox", "--enable-unsafe-swiftshader", "--use-gl=angle", "--use-angle=swiftshader"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=flags)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        problems: list[str] = []
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith("http") and problems.append(request.url))
        page.goto((out / "report.html").as_uri())
        page.wait_for_selector(".plot canvas")
        broken = "[...document.images].filter(image => !(image.complete && image.naturalWidth > 0)).length"
        assert page.evaluate(broken) == 0 and page.evaluate("document.images.length") > 50
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280
        plot = "document.querySelector('.plot')"
        shown = f"{plot}.data.map(trace => trace.visible)"
        assert page.evaluate(shown) == [True, True, False, False]
        page.click(".plot .updatemenu-button:nth-of-type(2)")
        page.wait_for_function(f"JSON.stringify({shown}) == '[false,false,true,true]'")
        # A cloud that is folded away is drawn when it is opened.
        assert page.evaluate("document.querySelectorAll('.plot canvas').length") > 0
        page.evaluate("document.querySelectorAll('details.cloud')[1].open = true")
        page.wait_for_function("document.querySelectorAll('.plot')[1].querySelector('canvas')")
        picture = np.asarray(Image.open(io.BytesIO(page.locator(".plot").first.screenshot())).convert("L"))
        assert (picture < 250).mean() > 0.01
        # As wide as a telephone: tables scroll by themselves, and all pictures of a row are as wide.
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        box = "document.querySelector('.wide')"
        assert page.evaluate(f"{box}.scrollWidth > {box}.clientWidth && {box}.querySelector('table') != null")
        widths = page.evaluate("[...document.querySelectorAll('.grid')[0].children].map(c => c.clientWidth)")
        assert max(widths) - min(widths) <= 1
        browser.close()
    assert problems == []


# ---- clouds


def plane(pixels: int = 40) -> tuple[Prediction, torch.Tensor]:
    """A wall 2 ahead of one camera, and its red and green picture."""
    side = float(pixels)
    intrinsics = torch.tensor([[[side, 0, side / 2], [0, side, side / 2], [0, 0, 1]]])
    depth = torch.full((1, pixels, pixels), 2.0)
    images = torch.rand(1, 3, pixels, pixels)
    images[:, 2] = 0
    pose = torch.eye(3, 4)[None]
    return Prediction(torch.zeros(1, 9), pose, intrinsics, depth, torch.rand(1, pixels, pixels)), images


def whole_cloud(monkeypatch) -> tuple[Cloud, View]:
    """All points of `plane`, seen from its own camera."""
    monkeypatch.setattr("pacevggt_patch.compare.clouds.DRAWN", 1.0)
    prediction, images = plane()
    cloud = make_cloud(prediction, images, None, 10_000)
    return cloud, View(torch.zeros(3), torch.eye(3), 120.0, torch.zeros(2), 0.1, 120, 120)


def test_a_surface_has_no_holes_from_near(monkeypatch):
    cloud, view = whole_cloud(monkeypatch)
    assert len(cloud.points) == 1600
    torch.testing.assert_close(cloud.spacing, torch.full((1600,), 2 / 40))
    drawn = splat(cloud, view)  # each pixel of the camera is 3 x 3 here
    assert (drawn[..., 2] == 0).all()  # no white
    far = splat(cloud, view._replace(eye=torch.tensor([0.0, 0.0, -2.0])))
    share = (far[..., 2] == 0).mean()
    assert share == pytest.approx(0.25, abs=0.03)
    thin = splat(make_cloud(*plane(), None, 400), view)  # a quarter of the points, twice as wide
    assert (thin[..., 2] == 0).mean() > 0.9


def test_points_of_a_slanted_surface_are_as_wide_as_they_lie_apart():
    prediction, images = plane()
    depth = torch.linspace(2, 4, 40).expand(1, 40, 40)  # it recedes to the right
    slanted, cut = replace(prediction, depth=depth), depth.clone()
    cut[..., 20:] *= 10
    cloud = make_cloud(slanted, images, None, 10_000)
    every = unproject(depth, prediction.intrinsics, prediction.world_to_camera)
    apart = (every[0, :, 1:] - every[0, :, :-1]).norm(dim=-1)  # [40, 39]
    inner = cloud.pixels % 40 < 39
    expected = apart[cloud.pixels[inner] // 40, cloud.pixels[inner] % 40]
    torch.testing.assert_close(cloud.spacing[inner], expected)
    cloud = make_cloud(replace(prediction, depth=cut), images, None, 10_000)
    assert (cloud.spacing <= 2.01 * cut.flatten()[cloud.pixels] / 40).all()  # not across the edge


def test_nearer_points_hide_farther_ones_in_whichever_order(monkeypatch):
    cloud, view = whole_cloud(monkeypatch)
    blue = cloud._replace(
        points=cloud.points * 1.5,
        colours=torch.tensor([[0.0, 0, 1]]).expand(1600, 3),
        spacing=cloud.spacing * 1.5,
    )
    for first, second in ((cloud, blue), (blue, cloud)):
        parts = {
            name: torch.cat([getattr(first, name), getattr(second, name)])
            for name in ("points", "colours", "spacing", "pixels")
        }
        drawn = splat(cloud._replace(**parts), view)
        assert (drawn[..., 2] == 0).all()


def test_a_view_has_the_cloud_in_the_picture():
    clip = render_room(3, 3, 56, 56)
    stock = Prediction(
        torch.zeros(3, 9), clip.world_to_camera, clip.intrinsics, clip.depth, torch.rand(3, 56, 56)
    )
    cloud = make_cloud(stock, clip.images, None, 10_000)
    view = view_of(cloud, 90, 120)
    seen = (cloud.points - view.eye) @ view.rotation.T
    place = seen[:, :2] / seen[:, 2:] * view.focal + view.offset + torch.tensor([60.0, 45.0])
    inside = (seen[:, 2] > view.near) & (place > 0).all(1) & (place < torch.tensor([120.0, 90.0])).all(1)
    assert inside.float().mean() > 0.8
    picture = still(cloud, view, (255, 0, 0), 0.3)
    assert picture.shape == (90, 120, 3) and (picture < 250).any(2).mean() > 0.2


def test_pyramids_go_through_the_corners_of_the_image():
    clip = render_room(3, 2, 28, 42)
    edges = frusta(clip.world_to_camera, clip.intrinsics, (28, 42), 0.5)
    assert edges.shape == (2, 8, 2, 3)
    for index in range(2):
        pose, matrix = clip.world_to_camera[index], clip.intrinsics[index]
        seen = edges[index, :4, 1] @ pose[:, :3].T + pose[:, 3]
        torch.testing.assert_close(seen[:, 2], torch.full((4,), 0.5))
        places = (seen @ matrix.T)[:, :2] / seen[:, 2:]
        torch.testing.assert_close(
            places, torch.tensor([[0.0, 0], [42, 0], [42, 28], [0, 28]]), atol=1e-3, rtol=0
        )


def test_accelerated_points_are_drawn_in_the_frame_of_stock():
    prediction, images = plane()
    similarity = Similarity(torch.tensor(2.0), torch.eye(3), torch.tensor([1.0, 0, 0]))
    own, there = (make_cloud(prediction, images, moved, 100) for moved in (None, similarity))
    torch.testing.assert_close(there.points, 2 * own.points + torch.tensor([1.0, 0, 0]))
    torch.testing.assert_close(there.spacing, 2 * own.spacing)
    torch.testing.assert_close(there.world_to_camera[0, :, 3], torch.tensor([-1.0, 0, 0]))


def test_the_more_confident_pixels_are_taken():
    prediction, _ = plane()
    chosen = confident(prediction, 0.25, 10_000)
    assert len(chosen) == pytest.approx(400, abs=1)
    left = prediction.confidence.flatten()
    assert left[chosen].min() >= left.sort().values[-len(chosen)]
    assert len(confident(prediction, 0.5, 100)) <= 100


def test_a_palette_keeps_colours_nearly():
    colours = torch.rand(2000, 3) * torch.tensor([1.0, 1.0, 0.0])
    numbers, palette = in_palette(colours)
    assert numbers.dtype == np.uint8 and len(palette) <= 256 and palette[0][0] == 0 and palette[-1][0] == 1
    entries = np.array([[int(part) for part in text[4:-1].split(",")] for _, text in palette])
    assert np.abs(entries[numbers] / 255 - colours.numpy()).mean() < 0.05
    assert len(in_palette(torch.ones(5, 3))[1]) == 2


def test_the_figure_switches_between_the_sides():
    prediction, images = plane()
    cloud = make_cloud(prediction, images, None, 1000)
    figure = json.loads(turned_figure({"stock": cloud, "accelerated": cloud}, 300))
    assert [trace["visible"] for trace in figure["data"]] == [True, True, False, False]
    labels = {
        button["label"]: button["args"][0]["visible"]
        for button in figure["layout"]["updatemenus"][0]["buttons"]
    }
    assert labels["Accelerated"] == [False, False, True, True] and labels["Both"] == [True] * 4
    alone = json.loads(turned_figure({"accelerated": cloud}, 300))
    assert len(alone["data"]) == 2 and len(alone["layout"]["updatemenus"][0]["buttons"]) == 1


# ---- exports


def test_points_are_written_as_ply(compared, room):
    out, _ = compared
    vertices = PlyData.read(out / "points-0-stock.ply")["vertex"]
    assert vertices.count == pytest.approx(0.7 * 4 * 224 * 224, rel=0.01)
    assert np.isfinite(vertices["x"]).all() and vertices["red"].std() > 5


def test_a_colmap_model_has_the_cameras_and_the_points_where_they_were_seen(tmp_path):
    pycolmap = pytest.importorskip("pycolmap", reason="needs pycolmap")
    clip = render_room(5, 3, 42, 56)
    stock = Prediction(
        torch.zeros(3, 9), clip.world_to_camera, clip.intrinsics, clip.depth, torch.rand(3, 42, 56)
    )
    cloud = make_cloud(stock, clip.images, None, 500)
    save_colmap(tmp_path / "model", cloud)
    save_colmap(tmp_path / "model", cloud)  # over an earlier one
    model = pycolmap.Reconstruction(str(tmp_path / "model"))
    assert model.num_reg_images() == 3 and model.num_points3D() == 500
    for index in range(3):
        image = model.image(index + 1)
        np.testing.assert_allclose(image.cam_from_world().matrix(), clip.world_to_camera[index], atol=1e-5)
        matrix = model.camera(image.camera_id).calibration_matrix()
        np.testing.assert_allclose(matrix, clip.intrinsics[index], rtol=1e-5)
        for point in image.points2D:
            seen = image.project_point(model.point3D(point.point3D_id).xyz)
            np.testing.assert_allclose(seen, point.xy, atol=0.01)
    colours = np.array([point.color for point in model.points3D.values()])
    assert colours.std() > 5


def test_colmap_models_of_both_sides_are_written(backbone, photos, tmp_path):
    pytest.importorskip("pycolmap", reason="needs pycolmap")
    quick(backbone, [photos], tmp_path / "out", colmap=tmp_path / "models")
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["global-0.3", "stock"]


def test_a_matrix_that_is_off_by_rounding_becomes_a_rotation():
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    found = nearest_rotation(turn + 1e-4 * np.random.default_rng(1).normal(size=(3, 3)))
    np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(found, turn, atol=1e-3)


def test_points_of_a_prediction_lie_where_its_cameras_put_them():
    prediction, images = plane()
    cloud = make_cloud(prediction, images, None, 10_000)
    every = unproject(prediction.depth, prediction.intrinsics, prediction.world_to_camera).view(-1, 3)
    torch.testing.assert_close(cloud.points, every[cloud.pixels])
    same = difference(prediction, prediction)
    assert same.values["depth"]["mean"] == 0 and same.values["pairs"] == 0
    assert same.values["rotation_deg"] is None and same.values["points"]["median_percent"] < 1e-4


# ---- the viewer


@pytest.fixture
def viser():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own libraries
        return pytest.importorskip("viser", reason="needs viser")


def test_the_viewer_switches_and_filters(viser, backbone, photos):
    from pacevggt_patch.compare.view import start

    options = Options(backbone=backbone, clips=(photos,), weights=None, frames=2, device="cpu")
    viewer = start(options, "127.0.0.1", 8765)
    try:
        assert viewer.address.startswith("http://localhost:")
        stock, other = (viewer.layers[name] for name in ("stock", "accelerated"))
        assert stock.points.visible and not other.points.visible and len(stock.cameras) == 2
        everything = len(stock.points.points)
        viewer.shown.value = "accelerated"
        assert other.points.visible and not stock.points.visible
        assert all(camera.visible for camera in other.cameras) and not any(c.visible for c in stock.cameras)
        size = other.points.point_size
        viewer.size.value = 2 * viewer.size.value
        assert other.points.point_size == pytest.approx(2 * size)
        viewer.confidence.value = 50
        assert len(stock.points.points) == pytest.approx(everything / 2, rel=0.01)
        assert len(stock.points.colors) == len(stock.points.points)
    finally:
        viewer.stop()


def test_ctrl_c_ends_the_viewer(viser, backbone, photos, monkeypatch, capsys):
    from pacevggt_patch.compare import view

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(view.time, "sleep", interrupted)
    given = [
        "--backbone",
        backbone,
        "--clip",
        str(photos),
        "--frames",
        "2",
        "--weights",
        "none",
        "--device",
        "cpu",
    ]
    assert main(["view", *given, "--port", "8766"]) == 0
    assert "http://localhost:" in capsys.readouterr().out


def test_what_the_viewer_lacks_is_named(viser, monkeypatch, capsys):
    assert main(["view", "--port", "0"]) == main(["view", "--port", "99999"]) == 2
    assert "port" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "viser", None)
    assert main(["view"]) == 2
    assert "pip install '.[view]'" in capsys.readouterr().err


# What is no name, an address of documents that no machine has, and a label longer than names may have.
@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1", "x" * 70])
def test_the_viewer_listens_at_addresses_of_this_machine_alone(viser, host, monkeypatch, capsys):
    monkeypatch.setattr("pacevggt_patch.compare.view.make_plan", out_of_memory)
    assert main(["view", "--host", host]) == 2
    error = capsys.readouterr().err
    assert f"can't listen at {host}: " in error and "address of this machine" in error


def test_addresses_of_this_machine_are_taken(viser):
    from pacevggt_patch.compare.view import check_host

    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        check_host(host)


def test_the_viewer_is_refused_under_torchrun(viser, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["view"]) == 2
    assert "torchrun" in capsys.readouterr().err


def test_paths_stay_as_they_were_passed(backbone, room, tmp_path, monkeypatch):
    monkeypatch.chdir(room.parent)
    report = quick(backbone, [Path("room")], tmp_path)
    assert report["clips"][0]["path"] == "room"
    text = json.dumps({key: value for key, value in report.items() if key not in ("command", "backbone")})
    assert str(room.parent) not in text


def test_one_frame_is_no_comparison(tmp_path):
    write_images(tmp_path / "two", 2, (56, 56))
    write_images(tmp_path / "one", 1, (56, 56))
    for folder, frames in (("two", 1), ("one", None), ("one", 2)):
        with pytest.raises(PaceError, match="pairs"):
            make_plan(Options(clips=(tmp_path / folder,), frames=frames))
