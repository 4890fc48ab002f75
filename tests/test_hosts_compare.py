"""`compare` on models of other families: loaded by the name of the family, their outputs read as cameras and depth."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import depth_anything_double
import hosts_doubles
import pytest
import real_depth_anything
import torch
from conformance import Subject
from hosts import write_images
from hosts_doubles import DOUBLES
from real_hosts import REAL, load
from safetensors.torch import save_file
from torch import nn

from pacevggt_patch import PaceError
from pacevggt_patch.cli.main import make_parser
from pacevggt_patch.clips import Clip
from pacevggt_patch.compare import compare, page, plan
from pacevggt_patch.compare.runs import prediction_of, to_device
from pacevggt_patch.evaluation.geometry import decode_pose_encoding, encode_cameras
from pacevggt_patch.hosts.base import PACKAGES, find_host
from pacevggt_patch.hosts.pi3 import fitted_intrinsics
from pacevggt_patch.training.backbones import load_backbone
from pacevggt_patch.training.run import Options, check_options

EVERY_DOUBLE = [*DOUBLES, *depth_anything_double.DOUBLES]
EVERY = [*EVERY_DOUBLE, *REAL, *real_depth_anything.REAL]


def whole(model, part):
    """What a package's class makes: the model, or what holds it under that name."""
    return nn.ModuleDict({part: model}) if part else model


@pytest.fixture
def package(monkeypatch):
    """Puts a double in the place of a family's package."""

    def put(name: str, subject: Subject, from_pretrained: bool = False):
        module = ModuleType("a_package_of_models")
        module.Model = lambda _=None: whole(subject.build(5), PACKAGES[name].part)
        if from_pretrained:
            module.Model.from_pretrained = module.Model
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(PACKAGES, name, PACKAGES[name]._replace(module=module.__name__, kind="Model"))

    return put


@pytest.mark.parametrize(
    "subject", [one for one in EVERY_DOUBLE if not one.variant], ids=lambda subject: subject.name
)
def test_a_family_is_compared_by_its_name_and_checkpoint(subject, package, tmp_path, monkeypatch):
    pytest.importorskip("plotly")
    monkeypatch.setattr(plan, "WIDTH", 127)  # in place of 518, which takes longer
    # Drawn alike for all models, and tested with VGGT-mini.
    monkeypatch.setattr(page, "curve_part", lambda found: "")
    monkeypatch.setattr(page.Page, "cloud_part", lambda *_: "")
    model = subject.model(1)
    package(subject.family, subject)
    save_file(whole(model, PACKAGES[subject.family].part).state_dict(), tmp_path / "model.safetensors")
    name = f"{subject.family}:{tmp_path / 'model.safetensors'}"
    loaded = load_backbone(name)
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    clip = write_images(tmp_path / "frames", 3, (96, 80))
    report = compare(name, [clip], out=tmp_path / "out", repeats=1, weights=None, device="cpu")
    (entry,) = report["clips"]
    patch = subject.patch_size
    assert entry["width"] == 127 // patch * patch and entry["height"] % patch == 0
    (setting,) = entry["settings"]
    assert setting["kept_tokens"] < setting["patches"] and setting["agreement"]["pairs"] == 3
    assert setting["agreement"]["depth"]["median"] > 0
    html = (tmp_path / "out" / "report.html").read_text()
    reorders = subject.family == "depth-anything-3"  # so a row of kept tokens may be of another frame
    assert ("Kept patch tokens are not shown" in html) == reorders
    assert ('alt="kept patch tokens, frame 0"' in html) == (not reorders)


@pytest.mark.parametrize("subject", EVERY, ids=lambda subject: subject.name)
def test_cameras_and_depth_are_found_in_the_outputs(subject):
    _, found = read(subject.model(), subject)
    height, width = subject.images(3).shape[-2:]
    assert found["depth"].shape == (1, 3, height, width, 1) and found["depth_conf"].shape == (
        1,
        3,
        height,
        width,
    )
    if "pose_enc" in found:
        assert found["pose_enc"].shape == (1, 3, 9)
    else:
        turned = found["world_to_camera"][..., :3]
        torch.testing.assert_close(turned @ turned.mT, torch.eye(3).expand_as(turned), rtol=0, atol=1e-4)
        assert found["intrinsics"].shape == (1, 3, 3, 3)


