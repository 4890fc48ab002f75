"""`pacevggt train`: what a run writes, runs that go on after a kill as if nothing had happened, and the command."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hosts import random_images, run, tiny_vggt, write_images
from safetensors.torch import load_file
from test_train import ARGUMENTS as MINI_ARGUMENTS

import pacevggt_patch
from pacevggt_patch import PaceError, PaceWeights, WeightsError, accelerate, summary
from pacevggt_patch.cli.main import main
from pacevggt_patch.method import full_heads
from pacevggt_patch.method.block_deltas import BlockDeltas
from pacevggt_patch.mini.training.train import main as train_mini
from pacevggt_patch.mini.training.trainer import Trainer
from pacevggt_patch.training import curve
from pacevggt_patch.training import run as command
from pacevggt_patch.training.backbones import check_backbone, load_backbone
from pacevggt_patch.training.fit import Fit, Settings
from pacevggt_patch.training.run import run_training
from pacevggt_patch.training.signals import Signals, Stopped
from pacevggt_patch.training.states import save_state
from pacevggt_patch.weights import tensorfile

MODES = ["global", "pre-aa"]
SETTINGS = Settings(
    steps=6, distil=0.34, clips=2, views=(2, 3), supervised=2, warm_up=2, calibration=2, checks=2, rate=1e-3
)


def with_own_settings(options):
    """`run_training`, whatever settings a command line gives."""
    return run_training(replace(options, settings=SETTINGS))


def settings(**changes) -> Settings:
    return Settings(**{**vars(SETTINGS), **changes})


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", 9)


def make_tiny(patch):
    """Make `pacevggt train` train a tiny model, quickly: it finds one full-attention head, and draws no picture."""
    patch.setattr(command, "load_backbone", lambda _: tiny_vggt())
    patch.setattr(command, "LOG_EVERY", 2)
    patch.setattr(command, "save_training_curve", lambda path, *_: path.touch())
    patch.setattr(full_heads, "LEAST_ERROR", 0.0)


@pytest.fixture
def tiny(monkeypatch):
    make_tiny(monkeypatch)


@pytest.fixture(params=["folder", "rooms"])
def place(request, folder):
    """Where the frames come from."""
    return {"images": folder} if request.param == "folder" else {"rooms": "plain"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs on images like those of `folder`, by mode, each made when it is first asked for."""
    base = tmp_path_factory.mktemp("finished")

    @cache
    def finished(mode):
        with pytest.MonkeyPatch.context() as patch:
            make_tiny(patch)
            images = write_images(base / mode / "images", 9)
            command.run_training(options(images, base / mode / "out", settings=settings(mode=mode)))
        return base / mode / "out"

    return finished


@pytest.fixture
def finished(runs):
    """A finished run of global pruning."""
    return runs("global")


class Harmful:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def options(folder, out, **changes):
    own = {"images": folder, "width": 56, "settings": SETTINGS, "save_every": 0, **changes}
    return command.Options(out=out, **own)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def same_files(first, second):
    first, second = (load_file(path) for path in (first, second))
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


def killed_at(number, monkeypatch, start):
    """Run something that is interrupted before a step."""
    step = Fit.step

    def dies(self, *args):
        if self.step_number == number:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            start()


