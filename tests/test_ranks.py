"""One clip over several processes gives what one process gives. The processes are real ones, joined by gloo."""

from __future__ import annotations

import contextlib
import copy
import datetime
import importlib
import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hosts import random_deltas, random_images, run, tiny_vggt, with_heads
from test_no_waiting import Looks, no_lists

from pacevggt_patch import (
    PaceConfig,
    PaceError,
    PaceWeights,
    UnsupportedModelError,
    accelerate,
    fit_budget,
    gather_outputs,
    is_accelerated,
    paused,
    remove,
    split_frames,
    summary,
)
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.hosts.vggt import VGGT
from pacevggt_patch.method import few_keys as module
from pacevggt_patch.method.few_keys import all_keys, few_keys, full_keys
from pacevggt_patch.method.propagation import Propagation, make_propagation, regress
from pacevggt_patch.patching.forwards import BlockForward
from pacevggt_patch.runtime.ranks import Ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

PATIENCE = 5  # seconds that a group waits where one of it does not come
SHORT = {"FRAMES": 3, "FRAMES_OF_FULL": 4, "LONG": 5}  # clips of seven frames have keys of long ones
# Of each case: weights, and what else differs from a call of the tiny model with the schedule as it is.
CASES = {
    "no weights": {},
    "full heads": {"weights": "heads"},
    "all heads of a block": {"weights": "all heads"},
    "sampled keys": SHORT,
    "sampled keys, full heads": {"weights": "heads", **SHORT},
    "sampled keys, all heads of a block": {"weights": "all heads", **SHORT},
    "sampled keys, own code of blocks": {"weights": "heads", "closed": True, **SHORT},
    "no weights, own code of blocks": {"closed": True},
    "deltas": {"weights": "deltas"},
    "deltas, full heads, sampled keys": {"weights": "deltas and heads", **SHORT},
    "saliency": {"weights": "saliency"},
    "global blocks first": {"order": ["global", "frame"], "weights": "heads", **SHORT},
    "two blocks of a kind": {"group": 2, **SHORT},
}
COUNTS = {2: (3, 4), 3: (4, 1, 2)}  # frames of each rank
FRAMES = 7
# Cases of three processes; those of two are all.
TRAVELLED = (7, 61)  # frames of clips whose bytes are counted
OF_THREE = ("no weights", "deltas, full heads, sampled keys", "global blocks first")
BOTH = [(2, name) for name in CASES] + [(3, name) for name in OF_THREE]


def some_weights(model, kind):
    if kind is None:
        return None
    weights = random_deltas(model) if "deltas" in kind else PaceWeights.new(model)
    if kind == "saliency":
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            weights.scorer.out.weight.copy_(torch.randn(weights.scorer.out.weight.shape, generator=generator))
    heads = {"all heads": ((0, 0), (0, 1), (2, 1))}.get(kind, ((0, 1), (2, 0)) if "heads" in kind else ())
    weights.full_heads = heads
    return weights


def model_of(case):
    model = tiny_vggt(group=case.get("group", 1))
    if "order" in case:
        model.aggregator.aa_order = case["order"]
    return model, some_weights(model, case.get("weights"))


@contextlib.contextmanager
def conditions(case):
    """The schedule of a case, and its blocks closed to us where it says so."""
    with pytest.MonkeyPatch.context() as patch:
        for name in SHORT:
            if name in case:
                patch.setattr(module, name, case[name])
        if case.get("closed"):
            patch.setattr(BlockForward, "fits", lambda *_: False)
        yield


def outputs_of(model, images):
    """What a model gives, and its tokens of all layers."""
    with torch.inference_mode():
        return model(images) | {"tokens": model.aggregator(images)[0]}


# What the processes do.


