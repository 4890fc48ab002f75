"""What is compared with what: the options, checked, and the clips, before a model is loaded."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..arguments import file_path, shown, whole
from ..clips import BUNDLED_CLIP, Clip, count_frames, load_clip
from ..clips.framing import PATCH_SIZE
from ..config import DEFAULT_KEEP_RATIO, PaceConfig
from ..errors import PaceError
from ..hosts.base import find_host
from ..runtime.device import usable_device
from ..runtime.plotting import load_extra
from ..training.backbones import check_backbone, is_mini, package_of

PRECISIONS = {
    "float32": "float32 weights, no autocast",
    "autocast": "float32 weights under bfloat16 autocast",
    "bfloat16": "bfloat16 weights, heads under bfloat16 autocast",
}
# VGGT-mini was trained on squares of 224 pixels; VGGT's own loader makes 518 pixels of the whole width.
MINI_WIDTH, WIDTH = 224, 518
# Frames of a clip where no number is given. A processor needs minutes for more; on a GPU a hundred show what is gained.
MOST_FRAMES = {"cpu": 24, "cuda": 100}
LIBRARIES = (
    ("matplotlib", "the pictures"),
    ("plotly", "the point clouds of the page"),
    ("tqdm", "long runs"),
)


@dataclass(frozen=True)
class Options:
    """What is asked for.

    Attributes:
        backbone: "mini", a checkpoint file, a Hub id, the name of another family, or a loaded model.
        clips: folders or videos; none takes the clip that comes with the package.
        keep_ratios, modes: every mode with every keep ratio is compared with stock. The mode None is that of the
            weights.
        merge_budget: of pre-AA pruning, as in `accelerate`.
        weights: as in `accelerate`.
        frames: of a clip, evenly spaced; None takes all, up to 24 on the CPU and 100 on a GPU.
        device: None takes CUDA where there is one.
        precision: one of PRECISIONS; None takes float32 on the CPU, else autocast.
        repeats: timed runs of each.
        compile: as in `accelerate`; the stock model runs as it is.
        out: folder of report.json and report.html.
        colmap: folder for COLMAP models, or None.
        ply: whether both clouds are written as PLY.
    """

    backbone: str | nn.Module = "mini"
    clips: tuple[str | PathLike[str], ...] = ()
    keep_ratios: tuple[float, ...] = (DEFAULT_KEEP_RATIO,)
    modes: tuple[str | None, ...] = (None,)
    merge_budget: float | None = None
    weights: Any = "auto"
    frames: int | None = None
    device: str | None = None
    precision: str | None = None
    repeats: int = 3
    compile: bool = False
    out: str | PathLike[str] = "runs/compare"
    colmap: str | PathLike[str] | None = None
    ply: bool = False

    @property
    def command(self) -> str | None:
        """The command that does the same again; None for what was passed as an object."""
        if not isinstance(self.backbone, str) or not isinstance(self.weights, str | PathLike | None):
            return None
        default, words = Options(), ["pacevggt", "compare", "--backbone", self.backbone]
        for clip in self.clips:
            words += ["--clip", str(clip)]
        words += ["--keep-ratios", ",".join(map(str, self.keep_ratios))]
        if self.modes != default.modes:
            words += ["--modes", ",".join(mode for mode in self.modes if mode)]
        if self.merge_budget is not None:
            words += ["--merge-budget", str(self.merge_budget)]
        words += ["--weights", "none" if self.weights is None else str(self.weights)]
        for name in ("frames", "device", "precision", "repeats"):
            if getattr(self, name) != getattr(default, name):
                words += [f"--{name}", str(getattr(self, name))]
        words += ["--out", str(self.out)]
        if self.colmap is not None:
            words += ["--colmap", str(self.colmap)]
        words += ["--compile"] * self.compile + ["--ply"] * self.ply
        return shlex.join(words)


@dataclass(frozen=True)
class Source:
    """A clip and what it was asked for as."""

    path: str | None  # as the user wrote it; None is the bundled one
    clip: Clip


@dataclass(frozen=True)
class Plan:
    """Options that can be followed.

    Attributes:
        configs: the settings that are compared with stock.
        sources: the clips, on the CPU.
        device, precision: what is run on, and how.
    """

    options: Options
    configs: tuple[PaceConfig, ...]
    sources: tuple[Source, ...]
    device: torch.device
    precision: str


def make_plan(options: Options, page: bool = True) -> Plan:
    """Look at all that can be looked at before a model is loaded.

    Args:
        options: what is asked for.
        page: whether the page will be written, which takes libraries.

    Raises:
        PaceError: a library is missing, or a setting, device, file or clip does not fit; in one sentence.
    """
    for name, what in LIBRARIES if page else ():
        load_extra(name, what)
    if options.ply:
        load_extra("plyfile", "PLY files")
    if options.colmap is not None:
        load_extra("pycolmap", "COLMAP models", "colmap")
        file_path("colmap", options.colmap)
    file_path("out", options.out)
    whole("repeats", options.repeats)
    if options.frames is not None:
        whole("frames", options.frames)
    if options.precision is not None and options.precision not in tuple(PRECISIONS):
        raise PaceError(f"precision must be one of {', '.join(PRECISIONS)}, got {shown(options.precision)}")
    configs = make_configs(options)
    device = usable_device(options.device)
    precision = options.precision or ("float32" if device.type == "cpu" else "autocast")
    return Plan(options, configs, tuple(load_sources(options, device)), device, precision)


def make_configs(options: Options) -> tuple[PaceConfig, ...]:
    """Every mode with every keep ratio, without repetitions; clips are pruned however short they are."""
    if not options.keep_ratios or not options.modes:
        raise PaceError("give at least one keep ratio and one mode")
    configs = (
        PaceConfig(ratio, options.merge_budget, mode, min_frames=1, compile=options.compile)
        for mode in options.modes
        for ratio in options.keep_ratios
    )
    return tuple(dict.fromkeys(configs))


def load_sources(options: Options, device: torch.device) -> list[Source]:
    """The clips, all of them, before anything runs."""
    mini, patch = runs_mini(options.backbone), patch_size(options.backbone)
    if not options.clips:
        return [Source(None, load_evenly(BUNDLED_CLIP, options.frames, device, mini, patch))]
    return [
        Source(str(path), load_evenly(path, options.frames, device, mini, patch)) for path in options.clips
    ]


def runs_mini(backbone: str | nn.Module) -> bool:
    """Whether a backbone is a VGGT-mini, told without loading it.

    Raises:
        PaceError: it is none, as far as can be told by its name and its file.
    """
    if isinstance(backbone, nn.Module):
        return hasattr(backbone, "mini_config")
    if not isinstance(backbone, str):
        raise PaceError(
            f'backbone must be "mini", a checkpoint file, a Hub id or a model, got {shown(backbone)}'
        )
    check_backbone(backbone)
    return backbone == "mini" or is_mini(Path(backbone).expanduser())


def patch_size(backbone: str | nn.Module) -> int:
    """Pixels a side of a patch of a backbone, told without loading it."""
    if isinstance(backbone, nn.Module):
        return find_host(backbone).patch_size
    package = package_of(backbone)
    return PATCH_SIZE if package is None else package.patch_size


def load_evenly(
    path: str | PathLike[str],
    frames: int | None,
    device: torch.device,
    mini: bool,
    patch: int = PATCH_SIZE,
) -> Clip:
    """A clip of frames that are evenly spaced, from the first one on, in the size that the model takes.

    Args:
        path: folder or video.
        frames: None takes all there are, up to a number that the device can do.
        device: what will run it.
        mini: central squares of 224 pixels for VGGT-mini, else 518 pixels of the whole width.
        patch: pixels a side of a patch; the width is the nearest smaller one that they fill.
    """
    folder = file_path("clip", path)
    total = count_frames(folder)
    if min(total, total if frames is None else frames) < 2:
        raise PaceError(
            f"cameras are compared in pairs, and of {shown(path)} one frame would be taken: give two or more"
        )
    if frames is not None and frames > total:
        raise PaceError(f"{folder} has {total} frames, not {frames}: give --frames {total} or fewer")
    if frames is None:
        frames = min(MOST_FRAMES.get(device.type, MOST_FRAMES["cuda"]), total)
    stride = max(1, (total - 1) // max(1, frames - 1))
    if mini:
        return load_clip(folder, frames=frames, stride=stride, width=MINI_WIDTH, mode="square")
    return load_clip(folder, frames=frames, stride=stride, width=WIDTH // patch * patch, patch=patch)


def in_words(config: PaceConfig) -> str:
    """A setting in a few words."""
    merged = "" if config.merge_budget is None else f", merged {config.merge_budget}"
    return f"{config.mode} {config.keep_ratio}{merged}"
