"""The benchmarks' formulas against torch's own counter of FLOPs, and the stopwatch against known times."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hosts import TORCH, random_images, tiny_vggt
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pacevggt_patch import PaceWeights, accelerate
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.method.merging import merge_tokens
from pacevggt_patch.method.restoration import restore
from pacevggt_patch.method.scoring import token_scores
from pacevggt_patch.method.selection import assign
from pacevggt_patch.runtime.attention import MORE

pytestmark = pytest.mark.skipif(TORCH < (2, 4), reason="the counter of torch 2.3 needs other arguments")
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def counted(run):
    """FLOPs of `run`; attention as matrix products, since the counter does not know the CPU's kernel."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run()
    return counter


@pytest.mark.parametrize("height,width", [(56, 70), (42, 42)])
@pytest.mark.parametrize("keep", [1.0, 0.3])
def test_flops_of_modules(height, width, keep):
    arithmetic = importlib.import_module("arithmetic")
    model = tiny_vggt().requires_grad_(False)
    frames, grid = 9, (height // 14, width // 14)  # heads take 8 frames at a time
    kept = round(keep * grid[0] * grid[1])
    if keep < 1:
        accelerate(model, keep, weights=None, mode="pre-aa")
    counts = counted(lambda: model(random_images(frames, height=height, width=width))).get_flop_counts()

    def of(*names):
        found = [sum(c.values()) for name, c in counts.items() if name.split(".", 1)[-1] in names]
        assert len(found) == len(names)
        return sum(found)

    work = arithmetic.stage_work(arithmetic.Dimensions.of(model, 4, 4), frames, grid, kept)
    assert work["DINO"].flops == of("aggregator.patch_embed")
    blocks = range(len(model.aggregator.frame_blocks))
    assert work["frame blocks"].flops == of(*(f"aggregator.frame_blocks.{i}" for i in blocks))
    assert work["global blocks"].flops == of(*(f"aggregator.global_blocks.{i}" for i in blocks))
    assert work["camera_head"].flops == of("camera_head")
    if keep == 1:  # an accelerated head counts its restoration, too
        assert work["depth_head"].flops == of("depth_head")
        assert work["point_head"].flops == of("point_head")
        assert sum(stage.flops for stage in work.values()) == of("Global")
    else:
        dense = work["depth_head"].flops + work["point_head"].flops
        probes = 2 * 2  # each head multiplies one number by another, to see what autocast makes of it
        assert dense + work["restoration"].flops + probes == of("depth_head", "point_head")


def test_flops_of_global_pruning():
    arithmetic = importlib.import_module("arithmetic")
    model, frames, grid, keep = tiny_vggt().requires_grad_(False), 9, (4, 5), 6
    accelerate(model, 0.3, weights=None)
    counts = counted(lambda: model(random_images(frames))).get_flop_counts()
    work = arithmetic.stage_work(arithmetic.Dimensions.of(model, 4, 4), frames, grid, keep, global_alone=True)
    probes = 2 * 2  # as above
    # The counter does not know products in place: means over kept tokens, in 4 blocks.
    in_place = 4 * frames * 2 * 25 * keep * 32
    counting = 4 * counting_flops(frames, keep, heads=2)
    whole = sum(stage.flops for stage in work.values()) + probes + counting
    assert whole == sum(counts["Global"].values()) + in_place
    frame_blocks = (name for name in counts if ".frame_blocks." in name and name.count(".") == 3)
    found = sum(sum(counts[name].values()) for name in frame_blocks)
    chosen = work["selection"].flops + frames * arithmetic_near(
        grid, keep
    )  # where tokens enter the first block
    assert found == work["frame blocks"].flops + chosen
    assert set(work) & {"merging", "propagation"} == {"propagation"}


def test_flops_of_full_attention_heads():
    """One of two heads of the first block and both of the second: what runs on which tokens."""
    arithmetic = importlib.import_module("arithmetic")
    model, frames, grid, keep = tiny_vggt().requires_grad_(False), 9, (4, 5), 6
    weights = PaceWeights.of_heads(find_host(model), ((0, 1), (1, 0), (1, 1)), {})
    accelerate(model, 0.3, weights=weights)
    counts = counted(lambda: model.aggregator(random_images(frames))).get_flop_counts()
    dims = arithmetic.Dimensions.of(model, 4, 4)
    work = arithmetic.stage_work(dims, frames, grid, keep, global_alone=True, full=[0.5, 1.0])
    found = sum(
        sum(counts[name].values()) for name in counts if ".global_blocks." in name and name.count(".") == 3
    )
    # In the first block half the channels are filled in: of 25 + 11 tokens by the slope, fitted to all kept ones.
    filled = frames * (36 * 2 * 32 * 16) + 2 * frames * keep * 32 * (32 + 16)
    # The counter watches the blocks, so they run by their own code, which projects all tokens once and for all heads.
    projected = arithmetic.linear(frames * (5 + keep), 32, 3 * 32, 4).flops
    # One head of the first block sees kept tokens, and both of the last two.
    counting = counting_flops(frames, keep, heads=1) + 2 * counting_flops(frames, keep, heads=2)
    assert found == work["global blocks"].flops - projected + filled + counting
    plain = arithmetic.stage_work(dims, frames, grid, keep, global_alone=True)
    in_place = frames * 2 * 25 * keep * 16
    each = plain["propagation"].flops - frames * arithmetic_near(grid, keep)
    assert each % 4 == 0
    assert work["propagation"].flops == plain["propagation"].flops - each // 2 + filled + in_place


def counting_flops(frames, keep, heads):
    """Of the channels that say how often keys count, in one block, which the formulas leave out."""
    return 4 * (frames * (5 + keep)) ** 2 * MORE * heads


def arithmetic_near(grid, keep):
    """FLOPs of the similarity of a frame's tokens to the kept ones."""
    return 2 * grid[0] * grid[1] * keep * 32


def test_flops_of_the_accelerated_stages():
    arithmetic = importlib.import_module("arithmetic")
    frames, grid, keep = 5, (6, 7), 13
    dims = arithmetic.Dimensions(embed_dim=32, dense={"depth_head": 2})
    work = arithmetic.stage_work(dims, frames, grid, keep)
    features = torch.randn(1, frames, 42, 32)
    scores = token_scores(features, grid, keep)
    assignment = assign(scores, keep, frames * (42 - keep))
    outputs = {layer: torch.randn(frames, keep, 64) for layer in range(4)}
    assert work["selection"].flops == counted(lambda: token_scores(features, grid, keep)).get_total_flops()
    merging = counted(lambda: merge_tokens(features, assignment)).get_total_flops()
    assert work["merging"].flops == merging
    restoring = counted(lambda: restore(outputs, features[0], assignment.kept[0], grid)).get_total_flops()
    assert work["restoration"].flops == restoring


def test_bytes_and_floor():
    arithmetic = importlib.import_module("arithmetic")
    product = arithmetic.linear(3, 5, 7, size=2)
    assert (product.flops, product.bytes) == (2 * 3 * 5 * 7, 2 * (3 * 5 + 3 * 7 + 5 * 7))
    work = arithmetic.Work(flops=100, bytes=30) + 2 * arithmetic.Work(passes=4)
    assert work.passes == 8
    assert work.floor(flops_per_second=10, bytes_per_second=30) == 10
    assert work.floor(flops_per_second=100, bytes_per_second=3) == 10


def test_tables_for_the_notes(capsys):
    importlib.import_module("arithmetic").print_tables()
    text = capsys.readouterr().out
    assert text.count("| global blocks |") == 3
    notes = (BENCHMARKS.parent / "docs" / "lab-notebook.md").read_text()
    for line in text.splitlines():
        assert line in notes  # computed, and as they are computed today


class Ticks:
    """A clock that moves one second each time somebody looks."""

    def __init__(self):
        self.now = -1.0

    def __call__(self):
        self.now += 1
        return self.now


def test_stopwatch_leaves_inner_regions_out(monkeypatch):
    stages = importlib.import_module("stages")
    monkeypatch.setattr(stages.time, "perf_counter", Ticks())
    watch = stages.Stopwatch(torch.device("cpu"))
    with watch.region("outer"):  # 0
        with watch.region("inner"):  # 1
            pass  # 2
        with watch.region("inner"), watch.region("outer"):  # 3, 4
            pass  # 5
        # 6
    # 7
    assert watch.seconds() == {"outer": 7 - 1 - 3 + 1, "inner": 1 + 3 - 1}


@pytest.mark.parametrize("mode", [None, "global", "pre-aa"])
def test_stages_of_a_model(mode):
    stages = importlib.import_module("stages")
    model = tiny_vggt().requires_grad_(False)
    named = ["DINO", "frame blocks", "global blocks", "camera_head", "depth_head", "point_head"]
    if mode is not None:
        accelerate(model, 0.3, weights=None, mode=mode)
        named += ["selection", *(["propagation"] if mode == "global" else ["merging", "restoration"])]
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    images = random_images(9)
    with torch.inference_mode():
        seconds, syncs = stages.stages_and_syncs(model, lambda: model(images), torch.device("cpu"))
    assert syncs is None
    assert seconds.keys() == {*named, "other"} and min(seconds.values()) > 0
    assert [module.__dict__.get("forward") for module in model.modules()] == forwards
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert stages.StageTimer.stage.__name__ == "stage" and stages.RestoredTokens.frames.__name__ == "frames"


def test_kernels_and_syncs():
    stages = importlib.import_module("stages")
    events = [
        SimpleNamespace(key="void (anonymous namespace)::gemm", count=3, self_device_time_total=3e6),
        SimpleNamespace(key="x" * 200, count=1, self_cuda_time_total=1e6),
        SimpleNamespace(key="cudaLaunchKernel", count=9, self_device_time_total=0),
    ]
    gemm, other = stages.top_kernels(events)
    assert gemm == {"kernel": "gemm", "calls": 3, "seconds": 3.0, "share": 0.75}
    assert len(other["kernel"]) == 100
    assert len(stages.top_kernels(events, shown=1)) == 1
    assert (
        stages.count_syncs(["called a synchronizing CUDA operation (Triggered ...)", "something else"]) == 1
    )
    cpu = torch.device("cpu")
    assert stages.host_syncs(lambda: None, cpu) is stages.kernels(lambda: None, cpu) is None
