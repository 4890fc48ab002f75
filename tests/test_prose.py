"""Sentences that users read are short, and the checker that says so counts right."""

from __future__ import annotations

import pytest
from test_benchmarks import script

prose = script("prose")


@pytest.fixture(scope="module")
def gathered():
    return prose.gather()


@pytest.mark.parametrize(("kind", "most"), [("README", 25), ("docs", 22), ("docstrings", 22)])
def test_sentences_are_short(gathered, kind, most):
    assert prose.mean(gathered[kind]) < most


def test_no_message_has_more_than_40_words(gathered):
    assert [sentence for sentence in gathered["messages"] if sentence.words > 40] == []


def test_markdown_is_read_without_tables_and_code(tmp_path, monkeypatch):
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    file = tmp_path / "a.md"
    file.write_text(
        "# A heading of words\n\nOne two [three four](far/away). Five `six seven eight`\nnine!\n\n"
        "- first item\n- second item, longer\n\n| a | table |\n|---|---|\n\n```\ncode that. Is long\n```\n\nThe end"
    )
    found = prose.markdown_sentences(file)
    assert [sentence.words for sentence in found] == [4, 3, 2, 3, 2]
    assert found[0] == ("a.md", "One two three four.")


def test_messages_are_read_from_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    file = tmp_path / "a.py"
    file.write_text(
        "raise PaceError(f'{name} must be {1 + 1}, ' 'got none')\nraise KeyError('not ours at all')\n"
        "warnings.warn('take ' + 'care')\nraise ClipError(problem)\n"
    )
    found = prose.message_sentences(file)
    assert [(sentence.place, sentence.words) for sentence in found] == [("a.py:1", 6), ("a.py:3", 2)]


def test_docstrings_are_read_argument_by_argument(tmp_path, monkeypatch):
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    file = tmp_path / "a.py"
    file.write_text(
        '"""A module."""\ndef f(a, b):\n    """Does it. Twice.\n\n    Args:\n        a: one thing\n'
        '        b: another\n            thing\n    """\ndef _g():\n    """Not read."""\n'
    )
    assert [sentence.words for sentence in prose.docstring_sentences(file)] == [2, 2, 1, 2, 2]


def test_the_report_has_a_row_for_each_kind_and_the_longest_sentences(capsys, gathered):
    assert prose.main(["--longest", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    kinds = ["README", "docs", "docstrings", "messages"]
    assert [line.split()[0] for line in lines[1:5]] == kinds
    for kind in kinds:
        longest = lines[lines.index(kind) + 1]
        assert int(longest.split()[0]) == max(sentence.words for sentence in gathered[kind])
