"""Every family of models keeps what `accelerate` promises: on doubles, and on the own classes that can be imported."""

from __future__ import annotations

import inspect

import depth_anything_double
import pytest
import real_depth_anything
from conformance import CHECKS, CHECKS_OF_SHAPE, Subject, compiled_blocks_give_the_same
from hosts import tiny_vggt
from hosts_doubles import DOUBLES
from real_hosts import REAL


def vggt(seed):
    """Without the second of two dense heads that are alike."""
    model = tiny_vggt(seed=seed)
    model.point_head = None
    return model


VGGT = Subject("vggt", "vggt", vggt, patch_size=14, special=5, pre_aa=True, compiles=10)
SUBJECTS = [VGGT, *DOUBLES, *depth_anything_double.DOUBLES, *REAL, *real_depth_anything.REAL]


PAIRS = [
    pytest.param(subject, check, id=f"{subject.name}-{check.__name__}")
    for subject in SUBJECTS
    for check in (CHECKS_OF_SHAPE if subject.variant else CHECKS)
    if (subject, check) != (VGGT, compiled_blocks_give_the_same)  # test_blocks.py does that
]


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'", "ignore:CUDA is not available")
@pytest.mark.parametrize(("subject", "check"), PAIRS)
def test_the_family_conforms(subject, check, tmp_path, monkeypatch):
    other = next((s for s in SUBJECTS if s.family != subject.family and s.missing is None), None)
    given = {"subject": subject, "folder": tmp_path, "monkeypatch": monkeypatch, "other": other}
    check(**{name: given[name] for name in inspect.signature(check).parameters})
