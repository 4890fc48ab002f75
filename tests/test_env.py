"""`pacevggt env` and `python -m pacevggt_patch`: what they tell, on machines where much is missing, too."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pacevggt_patch
from pacevggt_patch.cli.main import main
from pacevggt_patch.runtime import machine
from pacevggt_patch.runtime.attention import Library


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a network is asked"))


def told_as_json(capsys) -> dict:
    assert main(["env", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def told_as_text(capsys) -> str:
    assert main(["env"]) == 0
    return capsys.readouterr().out


def raising(*_, **__):
    raise RuntimeError("broken\nin two lines")


def test_versions_are_those_that_run(capsys):
    found, text = told_as_json(capsys), told_as_text(capsys)
    expected = {
        "pacevggt_patch": pacevggt_patch.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    assert expected.items() <= found.items()
    assert found["libraries"]["numpy"] == np.__version__
    assert len(found["gpus"]) == torch.cuda.device_count()
    for value in filter(None, [*expected.values(), np.__version__]):
        assert value in text


def test_the_home_of_the_user_is_not_spelled_out(capsys, monkeypatch, tmp_path):
    package = Path(pacevggt_patch.__file__).parent
    monkeypatch.setenv("HOME", str(package.parent))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), str(package.parent / "a"), "/b"]))
    monkeypatch.setenv("PACEVGGT_CACHE", str(package.parent / "kept"))
    found, text = told_as_json(capsys), told_as_text(capsys)
    assert found["package_path"] == "~/pacevggt_patch"
    assert found["variables"]["PYTHONPATH"] == os.pathsep.join(["~", "~/a", "/b"])
    assert found["calibrations"] == {"folder": "~/kept", "files": []}
    assert str(package.parent) not in text
    monkeypatch.setenv("HOME", "/b")
    assert machine.without_home("/bc:/b/c:/b") == "/bc:~/c:~"


def test_variables_of_this_package_are_told_and_no_secrets(capsys, monkeypatch):
    monkeypatch.setenv("PACEVGGT_SOMETHING", "on")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MY_PASSWORD"):
        monkeypatch.setenv(name, "secret")
    text = told_as_text(capsys)
    assert "PACEVGGT_SOMETHING=on" in text and "OMP_NUM_THREADS=1" in text and "secret" not in text


def test_kept_calibrations_are_named(capsys, cache, monkeypatch):
    cache.mkdir()
    (cache / "heads-float32-abc.safetensors").write_bytes(b"")
    assert told_as_json(capsys)["calibrations"]["files"] == ["heads-float32-abc.safetensors"]
    assert "heads-float32-abc.safetensors" in told_as_text(capsys)
    monkeypatch.setenv("PACEVGGT_CACHE", "off")
    assert "PACEVGGT_CACHE is off" in told_as_text(capsys)


def test_libraries_that_are_missing_come_with_the_command_that_brings_them(capsys, monkeypatch):
    lines = [
        "numpy>=1.26",
        "nowhere>=1; extra == 'demo'",
        'nothing; extra == "video"',
        "never>=2; extra == 'test'",
    ]
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda _: [*lines, "gone", "pacevggt-patch[video]; extra == 'demo'"]
    )
    assert told_as_json(capsys)["libraries"] == {
        "gone": "missing; in the folder of the checkout: pip install .",
        "nothing": "missing; in the folder of the checkout: pip install '.[video]'",
        "nowhere": "missing; in the folder of the checkout: pip install '.[demo]'",
        "numpy": np.__version__,
    }


def test_the_package_is_the_command_and_imports_no_vggt_for_it(tmp_path):
    (tmp_path / "vggt").mkdir()
    (tmp_path / "vggt" / "__init__.py").write_text("raise SystemExit('imported')")
    path = os.pathsep.join([str(tmp_path), str(Path(pacevggt_patch.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "pacevggt_patch", "env", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout)
    assert found["vggt"]["path"] == "~/vggt/__init__.py"
    assert found["pacevggt_patch"] == pacevggt_patch.__version__


@pytest.mark.parametrize(
    ("arguments", "status"), [(["--version"], 0), (["no-such-command"], 2), (["env"], 0)]
)
def test_the_package_ends_with_the_status_of_the_command(monkeypatch, arguments, status):
    monkeypatch.setattr(sys, "argv", ["pacevggt", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("pacevggt_patch", run_name="__main__")
    assert caught.value.code == status


def test_no_vggt_is_said(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert told_as_json(capsys)["vggt"] is None
    assert "PYTHONPATH" in told_as_text(capsys)


def test_nothing_that_is_broken_stops_it(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", raising)
    monkeypatch.setattr(torch.cuda, "is_available", raising)
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", raising)
    monkeypatch.setattr(importlib.util, "find_spec", raising)
    monkeypatch.setattr(importlib.metadata, "requires", raising)
    monkeypatch.setattr(subprocess, "run", raising)
    monkeypatch.setattr("pacevggt_patch.weights.cache.entries", raising)
    found, text = told_as_json(capsys), told_as_text(capsys)
    for name in ("gpus", "driver", "sdpa", "flash_attention_3", "vggt", "libraries", "calibrations"):
        assert found[name] == "not known: broken"
    assert text.count("not known: broken") == 7 and "two lines" not in text


@pytest.mark.parametrize(
    ("script", "expected"), [("echo 570.1; echo 570.1", "570.1"), ("exit 9", "not known"), (None, None)]
)
def test_the_driver_is_asked_of_its_own_program(monkeypatch, tmp_path, script, expected):
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = machine.told(machine.driver)
    assert found == expected or (expected == "not known" and found.startswith(expected))


def test_gpus_are_told(capsys, monkeypatch):
    properties = SimpleNamespace(name="Some GPU", total_memory=3 * 2**29, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert told_as_json(capsys)["gpus"] == [{"name": "Some GPU", "memory_gib": 1.5, "capability": "9.0"}] * 2
    assert told_as_text(capsys).count("Some GPU, 1.5 GiB") == 2


def test_why_flash_attention_is_not_used(monkeypatch, tmp_path):
    first, second = machine.LIBRARIES
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU" in machine.flash_attention()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    monkeypatch.setattr(machine, "library", lambda _: None)
    assert "8.6" in machine.flash_attention()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    (tmp_path / f"{second}.py").write_text("raise OSError('undefined symbol: x')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, first, None)
    why = machine.flash_attention()
    assert f"{first} is not installed" in why and f"{second} can't be imported (undefined symbol: x)" in why
    monkeypatch.setattr(machine, "library", lambda _: Library("some_library", raising, ()))
    assert machine.flash_attention() == "some_library"
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    assert "enable_flash_sdp" in machine.flash_attention()
