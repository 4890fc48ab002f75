"""The one module that knows how a VGGT looks inside.

Everything is duck-typed: forks and vendored copies of vggt carry other module names, so a host is recognised by
what it has, never by its class. All other modules reach the host through the functions below.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import PaceError, UnsupportedModelError
from ..method.block_deltas import OtherParameters, in_force
from ..method.full_heads import Heads, MatchingHeads
from ..method.propagation import FollowedLayer, Following
from ..runtime.attention import Change, InAttention, autocast_dtype
from ..runtime.chunks import in_chunks
from . import blocks

# Parameters of blocks by their names in the aggregator -> those to run with instead.
Adapt = Callable[[dict[str, Tensor]], dict[str, Tensor]]

AGGREGATOR_PARTS = (
    "patch_embed",
    "frame_blocks",
    "global_blocks",
    "camera_token",
    "register_token",
    "patch_start_idx",
    "patch_size",
    "_resnet_mean",
    "_resnet_std",
    "_process_frame_attention",
    "_process_global_attention",
)
# Rows of the RoPE table: more patches than any image has on a side.
ROPE_TABLE = 1024
# Hidden layers of MLPs stay below this: on the CPU so that memory is used again, see `heads`.
HIDDEN_BYTES = {"cpu": 2**23, "gpu": 2**30}
FINGERPRINT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BackboneSpec:
    """The dimensions of a VGGT that pace weights depend on.

    Attributes:
        embed_dim: channels C of a patch token; cached layers carry 2C (frame and global output concatenated).
        depth: pairs of frame and global blocks.
        num_heads: attention heads of a block.
        patch_size: pixels a side of a patch.
        special_tokens: camera and register tokens of a frame, in front of its patch tokens.
        cached_layers: AA layers whose output the dense heads read.
    """

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    special_tokens: int
    cached_layers: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"cached_layers": list(self.cached_layers)}

    def __str__(self) -> str:
        layers = "/".join(map(str, self.cached_layers))
        return (
            f"C={self.embed_dim}, {self.depth}+{self.depth} blocks, {self.num_heads} heads, patch {self.patch_size}, "
            f"{self.special_tokens} special tokens, cached layers {layers}"
        )


@dataclass(frozen=True)
class Host:
    """The parts of one model instance that the patch touches: modules, but duck-typed ones, hence Any.

    Attributes:
        aggregator: runs DINO and alternating attention.
        rope: its rotary position embedding, if `static_rope` knows how to run it, else None.
        camera_head: None where there is none.
        dense_heads: by module name: depth_head, point_head, track_head.feature_extractor, ...
    """

    aggregator: Any
    rope: Any
    camera_head: Any
    dense_heads: dict[str, Any]


def find_host(model: nn.Module) -> Host:
    """Find the aggregator and the heads of a VGGT.

    Raises:
        UnsupportedModelError: names what does not fit and what to do.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a VGGT model (torch.nn.Module), got {type(model).__name__}")
    kind = type(model).__name__
    for wrapper in ("module", "_orig_mod"):
        inner = model._modules.get(wrapper)
        if inner is not None and hasattr(inner, "aggregator"):
            raise UnsupportedModelError(f"{kind} wraps the model: pass the model itself (model.{wrapper})")
    aggregator: Any = model._modules.get("aggregator")
    if aggregator is None:
        hint = ": pass the VGGT that holds it" if hasattr(model, "frame_blocks") else ""
        raise UnsupportedModelError(f"{kind} has no submodule 'aggregator', so it is not a VGGT{hint}")
    missing = [name for name in AGGREGATOR_PARTS if not hasattr(aggregator, name)]
    if missing:
        raise UnsupportedModelError(
            f"{kind}.aggregator lacks {', '.join(missing)}: only VGGT's alternating-attention aggregator is supported"
        )
    _check_aggregator(kind, aggregator)
    dense_heads = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "intermediate_layer_idx") and not name.startswith("aggregator.")
    }
    for name, head in dense_heads.items():
        too_deep = [i for i in head.intermediate_layer_idx if not -depth(aggregator) <= i < depth(aggregator)]
        if too_deep:
            raise UnsupportedModelError(
                f"{kind}.{name} reads layers {too_deep}, but the aggregator has {depth(aggregator)}"
            )
    rope = getattr(aggregator, "rope", None)
    if rope is not None and static_rope(rope) is None:
        rope = None
    return Host(aggregator, rope, model._modules.get("camera_head"), dense_heads)


