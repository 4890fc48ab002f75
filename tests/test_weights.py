"""Pace weights: made, saved and loaded, matched with a model, and chosen by `accelerate`."""

import errno
import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hosts import random_images, run, tiny_vggt
from safetensors import safe_open
from safetensors.torch import load_file

import pacevggt_patch
from pacevggt_patch import (
    PaceConfig,
    PaceError,
    PaceWeights,
    UnsupportedModelError,
    WeightsError,
    accelerate,
    is_accelerated,
    remove,
    summary,
)
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.runtime.files import whole_file
from pacevggt_patch.weights import cache as kept
from pacevggt_patch.weights import pace
from pacevggt_patch.weights.resolve import resolve

MODES = ["global", "pre-aa"]
MODULES = {
    "global": {"scorer", "block_deltas"},
    "pre-aa": {"scorer", "merge", "restoration", "block_deltas"},
}


def trained(model, mode, **fields):
    """Weights that change the outputs."""
    weights = PaceWeights.new(
        model, mode=mode, keep_ratios=(0.3, 0.5), training={"steps": 12, "loss": [0.5, 0.25]}
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in weights.modules().parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    if mode == "global":
        weights.full_heads = ((1, 0), (2, 1))
    return replace(weights, **fields)


@pytest.fixture(scope="module")
def model():
    return tiny_vggt()


@pytest.fixture
def host(model):
    return find_host(model)


@pytest.fixture(params=MODES)
def weights(model, request):
    return trained(model, request.param)


@pytest.fixture
def file(weights, tmp_path):
    path = tmp_path / "pace.safetensors"
    weights.save(path)
    return path


def tensors_of(weights):
    return weights.modules().state_dict()


def same(first, second):
    """Whether two objects hold the same, to the bit; where they came from is left aside."""
    for name in (
        "backbone",
        "fingerprints",
        "mode",
        "full_heads",
        "keep_ratios",
        "training",
        "library_version",
    ):
        if getattr(first, name) != getattr(second, name):
            return False
    one, other = tensors_of(first), tensors_of(second)
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# ---- new


@pytest.mark.parametrize("mode", MODES)
def test_new_is_reproducible_and_leaves_the_random_state_alone(model, mode):
    before = torch.get_rng_state()
    first = PaceWeights.new(model, mode=mode)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert same(first, PaceWeights.new(model, mode=mode))
    assert set(first.modules()) == MODULES[mode] and first.mode == mode and first.full_heads == ()


@pytest.mark.parametrize("mode", MODES)
def test_new_weights_change_nothing(mode):
    model, images = tiny_vggt(), random_images()
    free = run(accelerate(model, weights=None, mode=mode, min_frames=1), images)
    untrained = run(accelerate(model, weights=PaceWeights.new(model, mode=mode), min_frames=1), images)
    assert summary(model).config.mode == mode
    torch.testing.assert_close(untrained["depth"], free["depth"])
    torch.testing.assert_close(untrained["pose_enc"], free["pose_enc"])


@pytest.mark.parametrize("mode", MODES)
def test_new_is_float32_in_evaluation_mode_on_a_narrow_model(mode):
    weights = PaceWeights.new(tiny_vggt().bfloat16(), mode=mode)
    assert set(weights.fingerprints) == {"bfloat16"}
    assert not any(module.training for module in weights.modules().values())
    assert {tensor.dtype for tensor in tensors_of(weights).values()} == {torch.float32}


def test_new_made_in_inference_mode_can_be_trained(model):
    with torch.inference_mode():
        weights = PaceWeights.new(model)
    assert not any(p.is_inference() for p in weights.modules().parameters())


def test_new_refuses_what_it_can_not_be_for(model):
    with pytest.raises(UnsupportedModelError, match="Linear"):
        PaceWeights.new(torch.nn.Linear(2, 2))
    with pytest.raises(PaceError, match="'dense'"):
        PaceWeights.new(model, mode="dense")
    with pytest.raises(UnsupportedModelError, match="meta device"):
        PaceWeights.new(tiny_vggt().to("meta"))


# ---- save and load


def test_round_trip(weights, file):
    loaded = PaceWeights.load(file)
    assert same(loaded, weights) and loaded.source == str(file)
    assert not any(module.training for module in loaded.modules().values())
    assert {tensor.dtype for tensor in tensors_of(loaded).values()} == {torch.float32}
    assert all(p.requires_grad for p in loaded.modules().parameters())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("without", [("scorer",), ("block_deltas",), ("scorer", "block_deltas")])
def test_any_module_may_be_missing(model, mode, without, tmp_path):
    weights = trained(model, mode, **dict.fromkeys(without))
    weights.save(tmp_path / "some.safetensors")
    loaded = PaceWeights.load(tmp_path / "some.safetensors")
    assert same(loaded, weights) and set(loaded.modules()) == MODULES[mode] - set(without)
    run(accelerate(tiny_vggt(), weights=loaded, min_frames=1), random_images())


def test_a_file_of_heads_only(host, tmp_path):
    weights = PaceWeights.of_heads(host, ((0, 1), (2, 0)), {"clips": "three"})
    weights.save(tmp_path / "heads.safetensors")
    loaded = PaceWeights.load(tmp_path / "heads.safetensors")
    assert same(loaded, weights) and loaded.full_heads == ((0, 1), (2, 0)) and not loaded.modules()
    assert (tmp_path / "heads.safetensors").stat().st_size < 4096
    model = accelerate(tiny_vggt(), weights=loaded, min_frames=1)
    plain = accelerate(tiny_vggt(), weights=None, min_frames=1)
    images = random_images()
    assert not torch.allclose(run(model, images)["depth"], run(plain, images)["depth"], rtol=1e-5)
    assert "2 full-attention heads" in summary(model).weights and "calibrated" in summary(model).weights


def test_loading_leaves_the_random_state_alone(file):
    before = torch.get_rng_state()
    PaceWeights.load(file)
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_in_inference_mode_gives_weights_that_can_be_trained(file):
    with torch.inference_mode():
        loaded = PaceWeights.load(file)
    assert not any(p.is_inference() for p in loaded.modules().parameters())


def test_loaded_weights_give_the_same_predictions(weights, file):
    model, images = tiny_vggt(), random_images()
    free = run(accelerate(model, weights=None, mode=weights.mode, min_frames=1), images)
    direct = run(accelerate(model, weights=weights, min_frames=1), images)
    loaded = run(accelerate(model, weights=str(file), min_frames=1), images)
    assert torch.equal(direct["depth"], loaded["depth"])
    assert not torch.allclose(direct["depth"], free["depth"])


def test_the_file_is_plain_safetensors_with_json_metadata(weights, file):
    with safe_open(file, "pt") as opened:
        metadata = {name: json.loads(text) for name, text in opened.metadata().items()}
    assert (metadata["kind"], metadata["format"], metadata["mode"]) == ("pace weights", 6, weights.mode)
    assert metadata["full_heads"] == [list(head) for head in weights.full_heads]
    assert set(metadata["modules"]) == MODULES[weights.mode]
    assert metadata["modules"]["block_deltas"]["shapes"]["global_blocks.3.attn.qkv.weight"] == [96, 32]
    assert metadata["modules"]["block_deltas"]["rank"] == 16
    assert metadata["backbone"]["family"] == "vggt" and metadata["backbone"]["embed_dim"] == 32
    assert set(metadata["fingerprints"]) == {"float32", "bfloat16", "float16"}
    assert len(metadata["digest"]) == 64


def test_other_widths_load(model, tmp_path):
    from pacevggt_patch.method.block_deltas import BlockDeltas
    from pacevggt_patch.method.merging import MergeAdapter
    from pacevggt_patch.method.restoration import FeatureGuidedRestoration
    from pacevggt_patch.method.scoring import TokenScorer

    plain = PaceWeights.new(model, mode="pre-aa")
    wide = replace(
        plain,
        scorer=TokenScorer(32, 40, 0.25),
        merge=MergeAdapter(32, 12),
        restoration=FeatureGuidedRestoration(32, (0, 1, 2, 3), 24),
        block_deltas=BlockDeltas(plain.block_deltas.shapes(), 5, 0.4),
    )
    wide.save(tmp_path / "wide.safetensors")
    loaded = PaceWeights.load(tmp_path / "wide.safetensors")
    assert same(loaded, wide)
    assert (loaded.scorer.hidden.out_features, loaded.scorer.distinctness_weight) == (40, 0.25)
    assert loaded.restoration.hidden[0].out_features == 24
    assert (loaded.block_deltas.rank, loaded.block_deltas.full_strength) == (5, 0.4)


def test_saving_over_a_loaded_file_keeps_both(weights, file):
    loaded = PaceWeights.load(file)
    kept = {name: tensor.clone() for name, tensor in tensors_of(loaded).items()}
    with torch.no_grad():
        weights.scorer.out.weight.add_(1)
    weights.save(file)
    file_now = PaceWeights.load(file)
    file.unlink()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in tensors_of(loaded).items())
    assert same(file_now, weights)