class Group(NamedTuple):
    """A process in a group, and the frames of a clip that are its own."""

    group: Any
    rank: int
    folder: Path

    @property
    def world(self):
        return dist.get_world_size(None if self.group is True else self.group)

    @property
    def images(self):
        counts = COUNTS[self.world]
        start = sum(counts[: self.rank])
        return random_images(FRAMES)[:, start : start + counts[self.rank]]

    def save(self, name, value):
        torch.save(value, self.folder / f"{name}-{self.world}-{self.rank}.pt")


def work(rank, folder):
    """All three processes are one group, the last two another, in which they have other numbers."""
    os.environ["PACEVGGT_CACHE"] = "off"
    torch.set_num_threads(1)
    every = {"backend": "gloo", "init_method": f"file://{folder}/store", "rank": rank, "world_size": 3}
    dist.init_process_group(**every, timeout=datetime.timedelta(seconds=240))
    pair = dist.new_group([1, 2])
    short = [dist.new_group([1, 2], timeout=datetime.timedelta(seconds=PATIENCE)) for _ in range(2)]
    compute(Group(True, rank, folder))
    scale(rank, folder)
    if rank:
        here = Group(pair, rank - 1, folder)
        compute(here)
        travel(here)
        refuse(here)
        fail(here, short)


def compute(here):
    found = {}
    for name in [name for world, name in BOTH if world == here.world]:
        case = CASES[name]
        model, weights = model_of(case)
        with conditions(case):
            accelerate(model, weights=weights, process_group=here.group)
            found[name] = outputs_of(model, here.images)
    here.save("computed", found)
    model = accelerate(tiny_vggt(), weights=None, process_group=here.group)
    predictions = run(model, here.images)
    joined = [gather_outputs(predictions, here.group, dst=dst) for dst in (0, 1)]
    again = copy.deepcopy(model)  # of the same group
    same = torch.equal(run(again, here.images)["depth"], predictions["depth"])
    with torch.inference_mode(), paused(model):
        stock = model(here.images)["depth"]
    stock = torch.equal(stock, run(remove(model), here.images)["depth"])
    here.save("gathered", {"joined": joined, "copy": same, "stock": stock})


def travel(here):
    """Bytes that a rank of two hands to the other, of clips that are not even."""
    found, gather = {}, dist.all_gather
    for frames in TRAVELLED:
        images = random_images(frames)[:, split_frames(frames, here.rank, here.world)]
        for heads in ((), ((1, 0),)):
            handed = []

            def noted(parts, tensor, group, handed=handed):
                handed.append(tensor.numel() * tensor.element_size())
                return gather(parts, tensor, group=group)

            model = tiny_vggt()
            weights = with_heads(model, *heads) if heads else None
            accelerate(model, weights=weights, process_group=here.group)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dist, "all_gather", noted)
                run(model, images)
            found[frames, heads] = handed
    here.save("travelled", found)