def _check_aggregator(kind: str, aggregator: Any) -> None:
    order = getattr(aggregator, "aa_order", ["frame", "global"])
    if sorted(order) != ["frame", "global"]:
        raise UnsupportedModelError(
            f"{kind}.aggregator.aa_order is {order}: expected one 'frame' and one 'global'"
        )
    if len(aggregator.frame_blocks) != len(aggregator.global_blocks):
        raise UnsupportedModelError(
            f"{kind}.aggregator has {len(aggregator.frame_blocks)} frame and {len(aggregator.global_blocks)} global "
            "blocks: expected as many of each"
        )
    special = aggregator.camera_token.shape[2] + aggregator.register_token.shape[2]
    if special != aggregator.patch_start_idx:
        raise UnsupportedModelError(
            f"{kind}.aggregator has {special} camera and register tokens, but patch_start_idx is "
            f"{aggregator.patch_start_idx}: other special tokens are not supported"
        )


def depth(aggregator: Any) -> int:
    """Pairs of frame and global blocks."""
    return len(aggregator.frame_blocks)


def may_wait(model: nn.Module) -> bool:
    """Whether the pruned aggregator may wait for the device, since its rotary embedding is not known."""
    host = find_host(model)
    return getattr(host.aggregator, "rope", None) is not None and host.rope is None


def returned_layers(host: Host) -> tuple[int, ...]:
    """The layers for which the host's aggregator returns a tensor: its cached layers, or all of them.

    Newer hosts return None outside `cached_layer_indices`; older ones return every layer, and callers may read any.
    """
    layers = getattr(host.aggregator, "cached_layer_indices", None)
    if layers is None:
        return tuple(range(depth(host.aggregator)))
    return tuple(sorted(layers))


def spec(host: Host) -> BackboneSpec:
    """The dimensions of the host that pace weights depend on."""
    aggregator = host.aggregator
    n = depth(aggregator)
    read = {i % n for head in host.dense_heads.values() for i in head.intermediate_layer_idx}
    return BackboneSpec(
        embed_dim=aggregator.camera_token.shape[-1],
        depth=n,
        num_heads=int(getattr(aggregator.global_blocks[0].attn, "num_heads", 0)),
        patch_size=int(aggregator.patch_size),
        special_tokens=int(aggregator.patch_start_idx),
        cached_layers=tuple(sorted(read)) or returned_layers(host),
    )


def fingerprints(host: Host) -> dict[str, str]:
    """SHA-256 over a few backbone tensors, one for each dtype the backbone can be cast to.

    Casting to a narrower dtype changes the bits, so a float32 backbone has a fingerprint per dtype, and a backbone
    that is already bfloat16 or float16 has only its own: two models are the same backbone if any dtype they share
    agrees (see `weights.PaceWeights.check`).
    """
    aggregator = host.aggregator
    modules = [aggregator.frame_blocks[0], aggregator.global_blocks[depth(aggregator) - 1]]
    tensors = [aggregator.camera_token, aggregator.register_token]
    tensors += [p for module in modules for p in module.parameters()]
    native = aggregator.camera_token.dtype
    wanted = (
        FINGERPRINT_DTYPES
        if native in (torch.float32, torch.float64)
        else {str(native).split(".")[1]: native}
    )
    result = {}
    for name, dtype in wanted.items():
        digest = hashlib.sha256()
        for tensor in tensors:
            # A few thousand values of each tensor tell two trainings apart; hashing gigabytes would take seconds.
            values = tensor.detach().reshape(-1)[:4096].to("cpu", dtype)
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
        result[name] = digest.hexdigest()
    return result