def test_a_failed_save_leaves_the_old_file_and_no_other(weights, file, monkeypatch):
    old = file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(WeightsError, match="No space left") as caught:
        weights.save(file)
    assert str(file) in str(caught.value) and isinstance(caught.value.__cause__, OSError)
    assert file.read_bytes() == old and os.listdir(file.parent) == [file.name]


def test_a_full_disk_is_named_and_leaves_the_old_file_and_no_other(weights, file, monkeypatch):
    old = file.read_bytes()

    def half(path, content):
        with open(path, "wb") as opened:
            opened.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(WeightsError, match="No space left") as caught:
        weights.save(file)
    assert str(file) in str(caught.value)
    assert file.read_bytes() == old and os.listdir(file.parent) == [file.name]


def test_saving_through_links(weights, tmp_path):
    """Links stay; what they lead to is written, in its own folder, whether it is there or not."""
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "target.safetensors", tmp_path / "link.safetensors"
    (tmp_path / "folder" / "middle").symlink_to("target.safetensors")
    link.symlink_to(os.path.join("folder", "middle"))
    for _ in range(2):
        weights.save(link)
        assert link.is_symlink() and not target.is_symlink()
        assert same(PaceWeights.load(target), weights)
    assert sorted(os.listdir(tmp_path)) == ["folder", "link.safetensors"]
    assert sorted(os.listdir(tmp_path / "folder")) == ["middle", "target.safetensors"]


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "circle", "link to a device"])
def test_what_is_no_plain_file_is_not_replaced(weights, tmp_path, kind):
    path = tmp_path / "pace.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "circle":
        path.symlink_to(path)
    elif kind == "link to a device":
        path.symlink_to(os.devnull)
    else:
        path = Path(os.devnull)
    before = path.lstat()
    with pytest.raises(WeightsError, match=str(path)):
        weights.save(path)
    with pytest.raises(PaceError, match=str(path)), whole_file(path):
        pytest.fail("nothing may be written")
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert os.listdir(tmp_path) == ([] if kind == "device" else [path.name])