def scale(rank, folder):
    """benchmarks/scaling.py, on one and on two of the three processes."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    scaling = importlib.import_module("scaling")
    arguments = ["--size", "28x42", "--frames", "2,3", "--repeats", "1", "--full-heads", "1"]
    args = scaling.parse_arguments([*arguments, "--json", str(folder / "scaling.json")])
    scaling.measured(args, torch.device("cpu"), rank, 3)


def caught(function):
    """The error that a function raises, or None."""
    try:
        function()
    except Exception as error:
        return type(error), str(error)
    return None


def refuse(here):
    group, rank, images = here.group, here.rank, here.images

    def accelerates(model=None, **settings):
        model = tiny_vggt() if model is None else model
        found = caught(lambda: accelerate(model, **{"weights": None, "process_group": group} | settings))
        assert found is None or not is_accelerated(model)
        return found

    heads = with_heads(tiny_vggt(), (rank, 0))
    found = {
        "settings": accelerates(keep_ratio=0.3 + 0.1 * rank),
        "weights": accelerates(weights=heads),
        "model": accelerates(tiny_vggt(seed=rank)),
        "dtype": accelerates(tiny_vggt().to([torch.float32, torch.float64][rank])),
        "one file": accelerates(weights=["missing.safetensors", None][rank]),
        "auto": accelerates(weights="auto"),
        "pre-aa": accelerates(mode="pre-aa"),
        "all kept": accelerates(keep_ratio=1),
        "min_frames": accelerates(min_frames=8),
    }
    model = accelerate(tiny_vggt(track=True), weights=None, process_group=group)

    def calls(images, **kwargs):
        with torch.inference_mode():
            return caught(lambda: model(images, **kwargs))

    other = images.clone()
    other[0, -1, 0, 0, 0] = float("nan")
    found |= {
        "gradients": caught(lambda: model(images)),
        "nan": calls([images, other][rank]),
        "size": calls([images, images[..., :56]][rank]),
        "no frames": calls([images, images[:, :0]][rank]),
        "batch": calls(images.expand(2, -1, -1, -1, -1)),
        "small": calls(images[..., :14, :14]),
        "fine": calls(images),
        "training": caught(lambda: torch.inference_mode()(model.train().aggregator)(images)),
        "outputs": caught(lambda: gather_outputs({"depth": images, "more": torch.zeros(3)}, group)),
        "other outputs": caught(lambda: gather_outputs([images, images[..., 0]][rank], group)),
        "dst": caught(lambda: gather_outputs(images, group, dst=2)),
        "pickle": caught(lambda: pickle.dumps(model)),
        "budget": caught(lambda: fit_budget(model, 4, (56, 56), seconds=1)),
    }
    model.eval()
    found["points"] = calls(images, query_points=torch.zeros(1, 2, 2))
    found["after points"] = calls(images)
    model = accelerate(tiny_vggt(), weights=None, process_group=group)
    block = model.aggregator.global_blocks[0]
    with torch.inference_mode():
        found["camera first"] = caught(lambda: model.camera_head([torch.zeros(1, 3, 25, 64)] * 4))
        found["block"] = caught(lambda: block(torch.zeros(1, 50, 32)))
        tokens, _ = model.aggregator(images)
        found["camera"] = caught(lambda: model.camera_head([t[:, :1] for t in tokens]))
    here.save("refused", found)


def fail(here, groups):
    models = [tiny_vggt() for _ in groups]
    dist.barrier(here.group)  # these groups do not wait long
    for model, group in zip(models, groups, strict=True):
        accelerate(model, weights=None, process_group=group)

    def stops(*_):
        raise OSError("the disk is full")

    if here.rank == 1:
        models[0].aggregator.global_blocks[2].register_forward_pre_hook(stops)
        models[1].aggregator.global_blocks[2].register_forward_pre_hook(
            lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        )
    with torch.inference_mode():
        here.save("raises", [caught(lambda: models[0](here.images)) for _ in range(2)])
        dist.barrier(here.group)
        here.save("killed", caught(lambda: models[1](here.images)))


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What groups of two and of three processes left behind: a folder, and exit codes."""
    folder, context = tmp_path_factory.mktemp("ranks"), mp.get_context("spawn")
    group = [context.Process(target=work, args=(rank, folder), daemon=True) for rank in range(3)]
    for process in group:
        process.start()
    end = time.monotonic() + 300
    for process in group:
        process.join(max(0.1, end - time.monotonic()))
    yield folder, [process.exitcode for process in group]
    for process in group:
        process.kill()


def load(processes, world, name):
    folder, codes = processes
    files = [folder / f"{name}-{world}-{rank}.pt" for rank in range(world)]
    missing = [file.name for file in files if not file.exists()]
    assert not missing, f"{missing} not written; processes ended with {codes}"
    return [torch.load(file, weights_only=False) for file in files]


@pytest.fixture(scope="module")
def alone():
    """What one process gives in each case."""
    found = {}
    for name, case in CASES.items():
        model, weights = model_of(case)
        with conditions(case):
            accelerate(model, weights=weights, min_frames=1)
            found[name] = outputs_of(model, random_images(FRAMES))
    return found