@pytest.mark.parametrize("mode", MODES)
def test_a_run_writes_weights_report_and_curve(tiny, place, tmp_path, mode, monkeypatch):
    monkeypatch.setattr(command, "save_training_curve", curve.save_training_curve)
    state, before = torch.get_rng_state(), tiny_vggt().state_dict()
    out = tmp_path / "out"
    report = command.run_training(
        options(None, out, **{"images": None, **place}, settings=settings(mode=mode))
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert files(out) == [
        "calibrated.safetensors", "curve.png", "distilled.safetensors", "pace.safetensors", "report.json", "state.pt",
    ]  # fmt: skip
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert [(c["stage"], c["step"]) for c in report["checks"]] == [
        ("training-free", 0), ("calibrated", 0), ("distilled", 2), ("refined", 6),
    ]  # fmt: skip
    assert set(report["checks"][0]["ratios"]) == {"0.5", "0.3", "0.15"}
    assert (report["steps"], report["mode"]) == (6, mode)
    assert report["images"] == ("plain rooms" if "rooms" in place else "1 clip of 9 images")
    model = tiny_vggt()
    accelerate(model, 0.3, weights=out / "pace.safetensors")
    assert summary(model).config.mode == mode
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    weights = PaceWeights.load(out / "pace.safetensors")
    assert weights.keep_ratios == (0.1, 0.6)
    assert (weights.training["steps"], weights.training["settings"]["mode"]) == (6, mode)
    assert [list(head) for head in weights.full_heads] == report["full_heads"]
    assert len(weights.full_heads) == (mode == "global")
    assert report["parameters"] == sum(p.numel() for p in weights.modules().parameters()) > 0
    assert (out / "curve.png").stat().st_size > 5000
    assert "distilled" in command.format_checks(report["checks"])


@pytest.mark.parametrize("mode", MODES)
def test_each_stage_writes_what_it_taught(runs, mode):
    out, names = runs(mode), ("calibrated", "distilled", "pace")
    report = json.loads((out / "report.json").read_text())
    stages = [load_file(out / f"{name}.safetensors") for name in names]
    weights = [PaceWeights.load(out / f"{name}.safetensors") for name in names]
    assert set(weights[0].modules()) == (
        {"restoration"} if mode == "pre-aa" else set()
    )  # nothing that is untrained
    assert len({w.full_heads for w in weights}) == 1
    taught = [[bool(s[name].any()) for s in stages[1:]] for name in ("scorer.out.weight",)]
    assert taught == [[True, True]]
    moved = [any(up.any() for up in w.block_deltas.up.values()) for w in weights[1:]]
    assert moved == [False, True]
    if mode == "pre-aa":
        assert all(s["restoration.linear.0.weight"].any() for s in stages)
        assert [bool(s["merge.out.weight"].any()) for s in stages[1:]] == [False, True]
        assert weights[0].keep_ratios == (0.5, 0.3, 0.15)
    free, after = (check["ratios"]["0.3"]["tokens"] for check in report["checks"][:2])
    assert after < free


@pytest.mark.parametrize("mode", MODES)
def test_a_calibration_alone_writes_no_untrained_deltas(tiny, place, tmp_path, mode):
    chosen = Settings(steps=0, mode=mode, calibration=2, checks=1, views=(3,))
    report = command.run_training(options(None, tmp_path, **{"images": None, **place}, settings=chosen))
    assert [c["stage"] for c in report["checks"]] == ["training-free", "calibrated"]
    weights = PaceWeights.load(tmp_path / "pace.safetensors")
    assert weights.mode == mode and "calibrated" in str(weights)
    assert set(weights.modules()) == ({"restoration"} if mode == "pre-aa" else set())
    assert report["parameters"] == sum(p.numel() for p in weights.modules().parameters())
    assert len(weights.full_heads) == (mode == "global")
    model = accelerate(tiny_vggt(), weights=tmp_path / "pace.safetensors", min_frames=1)
    assert torch.isfinite(run(model, random_images())["depth"]).all()


@pytest.mark.parametrize(
    ("mode", "dies_at"), [("global", 1), ("global", 4), ("pre-aa", 2), ("pre-aa", 4)]
)  # in the first stage, between the stages, in the second
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    tiny, runs, folder, tmp_path, monkeypatch, mode, dies_at
):
    out = runs(mode)
    whole = json.loads((out / "report.json").read_text())
    killed = options(folder, tmp_path / "killed", settings=settings(mode=mode))
    killed_at(dies_at, monkeypatch, lambda: command.run_training(killed))
    monkeypatch.setattr(full_heads, "LEAST_ERROR", 1e9)  # it must not look for heads again
    resumed = json.loads(json.dumps(command.run_training(replace(killed, resume=True))))
    assert same_files(out / "pace.safetensors", killed.out / "pace.safetensors")
    for name in ("checks", "losses", "full_heads"):
        assert resumed[name] == whole[name]
    states = [torch.load(path / "state.pt", weights_only=True) for path in (out, killed.out)]
    for one, other in zip(*(s["optimizer"]["state"].values() for s in states), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_killed_run_on_rooms_goes_on_too(tiny, tmp_path, monkeypatch):
    plain = options(None, tmp_path / "whole", rooms="plain")
    command.run_training(plain)
    killed = replace(plain, out=tmp_path / "killed")
    killed_at(3, monkeypatch, lambda: command.run_training(killed))
    command.run_training(replace(killed, resume=True))
    assert same_files(plain.out / "pace.safetensors", killed.out / "pace.safetensors")


@pytest.mark.parametrize("mode", MODES)
def test_a_run_may_start_from_weights(tiny, runs, folder, tmp_path, mode):
    shutil.copytree(runs(mode), tmp_path / "first")
    start = str(tmp_path / "first" / "pace.safetensors")
    later = settings(mode=mode, distil=0.0, steps=4, seed=1)
    more = options(folder, tmp_path / "more", settings=later, start=start)
    report = command.run_training(more)
    assert [(c["stage"], c["step"]) for c in report["checks"]] == [("start", 0), ("refined", 4)]
    assert report["start"] == start
    assert files(more.out) == ["curve.png", "pace.safetensors", "report.json", "state.pt"]
    before, after = (load_file(tmp_path / name / "pace.safetensors") for name in ("first", "more"))
    moved = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {"block_deltas"} | ({"merge", "restoration"} if mode == "pre-aa" else set())
    heads = [PaceWeights.load(tmp_path / name / "pace.safetensors").full_heads for name in ("first", "more")]
    assert heads[0] == heads[1] and bool(heads[0]) == (mode == "global")
    assert PaceWeights.load(more.out / "pace.safetensors").training["start"] == start
    assert command.run_training(replace(more, resume=True))["steps"] == 4
    other = MODES[1 - MODES.index(mode)]
    for wrong, named in (
        (replace(more, out=tmp_path, settings=Settings(mode=mode, distil=0.1)), "400 steps"),
        (replace(more, resume=False), "--resume"),
        (replace(more, start=None, resume=True), start),
        (replace(more, out=tmp_path, settings=settings(mode=mode, steps=0, distil=0.0)), "--calibrate"),
        (replace(more, out=tmp_path, settings=settings(mode=other, distil=0.0)), f"--mode {mode}"),
    ):
        with pytest.raises(PaceError, match=named) as caught:
            command.run_training(wrong)
        assert isinstance(caught.value, WeightsError) == (named == f"--mode {mode}")


@pytest.mark.parametrize("mode", MODES)
def test_a_run_may_start_from_a_calibration(tiny, folder, tmp_path, mode, monkeypatch):
    calibrated = settings(mode=mode, steps=0)
    command.run_training(options(folder, tmp_path / "first", settings=calibrated))
    first = PaceWeights.load(tmp_path / "first" / "pace.safetensors")
    monkeypatch.setattr(full_heads, "LEAST_ERROR", 1e9)
    start = str(tmp_path / "first" / "pace.safetensors")
    command.run_training(
        options(folder, tmp_path / "more", settings=settings(mode=mode, distil=0.0), start=start)
    )
    weights = PaceWeights.load(tmp_path / "more" / "pace.safetensors")
    assert weights.full_heads == first.full_heads
    assert any(up.any() for up in weights.block_deltas.up.values())


def test_weights_of_another_checkpoint_start_nothing(tiny, folder, tmp_path):
    PaceWeights.new(tiny_vggt(seed=1)).save(tmp_path / "other.safetensors")
    start = str(tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="another checkpoint"):
        command.run_training(options(folder, tmp_path / "out", settings=settings(distil=0.0), start=start))


def test_a_run_goes_on_with_the_rank_and_the_strength_that_it_began_with(tiny, folder, tmp_path):
    weights = PaceWeights.new(tiny_vggt())
    weights.block_deltas = BlockDeltas(weights.block_deltas.shapes(), rank=4, full_strength=0.5)
    weights.library_version = "0.0.1"
    weights.save(tmp_path / "start.safetensors")
    start = str(tmp_path / "start.safetensors")
    one = options(folder, tmp_path / "out", settings=settings(distil=0.0, steps=2), start=start)
    for options_ in (one, replace(one, resume=True)):
        command.run_training(options_)
        written = PaceWeights.load(tmp_path / "out" / "pace.safetensors")
        assert (written.block_deltas.rank, written.block_deltas.full_strength) == (4, 0.5)
        assert written.library_version == pacevggt_patch.__version__


@pytest.mark.parametrize("scorer_rate", [0.0, 0.5])
def test_stage_two_leaves_the_scorer_alone_unless_it_is_told(tiny, runs, folder, tmp_path, scorer_rate):
    out = tmp_path if scorer_rate else runs("pre-aa")
    if scorer_rate:
        chosen = settings(mode="pre-aa", scorer_rate=scorer_rate)
        command.run_training(options(folder, out, settings=chosen))
    before, after = (load_file(out / f"{name}.safetensors") for name in ("distilled", "pace"))
    same = [torch.equal(value, after[name]) for name, value in before.items() if name.startswith("scorer")]
    assert all(same) if scorer_rate == 0 else not any(same)


def test_a_finished_run_is_not_trained_on(tiny, finished, folder, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "pace.safetensors").rename(out / "before.safetensors")
    report = command.run_training(options(folder, out, resume=True))
    assert report["steps"] == 6 and len(report["checks"]) == 4
    assert same_files(out / "before.safetensors", out / "pace.safetensors")


@pytest.mark.parametrize("mode", MODES)
def test_a_run_of_the_first_stage_alone(tiny, folder, tmp_path, mode):
    report = command.run_training(options(folder, tmp_path, settings=settings(mode=mode, distil=1.0)))
    assert [(c["stage"], c["step"]) for c in report["checks"]] == [
        ("training-free", 0),
        ("calibrated", 0),
        ("distilled", 6),
    ]
    weights = PaceWeights.load(tmp_path / "pace.safetensors")
    assert weights.scorer.out.weight.any()
    assert not any(up.any() for up in weights.block_deltas.up.values())


def test_another_run_can_not_be_resumed(tiny, finished, folder, tmp_path, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "out")
    for changes, named in (({"seed": 3}, "seed"), ({"mode": "pre-aa"}, "mode"), ({"views": (3,)}, "views")):
        with pytest.raises(PaceError, match=named):
            command.run_training(options(folder, out, settings=settings(**changes), resume=True))
    write_images(folder, 10)
    with pytest.raises(PaceError, match="source"):
        command.run_training(options(folder, out, resume=True))
    (folder / "009.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(command, "load_backbone", lambda _: tiny_vggt(seed=1))
        with pytest.raises(PaceError, match="backbone"):
            command.run_training(options(folder, out, resume=True))


def damaged(change):
    """Something that changes a state, or puts something else in its place."""

    def write(path):
        state = torch.load(path, weights_only=True)
        changed = change(state)
        torch.save(state if changed is None else changed, path)

    return write


def first_moments(state):
    return state["optimizer"]["state"][0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"torn"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-2000]),
        lambda path: torch.save(Harmful(path.with_name("harmed")), path),
        lambda path: torch.save(None, path),
        damaged(lambda _: []),
        damaged(lambda _: {}),
        damaged(lambda state: [state]),
        damaged(lambda state: state.update(step=10**9)),
        damaged(lambda state: state.update(step=-1)),
        damaged(lambda state: state.update(step=2.0)),
        damaged(lambda state: state.update(full_heads=((0, 99),))),
        damaged(lambda state: state.update(full_heads=3)),
        damaged(lambda state: state.update(checks=[])),
        damaged(lambda state: state.update(checks=[{"stage": "calibrated"}])),
        damaged(lambda state: state["checks"][-1].update(step=99)),
        damaged(lambda state: state["checks"][-1].pop("step") and None),
        damaged(lambda state: state.update(losses=[1.0])),
        damaged(lambda state: state.update(settings=None)),
        damaged(lambda state: state["modules"].popitem() and None),
        damaged(lambda state: state["modules"].update({"scorer.out.weight": torch.ones(3)})),
        damaged(lambda state: state["modules"]["scorer.out.weight"].fill_(float("nan")) is None),
        damaged(lambda state: state["optimizer"].update(state={})),
        damaged(lambda state: state["optimizer"]["state"].popitem() and None),
        damaged(lambda state: first_moments(state).update(exp_avg=torch.ones(1))),
        damaged(lambda state: first_moments(state).pop("exp_avg_sq") is None),
    ],
)
def test_a_damaged_state_is_named(tiny, folder, finished, tmp_path, damage):
    shutil.copytree(finished, tmp_path / "out")
    damage(tmp_path / "out" / "state.pt")
    with pytest.raises(PaceError, match=r"state\.pt") as caught:
        command.run_training(options(folder, tmp_path / "out", resume=True))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "harmed").exists()


