import inspect
import json
import pickle
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from hosts import random_images
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pacevggt_patch
from pacevggt_patch import PaceError, PaceWeights, WeightsError
from pacevggt_patch.mini import MiniConfig, build_mini, save_mini
from pacevggt_patch.mini import model as mini_module
from pacevggt_patch.weights import tensorfile
from pacevggt_patch.weights.bundled import bundled_files

SMALL = MiniConfig(
    image_size=56,
    embed_dim=32,
    num_heads=2,
    vit_depth=1,
    depth=4,
    cached_layers=(0, 1, 2, 3),
    camera_depth=1,
    camera_heads=2,
    dpt_features=16,
    dpt_channels=(8, 8, 16, 16),
    point_head=True,
)

# Of the bundled model when it was taken up, for the second of two images that are colour ramps.
POSE = [0.54597, 0.00536, 0.1655, 0.00717, 0.03895, -0.00452, 0.9962, 0.77064, 0.76772]
DEPTH = 0.86677
POINTS = 0.43355


@pytest.fixture(scope="module")
def mini():
    return build_mini()


def test_it_is_a_stock_vggt_with_the_stock_forward(mini):
    from vggt.models.vggt import VGGT

    assert type(mini) is VGGT
    assert "forward" not in vars(mini)
    assert not mini.training
    assert mini.mini_config == MiniConfig()
    assert sum(p.numel() for p in mini.parameters()) == 24_079_448
    assert {p.dtype for p in mini.parameters()} == {torch.float32}
    assert mini.point_head is not None
    assert mini.track_head is None


@torch.inference_mode()
def test_outputs_have_the_shapes_of_vggt(mini):
    out = mini(random_images(2, height=224, width=224)[0])
    assert {name: list(out[name].shape) for name in ("pose_enc", "depth", "depth_conf", "world_points")} == {
        "pose_enc": [1, 2, 9],
        "depth": [1, 2, 224, 224, 1],
        "depth_conf": [1, 2, 224, 224],
        "world_points": [1, 2, 224, 224, 3],
    }


@torch.inference_mode()
def test_the_bundled_checkpoint_gives_the_predictions_it_gave_when_it_was_made(mini):
    ramp = torch.linspace(0, 1, 224)
    frame = torch.stack([ramp.expand(224, 224), ramp.expand(224, 224).T, 0.5 * torch.ones(224, 224)])
    out = mini(torch.stack([frame, frame.flip(-1)]))
    torch.testing.assert_close(out["pose_enc"][0, 1], torch.tensor(POSE), atol=1e-3, rtol=0)
    torch.testing.assert_close(out["depth"].mean(), torch.tensor(DEPTH), atol=1e-3, rtol=0)
    torch.testing.assert_close(out["world_points"].abs().mean(), torch.tensor(POINTS), atol=1e-3, rtol=0)


def test_building_leaves_the_random_state_alone_and_is_reproducible():
    before = torch.get_rng_state()
    first = build_mini(weights=False, config=SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(2)
    second = build_mini(weights=False, config=SMALL)
    build_mini()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_building_on_the_cpu_whatever_the_default_device_is():
    with torch.device("meta"):
        model = build_mini(weights=False, config=SMALL)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@torch.inference_mode()
def test_round_trip_of_another_architecture(tmp_path):
    """Other sizes and a point head load by the same code."""
    model = build_mini(weights=False, config=SMALL)
    path = tmp_path / "mini.safetensors"
    save_mini(model, path, training={"seconds": 3})
    loaded = build_mini(path)
    assert loaded.mini_config == SMALL
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name
    out = loaded(random_images(2))
    assert out["world_points"].shape == (1, 2, 56, 70, 3)


def test_round_trip_in_8_bits(tmp_path):
    model = build_mini(weights=False, config=SMALL)
    path, wide = tmp_path / "mini.safetensors", tmp_path / "wide.safetensors"
    save_mini(model, path, eight_bits=True)
    save_mini(model, wide)
    assert path.stat().st_size < 0.6 * wide.stat().st_size
    loaded = build_mini(path).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        if tensor.ndim < 2 or len(tensor) == 1:
            assert torch.equal(loaded[name], tensor.half().float()), name
        else:  # half a step of the row, and the rounding of its scale
            largest = tensor.flatten(1).abs().amax(1).view(-1, *[1] * (tensor.ndim - 1))
            assert ((loaded[name] - tensor).abs() <= largest * (0.5 / 127 + 2**-11) + 1e-6).all(), name


def test_a_scale_without_its_tensor(tmp_path):
    path = tmp_path / "mini.safetensors"
    save_mini(build_mini(weights=False, config=SMALL), path, eight_bits=True)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors["camera_head.embed_pose.weight"]
    metadata[tensorfile.DIGEST] = json.dumps(tensorfile.digest(metadata, tensors))
    save_file(tensors, path, metadata)
    with pytest.raises(WeightsError) as caught:
        build_mini(path)
    assert (
        str(caught.value)
        == f"{path} is damaged: camera_head.embed_pose.weight.row_scale belongs to no tensor"
    )


def test_the_bundled_file_says_what_it_is():
    (path,) = bundled_files("vggt-mini.safetensors")
    with safe_open(path, "pt") as file:
        metadata = {name: json.loads(text) for name, text in file.metadata().items()}
        dtypes = {file.get_slice(name).get_dtype() for name in sorted(file.keys())}
    assert metadata["kind"] == "a VGGT-mini checkpoint"
    assert metadata["config"] == {
        k: list(v) if isinstance(v, tuple) else v for k, v in asdict(MiniConfig()).items()
    }
    assert metadata["training"] == {"steps": 40127, "frames": 288}
    assert dtypes == {"F16", "I8"}


@torch.inference_mode()
def test_it_can_be_accelerated_and_pickled(mini):
    images = random_images(2, height=224, width=224)
    stock = mini(images)
    pacevggt_patch.accelerate(mini, keep_ratio=1, merge_budget=0, weights=None)
    full = mini(images)
    pacevggt_patch.remove(mini)
    assert torch.equal(stock["depth"], full["depth"])
    copy = pickle.loads(pickle.dumps(mini))
    assert torch.equal(copy(images)["pose_enc"], stock["pose_enc"])


def test_pace_weights_of_the_bundled_checkpoint_fit_it_loaded_again(mini):
    from pacevggt_patch.hosts.base import find_host

    PaceWeights.new(mini).check(find_host(build_mini().bfloat16()))


def test_older_aggregators_without_cached_layers(monkeypatch):
    from vggt.models import aggregator

    current = aggregator.Aggregator

    class Older(current):
        def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, patch_embed, init_values):
            super().__init__(
                img_size,
                patch_size,
                embed_dim,
                depth,
                num_heads,
                patch_embed=patch_embed,
                init_values=init_values,
            )

    assert "cached_layer_indices" in inspect.signature(current).parameters
    monkeypatch.setattr(aggregator, "Aggregator", Older)
    assert isinstance(build_mini(weights=False, config=SMALL).aggregator, Older)


