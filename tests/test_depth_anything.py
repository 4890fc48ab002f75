"""What is special to Depth Anything 3: the order of views, poses that are given, nested nets and the API's class."""

from __future__ import annotations

import warnings
from functools import partial
from unittest import mock

import depth_anything_double as double
import pytest
import real_depth_anything as real
import torch
from conformance import FRAMES, assert_close, assert_equal, assert_pruned, most_tokens, prune, tensors
from test_no_waiting import Looks, no_lists
from torch import nn

from pacevggt_patch import (
    PaceError,
    UnsupportedModelError,
    accelerate,
    calibrate,
    is_accelerated,
    remove,
    summary,
)
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.hosts.depth_anything_3 import DepthAnything3
from pacevggt_patch.method.global_pruning import keep_best

PLAIN, GIANT = double.DOUBLES
EVERY = [*double.DOUBLES, *real.REAL]
every_subject = pytest.mark.parametrize("subject", EVERY, ids=lambda subject: subject.name)


def given(model, images, **arguments):
    """All tensors that a net gives, called with more than images."""
    with torch.inference_mode():
        found = model(images, **arguments)
    return tensors([value for value in found.values() if isinstance(value, torch.Tensor)])


# ---- views


@every_subject
@pytest.mark.parametrize("views", [1, 2, 3])
def test_any_number_of_views(subject, views):
    """From three on the model puts the reference view first and then all back."""
    model, images = subject.model(), subject.images(views, batch=2)
    for strategy in ("first", "middle"):
        run = partial(given, model, images, ref_view_strategy=strategy)
        stock = run()
        prune(model, 1.0)
        assert_equal(run(), stock)
        prune(model)
        assert_pruned(run(), stock)
        assert summary(model).kept.shape == (2, views, 6)
        remove(model)
        assert_equal(run(), stock)


def orders(model, images):
    """The orders [B, S] in which blocks are given the views."""
    found, real_order = [], double.Transformer.order

    def order(self, *args):
        found.append(real_order(self, *args))
        return found[-1]

    with mock.patch.object(double.Transformer, "order", order):
        given(model, images)
    return found[0]


def test_the_reference_view_is_the_first_frame():
    """In clips this long the first frame alone has a key for each patch, so its place can be told from the outputs."""
    model, images = prune(PLAIN.model()), PLAIN.images(30)
    (order,) = orders(model, images)
    assert order[0] > 1
    found = given(model, images)
    moved = given(model, images[:, order], ref_view_strategy="first")
    assert_close([t[:, order] for t in found], moved, 1e-4)
    still = given(model, images, ref_view_strategy="first")
    assert any((a - b).norm() > 1e-2 * b.norm() for a, b in zip(still, found, strict=True))


def test_each_clip_of_a_batch_has_a_reference_view_of_its_own():
    model, images = prune(PLAIN.model()), PLAIN.images(5, batch=3)
    assert len({*orders(model, images)[:, 0].tolist()}) > 1
    every = given(model, images)
    for clip in range(3):
        assert_close([t[clip : clip + 1] for t in every], given(model, images[clip : clip + 1]))
    assert most_tokens(PLAIN, model, images) == 5 * 7


@every_subject
def test_poses_that_are_given(subject):
    """The camera tokens are made of them, and the views keep their order."""
    model, images = subject.model(), subject.images(batch=2)
    extrinsics = torch.eye(4).expand(2, FRAMES, 4, 4).contiguous()
    intrinsics = torch.tensor([[50.0, 0, 35], [0, 50, 28], [0, 0, 1]]).expand(2, FRAMES, 3, 3)
    run = partial(given, model, images, extrinsics=extrinsics, intrinsics=intrinsics)
    stock = run()
    assert any(not torch.equal(a, b) for a, b in zip(stock, given(model, images), strict=True))
    prune(model, 1.0)
    assert_equal(run(), stock)
    prune(model)
    assert_pruned(run(), stock)


def test_a_mask_over_all_tokens_is_reduced():
    model, images = PLAIN.model(), PLAIN.images()
    tokens = FRAMES * 21
    mask = torch.ones(1, tokens, tokens, dtype=torch.bool).tril()
    with torch.inference_mode():
        stock = tensors(model.backbone(images, attn_mask=mask))
        assert_equal(tensors(prune(model, 1.0).backbone(images, attn_mask=mask)), stock)
        assert_pruned(tensors(prune(model).backbone(images, attn_mask=mask)), stock)


