"""`pacevggt push` and its model card, with the real client against a Hub on the loopback interface."""

from __future__ import annotations

import pytest
import torch
from hosts import random_images, tiny_vggt

import pacevggt_patch
from pacevggt_patch import PaceWeights, WeightsError, accelerate
from pacevggt_patch.cli.main import main
from pacevggt_patch.weights.card import model_card, push

CHECKS = [
    {
        "stage": "training-free",
        "step": 0,
        "ratios": {"0.3": {"rotation_deg": 2.5, "depth": 0.05, "tokens": 0.2}},
    },
    {"stage": "refined", "step": 9, "ratios": {"0.3": {"rotation_deg": 1.25, "depth": 0.025, "tokens": 0.1}}},
]


@pytest.fixture
def file(tmp_path):
    """Weights that change the outputs."""
    training = {"backbone": "user/vggt", "images": "1 clip of 9 images", "steps": 9, "checks": CHECKS}
    weights = PaceWeights.new(tiny_vggt(), keep_ratios=(0.1, 0.6), training=training)
    with torch.no_grad():
        for parameter in weights.modules().parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    weights.save(tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


def outputs(weights):
    model = accelerate(tiny_vggt(), 0.3, weights=weights)
    with torch.inference_mode():
        return model(random_images()), pacevggt_patch.summary(model)


def test_what_is_pushed_comes_back(hub, file, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert main(["push", str(file), "me/pace"]) == 0
    commit = hub.repositories["me/pace"].refs["main"]
    assert capsys.readouterr().out == (
        f'uploaded; to use it: accelerate(model, weights="me/pace@{commit[:12]}")\n'
    )
    direct, _ = outputs(file)
    loaded, summary = outputs(f"me/pace@{commit}")
    assert torch.equal(direct["depth"], loaded["depth"])
    assert torch.equal(direct["pose_enc"], loaded["pose_enc"])
    assert summary.weights.startswith(f"me/pace@{commit} (trained for keep ratios 0.1 to 0.6; ")
    assert not torch.allclose(outputs(None)[0]["depth"], direct["depth"])
    files = hub.repositories["me/pace"].commits[commit]
    assert set(files) == {"pace.safetensors", "README.md"}
    assert files["pace.safetensors"] == file.read_bytes()
    assert files["README.md"].decode() == model_card(PaceWeights.load(file), "me/pace")


def test_branches_and_private_repositories(hub, file, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    first = push(file, "me/pace", private=True)
    assert hub.repositories["me/pace"].private
    for _ in range(2):  # a branch that is there is gone on with
        second = push(file, "me/pace", "try/more")
    assert hub.repositories["me/pace"].refs == {"main": first, "try/more": second}
    assert outputs("me/pace@try/more")[1].weights.startswith("me/pace@try/more (")


def test_a_second_push_is_a_commit_on_top(hub, file, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.repository("me/pace").commit({"figure.png": b"1"})
    commit = push(file, "me/pace")
    assert set(hub.repositories["me/pace"].commits[commit]) == {"figure.png", "pace.safetensors", "README.md"}


def test_the_card_says_what_the_weights_are(file):
    card = model_card(PaceWeights.load(file), "me/pace")
    assert card.startswith("---\nlibrary_name: pacevggt-patch\n")
    assert "\nbase_model: user/vggt\n---\n" in card
    assert 'accelerate(model, keep_ratio=0.3, weights="me/pace")' in card
    assert "user/vggt: C=32, 4+4 blocks, 2 heads, patch 14, 5 special tokens, cached layers 0/1/2/3" in card
    assert f"float32 `{PaceWeights.load(file).fingerprints['float32'][:12]}`" in card
    assert "keep ratios trained for: 0.1, 0.6; " in card
    assert "| 0.3 | training-free | 2.50 | - | 0.0500 | 0.200 |" in card
    assert "| 0.3 | refined | 1.25 | - | 0.0250 | 0.100 |" in card
    assert '"images": "1 clip of 9 images"' in card and '"checks"' not in card


@pytest.mark.parametrize("backbone", ["mini", "/data/vggt.pt", "runs/mini.safetensors", ""])
def test_only_a_hub_id_is_a_base_model(file, backbone):
    weights = PaceWeights.load(file)
    weights.training = {"backbone": backbone}
    weights.keep_ratios = ()
    card = model_card(weights, "me/pace")
    assert "base_model" not in card and "## Figures" not in card
    assert f"- {backbone or 'not recorded'}: C=32" in card and "trained for: not recorded" in card


def test_nothing_broken_is_uploaded(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    assert main(["push", str(tmp_path / "torn.safetensors"), "me/pace"]) == 2
    assert "torn.safetensors is not a safetensors file, or is damaged" in capsys.readouterr().err
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        (
            "me/pace",
            "hf_old",
            "{file} can't be uploaded to me/pace: the Hub does not let you: log in with `hf auth login` or set "
            "HF_TOKEN to a token that may write",
        ),
        (
            "me/re--po",
            "hf_secret",
            "me/re--po is not a valid Hub id: Cannot have -- or .. in repo_id: 'me/re--po'.",
        ),
    ],
)
def test_what_the_hub_refuses(hub, file, monkeypatch, repo, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(WeightsError) as caught:
        push(file, repo)
    assert str(caught.value) == message.format(file=file)


def test_without_a_hub(hub, file, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.stop()
    with pytest.raises(WeightsError, match=f"^{file} can't be uploaded to me/pace: "):
        push(file, "me/pace")
