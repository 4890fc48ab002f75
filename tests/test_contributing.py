"""What people find who report or contribute: forms, the citation and the guide are valid and lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import pacevggt_patch
from pacevggt_patch.cli.main import make_parser

ROOT = Path(__file__).parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
# What GitHub knows in an issue form.
TYPES = {"checkboxes", "dropdown", "input", "markdown", "textarea"}


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.stem)
def test_forms_are_valid_and_ask_for_what_is_needed(file):
    form = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert set(form) == {"name", "description", "labels", "body"}
    assert all(isinstance(form[key], str) and form[key] for key in ("name", "description"))
    assert all(isinstance(label, str) for label in form["labels"])
    for field in form["body"]:
        assert field["type"] in TYPES and set(field) <= {"type", "id", "attributes", "validations"}
        assert isinstance(field["attributes"]["label"], str)
        options = field["attributes"].get("options")
        assert (options is not None) == (field["type"] in ("checkboxes", "dropdown"))
        # An unquoted Yes or No would be a boolean, which GitHub refuses.
        assert all(isinstance(option, str) or isinstance(option["label"], str) for option in options or [])
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids)) and {"fork", "script", "env"} <= set(ids)
    assert "pacevggt env" in file.read_text(encoding="utf-8")


def test_there_is_a_form_for_each_kind_of_report():
    assert [file.stem for file in FORMS] == ["bug", "new-model", "speed-or-quality"]
    assert "report.json of `pacevggt compare`" in FORMS[2].read_text(encoding="utf-8")


def test_the_command_that_forms_ask_for_is_there():
    assert make_parser().parse_args(["env"]).run is not None


def test_the_citation_is_valid():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["title"].startswith("pacevggt-patch")
    assert citation["version"] == pacevggt_patch.__version__
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for reference in citation["references"]:
        assert reference["title"] in readme
        assert all({"family-names", "given-names"} == set(author) for author in reference["authors"])


def test_the_guide_for_contributors_names_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    folders = {path.name for path in (ROOT / "pacevggt_patch").iterdir() if (path / "__init__.py").is_file()}
    assert folders <= set(re.findall(r"`(\w+)/`", text))
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("http", "#"))]
    assert links and all((ROOT / link.split("#")[0]).exists() for link in links)
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"^make ([\w-]+)", text, re.MULTILINE)) <= set(targets)
