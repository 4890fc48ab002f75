"""benchmarks/scaling.py: what travels is what its paper model says, and its picture, table and refusals."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hosts import random_images, run, tiny_vggt, with_heads
from PIL import Image

from pacevggt_patch import PaceError, accelerate
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.runtime.ranks import Ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

ROOT = Path(__file__).resolve().parent.parent
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


def test_bytes_of_two_gpus_are_those_of_the_documents(benchmarks):
    """VGGT-1B, 1000 frames of 392x518."""
    published = benchmarks("models").PUBLISHED_HEADS
    full = tuple(sum(block == one for block, _ in published) for one in range(24))
    module = benchmarks("exchange_model")
    shape = module.Shape(24, 16, 64, 5, 28 * 37, 311, full, 2)
    row = module.predicted(shape, 1000, 2, 9.2, 0.1, 300e9, 0.0)
    assert f"{row['received_gib']:.1f} GiB" in (ROOT / "docs" / "several-gpus.md").read_text()
    assert 0.005 < row["exchange_seconds"] < 0.015
    assert row["predicted_seconds"] == pytest.approx(9.1 / 2 + 0.1 + row["exchange_seconds"])
    with_one = module.predicted(shape, 1000, 1, 9.2, 0.1, 300e9, 1.0)
    assert with_one["predicted_seconds"] == pytest.approx(9.2) and with_one["exchange_seconds"] == 0
    uneven = module.predicted(shape, 10, 3, 1.0, 0.0, 1e30, 0.0)  # the fullest has four frames
    assert uneven["predicted_seconds"] == pytest.approx(0.4)


def row_of(gpus, frames, seconds, gib):
    return {"gpus": gpus, "frames": frames, "seconds_median": seconds, "peak_gib": gib}


def test_a_row_has_its_share_of_one_gpu(benchmarks):
    scaling = benchmarks("scaling")
    rows = [row_of(1, 300, 2.0, 10.0), row_of(1, 1000, None, None)]
    found = scaling.with_speedup(row_of(2, 300, 1.25, 6.5), rows)
    assert (found["speedup"], found["memory_share"]) == (pytest.approx(1.6), pytest.approx(0.65))
    found = scaling.with_speedup(row_of(2, 1000, 5.0, 20.0), rows)
    assert (found["speedup"], found["memory_share"]) == (None, None)
    assert scaling.with_speedup(rows[0], [])["speedup"] == 1


def test_the_largest_clip_follows_from_two(benchmarks):
    scaling = benchmarks("scaling")
    rows = [row_of(1, 100, 1.0, 5.0), row_of(1, 300, 2.0, 9.0), row_of(2, 100, 1.0, 5.0)]
    found = scaling.largest_frames(rows, torch.device("cpu"))
    # 3 GiB and 0.02 GiB a frame, and 1 GiB is left free.
    assert found == [
        {"gpus": 1, "card_gib": gib, "frames": (gib - 4) * 50, "measured": False} for gib in (24, 40, 80)
    ]


REPORT = {
    "backbone": "vggt-1b (random weights)",
    "size": "392x518",
    "precision": "narrow",
    "environment": {"device": "NVIDIA H200"},
    "rows": [
        row_of(1, 300, 2.2, 10.5) | {"speedup": 1.0},
        row_of(2, 300, 1.2, 6.8) | {"speedup": 2.2 / 1.2},
        row_of(1, 9000, None, None) | {"speedup": None},
        row_of(2, 9000, 60.0, 99.0) | {"speedup": None},
    ],
    "model": [
        {"gpus": n, "frames": 300, "predicted_seconds": 2.2 / n, "predicted_speedup": float(n)}
        for n in (1, 2, 4)
    ],
}


def test_the_table_of_the_documents(benchmarks, tmp_path, monkeypatch):
    tables = benchmarks("write_tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "not been timed" in tables.scaling_table()
    (tmp_path / f"{tables.SCALING}.json").write_text(json.dumps(REPORT))
    where, _, head, _, short, long = tables.scaling_table().splitlines()
    assert "vggt-1b (random weights), 392x518, narrow, NVIDIA H200" in where
    assert head == "| frames | 1 GPU | 2 GPUs | 2 GPUs, on paper | 4 GPUs, on paper |"
    assert short == "| 300 | 2.2 s, 10.5 GiB | 1.2 s (1.83x), 6.8 GiB | 1.1 s (2.00x) | 0.55 s (4.00x) |"
    assert long == "| 9000 | did not fit | 60 s, 99.0 GiB |  |  |"


def test_the_picture_is_drawn(benchmarks, tmp_path):
    path = tmp_path / "scaling.png"
    benchmarks("plots").save_scaling(REPORT, path)
    with Image.open(path) as picture:
        assert picture.width > 1.8 * picture.height  # speed-up, and memory
        assert np.asarray(picture.convert("RGB")).std() > 10
    benchmarks("plots").save_scaling(
        {**REPORT, "rows": [row | {"peak_gib": None} for row in REPORT["rows"]]}, path
    )
    with Image.open(path) as picture:
        assert picture.width < 1.8 * picture.height


@pytest.mark.parametrize(
    "arguments,named",
    [
        (["--gpus", "1,4", "--frames", "2"], "4 GPUs"),
        (["--gpus", "0"], "--gpus"),
        (["--mode", "pre-aa"], "pre-aa"),
        (["--repeats", "0"], "--repeats"),
        (["--size", "57x70"], "multiples of 14"),
    ],
)
def test_what_can_not_be_measured_is_refused(benchmarks, arguments, named):
    with pytest.raises(PaceError, match=named):
        benchmarks("scaling").main(["--device", "cpu", *arguments])


def test_a_process_that_fails_is_named(benchmarks):
    """The benchmark's own processes, of which each refuses the size."""
    with pytest.raises(PaceError, match="rank [01] failed .*multiples of 14"):
        benchmarks("scaling").main(["--device", "cpu", "--gpus", "2", "--size", "57x70"])


def test_under_torchrun_the_benchmark_of_one_process_is_that_of_several(benchmarks, monkeypatch):
    latency, taken = benchmarks("latency"), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(latency.scaling, "main", lambda argv: taken.append(argv) or 0)
    assert latency.main(["--frames", "8"]) == 0 and taken == [["--frames", "8"]]
