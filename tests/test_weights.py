import json
import os
import re
import warnings
from dataclasses import replace

import pytest
import torch
from hosts import random_images, tiny_vggt
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pacevggt_patch
from pacevggt_patch import PaceError, PaceWeights, UnsupportedModelError, WeightsError, accelerate
from pacevggt_patch.hosts.vggt import find_host
from pacevggt_patch.weights.pace import pace as weights_module
from pacevggt_patch.weights.pace import resolve

ACCEPTED = (
    'weights must be "auto", None, a path to a .safetensors file, a Hugging Face Hub id "user/repo[@revision]", '
    "or PaceWeights"
)
SPEC = "C=32, 4+4 blocks, 2 heads, patch 14, 5 special tokens, cached layers 0/1/2/3"


@pytest.fixture(scope="module")
def model():
    return tiny_vggt()


@pytest.fixture
def weights(model):
    """Weights that change the outputs."""
    weights = PaceWeights.new(model, keep_ratios=(0.3, 0.5), training={"steps": 12, "loss": [0.5, 0.25]})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in weights.modules().parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return weights


@pytest.fixture
def file(weights, tmp_path):
    path = tmp_path / "pace.safetensors"
    weights.save(path)
    return path


def tensors_of(weights):
    return weights.modules().state_dict()


def rewrite(path, *, metadata=(), drop=(), tensors=()):
    """Change a weight file: metadata and tensors are merged into what it holds."""
    with safe_open(path, "pt") as opened:
        old = opened.metadata()
    new = {**old, **{name: json.dumps(value) for name, value in dict(metadata).items()}}
    for name in drop:
        del new[name]
    save_file({**load_file(path), **dict(tensors)}, path, new)


def refused(path, message):
    with pytest.raises(WeightsError) as caught:
        PaceWeights.load(path)
    assert str(caught.value) == message


# --- new


def test_new_is_reproducible_and_leaves_the_random_state_alone(model):
    before = torch.get_rng_state()
    first = PaceWeights.new(model)
    torch.rand(3)
    second = PaceWeights.new(model)
    torch.set_rng_state(before)
    expected = torch.rand(5)
    torch.set_rng_state(before)
    PaceWeights.new(model)
    assert torch.equal(torch.rand(5), expected)
    for name, tensor in tensors_of(first).items():
        assert torch.equal(tensor, tensors_of(second)[name]), name


def test_new_weights_change_nothing(model):
    images = random_images()
    with torch.inference_mode():
        free = accelerate(model, weights=None)(images)
        untrained = accelerate(model, weights=PaceWeights.new(model))(images)
    pacevggt_patch.remove(model)
    torch.testing.assert_close(untrained["depth"], free["depth"])
    torch.testing.assert_close(untrained["pose_enc"], free["pose_enc"])


def test_new_is_float32_in_evaluation_mode_on_a_narrow_model():
    weights = PaceWeights.new(tiny_vggt().bfloat16())
    assert set(weights.fingerprints) == {"bfloat16"}
    assert not weights.scorer.training
    assert not weights.restoration.training
    assert {t.dtype for t in tensors_of(weights).values()} == {torch.float32}


def test_new_refuses_what_is_no_vggt():
    with pytest.raises(UnsupportedModelError, match="Linear has no submodule 'aggregator'"):
        PaceWeights.new(torch.nn.Linear(2, 2))


# --- save and load


def test_round_trip(weights, file):
    loaded = PaceWeights.load(file)
    assert (loaded.backbone, loaded.fingerprints) == (weights.backbone, weights.fingerprints)
    assert loaded.keep_ratios == (0.3, 0.5)
    assert loaded.training == {"steps": 12, "loss": [0.5, 0.25]}
    assert loaded.library_version == pacevggt_patch.__version__
    assert loaded.source == str(file)
    assert not loaded.scorer.training
    assert not loaded.restoration.training
    assert tensors_of(loaded).keys() == tensors_of(weights).keys()
    for name, tensor in tensors_of(loaded).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensors_of(weights)[name]), name
    assert all(p.requires_grad for p in loaded.scorer.parameters())


