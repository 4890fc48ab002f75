"""Small stock VGGTs with random weights, built from the installed classes."""

from __future__ import annotations

import copy
import importlib
import shutil
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import nn

from pacevggt_patch import PaceWeights

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
DEPTH = 4
LAYERS = (0, 1, 2, 3)


def tiny_vggt(
    package: str = "vggt", *, all_layers: bool = False, track: bool = False, group: int = 1, seed: int = 0
) -> nn.Module:
    """A model of `build_vggt`, made anew or copied: a track head takes ten times as long to make as to copy."""
    if track and package == "vggt":
        return copy.deepcopy(_with_track_head(all_layers, group, seed))
    return build_vggt(package, all_layers=all_layers, track=track, group=group, seed=seed)


@cache
def _with_track_head(all_layers: bool, group: int, seed: int) -> nn.Module:
    return build_vggt(all_layers=all_layers, track=True, group=group, seed=seed)


def build_vggt(
    package: str = "vggt", *, all_layers: bool = False, track: bool = False, group: int = 1, seed: int = 0
) -> nn.Module:
    """A VGGT of C=32 and 4 + 4 blocks with camera, depth and point heads (and a track head), in eval mode.

    Args:
        package: name of the package that holds vggt's code.
        all_layers: the older convention, in which the aggregator returns every layer.
        group: AA blocks of one kind in a row (`aa_block_size`).
    """

    def take(module: str, *names: str):
        loaded = importlib.import_module(f"{package}.{module}")
        return [getattr(loaded, name) for name in names]

    (vggt,) = take("models.vggt", "VGGT")
    (aggregator_class,) = take("models.aggregator", "Aggregator")
    (vit,) = take("layers.vision_transformer", "DinoVisionTransformer")
    (camera_class,) = take("heads.camera_head", "CameraHead")
    (dpt_class,) = take("heads.dpt_head", "DPTHead")
    (track_class,) = take("heads.track_head", "TrackHead")

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = vggt.__new__(vggt)
        nn.Module.__init__(model)
        cached = (1, 3) if all_layers else LAYERS
        model.aggregator = aggregator_class(
            img_size=56, embed_dim=32, depth=DEPTH, num_heads=2, patch_embed="conv", aa_block_size=group,
            cached_layer_indices=cached, init_values=1.0,
        )  # fmt: skip
        model.aggregator.patch_embed = vit(
            img_size=56, patch_size=14, embed_dim=32, depth=2, num_heads=2, init_values=None, block_chunks=0,
            num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0,
        )  # fmt: skip
        model.camera_head = camera_class(dim_in=64, trunk_depth=1, num_heads=2, init_values=1.0)
        dpt = dict(features=16, out_channels=[8, 8, 16, 16], intermediate_layer_idx=list(LAYERS))
        model.depth_head = dpt_class(
            dim_in=64, output_dim=2, activation="exp", conf_activation="expp1", **dpt
        )
        model.point_head = dpt_class(
            dim_in=64, output_dim=4, activation="inv_log", conf_activation="expp1", **dpt
        )
        model.track_head = None
        if track:
            model.track_head = track_class(dim_in=64, features=32, iters=2, corr_levels=3, hidden_size=32)
            model.track_head.feature_extractor.intermediate_layer_idx = list(LAYERS)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(
                    0.1 * torch.randn_like(parameter)
                )  # else tokens hardly differ, and norms are all 1
    if all_layers:
        model.aggregator.__class__ = _older(aggregator_class)
        del model.aggregator.cached_layer_indices
    return model.eval()


_OLDER: dict[type, type] = {}


def _older(aggregator_class: type) -> type:
    """The aggregator as it was before `cached_layer_indices`: it returns every layer."""

    class OlderAggregator(aggregator_class):
        def forward(self, images):
            self.cached_layer_indices = range(self.depth)
            try:
                return super().forward(images)
            finally:
                del self.cached_layer_indices

    return _OLDER.setdefault(aggregator_class, OlderAggregator)


def fork_of_vggt(folder: Path, name: str = "vendored_vggt") -> str:
    """Copy the installed vggt into `folder` under another package name, importable from now on."""
    import vggt

    source = Path(next(iter(vggt.__path__)))
    target = folder / name
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "dependency"))
    for file in target.rglob("*.py"):
        text = file.read_text()
        file.write_text(
            text.replace("from vggt.", f"from {name}.").replace("import vggt.", f"import {name}.")
        )
    sys.path.insert(0, str(folder))
    return name


def random_images(
    frames: int = 3, *, batch: int = 1, height: int = 56, width: int = 70, seed: int = 0
) -> torch.Tensor:
    """Images [B, S, 3, H, W] in [0, 1]."""
    return torch.rand(batch, frames, 3, height, width, generator=torch.Generator().manual_seed(seed))


def write_images(folder: Path, count: int, size: tuple[int, int] = (56, 42), seed: int = 0) -> Path:
    """Write pictures of noise to a folder."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:03d}.png")
    return folder


def assert_equal(first, second) -> None:
    """Predictions are the same, to the bit."""
    assert first.keys() == second.keys()
    for key, value in first.items():
        values = zip(value, second[key], strict=True) if isinstance(value, list) else [(value, second[key])]
        for a, b in values:
            assert a.dtype == b.dtype and a.shape == b.shape, key
            assert torch.equal(a, b), f"{key} differs by {(a - b).abs().max():.2e}"


def random_deltas(model, size: float = 0.05, mode: str = "global") -> PaceWeights:
    """Weights that change the blocks and nothing else."""
    weights = PaceWeights.new(model, mode=mode)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in weights.block_deltas.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return weights


def with_heads(model, *heads: tuple[int, int]) -> PaceWeights:
    """Untrained weights of global pruning with these full-attention heads."""
    return replace(PaceWeights.new(model), full_heads=heads)


def run(model, images: torch.Tensor, **kwargs):
    """What a model gives without gradients."""
    with torch.inference_mode():
        return model(images, **kwargs)
