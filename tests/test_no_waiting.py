"""Nothing in the pruned forward reads a value back: on a GPU each look would make the host wait for the device."""

import pytest
import torch
from hosts import random_images, tiny_vggt
from torch.utils._python_dispatch import TorchDispatchMode

from pacevggt_patch import PaceWeights, accelerate

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


@pytest.fixture(autouse=True)
def no_lists(monkeypatch):
    def refuse(tensor):
        raise AssertionError("tolist reads values")

    monkeypatch.setattr(torch.Tensor, "tolist", refuse)


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
    with pytest.raises(AssertionError, match="reads"), torch.no_grad(), Looks():
        look(torch.ones(3))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("merge_budget", "global_keys"), [(None, 1.0), (0.0, 1.0), (0.4, 0.5)])
def test_the_pruned_forward_never_looks(learned, merge_budget, global_keys):
    """Aggregator, camera head and dense heads, the depth head's track-style sibling included."""
    model, images = tiny_vggt(track=True), random_images(9, batch=2)
    weights = PaceWeights.new(model) if learned else None
    accelerate(model, 0.3, merge_budget, weights=weights, check_finite=False, global_keys=global_keys)
    with torch.no_grad(), Looks():
        tokens, start = model.aggregator(images)
        model.camera_head(tokens)
        model.depth_head(tokens, images, start)
        model.point_head(tokens, images, start)
        model.track_head.feature_extractor(tokens, images, start)


def test_the_stock_rope_does_look():
    """What the mode would catch: the stock RoPE reads its largest position in every block."""
    model, images = tiny_vggt(), random_images(2)
    with pytest.raises(AssertionError, match="reads"), torch.no_grad(), Looks():
        model.aggregator(images)
