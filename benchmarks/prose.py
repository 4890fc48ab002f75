"""How long the sentences are that users read: README.md, docs, docstrings, and messages of errors and warnings.

    python benchmarks/prose.py [--longest 10]

Tables, headings and code blocks do not count. A code span or a value that a message fills in counts as one word; an
item of a list, an argument of a docstring and a message end a sentence.
"""

from __future__ import annotations

import argparse
import ast
import re
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pacevggt_patch"
RECORD = "lab-notebook.md"  # dated, so it stays as it was written
ERRORS = {"PaceError", "ClipError", "WeightsError", "UnsupportedModelError"}
VALUE = "VALUE"  # stands for code and for what is filled in


class Sentence(NamedTuple):
    """A sentence and where it stands."""

    place: str
    text: str

    @property
    def words(self) -> int:
        return len(re.findall(r"\w[\w'’.,/+*=%-]*", self.text))


def sentences(place: str, text: str) -> list[Sentence]:
    """The sentences of one paragraph."""
    text = re.sub(r"``?[^`]+``?", VALUE, " ".join(text.split()))
    # A sentence begins with a capital, a number, a quotation, or the name of the package.
    parts = re.split(r"(?<=[.!?])[\")*]*\s+(?=[(*]*[A-Z0-9]|[\"(*]+\w|pacevggt)", text)
    return [sentence for part in parts if (sentence := Sentence(place, part)).words]


def markdown_sentences(file: Path) -> list[Sentence]:
    """The sentences of a Markdown file."""
    text = re.sub(r"^```.*?^```", "\n", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "\n", text, flags=re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    # Tables and headings go; each item of a list begins a paragraph.
    lines = [
        "" if re.match(r"\s*(\||#)", line) else re.sub(r"^\s*([-*]|\d+\.)\s+", "\n", line)
        for line in text.split("\n")
    ]
    return list(paragraphs(file.relative_to(ROOT).as_posix(), "\n".join(lines)))


def paragraphs(place: str, text: str) -> Iterator[Sentence]:
    """The sentences of paragraphs that empty lines part."""
    for paragraph in re.split(r"\n\s*\n", text):
        yield from sentences(place, paragraph)


def docstring_sentences(file: Path) -> list[Sentence]:
    """The sentences of a module's docstring and of those of its public classes and functions."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            continue
        name = getattr(node, "name", "")
        text = None if name.startswith("_") else ast.get_docstring(node)
        if text:
            # Each argument, error and item of a list begins a paragraph, its name left out.
            text = re.sub(r"^\s*(Args|Returns|Raises|Attributes|Yields):\s*$", "", text, flags=re.MULTILINE)
            text = re.sub(r"^(\s*)([-*] |`?[\w, ]+`?: )", r"\n\1", text, flags=re.MULTILINE)
            found += paragraphs(f"{file.relative_to(ROOT).as_posix()} {name}".strip(), text)
    return found


def message_sentences(file: Path) -> list[Sentence]:
    """The messages of errors and warnings in a module, each as one sentence."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name in ERRORS or name == "warn":
            text = message(node.args[0])
            if text.replace(VALUE, "").strip():
                found.append(Sentence(f"{file.relative_to(ROOT).as_posix()}:{node.lineno}", text))
    return found


def message(node: ast.expr) -> str:
    """The text of an argument, with `VALUE` for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(message(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return message(node.left) + message(node.right)
    return VALUE


def gather() -> dict[str, list[Sentence]]:
    """All sentences, by kind."""
    docs = [file for file in sorted((ROOT / "docs").glob("*.md")) if file.name != RECORD]
    modules = sorted(PACKAGE.rglob("*.py"))
    return {
        "README": markdown_sentences(ROOT / "README.md"),
        "docs": [sentence for file in docs for sentence in markdown_sentences(file)],
        "docstrings": [sentence for file in modules for sentence in docstring_sentences(file)],
        "messages": [sentence for file in modules for sentence in message_sentences(file)],
    }


def mean(found: Iterable[Sentence]) -> float:
    """Mean number of words."""
    return statistics.fmean(sentence.words for sentence in found)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--longest", type=int, default=10, help="sentences of each kind to show (10)")
    longest = parser.parse_args(arguments).longest
    kinds = gather()
    print(f"{'':12s}{'sentences':>10s}{'mean':>8s}{'90 %':>8s}{'longest':>9s}")
    for name, found in kinds.items():
        counts = sorted(sentence.words for sentence in found)
        tenth = statistics.quantiles(counts, n=10, method="inclusive")[-1]
        print(f"{name:12s}{len(counts):10d}{mean(found):8.1f}{tenth:8.1f}{counts[-1]:9d}")
    for name, found in kinds.items():
        print(f"\n{name}")
        for sentence in sorted(found, key=lambda sentence: -sentence.words)[:longest]:
            print(f"{sentence.words:5d}  {sentence.place}: {sentence.text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
