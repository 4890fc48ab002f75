"""The model that `pacevggt train` is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import PaceError, WeightsError, first_line
from ..mini import build_mini
from ..mini.model import FORMAT as MINI_FORMAT
from ..mini.model import GET_VGGT, KIND
from ..weights import tensorfile


def load_backbone(name: str) -> Any:
    """A VGGT in evaluation mode, on the CPU.

    Args:
        name: "mini" for the bundled VGGT-mini, a checkpoint of a VGGT-mini or of VGGT-1B (.safetensors, .pt), or a Hub
            id "user/repo".

    Raises:
        PaceError: it can't be loaded, with the reason.
    """
    path = Path(name).expanduser()
    if name == "mini" or (path.suffix == ".safetensors" and path.is_file() and is_mini(path)):
        return build_mini(True if name == "mini" else path)
    if not path.is_file() and (path.suffix or name.count("/") != 1):
        raise PaceError(
            f'backbone must be "mini", a checkpoint file or a Hub id "user/repo", and {name!r} is neither'
        )
    try:
        from vggt.models.vggt import VGGT
    except ImportError as error:
        raise PaceError(f"{GET_VGGT} ({error})") from error
    try:
        if not path.is_file():
            return VGGT.from_pretrained(name).eval()
        model = VGGT()
        model.load_state_dict(read_state(path))
        return model.eval()
    except Exception as error:  # of the Hub client, of safetensors, of pickle, of state dictionaries
        reason = first_line(error)
        raise PaceError(f"backbone {name} can't be loaded: {reason}") from error


def is_mini(path: Path) -> bool:
    """Whether a safetensors file says that it holds a VGGT-mini."""
    try:
        tensorfile.read_metadata(path, KIND, MINI_FORMAT)
    except WeightsError:
        return False
    return True


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
