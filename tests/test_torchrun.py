"""Commands under torchrun: two real processes, joined by gloo, against one."""

from __future__ import annotations

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
from test_compare import SMALL
from test_training_steps import fitting, stirred

from pacevggt_patch import PaceError
from pacevggt_patch.compare import compare
from pacevggt_patch.mini import build_mini, save_mini
from pacevggt_patch.patching.guest import guest
from pacevggt_patch.runtime.ranks import processes_of_torchrun
from pacevggt_patch.training.fit import Fit
from pacevggt_patch.training.run import run_training

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

CPU = torch.device("cpu")
COMPARED = {"frames": 5, "repeats": 2, "device": "cpu", "keep_ratios": [0.3]}


def files_in(folder):
    """A tiny checkpoint, and a clip."""
    checkpoint, clip = folder / "small.safetensors", folder / "clip"
    if not checkpoint.exists():
        save_mini(build_mini(False, SMALL), checkpoint)
        write_images(clip, 5, (56, 56))
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


def work(rank, folder):
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
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    files_in(folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What each process found."""
    mp.spawn(work, (folder,), nprocs=2)
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


def test_a_group_that_is_there_is_taken_and_left(found):
    assert [one["ranks"] for one in found] == [(0, 2), (1, 2)] and all(one["left"] for one in found)


def test_one_process_is_no_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with processes_of_torchrun(CPU) as ranks:
        assert ranks is None and not dist.is_initialized()


def test_processes_that_do_not_meet_are_said(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PaceError, match="torchrun"), processes_of_torchrun(CPU):
        pass
    assert not dist.is_initialized()


def meet(rank, port, folder):
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # as torchrun has it
    device = torch.device("cuda", 0) if rank else CPU

    def enter():
        with processes_of_torchrun(device):
            pass

    (folder / f"{rank}.txt").write_text(str(caught(enter)))


def test_processes_on_different_devices_are_refused(tmp_path):
    """Before the group is made, for which they would wait."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(meet, (store.port, tmp_path), nprocs=2)
    for rank in range(2):
        assert "rank 0 runs on cpu and rank 1 on cuda" in (tmp_path / f"{rank}.txt").read_text()


def torchrun(*arguments, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PACEVGGT_CACHE": "off", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=240, env=environment, **options
    )


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def test_the_command_prints_once(folder, tmp_path, device):
    checkpoint, clip = files_in(folder)
    given = ("--backbone", checkpoint, "--clip", clip, "--device", device, "--frames", "4", "--repeats", "1")
    run = torchrun("-m", "pacevggt_patch", "compare", *given, "--out", str(tmp_path / "out"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("wrote") == 1 and run.stdout.count("speed-up") == 1
    assert "accelerated in 2" in run.stdout


FAILS = """
import os, signal, sys, time, torch
from pacevggt_patch import PaceError
from pacevggt_patch.cli import main as command
from pacevggt_patch.compare import shared_runs

predict = shared_runs.SharedRunner.predict

def fails(self, side, *rest):
    if side.config is not None and os.environ["RANK"] == "1":
        if sys.argv[1] == "raises":
            raise PaceError("the disk is full")
        os.kill(os.getpid(), signal.SIGKILL)
    return predict(self, side, *rest)

shared_runs.SharedRunner.predict = fails
sys.exit(command.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "how,said", [("raises", "pacevggt (rank 1): the disk is full"), ("is killed", "SIGKILL")]
)
def test_a_process_that_fails_ends_all_and_is_named(folder, tmp_path, how, said):
    checkpoint, clip = files_in(folder)
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    given = ("--backbone", checkpoint, "--clip", clip, "--device", "cpu", "--frames", "4", "--repeats", "1")
    run = torchrun(str(script), how, "compare", *given, "--out", str(tmp_path / "out"))
    assert run.returncode != 0 and said in run.stderr
    assert "rank      : 1" in run.stderr  # of torchrun, about the first that failed
    assert "speed-up" not in run.stdout and not (tmp_path / "out" / "report.json").exists()