def test_a_checkpoint_brings_its_own_architecture():
    with pytest.raises(
        PaceError, match="^a checkpoint brings its own architecture: pass config only with weights=Fal"
    ):
        build_mini(config=SMALL)


def test_save_refuses_a_model_of_another_make(tmp_path):
    with pytest.raises(
        PaceError, match="^Linear has no mini_config: save_mini takes a model made by build_mini$"
    ):
        save_mini(torch.nn.Linear(2, 2), tmp_path / "mini.safetensors")


def test_save_refuses_what_float16_can_not_hold(tmp_path):
    model = build_mini(weights=False, config=SMALL)
    with torch.no_grad():
        model.aggregator.camera_token[0, 0, 0, 0] = 1e6
    path = tmp_path / "mini.safetensors"
    with pytest.raises(WeightsError) as caught:
        save_mini(model, path)
    assert str(caught.value) == f"{path}: NaN or infinity in aggregator.camera_token"


def test_pace_weights_are_no_checkpoint(mini, tmp_path):
    path = tmp_path / "pace.safetensors"
    PaceWeights.new(mini).save(path)
    with pytest.raises(WeightsError) as caught:
        build_mini(path)
    assert str(caught.value) == f"{path} does not hold a VGGT-mini checkpoint: it says it holds pace weights"


@pytest.mark.parametrize("config", [None, {"colour": 3}, [1]])
def test_damaged_architecture(tmp_path, config):
    path = tmp_path / "mini.safetensors"
    save_mini(build_mini(weights=False, config=SMALL), path)
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), "config": json.dumps(config)}
    save_file(load_file(path), path, metadata)
    with pytest.raises(WeightsError, match=f"^{path} has damaged metadata: "):
        build_mini(path)


def test_bundled_checkpoint_missing(monkeypatch):
    monkeypatch.setattr(mini_module, "bundled_files", lambda _: [])
    with pytest.raises(WeightsError) as caught:
        build_mini()
    assert str(caught.value) == "this installation lacks vggt-mini.safetensors: reinstall pacevggt-patch"


def test_without_vggt_the_package_imports_and_mini_says_how_to_get_it():
    """In a process of its own, in which `vggt` can't be imported."""
    code = (
        "import sys; sys.modules['vggt'] = None\n"
        "import pacevggt_patch\n"
        "from pacevggt_patch.mini import build_mini\n"
        "assert not {'matplotlib', 'PIL', 'scipy'} & set(sys.modules)\n"
        "try:\n    build_mini()\n"
        "except pacevggt_patch.PaceError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "VGGT-mini is built from the stock vggt package, which is not installed: put a git checkout of "
        "facebookresearch/vggt on PYTHONPATH, or on Python 3.10 or 3.11 run `pip install --no-deps "
        "feature-3dgs==1.15.1` and `pip install einops pillow` ("
    )
