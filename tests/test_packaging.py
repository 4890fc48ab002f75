import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import pacevggt_patch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built with the installed hatchling, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def relative_files(folder):
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_whole_package(wheel):
    held = {
        name.removeprefix("pacevggt_patch/")
        for name in wheel.namelist()
        if name.startswith("pacevggt_patch/")
    }
    weights = {f"_weights/{name}" for name in relative_files(ROOT / "weights")}
    assert held == relative_files(ROOT / "pacevggt_patch") | weights
    assert {"py.typed", "__init__.py", "__main__.py", "_weights/README.md"} <= held
    bundled = {"vggt-mini", "pace-vggt-mini-global", "pace-vggt-mini-pre-aa"}
    assert {f"_weights/{name}.safetensors" for name in bundled} == {
        name for name in held if "safetensors" in name
    }
    assert any(name.startswith("data/") for name in held)


def test_the_wheel_holds_nothing_else(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert top == {"pacevggt_patch", f"pacevggt_patch-{pacevggt_patch.__version__}.dist-info"}


def test_the_bundled_weights_are_those_of_the_checkout(wheel):
    for path in (ROOT / "weights").glob("*.safetensors"):
        assert wheel.read(f"pacevggt_patch/_weights/{path.name}") == path.read_bytes()


def test_the_bundled_pace_weights_are_read_with_their_digests():
    from pacevggt_patch.weights.bundled import bundled_files

    modes = {}
    for path in bundled_files("pace-*.safetensors"):
        weights = pacevggt_patch.PaceWeights.load(path)
        modes[weights.mode] = path.name
    assert modes == {mode: f"pace-vggt-mini-{mode}.safetensors" for mode in ("global", "pre-aa")}


def test_all_that_is_exported_is_there():
    assert sorted(pacevggt_patch.__all__) == pacevggt_patch.__all__
    assert all(hasattr(pacevggt_patch, name) for name in pacevggt_patch.__all__)


def test_the_version_is_the_same_everywhere(wheel):
    metadata = wheel.read(f"pacevggt_patch-{pacevggt_patch.__version__}.dist-info/METADATA").decode()
    assert f"\nVersion: {pacevggt_patch.__version__}\n" in metadata
    assert version("pacevggt-patch") == pacevggt_patch.__version__
    assert re.search(
        rf"^## {re.escape(pacevggt_patch.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M
    )


def test_the_wheel_asks_for_no_vggt_and_installs_the_command(wheel):
    info = f"pacevggt_patch-{pacevggt_patch.__version__}.dist-info"
    required = re.findall(r"^Requires-Dist: ([\w.-]+)[^;\n]*$", wheel.read(f"{info}/METADATA").decode(), re.M)
    assert sorted(required) == ["huggingface-hub", "numpy", "safetensors", "torch"]
    assert "pacevggt = pacevggt_patch.cli.main:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_importing_is_light():
    heavy = {"vggt", "matplotlib", "PIL", "scipy", "evo", "av"}
    code = f"import sys, pacevggt_patch; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_readme_is_filled_in_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    # Marks of tables that a script writes, and nothing that somebody meant to fill in.
    marks = [mark.strip() for mark in re.findall(r"<!--(.*?)-->", text, re.DOTALL)]
    assert marks == ["settings", "/settings"] and "TBD" not in text
    lines = text.splitlines()
    assert len(lines) <= 150 and len(text) <= 10_240
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("http", "#"))]
    assert len(links) > 5
    for link in links:
        assert (ROOT / link.split("#")[0]).exists(), link
