"""What does not fit is refused in a PaceError that names it, and the model stays as it was."""

import re

import pytest
import torch
from hosts import random_images, tiny_vggt
from torch import nn

import pacevggt_patch
from pacevggt_patch import (
    PaceConfig,
    PaceError,
    PaceWeights,
    UnsupportedModelError,
    WeightsError,
    accelerate,
    is_accelerated,
    paused,
    remove,
    summary,
)

MODES = ["global", "pre-aa"]


@pytest.fixture
def model():
    return tiny_vggt()


def test_the_package_has_a_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", pacevggt_patch.__version__)


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(keep_ratio=0), r"keep_ratio .*\(0, 1\].* got 0"),
        (dict(keep_ratio=1.5), r"keep_ratio .*\(0, 1\].* got 1\.5"),
        (dict(keep_ratio=float("nan")), "keep_ratio .* got nan"),
        (dict(keep_ratio="0.3"), "keep_ratio .* got '0.3'"),
        (dict(keep_ratio=True), "keep_ratio .* got True"),
        (dict(keep_ratio=10**400), "keep_ratio must be a number"),
        (dict(keep_ratio=None), "keep_ratio .* got None"),
        (dict(keep_ratio=0.3, merge_budget=0.8), r"merge_budget .*\[0, 0\.7\].* got 0\.8"),
        (dict(merge_budget=-0.1), "merge_budget .* got -0.1"),
        (dict(merge_budget="all"), "merge_budget .* got 'all'"),
        (dict(mode="dense"), "mode .* got 'dense'"),
        (dict(mode=True), "mode .* got True"),
        (dict(mode="global", merge_budget=0.2), 'merge_budget=0.2 .*mode="global"'),
        (dict(min_frames=0), "min_frames .* got 0"),
        (dict(min_frames=True), "min_frames .* got True"),
        (dict(min_frames=2.0), "min_frames .* got 2.0"),
        (dict(compile=1), "compile .* got 1"),
        (dict(compile="max-autotune"), "compile .* got 'max-autotune'"),
        (dict(head_dtype="bfloat16"), "head_dtype .* got 'bfloat16'"),
        (dict(head_dtype=torch.float32), "head_dtype .* got torch.float32"),
        (dict(output_device="disk"), "output_device .* got 'disk'"),
        (dict(output_device="cuda:99"), "output_device .* got 'cuda:99'"),
        (dict(output_device=3.5), "output_device .* got 3.5"),
    ],
)
def test_settings_out_of_range_are_named(model, settings, message):
    with pytest.raises(PaceError, match=message):
        accelerate(model, weights=None, **settings)
    assert not is_accelerated(model)
    with pytest.raises(PaceError, match=message):
        PaceConfig(**settings)


@pytest.mark.parametrize(
    "loose",
    [
        dict(merge_budget=0.2),
        dict(mode="pre-aa"),
        dict(min_frames=3),
        dict(compile=True),
        dict(head_dtype=torch.bfloat16),
        dict(output_device="cpu"),
        dict(mode="global", min_frames=1),
    ],
)
def test_loose_settings_beside_a_config_are_refused(model, loose):
    with pytest.raises(PaceError, match=f"{'.*'.join(loose)} beside a config"):
        accelerate(model, PaceConfig(0.4), weights=None, **loose)
    assert not is_accelerated(model)


def test_defaults_beside_a_config_say_nothing(model):
    accelerate(model, PaceConfig(0.4, min_frames=2), None, weights=None, mode=None, compile=False)
    config = summary(model).config
    assert (config.keep_ratio, config.min_frames, config.mode) == (0.4, 2, "global")


@pytest.mark.parametrize("old", ["dense_frames", "global_keys", "check_finite"])
def test_settings_of_before_are_gone(model, old):
    with pytest.raises(TypeError, match=old):
        accelerate(model, weights=None, **{old: True})


# ---- modes


def test_the_mode_is_told_by_name_by_merging_or_by_the_weights(model):
    def mode(*args, **kwargs):
        return summary(accelerate(model, *args, **kwargs)).config.mode

    assert mode(weights=None) == mode() == "global"
    assert mode(weights=None, mode="pre-aa") == mode(0.3, 0.2, weights=None) == mode(0.3, 0.0) == "pre-aa"
    for name in MODES:
        assert mode(weights=PaceWeights.new(model, mode=name)) == name
        assert mode(weights=PaceWeights.new(model, mode=name), mode=name) == name
        assert mode(PaceConfig(0.3), weights=PaceWeights.new(model, mode=name)) == name
    assert mode(0.3, 0.2, weights=PaceWeights.new(model, mode="pre-aa")) == "pre-aa"


@pytest.mark.parametrize(
    ("settings", "mode", "named"),
    [
        (dict(mode="global"), "pre-aa", 'mode="global"'),
        (dict(mode="pre-aa"), "global", 'mode="pre-aa"'),
        (dict(merge_budget=0.2), "global", "merge_budget=0.2"),
    ],
)
def test_weights_for_another_mode_are_refused(model, settings, mode, named):
    with pytest.raises(WeightsError, match=f"for {mode} pruning.*{named}"):
        accelerate(model, 0.3, weights=PaceWeights.new(model, mode=mode), **settings)
    assert not is_accelerated(model)


@pytest.mark.parametrize("weights", [3, 0.3, b"x", ["a"], object(), "no-such-file", True])
def test_weights_of_another_kind_are_refused(model, weights):
    with pytest.raises(WeightsError, match="weights must be"):
        accelerate(model, weights=weights)
    assert not is_accelerated(model)


