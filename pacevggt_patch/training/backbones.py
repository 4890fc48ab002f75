"""The model that `pacevggt train` or `compare` is asked for."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

from ..errors import PaceError, WeightsError, first_line
from ..hosts.base import PACKAGES, Package
from ..mini import build_mini
from ..mini.model import FORMAT as MINI_FORMAT
from ..mini.model import GET_VGGT, KIND
from ..weights import tensorfile
from ..weights.pace import KIND as PACE_KIND


def load_backbone(name: str) -> Any:
    """A VGGT in evaluation mode, on the CPU.

    Args:
        name: "mini" for the bundled VGGT-mini, a checkpoint of a VGGT-mini or of VGGT-1B (.safetensors, .pt), or a Hub
            id "user/repo". Of another family its name, and after a colon a checkpoint: see `load_sibling`.

    Raises:
        PaceError: it can't be loaded, with the reason.
    """
    check_backbone(name)
    if (package := package_of(name)) is not None:
        return load_sibling(name, package)
    path = Path(name).expanduser()
    if name == "mini" or (path.suffix == ".safetensors" and path.is_file() and is_mini(path)):
        return build_mini(True if name == "mini" else path)
    try:
        from vggt.models.vggt import VGGT
    except ImportError as error:
        raise PaceError(f"{GET_VGGT} ({error})") from error
    try:
        if not path.is_file():
            return VGGT.from_pretrained(str(path)).eval()
        return filled(VGGT(), path).eval()
    except WeightsError:
        raise
    except Exception as error:  # of the Hub client, of safetensors, of pickle, of state dictionaries
        reason = first_line(error)
        raise PaceError(f"backbone {name} can't be loaded: {reason}") from error


def check_backbone(name: str) -> None:
    """Look at the name of a backbone, and at the head of its file, without loading it; `load_backbone` tells of names.

    Raises:
        PaceError: it names no family, its file does not exist, or holds pace weights.
    """
    sibling = package_of(name) is not None
    checkpoint = name.partition(":")[2] if sibling else name
    path = Path(checkpoint).expanduser()
    if path.is_file():
        if holds_pace_weights(path):
            raise PaceError(f"{path} holds pace weights, not a checkpoint: pass it as --weights")
    elif checkpoint in ("", "mini"):
        return
    elif not sibling and (":" in name or not (names_a_file(name) or "/" in name)):
        raise PaceError(
            f'backbone {name!r} names no family: {", ".join(PACKAGES)}; of a VGGT give "mini", a checkpoint file or a '
            'Hub id "user/repo"'
        )
    elif not path.exists() and (names_a_file(checkpoint) or checkpoint.count("/") != 1):
        raise PaceError(f"backbone {name!r} can't be loaded: {path} does not exist")


def names_a_file(name: str) -> bool:
    """Whether a name ends as files do; Hub ids may have a point before a number."""
    return Path(name).suffix[1:].isalpha()


def package_of(name: str) -> Package | None:
    """Where the model of another family comes from, or None for a VGGT."""
    return PACKAGES.get(name.partition(":")[0])


def load_sibling(name: str, package: Package) -> Any:
    """A model of another family by its own package, in evaluation mode, on the CPU.

    Args:
        name: that of the family, and after a colon a checkpoint file or a Hub id: "pi3", "pi3:yyfz233/Pi3".
        package: where it comes from.

    Raises:
        PaceError: the package can't be imported, or the checkpoint not loaded, with the reason.
    """
    try:
        kind: Any = getattr(importlib.import_module(package.module), package.kind)
    except (ImportError, AttributeError) as error:
        raise PaceError(
            f"backbone {name} needs {package.kind} of {package.module} ({error}): install {package.source}, or put a "
            "checkout of it on PYTHONPATH"
        ) from error
    checkpoint = name.partition(":")[2] or package.checkpoint
    path = Path(checkpoint or "").expanduser()
    if checkpoint is None or not (path.is_file() or hasattr(kind, "from_pretrained")):
        raise PaceError(f"backbone {name} needs a checkpoint file: name it as {name.partition(':')[0]}:FILE")
    try:
        model = filled(kind(), path) if path.is_file() else kind.from_pretrained(checkpoint)
    except WeightsError:
        raise
    except Exception as error:  # of the Hub client, of safetensors, of pickle, of state dictionaries
        raise PaceError(f"backbone {name} can't be loaded: {first_line(error)}") from error
    package.prepare(model)
    return model.get_submodule(package.part).eval()


def is_mini(path: Path) -> bool:
    """Whether a safetensors file says that it holds a VGGT-mini."""
    try:
        tensorfile.read_metadata(path, KIND, MINI_FORMAT)
    except WeightsError:
        return False
    return True


def holds_pace_weights(path: Path) -> bool:
    """Whether a file says that it holds pace weights, of whatever format."""
    try:
        return tensorfile.WeightFile(path, PACE_KIND).metadata.get("kind") == json.dumps(PACE_KIND)
    except WeightsError:
        return False


def filled(model: Any, path: Path) -> Any:
    """A model with the tensors of a checkpoint in it.

    Raises:
        WeightsError: names some that are missing, unknown or of another shape.
    """
    state = read_state(path)
    try:
        model.load_state_dict(state)
    except RuntimeError:  # torch says which over many lines
        tensorfile.check_tensors(path, state, model.state_dict())
        raise
    return model


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
