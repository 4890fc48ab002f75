"""Pace weight files on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.sha import sha_fileobj

from ..errors import WeightsError, first_line

HUB_FILE = "pace.safetensors"
SHA_256 = re.compile("[0-9a-f]{64}")
REJECTED_TOKEN = "the Hub rejects your token, log in with `hf auth login` or fix HF_TOKEN"
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^@\s]+))?")


def download(repo: str, revision: str | None) -> Path:
    """Path of `pace.safetensors` in the Hub cache, fetched if need be.

    Raises:
        WeightsError: one sentence that says what to do.
    """
    name = f"{repo}@{revision}" if revision else repo
    try:
        return _intact(Path(hf_hub_download(repo, HUB_FILE, revision=revision)))
    except GatedRepoError as error:
        problem = (
            f"{repo} is gated: ask for access on its page, then log in with `hf auth login` or set HF_TOKEN"
        )
        raise WeightsError(problem) from error
    except RepositoryNotFoundError as error:
        problem = (
            f"{repo} is not on the Hugging Face Hub, or it is private: check the id, or log in with `hf auth login` "
            "or set HF_TOKEN"
        )
        raise WeightsError(problem) from error
    except RevisionNotFoundError as error:
        raise WeightsError(
            f"{repo} has no revision {revision}: check the branch, tag or commit after the @"
        ) from error
    except LocalEntryNotFoundError as error:  # before EntryNotFoundError, which it is one of
        status = http_status(error.__cause__)
        if constants.HF_HUB_OFFLINE:
            problem = f"{name} is not in the Hub cache and HF_HUB_OFFLINE is set: unset it once to download {HUB_FILE}"
        elif status == 401:
            problem = f"{name} can't be downloaded: {REJECTED_TOKEN}"
        elif status is not None:
            problem = (
                f"{name} is not in the Hub cache and the Hub answers with HTTP status {status}: try again later, or "
                "pass a path to the file"
            )
        else:
            problem = (
                f"{name} is not in the Hub cache and the Hub can't be reached: check the network and HF_ENDPOINT, or "
                "pass a path to the file"
            )
        raise WeightsError(problem) from error
    except EntryNotFoundError as error:
        problem = f"{name} holds no {HUB_FILE}, so it is not a repository of pace weights: check the id"
        raise WeightsError(problem) from error
    except HFValidationError as error:
        raise WeightsError(f"{name} is not a valid Hub id: {error}") from error
    except Exception as error:  # of the client's HTTP library, which differs between its versions
        reason = first_line(error)
        if http_status(error) == 401:
            reason = REJECTED_TOKEN
        raise WeightsError(f"{name} can't be downloaded: {reason}") from error


def _intact(path: Path) -> Path:
    """A file of the Hub cache; deleted, with an OSError, where it is not what the Hub promised."""
    content = path.resolve()
    if SHA_256.fullmatch(content.name):  # the cache calls it by what the Hub tells
        with content.open("rb") as file:
            found = sha_fileobj(file).hex()
        if found != content.name:
            content.unlink()
            raise OSError("what came is not what the Hub promised, and is deleted: try again")
    return path


def http_status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