def test_permissions(weights, file):
    """Those of a file that is there stay, and a new one has those that the process gives."""
    file.chmod(0o640)
    weights.save(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    file.unlink()
    before = os.umask(0o077)
    try:
        weights.save(file)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_folders_that_are_none(weights, tmp_path):
    (tmp_path / "file").write_text("")
    for path, what in (
        (tmp_path / "none" / "a.safetensors", "does not exist"),
        (tmp_path / "file" / "a.safetensors", "is not a folder"),
        ("~nosuchuser/a.safetensors", "does not exist"),
        (tmp_path / "a\0.safetensors", "null"),
    ):
        with pytest.raises(WeightsError, match=what) as caught:
            weights.save(path)
        assert str(path) in str(caught.value)


def test_eight_bits_are_a_quarter_of_the_size_and_close(weights, file, tmp_path):
    small = tmp_path / "small.safetensors"
    weights.save(small, eight_bits=True)
    size = {path: sum(t.nbytes for t in load_file(path).values()) for path in (file, small)}
    assert size[small] < 0.4 * size[file]
    loaded, wanted = PaceWeights.load(small), tensors_of(weights)
    found = tensors_of(loaded)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() <= tensor.abs().max() / 200, name
    assert (loaded.full_heads, loaded.mode, loaded.training) == (
        weights.full_heads,
        weights.mode,
        weights.training,
    )


def test_a_file_of_lower_rank(weights, file, tmp_path):
    small = tmp_path / "small.safetensors"
    for wrong in (0, 17, True, 2.5, "8"):
        with pytest.raises(WeightsError, match="from 1 to 16"):
            weights.save(small, rank=wrong)
    assert not small.exists()
    weights.save(small, rank=3, eight_bits=True)
    loaded, nearest = PaceWeights.load(small), weights.block_deltas.nearest(3)
    assert loaded.block_deltas.rank == 3 and weights.block_deltas.rank == 16
    assert small.stat().st_size < file.stat().st_size / 3
    for name, up in nearest.up.items():
        wanted = up @ nearest.down[name]
        found = loaded.block_deltas.up[name] @ loaded.block_deltas.down[name]
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.02 * max(wanted.abs().max().item(), 1e-6))
    without = replace(weights, block_deltas=None)
    with pytest.raises(WeightsError, match="rank"):
        without.save(small, rank=3)


