"""The adapter that docs/adding-a-host.md shows works as it stands there, on a model that it was not written for."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path

import conformance
import pytest
import torch
from conformance import CHECKS, Subject, weights_of_another_family_are_refused_by_name
from hosts_doubles import CHANNELS, DOUBLES, PlaneAttention, PlaneRope, Residual, made
from torch import Tensor, nn

from pacevggt_patch import UnsupportedModelError, accelerate, calibrate
from pacevggt_patch.hosts import base

TEXT = (Path(__file__).parents[1] / "docs" / "adding-a-host.md").read_text(encoding="utf-8")
ADAPTER, SUBJECT, PACKAGE = re.findall(r"```python\n(.*?)```", TEXT, re.S)

# Those that ask most of an adapter.
SOME = (
    conformance.keeping_everything_is_stock_to_the_bit,
    conformance.removal_leaves_no_trace,
    conformance.fewer_tokens_attend,
    conformance.calibrations_by_both_ways_agree,
    conformance.weights_go_to_a_file_and_back,
    conformance.compiled_blocks_give_the_same,
    conformance.settings_are_followed_or_refused,
)


class Block(Residual):
    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        return self.run(x, pos)


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, CHANNELS, 14, 14)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).mT


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed, self.rope, self.patch_size = Patches(), PlaneRope(), 14
        self.registers = nn.Parameter(torch.randn(1, 4, CHANNELS))
        self.frame_blocks, self.global_blocks = (
            nn.ModuleList(Block(PlaneAttention(self.rope)) for _ in range(4)) for _ in range(2)
        )

    def forward(self, images: Tensor) -> Tensor:
        batch, frames = images.shape[:2]
        tokens = self.patch_embed(images.flatten(0, 1))
        x = torch.cat([self.registers.expand(len(tokens), -1, -1), tokens], 1)
        rows, columns = (torch.arange(1, side // 14 + 1) for side in images.shape[-2:])
        where = nn.functional.pad(torch.cartesian_prod(rows, columns), (0, 0, 4, 0)).expand(len(x), -1, -1)
        for within, across in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = within(x, pos=where)
            x = across(x.reshape(batch, -1, CHANNELS), pos=where.reshape(batch, -1, 2)).view(x.shape)
        return x.unflatten(0, (batch, frames))


class SceneModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.depth = Trunk(), nn.Linear(CHANNELS, 14**2)

    def forward(self, images: Tensor) -> Tensor:
        return self.depth(self.encoder(images)[:, :, 4:])


@pytest.fixture
def scene(monkeypatch):
    """The family of the document, for one test."""
    monkeypatch.setattr(base, "FAMILIES", dict(base.FAMILIES))
    monkeypatch.setattr(base, "PACKAGES", dict(base.PACKAGES))
    names = {}
    exec(ADAPTER, names)
    exec(SUBJECT, {"Subject": Subject, "build": lambda seed: made(SceneModel, seed)} | names, names)
    exec(PACKAGE, names)
    return names["SUBJECT"]


@pytest.mark.parametrize("check", SOME, ids=lambda check: check.__name__)
def test_the_family_of_the_document_conforms(scene, check, tmp_path, monkeypatch):
    given = {"subject": scene, "folder": tmp_path, "monkeypatch": monkeypatch, "other": DOUBLES[0]}
    check(**{name: given[name] for name in inspect.signature(check).parameters})


def test_it_is_refused_where_a_part_is_missing(scene):
    model = scene.model()
    del model.encoder.registers
    with pytest.raises(UnsupportedModelError, match=r"SceneModel.encoder lacks registers"):
        accelerate(model, weights=None)


def test_the_family_is_named_where_models_are_not_known(scene):
    with pytest.raises(UnsupportedModelError, match=r"pi3.*vggt.*scene"):
        accelerate(nn.Linear(2, 2))
    weights_of_another_family_are_refused_by_name(DOUBLES[1], scene)
    assert base.PACKAGES["scene"].patch_size == 14


def test_the_document_counts_the_checks():
    (count,) = re.findall(r"There are (\d+) of them", TEXT)
    assert int(count) == len(CHECKS)


# Each block under the kind of the other, and by its right name.
SWAPPED = ADAPTER.replace('("frame", "global"), pair', '("global", "frame"), pair')
OTHER = {"frame": "global", "global": "frame"}


def test_blocks_named_the_wrong_way_round_are_noticed(scene):
    names = {}
    exec(SWAPPED, names)
    names["Scene"].block_name = lambda self, kind, index: f"{OTHER[kind]}_blocks.{index}"
    with pytest.raises(UnsupportedModelError, match=r"SceneModel.encoder.*`blocks`.*wrong way round"):
        accelerate(scene.model(), weights=None)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("frame_blocks.{1}", r"global block 0 .* frame_blocks.0, which is another block"),
        ("blocks.{1}", r"frame block 0 .* blocks.0, which it has not: override block_name"),
    ],
)
def test_a_name_that_is_not_the_blocks_own_is_refused(scene, name, problem):
    names = {}
    exec(ADAPTER, names)
    names["Scene"].block_name = lambda self, kind, index: name.format(kind, index)
    with pytest.raises(UnsupportedModelError, match=problem):
        accelerate(scene.model(), weights=None)


class OtherAttention(nn.Module):
    """Attention without any of the names of a stock one."""

    def __init__(self):
        super().__init__()
        self.heads, self.joint, self.out = 2, nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.joint(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(found.transpose(1, 2).flatten(2))


class OtherBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = OtherAttention()

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        return x + self.attention(nn.functional.layer_norm(x, x.shape[-1:]))


class OtherModel(SceneModel):
    def __init__(self):
        super().__init__()
        for name in ("frame_blocks", "global_blocks"):
            setattr(self.encoder, name, nn.ModuleList(OtherBlock() for _ in range(4)))


def test_a_block_of_other_names_needs_the_two_that_the_document_names(scene):
    other = replace(scene, build=lambda seed: made(OtherModel, seed))
    with pytest.raises(UnsupportedModelError, match=r"attn.proj.weight .* attention_output"):
        calibrate(other.model(), other.images(4))
    names = {}
    exec(ADAPTER, names)
    names["Scene"].attention_output = lambda self, index: self.block("global", index).attention.out.weight
    names["Scene"].spec = lambda self: replace(base.Host.spec(self), num_heads=2)
    conformance.calibration_finds_heads(other)
    conformance.fewer_tokens_attend(other)
    conformance.heads_that_all_see_everything_are_stock(other)
    with pytest.raises(UnsupportedModelError, match="compile=True"):
        accelerate(other.model(), weights=None, compile=True)


@pytest.mark.parametrize(
    ("right", "wrong", "cause"),
    [
        (
            "_, self.special_tokens, self.embed_dim",
            "self.special_tokens, _, self.embed_dim",
            "special_tokens",
        ),
        ('(("frame", "global"), pair)', '(("global", "frame"), pair[::-1])', "order of blocks"),
    ],
)
def test_a_trial_says_what_to_check_in_the_adapter(scene, right, wrong, cause):
    assert right in ADAPTER
    exec(ADAPTER.replace(right, wrong), {})
    with pytest.raises(UnsupportedModelError, match=f"check .*{cause} of its adapter") as caught:
        accelerate(scene.model(), weights=None)
    assert "paused" not in str(caught.value)