def test_loading_leaves_the_random_state_alone(file):
    before = torch.get_rng_state()
    PaceWeights.load(file)
    assert torch.equal(torch.get_rng_state(), before)


def test_loaded_weights_give_the_same_predictions(model, weights, file):
    images = random_images()
    with torch.inference_mode():
        free = accelerate(model, weights=None)(images)
        direct = accelerate(model, weights=weights)(images)
        loaded = accelerate(model, weights=str(file))(images)
    pacevggt_patch.remove(model)
    assert torch.equal(direct["depth"], loaded["depth"])
    assert not torch.allclose(direct["depth"], free["depth"])


def test_the_file_is_plain_safetensors_with_json_metadata(file):
    with safe_open(file, "pt") as opened:
        metadata = {name: json.loads(text) for name, text in opened.metadata().items()}
    assert metadata["kind"] == "pace weights"
    assert metadata["format"] == 5
    assert metadata["dense_frames"] is False and metadata["full_strength"] == 0.15
    assert metadata["distinctness"] == 0.15 and metadata["matching_heads"] == []
    assert metadata["hidden_dims"]["adaptation"] == 16
    assert metadata["adapted"]["global_blocks.3.attn.qkv.weight"] == [96, 32]
    assert metadata["backbone"]["embed_dim"] == 32
    assert metadata["backbone"]["cached_layers"] == [0, 1, 2, 3]
    assert set(metadata["fingerprints"]) == {"float32", "bfloat16", "float16"}


def test_other_widths_load(model, tmp_path):
    from pacevggt_patch.method.merging import MergeAdapter
    from pacevggt_patch.method.restoration import FeatureGuidedRestoration
    from pacevggt_patch.method.scoring import TokenScorer

    wide = replace(
        PaceWeights.new(model),
        scorer=TokenScorer(32, 40),
        merge=MergeAdapter(32, 12),
        restoration=FeatureGuidedRestoration(32, (0, 1, 2, 3), 24),
    )
    wide.save(tmp_path / "wide.safetensors")
    loaded = PaceWeights.load(tmp_path / "wide.safetensors")
    assert loaded.scorer.hidden.out_features == 40
    assert loaded.merge.mix.out_features == 12
    assert loaded.restoration.hidden[0].out_features == 24


def test_saving_over_a_loaded_file_keeps_both(weights, file):
    loaded = PaceWeights.load(file)
    kept = {name: tensor.clone() for name, tensor in tensors_of(loaded).items()}
    with torch.no_grad():
        weights.scorer.out.weight.add_(1)
    weights.save(file)
    file_now = PaceWeights.load(file)
    file.unlink()
    for name, tensor in tensors_of(loaded).items():
        assert torch.equal(tensor, kept[name])
    assert torch.equal(file_now.scorer.out.weight, weights.scorer.out.weight)


def test_a_failed_save_leaves_the_old_file_and_no_other(weights, file, monkeypatch):
    old = file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(WeightsError) as caught:
        weights.save(file)
    assert str(caught.value) == f"can't save pace weights to {file}: [Errno 28] No space left on device"
    assert isinstance(caught.value.__cause__, OSError)
    assert file.read_bytes() == old
    assert os.listdir(file.parent) == [file.name]


def test_eight_bits_are_a_quarter_of_the_size_and_close(weights, file, tmp_path):
    small = tmp_path / "small.safetensors"
    weights.save(small, eight_bits=True)
    with safe_open(file, "pt") as whole, safe_open(small, "pt") as rounded:
        assert rounded.metadata() == whole.metadata()
    assert sum(t.nbytes for t in load_file(small).values()) < 0.4 * sum(
        t.nbytes for t in load_file(file).values()
    )
    found, wanted = tensors_of(PaceWeights.load(small)), tensors_of(PaceWeights.load(file))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() <= tensor.abs().max() / 200, name
    with torch.no_grad():
        weights.scorer.hidden.weight[0, 0] = torch.nan
    with pytest.raises(WeightsError):
        weights.save(small, eight_bits=True)