def read(model, subject):
    """What a model gives of a clip of three frames, and cameras and depth as they are read from it."""
    host = find_host(model)
    with torch.inference_mode():
        outputs = model(host.model_images(subject.images(3)[0]))
    return outputs, host.predictions(outputs)


def of_family(family):
    found = [one for one in EVERY if one.family == family]
    return pytest.mark.parametrize("subject", found, ids=lambda subject: subject.name)


@of_family("pi3")
def test_cameras_of_pi3_see_its_points_where_they_are(subject):
    outputs, found = read(subject.model(), subject)
    scale, cameras = outputs["local_points"].abs().max(), found["world_to_camera"]
    seen = torch.einsum("bsij,bshwj->bshwi", cameras[..., :3], outputs["points"])
    seen = seen + cameras[:, :, None, None, :, 3]
    torch.testing.assert_close(seen / scale, outputs["local_points"] / scale, rtol=0, atol=1e-5)
    assert torch.equal(found["depth"], outputs["local_points"][..., 2:])


def by_hand(encoding, height, width):
    """Matrices [..., 4, 4] and intrinsics [..., 3, 3] of a pose encoding: translation, quaternion, fields of view."""
    matrices, intrinsics = [], []
    for row in encoding.reshape(-1, 9).double():
        x, y, z, w = (row[3:7] / row[3:7].norm()).tolist()
        across = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
        matrix = torch.eye(4, dtype=torch.float64)
        matrix[:3, :3] += 2 * w * across + 2 * across @ across  # Rodrigues
        matrix[:3, 3] = row[:3]
        matrices.append(matrix)
        tall, wide = (2 * float((field / 2).tan()) for field in row[7:])
        intrinsics.append([[width / wide, 0, width / 2], [0, height / tall, height / 2], [0, 0, 1]])
    lead = encoding.shape[:-1]
    return torch.stack(matrices).view(*lead, 4, 4), torch.tensor(intrinsics).view(*lead, 3, 3)


def cameras(subject, found):
    """[S, 3, 4] and [S, 3, 3], as a comparison has them."""
    clip = Clip("noise", subject.images(3)[0])
    prediction = prediction_of(found, clip, "stock")
    return prediction.world_to_camera, prediction.intrinsics


def close(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other[0].double(), rtol=1e-4, atol=1e-4)


@of_family("depth-anything-3")
def test_cameras_of_depth_anything_3_are_its_inverted_poses(subject):
    """By its own decoding and inverse, where its package is here."""
    model, encodings = subject.model(), []
    model.cam_dec.register_forward_hook(lambda *call: encodings.append(call[-1]))
    _, found = read(model, subject)
    encoding, size = encodings[0], subject.images(3).shape[-2:]
    if subject in depth_anything_double.DOUBLES:
        poses, intrinsics = by_hand(encoding.sigmoid(), *size)
        wanted = torch.linalg.inv(poses)[..., :3, :]
    else:
        decoded = real_depth_anything.load("model.utils.transform").pose_encoding_to_extri_intri
        poses, intrinsics = decoded(encoding, size)
        wanted = real_depth_anything.load("utils.geometry").affine_inverse(poses)
    assert (poses[..., :3, :3] - poses[..., :3, :3].mT).abs().max() > 0.01
    close(cameras(subject, found), (wanted, intrinsics))


@of_family("vggt-omega")
def test_cameras_of_vggt_omega_are_those_that_it_decodes(subject):
    outputs, found = read(subject.model(), subject)
    encoding, size = outputs["pose_enc"], subject.images(3).shape[-2:]
    if subject in DOUBLES:
        poses, intrinsics = by_hand(encoding, *size)
    else:
        poses, intrinsics = load("vggt_omega.utils.pose_enc").encoding_to_camera(encoding, size)
    close(cameras(subject, found), (poses[..., :3, :], intrinsics))


def test_pi3x_takes_images_alone(package):
    """As its authors ask for where nothing else is given."""
    package("pi3x", replace(DOUBLES[0], build=hosts_doubles.pi3x), from_pretrained=True)
    assert not load_backbone("pi3x").use_multimodal