@pytest.mark.parametrize("subject", double.DOUBLES, ids=lambda subject: subject.name)
def test_tokens_are_chosen_by_what_the_first_alternating_block_reads(subject):
    model, images, read = subject.model(), subject.images(), []
    vit = model.backbone.pretrained
    hook = vit.blocks[vit.alt_start].norm1.register_forward_hook(lambda *call: read.append(call[-1]))
    given(model, images)
    hook.remove()
    features = read[0].reshape(FRAMES, 21, -1)[:, 1:]
    prune(model)
    given(model, images)
    assert torch.equal(summary(model).kept[0], keep_best(features, (4, 5), 6))


@every_subject
def test_nothing_is_read_back(subject, monkeypatch):
    """The stock model's rotary embedding looks at the largest position in each block."""
    monkeypatch.setattr(DepthAnything3, "check_images", lambda *_: None)  # a CPU gets a look, a GPU does not
    model, images = subject.model(), subject.images()
    with torch.no_grad(), no_lists(), Looks(), pytest.raises(AssertionError, match="reads a value"):
        model(images)
    prune(model)
    with torch.no_grad(), no_lists(), Looks():
        model(images)


# ---- blocks before the alternation


def test_early_blocks_run_on_a_part_of_the_views_at_a_time(monkeypatch):
    model, images, sizes = prune(GIANT.model()), GIANT.images(), []
    whole = given(model, images)
    monkeypatch.setattr("pacevggt_patch.patching.forwards.chunk_rows", lambda *_: 3)
    model.backbone.pretrained.blocks[0].norm1.register_forward_hook(
        lambda _, args, out: sizes.append(len(out))
    )
    assert_close(given(model, images), whole, 1e-6)
    stages = {stage.name: stage.tokens_in for stage in summary(model).stages}
    assert sizes == [2, 2] and stages["early blocks"] == FRAMES * 21
    given(prune(model, 1.0), images)  # to the bit, so as the stock model does it
    assert sizes == [2, 2, 4]


@every_subject
def test_another_entrance_of_the_transformer(subject):
    """Some ask it for layers of their own."""
    model, images = subject.model(), subject.images()

    def run(images):
        with torch.inference_mode():
            return tensors(model.backbone.pretrained.get_intermediate_layers(images, [6, 7]))

    stock = run(images)
    prune(model, 1.0)
    assert_equal(run(images), stock)
    prune(model)
    found = run(images)
    assert_pruned(found, stock)
    assert_equal(run(images), found)
    with torch.inference_mode():
        model.backbone.out_layers = [6, 7]
        assert_equal(tensors(model.backbone(images)), found)


def test_gradients_by_another_entrance():
    model, images = prune(PLAIN.model()), PLAIN.images()
    vit = model.backbone.pretrained
    tensors(vit.get_intermediate_layers(images, [9]))[0].square().mean().backward()
    assert all(bool(block.attn.qkv.weight.grad.isfinite().all()) for block in vit.blocks)


# ---- where the net is


def metric_alone(model, images):
    return given(model.da3_metric, images)


def nests():
    return [
        pytest.param(partial(double.Nested, 4, 10), None, id="double"),
        pytest.param(partial(real.nested, 4, 10, 0), real.REAL[0].missing, id="its own classes"),
    ]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("build", "missing"), nests())
def test_a_nested_model(build, missing, wrapped):
    """The net of all views is pruned; the metric one sees each image alone, and runs as it is."""
    if missing is not None:
        pytest.skip(missing)
    torch.manual_seed(0)
    inner = build().eval()
    model = double.Wrapper(inner) if wrapped else inner
    images = PLAIN.images(batch=1)
    run, metric = partial(given, model, images, export_feat_layers=[]), metric_alone(inner, images)
    stock = run()
    assert_equal(given(prune(model, 1.0), images, export_feat_layers=[]), stock)
    assert_pruned(given(prune(model), images, export_feat_layers=[]), stock)
    assert is_accelerated(model) and is_accelerated(inner.da3) and not is_accelerated(inner.da3_metric)
    assert ("model." if wrapped else "") + "da3.backbone" in summary(model).patched
    assert_equal(metric_alone(inner, images), metric)
    assert_equal(given(remove(model), images, export_feat_layers=[]), stock)


