"""What a model must tell of itself so that it can be accelerated, and the register of families that do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..runtime.bare_copy import unwrapped
from ..runtime.other_parameters import plain_name


@dataclass(frozen=True)
class BackboneSpec:
    """The dimensions of a model that pace weights depend on.

    Attributes:
        embed_dim: channels C of a patch token; cached layers carry 2C (frame and global output concatenated).
        depth: pairs of frame and global blocks.
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
        layers = "/".join(map(str, self.cached_layers))
        return (
            f"C={self.embed_dim}, {self.depth}+{self.depth} blocks, {self.num_heads} heads, patch {self.patch_size}, "
            f"{self.special_tokens} special tokens, cached layers {layers}"
        )


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
    """

    x: Tensor
    positions: Tensor | None
    args: tuple
    kwargs: dict[str, Any]
    at: str | int | None

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
        model: the user's model.
        trunk: the module whose forward embeds images and runs the blocks, by its name in the model.
        trunk_name: that name.
        embedding: module of the trunk whose output is scored, by its name in the trunk.
        embedding_name: that name.
        blocks: (kind, index, module) of all frame and global blocks, in the order in which they run.
        special_tokens: n, tokens in front of a frame's patch tokens.
        patch_size: pixels a side of a patch.
        embed_dim: C.
        depth: pairs of frame and global blocks.
        rope: module that rotates queries and keys, or None.
        camera_head: or None.
        dense_heads: by module name.
        cached_layers: layers whose output the trunk returns.
        reference: a parameter whose device and dtype are the model's.
    """

    family: str
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
    rope: Any
    camera_head: Any
    dense_heads: dict[str, Any]
    cached_layers: tuple[int, ...]

    @property
    def reference(self) -> Tensor:
        raise NotImplementedError

    def block_name(self, kind: str, index: int) -> str:
        """Name of a block in the trunk."""
        return f"{kind}_blocks.{index}"

    def of_kind(self, kind: str) -> list[Any]:
        """The "frame" or "global" blocks."""
        return [module for found, _, module in self.blocks if found == kind]

    def features(self, output: Any) -> Tensor | None:
        """Patch tokens [N, P, C] in what the embedding gave, or None where there are none."""
        return output if isinstance(output, Tensor) and output.ndim == 3 else None

    def block_call(self, args: tuple, kwargs: dict[str, Any]) -> BlockCall | None:
        """A call of a block taken apart, or None where its tokens are not found."""
        raise NotImplementedError

    def check_images(self, images: Any) -> None:
        """Check what enters the trunk before work starts.

        Raises:
            PaceError: wrong shape, dtype, size, device, or NaN.
        """

    def missing_stock_parts(self) -> list[str]:
        """Parts without which the trunk's forward can't be rewritten, which pre-AA pruning does."""
        return [f"the aggregator of a VGGT ({self.family} has another)"]

    # What pre-AA pruning calls, of hosts that lack no stock parts.

    def embed(self, images: Tensor) -> Tensor:
        """Patch tokens [B, S, P, C] of images [B, S, 3, H, W] in [0, 1]."""
        raise NotImplementedError

    def special(self, batch: int, frames: int) -> Tensor:
        """Special tokens [B, S, n, C]."""
        raise NotImplementedError

    def patch_positions(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        """Positions [P, 2] of the patch tokens of a grid, or None."""
        raise NotImplementedError

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

    def fingerprint_tensors(self) -> list[Tensor]:
        """A few tensors that tell two checkpoints apart."""
        raise NotImplementedError

    def attention_output(self, index: int) -> Tensor:
        """The matrix [C, C] from the outputs of all heads of a global block to what it adds to the tokens.

        Raises:
            UnsupportedModelError: the block is of an unsupported type, quantised or offloaded.
        """
        module = unwrapped(self.of_kind("global")[index])
        matrix = getattr(getattr(getattr(module, "attn", None), "proj", None), "weight", None)
        if (
            not isinstance(matrix, Tensor)
            or not matrix.is_floating_point()
            or matrix.ndim != 2
            or matrix.is_meta
        ):
            raise UnsupportedModelError(
                f"global block {index} has no matrix attn.proj.weight in floating point on its device, so what its "
                "heads add to the tokens can't be told: load the model whole and unquantised"
            )
        scale = getattr(getattr(module, "ls1", None), "gamma", None)
        return matrix if scale is None else matrix * scale[:, None]

    def block_parameters(self, kind: str, index: int) -> dict[str, Tensor]:
        """Matrices and vectors of a block by their names in the trunk, without those quantised to integers."""
        name = self.block_name(kind, index)
        return {
            plain_name(f"{name}.{own}"): parameter
            for own, parameter in self.of_kind(kind)[index].named_parameters()
            if parameter.is_floating_point() and parameter.ndim in (1, 2)
        }

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of all blocks, those of frame blocks first."""
        return {
            name: tuple(parameter.shape)
            for kind in ("frame", "global")
            for index in range(self.depth)
            for name, parameter in self.block_parameters(kind, index).items()
        }


def value_range(images: Tensor) -> tuple[float, float]:
    """The least and the largest value of images. Waits for their device."""
    low, high = (value.item() for value in images.detach().aminmax())
    return low, high


def far_from_unit(low: float, high: float) -> bool:
    """Whether images of such values are so far from [0, 1] that they are not divided by 255, or are normalised."""
    return low < -0.5 or high > 1.5


def takes_images(forward: Any) -> bool:
    """Whether a forward says that what it takes first is called images."""
    try:
        return next(iter(inspect.signature(forward).parameters), None) == "images"
    except (TypeError, ValueError):
        return False


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
        raise UnsupportedModelError(f"expected a VGGT model (torch.nn.Module), got {type(model).__name__}")
    kind = type(model).__name__
    reasons = []
    for finder in FAMILIES.values():
        found = finder(model)
        if isinstance(found, Host):
            _check_parameters(kind, found)
            return found
        reasons += [found] if found else []
    for name, inner in model.named_modules():
        if name and any(isinstance(finder(inner), Host) for finder in FAMILIES.values()):
            raise UnsupportedModelError(f"{kind} wraps the model: pass the model itself (model.{name})")
    raise UnsupportedModelError(
        reasons[0] if reasons else f"{kind} has no submodule 'aggregator', so it is not a VGGT"
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
