"""Nothing in the pruned forward reads a value back: on a GPU each look would make the host wait for the device."""

from contextlib import contextmanager

import pytest
import torch
from hosts import random_deltas, random_images, tiny_vggt
from torch.utils._python_dispatch import TorchDispatchMode

from pacevggt_patch import PaceWeights, accelerate
from pacevggt_patch.hosts.vggt import VGGT
from pacevggt_patch.patching.install import state_of

aten = torch.ops.aten
LOOKS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten._unique2,
    aten.is_nonzero,
}


class Looks(TorchDispatchMode):
    """Raises where a value or a shape depends on the values of a tensor.

    Not in inference mode, in which `item()` passes by the mode; `tolist()` passes by it always, see `no_lists`.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in LOOKS:
            raise AssertionError(f"{func} reads a value")
        indices = args[1] if func.overloadpacket is aten.index else ()
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
            raise AssertionError("indexing by a mask reads its values")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_lists():
    def refuse(tensor):
        raise AssertionError("tolist reads values")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", refuse)
        yield


@pytest.fixture
def no_checks(monkeypatch):
    """A CPU gets a look at the values of its images, a GPU does not."""
    monkeypatch.setattr(VGGT, "check_images", lambda *_: None)


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).all()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x + 1),
    ],
)
def test_the_mode_sees_every_look(look):
    with pytest.raises(AssertionError, match="reads"), torch.no_grad(), no_lists(), Looks():
        look(torch.ones(3))


def all_of_it(model, images):
    """Aggregator, camera head and dense heads, that of the track head included."""
    tokens, start = model.aggregator(images)
    model.camera_head(tokens)
    model.depth_head(tokens, images, start)
    model.point_head(tokens, images, start)
    model.track_head.feature_extractor(tokens, images, start)


def weights_for(model, mode: str, what: str):
    if what == "none":
        return None
    weights = PaceWeights.new(model, mode=mode) if what == "heads" else random_deltas(model, mode=mode)
    if mode == "global":
        weights.full_heads = ((1, 0), (2, 0), (2, 1))
    return weights


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("what", ["none", "heads", "deltas"])
@pytest.mark.parametrize(("mode", "merge_budget"), [("global", None), ("pre-aa", 0.4)])
def test_the_pruned_forward_never_looks(mode, merge_budget, what, compile, no_checks, monkeypatch):
    # What is compiled is the same code; the compiler itself looks at what it likes.
    monkeypatch.setattr("pacevggt_patch.patching.forwards.compiled", lambda function, *_: function)
    model, images = tiny_vggt(track=True), random_images(3, batch=2)
    weights = weights_for(model, mode, what)
    accelerate(model, 0.3, merge_budget, weights=weights, mode=mode, compile=compile)
    with torch.no_grad(), no_lists(), Looks():
        all_of_it(model, images)


@pytest.mark.parametrize("mode", ["global", "pre-aa"])
def test_the_pruned_forward_never_looks_under_autocast(mode, no_checks):
    model, images = tiny_vggt(track=True), random_images(5, batch=2)
    accelerate(model, 0.3, weights=weights_for(model, mode, "deltas"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), no_lists(), Looks():
        all_of_it(model, images)


@pytest.mark.parametrize("keep_ratio", [0.3, 1.0])
def test_waiting_for_a_longer_clip_takes_no_look(keep_ratio, no_checks):
    model, images = tiny_vggt(track=True), random_images(3)
    accelerate(model, keep_ratio)
    assert state_of(model).pending == (keep_ratio < 1)
    with torch.no_grad(), no_lists(), Looks():
        if keep_ratio < 1:
            with pytest.warns(UserWarning, match="too short"):
                all_of_it(model, images)
        all_of_it(model, images)


def test_clips_below_min_frames_take_no_look(no_checks):
    model, images = tiny_vggt(track=True), random_images(3)
    accelerate(model, 0.3, weights=None, min_frames=4)
    with torch.no_grad(), no_lists(), Looks():
        all_of_it(model, images)


def test_the_stock_rope_does_look():
    """What the mode would catch: the stock RoPE reads its largest position in every block."""
    model, images = tiny_vggt(), random_images(2)
    with pytest.raises(AssertionError, match="reads"), torch.no_grad(), Looks():
        model.aggregator(images)