def test_the_saved_file_has_the_usual_permissions(file):
    plain = file.with_name("plain")
    plain.write_bytes(b"")
    assert file.stat().st_mode == plain.stat().st_mode


def test_save_says_that_the_folder_is_missing(weights, tmp_path):
    path = tmp_path / "none" / "pace.safetensors"
    with pytest.raises(WeightsError) as caught:
        weights.save(path)
    assert str(caught.value) == (
        f"can't save pace weights to {path}: the folder {path.parent} does not exist, create it first"
    )


def test_save_refuses_training_notes_that_are_not_json(weights, tmp_path):
    weights.training["loss"] = torch.ones(1)
    with pytest.raises(WeightsError, match="its metadata is not JSON: Object of type Tensor"):
        weights.save(tmp_path / "pace.safetensors")
    assert os.listdir(tmp_path) == []


def test_save_refuses_nan(weights, tmp_path):
    with torch.no_grad():
        weights.scorer.out.bias.fill_(torch.nan)
    path = tmp_path / "pace.safetensors"
    with pytest.raises(WeightsError) as caught:
        weights.save(path)
    assert str(caught.value) == f"{path}: NaN or infinity in scorer.out.bias"


# --- files that are refused


def test_missing_file(tmp_path):
    refused(tmp_path / "none.safetensors", f"{tmp_path}/none.safetensors does not exist")


def test_folder(tmp_path):
    refused(tmp_path, f"{tmp_path} is a folder: pass the file with the pace weights in it")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04\x95" + b"\x00" * 100, b"\xff" * 4096])
def test_not_safetensors(tmp_path, content):
    path = tmp_path / "pace.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"^{path} is not a safetensors file, or is damaged: "):
        PaceWeights.load(path)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_truncated(file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match=f"^{file} is not a safetensors file, or is damaged: "):
        PaceWeights.load(file)


def test_without_metadata(file):
    save_file(load_file(file), file)
    refused(file, f"{file} does not hold pace weights: its metadata does not say so")


def test_metadata_that_is_not_json(file):
    save_file(load_file(file), file, {"kind": "pace weights", "format": "1"})
    refused(file, f"{file} does not hold pace weights: its metadata does not say so")


def test_other_kind(file):
    rewrite(file, metadata={"kind": "a VGGT-mini checkpoint"})
    refused(file, f"{file} does not hold pace weights: it says it holds a VGGT-mini checkpoint")


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_the_strength_of_older_files(file, tmp_path, version):
    """They were trained with block changes in full force up to 0.6; a newer one says itself."""
    rewrite(file, metadata={"format": version, "full_strength": 0.3})
    weights = PaceWeights.load(file)
    assert weights.adaptation.full_strength == (0.3 if version > 3 else 0.6)
    weights.save(tmp_path / "again.safetensors")
    assert PaceWeights.load(tmp_path / "again.safetensors").adaptation.full_strength == (
        weights.adaptation.full_strength
    )


@pytest.mark.parametrize("version", [4, 5])
def test_distinctness_and_matching_heads_of_older_files(file, tmp_path, version):
    """They were trained with other tokens, and for heads that all see few."""
    rewrite(file, metadata={"format": version, "distinctness": 0.25, "matching_heads": [[1, 0]]})
    weights = PaceWeights.load(file)
    assert (weights.scorer.distinctness_weight, weights.matching) == (
        (0.25, ((1, 0),)) if version == 5 else (0.0, ())
    )
    weights.save(tmp_path / "again.safetensors")
    again = PaceWeights.load(tmp_path / "again.safetensors")
    assert (again.scorer.distinctness_weight, again.matching) == (
        weights.scorer.distinctness_weight,
        weights.matching,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("distinctness", v) for v in (None, -0.1, 2, "much")]
    + [
        ("matching_heads", v)
        for v in (None, [1], [["a", 0]], [[1.0, 0]], [[True, 0]], [[-1, 0]], [[1, 0], [1, 0]])
    ],
)
def test_other_fields_out_of_range(file, name, value):
    rewrite(file, metadata={name: value})
    with pytest.raises(WeightsError, match="has damaged metadata"):
        PaceWeights.load(file)


