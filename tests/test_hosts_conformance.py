"""Every family of models keeps what `accelerate` promises: on doubles, and on the own classes that can be imported."""

from __future__ import annotations

import inspect

import depth_anything_double
import pytest
import real_depth_anything
from conformance import CHECKS, Subject
from hosts import tiny_vggt
from hosts_doubles import DOUBLES
from real_hosts import REAL

VGGT = Subject(
    "vggt", "vggt", lambda seed: tiny_vggt(seed=seed), patch_size=14, special=5, pre_aa=True, compiles=10
)  # fmt: skip
SUBJECTS = [VGGT, *DOUBLES, *depth_anything_double.DOUBLES, *REAL, *real_depth_anything.REAL]


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'", "ignore:CUDA is not available")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_the_family_conforms(subject, check, tmp_path, monkeypatch):
    other = next((s for s in SUBJECTS if s.family != subject.family and s.missing is None), None)
    given = {"subject": subject, "folder": tmp_path, "monkeypatch": monkeypatch, "other": other}
    check(**{name: given[name] for name in inspect.signature(check).parameters})
