"""Merging against a float64 loop."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pacevggt_patch import merging
from pacevggt_patch.assignment import KEPT, MERGED, assign
from pacevggt_patch.merging import kept_tokens, merge_targets, merge_tokens


def reference(tokens: torch.Tensor, assignment) -> torch.Tensor:
    """Score-weighted means, token by token."""
    batch, frames, _, channels = tokens.shape
    result = torch.zeros(batch, frames, assignment.kept.shape[-1], channels, dtype=torch.float64)
    for b in range(batch):
        for s in range(frames):
            kept = assignment.kept[b, s].tolist()
            unit = F.normalize(tokens[b, s].double(), dim=-1)
            groups = {k: [k] for k in kept}
            for p in (assignment.role[b, s] == MERGED).nonzero().flatten().tolist():
                groups[max(kept, key=lambda k: float(unit[p] @ unit[k]))].append(p)
            for j, k in enumerate(kept):
                weight = assignment.scores[b, s, groups[k]].double()
                result[b, s, j] = (weight[:, None] * tokens[b, s, groups[k]].double()).sum(0) / weight.sum()
    return result


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2), st.integers(1, 4), st.integers(1, 15), st.integers(0, 10**6), st.data())
def test_merge_equals_brute_force(batch, frames, patches, seed, data):
    keep = data.draw(st.integers(1, patches))
    merge = data.draw(st.integers(0, frames * (patches - keep)))
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, frames, patches, 8, generator=g)
    assignment = assign(torch.rand(batch, frames, patches, generator=g) + 0.01, keep, merge)
    assert torch.allclose(merge_tokens(tokens, assignment).double(), reference(tokens, assignment), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_that_take_nothing_in_are_untouched(dtype):
    tokens = torch.randn(1, 5, 20, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    assignment = assign(torch.rand(1, 5, 20, generator=torch.Generator().manual_seed(1)), 6, 7)
    merged, kept = merge_tokens(tokens, assignment), kept_tokens(tokens, assignment)
    assert merged.dtype == dtype
    untouched = (merged == kept).all(-1).sum()
    assert 30 - 7 <= untouched < 30


def test_zero_scores_give_a_plain_mean():
    tokens = torch.tensor([[[[1.0, 0.0], [3.0, 0.0]]]])
    assert merge_tokens(tokens, assign(torch.zeros(1, 1, 2), 1, 1)).tolist() == [[[[2.0, 0.0]]]]


def test_kept_tokens_stay_with_themselves():
    same = torch.ones(1, 6, 4)  # all similarities tie
    kept = torch.tensor([[1, 4]])
    assert merge_targets(same, kept)[0, [1, 4]].tolist() == [0, 1]


def test_kept_tokens_are_in_raster_order():
    tokens = torch.arange(6.0).view(1, 1, 6, 1)
    assignment = assign(torch.tensor([[[0.0, 5, 1, 9, 2, 8]]]), 3, 0)
    assert kept_tokens(tokens, assignment).flatten().tolist() == [1, 3, 5]
    assert (assignment.role == KEPT).sum() == 3


def test_chunks_of_frames_do_not_change_the_merge(monkeypatch):
    tokens = torch.randn(1, 7, 20, 8, generator=torch.Generator().manual_seed(0))
    assignment = assign(torch.rand(1, 7, 20, generator=torch.Generator().manual_seed(1)), 6, 40)
    whole = merge_tokens(tokens, assignment)
    monkeypatch.setattr(merging, "FRAMES_PER_CHUNK", 2)
    assert torch.allclose(merge_tokens(tokens, assignment), whole, atol=1e-6)