def test_intrinsics_fit_the_points_of_a_known_camera():
    height, width, focal = 6, 10, torch.tensor([[12.0, 9.0], [20.0, 25.0]])  # x, y of two frames
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    depth = torch.rand(2, height, width, generator=torch.Generator().manual_seed(0)) + 1
    x = (columns - width / 2) / focal[:, :1, None] * depth
    y = (rows - height / 2) / focal[:, 1:, None] * depth
    found = fitted_intrinsics(torch.stack([x, y, depth], -1))
    wanted = torch.tensor([[[12.0, 0, 5], [0, 9, 3], [0, 0, 1]], [[20, 0, 5], [0, 25, 3], [0, 0, 1]]])
    torch.testing.assert_close(found, wanted)


def test_cameras_are_encoded_as_they_are_decoded():
    generator = torch.Generator().manual_seed(0)
    encoding = torch.randn(7, 9, generator=generator, dtype=torch.float64)
    encoding[:, 3:7] /= encoding[:, 3:7].norm(dim=1, keepdim=True) * encoding[:, 6:7].sign()
    encoding[:, 7:] = encoding[:, 7:].sigmoid() + 0.2
    torch.testing.assert_close(encode_cameras(*decode_pose_encoding(encoding, 30, 40), 30, 40), encoding)


def test_what_is_missing_is_said(package, tmp_path):
    assert not hasattr(hosts_doubles.OmegaDouble, "from_pretrained")
    package("vggt-omega", DOUBLES[1])
    with pytest.raises(PaceError, match="vggt-omega:FILE"):
        load_backbone("vggt-omega")
    sys.modules["a_package_of_models"].__dict__.clear()
    with pytest.raises(PaceError, match="github.com/facebookresearch/vggt-omega"):
        load_backbone("vggt-omega")


def test_help_and_guide_list_every_family(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["compare", "--help"])
    shown = "".join(capsys.readouterr().out.split())  # whose lines may end within a name
    guide = (Path(__file__).parents[1] / "docs" / "compare.md").read_text(encoding="utf-8")
    for family in PACKAGES:
        assert family in shown and f"`{family}" in guide


def test_training_refuses_other_families(tmp_path):
    with pytest.raises(PaceError, match=r"training is for VGGT.*calibrate"):
        check_options(Options(out=tmp_path, backbone="pi3", rooms="all"))


@pytest.mark.parametrize("device,precision,refused", [
    ("cuda", "float32", True), ("cuda", "autocast", False), ("cpu", "float32", False),
])  # fmt: skip
@pytest.mark.parametrize("subject", DOUBLES, ids=lambda subject: subject.name)
def test_float32_is_refused_where_a_model_switches_autocast_on(
    subject, device, precision, refused, monkeypatch
):
    """On a GPU, which nothing is moved to here."""
    model = subject.model()
    monkeypatch.setattr(type(model), "to", lambda model, *_: model)
    wanted = plan.Plan(plan.Options(), (), (), torch.device(device), precision)
    if refused and subject.family == "vggt-omega":
        with pytest.raises(PaceError, match="OmegaDouble.*autocast"):
            to_device(model, wanted)
    else:
        assert to_device(model, wanted) is model


@pytest.mark.parametrize("subject", [*REAL, *real_depth_anything.REAL], ids=lambda subject: subject.name)
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'", "ignore:CUDA is not available")
def test_which_models_switch_autocast_on(subject, monkeypatch):
    model, own, switched = subject.model(), torch.autocast.__init__, []

    def init(self, device_type, *args, **kwargs):
        own(self, device_type, *args, **kwargs)
        switched.append(device_type == "cuda" and kwargs.get("enabled", True))

    monkeypatch.setattr(torch.autocast, "__init__", init)
    read(model, subject)
    assert any(switched) == find_host(model).own_autocast


def test_narrow_weights_are_refused_where_heads_are_float32(tmp_path):
    pytest.importorskip("plotly")
    clip = write_images(tmp_path / "frames", 2, (96, 80))
    with pytest.raises(PaceError, match="Pi3Double.*autocast"):
        compare(DOUBLES[0].model(), [clip], out=tmp_path / "out", precision="bfloat16", device="cpu")