def test_a_loss_that_is_no_number_ends_the_run(tiny, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Fit, "latest_losses", lambda _: {"total": float("nan")})
    with pytest.raises(PaceError, match="nan at step 2"):
        command.run_training(options(folder, tmp_path))


@pytest.mark.parametrize(("losses", "panels"), [([], 2), ([{"step": 1, "total": 2.0, "depth": 1.0}], 3)])
def test_the_curve_of_a_calibration_has_no_empty_panel(losses, panels, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curve, "save_figure", lambda figure, _: drawn.append(figure))
    checks = [{"stage": "calibrated", "step": 0, "ratios": {"0.3": {"rotation_deg": 1.0, "depth": 0.1}}}]
    curve.save_training_curve(tmp_path / "curve.png", losses, checks)
    assert len(drawn[0].axes) == panels and all(axis.lines for axis in drawn[0].axes)


def test_without_a_drawing_library_the_weights_are_written_all_the_same(
    tiny, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "save_training_curve", curve.save_training_curve)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "curve.png").write_bytes(b"of another run")
    command.run_training(options(folder, tmp_path, settings=settings(steps=0)))
    assert "matplotlib" in capsys.readouterr().err
    assert files(tmp_path) == [
        "calibrated.safetensors", "images", "pace.safetensors", "report.json", "state.pt",
    ]  # fmt: skip


