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
    assert {"py.typed", "__init__.py", "_weights/vggt-mini.safetensors", "_weights/README.md"} <= held
    assert any(name.startswith("data/") for name in held)


def test_the_wheel_holds_nothing_else(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert top == {"pacevggt_patch", f"pacevggt_patch-{pacevggt_patch.__version__}.dist-info"}


def test_the_bundled_weights_are_those_of_the_checkout(wheel):
    bundled = wheel.read("pacevggt_patch/_weights/vggt-mini.safetensors")
    assert bundled == (ROOT / "weights" / "vggt-mini.safetensors").read_bytes()


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
    code = "import sys, pacevggt_patch; print(sorted({'vggt', 'matplotlib', 'PIL', 'scipy', 'evo'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_readme_is_filled_in_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    # Marks of a table that a script writes, and nothing that somebody meant to fill in.
    tables = {
        f"<!-- {mark}{name} -->" for name in ("pruning", "stages", "dense", "losses") for mark in ("", "/")
    }
    assert set(re.findall(r"<!--.*?-->", text, re.DOTALL)) == tables
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("http", "#"))]
    assert len(links) > 5
    for link in links:
        assert (ROOT / link).exists(), link