def test_the_saved_file_has_the_usual_permissions(file):
    plain = file.with_name("plain")
    plain.write_bytes(b"")
    assert file.stat().st_mode == plain.stat().st_mode


def test_what_can_not_be_saved(model, tmp_path):
    path = tmp_path / "pace.safetensors"
    with pytest.raises(WeightsError, match="none does not exist"):
        trained(model, "global").save(tmp_path / "none" / "pace.safetensors")
    with pytest.raises(WeightsError, match="not JSON"):
        trained(model, "global", training={"loss": torch.ones(1)}).save(path)
    with pytest.raises(WeightsError, match="keep_ratios"):
        trained(model, "global", keep_ratios=(5.0,)).save(path)
    for eight_bits in (False, True):
        broken = trained(model, "global")
        with torch.no_grad():
            broken.scorer.hidden.weight[0, 0] = torch.nan
        with pytest.raises(WeightsError, match=r"scorer\.hidden\.weight"):
            broken.save(path, eight_bits=eight_bits)
    assert os.listdir(tmp_path) == []


# ---- check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_fit_the_model_in_every_dtype(weights, dtype):
    weights.check(find_host(tiny_vggt().to(dtype)))


def test_weights_of_a_narrow_model_fit_the_same_model_in_float32():
    weights = PaceWeights.new(tiny_vggt().bfloat16())
    weights.check(find_host(tiny_vggt()))
    weights.check(find_host(tiny_vggt().bfloat16().float()))


def test_weights_of_a_narrow_model_can_not_be_told_from_another_narrow_dtype():
    weights = PaceWeights.new(tiny_vggt().bfloat16())
    with pytest.raises(WeightsError, match="bfloat16 model, this model is float16"):
        weights.check(find_host(tiny_vggt().half()))


def test_another_checkpoint_is_refused_by_both_fingerprints(weights):
    other = PaceWeights.new(tiny_vggt(seed=1))
    with pytest.raises(WeightsError, match="another checkpoint") as caught:
        weights.check(find_host(tiny_vggt(seed=1)))
    dtype = "bfloat16"
    for print_ in (weights.fingerprints[dtype], other.fingerprints[dtype]):
        assert print_[:12] in str(caught.value)


@pytest.mark.parametrize(
    "changed", ["family", "embed_dim", "depth", "num_heads", "patch_size", "special_tokens"]
)
def test_other_dimensions_and_families_are_refused_by_name(host, weights, changed):
    value = "pi3" if changed == "family" else 48
    other = replace(
        weights, backbone=replace(weights.backbone, **{changed: value}), source="other.safetensors"
    )
    with pytest.raises(WeightsError, match=r"other\.safetensors") as caught:
        other.check(host)
    assert str(other.backbone) in str(caught.value) and str(host.spec()) in str(caught.value)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(("head", "named"), [((4, 0), "block 4"), ((0, 2), "head 2")])
def test_heads_that_the_model_does_not_have_are_refused(host, head, named):
    with pytest.raises(WeightsError, match=named):
        PaceWeights.of_heads(host, (head,), {}).check(host)