@pytest.mark.parametrize("value", [None, 2, 0, "much"])
def test_a_strength_out_of_range(file, value):
    rewrite(file, metadata={"full_strength": value})
    with pytest.raises(WeightsError, match="has damaged metadata"):
        PaceWeights.load(file)


def test_a_file_of_lower_rank(file, tmp_path):
    weights = PaceWeights.load(file)
    for wrong in (0, 17, True, 2.5, "8"):
        with pytest.raises(WeightsError) as error:
            weights.save(tmp_path / "small.safetensors", rank=wrong)
        assert str(error.value) == f"rank must be a whole number from 1 to 16, got {wrong!r}"
    assert not (tmp_path / "small.safetensors").exists()
    weights.save(tmp_path / "small.safetensors", rank=3, eight_bits=True)
    small = PaceWeights.load(tmp_path / "small.safetensors")
    assert small.adaptation.rank == 3 and weights.adaptation.rank == 16
    assert (tmp_path / "small.safetensors").stat().st_size < file.stat().st_size / 3
    for name, up in weights.adaptation.nearest(3).up.items():
        wanted = up @ weights.adaptation.nearest(3).down[name]
        found = small.adaptation.up[name] @ small.adaptation.down[name]
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.02 * max(wanted.abs().max().item(), 1e-6))


def test_newer_format(file):
    rewrite(file, metadata={"format": 6})
    refused(
        file,
        f"{file} has format 6, this version of pacevggt-patch reads up to 5: "
        "upgrade with `pip install -U pacevggt-patch`",
    )


@pytest.mark.parametrize(
    "name",
    ["backbone", "hidden_dims", "adapted", "fingerprints", "keep_ratios", "training", "library_version"],
)
def test_missing_field(file, name):
    rewrite(file, drop=[name])
    refused(file, f"{file} has damaged metadata: KeyError: '{name}'")


@pytest.mark.parametrize(
    "metadata",
    [
        {"backbone": 3},
        {"backbone": {"embed_dim": 32, "cached_layers": [0]}},
        {"hidden_dims": {"scorer": "8", "merge": 16, "restoration": 16, "adaptation": 4}},
        {"hidden_dims": {"scorer": -8, "merge": 16, "restoration": 16, "adaptation": 4}},
        {"adapted": {"frame_blocks.0.attn.proj.weight": ["a", "b"]}},
        {"adapted": {"a.b": [4, 0]}},
        {"adapted": [1]},
        {"keep_ratios": ["most"]},
        {"fingerprints": [1]},
        {"training": 7},
    ],
)
def test_damaged_field(file, metadata):
    rewrite(file, metadata=metadata)
    with pytest.raises(WeightsError, match=f"^{file} has damaged metadata: "):
        PaceWeights.load(file)


def test_tensors_that_do_not_fit(file):
    tensors = load_file(file)
    tensors["scorer.out.weight"] = torch.zeros(1, 9)
    tensors["extra"] = tensors.pop("scorer.out.bias")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata)
    refused(
        file,
        f"{file} has the wrong tensors: scorer.out.bias is missing, extra is unknown, "
        "scorer.out.weight is [1, 9] instead of [1, 8]",
    )