# ---- runs that are told to stop


@pytest.fixture
def default_handlers():
    """Signals do what they do in a program of its own, and do so afterwards."""
    own = dict.fromkeys((signal.SIGTERM, signal.SIGHUP), signal.SIG_DFL)
    own[signal.SIGINT] = signal.default_int_handler
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    yield
    now = {number: signal.getsignal(number) for number in own}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert now == own


def told(number, monkeypatch, place, after=0, times=1):
    """Let a signal come where `Fit` does something, when it was done `after` times before."""
    own, calls = getattr(Fit, place), []

    def method(*args, **kwargs):
        calls.append(1)
        if len(calls) == after + 1:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return own(*args, **kwargs)

    monkeypatch.setattr(Fit, place, method)


@pytest.mark.parametrize(
    ("number", "status", "after"), [("SIGINT", 130, 0), ("SIGTERM", 143, 3), ("SIGHUP", 129, 5)]
)
def test_a_signal_ends_a_run_after_its_step_and_it_can_go_on(
    tiny, folder, finished, tmp_path, monkeypatch, capsys, default_handlers, number, status, after
):
    """Long before the first periodic state."""
    out = tmp_path / "out"
    given = ["train", "--images", str(folder), "--width", "56", "--out", str(out), "--device", "cpu"]
    monkeypatch.setattr(command, "run_training", with_own_settings)
    with monkeypatch.context() as patch:
        told(getattr(signal, number), patch, "step", after)
        assert main(given) == status
    error = capsys.readouterr().err.splitlines()[-1]
    assert number in error and f"step {after + 1}" in error and "--resume" in error
    assert torch.load(out / "state.pt", weights_only=True)["step"] == after + 1
    assert main([*given, "--resume"]) == 0
    assert same_files(finished / "pace.safetensors", out / "pace.safetensors")