def test_deltas_of_other_parameters_are_refused(host, model):
    from pacevggt_patch.method.block_deltas import BlockDeltas

    deltas = BlockDeltas({"global_blocks.9.attn.qkv.weight": (96, 32)})
    with pytest.raises(WeightsError, match=r"global_blocks\.9\.attn\.qkv\.weight"):
        trained(model, "global", block_deltas=deltas).check(host)


def test_layers_that_a_head_reads_must_be_known(host, weights):
    weights.backbone = replace(weights.backbone, cached_layers=(0, 1))
    with pytest.raises(WeightsError, match="cached layers 0/1"):
        weights.check(host)


def test_a_model_without_dense_heads_takes_any_layers(weights):
    model = tiny_vggt(all_layers=True)
    model.depth_head = model.point_head = None
    weights.backbone = replace(weights.backbone, cached_layers=(1, 3))
    weights.check(find_host(model))


def test_a_host_that_does_not_tell_its_heads_is_judged_by_the_rest(weights):
    model = tiny_vggt()
    del model.aggregator.global_blocks[0].attn.num_heads
    weights.check(find_host(model))


# ---- the user's object


@pytest.mark.parametrize("inference", [False, True])
def test_accelerate_leaves_the_users_object_alone(weights, inference):
    parts = dict(weights.modules().items())
    values = {name: value.clone() for name, value in tensors_of(weights).items()}
    for module in parts.values():
        module.train()
    model = tiny_vggt().double()
    with torch.inference_mode(inference):
        accelerate(model, weights=weights, min_frames=1)
        model(random_images().double())
        accelerate(model, 0.5, weights=weights)
    assert weights.modules().keys() == parts.keys()
    for name, module in parts.items():
        assert getattr(weights, name) is module
        assert all(part.training for part in module.modules())
        assert all(p.requires_grad and not p.is_inference() for p in module.parameters())
    assert all(torch.equal(value, values[name]) for name, value in tensors_of(weights).items())
    shown = summary(model).weights
    with torch.no_grad():
        for parameter in weights.modules().parameters():
            parameter.zero_()
    weights.full_heads, weights.source = ((3, 1),), "changed"
    assert summary(model).weights == shown
    remove(model)


def test_to_is_in_place_and_free_when_already_there(weights):
    parameter = weights.scorer.out.weight
    assert weights.to("cpu") is weights and weights.scorer.out.weight is parameter


def test_to_in_inference_mode_keeps_the_weights_trainable(weights):
    with torch.inference_mode():
        weights.to("meta")
    for parameter in weights.modules().parameters():
        assert parameter.device.type == "meta" and not parameter.is_inference()


def test_str_is_one_line_that_says_what_they_are(model, weights, file):
    count = sum(tensor.numel() for tensor in tensors_of(weights).values())
    text = str(PaceWeights.load(file))
    assert text.startswith(f"{file} (") and "\n" not in text
    for said in (f"{weights.mode} pruning", "trained for keep ratios 0.3 to 0.5", f"{count:,d} parameters"):
        assert said in text
    assert ("2 full-attention heads" in text) == (weights.mode == "global")
    assert pacevggt_patch.__version__ in text
    one = PaceWeights.of_heads(find_host(model), ((1, 0),), {})
    assert "1 full-attention head;" in str(one) and "parameters" not in str(one)


# ---- what accelerate takes


def chosen(weights, host, **settings):
    return resolve(weights, PaceConfig(**settings), host)


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ({}, "global"),
        ({"mode": "pre-aa"}, "pre-aa"),
        ({"merge_budget": 0.2}, "pre-aa"),
        ({"mode": "global"}, "global"),
    ],
)
def test_without_weights_the_settings_choose_the_mode(host, settings, mode):
    assert chosen(None, host, **settings) == (None, mode)
    assert chosen("auto", host, **settings) == (None, mode)


def test_weights_choose_the_mode_and_refuse_another(host, weights):
    other = MODES[1 - MODES.index(weights.mode)]
    assert chosen(weights, host) == (weights, weights.mode)
    assert chosen(weights, host, mode=weights.mode) == (weights, weights.mode)
    with pytest.raises(WeightsError, match=f"{weights.mode} pruning.*{other}"):
        chosen(weights, host, mode=other)
    if weights.mode == "global":
        with pytest.raises(WeightsError, match=r"merge_budget=0\.2"):
            chosen(weights, host, merge_budget=0.2)