def test_many_wrong_tensors_are_counted(file):
    rewrite(file, metadata={"hidden_dims": {"scorer": 9, "merge": 16, "restoration": 17, "adaptation": 16}})
    with pytest.raises(
        WeightsError, match=r"scorer.hidden.weight is \[8, 32\] instead of \[9, 32\].* and \d+ more$"
    ):
        PaceWeights.load(file)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_tensor(file, value):
    rewrite(file, tensors={"restoration.log_spread": torch.tensor(value)})
    refused(file, f"{file}: NaN or infinity in restoration.log_spread")


def test_huge_widths_in_damaged_metadata_allocate_nothing(file):
    rewrite(
        file,
        metadata={
            "hidden_dims": {"scorer": 2**40, "merge": 2**20, "restoration": 2**40, "adaptation": 2**40}
        },
    )
    with pytest.raises(WeightsError, match="has the wrong tensors"):
        PaceWeights.load(file)


# --- check


def test_fits_the_model_in_every_dtype(model, weights):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weights.check(find_host(tiny_vggt().to(dtype)))


def test_weights_from_a_narrow_model_fit_the_same_model_in_float32():
    weights = PaceWeights.new(tiny_vggt().bfloat16())
    weights.check(find_host(tiny_vggt()))
    weights.check(find_host(tiny_vggt().bfloat16().float()))


def test_weights_from_a_narrow_model_can_not_be_told_from_another_narrow_dtype():
    weights = PaceWeights.new(tiny_vggt().bfloat16())
    with pytest.raises(WeightsError) as caught:
        weights.check(find_host(tiny_vggt().half()))
    assert str(caught.value) == (
        "pace weights new were trained on a bfloat16 model, this model is float16, so whether they belong together "
        "can't be told: load the model in the first dtype"
    )


def test_another_checkpoint_is_refused(weights):
    host = find_host(tiny_vggt(seed=1))
    with pytest.raises(WeightsError, match="another checkpoint") as caught:
        weights.check(host)
    mine = weights.fingerprints["bfloat16"][:12]
    theirs = PaceWeights.new(tiny_vggt(seed=1)).fingerprints["bfloat16"][:12]
    assert str(caught.value) == (
        f"pace weights new were trained for another checkpoint (fingerprint {mine}) than this model's ({theirs}): "
        "train weights for this one, or pass weights=None"
    )


@pytest.mark.parametrize("field", ["embed_dim", "depth", "num_heads", "patch_size", "special_tokens"])
def test_other_dimensions_are_refused(model, weights, field):
    other = replace(weights, backbone=replace(weights.backbone, **{field: 48}), source="other.safetensors")
    with pytest.raises(WeightsError) as caught:
        other.check(find_host(model))
    assert str(caught.value) == (
        f"pace weights other.safetensors are for a VGGT with {other.backbone}; this model has {SPEC}"
    )


def test_layers_that_a_head_reads_must_be_known(model, weights):
    weights.backbone = replace(weights.backbone, cached_layers=(0, 1))
    with pytest.raises(WeightsError, match="cached layers 0/1; this model has"):
        weights.check(find_host(model))


def test_a_model_without_dense_heads_takes_any_layers(weights):
    model = tiny_vggt(all_layers=True)
    model.depth_head = model.point_head = None
    weights.backbone = replace(weights.backbone, cached_layers=(1, 3))
    weights.check(find_host(model))


def test_a_host_that_does_not_tell_its_heads_is_judged_by_the_rest(weights):
    model = tiny_vggt()
    del model.aggregator.global_blocks[0].attn.num_heads
    weights.check(find_host(model))


def test_accelerate_leaves_the_model_alone_when_weights_do_not_fit(weights):
    model = tiny_vggt(seed=1)
    with pytest.raises(WeightsError):
        accelerate(model, weights=weights)
    assert not pacevggt_patch.is_accelerated(model)


# --- to, str


def test_to_is_in_place_and_free_when_already_there(weights, monkeypatch):
    parameter = weights.scorer.out.weight
    monkeypatch.setattr(weights.scorer, "to", lambda *_: pytest.fail("moved"))
    assert weights.to("cpu") is weights
    assert weights.scorer.out.weight is parameter