def test_weights_of_another_checkpoint_are_refused(model):
    with pytest.raises(WeightsError, match="another checkpoint"):
        accelerate(model, weights=PaceWeights.new(tiny_vggt(seed=1)))


# ---- models


def test_models_that_do_not_fit_are_named(model):
    for wrong, message in (
        ("VGGT", "got str"),
        (None, "got NoneType"),
        (nn.Linear(2, 2), r"Linear has the parts of none .*pi3, vggt"),
        (model.aggregator, "Aggregator .* pass the VGGT that holds it"),
        (nn.DataParallel(model), "DataParallel wraps .*model.module"),
        (torch.compile(model, backend="eager"), "OptimizedModule wraps .*model._orig_mod"),
        (nn.ModuleDict({"net": model}), "ModuleDict wraps .*model.net"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            accelerate(wrong, weights=None)
    del model.aggregator.global_blocks
    with pytest.raises(UnsupportedModelError, match=r"VGGT\.aggregator lacks global_blocks"):
        accelerate(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.aggregator, "aa_order", ["global"]), r"aa_order is \['global'\]"),
        (lambda m: m.aggregator.frame_blocks.append(nn.Identity()), "5 frame and 4 global blocks"),
        (lambda m: m.depth_head.intermediate_layer_idx.append(7), r"depth_head reads layers \[7\]"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_hosts_with_unknown_insides_are_refused(model, change, message, mode):
    change(model)
    with pytest.raises(UnsupportedModelError, match=message):
        accelerate(model, weights=None, mode=mode)
    assert not is_accelerated(model)


@pytest.mark.parametrize("mode", MODES)
def test_an_embedding_with_fewer_tokens_than_patches_is_refused(model, mode):
    embedding = type(model.aggregator.patch_embed)

    def forward(self, images):
        return {"x_norm_patchtokens": embedding.forward(self, images)["x_norm_patchtokens"][:, 1:]}

    model.aggregator.patch_embed.__class__ = type("Fewer", (embedding,), {"forward": forward})
    with pytest.raises(UnsupportedModelError):
        accelerate(model, weights=None, mode=mode)(random_images())


@pytest.mark.parametrize("call", [summary, lambda m: paused(m).__enter__()])
def test_calls_that_need_an_accelerated_model_say_so(model, call):
    with pytest.raises(PaceError, match="not accelerated: call pacevggt_patch.accelerate"):
        call(model)


@pytest.mark.parametrize("call", [remove, is_accelerated, summary])
def test_calls_with_something_else_say_so(call):
    with pytest.raises(PaceError, match="torch.nn.Module.* got str"):
        call("model")


# ---- images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([1], "images .* got list"),
        (None, "images .* got NoneType"),
        (torch.rand(1, 2, 1, 28, 28), r"images .* got \[1, 2, 1, 28, 28\]"),
        (torch.rand(1, 0, 3, 28, 28), r"images .* got \[1, 0, 3, 28, 28\]"),
        (torch.rand(0, 2, 3, 28, 28), r"images .* got \[0, 2, 3, 28, 28\]"),
        (torch.rand(3, 28, 28), r"images .* got \[3, 28, 28\]"),
        (torch.rand(1, 2, 3, 30, 28), "image height and width .* multiples of 14, got 30x28"),
        (torch.zeros(1, 1, 3, 14, 14 * 1024), "images are 14x14336"),
        (torch.zeros(1, 2, 3, 28, 28, dtype=torch.uint8), "images .* torch.uint8"),
        (torch.rand(1, 2, 3, 28, 28).double(), r"images are torch\.float64 .* torch\.float32"),
        (torch.full((1, 2, 3, 28, 28), float("nan")), "images hold NaN"),
        (torch.full((1, 2, 3, 28, 28), float("inf")), "images hold NaN or infinity"),
        (random_images().to("meta"), r'images are on meta .* images\.to\("cpu"\)'),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_bad_images_are_refused_before_work_starts(model, images, message, mode):
    accelerate(model, weights=None, mode=mode)
    ran = []
    model.aggregator.patch_embed.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(PaceError, match=message):
        model.aggregator(images)
    assert not ran
    model.aggregator(random_images(2))  # and the next call is as ever
    assert ran


@pytest.mark.parametrize("mode", MODES)
def test_a_paused_model_takes_what_the_stock_model_takes(model, mode):
    images = torch.full((1, 2, 3, 28, 28), float("nan"))
    accelerate(model, weights=None, mode=mode)
    with paused(model), torch.inference_mode():
        assert model(images)["depth"].isnan().any()


@pytest.mark.parametrize("mode", MODES)
def test_images_by_keyword_are_looked_at_too(model, mode):
    accelerate(model, weights=None, mode=mode)
    with pytest.raises(PaceError, match="images"):
        model.aggregator(images=torch.rand(1, 2, 3, 30, 28))
    model.aggregator(images=random_images(2))


@pytest.mark.parametrize(("scale", "shift"), [(255, 0), (4, -2)])
def test_images_far_from_their_range_are_named(scale, shift):
    model = accelerate(tiny_vggt(), 0.3, weights=None)
    with pytest.warns(UserWarning, match=r"expects \[0, 1\]"), torch.inference_mode():
        model(random_images(3) * scale + shift)


def test_pre_aa_pruning_without_weights_is_named():
    with pytest.warns(UserWarning, match="training-free"):
        accelerate(tiny_vggt(), 0.3, mode="pre-aa")
