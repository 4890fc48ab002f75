"""benchmarks/scaling.py: what travels is what its paper model says, and its picture, table and refusals."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from hosts import random_images, run, tiny_vggt, with_heads

from pacevggt_patch import accelerate
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.runtime.ranks import Ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

SIZE = 56, 70


@pytest.fixture(scope="module")
def benchmarks():
    folder = str(Path(__file__).resolve().parent.parent / "benchmarks")
    sys.path.append(folder)
    yield importlib.import_module
    sys.path.remove(folder)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Short clips, in which all kept tokens are keys; longer ones, of which some heads see a sample; and longer still.
@pytest.mark.parametrize("frames", [3, 30, 60])
@pytest.mark.parametrize("heads", [(), ((1, 0),), ((0, 0), (0, 1), (2, 1))])
def test_what_travels_is_what_the_model_says(benchmarks, one_process, monkeypatch, frames, heads):
    model, handed = tiny_vggt(), {"gathered": [], "summed": []}
    gather, add = Ranks.gather, Ranks.sum

    def noted_gather(self, tensor, sizes, dim, dst=None):
        handed["gathered"].append(tensor.numel() * tensor.element_size())
        return gather(self, tensor, sizes, dim, dst)

    def noted_sum(self, *tensors):
        handed["summed"].append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        return add(self, *tensors)

    monkeypatch.setattr(Ranks, "gather", noted_gather)
    monkeypatch.setattr(Ranks, "sum", noted_sum)
    accelerate(model, weights=with_heads(model, *heads) if heads else None, process_group=True)
    run(model, random_images(frames, height=SIZE[0], width=SIZE[1]))
    shape = benchmarks("exchange_model").Shape.of(find_host(model), heads, SIZE, 0.3, 4)
    sent = shape.sent(frames, 1)
    assert handed == {"gathered": sent.gathered, "summed": sent.summed}
    assert shape.regressions == len(sent.summed)
