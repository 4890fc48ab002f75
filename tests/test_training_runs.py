"""`pacevggt train`: what a run writes, runs that go on after a kill as if nothing had happened, and the command."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from hosts import random_images, run, tiny_vggt, write_images
from safetensors.torch import load_file

import pacevggt_patch
from pacevggt_patch import PaceError, PaceWeights, WeightsError, accelerate, summary
from pacevggt_patch.cli.main import main
from pacevggt_patch.method import full_heads
from pacevggt_patch.method.block_deltas import BlockDeltas
from pacevggt_patch.training import curve
from pacevggt_patch.training import run as command
from pacevggt_patch.training.backbones import load_backbone
from pacevggt_patch.training.fit import Fit, Settings

MODES = ["global", "pre-aa"]
SETTINGS = Settings(
    steps=6, distil=0.34, clips=2, views=(2, 3), supervised=2, warm_up=2, calibration=2, checks=2, rate=1e-3
)


def settings(**changes) -> Settings:
    return Settings(**{**vars(SETTINGS), **changes})


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", 9)


@pytest.fixture
def tiny(monkeypatch):
    """`pacevggt train` trains a tiny model, quickly, and finds one full-attention head."""
    monkeypatch.setattr(command, "load_backbone", lambda _: tiny_vggt())
    monkeypatch.setattr(command, "LOG_EVERY", 2)
    monkeypatch.setattr(full_heads, "LEAST_ERROR", 0.0)


@pytest.fixture(params=["folder", "rooms"])
def place(request, folder):
    """Where the frames come from."""
    return {"images": folder} if request.param == "folder" else {"rooms": "plain"}


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
def test_a_run_writes_weights_report_and_curve(tiny, place, tmp_path, mode):
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
    assert (out / "curve.png").stat().st_size > 5000
    assert "distilled" in command.format_checks(report["checks"])


@pytest.mark.parametrize("mode", MODES)
def test_each_stage_writes_what_it_taught(tiny, folder, tmp_path, mode):
    report = command.run_training(options(folder, tmp_path, settings=settings(mode=mode)))
    names = ("calibrated", "distilled", "pace")
    stages = [load_file(tmp_path / f"{name}.safetensors") for name in names]
    weights = [PaceWeights.load(tmp_path / f"{name}.safetensors") for name in names]
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
    assert len(weights.full_heads) == (mode == "global")
    model = accelerate(tiny_vggt(), weights=tmp_path / "pace.safetensors", min_frames=1)
    assert torch.isfinite(run(model, random_images())["depth"]).all()


@pytest.mark.parametrize(
    ("mode", "dies_at"), [("global", 1), ("global", 4), ("pre-aa", 2), ("pre-aa", 4)]
)  # in the first stage, between the stages, in the second
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tiny, folder, tmp_path, monkeypatch, mode, dies_at):
    plain = options(folder, tmp_path / "whole", settings=settings(mode=mode))
    whole = command.run_training(plain)
    killed = replace(plain, out=tmp_path / "killed")
    killed_at(dies_at, monkeypatch, lambda: command.run_training(killed))
    monkeypatch.setattr(full_heads, "LEAST_ERROR", 1e9)  # it must not look for heads again
    resumed = command.run_training(replace(killed, resume=True))
    assert same_files(plain.out / "pace.safetensors", killed.out / "pace.safetensors")
    for name in ("checks", "losses", "full_heads"):
        assert resumed[name] == whole[name]
    states = [torch.load(path / "state.pt", weights_only=True) for path in (plain.out, killed.out)]
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
def test_a_run_may_start_from_weights(tiny, folder, tmp_path, mode):
    command.run_training(options(folder, tmp_path / "first", settings=settings(mode=mode)))
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
        (replace(more, out=tmp_path, settings=Settings(mode=mode)), "400 steps"),
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
def test_stage_two_leaves_the_scorer_alone_unless_it_is_told(tiny, folder, tmp_path, scorer_rate):
    chosen = settings(mode="pre-aa", scorer_rate=scorer_rate)
    command.run_training(options(folder, tmp_path, settings=chosen))
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("distilled", "pace"))
    same = [torch.equal(value, after[name]) for name, value in before.items() if name.startswith("scorer")]
    assert all(same) if scorer_rate == 0 else not any(same)


def test_a_finished_run_is_not_trained_on(tiny, folder, tmp_path):
    command.run_training(options(folder, tmp_path))
    (tmp_path / "pace.safetensors").rename(tmp_path / "before.safetensors")
    report = command.run_training(options(folder, tmp_path, resume=True))
    assert report["steps"] == 6 and len(report["checks"]) == 4
    assert same_files(tmp_path / "before.safetensors", tmp_path / "pace.safetensors")


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


def test_another_run_can_not_be_resumed(tiny, folder, tmp_path, monkeypatch):
    command.run_training(options(folder, tmp_path))
    for changes, named in (({"seed": 3}, "seed"), ({"mode": "pre-aa"}, "mode"), ({"views": (3,)}, "views")):
        with pytest.raises(PaceError, match=named):
            command.run_training(options(folder, tmp_path, settings=settings(**changes), resume=True))
    write_images(folder, 10)
    with pytest.raises(PaceError, match="source"):
        command.run_training(options(folder, tmp_path, resume=True))
    (folder / "009.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(command, "load_backbone", lambda _: tiny_vggt(seed=1))
        with pytest.raises(PaceError, match="backbone"):
            command.run_training(options(folder, tmp_path, resume=True))
    (tmp_path / "state.pt").write_bytes(b"torn")
    with pytest.raises(PaceError, match=r"state\.pt is damaged"):
        command.run_training(options(folder, tmp_path, resume=True))


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
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command.run_training(options(folder, tmp_path, settings=settings(steps=0)))
    assert "matplotlib" in capsys.readouterr().out
    assert files(tmp_path) == [
        "calibrated.safetensors", "images", "pace.safetensors", "report.json", "state.pt",
    ]  # fmt: skip


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
    shown = capsys.readouterr().out
    for said in ("training-free", "calibrating on 8 clips", "refined", "pace.safetensors"):
        assert said in shown, said
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
    assert main([*given, *start, "--steps", "20"]) == 0
    assert "calibrating" not in capsys.readouterr().out
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
        (["--images", "none"], "none is not a folder"),
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
    assert f"{out[1]} holds no run to resume" in capsys.readouterr().out


# ---- backbones


@pytest.mark.parametrize("name", ["no-such-file.pt", "a/b/c", "mine"])
def test_a_backbone_that_is_nothing(name):
    with pytest.raises(PaceError, match="backbone") as caught:
        load_backbone(name)
    assert repr(name) in str(caught.value)


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
        with pytest.raises(PaceError, match=name):
            load_backbone(str(tmp_path / name))
