"""What a model must tell of itself so that it can be accelerated, and the register of families that do."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import PaceError, UnsupportedModelError
from ..runtime.attention import autocast_dtype
from ..runtime.bare_copy import unwrapped
from ..runtime.other_parameters import plain_name
from .rope import ROPE_TABLE


@dataclass(frozen=True)
class BackboneSpec:
    """The dimensions of a model that pace weights depend on.

    Attributes:
        embed_dim: channels C of a patch token; cached layers carry 2C (frame and global output concatenated).
        depth: frame blocks, as many as blocks between frames.
        num_heads: attention heads of a global block; 0 where the block does not tell.
        patch_size: pixels a side of a patch.
        special_tokens: camera and register tokens of a frame, in front of its patch tokens.
        cached_layers: layers whose output the dense heads read.
        family: of models, as in `FAMILIES`.
    """

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    special_tokens: int
    cached_layers: tuple[int, ...]
    family: str = "vggt"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"cached_layers": list(self.cached_layers)}

    def __str__(self) -> str:
        return self.in_words(f"{self.depth}+{self.depth}")

    def in_words(self, blocks: str) -> str:
        """All of them, given the numbers of frame blocks and of blocks between frames."""
        family = "" if self.family == "vggt" else f"{self.family}, "
        layers = "/".join(map(str, self.cached_layers))
        return (
            f"{family}C={self.embed_dim}, {blocks} blocks, {self.num_heads} heads, patch {self.patch_size}, "
            f"{self.special_tokens} special tokens"
        ) + (f", cached layers {layers}" if layers else "")


def says_something(value: Any) -> bool:
    """Whether an argument is on: neither None nor False."""
    return value is not None and value is not False


@dataclass(frozen=True)
class BlockCall:
    """A call of an attention block, taken apart.

    Attributes:
        x: tokens [B, L, C].
        positions: [B, L, 2], or None.
        args, kwargs: all other arguments.
        at: how positions are passed: a keyword, a place among `args`, or None where there are none.
        shared: whether all other arguments are the same for any of the B sequences.
        tables: sines and cosines [P, d] of patches that are among the other arguments, or None.
    """

    x: Tensor
    positions: Tensor | None
    args: tuple
    kwargs: dict[str, Any]
    at: str | int | None
    shared: bool = False
    tables: tuple[Tensor, Tensor] | None = None

    @property
    def plain(self) -> bool:
        """Whether nothing but tokens and positions says what the block does."""
        return not any(map(says_something, (*self.args, *self.kwargs.values())))

    @property
    def given(self) -> set[str]:
        """Names of the arguments beside tokens and positions that say something."""
        named = {name for name, value in self.kwargs.items() if says_something(value)}
        return named | {"a positional argument" for value in self.args if says_something(value)}

    @property
    def cached(self) -> bool:
        """Whether keys are kept from call to call."""
        return any("cache" in name or "past" in name for name in self.given)

    def on(self, x: Tensor, positions: Tensor | None, args: Any = None, kwargs: Any = None) -> BlockCall:
        """The call with other tokens, and other arguments where they are given."""
        more = {
            "args": self.args if args is None else args,
            "kwargs": self.kwargs if kwargs is None else kwargs,
        }
        return replace(self, x=x, positions=positions, **more)

    def arguments(self) -> tuple[tuple, dict[str, Any]]:
        """What to call the block with."""
        args, kwargs = self.args, self.kwargs
        if isinstance(self.at, str):
            kwargs = kwargs | {self.at: self.positions}
        elif self.at is not None:
            args = (*args[: self.at], self.positions, *args[self.at :])
        return (self.x, *args), kwargs


class Host:
    """One model, as the method sees it. An adapter for a family fills the attributes and overrides what differs.

    Blocks and heads are duck-typed modules of the user's model, hence Any.

    Attributes:
        family: name of the family.
        image_argument: what the trunk calls the images, its first argument.
        image_values: what values images have, in words.
        image_limits: values that images have only if they were loaded in another way lie beyond.
        image_advice: what to do with such images.
        position_argument: by what name blocks are given positions.
        by_tables: whether blocks are given sines and cosines in place of positions, see `rope.table_rotation`.
        rope_name: name of `rope` in the trunk.
        model: the user's model.
        trunk: the module whose forward embeds images and runs the blocks: a part of the model, or all of it.
        trunk_name: its name in the model; empty where it is the model itself.
        embedding: module of the trunk that is given images [N, 3, H, W], by its name in the trunk.
        embedding_name: that name.
        embedding_stage: what it does, in a summary.
        blocks: (kind, index, module) of all attention blocks of the trunk, in the order in which they run. Their kinds
            are "frame", "global", "special" for those that special tokens alone enter, which stay as they are, and
            "early" for frame blocks before those whose tokens are scored.
            Pairs of blocks count from 0, and so the indices of a kind may leave some out.
        special_tokens: n, tokens in front of a frame's patch tokens.
        patch_size: pixels a side of a patch.
        embed_dim: C.
        depth: frame blocks, each of which is followed by one of another kind.
        rope: module that rotates queries and keys, or None.
        camera_head: or None.
        dense_heads: by module name.
        cached_layers: layers whose output the trunk returns.
        narrow_weights: whether the whole model runs with weights in half precision.
        own_autocast: whether the model's forward switches autocast on by itself on CUDA, and is never in float32 there.
        reorders_frames: whether its blocks may be given the frames of a clip in another order than the caller gave.
    """

    family: str
    narrow_weights, own_autocast, reorders_frames = False, False, False
    image_argument = "images"
    image_values = "[0, 1]"
    image_limits = (-0.5, 1.5)
    image_advice = "divide 8-bit values by 255, and leave normalisation to the model"
    position_argument = "pos"
    by_tables = False
    rope_name, embedding_stage = "rope", "DINO"
    model: nn.Module
    trunk: Any
    trunk_name: str
    embedding: Any
    embedding_name: str
    blocks: tuple[tuple[str, int, Any], ...]
    special_tokens: int
    patch_size: int
    embed_dim: int
    depth: int
    rope: Any = None
    camera_head: Any = None
    dense_heads: Mapping[str, Any] = MappingProxyType({})
    cached_layers: tuple[int, ...] = ()

    # Parts and their names.

    @property
    def reference(self) -> Tensor:
        """A parameter whose device and dtype are the model's."""
        return next(iter([*self.special_parameters(), *self.of_kind("global")[0].parameters()]))

    @property
    def label(self) -> str:
        """The trunk, in messages: `VGGT.aggregator`, or the model's class."""
        kind = type(self.model).__name__
        return f"{kind}.{self.trunk_name}" if self.trunk_name else kind

    @property
    def itself(self) -> str:
        """The trunk, in sentences about the model."""
        return f"its {self.trunk_name}" if self.trunk_name else "it"

    def part_name(self, name: str) -> str:
        """Name in the model of a part of the trunk."""
        return f"{self.trunk_name}.{name}" if self.trunk_name else name

    def block_name(self, kind: str, index: int) -> str:
        """Name of a block in the trunk."""
        return f"{kind}_blocks.{index}"

    def of_kind(self, kind: str) -> list[Any]:
        """The blocks of a kind."""
        return [module for found, _, module in self.blocks if found == kind]

    def indices(self, kind: str) -> list[int]:
        """The indices of the blocks of a kind."""
        return [index for found, index, _ in self.blocks if found == kind]

    def block(self, kind: str, index: int) -> Any:
        """A block by its kind and index."""
        return next(module for found, number, module in self.blocks if (found, number) == (kind, index))

    def side_blocks(self) -> dict[str, Any]:
        """Attention blocks beside those of the trunk, by their names in the model; compiled where that is asked for."""
        inside = self.part_name(self.embedding_name)
        blocks = getattr(self.embedding, "blocks", ())
        return {f"{inside}.blocks.{index}": module for index, module in enumerate(blocks)}

    def special_parameters(self) -> list[Tensor]:
        """The parameters that special tokens are made of."""
        return []

    # Calls.

    def run_trunk(self, images: Tensor) -> Any:
        """What the trunk gives of images [B, S, 3, H, W] alone."""
        return self.trunk(images)

    def takes_images(self, forward: Any) -> bool:
        """Whether a forward says that what it takes first are images."""
        try:
            return next(iter(inspect.signature(forward).parameters), None) == self.image_argument
        except (TypeError, ValueError):
            return False

    def images_of(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The images among the arguments of a call of the trunk."""
        return args[0] if args else kwargs.get(self.image_argument)

    def block_call(self, args: tuple, kwargs: dict[str, Any]) -> BlockCall | None:
        """A call of a block taken apart, or None where its tokens are not found."""
        kwargs, at = dict(kwargs), self.position_argument
        x, rest = (args[0], args[1:]) if args else (kwargs.pop("x", None), ())
        if not isinstance(x, Tensor) or x.ndim != 3:
            return None
        if isinstance(kwargs.get(at), Tensor):
            return BlockCall(x, kwargs.pop(at), rest, kwargs, at)
        if rest and isinstance(rest[0], Tensor) and rest[0].shape == (*x.shape[:2], 2):
            return BlockCall(x, rest[0], rest[1:], kwargs, 0)
        return BlockCall(x, None, rest, kwargs, None)

    def frame_positions(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        """Positions [L, 2] of a frame's tokens in frame blocks, of hosts whose first block is a global one."""
        return None

    def scored(self, tokens: Tensor) -> Tensor:
        """What patch tokens [N, P, C] that enter the first block are chosen and compared by."""
        return tokens

    def rope_dtype(self, dtype: torch.dtype, narrow: torch.dtype | None) -> torch.dtype:
        """What queries and keys of tokens of a dtype are rotated in, under autocast to `narrow` or without."""
        # Autocast computes norms, and so queries and keys, in float32 at least.
        return dtype if narrow is None else torch.promote_types(dtype, torch.float32)

    def check_images(self, images: Any) -> None:
        """Check what enters the trunk before work starts.

        Raises:
            PaceError: wrong shape, dtype, size, device, or NaN.
        """
        patch = self.patch_size
        if not isinstance(images, Tensor):
            raise PaceError(
                f"images must be a tensor [B, S, 3, H, W] in {self.image_values}, got {type(images).__name__}"
            )
        shape = tuple(images.shape)
        if len(shape) != 5 or shape[2] != 3 or 0 in shape:
            raise PaceError(f"images must be [B, S, 3, H, W] with at least one frame, got {list(shape)}")
        height, width = shape[-2:]
        if height % patch or width % patch:
            raise PaceError(
                f"image height and width must be multiples of {patch}, got {height}x{width}: resize or crop the images"
            )
        if max(height, width) // patch >= ROPE_TABLE:
            raise PaceError(
                f"images are {height}x{width}: sides of {ROPE_TABLE * patch} pixels or more are not supported"
            )
        if not images.is_floating_point():
            raise PaceError(
                f"images must be floating point in {self.image_values}, got {images.dtype}: {self.image_advice}"
            )
        device, weights = self.reference.device, self.reference.dtype
        if images.device != device:
            raise PaceError(
                f'images are on {images.device} but the model is on {device}: call images.to("{device}") '
                "(torch.nn.DataParallel can't run an accelerated model: use one process per GPU)"
            )
        entering = torch.promote_types(images.dtype, self.mean_dtype(images))
        if entering != weights and autocast_dtype(images.device.type) is None:
            raise PaceError(
                f"images are {images.dtype} but the model is {weights}: "
                f"call images.to({weights}), or run under torch.autocast"
            )
        # On CUDA a look at the values would make the host wait. It would cut a compiled graph in two.
        looks = images.device.type == "cpu" and not torch.compiler.is_compiling()
        if not looks:
            return
        low, high = value_range(images)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise PaceError("images hold NaN or infinity: check how they were loaded")
        if self.far_from_range(low, high):
            warnings.warn(
                f"images reach from {low:.3g} to {high:.3g}, and the model expects {self.image_values}: "
                f"{self.image_advice}",
                UserWarning,
                stacklevel=3,
            )

    def mean_dtype(self, images: Tensor) -> torch.dtype:
        """Of what the trunk subtracts from images first, which promotes narrower ones."""
        return images.dtype

    def far_from_range(self, low: float, high: float) -> bool:
        """Whether images of such values were loaded in another way than the model expects."""
        return low < self.image_limits[0] or high > self.image_limits[1]

    def model_images(self, images: Tensor) -> Tensor:
        """What the model is called with for a clip [S, 3, H, W] in [0, 1]."""
        return images[None]

    def run_narrow(self, images: Tensor) -> Any:
        """What a model with weights in half precision gives of such images; of hosts with `narrow_weights`."""
        raise NotImplementedError

    def predictions(self, outputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Cameras and depth in what the model gives for a clip, under VGGT's names.

        `depth` is [1, S, H, W, 1], `depth_conf` [1, S, H, W]. Cameras are `pose_enc` [1, S, 9], as VGGT encodes them,
        or `world_to_camera` [1, S, 3, 4] and `intrinsics` [1, S, 3, 3] in pixels.
        """
        return outputs

    # What can't be had.

    def refusals(self) -> dict[str, str]:
        """Names of settings that can't be followed on this model -> why, for a sentence."""
        if self.dense_heads:
            return {}
        why = f"{type(self.model).__name__} has no dense head that runs a few frames at a time"
        return {"head_dtype": why, "output_device": why}

    def missing_stock_parts(self) -> list[str]:
        """Parts without which the trunk's forward can't be rewritten, which pre-AA pruning does."""
        return ["the parts of VGGT's aggregator"]

    # What pre-AA pruning calls, of hosts that lack no stock parts.

    def features(self, output: Any) -> Tensor | None:
        """Patch tokens [N, P, C] in what the embedding gave, or None where there are none."""
        return output if isinstance(output, Tensor) and output.ndim == 3 else None

    def embed(self, images: Tensor) -> Tensor:
        """Patch tokens [B, S, P, C] of images [B, S, 3, H, W] in [0, 1]."""
        raise NotImplementedError

    def special(self, batch: int, frames: int) -> Tensor:
        """Special tokens [B, S, n, C]."""
        raise NotImplementedError

    def patch_positions(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        """Positions [P, 2] of the patch tokens of a grid, or None."""
        raise NotImplementedError

    # Weights.

    def spec(self) -> BackboneSpec:
        """Its dimensions."""
        read = {i % self.depth for head in self.dense_heads.values() for i in head.intermediate_layer_idx}
        attention = getattr(unwrapped(self.of_kind("global")[0]), "attn", None)
        return BackboneSpec(
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=int(getattr(attention, "num_heads", 0)),
            patch_size=self.patch_size,
            special_tokens=self.special_tokens,
            cached_layers=tuple(sorted(read)) or self.cached_layers,
            family=self.family,
        )

    def __str__(self) -> str:
        within = len(self.of_kind("frame"))
        between = len(self.of_kind("global")) + len(self.of_kind("special"))
        return self.spec().in_words(f"{within}+{between}")

    def fingerprint_tensors(self) -> list[Tensor]:
        """A few tensors that tell two checkpoints apart."""
        blocks = [self.of_kind("frame")[0], self.of_kind("global")[-1]]
        return self.special_parameters() + [p for block in blocks for p in block.parameters()]

    def attention_output(self, index: int) -> Tensor:
        """The matrix [C, C] from the outputs of all heads of a global block to what it adds to the tokens.

        Raises:
            UnsupportedModelError: the block is of an unsupported type, quantised or offloaded.
        """
        module = unwrapped(self.block("global", index))
        matrix = getattr(getattr(getattr(module, "attn", None), "proj", None), "weight", None)
        if (
            not isinstance(matrix, Tensor)
            or not matrix.is_floating_point()
            or matrix.ndim != 2
            or matrix.is_meta
        ):
            raise UnsupportedModelError(
                f"global block {index} has no matrix attn.proj.weight in floating point on its device, so what its "
                "heads add to the tokens can't be told: load the model whole and unquantised, or let its "
                "adapter override attention_output"
            )
        scale = getattr(getattr(module, "ls1", None), "gamma", None)
        return matrix if scale is None else matrix * scale[:, None]

    def block_parameters(self, kind: str, index: int) -> dict[str, Tensor]:
        """Matrices and vectors of a block by their names in the trunk, without those quantised to integers."""
        name = self.block_name(kind, index)
        return {
            plain_name(f"{name}.{own}"): parameter
            for own, parameter in self.block(kind, index).named_parameters()
            if parameter.is_floating_point() and parameter.ndim in (1, 2)
        }

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of all frame and global blocks, those of frame blocks first."""
        return {
            name: tuple(parameter.shape)
            for kind in ("frame", "global")
            for index in sorted(self.indices(kind))
            for name, parameter in self.block_parameters(kind, index).items()
        }


def value_range(images: Tensor) -> tuple[float, float]:
    """The least and the largest value of images. Waits for their device."""
    low, high = (value.item() for value in images.detach().aminmax())
    return low, high


class Package(NamedTuple):
    """Where a model of a family comes from.

    Attributes:
        module, kind: of its class.
        patch_size: pixels a side of a patch.
        source: where its package is to be had.
        checkpoint: Hub id that is loaded where none is given, or None.
        part: name of the part of it that is called with images alone; empty where it is all of it.
        prepare: what is done to a new model so that it takes images alone.
    """

    module: str
    kind: str
    patch_size: int
    source: str
    checkpoint: str | None = None
    part: str = ""
    prepare: Callable[[Any], Any] = lambda model: None


# By the names that commands take; those of VGGT need none.
PACKAGES: dict[str, Package] = {}

# Of a family: makes the Host of a model, or gives a sentence that says why it is none, or None without a clue.
Finder = Callable[[nn.Module], "Host | str | None"]
FAMILIES: dict[str, Finder] = {}


def register_host(family: str) -> Callable[[Finder], Finder]:
    """Make a family known to `find_host`."""

    def add(finder: Finder) -> Finder:
        FAMILIES[family] = finder
        return finder

    return add


def find_host(model: Any) -> Host:
    """The host of a model, by the first family that knows it.

    Raises:
        UnsupportedModelError: none does; names what does not fit and what to do.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a model (torch.nn.Module), got {type(model).__name__}")
    kind = type(model).__name__
    reasons = []
    for finder in FAMILIES.values():
        found = finder(model)
        if isinstance(found, Host):
            _check_parameters(kind, found)
            _check_names(kind, found)
            return found
        reasons += [found] if found else []
    for name, inner in model.named_modules():
        if name and any(isinstance(finder(inner), Host) for finder in FAMILIES.values()):
            raise UnsupportedModelError(f"{kind} wraps the model: pass the model itself (model.{name})")
    known = ", ".join(FAMILIES)
    raise UnsupportedModelError(
        reasons[0]
        if reasons
        else f"{kind} has the parts of none of the models that can be accelerated ({known}): pass one of these"
    )


def _check_parameters(kind: str, host: Host) -> None:
    sharded = next((n for n, p in host.model.named_parameters() if hasattr(p, "placements")), None)
    if sharded is not None:
        raise UnsupportedModelError(
            f"{kind} is sharded ({sharded} is a DTensor): call accelerate before sharding it, or pass a whole model"
        )
    empty = next((n for n, p in host.model.named_parameters() if p.numel() == 0), None)
    if empty is not None:
        raise UnsupportedModelError(
            f"{kind} is sharded ({empty} holds no values here): call accelerate before wrapping it"
        )


def _check_names(kind: str, host: Host) -> None:
    """Raise UnsupportedModelError where a block is not found by the name that the host gives it."""
    for which, index, block in host.blocks:
        name = host.block_name(which, index)
        try:
            found = host.trunk.get_submodule(name)
        except AttributeError:
            found = None
        if found is not block:
            has = "which it has not" if found is None else "which is another block"
            raise UnsupportedModelError(
                f"the adapter of {kind} calls {which} block {index} of {host.label} {name}, {has}: override "
                "block_name, or mend blocks"
            )
