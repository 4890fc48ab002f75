"""Budgets and assignments against a brute-force reference in exact fractions."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pacevggt_patch.method.selection import KEPT, MERGED, PRUNED, SALIENCY_STEPS, assign, merge_quotas


def reference_quotas(saliency: list[float], total: int, cap: int) -> list[int]:
    """Proportional shares with a cap, frame by frame: cap the largest overflowing frame, share anew, and repeat."""
    largest = max(max(saliency), torch.finfo(torch.float32).tiny)
    weight = [round(s / largest * SALIENCY_STEPS) + 1 for s in saliency]
    capped: set[int] = set()
    while True:
        free = [n for n in range(len(weight)) if n not in capped]
        budget = total - cap * len(capped)
        share = {n: Fraction(budget * weight[n], sum(weight[m] for m in free)) for n in free}
        over = [n for n in free if share[n] > cap]
        if not over:
            break
        capped.add(max(over, key=lambda n: (weight[n], -n)))
    quota = [cap if n in capped else int(share[n]) for n in range(len(weight))]
    by_remainder = sorted(free, key=lambda n: (-(share[n] - int(share[n])), n))
    for n in by_remainder[: total - sum(quota)]:
        quota[n] += 1
    return quota


def reference_assign(scores: list[list[float]], keep: int, merge: int):
    """Kept indices and roles of one clip, by sorting Python lists."""
    orders = [sorted(range(len(row)), key=lambda p: (-row[p], p)) for row in scores]
    left = []
    for row, order in zip(scores, orders, strict=True):
        left.append(float(sum(row[p] for p in order[keep:])))
    quotas = reference_quotas(left, merge, len(scores[0]) - keep)
    kept = [sorted(order[:keep]) for order in orders]
    roles = [
        [
            KEPT if p in order[:keep] else MERGED if p in order[keep : keep + q] else PRUNED
            for p in range(len(order))
        ]
        for order, q in zip(orders, quotas, strict=True)
    ]
    return kept, roles, quotas


@st.composite
def clips(draw):
    frames, patches = draw(st.integers(1, 7)), draw(st.integers(1, 12))
    keep = draw(st.integers(1, patches))
    merge = draw(st.integers(0, frames * (patches - keep)))
    # Small integers give many ties; sums of them are exact in float32.
    value = draw(
        st.sampled_from([st.integers(0, 3), st.integers(0, 1000), st.just(0), st.sampled_from([0, 1, 2**20])])
    )
    scores = draw(
        st.lists(st.lists(value, min_size=patches, max_size=patches), min_size=frames, max_size=frames)
    )
    return scores, keep, merge


@settings(max_examples=600, deadline=None)
@given(clips())
def test_assignment_equals_brute_force(clip):
    scores, keep, merge = clip
    result = assign(torch.tensor([scores], dtype=torch.float32), keep, merge)
    kept, roles, _ = reference_assign([[float(s) for s in row] for row in scores], keep, merge)
    assert result.kept[0].tolist() == kept
    assert result.role[0].tolist() == roles


@settings(max_examples=600, deadline=None)
@given(
    st.lists(
        st.one_of(st.floats(0, 1e6, width=32), st.sampled_from([0.0, 1e-30, 1e30])), min_size=1, max_size=40
    ),
    st.integers(0, 50),
    st.floats(0, 1),
)
def test_quotas_equal_brute_force_and_sum_exactly(saliency, cap, share):
    total = round(share * len(saliency) * cap)
    quotas = merge_quotas(torch.tensor([saliency], dtype=torch.float32), total, cap)[0].tolist()
    assert sum(quotas) == total
    assert all(0 <= q <= cap for q in quotas)
    assert quotas == reference_quotas(torch.tensor(saliency, dtype=torch.float32).tolist(), total, cap)


@pytest.mark.parametrize("merge", [0, 1, 777, 300 * 725])
def test_budgets_are_exact_at_full_size(merge):
    scores = torch.rand(2, 300, 1036, generator=torch.Generator().manual_seed(0))
    result = assign(scores, 311, merge)
    assert (result.role == KEPT).sum(-1).eq(311).all()
    assert (result.role == MERGED).sum((1, 2)).tolist() == [merge, merge]
    assert result.kept.diff(dim=-1).gt(0).all()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_budgets_hold_for_scores_that_are_no_numbers(data):
    frames, patches = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 9))
    keep = data.draw(st.integers(1, patches))
    merge = data.draw(st.integers(0, frames * (patches - keep)))
    value = st.sampled_from([float("nan"), float("inf"), float("-inf"), 0.0, 1.0, 3e38])
    row = st.lists(value, min_size=patches, max_size=patches)
    result = assign(torch.tensor([data.draw(st.lists(row, min_size=frames, max_size=frames))]), keep, merge)
    assert (result.role == KEPT).sum(-1).eq(keep).all()
    assert (result.role == MERGED).sum().item() == merge
    assert torch.isfinite(result.scores).all()


def test_clips_of_a_batch_do_not_share_their_budget():
    scores = torch.rand(2, 4, 20, generator=torch.Generator().manual_seed(0))
    scores[1] *= 100
    both = assign(scores, 5, 17)
    for b in range(2):
        alone = assign(scores[b : b + 1], 5, 17)
        assert torch.equal(both.role[b], alone.role[0]) and torch.equal(both.kept[b], alone.kept[0])


def test_frames_with_more_saliency_left_merge_more():
    scores = torch.tensor([[[9.0, 1, 1, 1, 1], [9.0, 3, 3, 3, 3]]])
    role = assign(scores, 1, 4).role
    assert (role == MERGED).sum(-1).tolist() == [[1, 3]]