def test_a_second_signal_ends_a_run_at_once(tiny, folder, tmp_path, monkeypatch, default_handlers):
    told(signal.SIGINT, monkeypatch, "step", 3, times=2)
    with pytest.raises(KeyboardInterrupt) as caught:
        command.run_training(options(folder, tmp_path, save_every=1000))
    assert not isinstance(caught.value, Stopped)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 2  # the end of the first stage


@pytest.mark.parametrize(
    ("place", "after", "said"),
    [("calibrate", 0, "before the first step"), ("begin_refinement", 0, "step 2"), ("check", 3, "step 6")],
)
def test_between_the_stages_a_signal_ends_a_run_at_once_and_no_step_is_lost(
    tiny, folder, finished, tmp_path, monkeypatch, default_handlers, place, after, said
):
    with monkeypatch.context() as patch:
        told(signal.SIGTERM, patch, place, after)
        with pytest.raises(Stopped, match=said):
            command.run_training(options(folder, tmp_path, save_every=1000))
    report = command.run_training(options(folder, tmp_path, resume=True))
    assert [c["stage"] for c in report["checks"]] == ["training-free", "calibrated", "distilled", "refined"]
    assert same_files(finished / "pace.safetensors", tmp_path / "pace.safetensors")


def test_signals_that_are_ignored_or_handled_by_others_stay_so(default_handlers):
    def own(*_):
        pass

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, own)
    with Signals() as signals:
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is own
        assert signal.getsignal(signal.SIGINT) == signals.receive
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_run_in_another_thread_leaves_signals_alone(tiny, folder, tmp_path, monkeypatch, default_handlers):
    seen, step = set(), Fit.step
    monkeypatch.setattr(Fit, "step", lambda *args: seen.add(signal.getsignal(signal.SIGTERM)) or step(*args))
    one = options(folder, tmp_path, settings=settings(steps=2))
    thread = threading.Thread(target=lambda: command.run_training(one))
    thread.start()
    thread.join()
    assert seen == {signal.SIG_DFL} and (tmp_path / "pace.safetensors").is_file()


PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from hosts import tiny_vggt
from pacevggt_patch.cli.main import main
from pacevggt_patch.method import full_heads
full_heads.LEAST_ERROR = 0.0
from pacevggt_patch.training import fit, run
from test_training_runs import with_own_settings
run.save_training_curve = lambda *_: None
run.load_backbone, run.run_training, step = (lambda _: tiny_vggt()), with_own_settings, fit.Fit.step
def says(self, drawn):
    print("step", self.step_number, flush=True)
    step(self, drawn)
fit.Fit.step = says
sys.exit(main(sys.argv[1:]))
"""


def started(*arguments, **environment):
    """`pacevggt train` of the tiny model in a process of its own, which says the number of each step."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), *filter(None, sys.path)])
    own = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "train", "--device", "cpu", "--width", "56", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=own,
    )  # fmt: skip


def wait_for(process, step):
    for line in process.stdout:
        if line.split() == ["step", str(step)]:
            return
    raise AssertionError(process.stderr.read())


def test_a_process_that_is_terminated_goes_on_to_the_same_weights(folder, finished, tmp_path):
    given = ["--images", folder, "--out", tmp_path / "out"]
    killed = started(*given)
    wait_for(killed, 3)
    killed.terminate()
    error = killed.communicate()[1].splitlines()[-1]
    step = torch.load(tmp_path / "out" / "state.pt", weights_only=True)["step"]
    assert killed.returncode == 143 and step >= 4 and f"SIGTERM after step {step}" in error
    resumed = started(*given, "--resume")
    assert resumed.communicate()[0] and resumed.returncode == 0
    assert same_files(finished / "pace.safetensors", tmp_path / "out" / "pace.safetensors")


def test_of_two_processes_both_stop_if_one_is_told_to(folder, tmp_path):
    common = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29000 + os.getpid() % 3000))
    processes = [
        started("--images", folder, "--out", tmp_path / "out", RANK=str(rank), **common) for rank in range(2)
    ]
    wait_for(processes[1], 3)
    processes[1].terminate()
    errors = [process.communicate(timeout=100)[1].splitlines()[-1] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], errors
    step = torch.load(tmp_path / "out" / "state.pt", weights_only=True)["step"]
    assert all(f"after step {step}" in error for error in errors)