def test_auto_takes_the_bundled_weights_of_this_checkpoint_and_mode(host, tmp_path, monkeypatch):
    model = tiny_vggt()
    files = {mode: trained(model, mode) for mode in MODES}
    PaceWeights.new(tiny_vggt(seed=1)).save(tmp_path / "pace-a.safetensors")
    for mode, weights in files.items():
        weights.save(tmp_path / f"pace-tiny-{mode}.safetensors")
    monkeypatch.setattr(pace, "bundled_files", lambda pattern: sorted(tmp_path.glob(pattern)))
    for mode in MODES:
        found, found_mode = chosen("auto", host, mode=mode)
        assert same(found, files[mode]) and found_mode == mode
        assert found.source == f"bundled pace-tiny-{mode}"
    assert chosen("auto", host)[1] == "global"
    assert chosen("auto", host, merge_budget=0.1)[0].mode == "pre-aa"
    assert chosen("auto", find_host(tiny_vggt().half()))[0] is not None
    assert chosen("auto", find_host(tiny_vggt(seed=2)))[0] is None


def test_the_weights_of_vggt_mini_are_bundled_for_both_modes():
    from pacevggt_patch.mini import build_mini

    host = find_host(build_mini())
    for mode in MODES:
        found, _ = chosen("auto", host, mode=mode)
        assert found.mode == mode and set(found.modules()) == MODULES[mode]
        assert bool(found.full_heads) == (mode == "global")


def test_auto_takes_a_calibration_that_is_kept_on_this_machine(host, cache):
    weights = PaceWeights.of_heads(host, ((1, 1),), {}, "first")
    path = kept.store(weights)
    assert path.parent == cache
    PaceWeights.of_heads(find_host(tiny_vggt(seed=1)), ((0, 0),), {}).save(cache / "heads-a.safetensors")
    found, mode = chosen("auto", host)
    assert same(found, weights) and mode == "global" and str(path) in found.source
    assert chosen("auto", host, mode="pre-aa")[0] is None
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert chosen("auto", host)[0] is None  # a damaged one is none


def test_a_cache_in_a_home_that_does_not_exist_keeps_nothing(host, monkeypatch):
    monkeypatch.setenv("PACEVGGT_CACHE", "~nosuchuser/kept")
    assert kept.folder() is None and kept.entries() == []
    assert kept.store(PaceWeights.of_heads(host, ((1, 1),), {})) is None


def test_paths(host, weights, file, monkeypatch):
    for source in (file, str(file)):
        assert chosen(source, host)[0].source == str(file)
    monkeypatch.chdir(file.parent)
    monkeypatch.setenv("HOME", str(file.parent))
    for source in ("pace.safetensors", "./pace.safetensors", "~/pace.safetensors"):
        assert chosen(source, host)[0].source == source
    file.rename(file.with_name("other"))
    assert chosen("other", host)[0].source == "other"


@pytest.mark.parametrize("source", ["./none", "~/none", "/none", "none.safetensors", "user/none.safetensors"])
def test_paths_that_do_not_exist_are_not_hub_ids(source, host):
    with pytest.raises(WeightsError, match=r"none(\.safetensors)? does not exist$"):
        chosen(source, host)


@pytest.mark.parametrize(
    "source", ["Auto", "none", "", "a/b/c", "user/repo@", "user /repo", 0.3, True, b"auto", ["x"]]
)
def test_anything_else_is_refused(source, host):
    with pytest.raises(WeightsError) as caught:
        chosen(source, host)
    assert repr(source) in str(caught.value) and '"auto"' in str(caught.value)
    assert isinstance(caught.value, PaceError)


def test_accelerate_leaves_the_model_alone_when_weights_do_not_fit(weights, file):
    model = tiny_vggt(seed=1)
    for source in (weights, file):
        with pytest.raises(WeightsError):
            accelerate(model, weights=source)
        assert not is_accelerated(model)