@pytest.mark.parametrize("world,name", BOTH)
def test_frames_get_what_they_get_in_one_process(processes, alone, world, name):
    found = [computed[name] for computed in load(processes, world, "computed")]
    for key, whole in alone[name].items():
        several = whole if isinstance(whole, list) else [whole]
        for number, wanted in enumerate(several):
            parts = [part[key][number] if isinstance(whole, list) else part[key] for part in found]
            assert [part.shape[1] for part in parts] == list(COUNTS[world])
            torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-5, atol=1e-5, msg=key)


def test_frames_of_other_processes_matter(alone):
    """Each rank by itself would give something else, and so would special tokens of a first frame."""
    images, wanted = random_images(FRAMES), alone["no weights"]
    model = accelerate(tiny_vggt(), weights=None, min_frames=1)
    for part in (slice(0, 3), slice(3, 7)):
        found = run(model, images[:, part])
        for key in ("depth", "pose_enc", "world_points"):
            assert (found[key] - wanted[key][:, part]).abs().max() > 1e-3


@pytest.mark.parametrize("world", COUNTS)
def test_outputs_are_gathered_on_one_rank(processes, alone, world):
    wanted = alone["no weights"]
    for rank, found in enumerate(load(processes, world, "gathered")):
        for dst, joined in enumerate(found["joined"]):
            if rank != dst:
                assert joined is None
                continue
            assert joined.keys() == wanted.keys() - {"tokens"}
            assert joined["images"].equal(random_images(FRAMES))
            for key in ("pose_enc_list", "depth"):
                torch.testing.assert_close(joined[key], wanted[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world", COUNTS)
def test_copies_are_of_the_same_group_and_paused_models_of_none(processes, world):
    for found in load(processes, world, "gathered"):
        assert found["copy"] and found["stock"]


# What the message names, on every rank.
REFUSED = {
    "settings": ("settings", "0.3", "0.4", "rank 1"),
    "weights": ("weights", "rank 0", "rank 1"),
    "model": ("model", "rank 1"),
    "dtype": ("float32", "float64", "rank 1"),
    "one file": ("missing.safetensors",),
    "auto": ("calibrate(model, images)", "weights"),
    "pre-aa": ('mode="pre-aa"', "process_group"),
    "all kept": ("keep_ratio=1", "process_group"),
    "min_frames": ("min_frames=8", "process_group"),
    "gradients": ("torch.inference_mode()",),
    "training": ("model.eval()",),
    "nan": ("NaN",),
    "size": ("size of images", "56x70", "56x56"),
    "no frames": ("at least one frame",),
    "batch": ("2 clips",),
    "small": ("keep_ratio=0.3", "1 patch"),
    "outputs": ("dimension 1", "[3]"),
    "other outputs": ("outputs", "rank 1"),
    "dst": ("dst", "2"),
    "pickle": ("remove(model)",),
    "budget": ("process_group",),
    "points": ("track_head", "process_group"),
    "block": ("global_blocks.0", "process_group"),
    "camera": ("camera head", "aggregator"),
    "camera first": ("camera_head", "aggregator"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_call_is_refused_on_every_rank(processes, name):
    for rank, found in enumerate(load(processes, 2, "refused")):
        assert found[name] is not None, f"rank {rank} went on"
        kind, message = found[name]
        assert issubclass(kind, PaceError)
        assert all(part in message for part in REFUSED[name]), message


def test_an_error_of_one_rank_is_named_on_the_other(processes):
    found = load(processes, 2, "refused")
    assert "rank 0 can't go on" in found[1]["one file"][1] and "can't go on" not in found[0]["one file"][1]
    assert "rank 1 can't go on" in found[0]["nan"][1] and "can't go on" not in found[1]["nan"][1]


def test_a_refused_call_leaves_the_ranks_in_step(processes):
    for found in load(processes, 2, "refused"):
        assert found["fine"] is None
        assert found["after points"] is None


def test_a_rank_that_fails_ends_the_others(processes):
    """It stays alive, so that they wait as long as the group does; a further call of it is refused."""
    first, second = load(processes, 2, "raises")
    assert second[0] == (OSError, "the disk is full")
    assert second[1][0] is PaceError and "the disk is full" in second[1][1]
    kind, message = first[0]
    assert issubclass(kind, PaceError) and "rank 0 can't reach the others" in message
    assert "rank 1 failed" in message and "the disk is full" in message


def test_a_rank_that_is_killed_ends_the_others(processes):
    folder, codes = processes
    kind, message = torch.load(folder / "killed-2-0.pt", weights_only=False)
    assert issubclass(kind, PaceError) and "rank 0 can't reach the others" in message
    assert "rank 1 was killed" in message and "rank 0 was" not in message
    assert codes == [0, 0, -signal.SIGKILL]


def test_the_paper_model_counts_what_travels(processes, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    shapes = importlib.import_module("exchange_model").Shape
    for rank, found in enumerate(load(processes, 2, "travelled")):
        assert len(found) == 4, rank
        for (frames, heads), handed in found.items():
            shape = shapes.of(find_host(tiny_vggt()), heads, (56, 70), 0.3, 4)
            assert handed == shape.sent(frames, 2).gathered


def test_the_benchmark_of_scaling_writes_its_rows(processes):
    report = json.loads((processes[0] / "scaling.json").read_text())
    assert report["environment"]["torch"] == torch.__version__ and report["full_heads"] == 1
    rows = report["rows"]
    assert [(row["frames"], row["gpus"]) for row in rows] == [(2, 1), (2, 2), (3, 1), (3, 2)]
    for row in rows:
        assert (
            row["peak_gib"] is None and 0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"]
        )
        (one,) = [other for other in rows if other["frames"] == row["frames"] and other["gpus"] == 1]
        assert row["speedup"] == pytest.approx(one["seconds_median"] / row["seconds_median"])


# In this process.


@pytest.mark.parametrize("total,world", [(1, 1), (7, 2), (7, 3), (7, 7), (100, 8)])
def test_each_frame_has_one_rank(total, world):
    parts = [split_frames(total, rank, world) for rank in range(world)]
    frames = list(range(total))
    assert [frame for part in parts for frame in frames[part]] == frames
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


@pytest.mark.parametrize(
    "arguments,named",
    [
        ((3, 0, 4), "3 frames are"),
        ((1, 0, 4), "1 frame is"),
        ((3, 3, 3), "rank 3"),
        ((3, -1, 3), "rank"),
        ((0, 0, 1), "total"),
    ],
)
def test_frames_that_can_not_be_split_are_refused(arguments, named):
    with pytest.raises(PaceError, match=named):
        split_frames(*arguments)


@pytest.mark.parametrize("group", [True, "gloo", 2])
def test_a_group_must_be_set_up(group):
    model = tiny_vggt()
    with pytest.raises(PaceError, match="init_process_group"):
        accelerate(model, weights=None, process_group=group)
    assert not is_accelerated(model)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_group_of_one_gives_what_no_group_gives(one_process):
    images, model = random_images(5), tiny_vggt()
    accelerate(model, weights=with_heads(model, (1, 0)), min_frames=1)
    wanted = run(model, images)
    accelerate(model, weights=with_heads(model, (1, 0)), process_group=True)
    found = run(model, images)
    torch.testing.assert_close(found["depth"], wanted["depth"], rtol=1e-5, atol=1e-5)
    assert gather_outputs(found)["depth"].equal(found["depth"])
    assert summary(model).kept.shape[1] == 5 and "rank 0 of 1" in str(summary(model))
    accelerate(model, PaceConfig(0.3, min_frames=1), weights=with_heads(model, (1, 0)))  # and back again
    assert run(model, images)["depth"].equal(wanted["depth"])


@pytest.mark.parametrize("case", [{}, SHORT], ids=["short clip", "long clip"])
def test_nothing_waits_once_the_ranks_agree(one_process, case, monkeypatch):
    monkeypatch.setattr(
        VGGT, "check_images", lambda *_: None
    )  # a CPU gets a look at the images, a GPU does not
    model, images = tiny_vggt(), random_images(FRAMES)
    accelerate(model, weights=with_heads(model, (1, 0)), process_group=True)
    run(model, images)  # the first call looks at special tokens
    monkeypatch.setattr(Ranks, "agree", lambda self, describe: [describe()])
    with conditions(case), torch.no_grad(), no_lists(), Looks():
        model(images)


def test_a_group_must_be_one(one_process):
    for group in ("gloo", 2, dist.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises(PaceError, match="process_group"):
            Ranks(group)


@pytest.mark.parametrize("again", [False, True])
def test_a_group_that_is_no_more_is_refused(again):
    """Also where there is another one since."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = accelerate(tiny_vggt(), weights=None, process_group=True)
    predictions, ranks = run(model, random_images(3)), Ranks(True)
    dist.destroy_process_group()
    if again:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.raises(PaceError, match="accelerate again"):
        run(model, random_images(3))
    with pytest.raises(PaceError, match="is no more"):
        ranks.agree(lambda: (None, {}))
    if not again:
        with pytest.raises(PaceError, match="init_process_group"):
            gather_outputs(predictions)
        return
    accelerate(model, weights=None, process_group=True)
    assert run(model, random_images(3))["depth"].equal(predictions["depth"])
    dist.destroy_process_group()


def test_models_on_cuda_need_nccl(one_process):
    with pytest.raises(PaceError, match="nccl"):
        Ranks(True).check_device(torch.device("cuda", 0))


def test_ranks_that_failed_are_named(one_process, monkeypatch):
    """By what they left in the store; else those are that do not wait, too."""
    monkeypatch.setattr("pacevggt_patch.runtime.ranks.GRACE", 0)
    ranks, others = Ranks(True), [Ranks(True) for _ in range(3)]
    ranks.world = 4
    for rank, other in enumerate(others, 1):
        other.rank = rank
    others[0].note("pacevggt waits", "")
    assert "rank 2 was killed" in ranks.lost() and "rank 3 was killed" in ranks.lost()
    assert "rank 0" not in ranks.lost() and "rank 1" not in ranks.lost()
    with pytest.raises(OSError, match="full"), others[2].in_step():
        raise OSError("the disk is full")
    assert ranks.lost() == "rank 3 failed (the disk is full)"
    ranks.store = None
    assert "its own message says why" in ranks.lost()


def test_special_tokens_must_be_those_of_the_model(one_process):
    """Else which frame comes first could not be told."""
    model = accelerate(tiny_vggt(), weights=None, process_group=True)
    model.aggregator.patch_start_idx = 5
    tokens = model.aggregator.frame_blocks[0]
    tokens.register_forward_pre_hook(lambda block, inputs: (inputs[0] + 1e-3,))
    with pytest.raises(UnsupportedModelError, match="camera_token"):
        run(model, random_images(3))


class Others:
    """Stands in for the exchange of a rank whose others are known."""

    def __init__(self, counts, rank, tensors=None):
        self.counts, self.before, self.total = counts, sum(counts[:rank]), sum(counts)
        self.tensors = tensors

    def gather(self, tensor, sizes, dim):
        assert [part.shape[dim] for part in self.tensors] == list(sizes)
        return self.tensors

    def sum(self, *tensors):
        return [sum(parts) for parts in zip(*self.tensors, strict=True)]


SPECIAL, GRID, PATCHES, KEEP = 2, (4, 5), 20, 6


def some_propagation(frames):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(frames, PATCHES, 6, generator=generator)
    kept = torch.stack([torch.randperm(PATCHES, generator=generator)[:KEEP].sort().values for _ in features])
    return make_propagation(features, kept, GRID, SPECIAL, torch.float32)


@pytest.mark.parametrize("counts", [(30, 30, 40), (1, 98, 1), (50, 50)])
def test_keys_of_all_ranks_are_those_of_the_clip(counts):
    total, length = sum(counts), SPECIAL + KEEP
    whole = some_propagation(total)
    wanted = few_keys(whole), full_keys(total, SPECIAL, PATCHES, 1, whole.index.device)
    places = [[], []], [[], []]  # of both kinds: those that count once, the others
    for rank, count in enumerate(counts):
        exchange = Others(counts, rank)
        here = slice(exchange.before, exchange.before + count)
        part = Propagation(whole.index[here], whole.columns[here], KEEP)
        found = (
            few_keys(part, 1, exchange),
            full_keys(count, SPECIAL, PATCHES, 1, whole.index.device, exchange),
        )
        for keys, both, width, same in zip(found, places, (length, SPECIAL + PATCHES), wanted, strict=True):
            assert keys.counts == same.counts
            sizes = keys.elsewhere.alone[rank], keys.elsewhere.others[rank]
            for kind, some in zip(both, (keys.index[0] + exchange.before * width).split(sizes), strict=True):
                kind.extend(some.tolist())
    for both, same in zip(places, wanted, strict=True):
        alone = same.counts.alone
        assert sorted(both[0]) == sorted(same.index[0, :alone].tolist())
        assert both[1] == same.index[0, alone:].tolist()


def test_few_keys_travel_of_long_clips():
    """A sixth of the kept tokens of a frame at 300 frames, and no queries."""
    keys = few_keys(some_propagation(75), 1, Others((75,) * 4, 1)).elsewhere
    assert keys.alone[1:] == [75 * SPECIAL] * 3 and keys.alone[0] == 75 * SPECIAL + PATCHES
    assert keys.others == [74, 75, 75, 75]
    every = all_keys(Others((75,) * 4, 1), SPECIAL + KEEP).elsewhere
    assert every.alone == [75 * (SPECIAL + KEEP)] * 4


def test_keys_that_count_once_come_first_in_attention():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, 2, size, 7, generator=generator) for size in (5, 3)]
    keys = module.Elsewhere(Others((2, 1), 0, parts), [3, 1], [2, 2])
    key, value = keys.joined(parts[0][..., :4].double(), parts[0][..., 4:])
    wanted = torch.cat([parts[0][:, :, :3], parts[1][:, :, :1], parts[0][:, :, 3:], parts[1][:, :, 1:]], 2)
    assert key.dtype == torch.float64 and key.float().equal(wanted[..., :4])
    assert value.dtype == torch.float32 and value.equal(wanted[..., 4:])


@pytest.mark.parametrize("counts", [(3, 4), (1, 1, 5)])
def test_a_regression_of_all_ranks_is_that_of_the_clip(counts, monkeypatch):
    """Also where it looks at some frames alone, and at none of one rank."""
    generator = torch.Generator().manual_seed(0)
    tokens, values = torch.randn(2, 7, SPECIAL + KEEP, 4, generator=generator, dtype=torch.float64)
    for rows in (1, 2, 4, 100):
        monkeypatch.setattr("pacevggt_patch.method.propagation.ROWS", rows)
        propagation = some_propagation(7)
        sums, seen = [], 0

        class Noted(Others):
            def sum(self, *tensors, sums=sums):
                sums.append([tensor.clone() for tensor in tensors])
                return list(tensors)

        for rank, count in enumerate(counts):
            exchange = Noted(counts, rank)
            here = slice(exchange.before, exchange.before + count)
            propagation.dependence(tokens[here], values[here], 1, exchange)
            seen += len(propagation._sample(tokens[here], 1, 4, exchange)[0])
        assert seen == len(propagation._sample(tokens, 1, 4, None)[0])
        wanted = propagation.dependence(tokens, values, 1)
        empty = torch.zeros(1, 0, KEEP, 4, dtype=torch.float64)
        found = regress(empty, empty, Others(counts, 0, sums))
        torch.testing.assert_close(found, wanted)