def test_a_training_of_mini_that_is_told_to_stop_goes_on_too(tmp_path, monkeypatch, capsys, default_handlers):
    out, step = tmp_path / "out", Trainer.step

    def told_to(self, *args):
        if self.step_number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    given = [*MINI_ARGUMENTS, "--out", str(out), "--steps", "5", "--save-every", "1000"]
    assert train_mini([*given, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", told_to)
        with pytest.raises(Stopped, match="after step 3"):
            train_mini(given)
    state = out / "state.pt"
    good = state.read_bytes()
    for damage in (
        lambda path: path.write_bytes(good[:-2000]),
        damaged(lambda _: []),
        damaged(lambda _: {}),
        damaged(lambda state: state.update(step=10**9)),
        damaged(lambda state: state.update(step=-1)),
        damaged(lambda state: state.update(records=[{}])),
        damaged(lambda state: state["optimizer"]["values"].fill_(float("nan")) is None),
        damaged(lambda state: state["optimizer"].update(mean=torch.ones(1))),
    ):
        damage(state)
        with pytest.raises(PaceError, match=r"state\.pt"):
            train_mini([*given, "--resume"])
        state.write_bytes(good)
    (out / ".0123abcd.state.pt").touch()
    assert train_mini([*given, "--resume"]) == 0
    assert same_files(tmp_path / "whole" / "mini.safetensors", out / "mini.safetensors")
    assert not (out / ".0123abcd.state.pt").exists()


# ---- disks


@pytest.fixture
def full_disk():
    """No file may have more than some bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_named_and_the_old_state_stays(tmp_path, full_disk):
    save_state({"step": torch.ones(3)}, tmp_path / "state.pt")
    with pytest.raises(PaceError, match=r"state\.pt .*: File too large"):
        save_state({"step": torch.ones(3000)}, tmp_path / "state.pt")
    assert files(tmp_path) == ["state.pt"]
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"].shape == (3,)


def test_a_report_that_can_not_be_written_is_named(tiny, folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(command, "write_json", full)
    with pytest.raises(PaceError, match=r"report\.json .*: No space left"):
        command.run_training(options(folder, tmp_path, settings=settings(steps=0)))


def test_what_killed_runs_left_is_removed_and_nothing_else(tiny, folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    left = {".0123abcd.state.pt", ".deadbeef.pace.safetensors"}
    mine = {".0123abcd.notes.txt", ".state.pt", ".0123abcg.state.pt", "0123abcd.state.pt"}
    for name in left | mine:
        (out / name).touch()
    command.run_training(options(folder, out, settings=settings(steps=0)))
    assert mine <= {*files(out)} and not left & {*files(out)}


# ---- the command


@pytest.mark.parametrize("mode", MODES)
def test_the_command_line(tiny, folder, tmp_path, capsys, mode):
    out = tmp_path / "out"
    given = [
        "train",
        "--images",
        str(folder),
        "--views",
        "2",
        "3",
        "--width",
        "56",
        "--device",
        "cpu",
        "--mode",
        mode,
    ]
    given += ["--supervised-frames", "2"]
    assert main([*given, "--out", str(out), "--steps", "2", "--distil", "0.5"]) == 0
    shown, progress = capsys.readouterr()
    for said in ("training-free", "refined", "pace.safetensors"):
        assert said in shown, said
    assert "calibrating" in progress and "8/8" in progress
    weights = PaceWeights.load(out / "pace.safetensors")
    assert weights.mode == mode and weights.training["settings"]["supervised"] == 2
    for block, head in weights.full_heads:
        assert f"block {block} head {head}" in shown
    assert main([*given, "--calibrate", "--out", str(tmp_path / "fit")]) == 0
    weights = PaceWeights.load(tmp_path / "fit" / "pace.safetensors")
    assert [c["stage"] for c in weights.training["checks"]] == ["training-free", "calibrated"]
    assert weights.block_deltas is None
    capsys.readouterr()
    start = ["--start", str(tmp_path / "fit" / "pace.safetensors"), "--out", str(tmp_path / "more")]
    assert main([*given, *start, "--steps", "4"]) == 0
    assert "calibrating" not in capsys.readouterr().err
    training = PaceWeights.load(tmp_path / "more" / "pace.safetensors").training
    assert training["settings"]["distil"] == 0 and training["checks"][-1]["stage"] == "refined"


def test_the_mode_of_the_command_is_the_default_one(tiny, folder, tmp_path):
    given = [
        "train",
        "--images",
        str(folder),
        "--views",
        "3",
        "--width",
        "56",
        "--device",
        "cpu",
        "--calibrate",
    ]
    assert main([*given, "--out", str(tmp_path / "out")]) == 0
    assert PaceWeights.load(tmp_path / "out" / "pace.safetensors").mode == "global"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--images"),
        (["--images", "none", "--rooms"], "not both"),
        (["--images", "none"], "none does not exist"),
        (["--images", ".", "--textures", "none"], "--textures"),
        (["--rooms", "plain", "--textures", "none"], "--textures"),
        (["--rooms", "plain", "--steps", "-1"], "-1"),
        (["--rooms", "plain", "--supervised-frames", "0"], "supervised"),
        (["--rooms", "plain", "--scorer-rate", "0.5"], "--scorer-rate"),
        (["--rooms", "plain", "--device", "warp"], "'warp'"),
        (["--rooms", "plain", "--start", "none.safetensors", "--steps", "3"], "none.safetensors"),
    ],
)
def test_what_the_command_line_refuses(tiny, tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pacevggt: ") and named in error and error.count("\n") == 1


def test_a_large_model_wants_a_gpu(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "LARGE", 32)
    monkeypatch.setattr(command, "load_backbone", lambda _: tiny_vggt())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = ["--out", str(tmp_path / "out"), "--views", "2", "--width", "56", "--images", str(folder)]
    assert main(["train", *out]) == 2
    error = capsys.readouterr().err
    assert "--calibrate" in error and "--device cpu" in error
    assert main(["train", *out, "--calibrate"]) == 0
    out[1] += "-2"
    assert main(["train", *out, "--steps", "2", "--device", "cpu", "--resume"]) == 0
    assert f"{out[1]} holds no run to resume" in capsys.readouterr().err


# ---- backbones


@pytest.mark.parametrize(
    "name", ["no-such-file.pt", "runs/no-such-file.pt", "a/b/c", "/a/b", "pi3:nowhere.pt"]
)
def test_a_checkpoint_that_is_not_there(name):
    with pytest.raises(PaceError, match=r"backbone.* does not exist") as caught:
        load_backbone(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["mine", "Pi3", "foo:bar", "da3:depth-anything/DA3-LARGE"])
def test_a_backbone_that_names_no_family(name):
    with pytest.raises(PaceError, match="names no family") as caught:
        load_backbone(name)
    assert repr(name) in str(caught.value)
    assert all(family in str(caught.value) for family in ("pi3", "pi3x", "vggt-omega", "depth-anything-3"))


@pytest.mark.parametrize("name", ["mini", "facebook/VGGT-1B", "user/vggt-1.1", "pi3", "pi3:yyfz233/Pi3"])
def test_names_of_backbones_pass(name):
    check_backbone(name)


def test_pace_weights_are_no_checkpoint(tmp_path, monkeypatch):
    from vggt.models import vggt

    monkeypatch.setattr(vggt, "VGGT", lambda: pytest.fail("a model is built"))
    tensorfile.write(tmp_path / "pace.safetensors", {"any": torch.ones(1)}, "pace weights", 1, {})
    for name in (str(tmp_path / "pace.safetensors"), f"pi3:{tmp_path / 'pace.safetensors'}"):
        with pytest.raises(PaceError, match=r"pace\.safetensors holds pace weights.*--weights"):
            load_backbone(name)


def test_backbones_are_loaded_by_name_and_file(tmp_path):
    from pacevggt_patch.mini import MiniConfig, build_mini, save_mini

    config = MiniConfig(28, 14, 32, 2, 1, 4, (0, 1, 2, 3), 1, 2, 8, (8, 8, 8, 8))
    save_mini(build_mini(False, config), tmp_path / "own.safetensors")
    assert load_backbone(str(tmp_path / "own.safetensors")).mini_config == config
    assert load_backbone("mini").mini_config.embed_dim > 100


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path, monkeypatch):
    from vggt.models import vggt

    tiny, other = tiny_vggt(), tiny_vggt(seed=5)
    monkeypatch.setattr(vggt, "VGGT", lambda: tiny)
    torch.save(other.state_dict(), tmp_path / "own.pt")
    assert load_backbone(str(tmp_path / "own.pt")) is tiny
    assert torch.equal(tiny.aggregator.camera_token, other.aggregator.camera_token)
    (tmp_path / "torn.pt").write_bytes(b"torn")
    torch.save({"other": torch.ones(1)}, tmp_path / "other.pt")
    for name in ("torn.pt", "other.pt"):
        with pytest.raises(PaceError, match=name) as caught:
            load_backbone(str(tmp_path / name))
        assert not str(caught.value).endswith(":")
    assert "missing" in str(caught.value)
