"""Scores against a greedy float64 reference, and the learned scorer's contract."""

import math

import numpy as np
import pytest
import torch

from pacevggt_patch.method import scoring as module
from pacevggt_patch.method.scoring import TokenScorer, coverage_scores, token_scores


def features(frames: int, patches: int, channels: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(frames, patches, channels, generator=torch.Generator().manual_seed(seed))


def reference_distinctness(f: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Mean cosine distance to the neighbours of each token of a frame, standardised."""
    f = f.astype(np.float64) / np.linalg.norm(f.astype(np.float64), axis=1, keepdims=True)
    means = []
    for i in range(len(f)):
        y, x = divmod(i, grid[1])
        near = [
            1 - f[i] @ f[v * grid[1] + u]
            for v in range(max(0, y - 1), min(grid[0], y + 2))
            for u in range(max(0, x - 1), min(grid[1], x + 2))
            if (v, u) != (y, x)
        ]
        means.append(np.mean(near) if near else 0.0)
    return np.clip((means - np.mean(means)) / max(np.std(means), module.LEAST_SPREAD), -3, 3)


def reference_picks(
    f: np.ndarray, saliency: np.ndarray, grid: tuple[int, int], keep: int
) -> tuple[list[int], list]:
    """Farthest point sampling of one frame, one token at a time, every distance computed anew."""
    f = f.astype(np.float64) / np.linalg.norm(f.astype(np.float64), axis=1, keepdims=True)
    mean = f.mean(0) / np.linalg.norm(f.mean(0))

    def distance(i: int, j: int) -> float:
        (yi, xi), (yj, xj) = divmod(i, grid[1]), divmod(j, grid[1])
        return max(0.0, 1 - f[i] @ f[j] + module.SPATIAL_WEIGHT * math.hypot(yi - yj, xi - xj) / max(grid))

    picks = [int(np.argmax(saliency * (1 - f @ mean)))]
    while len(picks) < keep:
        rest = [i for i in range(len(f)) if i not in picks]
        picks.append(max(rest, key=lambda i: saliency[i] * min(distance(i, p) for p in picks)))
    left = [saliency[i] * min(distance(i, p) for p in picks) for i in range(len(f))]
    return picks, left


@pytest.mark.parametrize("grid", [(4, 5), (1, 7), (3, 3), (6, 2)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("distinct", [0.0, 0.15, 1.0])
def test_picks_equal_greedy_reference(grid, weighted, distinct):
    patches, keep = grid[0] * grid[1], max(1, grid[0] * grid[1] // 3)
    f = features(6, patches)
    saliency = (
        torch.rand(6, patches, generator=torch.Generator().manual_seed(1)) + 0.1
        if weighted
        else torch.ones(6, patches)
    )
    scores = coverage_scores(f, saliency, grid, keep, distinct)
    for n in range(len(f)):
        own = saliency[n].double().numpy() * np.exp(distinct * reference_distinctness(f[n].numpy(), grid))
        picks, left = reference_picks(f[n].numpy(), own, grid, keep)
        assert sorted(scores[n].topk(keep).indices.tolist()) == sorted(picks)
        others = [i for i in range(patches) if i not in picks]
        assert torch.allclose(scores[n][others].double(), torch.tensor(left).double()[others], atol=1e-5)


@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (4, 5), (7, 3)])
def test_distinctness(grid):
    f = features(5, grid[0] * grid[1])
    unit = torch.nn.functional.normalize(f, dim=-1)
    found = module.distinctness(1 - unit @ unit.mT, grid)
    wanted = torch.stack([torch.from_numpy(reference_distinctness(row.numpy(), grid)) for row in f])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)


def test_a_corner_is_distinct_and_its_surroundings_are_not():
    f = torch.ones(1, 7 * 7, 8)
    f[0, 3 * 7 + 3] *= torch.tensor([1.0, -1] * 4)
    unit = torch.nn.functional.normalize(f, dim=-1)
    found = module.distinctness(1 - unit @ unit.mT, (7, 7)).view(7, 7)
    assert found[3, 3] == 3 and found[2, 2] > 0 > found[0, 0]


def test_each_scorer_has_its_own_weight_of_distinctness():
    """Tokens of older weights are those that they were trained with."""
    f = features(4, 20).unflatten(0, (1, 4))
    found = [token_scores(f, (4, 5), 6, TokenScorer(16, distinctness_weight=w))[0] for w in (0.0, 0.15, 1.0)]
    for weight, scores in zip((0.0, 0.15, 1.0), found, strict=True):
        assert torch.equal(scores, coverage_scores(f[0], torch.ones(4, 20), (4, 5), 6, weight))
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[2])


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_distinctness_out_of_range(value):
    with pytest.raises(ValueError, match=f"^distinctness_weight must lie between 0 and 1, got {value:g}$"):
        TokenScorer(16, distinctness_weight=value)


@pytest.mark.parametrize("keep", [1, 2, 19, 20])
def test_identical_tokens_are_spread_by_position(keep):
    scores = coverage_scores(torch.ones(2, 20, 8), torch.ones(2, 20), (4, 5), keep)
    assert torch.isfinite(scores).all() and (scores >= 0).all()
    first, *others = scores[0].topk(min(keep, 2)).indices.tolist()
    for second in others:  # the second pick is a corner opposite the first
        assert abs(first // 5 - second // 5) + abs(first % 5 - second % 5) >= 5


def test_chunks_of_frames_do_not_change_scores(monkeypatch):
    f = features(5, 20).unflatten(0, (1, 5))
    whole = token_scores(f, (4, 5), 6)
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 20 * 20 * 2)
    assert torch.equal(token_scores(f, (4, 5), 6), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_untrained_scorer_is_the_training_free_one(dtype):
    f = features(4, 20).unflatten(0, (2, 2)).to(dtype)
    assert torch.equal(token_scores(f, (4, 5), 6, TokenScorer(16)), token_scores(f, (4, 5), 6))


@pytest.mark.parametrize("bias", [-1000.0, 100.0])
def test_only_ratios_of_saliency_matter(bias):
    f = features(4, 20).unflatten(0, (1, 4))
    scorer = TokenScorer(16)
    with torch.no_grad():
        scorer.out.weight.normal_(generator=torch.Generator().manual_seed(0))
        expected = token_scores(f, (4, 5), 6, scorer)
        scorer.out.bias += bias
        assert torch.allclose(token_scores(f, (4, 5), 6, scorer), expected, rtol=1e-3)


def test_salient_tokens_are_picked_before_others():
    scorer = TokenScorer(16)
    f = features(1, 20).unsqueeze(0)
    with torch.no_grad():
        scorer.out.weight.normal_(std=40, generator=torch.Generator().manual_seed(0))
    saliency = scorer(f)[0, 0]
    scores = token_scores(f, (4, 5), 1, scorer)[0, 0]
    assert saliency.std() > 1
    assert saliency[scores.argmax()] > saliency.quantile(0.7)


def test_scores_have_the_gradient_of_their_saliency_and_no_other_value():
    """A score is saliency times distance, so its derivative by the log-saliency of its token is the score itself."""
    f = features(4, 20).unflatten(0, (2, 2))
    scorer = TokenScorer(16)
    with torch.no_grad():
        scorer.out.weight.normal_(generator=torch.Generator().manual_seed(0))
        expected = token_scores(f, (4, 5), 6, scorer)
    scores = token_scores(f, (4, 5), 6, scorer)
    assert torch.equal(scores, expected)
    weight = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad((scores * weight).sum(), scorer.out.bias)
    assert torch.allclose(found, (expected * weight).sum()[None], rtol=1e-4)
    (slope,) = torch.autograd.grad((scorer(f) * weight * expected).sum(), scorer.hidden.weight)
    (own,) = torch.autograd.grad((token_scores(f, (4, 5), 6, scorer) * weight).sum(), scorer.hidden.weight)
    assert torch.allclose(own, slope, rtol=1e-3, atol=1e-5)
    assert slope.abs().max() > 0


@pytest.mark.parametrize("embed_dim,backbone", [(256, 24_079_448), (1024, 1_256_537_000)])
def test_scorer_is_under_one_percent_of_the_backbone(embed_dim, backbone):
    """VGGT-mini's parameters, and VGGT-1B's without its track head, counted on the stock classes."""
    with torch.device("meta"):
        assert sum(p.numel() for p in TokenScorer(embed_dim).parameters()) < 0.01 * backbone
