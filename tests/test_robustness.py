"""A short run of what `benchmarks/robustness.py` tries at length."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from campaigns import CAMPAIGNS, files, models, runs  # noqa: F401 (each adds its campaigns)


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_all_is_as_promised(name, monkeypatch, tmp_path):
    monkeypatch.setenv("PACEVGGT_CACHE", str(tmp_path))
    tried = list(CAMPAIGNS[name].run(True))
    assert len(tried) > 1
    assert [f"{trial.name}: {trial.problem}" for trial in tried if trial.problem is not None] == []
