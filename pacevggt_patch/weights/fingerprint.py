"""Which checkpoint a model holds, told by a few of its tensors."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts.base import Host

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fingerprints(host: Host) -> dict[str, str]:
    """SHA-256 over a few tensors, one for each dtype the model can be cast to.

    Casting to a narrower dtype changes the bits. So a float32 model has a fingerprint per dtype, and one that is
    bfloat16 or float16 has only its own: two models are the same if any dtype they share agrees, see `agree`.
    """
    native = host.reference.dtype
    wide = native in (torch.float32, torch.float64)
    wanted = DTYPES if wide else {str(native).split(".")[1]: native}
    result = {}
    for name, dtype in wanted.items():
        digest = hashlib.sha256()
        for tensor in host.fingerprint_tensors():
            update(digest, tensor, dtype)
        result[name] = digest.hexdigest()
    return result


def checkpoint_digest(model: nn.Module) -> str:
    """SHA-256 over all parameters and buffers of a model, of large ones over their beginning."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        update(digest, tensor, tensor.dtype)
    return digest.hexdigest()


def update(digest: Any, tensor: Tensor, dtype: torch.dtype) -> None:
    """Add a tensor, cast to a dtype, to a digest of hashlib."""
    # A few thousand values of each tensor tell two trainings apart; hashing gigabytes would take seconds.
    values = tensor.detach().reshape(-1)[:4096].to("cpu", dtype)
    digest.update(str(tuple(tensor.shape)).encode())
    digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())


def agree(mine: dict[str, str], theirs: dict[str, str]) -> bool:
    """Whether two models' fingerprints are of one checkpoint."""
    return any(mine[dtype] == theirs[dtype] for dtype in mine.keys() & theirs.keys())
