"""The device to run on."""

from __future__ import annotations

import os

import torch

from ..errors import PaceError, first_line


def usable_device(name: str | None) -> torch.device:
    """The named device, or CUDA where there is one, or the CPU.

    Of several GPUs "cuda" is the one that torchrun gives this process, or the current one.

    Raises:
        PaceError: torch can't use it.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
        torch.zeros(1, device=device).item()  # of "meta" there are tensors, but no values
    except Exception as error:  # each kind of device has its own
        reason = first_line(error).split(". ")[0]  # more would be a list of what torch was built with
        raise PaceError(f"device {name!r} can't be used: {reason}") from error
    return device