def check_images(aggregator: Any, images: Tensor, check_finite: bool | None) -> tuple[int, int]:
    """The patch grid (rows, columns) of `images` [B, S, 3, H, W], after checking that the host can take them.

    Raises:
        PaceError: wrong shape, dtype, size, or (where it is checked) NaN or infinity.
    """
    patch = int(aggregator.patch_size)
    if not isinstance(images, Tensor):
        raise PaceError(f"images must be a tensor [B, S, 3, H, W] in [0, 1], got {type(images).__name__}")
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
            f"images must be floating point in [0, 1], got {images.dtype}: divide 8-bit images by 255"
        )
    device, weights = aggregator.camera_token.device, aggregator.camera_token.dtype
    if images.device != device:
        raise PaceError(
            f'images are on {images.device} but the model is on {device}: call images.to("{device}") '
            "(torch.nn.DataParallel can't run an accelerated model: use one process per GPU)"
        )
    # The host subtracts its mean first, which promotes narrower images.
    entering = torch.promote_types(images.dtype, aggregator._resnet_mean.dtype)
    if entering != weights and autocast_dtype(images.device.type) is None:
        raise PaceError(
            f"images are {images.dtype} but the model is {weights}: "
            f"call images.to({weights}), or run under torch.autocast"
        )
    if check_finite is None:  # a look at values would cut a compiled graph in two, and make CUDA wait
        check_finite = images.device.type == "cpu" and not torch.compiler.is_compiling()
    if check_finite and not torch.isfinite(images).all():
        raise PaceError("images hold NaN or infinity: check how they were loaded")
    return height // patch, width // patch


def patch_tokens(aggregator: Any, images: Tensor, frames_per_chunk: int | None = None) -> Tensor:
    """DINO patch tokens [B, S, P, C] of `images` [B, S, 3, H, W] in [0, 1].

    The tokens are made a chunk of frames at a time (None: as many as `HIDDEN_BYTES` allow), which bounds the memory of
    the hidden layers.
    """
    if frames_per_chunk is None:
        patches = images.shape[-2] * images.shape[-1] // int(aggregator.patch_size) ** 2
        frames_per_chunk = chunk_frames(patches, aggregator.camera_token.shape[-1], images.device)
    mean, std = (t.reshape(1, 3, 1, 1) for t in (aggregator._resnet_mean, aggregator._resnet_std))
    chunks = []
    for frames in images.flatten(0, 1).split(frames_per_chunk):  # [n, 3, H, W]
        tokens = aggregator.patch_embed((frames - mean) / std)
        chunks.append(tokens["x_norm_patchtokens"] if isinstance(tokens, dict) else tokens)  # [n, P, C]
    tokens = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
    return tokens.unflatten(0, images.shape[:2])


