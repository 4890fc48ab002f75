"""Arguments of the commands: numbers and devices that can't be are named in one line, before a model is loaded."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from hosts import write_images

from pacevggt_patch import PaceError
from pacevggt_patch.cli.main import main, make_parser
from pacevggt_patch.compare import runs
from pacevggt_patch.mini.training import train as mini
from pacevggt_patch.mini.training.trainer import Settings
from pacevggt_patch.runtime.device import usable_device
from pacevggt_patch.training import run as command

NO_SHARES = ["nan", "inf", "-inf", "-1", "1e999", "1e300"]
NO_COUNTS = ["0", "-1", str(10**12), str(10**400)]
DEVICES = ["banana", "meta", "cuda:99", "mps:99", "xpu:99", "cuda:-1", "hpu", "privateuseone"]


def unloadable(*_, **__):
    raise AssertionError("a model is loaded")


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    monkeypatch.setattr(command, "load_backbone", unloadable)
    monkeypatch.setattr(mini, "Trainer", unloadable)
    monkeypatch.setattr(runs, "load_backbone", unloadable)


def refused(capsys, arguments, named):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("pacevggt: ") and error.count("\n") == 1 and len(error) < 400
    assert named in error


@pytest.mark.parametrize(
    ("option", "values", "named"),
    [
        ("--rate", NO_SHARES, "rate"),
        ("--scorer-rate", NO_SHARES, "scorer_rate"),
        ("--distil", [*NO_SHARES, "1.1"], "distil"),
        ("--steps", NO_COUNTS[1:], "steps"),
        ("--clips", NO_COUNTS, "clips"),
        ("--views", [*NO_COUNTS, "1"], "views"),
        ("--supervised-frames", NO_COUNTS, "supervised"),
        ("--seed", [str(10**30), str(-(10**30))], "seed"),
        ("--width", [*NO_COUNTS, "57", "-14"], "width"),
    ],
)
def test_numbers_that_training_can_not_take(tmp_path, capsys, option, values, named):
    images = write_images(tmp_path / "images", 9)
    for value in values:
        for place in (["--rooms"], ["--rooms", "plain"], ["--images", str(images)]):
            out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
            refused(capsys, ["train", *place, *out, f"{option}={value}"], named)
    assert not (tmp_path / "out").exists()


def test_views_that_scenes_do_not_have_are_named(tmp_path, capsys):
    refused(capsys, ["train", "--rooms", "--views", "8", "97", "--out", str(tmp_path)], "views")
    assert Settings(frames=96, views=(96,)).views == (96,)
    with pytest.raises(PaceError, match="views"):
        Settings(frames=97, views=(97,))


@pytest.mark.parametrize(
    ("option", "values", "named"),
    [
        ("--frames", NO_COUNTS, "frames"),
        ("--keep-ratio", [*NO_SHARES, "0"], "keep_ratio"),
        ("--repeats", NO_COUNTS, "repeats"),
        ("--merge-budget", NO_SHARES, "merge_budget"),
    ],
)
def test_numbers_that_the_demo_can_not_take(tmp_path, capsys, option, values, named):
    for value in values:
        given = ["demo", "--out", str(tmp_path / "out"), "--device", "cpu", f"{option}={value}"]
        refused(capsys, given, named)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--seconds", [*NO_SHARES[:5], "0"]),
        ("--steps", NO_COUNTS),
        ("--evaluate-every", NO_SHARES[:5]),
        ("--save-every", NO_SHARES[:5]),
        *((f"--{name}", NO_COUNTS) for name in ("frames", "dense", "size", "procedural", "views")),
        ("--warm-up", NO_COUNTS[1:]),
        ("--seed", [str(10**30)]),
        *((f"--{name}", NO_SHARES) for name in ("muon-rate", "adam-rate", "decay")),
        ("--config", ["3", "[]"]),
    ],
)
def test_numbers_that_training_of_mini_can_not_take(tmp_path, option, values):
    length = [] if option in ("--seconds", "--steps") else ["--steps", "1"]
    for value in values:
        with pytest.raises(PaceError, match=option.strip("-").split("-")[0]) as caught:
            mini.main(["--out", str(tmp_path / "out"), "--device", "cpu", *length, f"{option}={value}"])
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", DEVICES)
def test_devices_that_there_are_not(tmp_path, capsys, device):
    for given in (["train", "--rooms", "plain"], ["demo"]):
        refused(capsys, [*given, "--out", str(tmp_path / "out"), "--device", device], repr(device))
    with pytest.raises(PaceError, match=repr(device)):
        mini.main(["--out", str(tmp_path / "out"), "--steps", "1", "--device", device])
    assert not (tmp_path / "out").exists()


def test_cuda_is_the_gpu_of_this_process(monkeypatch):
    def empty(_, device):
        """As with three GPUs, the first of them the current one."""
        if (device.index or 0) > 3:
            raise RuntimeError("invalid device ordinal")
        number = device.index or 0 if device.type == "cuda" else None
        return SimpleNamespace(device=torch.device(device.type, number))

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert usable_device("cuda") == usable_device(None) == torch.device("cuda", 0)
    assert usable_device("cuda:3") == torch.device("cuda", 3) and usable_device("cpu").type == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert usable_device("cuda") == usable_device(None) == torch.device("cuda", 2)
    monkeypatch.setenv("LOCAL_RANK", "two")
    with pytest.raises(PaceError, match="two"):
        usable_device("cuda")


def test_without_a_command_the_help_is_printed(capsys):
    assert main([]) == 2
    shown = capsys.readouterr().err
    assert all(
        name in shown for name in ("compare", "demo", "evaluate", "view", "train", "push", "cache", "env")
    )


def test_stages_are_named_as_in_the_guide(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "distillation" in shown and "refinement" in shown and "stage" not in shown


@pytest.mark.parametrize("library", ["matplotlib", "plotly"])
def test_a_library_that_the_demo_lacks_is_named_before_work_starts(tmp_path, monkeypatch, capsys, library):
    monkeypatch.setitem(sys.modules, library, None)
    refused(
        capsys,
        ["demo", "--out", str(tmp_path / "out")],
        f"{library}; in the folder of the checkout: pip install '.[compare]'",
    )
    assert not (tmp_path / "out").exists()


def test_a_calibration_that_finds_no_head_says_so(tmp_path, monkeypatch, capsys):
    checks = [{"stage": "calibrated", "step": 0, "ratios": {}}]
    monkeypatch.setattr(
        command, "run_training", lambda _: {"mode": "global", "full_heads": [], "checks": checks}
    )
    assert main(["train", "--rooms", "--calibrate", "--out", str(tmp_path)]) == 0
    assert "none was found" in capsys.readouterr().out
