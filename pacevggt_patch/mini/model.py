"""Build VGGT-mini from the installed stock `vggt` package, and save it."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn

from ..errors import PaceError, WeightsError
from ..version import __version__
from ..weights import tensorfile
from ..weights.bundled import bundled_files

KIND = "a VGGT-mini checkpoint"
FORMAT = 2  # 1 had no tensors in 8 bits
BUNDLED_FILE = "vggt-mini.safetensors"
GET_VGGT = (
    "VGGT-mini is built from the stock vggt package, which is not installed: put a git checkout of "
    "facebookresearch/vggt on PYTHONPATH, or on Python 3.10 or 3.11 run `pip install --no-deps feature-3dgs==1.15.1` "
    "and `pip install einops pillow`"
)


@dataclass(frozen=True)
class MiniConfig:
    """Architecture of a VGGT-mini; the defaults are those of the bundled one.

    Attributes:
        image_size: pixels a side of the images that the position embedding is made for; others are interpolated.
        patch_size: pixels a side of a patch.
        embed_dim: channels C of a token.
        num_heads: attention heads of the patch embedding and of alternating attention.
        vit_depth: blocks of the DINO-like ViT that embeds the patches.
        depth: pairs of frame and global blocks.
        cached_layers: the four AA layers that the dense heads read.
        camera_depth: blocks of the camera head.
        camera_heads: attention heads of the camera head.
        dpt_features: width of the dense heads.
        dpt_channels: widths of their four levels.
        layer_scale: LayerScale at initialisation, in alternating attention and the camera head.
        point_head: whether there is a point head beside the depth head.
    """

    image_size: int = 224
    patch_size: int = 14
    embed_dim: int = 256
    num_heads: int = 4
    vit_depth: int = 5
    depth: int = 8
    cached_layers: tuple[int, ...] = (1, 3, 5, 7)
    camera_depth: int = 1
    camera_heads: int = 8
    dpt_features: int = 64
    dpt_channels: tuple[int, ...] = (64, 96, 192, 192)
    layer_scale: float = 0.1
    point_head: bool = True


def build_mini(weights: bool | str | PathLike[str] = True, config: MiniConfig | None = None) -> Any:
    """A VGGT-mini: an instance of the installed stock `VGGT` class with its stock forward, only smaller.

    The global random state is left alone.

    Args:
        weights: True for the bundled checkpoint, False for a random initialisation (the same every time), or the path
            of a checkpoint written by `save_mini`.
        config: architecture of a random initialisation; None takes the defaults. A checkpoint brings its own.

    Returns:
        The model in evaluation mode, float32, on the CPU; `model.mini_config` is its `MiniConfig`. It takes images
        [S, 3, H, W] or [B, S, 3, H, W] in [0, 1] with H and W multiples of the patch size, as any VGGT does.

    Raises:
        WeightsError: the checkpoint is missing, damaged or needs a newer version of this package.
        PaceError: the stock `vggt` is not installed, or `config` is given beside a checkpoint.
    """
    if weights is False:
        return _build(config or MiniConfig())
    if config is not None:
        raise PaceError("a checkpoint brings its own architecture: pass config only with weights=False")
    path = _bundled_checkpoint() if weights is True else weights
    metadata = tensorfile.read_metadata(path, KIND, FORMAT)
    try:
        fields = metadata["config"].items()
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields}
        config = MiniConfig(**values)
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} has damaged metadata: {type(error).__name__}: {error}") from error
    model = _build(config)
    model.load_state_dict(tensorfile.read_tensors(path, KIND, model.state_dict()))
    return model


def save_mini(
    model: Any, path: str | PathLike[str], training: dict[str, Any] | None = None, eight_bits: bool = False
) -> None:
    """Write a VGGT-mini made by `build_mini` as one safetensors file, in float16, at once or not at all.

    Args:
        model: the model; its `mini_config` goes into the file's metadata.
        path: the file; its folder must exist.
        training: how it was trained, as JSON values.
        eight_bits: write matrices in 8 bits, see `tensorfile.in_8_bits`.

    Raises:
        WeightsError: no such folder, or a tensor holds NaN, infinity, or more than float16 can.
        PaceError: `model` was not made by `build_mini`.
    """
    config = getattr(model, "mini_config", None)
    if not isinstance(config, MiniConfig):
        raise PaceError(
            f"{type(model).__name__} has no mini_config: save_mini takes a model made by build_mini"
        )
    state = model.state_dict()
    tensors = (
        tensorfile.in_8_bits(state) if eight_bits else {name: tensor.half() for name, tensor in state.items()}
    )
    metadata = {"library_version": __version__, "config": asdict(config), "training": training or {}}
    tensorfile.write(path, tensors, KIND, FORMAT, metadata)


def _bundled_checkpoint() -> PathLike[str]:
    found = bundled_files(BUNDLED_FILE)
    if not found:
        raise WeightsError(f"this installation lacks {BUNDLED_FILE}: reinstall pacevggt-patch")
    return found[0]


def _build(config: MiniConfig) -> Any:
    try:
        from vggt.heads.camera_head import CameraHead
        from vggt.heads.dpt_head import DPTHead
        from vggt.layers.vision_transformer import DinoVisionTransformer
        from vggt.models.aggregator import Aggregator
        from vggt.models.vggt import VGGT
    except ImportError as error:
        raise PaceError(f"{GET_VGGT} ({error})") from error

    layers = list(config.cached_layers)
    # Older stock aggregators return every layer and know no such argument.
    takes_layers = "cached_layer_indices" in inspect.signature(Aggregator).parameters
    cached = {"cached_layer_indices": config.cached_layers} if takes_layers else {}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.random.default_generator.manual_seed(0)
        # Past VGGT's constructor, which knows only the full size.
        model: Any = object.__new__(VGGT)
        nn.Module.__init__(model)
        model.aggregator = Aggregator(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            patch_embed="conv",
            init_values=config.layer_scale,
            **cached,
        )
        model.aggregator.patch_embed = DinoVisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.embed_dim,
            depth=config.vit_depth,
            num_heads=config.num_heads,
            num_register_tokens=4,
            block_chunks=0,
            interpolate_antialias=True,
            interpolate_offset=0.0,
        )
        model.aggregator.patch_embed.mask_token.requires_grad_(False)
        model.camera_head = CameraHead(
            dim_in=2 * config.embed_dim,
            trunk_depth=config.camera_depth,
            num_heads=config.camera_heads,
            init_values=config.layer_scale,
        )
        # The field of view passes a ReLU: start where it has a gradient.
        nn.init.constant_(model.camera_head.pose_branch.fc2.bias[6:].detach(), 0.3)

        def dense_head(output_dim: int, activation: str) -> nn.Module:
            return DPTHead(
                dim_in=2 * config.embed_dim,
                patch_size=config.patch_size,
                output_dim=output_dim,
                activation=activation,
                conf_activation="expp1",
                features=config.dpt_features,
                out_channels=list(config.dpt_channels),
                intermediate_layer_idx=layers,
            )

        model.point_head = dense_head(4, "inv_log") if config.point_head else None
        model.depth_head = dense_head(2, "exp")
        model.track_head = None
    model.mini_config = config
    return model.eval()
