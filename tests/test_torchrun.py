"""Commands under torchrun: two real processes, joined by gloo, against one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import test_training_runs as training
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hosts import write_images
from scannet import write_scene
from test_compare import SMALL
from test_training_steps import fitting, stirred

from pacevggt_patch import PaceError
from pacevggt_patch.cli.main import main
from pacevggt_patch.compare import compare, shared_runs
from pacevggt_patch.compare.shared_runs import SharedRunner
from pacevggt_patch.evaluate import evaluate
from pacevggt_patch.mini import build_mini, save_mini
from pacevggt_patch.patching.guest import guest
from pacevggt_patch.patching.install import state_of
from pacevggt_patch.runtime.ranks import place_of_torchrun, processes_of_torchrun
from pacevggt_patch.training.fit import Fit
from pacevggt_patch.training.run import run_training

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

CPU = torch.device("cpu")
COMPARED = {"frames": 5, "repeats": 2, "device": "cpu", "keep_ratios": [0.3]}
SCENES = ("scene0000_00", "scene0001_00", "scene0002_01")


def files_in(folder):
    """A tiny checkpoint, and a clip; beside them scenes of ScanNet."""
    checkpoint, clip = folder / "small.safetensors", folder / "clip"
    if not checkpoint.exists():
        save_mini(build_mini(False, SMALL), checkpoint)
        write_images(clip, 5, (56, 56))
        for name in SCENES:
            write_scene(folder / "scans" / name, 4)
    return str(checkpoint), str(clip)


def judged(folder, **ranks):
    """What a check says, and the losses of a step."""
    model, weights, source, settings = fitting(folder / "clip", checks=3, views=(2, 3), distil=0.0)
    stirred(weights)
    with guest(model, weights):
        fit = Fit(model, weights, source, settings, **ranks)
        check = fit.check() if ranks.get("world") != 1 else None
        fit.step(fit.draw(0))
        return check, fit.latest_losses()


def caught(function):
    try:
        function()
    except PaceError as error:
        return str(error)
    return None


def work(rank, folder, ports):
    os.environ |= {"PACEVGGT_CACHE": "off", "WORLD_SIZE": "2", "RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    checkpoint, clip = files_in(folder)
    out = folder / f"out{rank}"

    def compares(name="", **given):
        return compare(checkpoint, [clip], out=out / name, process_group=True, **COMPARED | given)

    found = {"report": compares(), "judged": judged(folder, rank=rank, world=2)}
    with processes_of_torchrun(CPU) as ranks:
        found["ranks"] = ranks.rank, ranks.world
    found["left"] = dist.is_initialized()
    found["pre-aa"] = caught(lambda: compares("no", modes=["pre-aa"]))
    found["missing"] = caught(lambda: compares("no", weights="missing.safetensors"))
    with pytest.MonkeyPatch.context() as patch:
        training.make_tiny(patch)
        settings = replace(training.SETTINGS, seed=rank)
        options = training.options(folder / "clip", folder / f"train{rank}", settings=settings)
        found["seeds"] = caught(lambda: run_training(options))
    found["joined"] = caught(lambda: joined_without_memory(rank, compares))
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}  # as torchrun has it
    for (name, step), port in zip(STEPS.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        with pytest.MonkeyPatch.context() as patch:
            found[name] = step(folder, rank, patch)
    # The last one: the other process waits for what this one should have sent, until it is gone.
    dist.init_process_group("gloo", init_method=f"file://{folder}/last", rank=rank, world_size=2)
    found["forward"] = caught(lambda: forward_without_memory(rank, compares))
    torch.save(found, folder / f"{rank}.pt")


def joined_without_memory(rank, compares):
    """Rank 0 holds the outputs of all frames."""
    own = shared_runs.gather_outputs

    def gather(*given):
        joined = own(*given)
        if rank == 0:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return joined

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_runs, "gather_outputs", gather)
        compares("no", weights=None)


def forward_without_memory(rank, compares):
    """By an error of cuBLAS, at the end of the forward that all share."""
    own = shared_runs.SharedRunner.forward

    def forward(self, images):
        outputs = own(self, images)
        if rank == 0 and len(images) < COMPARED["frames"] and state_of(self.model).ranks is not None:
            raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_runs.SharedRunner, "forward", forward)
        compares("no", weights=None)


def said(*arguments):
    """Exit status of a command, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(list(map(str, arguments)))
    return status, out.getvalue(), err.getvalue()


def compares_by_command(folder, out, *more):
    checkpoint, clip = files_in(folder)
    given = ("--backbone", checkpoint, "--clip", clip, "--device", "cpu", "--frames", "4", "--repeats", "1")
    return said("compare", *given, "--out", folder / out, *more)


def without_an_extra(folder, rank, patch):
    patch.setitem(sys.modules, "plotly", None)  # what Python takes for one that can't be imported
    patch.setattr(dist, "init_process_group", None)
    return compares_by_command(folder, "none")


def on_two_devices(folder, rank, patch):
    def enter():
        with processes_of_torchrun(torch.device("cuda", 0) if rank else CPU):
            pass

    return caught(enter)


