"""Restoration against a float64 loop, and the learned module's contract."""

import math

import pytest
import torch
from hosts import random_images, tiny_vggt

from pacevggt_patch import PaceWeights, accelerate
from pacevggt_patch.method.restoration import (
    SPREAD,
    TEMPERATURE,
    FeatureGuidedRestoration,
    interpolation_weights,
    restore,
)

GRID = (4, 5)


@pytest.fixture
def frames():
    g = torch.Generator().manual_seed(0)
    features = torch.randn(3, 20, 8, generator=g)
    kept = torch.rand(3, 20, generator=g).topk(6).indices.sort(-1).values
    outputs = {1: torch.randn(3, 6, 16, generator=g), 3: torch.randn(3, 6, 16, generator=g)}
    return features, kept, outputs


def reference_row(features: torch.Tensor, kept: list[int], i: int) -> list[float]:
    f = features.double()
    sigma = SPREAD * math.sqrt(len(features) / len(kept))
    logits = []
    for j in kept:
        cosine = float(f[i] @ f[j] / (f[i].norm() * f[j].norm()))
        squared = (i // GRID[1] - j // GRID[1]) ** 2 + (i % GRID[1] - j % GRID[1]) ** 2
        logits.append(TEMPERATURE * cosine - squared / (2 * sigma**2))
    return torch.tensor(logits).double().softmax(0).tolist()


def test_weights_equal_the_formula(frames):
    features, kept, _ = frames
    weights = interpolation_weights(features, kept, GRID)
    for n in range(3):
        expected = torch.tensor([reference_row(features[n], kept[n].tolist(), i) for i in range(20)])
        assert torch.allclose(weights[n].double(), expected.double(), atol=1e-5)


@pytest.mark.parametrize("learned", [False, True])
def test_kept_tokens_pass_unchanged_and_others_are_interpolated(frames, learned):
    features, kept, outputs = frames
    module = FeatureGuidedRestoration(8, (1, 3)) if learned else None  # zero-initialised
    dense = restore(outputs, features, kept, GRID, module)
    weights = interpolation_weights(features, kept, GRID)
    for layer, output in outputs.items():
        assert dense[layer].shape == (3, 20, 16)
        assert torch.equal(dense[layer].gather(1, kept.unsqueeze(-1).expand_as(output)), output)
        dropped = torch.ones(3, 20, dtype=torch.bool).scatter(1, kept, False)
        assert torch.allclose(dense[layer][dropped], (weights @ output)[dropped], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_follows_the_outputs(frames, dtype):
    features, kept, outputs = frames
    reference = restore(outputs, features, kept, GRID)
    dense = restore({i: o.to(dtype) for i, o in outputs.items()}, features.to(dtype), kept, GRID)
    assert all(d.dtype == dtype for d in dense.values())
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert torch.allclose(dense[1].float(), reference[1], atol=tolerance)


def test_constant_features_restore_by_distance_alone():
    kept = torch.tensor([[0, 19]])
    output = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    dense = restore({0: output}, torch.ones(1, 20, 4), kept, GRID)[0][0, :, 0].view(GRID)
    assert dense[0, 0] == 0 and dense[3, 4] == 1
    assert (dense.diff(dim=0) >= -1e-6).all() and (dense.diff(dim=1) >= -1e-6).all()


def test_one_kept_token_fills_the_frame(frames):
    features, kept, outputs = frames
    dense = restore({1: outputs[1][:, :1]}, features, kept[:, :1], GRID)[1]
    assert torch.allclose(dense, outputs[1][:, :1].expand_as(dense), atol=1e-6)


def test_residual_learns(frames):
    """The linear map has the capacity for the closed-form case: outputs that are linear in the features."""
    features, kept, _ = frames
    target = features @ torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    outputs = {1: target.gather(1, kept.unsqueeze(-1).expand(-1, -1, 16))}
    module = FeatureGuidedRestoration(8, (1,))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        loss = (restore(outputs, features, kept, GRID, module)[1] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_tokens_of_an_inference_mode_that_has_ended_can_be_looked_at():
    model = tiny_vggt()
    accelerate(model, 0.4, weights=PaceWeights.new(model, mode="pre-aa"))
    with torch.inference_mode():
        tokens, _ = model.aggregator(random_images(2))
        inside = tokens[-1]
    assert torch.equal(tokens[-1], inside)
