"""Merging, plain and learned, against float64 loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pacevggt_patch.method import merging
from pacevggt_patch.method.merging import MergeAdapter, kept_tokens, merge_targets, merge_tokens
from pacevggt_patch.method.selection import KEPT, MERGED, assign


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


# --- the learned part


def trained_adapter(channels: int, seed: int = 0, scale: float = 0.5) -> MergeAdapter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = MergeAdapter(channels)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=g))
    return adapter


def reference_residual(adapter, tokens, assignment, grid, b, s, j) -> torch.Tensor:
    """The residual of one kept token, from the members of its group one by one, in float64."""
    f, scores = tokens[b, s].double(), assignment.scores[b, s].double()
    kept = assignment.kept[b, s].tolist()
    unit = F.normalize(f, dim=-1)
    group = [kept[j]]
    for p in (assignment.role[b, s] == MERGED).nonzero().flatten().tolist():
        if max(range(len(kept)), key=lambda k: float(unit[p] @ unit[kept[k]])) == j:
            group.append(p)

    def linear(layer, x):
        bias = 0 if layer.bias is None else layer.bias.double()
        return layer.weight.double() @ x + bias

    def place(p):
        (y, x), (v, u) = divmod(p, grid[1]), divmod(kept[j], grid[1])
        return torch.tensor([y - v, x - u], dtype=torch.float64) / max(grid)

    norm = adapter.norm
    normed = F.layer_norm(f, f.shape[-1:], norm.weight.double(), norm.bias.double())
    hidden = {p: F.gelu(linear(adapter.token, normed[p]) + linear(adapter.place, place(p))) for p in group}
    pull = {p: linear(adapter.pull, hidden[p]).clamp(-8, 8).exp() * scores[p] for p in group}
    width = hidden[kept[j]].numel() // adapter.heads
    heads = []
    for h in range(adapter.heads):
        part = slice(h * width, (h + 1) * width)
        heads.append(sum(pull[p][h] * hidden[p][part] for p in group) / sum(pull[p][h] for p in group))
    places = torch.stack([place(p) for p in group])
    stats = [math.log(len(group)), *places.mean(0).tolist(), places.square().sum(1).mean().sqrt().item()]
    inputs = torch.cat([hidden[kept[j]], *heads, torch.tensor(stats).double()])
    return linear(adapter.out, F.gelu(linear(adapter.mix, inputs)))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99), st.data()
)
def test_the_learned_residual_equals_brute_force(batch, frames, rows, columns, seed, data):
    patches, grid = rows * columns, (rows, columns)
    keep = data.draw(st.integers(1, patches))
    merge = data.draw(st.integers(0, frames * (patches - keep)))
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, frames, patches, 8, generator=g)
    assignment = assign(torch.rand(batch, frames, patches, generator=g) + 0.01, keep, merge)
    adapter = trained_adapter(8, seed)
    found = merge_tokens(tokens, assignment, grid, adapter) - merge_tokens(tokens, assignment)
    for b in range(batch):
        for s in range(frames):
            for j in range(keep):
                expected = reference_residual(adapter, tokens, assignment, grid, b, s, j)
                assert torch.allclose(found[b, s, j].double(), expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("merge", [0, 9])
def test_an_untrained_adapter_changes_no_bit(dtype, merge):
    tokens = torch.randn(2, 3, 20, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    assignment = assign(torch.rand(2, 3, 20, generator=torch.Generator().manual_seed(1)), 6, merge)
    plain = merge_tokens(tokens, assignment)
    learned = merge_tokens(tokens, assignment, (4, 5), MergeAdapter(16))
    assert learned.dtype == dtype
    assert torch.equal(plain, learned)
    trained = merge_tokens(tokens, assignment, (4, 5), trained_adapter(16))
    assert trained.dtype == dtype and not torch.allclose(trained, plain, atol=0.1)


def test_chunks_of_frames_do_not_change_the_learned_merge(monkeypatch):
    tokens = torch.randn(1, 7, 20, 8, generator=torch.Generator().manual_seed(0))
    assignment = assign(torch.rand(1, 7, 20, generator=torch.Generator().manual_seed(1)), 6, 40)
    whole = merge_tokens(tokens, assignment, (4, 5), trained_adapter(8))
    monkeypatch.setattr(merging, "FRAMES_PER_CHUNK", 2)
    found = merge_tokens(tokens, assignment, (4, 5), trained_adapter(8))
    assert torch.allclose(found, whole, atol=1e-5)


def test_pruned_tokens_are_not_seen():
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 1, 12, 8, generator=g)
    assignment = assign(torch.rand(1, 1, 12, generator=g), 4, 5)
    before = merge_tokens(tokens, assignment, (3, 4), trained_adapter(8))
    pruned = (assignment.role[0, 0] == 0).nonzero().flatten()
    assert len(pruned) == 3
    tokens[0, 0, pruned] += 1.0
    assert torch.equal(merge_tokens(tokens, assignment, (3, 4), trained_adapter(8)), before)


def test_gradients_of_scores_equal_finite_differences():
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 2, 12, 8, generator=g)
    scores = (torch.rand(1, 2, 12, generator=g) + 0.5).requires_grad_()
    direction = torch.randn(1, 2, 4, 8, generator=g)

    def value(scores):
        return (merge_tokens(tokens, assign(scores, 4, 16)) * direction).sum()

    (gradient,) = torch.autograd.grad(value(scores), scores)
    step = 1e-2
    for i in (0, 5, 11):
        nudge = torch.zeros(1, 2, 12)
        nudge[0, 0, i] = step
        with torch.no_grad():
            roles = [assign(scores + sign * nudge, 4, 16).role for sign in (1, -1)]
            assert torch.equal(*roles)  # else the choice itself would jump
            slope = (value(scores + nudge) - value(scores - nudge)) / (2 * step)
        assert gradient[0, 0, i] == pytest.approx(slope.item(), abs=1e-3)
    assert gradient.abs().max() > 0.01


@pytest.mark.parametrize("embed_dim,backbone", [(192, 15_557_652), (1024, 1_256_537_000)])
def test_the_adapter_is_under_one_percent_of_the_backbone(embed_dim, backbone):
    with torch.device("meta"):
        assert sum(p.numel() for p in MergeAdapter(embed_dim).parameters()) < 0.01 * backbone
