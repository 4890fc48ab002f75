"""`compare` on models of other families: loaded by the name of the family, their outputs read as cameras and depth."""

from __future__ import annotations

import sys
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
from real_hosts import REAL
from safetensors.torch import save_file
from torch import nn

from pacevggt_patch import PaceError
from pacevggt_patch.cli.main import make_parser
from pacevggt_patch.compare import compare, plan
from pacevggt_patch.evaluation.geometry import decode_pose_encoding, encode_cameras
from pacevggt_patch.hosts.base import PACKAGES, find_host
from pacevggt_patch.hosts.pi3 import fitted_intrinsics
from pacevggt_patch.training.backbones import load_backbone
from pacevggt_patch.training.run import Options, check_options

EVERY_DOUBLE = [*DOUBLES, *depth_anything_double.DOUBLES]


def whole(model, part):
    """What a package's class makes: the model, or what holds it under that name."""
    return nn.ModuleDict({part: model}) if part else model


@pytest.fixture
def package(monkeypatch):
    """Puts a double in the place of a family's package."""

    def put(name: str, subject: Subject):
        module = ModuleType("a_package_of_models")
        module.Model = lambda: whole(subject.build(5), PACKAGES[name].part)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(PACKAGES, name, PACKAGES[name]._replace(module=module.__name__, kind="Model"))

    return put


@pytest.mark.parametrize("subject", EVERY_DOUBLE, ids=lambda subject: subject.name)
def test_a_family_is_compared_by_its_name_and_checkpoint(subject, package, tmp_path, monkeypatch):
    pytest.importorskip("plotly")
    monkeypatch.setattr(plan, "WIDTH", 127)  # in place of 518, which takes longer
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
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize(
    "subject", [*EVERY_DOUBLE, *REAL, *real_depth_anything.REAL], ids=lambda subject: subject.name
)
def test_cameras_and_depth_are_found_in_the_outputs(subject):
    model, images = subject.model(), subject.images(3)
    host = find_host(model)
    with torch.inference_mode():
        found = host.predictions(model(host.model_images(images[0])))
    height, width = images.shape[-2:]
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


def test_narrow_weights_are_refused_where_heads_are_float32(tmp_path):
    pytest.importorskip("plotly")
    clip = write_images(tmp_path / "frames", 2, (96, 80))
    with pytest.raises(PaceError, match="Pi3Double.*autocast"):
        compare(DOUBLES[0].model(), [clip], out=tmp_path / "out", precision="bfloat16", device="cpu")