EVALUATED = {"frames": 4, "width": 56, "weights": None, "keep_ratios": (0.5,), "device": "cpu"}


def evaluates(folder, rank, patch):
    given = ("--frames", 4, "--width", 56, "--weights", "none", "--keep-ratios", "0.5", "--device", "cpu")
    checkpoint, _ = files_in(folder)
    where = ("--backbone", checkpoint, "--out", folder / "evaluated")
    return said("evaluate", folder / "scans", "--dataset", "scannet", *given, *where)


def one_fails(folder, rank, patch):
    predict = SharedRunner.predict

    def fails(self, side, *rest):
        if side.config is not None and rank == 1:
            raise PaceError("the disk is full")
        return predict(self, side, *rest)

    patch.setattr(SharedRunner, "predict", fails)
    return compares_by_command(folder, "failed")


# One after another in the same two processes, each with a store of its own, as torchrun gives it.
STEPS = {
    "without an extra": without_an_extra,
    "printed": lambda folder, rank, patch: compares_by_command(folder, "printed"),
    "without weights": lambda folder, rank, patch: compares_by_command(
        folder, "none", "--weights", "no.safetensors"
    ),
    "evaluated": evaluates,
    "devices": on_two_devices,
    "one fails": one_fails,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    files_in(folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What each process found."""
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in STEPS]
    mp.spawn(work, (folder, [store.port for store in stores]), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_a_comparison_finds_what_one_process_finds(found, folder, monkeypatch):
    """Also which heads see all tokens: the first process calibrates the model on the clip."""
    monkeypatch.setenv("PACEVGGT_CACHE", "off")
    checkpoint, clip = files_in(folder)
    alone = compare(checkpoint, [clip], out=folder / "alone", **COMPARED)["clips"][0]
    report = found[0]["report"]
    together = report["clips"][0]
    assert report["processes"] == 2 and report["command"].startswith(
        "torchrun --nproc-per-node 2 -m pacevggt_patch compare "
    )
    assert len(together["settings"]) == len(alone["settings"]) == 1
    for one, other in zip(together["settings"], alone["settings"], strict=True):
        assert (one["name"], one["full_heads"], one["kept_tokens"]) == (
            other["name"],
            other["full_heads"],
            other["kept_tokens"],
        )
        assert "calibrated on the first clip" in one["weights"]
        for key in ("rotation_deg", "direction_deg", "depth"):
            assert one["agreement"][key]["median"] == pytest.approx(
                other["agreement"][key]["median"], rel=1e-3, abs=1e-5
            )
        assert len(one["seconds_of_runs"]) == 2
        assert one["speedup"] == pytest.approx(together["stock"]["seconds"] / one["seconds"])


def test_the_first_process_writes_and_no_other_does(found, folder):
    assert json.loads((folder / "out0" / "report.json").read_text()) == found[0]["report"]
    assert (folder / "out0" / "report.html").is_file()
    assert not (folder / "out1").exists() and found[1]["report"]["clips"] == []


def test_a_check_of_training_is_that_of_one_process(found, folder):
    """To the bit: each clip is looked at by one of them, and the mean is taken over all."""
    wanted, _ = judged(folder)
    assert found[0]["judged"][0] == found[1]["judged"][0] == wanted
    assert all(row["depth"] > 0 for row in wanted.values())


def test_losses_of_training_are_means_over_the_processes(found, folder):
    one, other = (judged(folder, rank=rank, world=1)[1] for rank in range(2))
    losses = found[0]["judged"][1]
    assert losses == found[1]["judged"][1] and one["total"] != pytest.approx(other["total"], rel=1e-3)
    for name in losses.keys() - {"norm"}:
        assert losses[name] == pytest.approx((one[name] + other[name]) / 2, rel=1e-5, abs=1e-7)


# What the message names, on both ranks.
REFUSED = {"pre-aa": ('mode="pre-aa"',), "missing": ("missing.safetensors",), "seeds": ("settings", "rank 1")}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_both(found, name):
    for one in found:
        assert one[name] is not None and all(part in one[name] for part in REFUSED[name]), one[name]


def test_a_rank_without_memory_ends_all(found):
    """It does not go on with the next part of the comparison, for which it would be out of step with the others."""
    first, other = (one["joined"] for one in found)
    assert "memory of rank 0" in first and "memory of rank 0" in other and "rank 0 can't go on" in other
    first, other = (one["forward"] for one in found)
    assert "memory of rank 0" in first and "can't reach the others" in other


def test_a_group_that_is_there_is_taken_and_left(found):
    assert [one["ranks"] for one in found] == [(0, 2), (1, 2)] and all(one["left"] for one in found)


def test_one_process_is_no_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with processes_of_torchrun(CPU) as ranks:
        assert ranks is None and not dist.is_initialized()


def test_a_rank_without_its_world_counts_for_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")  # left over from elsewhere
    assert place_of_torchrun() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert place_of_torchrun() == (1, 3)


@pytest.mark.parametrize(
    ("rank", "world", "words"),
    [
        ("0", "two", ("WORLD_SIZE", "two")),
        ("0", "0", ("WORLD_SIZE", "0")),
        ("0", "", ("WORLD_SIZE",)),
        ("one", "2", ("RANK", "one")),
        ("-1", "2", ("RANK", "-1")),
        ("2", "2", ("RANK", "WORLD_SIZE", "2 of 2")),
        (None, "2", ("RANK", "torchrun")),
    ],
)
def test_a_place_that_is_none_is_refused(rank, world, words, folder, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.delenv("RANK", raising=False) if rank is None else monkeypatch.setenv("RANK", rank)
    with pytest.raises(PaceError) as refused:
        place_of_torchrun()
    assert all(word in str(refused.value) for word in words)
    # What needs no place goes on, what needs one says it.
    assert main(["cache"]) == 0 and main(["push", "none.safetensors", "user/repo"]) == 2
    assert "none.safetensors" in capsys.readouterr().err
    status, _, err = compares_by_command(folder, "none")
    assert status == 2 and words[0] in err


def test_processes_that_do_not_meet_are_said(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PaceError, match="torchrun"), processes_of_torchrun(CPU):
        pass
    assert not dist.is_initialized()


def test_processes_on_different_devices_are_refused(found):
    """Before the group is made, for which they would wait."""
    for one in found:
        assert "rank 0 runs on cpu and rank 1 on cuda" in one["devices"]


def test_what_all_lack_is_said_by_the_first_process_before_there_is_a_group(found):
    (status, out, err), (other_status, *other) = (one["without an extra"] for one in found)
    assert (status, other_status) == (2, 2) and out == "" and other == ["", ""]
    assert err.startswith("pacevggt (rank 0): ") and "plotly" in err


def test_what_ends_all_is_said_by_the_first_process(found):
    (status, _, err), (other_status, *other) = (one["without weights"] for one in found)
    assert (status, other_status) == (2, 2)
    assert "pacevggt (rank 0): " in err and "no.safetensors" in err and "pacevggt" not in "".join(other)


def test_a_process_that_fails_alone_says_so(found, folder):
    (status, out, err), (other_status, _, other) = (one["one fails"] for one in found)
    assert (status, other_status) == (2, 2)
    assert "pacevggt (rank 1): the disk is full" in other and "pacevggt (rank 0): " in err and "rank 1" in err
    assert "speed-up" not in out and not (folder / "failed" / "report.json").exists()


def test_the_command_prints_once(found):
    (status, out, _), (other_status, other, _) = (one["printed"] for one in found)
    assert (status, other_status, other) == (0, 0, "")
    assert out.count("wrote") == 1 and out.count("speed-up") == 1 and "accelerated in 2" in out


def test_processes_share_the_scenes_and_merge_exactly(found, folder, tmp_path):
    """One has two scenes, the other one."""
    (status, out, _), (other_status, other, _) = (one["evaluated"] for one in found)
    assert (status, other_status, other) == (0, 0, "") and "camera AUC@30" in out
    checkpoint, _ = files_in(folder)
    alone = evaluate(folder / "scans", "scannet", out=tmp_path / "out", backbone=checkpoint, **EVALUATED)
    summary = json.loads((folder / "evaluated" / "summary.json").read_text())
    assert summary["settings"] == alone["settings"] and summary["scenes"] == len(SCENES)
    for side, one in zip(summary["sides"], alone["sides"], strict=True):
        assert side["metrics"] == one["metrics"]


def torchrun(*arguments, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PACEVGGT_CACHE": "off", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=240, env=environment, **options
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_command_prints_once_on_gpus(folder, tmp_path):
    checkpoint, clip = files_in(folder)
    given = ("--backbone", checkpoint, "--clip", clip, "--device", "cuda", "--frames", "4", "--repeats", "1")
    run = torchrun("-m", "pacevggt_patch", "compare", *given, "--out", str(tmp_path / "out"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("wrote") == 1 and run.stdout.count("speed-up") == 1
    assert "accelerated in 2" in run.stdout


KILLED = """
import os, signal, sys
from pacevggt_patch.cli import main as command
from pacevggt_patch.compare import shared_runs

predict = shared_runs.SharedRunner.predict

def killed(self, side, *rest):
    if side.config is not None and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return predict(self, side, *rest)

shared_runs.SharedRunner.predict = killed
sys.exit(command.main(sys.argv[1:]))
"""


def test_a_process_that_is_killed_ends_all_and_is_named(folder, tmp_path):
    checkpoint, clip = files_in(folder)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    given = ("--backbone", checkpoint, "--clip", clip, "--device", "cpu", "--frames", "4", "--repeats", "1")
    run = torchrun(str(script), "compare", *given, "--out", str(tmp_path / "out"))
    assert run.returncode != 0 and "SIGKILL" in run.stderr
    assert "rank      : 1" in run.stderr  # of torchrun, about the first that failed
    assert "speed-up" not in run.stdout and not (tmp_path / "out" / "report.json").exists()
