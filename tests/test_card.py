"""`pacevggt push`, its model card and what it prints, with the real client against a Hub on the loopback interface."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from hosts import random_images, run, tiny_vggt
from hosts_doubles import DOUBLES

from pacevggt_patch import PaceWeights, WeightsError, accelerate, summary
from pacevggt_patch.cli.main import main
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.weights.card import model_card, push

CHECKS = [
    {
        "stage": "training-free",
        "step": 0,
        "ratios": {"0.3": {"rotation_deg": 2.5, "depth": 0.05, "tokens": 0.2}},
    },
    {"stage": "refined", "step": 9, "ratios": {"0.3": {"rotation_deg": 1.25, "depth": 0.025, "tokens": 0.1}}},
]
KINDS = ["global", "pre-aa", "heads"]


def make(kind: str, model=None, backbone: str = "user/vggt") -> PaceWeights:
    """Weights that change the outputs."""
    model = model or tiny_vggt()
    training = {"backbone": backbone, "images": "1 clip of 9 images", "steps": 9, "checks": CHECKS}
    if kind == "heads":
        return PaceWeights.of_heads(find_host(model), ((1, 0),), {"backbone": backbone})
    weights = PaceWeights.new(model, mode=kind, keep_ratios=(0.1, 0.6), training=training)
    with torch.no_grad():
        for parameter in weights.modules().parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return replace(weights, full_heads=((1, 0), (2, 1)) if kind == "global" else ())


@pytest.fixture(params=KINDS)
def file(tmp_path, request):
    make(request.param).save(tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


@pytest.fixture
def one(tmp_path):
    make("global").save(tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


def outputs(weights):
    model = accelerate(tiny_vggt(), 0.3, weights=weights, min_frames=1)
    return run(model, random_images()), summary(model)


def code(card: str) -> str:
    """The Python block of a card."""
    return re.search(r"```python\n(.*?)```", card, re.S)[1]


def test_what_is_pushed_comes_back(hub, file, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert main(["push", str(file), "me/pace"]) == 0
    commit = hub.repositories["me/pace"].refs["main"]
    assert f"me/pace@{commit}" in capsys.readouterr().out
    direct, _ = outputs(file)
    loaded, found = outputs(f"me/pace@{commit}")
    assert torch.equal(direct["depth"], loaded["depth"])
    assert torch.equal(direct["pose_enc"], loaded["pose_enc"])
    assert found.weights.startswith(f"me/pace@{commit} (")
    files = hub.repositories["me/pace"].commits[commit]
    assert set(files) == {"pace.safetensors", "README.md"}
    assert files["pace.safetensors"] == file.read_bytes()
    assert files["README.md"].decode() == model_card(PaceWeights.load(file), "me/pace")


def test_what_push_prints_runs_as_printed(hub, file, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert main(["push", str(file), "me/pace"]) == 0
    printed = capsys.readouterr().out.strip().split(": ", 1)[1]
    model = tiny_vggt()
    exec(printed, {"accelerate": accelerate, "model": model})
    weights, found = PaceWeights.load(file), summary(model)
    assert found.config.mode == weights.mode
    assert re.match(r"me/pace@[0-9a-f]{40} \(", found.weights)


@pytest.mark.parametrize("revision", [None, "try/more"])
@pytest.mark.parametrize("backbone", ["user/vggt", "runs/model.pt", ""])
def test_the_code_of_a_card_runs_as_printed(hub, file, monkeypatch, revision, backbone):
    from vggt.models.vggt import VGGT

    asked = []
    monkeypatch.setattr(VGGT, "from_pretrained", lambda name: asked.append(name) or tiny_vggt())
    monkeypatch.setenv("HF_TOKEN", hub.token)
    weights = PaceWeights.load(file)
    weights.training["backbone"] = backbone
    weights.save(file)
    commit = push(file, "me/pace", revision)
    card = hub.repositories["me/pace"].commits[commit]["README.md"].decode()
    named = backbone == "user/vggt"
    names = {} if named else {"model": tiny_vggt()}  # only a Hub id says how to load it
    exec(code(card), names)
    assert asked == ["user/vggt"] * named
    found = summary(names["model"])
    assert found.config.mode == weights.mode and found.config.keep_ratio == 0.3
    assert found.weights.startswith(f"me/pace@{revision or 'main'} (")
    assert torch.isfinite(run(names["model"], random_images())["depth"]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_of_a_card_for_vggt_mini_loads_the_model_too(hub, tmp_path, monkeypatch, kind):
    from pacevggt_patch.mini import build_mini

    monkeypatch.setenv("HF_TOKEN", hub.token)
    make(kind, build_mini(), "mini").save(tmp_path / "mini.safetensors")
    commit = push(tmp_path / "mini.safetensors", "me/mini")
    names = {}
    exec(code(hub.repositories["me/mini"].commits[commit]["README.md"].decode()), names)
    assert summary(names["model"]).weights.startswith("me/mini@main (")


def test_branches_and_private_repositories(hub, one, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    first = push(one, "me/pace", private=True)
    assert hub.repositories["me/pace"].private
    for _ in range(2):  # a branch that is there is gone on with
        second = push(one, "me/pace", "try/more")
    assert hub.repositories["me/pace"].refs == {"main": first, "try/more": second}
    assert outputs("me/pace@try/more")[1].weights.startswith("me/pace@try/more (")


def test_a_second_push_is_a_commit_on_top(hub, one, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.repository("me/pace").commit({"figure.png": b"1"})
    commit = push(one, "me/pace")
    assert set(hub.repositories["me/pace"].commits[commit]) == {"figure.png", "pace.safetensors", "README.md"}


def test_the_card_says_what_the_weights_are(file):
    weights = PaceWeights.load(file)
    card = model_card(weights, "me/pace")
    assert card.startswith("---\nlibrary_name: pacevggt-patch\n")
    assert "\nbase_model: user/vggt\n---\n" in card
    for said in (f"{weights.mode} pruning", str(weights.backbone), weights.fingerprints["float32"][:12]):
        assert said in card
    for name in weights.modules():
        assert name.replace("_", " ") in card
    if weights.mode == "global":
        assert f"{len(weights.full_heads)} full-attention head" in card
    if weights.modules():
        assert "keep ratios 0.1, 0.6" in card
        assert "| 0.3 | training-free | 2.50 | - | 0.0500 | 0.200 |" in card
        assert "| 0.3 | refined | 1.25 | - | 0.0250 | 0.100 |" in card
        assert '"images": "1 clip of 9 images"' in card and '"checks"' not in card


@pytest.mark.parametrize("backbone", ["mini", "/data/vggt.pt", "runs/mini.safetensors", ""])
def test_only_a_hub_id_is_a_base_model(one, backbone):
    weights = replace(PaceWeights.load(one), training={"backbone": backbone}, keep_ratios=())
    card = model_card(weights, "me/pace")
    assert "base_model" not in card and "## Figures" not in card and "keep ratios" not in card
    assert (backbone or "not recorded") in card


def test_nothing_broken_is_uploaded(hub, one, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    content = bytearray(one.read_bytes())
    content[-1] ^= 1
    (tmp_path / "torn.safetensors").write_bytes(content)
    assert main(["push", str(tmp_path / "torn.safetensors"), "me/pace"]) == 2
    assert "torn.safetensors is damaged" in capsys.readouterr().err
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repo", "token", "named"),
    [("me/pace", "hf_old", "HF_TOKEN"), ("me/re--po", "hf_secret", "not a valid Hub id")],
)
def test_what_the_hub_refuses(hub, one, monkeypatch, repo, token, named):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(WeightsError, match=named) as caught:
        push(one, repo)
    assert repo in str(caught.value)


@pytest.mark.parametrize("repo", ["nowhere", "", "a/b/c", "me/pace@v1", "me/ pace", 3, None])
def test_what_is_no_id_is_refused_before_anything_is_read_or_sent(hub, repo):
    with pytest.raises(WeightsError, match="user/name") as caught:
        push("none.safetensors", repo)
    assert repr(repo) in str(caught.value) and hub.requests == []


def test_the_command_names_an_id_that_is_none(one, capsys):
    assert main(["push", str(one), "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["none.safetensors", "~nosuchuser/none.safetensors"])
def test_a_file_that_is_not_there(hub, file):
    with pytest.raises(WeightsError, match=file):
        push(file, "me/pace")
    assert hub.requests == []


@pytest.mark.parametrize("content", [b"<html>Sign in</html>", b"[]", b"{}", b"\xff"])
def test_a_hub_that_answers_garbage(hub, one, monkeypatch, content):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.answer = lambda handler: handler.send(200, content) or True
    with pytest.raises(WeightsError, match=r"mine\.safetensors .* me/pace") as caught:
        push(one, "me/pace")
    assert "\n" not in str(caught.value)


ROW = {"rotation_deg": 2.5}


@pytest.mark.parametrize(
    "checks",
    [
        7,
        "four clips",
        {"stage": "start"},
        [3],
        [{}],
        [{"stage": "start"}],
        [{"stage": "start", "ratios": 3}],
        [{"stage": "start", "ratios": {"0.3": 5}}],
        [{"stage": "start", "ratios": {"0.3": {"depth": "deep"}}}],
        [{"stage": "start", "ratios": {"0.3": {"depth": [1]}}}],
        [{"stage": "start", "ratios": {"0.3": {"depth": 10**400}}}],
        [{"stage": "start", "ratios": {"0.3": ROW}}, {"stage": "refined", "ratios": {"0.5": ROW}}],
        [{"ratios": {"0.3": ROW}}],
    ],
)
def test_notes_of_another_form_are_shown_as_they_are(hub, one, tmp_path, monkeypatch, checks):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    file = tmp_path / "noted.safetensors"
    replace(PaceWeights.load(one), training={"checks": checks, "backbone": ["?"], "steps": {}}).save(file)
    commit = push(file, "me/pace")
    card = hub.repositories["me/pace"].commits[commit]["README.md"].decode()
    assert "## Figures" not in card and json.dumps({"checks": checks}, indent=1)[2:-2] in card


@pytest.mark.parametrize("backbone", ['a/b"); print("', "user/vggt\nx: y", "user/vggt@main", "\ud800"])
def test_only_a_plain_name_gets_into_code(hub, one, tmp_path, monkeypatch, backbone):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    file = tmp_path / "noted.safetensors"
    replace(PaceWeights.load(one), training={"backbone": backbone}).save(file)
    push(file, "me/pace")
    card = model_card(PaceWeights.load(file), "me/pace")
    assert "from_pretrained" not in card and "base_model" not in card


def test_without_a_hub(hub, one, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.stop()
    with pytest.raises(WeightsError, match=r"mine\.safetensors .* me/pace"):
        push(one, "me/pace")


def test_the_card_names_the_family():
    weights = PaceWeights.new(DOUBLES[0].model())
    card = model_card(weights, "me/pace")
    assert "- pi3\n" in card and "model of the family pi3" in card and "VGGT" not in card