def test_to_in_inference_mode_keeps_the_weights_trainable(weights):
    with torch.inference_mode():
        weights.to("meta")
    assert weights.scorer.out.weight.device.type == "meta"
    assert weights.restoration.log_spread.device.type == "meta"
    assert not weights.scorer.out.weight.is_inference()


def test_str_is_one_line(model, weights, file):
    count = sum(t.numel() for t in tensors_of(weights).values())
    version = pacevggt_patch.__version__
    assert str(PaceWeights.load(file)) == (
        f"{file} (trained for keep ratios 0.3 to 0.5; {count:,d} parameters; pacevggt-patch {version})"
    )
    assert str(PaceWeights.new(model)) == (
        f"new (no keep ratios recorded; {count:,d} parameters; pacevggt-patch {version})"
    )


# --- resolve


def test_none_is_training_free_without_a_word(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(None, find_host(model)) is None


def test_auto_without_bundled_weights_warns_once_at_the_call(monkeypatch):
    monkeypatch.setattr(weights_module, "bundled_files", lambda _: [])
    model = tiny_vggt()
    with pytest.warns(UserWarning, match="training-free") as caught:
        accelerate(model)
    assert [str(w.message) for w in caught] == [
        "no pace weights are bundled for this checkpoint, so it runs training-free: pass weights=PATH or "
        'weights="user/repo" to use trained ones, or weights=None to choose training-free without this warning'
    ]
    assert caught[0].filename == __file__


def test_auto_takes_the_bundled_weights_of_this_backbone(model, weights, tmp_path, monkeypatch):
    PaceWeights.new(tiny_vggt(seed=1)).save(tmp_path / "pace-a.safetensors")
    weights.save(tmp_path / "pace-b.safetensors")
    monkeypatch.setattr(weights_module, "bundled_files", lambda pattern: sorted(tmp_path.glob(pattern)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = resolve("auto", find_host(model))
        narrow = resolve("auto", find_host(tiny_vggt().half()))
    assert found is not None
    assert found.source == "bundled pace-b"
    assert torch.equal(found.scorer.out.weight, weights.scorer.out.weight)
    assert narrow is not None
    with pytest.warns(UserWarning, match="training-free"):
        assert resolve("auto", find_host(tiny_vggt(seed=2))) is None


def test_paths(model, weights, file, monkeypatch):
    host = find_host(model)
    assert resolve(weights, host) is weights
    for source in (file, str(file)):
        assert resolve(source, host).source == str(file)
    monkeypatch.chdir(file.parent)
    monkeypatch.setenv("HOME", str(file.parent))
    for source in ("pace.safetensors", "./pace.safetensors", "~/pace.safetensors"):
        assert resolve(source, host).source == source
    file.rename(file.with_name("other"))
    assert resolve("other", host).source == "other"


@pytest.mark.parametrize("source", ["./none", "~/none", "/none", "none.safetensors", "user/none.safetensors"])
def test_paths_that_do_not_exist_are_not_hub_ids(source, model):
    with pytest.raises(WeightsError, match=r"none(\.safetensors)? does not exist$"):
        resolve(source, find_host(model))


@pytest.mark.parametrize(
    "source", ["Auto", "none", "", "a/b/c", "user/repo@", "user /repo", 0.3, True, b"auto", ["x"]]
)
def test_anything_else_is_refused(source, model):
    with pytest.raises(WeightsError) as caught:
        resolve(source, find_host(model))
    assert str(caught.value) == f"{ACCEPTED}, got {source!r}"
    assert isinstance(caught.value, PaceError)


def test_weights_of_another_model_are_refused_from_a_path(file):
    with pytest.raises(
        WeightsError, match=f"^pace weights {re.escape(str(file))} were trained for another checkpoint"
    ):
        resolve(file, find_host(tiny_vggt(seed=3)))