def test_the_class_of_the_api(monkeypatch):
    """It runs under autocast and in inference mode."""
    net = PLAIN.model()
    model, images = double.Wrapper(net), PLAIN.images()
    stock = given(model, images)
    assert_equal(given(prune(model, 1.0), images), stock)
    assert_pruned(given(prune(model), images), stock)
    weights = calibrate(remove(model), images)
    assert_pruned(given(prune(model, weights=weights), images), stock)
    assert summary(model, images).patched[0] == "model.backbone"
    assert is_accelerated(net)
    assert_equal(given(remove(model), images), stock)
    monkeypatch.setenv("PACEVGGT_CACHE", "off")
    accelerate(model, min_frames=1)
    assert_pruned(given(model, images), stock)
    assert "calibrated on the first clip" in summary(model).weights


def test_comparing_asks_for_the_net():
    model, images = double.Wrapper(PLAIN.model()), PLAIN.images()
    with pytest.raises(PaceError, match=r"model\.model"):
        find_host(model).model_images(images[0])
    found = find_host(model.model).model_images(images[0])
    torch.testing.assert_close(found[0, :, 1], (images[0, :, 1] - 0.456) / 0.224)


def test_another_wrapper_is_told_what_to_pass():
    with pytest.raises(UnsupportedModelError, match=r"Sequential wraps .*model\.1\)"):
        prune(nn.Sequential(nn.Identity(), double.Wrapper(PLAIN.model())))


@pytest.mark.parametrize(
    "subject,blocks", [(PLAIN, "3+3"), (GIANT, "2+3"), (real.REAL[0], "3+3"), (real.REAL[1], "2+3")]
)
def test_a_summary_counts_the_blocks_that_alternate(subject, blocks):
    """A giant begins with a global block, which has no frame block before it."""
    model = prune(subject.model())
    vit = model.backbone.pretrained
    numbers = range(vit.alt_start, len(vit.blocks))
    assert blocks == f"{sum(i % 2 == 0 for i in numbers)}+{sum(i % 2 for i in numbers)}"
    assert f" {blocks} blocks, " in summary(model).backbone


# ---- refusals


@pytest.mark.parametrize(("build", "missing"), [
    pytest.param(partial(double.Net, -1, 4), None, id="double"),
    pytest.param(partial(real.net, -1, 4, 0), real.REAL[0].missing, id="its own classes"),
])  # fmt: skip
@pytest.mark.parametrize("wrapped", [False, True])
def test_nets_without_global_blocks_are_refused(build, missing, wrapped):
    if missing is not None:
        pytest.skip(missing)
    model = double.Wrapper(build()) if wrapped else build()
    with pytest.raises(UnsupportedModelError, match="without global blocks"):
        prune(model)


@pytest.mark.parametrize("part", ["backbone", "backbone.pretrained"])
@every_subject
def test_a_backbone_alone_is_refused(subject, part):
    with pytest.raises(UnsupportedModelError, match="backbone of a Depth Anything 3: pass the net"):
        prune(subject.model().get_submodule(part))


def test_a_transformer_that_lacks_a_part_is_refused():
    model = PLAIN.model()
    del model.backbone.pretrained.camera_token
    with pytest.raises(UnsupportedModelError, match=r"backbone\.pretrained lacks camera_token"):
        prune(model)


# ---- images


def test_images_are_normalised():
    model, images = prune(PLAIN.model()), PLAIN.images()
    normal = (images - 0.45) / 0.225
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given(model, normal)
    with pytest.warns(UserWarning, match="ImageNet"):
        given(model, 255 * images)
    remove(model)
    calibrate(model, normal)
    with pytest.raises(PaceError, match="ImageNet"):
        calibrate(model, 255 * images)


@pytest.mark.parametrize(("change", "named"), [
    (lambda images: images[..., :-1], "multiples of 14"),
    (lambda images: images[0], r"\[B, S, 3, H, W\]"),
    (lambda images: images.double(), "float64"),
    (lambda images: images.nan_to_num().log(), "NaN or infinity"),
])  # fmt: skip
def test_images_that_do_not_fit_are_named(change, named):
    model, images = prune(PLAIN.model()), PLAIN.images()
    images[0, 0, 0, 0, 0] = 0
    with pytest.raises(PaceError, match=named):
        given(model, change(images))
