"""Set-up that every test shares."""

import gc

import pytest
import torch
from hub import Hub, close_session
from huggingface_hub import constants

torch.set_num_threads(1)


def pytest_collection_finish():
    """What is imported by now stays: looking through it again and again for garbage takes a good part of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_cache():
    """No test reads or writes the calibrations that are kept for the user of this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACEVGGT_CACHE", "off")
        yield


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder of its own in which calibrations are kept."""
    folder = tmp_path / "kept"
    monkeypatch.setenv("PACEVGGT_CACHE", str(folder))
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process uses, with an empty cache, nobody logged in, and no waiting between tries."""
    hub = Hub()
    hub.lead_here(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with hub.serving():
        yield hub
    close_session()
