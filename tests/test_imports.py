"""Who may import whom in the package: read from the source, imports within functions included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pacevggt_patch

ROOT = Path(pacevggt_patch.__path__[0])
# All that a part may import of the package, besides itself.
ALLOWED = {
    "method": {"runtime", "errors"},
    "hosts": {"runtime", "errors"},
    "runtime": {"arguments", "errors", "version"},
}
FORBIDDEN = {name: {"patching", "hosts", "method", "mini"} for name in ("evaluation", "clips")}
LOADED_ON_DEMAND = {"av", "evo", "plotly", "plyfile", "pycolmap", "scipy", "viser"}
# Commands load VGGT-mini by its name, and `pacevggt train` offers its scenes.
IMPORT_MINI = {"training/backbones.py", "training/run.py"}
# Of training, `compare` and `evaluate` need what loads models and what writes results: no more.
COMPARE_FROM_TRAINING = {"training/backbones", "training/states"}


def imported(file: Path) -> set[str]:
    """Modules of the package that a file imports, as paths within it: `method/merging`, `errors`."""
    here = file.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {"/".join(name[1:]) for name in names if name[0] == ROOT.name}
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                base = (*here[: len(here) - node.level + 1], *module)
            elif module[0] == ROOT.name:
                base = tuple(module[1:])
            else:
                continue
            # A package may bring modules by their names, too.
            found |= {"/".join(base)} if base else set()
            if (ROOT / "/".join(base)).is_dir():
                found |= {"/".join((*base, alias.name)) for alias in node.names if exists(base, alias.name)}
    return found - {""}


def exists(base: tuple[str, ...], name: str) -> bool:
    """Whether `name` is a module in the folder `base` of the package."""
    place = ROOT / "/".join(base) / name
    return place.is_dir() or place.with_suffix(".py").is_file()


def part(module: str) -> str:
    """The folder at the top of the package that a module lies in, or the module there."""
    return module.split("/")[0].removesuffix(".py")


FILES = {file.relative_to(ROOT).as_posix(): imported(file) for file in sorted(ROOT.rglob("*.py"))}
# `__init__` and `__main__` of the package are its face: they may import everything.
INNER = {file: modules for file, modules in FILES.items() if not file.startswith("__")}


def breaks(allowed) -> list[str]:
    """The imports between two parts that are not `allowed(file, part of the file, part that it imports)`."""
    return sorted(
        f"{file} imports {module}"
        for file, modules in INNER.items()
        for module in modules
        if part(file) != part(module) and not allowed(file, part(file), part(module))
    )


def test_imports_are_read_from_the_source():
    assert {"runtime/files", "version"} <= FILES["weights/tensorfile.py"] | FILES["training/run.py"]
    assert "mini/sources" in FILES["training/run.py"]  # within a function
    assert "mini/model" in FILES["mini/__init__.py"]
    assert "mini/scenes/geometry" in FILES["mini/scenes/rooms.py"]
    assert "clips/clip" in FILES["mini/scenes/rooms.py"]


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_the_part_imports_nothing_but_what_it_may(name):
    assert breaks(lambda file, own, other: own != name or other in ALLOWED[name]) == []


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_measures_and_clips_know_no_model(name):
    assert breaks(lambda file, own, other: own != name or other not in FORBIDDEN[name]) == []


def test_mini_is_imported_where_it_is_offered_alone():
    assert breaks(lambda file, own, other: other != "mini" or file in IMPORT_MINI) == []


def test_compare_and_evaluate_are_on_top_and_take_little_of_training():
    assert breaks(lambda file, own, other: other != "compare" or own in ("cli", "evaluate")) == []
    assert breaks(lambda file, own, other: other != "evaluate" or own == "cli") == []
    on_top = ("compare", "evaluate")
    taken = {module for file, modules in INNER.items() if part(file) in on_top for module in modules}
    assert {module for module in taken if part(module) in ("training", "cli")} == COMPARE_FROM_TRAINING


def test_process_groups_are_the_matter_of_one_module_and_of_training():
    """The method asks an `Exchange`, and knows nothing of torch.distributed."""
    found = set()
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names += [f"{node.module}.{alias.name}" for alias in node.names]
            if any(name.startswith("torch.distributed") for name in names):
                found.add(file.relative_to(ROOT).as_posix())
    assert {name for name in found if "training/" not in name} == {"runtime/ranks.py"}


def test_variables_of_torchrun_are_read_by_one_module():
    """Others ask `place_of_torchrun`; `machine.py` lists all variables that matter."""
    found = set()
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in ("RANK", "WORLD_SIZE"):
                found.add(file.relative_to(ROOT).as_posix())
    assert found == {"runtime/machine.py", "runtime/ranks.py"}


def test_training_imports_the_renderer_on_demand_alone():
    for node in ast.parse((ROOT / "training" / "run.py").read_text(encoding="utf-8")).body:
        assert not isinstance(node, ast.ImportFrom) or "mini" not in (node.module or "")


def test_libraries_of_extras_of_one_use_are_loaded_on_demand_alone():
    """`load_extra` names what is missing before work starts; an import would fail before that."""
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not LOADED_ON_DEMAND & {name.split(".")[0] for name in names}, file


def test_parts_form_no_circle():
    """But for the imports named above, each part can be read and tested with those below it alone."""
    below = {part(file): set() for file in INNER}
    for file, modules in INNER.items():
        for module in modules:
            named = part(module) == "mini" and file in IMPORT_MINI
            if part(module) != part(file) and not named:
                below[part(file)].add(part(module))
    while free := [name for name, others in below.items() if not others & set(below)]:
        for name in free:
            del below[name]
    assert below == {}


def test_rules_of_others_know_nothing_of_this_package():
    """They stand on the stock model: tensors alone, but for the file that puts them there."""
    peers = ROOT.parent / "benchmarks" / "peers"
    files = sorted(peers.glob("*.py"))
    assert len(files) > 6
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        names |= {
            node.module or ""
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and not node.level
        }
        assert (ROOT.name in {name.split(".")[0] for name in names}) == (file.stem == "runner"), file