def chunk_frames(tokens: int, channels: int, device: torch.device) -> int:
    """Frames of so many tokens each whose hidden layers in an MLP stay below `HIDDEN_BYTES`; at least one."""
    hidden = 4 * channels * tokens * 4  # bytes of a frame, float32
    return max(1, HIDDEN_BYTES["cpu" if device.type == "cpu" else "gpu"] // hidden)


def special_tokens(aggregator: Any, batch: int, frames: int) -> Tensor:
    """Camera and register tokens [B, S, n, C]: index 0 of the parameters for the first frame, index 1 for the rest."""
    tokens = torch.cat([aggregator.camera_token, aggregator.register_token], dim=2)  # [1, 2, n, C]
    first, others = tokens[:, :1], tokens[:, 1:].expand(-1, frames - 1, -1, -1)
    return torch.cat([first, others], dim=1).expand(batch, -1, -1, -1)


def rope_positions(aggregator: Any, grid: tuple[int, int], device: torch.device) -> Tensor | None:
    """RoPE positions [P, 2] of the patch tokens, (y + 1, x + 1); special tokens sit at 0. None without RoPE."""
    if getattr(aggregator, "rope", None) is None:
        return None
    rows, columns = (torch.arange(n, device=device) for n in grid)
    return torch.cartesian_prod(rows, columns).view(-1, 2) + 1


def unpruned_tokens(
    aggregator: Any, images: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What enters alternating attention in the stock model.

    Args:
        aggregator: the host's aggregator.
        images: [B, S, 3, H, W].
        grid: patch rows and columns.

    Returns:
        DINO features [B, S, P, C], the tokens with special ones first [B, S, n + P, C], and their RoPE positions
        [B, S, n + P, 2], or None.
    """
    batch, frames = images.shape[:2]
    features = patch_tokens(aggregator, images)
    special = special_tokens(aggregator, batch, frames)
    positions = rope_positions(aggregator, grid, images.device)
    if positions is not None:  # special tokens sit at 0
        positions = F.pad(positions, (0, 0, special.shape[2], 0)).repeat(batch, frames, 1, 1)
    return features, torch.cat([special, features], dim=2), positions


def alternating_attention(
    aggregator: Any,
    tokens: Tensor,
    positions: Tensor | None,
    layers: tuple[int, ...],
    checkpointing: bool = False,
    change: Change | None = None,
    adapt: Adapt | None = None,
    following: Following | None = None,
    matching: Heads = (),
) -> dict[int, Any]:
    """Run the frame and global blocks, by the host's own functions.

    Args:
        aggregator: the host's aggregator.
        tokens: [B, S, L, C], special tokens first.
        positions: RoPE positions [B, S, L, 2], or None.
        layers: the layers whose output is wanted.
        checkpointing: keep only the tokens between blocks for the backward pass, and compute the blocks once more.
        change: of what goes into the attention of every global block, see `attention.InAttention`.
        adapt: gives the parameters that blocks run with in place of their own.
        following: global blocks run on special and kept tokens alone, and all others follow.
        matching: (block, head) of the heads that see all tokens nevertheless.

    Returns:
        layer index -> [B, S, L, 2C], frame and global output concatenated; with `following` a `FollowedLayer`.
    """
    inside = change is not None or adapt is not None or (following is not None and bool(matching))
    if aggregator.training and torch.is_grad_enabled() and inside:
        # The host's own checkpoints would run blocks again after what is in force here has ended: ours take over.
        checkpointing, aggregator = True, copy.copy(aggregator)
        aggregator.__dict__["training"] = False
    batch, frames, length, channels = tokens.shape
    tokens = tokens.flatten(0, 1)  # the host's own functions move between [B*S, L, C] and [B, S*L, C]
    process = {"frame": aggregator._process_frame_attention, "global": aggregator._process_global_attention}
    if following is not None:
        process["frame"] = partial(_run_in_chunks, process["frame"])
    if adapt is not None:
        process = {kind: partial(_run_adapted, aggregator, kind, adapt, run) for kind, run in process.items()}
    if following is not None and matching:  # inside of what changes keys, which are those of the kept tokens
        process["global"] = partial(_run_matching, following, matching, process["global"])
    if change is not None:
        process["global"] = partial(_run_changed, change, process["global"])
    if following is not None:
        # First blocks of those that run together, where one of them has such heads.
        together = range(getattr(aggregator, "aa_block_size", 1))
        whole = {block - i for block, _ in matching for i in together}
        process["global"] = partial(_run_followed, following, whole, process["global"])
    done = dict.fromkeys(process, 0)  # blocks run so far
    outputs: dict[int, Any] = {}
    with nullcontext() if torch.compiler.is_compiling() else _shared_rotations():
        while done["frame"] < depth(aggregator):
            first, before = done["frame"], tokens[:0]  # until something enters global attention
            wanted: dict[str, dict[int, Any]] = {}
            for kind in getattr(aggregator, "aa_order", ("frame", "global")):
                run = (
                    partial(checkpoint, process[kind], use_reentrant=False)
                    if checkpointing
                    else process[kind]
                )
                entering = tokens.view(batch, frames, length, channels)
                tokens, done[kind], intermediates = run(
                    tokens, batch, frames, length, channels, done[kind], pos=positions
                )
                wanted[kind] = {i: t for i, t in enumerate(intermediates, first) if i in layers}
                if kind == "global" and following is not None:
                    before = entering
                # A layer that nobody asked for is not held while the next block runs.
                del intermediates, entering
            for layer in wanted["frame"]:
                if following is None:
                    outputs[layer] = torch.cat([wanted[kind][layer] for kind in process], dim=-1)
                else:
                    outputs[layer] = FollowedLayer(wanted["frame"][layer], before, *wanted["global"][layer])
            del before
    return outputs


def _run_in_chunks(
    process: Callable, tokens: Tensor, batch: int, frames: int, length: int, channels: int, *args, pos
):
    """Run frame blocks on a few frames at a time, which bounds the memory of their hidden layers.

    All frames have the same positions.
    """
    whole = tokens.view(batch * frames, length, channels)
    after = []  # number of the block that comes next

    def some(part: Tensor) -> tuple[Tensor, ...]:
        # The same tensor for all parts: its cosines and sines are looked up once.
        place = None if pos is None else pos.view(len(whole), length, 2)[: len(part)]
        part, block, intermediates = process(part, 1, len(part), length, channels, *args, pos=place)
        after.append(block)
        # The output of the last block is what goes on: one tensor for both.
        return part, *(output.flatten(0, 1) for output in intermediates[:-1])

    tokens, *earlier = in_chunks(some, chunk_frames(length, channels, tokens.device), whole)
    outputs = [output.view(batch, frames, length, channels) for output in (*earlier, tokens)]
    return tokens, after[0], outputs


def _run_followed(
    following: Following,
    whole: Collection[int],
    process: Callable,
    tokens: Tensor,
    batch: int,
    frames: int,
    length: int,
    channels: int,
    *args,
    pos,
):
    """Run global blocks on the special and kept tokens, then let the others follow.

    Of single blocks it gives the outputs of special and kept tokens, and the slope by which others follow them. Blocks
    of `whole` take all tokens, and nobody follows.
    """
    if args[0] in whole:
        tokens, block, intermediates = process(tokens, batch, frames, length, channels, *args, pos=pos)
        return tokens, block, [(output, None) for output in intermediates]
    dense = tokens.view(batch * frames, length, channels)
    few = following.compact(dense)
    after, block, intermediates = process(
        few, batch, frames, few.shape[1], channels, *args, pos=following.positions
    )
    followed = [(output, following.slope(few, output.view(few.shape), batch)) for output in intermediates]
    # The output of the last block is what goes on.
    return following.follow(dense, after.view(few.shape), followed[-1][1]), block, followed


def _run_matching(
    following: Following,
    heads: Heads,
    process: Callable,
    tokens: Tensor,
    *args,
    **kwargs,
):
    """Run global blocks; where they are given all tokens, only some heads see them."""
    _, _, length, _, block = args  # (tokens, batch, frames, length, channels, block)
    if length != following.weights.shape[1]:
        return process(tokens, *args, **kwargs)
    mode = MatchingHeads(following, heads, block)
    with mode:
        result = process(tokens, *args, **kwargs)
    mode.check_number(result[1])
    return result


def _run_changed(change: Change, process: Callable, tokens: Tensor, *args, **kwargs):
    """Run global blocks with a change of their attention, also where a checkpoint runs them once more."""
    with InAttention(change, args[4]):  # (tokens, batch, frames, length, channels, block)
        return process(tokens, *args, **kwargs)


def attention_output(aggregator: Any, block: int) -> Tensor:
    """The matrix [C, C] from the outputs of all heads of a global block to what it adds to the tokens.

    Raises:
        UnsupportedModelError: the block is of another make, quantised or offloaded.
    """
    module = aggregator.global_blocks[block]
    module = module._modules.get("_orig_mod", module)
    matrix = getattr(getattr(getattr(module, "attn", None), "proj", None), "weight", None)
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point() or matrix.ndim != 2 or matrix.is_meta:
        raise UnsupportedModelError(
            f"global block {block} has no matrix attn.proj.weight in floating point on its device, so what its heads "
            "add to the tokens can't be told: load the model whole and unquantised"
        )
    scale = getattr(getattr(module, "ls1", None), "gamma", None)
    return matrix if scale is None else matrix * scale[:, None]


def block_parameters(aggregator: Any, kind: str, first: int, blocks: int) -> dict[str, Tensor]:
    """Matrices and vectors of "frame" or "global" blocks by their names in the aggregator.

    Parameters of other shapes, and what is quantised to integers, are left out. A compiled block has the names that it
    had before.
    """
    modules = getattr(aggregator, f"{kind}_blocks")
    return {
        f"{kind}_blocks.{i}.{name}".replace("_orig_mod.", ""): parameter
        for i in range(first, first + blocks)
        for name, parameter in modules[i].named_parameters()
        if parameter.is_floating_point() and parameter.ndim in (1, 2)
    }


def all_block_parameters(aggregator: Any) -> dict[str, Tensor]:
    """Parameters of all frame and global blocks by their names in the aggregator."""
    kinds = ("frame", "global")
    return {
        name: p
        for kind in kinds
        for name, p in block_parameters(aggregator, kind, 0, depth(aggregator)).items()
    }


class _Around(nn.Module):
    """A function of a module as the forward of another, so that `functional_call` can run it."""

    def __init__(self, aggregator: nn.Module):
        super().__init__()
        self.aggregator = aggregator

    def forward(self, process: Callable, *args, **kwargs):
        return process(*args, **kwargs)


def block_shapes(aggregator: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of `all_block_parameters`."""
    return {name: tuple(parameter.shape) for name, parameter in all_block_parameters(aggregator).items()}


def _run_adapted(
    aggregator: Any, kind: str, adapt: Adapt, process: Callable, tokens: Tensor, *args, **kwargs
):
    """Run blocks with other parameters than their own, also where a checkpoint runs them once more."""
    first = args[4]  # (tokens, batch, frames, length, channels, block)
    count = getattr(aggregator, "aa_block_size", 1)
    own = block_parameters(aggregator, kind, first, count)
    changed = adapt(own)
    if torch.compiler.is_compiling():  # traced, not run: no other thread meets what is swapped meanwhile
        others = {f"aggregator.{name}": parameter for name, parameter in changed.items()}
        call = process, tokens, *args
        result = torch.func.functional_call(_Around(aggregator), others, call, kwargs, tie_weights=False)
    else:
        with OtherParameters({id(own[name]): parameter for name, parameter in changed.items()}):
            result = process(tokens, *args, **kwargs)
    if result[1] != first + count:
        raise UnsupportedModelError(
            f"{type(aggregator).__name__}._process_{kind}_attention ran {result[1] - first} blocks where {count} were "
            "expected (aa_block_size), so the trained changes of blocks can't be applied: pass weights=None"
        )
    return result


def static_rope(rope: Any) -> Any:
    """A copy of the host's RoPE for `rotate`, or None where the host's does something else.

    The copy has tables of its own, so that the host's stay as they are. Whether `rotate` does what the host does is
    tried on a small example, since forks may change one and not the other.
    """
    if not hasattr(rope, "_compute_frequency_components"):
        return None
    static = copy.copy(rope)
    static.__dict__.pop("forward", None)
    static.frequency_cache = {}
    tokens = torch.linspace(-1, 1, 32).view(1, 1, 4, 8)
    positions = torch.tensor([[[0, 0], [1, 2], [3, 1], [2, 5]]])
    try:
        known = torch.equal(type(rope).forward(static, tokens, positions), rotate(static, tokens, positions))
    except Exception:  # whatever a RoPE of another make trips over
        known = False
    return static if known else None


def rotate(rope: Any, tokens: Tensor, positions: Tensor) -> Tensor:
    """Apply RoPE without the host's look at the largest position, which waits for the device in every block.

    The table has the same rows whatever its length, and every channel sees the host's two products and their sum, so
    the outputs are the host's own.

    Args:
        rope: of `static_rope`.
        tokens: queries or keys [B, heads, L, D].
        positions: [B, L, 2].
    """
    cos, sin = _rotation(rope, tokens.shape[-1], tokens.dtype, positions)
    # Each half of the channels, for y and for x, turns its own two halves against each other.
    # Not by `unflatten`, which compilers can't trace under a function mode.
    turned = tokens.reshape(*tokens.shape[:-1], 2, 2, -1).flip(-2).flatten(-3)
    return (tokens * cos).add_(turned.mul_(sin))


def _rotation(rope: Any, width: int, dtype: torch.dtype, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, L, D] of `positions` [B, L, 2] for heads of D = `width`, those of the first halves
    negative.

    Inside `_shared_rotations` they are gathered once: every block asks for the same positions twice.
    """
    known = None if torch.compiler.is_compiling() else getattr(_rotations, "known", None)
    # A fake tensor lies nowhere.
    if known is None or type(positions) is not Tensor or not positions.is_contiguous():
        return gathered_rotation(rope, width, dtype, positions)
    key = (id(rope), positions.data_ptr(), positions.numel(), width, dtype)
    if key not in known:
        # The entry holds the positions: what lies at their address stays what it is.
        known[key] = positions, gathered_rotation(rope, width, dtype, positions)
    cos, sin = known[key][1]
    shape = (len(positions), 1, positions.shape[1], width)
    return cos.view(shape), sin.view(shape)


def gathered_rotation(rope: Any, width: int, dtype: torch.dtype, positions: Tensor) -> tuple[Tensor, Tensor]:
    """`_rotation` as it is made: from the host's tables, looked up row by row."""
    half = width // 2
    cos, sin = rope._compute_frequency_components(half, ROPE_TABLE, positions.device, dtype)  # [rows, half]
    sin = torch.cat([-sin[:, : half // 2], sin[:, half // 2 :]], dim=-1)
    cos, sin = (F.embedding(positions, table).flatten(-2).unsqueeze(1) for table in (cos, sin))
    return cos, sin


def fast_blocks(aggregator: Any, rope: Any) -> dict[str, Any]:
    """The blocks of DINO and of alternating attention that `run_fast_block` can run, by name in the aggregator.

    Args:
        aggregator: the host's aggregator.
        rope: of `static_rope`, or None where the host's rotary embedding is not known.
    """
    lists = {
        "patch_embed.blocks": getattr(aggregator.patch_embed, "blocks", ()),
        "frame_blocks": aggregator.frame_blocks,
        "global_blocks": aggregator.global_blocks,
    }
    channels, found, known = aggregator.camera_token.shape[-1], {}, {}
    for name, modules in lists.items():
        for i, module in enumerate(modules):
            own = getattr(getattr(module, "attn", None), "rope", None)
            if own is not None and (rope is None or own is not aggregator.rope):
                continue
            make = blocks.make(module)
            if make not in known:
                rotate = partial(_flat_rotation, dtype=torch.float32)
                known[make] = blocks.is_block(module, channels, rotate)
            if known[make]:
                found[f"{name}.{i}"] = module
    return found


def run_fast_block(
    module: Any, rope: Any, x: Tensor, positions: Tensor | None, speed: blocks.Speed
) -> Tensor:
    """One of the `fast_blocks` on tokens [B, L, C], with the parameters that are in force where it is called.

    Args:
        module: the block.
        rope: as above.
        x: tokens.
        positions: RoPE positions [B, L, 2], or None.
        speed: see `blocks.run_block`.
    """
    narrow = autocast_dtype(x.device.type)
    rotation = None
    if module.attn.rope is not None and positions is not None:
        # Norms, and so queries and keys, are float32 at least under autocast.
        dtype = x.dtype if narrow is None else torch.promote_types(x.dtype, torch.float32)
        rotation = _flat_rotation(rope, positions, x.shape[-1] // module.attn.num_heads, dtype)
    dtype = x.dtype if narrow is None else narrow
    rows = chunk_frames(1, x.shape[-1], x.device)  # tokens: frames of one token each
    out = blocks.run_block(module, x.flatten(0, 1), rotation, len(x), dtype, speed, in_force, rows)
    return out.view(x.shape)


def _flat_rotation(rope: Any, positions: Tensor, width: int, dtype: torch.dtype) -> blocks.Rotation:
    """`_rotation` as [B * L, D]."""
    cos, sin = (t.reshape(-1, width) for t in _rotation(rope, width, dtype, positions))
    return cos, sin


_rotations = threading.local()


@contextmanager
def _shared_rotations() -> Generator[None]:
    """Blocks that run inside, in this thread, share the cosines and sines of their positions."""
    before = getattr(_rotations, "known", None)
    _rotations.known = {}
    try:
        yield
    finally:
        _rotations.known = before
