"""The device to run on."""

from __future__ import annotations

import torch

from ..errors import PaceError, first_line


def usable_device(name: str | None) -> torch.device:
    """The named device, or CUDA where there is one, or the CPU.

    Raises:
        PaceError: torch can't use it.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise PaceError(f"device {name!r} can't be used: {first_line(error)}") from error
    return device
