"""The device to run on."""

from __future__ import annotations

import os

import torch

from ..arguments import shown
from ..errors import PaceError, first_line


def existing_device(device: torch.device | str, name: str) -> torch.device:
    """A device of this machine, with its number where there are several.

    Args:
        device: what the user gave.
        name: of the argument.

    Raises:
        PaceError: torch can't use it.
    """
    try:
        return torch.empty(0, device=torch.device(device)).device
    except Exception as error:  # each kind of device has its own
        reason = first_line(error).split(". ")[0]  # more would be a list of what torch was built with
        raise PaceError(
            f'{name} must be a torch device of this machine such as "cpu", got {shown(device)} ({reason})'
        ) from error


def usable_device(name: str | None) -> torch.device:
    """The named device, or CUDA where there is one, or the CPU.

    Of several GPUs "cuda" is the one that torchrun gives this process, or the current one.

    Raises:
        PaceError: torch can't use it.
    """
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen == "cuda" and "LOCAL_RANK" in os.environ:
        chosen = f"cuda:{os.environ['LOCAL_RANK']}"
    device = existing_device(chosen, "device")
    if device.type == "meta":  # it has tensors, but no values
        raise PaceError("device can't be 'meta', whose tensors hold no values: pass cpu or cuda")
    return device
