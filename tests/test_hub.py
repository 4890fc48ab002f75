"""Weights by their Hub id, with the real client against a Hub on the loopback interface."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hosts import tiny_vggt
from hub import close_session
from huggingface_hub import HfApi, constants

import pacevggt_patch
from pacevggt_patch import PaceWeights, WeightsError, accelerate

FILE = "pace.safetensors"
EXAMPLE = Path(__file__).parents[1] / "examples" / "hub_roundtrip.py"


@pytest.fixture(scope="module")
def model():
    return tiny_vggt()


def content_of(model, note, folder):
    path = folder / "made.safetensors"
    PaceWeights.new(model, training={"note": note}).save(path)
    return path.read_bytes()


@pytest.fixture
def repository(hub, model, tmp_path):
    """user/repo with two commits on main; the first is tagged v1."""
    repository = hub.repository("user/repo")
    repository.refs["v1"] = repository.commit({FILE: content_of(model, "first", tmp_path)})
    repository.commit({FILE: content_of(model, "second", tmp_path)})
    return repository


def refused(source, cause, *words):
    with pytest.raises(WeightsError) as caught:
        PaceWeights.load(source)
    for word in (source.split("@")[0], *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert cause in [kind.__name__ for kind in type(caught.value.__cause__).__mro__]


def test_download(repository):
    weights = PaceWeights.load("user/repo")
    assert weights.training == {"note": "second"}
    assert weights.source == "user/repo@main"


def test_accelerate_by_id(repository):
    model = tiny_vggt()
    accelerate(model, weights="user/repo@v1")
    assert "user/repo@v1 (" in pacevggt_patch.summary(model).weights


def test_revisions(repository):
    assert PaceWeights.load("user/repo@v1").training == {"note": "first"}
    assert PaceWeights.load("user/repo@main").training == {"note": "second"}
    assert PaceWeights.load(f"user/repo@{repository.refs['v1']}").training == {"note": "first"}


def test_branch_with_a_slash(repository, model, tmp_path):
    repository.commit({FILE: content_of(model, "branch", tmp_path)}, "try/more")
    assert PaceWeights.load("user/repo@try/more").training == {"note": "branch"}


def test_the_cache_serves_a_file_once(hub, repository):
    PaceWeights.load("user/repo")
    PaceWeights.load("user/repo")
    # Once a day the client asks for other things, too.
    files = [request.split()[0] for request in hub.requests if "/resolve/" in request]
    assert files == ["HEAD", "GET", "HEAD"]


def test_a_new_commit_is_noticed(hub, repository, model, tmp_path):
    PaceWeights.load("user/repo")
    repository.commit({FILE: content_of(model, "third", tmp_path)})
    assert PaceWeights.load("user/repo").training == {"note": "third"}


def test_the_cache_serves_when_the_hub_is_gone(hub, repository):
    PaceWeights.load("user/repo")
    PaceWeights.load("user/repo@v1")
    hub.stop()
    assert PaceWeights.load("user/repo").training == {"note": "second"}
    assert PaceWeights.load("user/repo@v1").training == {"note": "first"}


def test_offline_mode(hub, repository, monkeypatch):
    PaceWeights.load("user/repo")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    hub.requests.clear()
    assert PaceWeights.load("user/repo").training == {"note": "second"}
    refused("user/other@v2", "LocalEntryNotFoundError", "@v2", "HF_HUB_OFFLINE")
    assert hub.requests == []


def test_hub_gone_and_nothing_cached(hub):
    hub.stop()
    refused("user/repo", "LocalEntryNotFoundError", "network", "HF_ENDPOINT")


def test_no_such_repository(hub, monkeypatch):
    refused("user/none", "RepositoryNotFoundError", "hf auth login")  # 401
    monkeypatch.setenv("HF_TOKEN", hub.token)
    refused("user/none", "RepositoryNotFoundError", "check the id")  # 404


def test_private_repository(hub, repository, monkeypatch):
    repository.private = True
    refused("user/repo", "RepositoryNotFoundError", "private", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert PaceWeights.load("user/repo").training == {"note": "second"}


def test_gated_repository(hub, repository):
    repository.gated = True
    refused("user/repo", "GatedRepoError", "gated", "hf auth login")


def test_no_such_revision(repository):
    refused("user/repo@v9", "RevisionNotFoundError", "no revision v9")


def test_repository_of_something_else(hub):
    hub.repository("user/model").commit({"model.safetensors": b"123"})
    refused("user/model", "EntryNotFoundError", f"no {FILE}")


def test_wrong_file_under_the_right_name(hub, tmp_path):
    hub.repository("user/model").commit({FILE: b"<html>no</html>"})
    with pytest.raises(WeightsError, match=f"{FILE} is not a safetensors file"):
        PaceWeights.load("user/model")


def test_weights_of_another_backbone(repository):
    model = tiny_vggt(seed=1)
    with pytest.raises(WeightsError, match="user/repo@main .* another checkpoint"):
        accelerate(model, weights="user/repo")
    assert not pacevggt_patch.is_accelerated(model)


def test_invalid_id(hub):
    refused("user/re--po", "HFValidationError", "not a valid Hub id")
    assert hub.requests == []


@pytest.mark.parametrize("status", [400, 403, 500])
def test_the_hub_fails(hub, status):
    hub.failure = (status, "not today")
    refused("user/repo", "LocalEntryNotFoundError", f"HTTP status {status}", "again later")


def test_a_rejected_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    hub.failure = (401, "Invalid credentials in Authorization header")
    # Before 0.26 the client says LocalEntryNotFoundError, as where the Hub fails.
    refused("user/repo", "Exception", "token", "hf auth login")


def test_a_download_that_breaks_off(hub, repository, monkeypatch):
    def stall(*_, **__):
        raise TimeoutError("timed out\nafter 10 s")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", stall)
    refused("user/repo", "TimeoutError", "timed out")


def flipped(content):
    return content[:-1] + bytes([content[-1] ^ 1])


PAGE = b"<html><body>Sign in to this network</body></html>"


def page_of_that_size(content):
    return PAGE + b" " * (len(content) - len(PAGE))


@pytest.mark.parametrize("delivery", [flipped, page_of_that_size])
def test_other_content_than_the_hub_says_is_deleted(hub, repository, delivery):
    hub.delivery = delivery
    for _ in range(2):
        refused("user/repo", "OSError", "promised", "again")
    hub.delivery = bytes
    assert PaceWeights.load("user/repo").training == {"note": "second"}


def test_a_cached_file_that_was_damaged_is_downloaded_again(hub, repository):
    weights = PaceWeights.load("user/repo")
    (blob,) = Path(constants.HF_HUB_CACHE).glob("models--user--repo/blobs/*")
    blob.write_bytes(flipped(blob.read_bytes()))
    refused("user/repo", "OSError", "again")
    assert PaceWeights.load("user/repo").training == weights.training


@pytest.mark.parametrize(
    "delivery", [lambda content: content[:-9], lambda content: content * 2, lambda _: PAGE]
)
def test_another_size_than_the_hub_says(hub, repository, delivery):
    hub.delivery = delivery
    refused("user/repo", "OSError", "size")


def test_a_connection_that_breaks_off(hub, repository):
    hub.breaks = [1000] * 9  # more often than any client tries
    refused("user/repo", "Exception", "can't be downloaded")
    hub.breaks.clear()
    assert PaceWeights.load("user/repo").training == {"note": "second"}


@pytest.mark.parametrize("command", ["HEAD", "GET"])
def test_a_hub_that_does_not_answer(hub, repository, monkeypatch, command):
    over = threading.Event()
    hub.answer = lambda handler: handler.command == command and over.wait(60)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", 0.2, raising=False)
    with pytest.raises(WeightsError, match="user/repo") as caught:
        PaceWeights.load("user/repo")
    over.set()
    assert "\n" not in str(caught.value)


def redirect(handler, location):
    """More often than a client should follow, yet not for ever: huggingface_hub 1.0 does follow for ever."""
    handler.send(302 if len(handler.state.requests) < 99 else 404, b"", {"Location": location})
    return True


@pytest.mark.parametrize(
    "answer",
    [
        lambda handler: handler.send(200, PAGE) or True,
        lambda handler: handler.send(404, PAGE) or True,
        lambda handler: handler.send(200, b"", {"ETag": "", "X-Repo-Commit": "../../x"}) or True,
        lambda handler: handler.wfile.write(b"\x00\xffgarbage\r\n\r\n"),
        lambda handler: redirect(handler, handler.path),
        lambda handler: redirect(handler, "/" + "a" * 9),
        lambda handler: redirect(handler, "\x01://"),
    ],
)
def test_what_is_no_hub(hub, repository, answer):
    hub.answer = answer
    with pytest.raises(WeightsError, match="user/repo") as caught:
        PaceWeights.load("user/repo")
    assert "\n" not in str(caught.value)
    hub.answer = None
    assert PaceWeights.load("user/repo").training == {"note": "second"}


def test_a_repository_that_was_renamed(hub, repository):
    def moved(handler):
        if handler.path.startswith("/user/old/"):
            handler.send(307, b"", {"Location": handler.path.replace("/old/", "/repo/")})
            return True
        return False

    hub.answer = moved
    assert PaceWeights.load("user/old").training == {"note": "second"}


@pytest.mark.parametrize("mode", ["global", "pre-aa"])
def test_upload_and_download(hub, model, tmp_path, mode):
    weights = PaceWeights.new(model, mode=mode, keep_ratios=[0.3], training={"steps": 1})
    weights.save(tmp_path / FILE)
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("me/mine", exist_ok=True)
    api.upload_file(path_or_fileobj=tmp_path / FILE, path_in_repo=FILE, repo_id="me/mine")
    loaded = PaceWeights.load("me/mine")
    assert loaded.keep_ratios == (0.3,) and loaded.mode == mode
    found = loaded.modules().state_dict()
    for name, tensor in weights.modules().state_dict().items():
        assert torch.equal(tensor, found[name])


def run_example(hub, tmp_path, **environment):
    inherited = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
    }
    return subprocess.run(
        [sys.executable, "-W", "ignore", EXAMPLE, "me/example"],
        env={
            **inherited,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_example(hub, tmp_path):
    """The real client with nothing replaced in it: the environment alone leads it to this Hub."""
    done = run_example(hub, tmp_path, HF_TOKEN=hub.token)
    assert done.returncode == 0, done.stderr
    commit = hub.repositories["me/example"].refs["main"]
    lines = done.stdout.splitlines()
    assert lines[0] == f"uploaded pace.safetensors to me/example, commit {commit[:12]}"
    assert lines[1] == "depth [1, 2, 224, 224, 1]"
    assert any(line.startswith(f"weights       me/example@{commit} (") for line in lines)
    assert list((tmp_path / "home" / "hub").glob(f"models--me--example/snapshots/{commit}/{FILE}"))
