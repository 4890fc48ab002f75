"""A stock attention block as functions of tokens, cut where attention mixes them: the same arithmetic, fit to compile.

What comes before and after attention works token by token on `[T, C]`, with the parameters as arguments. So DINO, frame
and global blocks and clips of any length share a few compiled functions. Norms, activations, scales, residuals and the
rotary embedding are computed in float32 at least, and rounded where they are stored.

This module knows the names inside a block, and no other does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.attention import attention, pick_heads
from ..runtime.bare_copy import bare_copy
from ..runtime.chunks import in_chunks
from ..runtime.compiling import unwatched
from .rope import Rotation, rotation, static_rope, table_rotation

# What torch keeps in every module.
INTERNALS = nn.Module().__dict__.keys()
# A function, and what it is compiled for -> the function to call in its place.
Speed = Callable[..., Callable[..., Any]]
# Numbers of the heads whose queries, keys and values are wanted.
Wanted = tuple[Sequence[int], Sequence[int], Sequence[int]]
# Of tokens [T, C], their rotation, and which are wanted (all if not given), gives queries, keys and values
# [sequences, heads, L, d], but for those of no heads.
Project = Callable[..., list[Tensor]]
# Parameters of a block: of what comes before attention, and of what comes after it.
BEFORE = [f"{m}.{p}" for m in ("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm") for p in ("weight", "bias")]
# Layers of the network: with GELU, or with a gate (SwiGLU), whose first layer gives gate and values.
PLAIN, GATED = ("mlp.fc1", "mlp.fc2"), ("mlp.w12", "mlp.w3")


def before_attention(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    parameters: list[Tensor | None],
    heads: tuple[int, int, int],
    eps: tuple[float, float, float],
    dtype: torch.dtype,
    parts: int = 2,
) -> tuple[Tensor, ...]:
    """Queries, keys and values `[..., heads, d]` of tokens `[..., C]`, but for those of no heads.

    Args:
        x: tokens.
        cos: `[..., d]` cosines of the rotary embedding, or None without it.
        sin: its sines, those of the first half of each part of the channels negative.
        parameters: weights and biases of the norm, of the joint projection and of query and key norms; None where there
            is none.
        heads: how many of queries, of keys and of values the joint projection has.
        eps: of the norm before attention, of the query and of the key norm.
        dtype: what matrix products are computed in.
        parts: in which the channels of a head are rotated: two, for y and x, or one.
    """
    norm_weight, norm_bias, weight, bias, *head_norms = parameters
    joint = linear(normed(x, norm_weight, norm_bias, eps[0], dtype), weight, bias, dtype)
    query, key, value = joint.unflatten(-1, (sum(heads), -1)).split(heads, -2)
    if heads[0]:
        query = turned(query, cos, sin, head_norms[0], head_norms[1], eps[1], parts)
    if heads[1]:
        key = turned(key, cos, sin, head_norms[2], head_norms[3], eps[2], parts)
    return tuple(part for part, count in zip((query, key, value), heads, strict=True) if count)


def turned(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    parts: int,
) -> Tensor:
    """Queries or keys `[..., heads, d]`, normalised and turned by the rotary embedding."""
    out = wide(x)
    if weight is not None:
        out = normed(out, weight, bias, eps, out.dtype)
    if cos is not None and sin is not None:
        # Each part of the channels turns its own two halves against each other.
        other = out.unflatten(-1, (parts, 2, -1)).roll(1, -2).flatten(-3)
        out = torch.addcmul(out * cos.unsqueeze(-2), other, sin.unsqueeze(-2))
    return out.to(x.dtype)


def after_attention(
    x: Tensor, attended: Tensor, parameters: list[Tensor | None], eps: float, dtype: torch.dtype
) -> Tensor:
    """Tokens `[..., C]` after a block, given what its attention returned, in the same shape.

    `parameters` are the weights and biases of the projection, the second norm and both layers of the network, then the
    two layer scales; None where there is none.
    """
    weight, bias, norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, *scales = parameters
    x = added(x, linear(attended, weight, bias, dtype), scales[0])
    hidden = linear(normed(x, norm_weight, norm_bias, eps, dtype), weight_in, bias_in, dtype)
    assert weight_out is not None
    if hidden.shape[-1] == weight_out.shape[1]:
        hidden = F.gelu(hidden)
    else:
        gate, values = hidden.chunk(2, -1)
        hidden = F.silu(gate) * values
    return added(x, linear(hidden, weight_out, bias_out, dtype), scales[1])


def added(x: Tensor, change: Tensor, scale: Tensor | None) -> Tensor:
    """Tokens and the scaled change of a layer, in the dtype that the host's sum has."""
    dtype = torch.promote_types(x.dtype, change.dtype)
    if scale is None:
        return (wide(x) + wide(change)).to(dtype)
    dtype = torch.promote_types(dtype, scale.dtype)
    return torch.addcmul(*(wide(t).to(wide(x).dtype) for t in (x, change, scale))).to(dtype)


def normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """Layer norm over the last dimension, computed in float32 at least."""
    x = wide(x)
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(dtype)


def linear(x: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert weight is not None
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def run_block(
    module: Any,
    x: Tensor,
    rotation: Rotation | None,
    sequences: int,
    dtype: torch.dtype,
    speed: Speed | None = None,
    others: Mapping[str, Tensor] = {},
    rows: int = sys.maxsize,
    attend: Callable[[Project, Tensor, Rotation | None], Tensor] | None = None,
    by_tables: bool = False,
) -> Tensor:
    """A stock block on tokens `[..., C]`, attention running within each of `sequences` equal parts.

    Args:
        module: the block.
        x: tokens.
        rotation: of its tokens; not used by a block without rotary embedding.
        sequences: number of sequences that the tokens are, one after another.
        dtype: what matrix products are computed in.
        speed: gives the function to call in place of one of the two above, given what else it is called with; None
            calls them as they are.
        others: what to take in place of parameters, by their names in the block.
        rows: tokens at a time, but for attention itself.
        attend: gives the outputs of all heads [..., C], of what projects tokens, the tokens and their rotation; None
            lets all tokens of a sequence attend to each other.
        by_tables: whether the rotation is that of `rope.table_rotation`.
    """
    heads = module.attn.num_heads
    before, after = (
        [parameter(module, name, others) for name in names] for names in (BEFORE, after_names(module))
    )
    turned = rotation if by_tables or getattr(module.attn, "rope", None) is not None else None
    halved = 1 if by_tables else 2
    norms = (getattr(module.attn, name, None) for name in ("q_norm", "k_norm"))
    eps = (module.norm1.eps, *(getattr(norm, "eps", 0.0) for norm in norms))
    # With shapes of parameters in the key no other width makes them dynamic.
    shapes = [tuple(None if p is None else p.shape for p in parameters) for parameters in (before, after)]
    compiles = speed is not None
    speed = speed or (lambda function, *_: function)
    first = speed(before_attention, shapes[0], turned is None, heads, eps, dtype, halved)
    last = speed(after_attention, shapes[1], module.norm2.eps, dtype)
    every: Wanted = (range(heads), range(heads), range(heads))

    def project(some: Tensor, rotation: Rotation | None, wanted: Wanted = every) -> list[Tensor]:
        # What is compiled makes all heads: compiling it for each choice would take longer than that saves.
        made = every if compiles else wanted
        parameters = [*before[:2], *(rows_of_heads(p, made, heads) for p in before[2:4]), *before[4:]]
        counts = tuple(map(len, made))

        def part(*chunk: Any) -> tuple[Tensor, ...]:
            found = first(*chunk, parameters, counts, eps, dtype, halved)
            if made == wanted:
                return found
            pairs = zip(found, wanted, strict=True)
            return tuple(t if len(some) == heads else pick_heads(t, some) for t, some in pairs if some)

        parts = in_chunks(part, rows, some, *(rotation or (None, None)))
        return [part.unflatten(0, (sequences, -1)).transpose(1, 2) for part in parts]

    attended = (attend or attend_all)(project, x, turned).reshape(x.shape)
    return in_chunks(lambda *some: (last(*some, after, module.norm2.eps, dtype),), rows, x, attended)[0]


def rows_of_heads(parameter: Tensor | None, wanted: Wanted, heads: int) -> Tensor | None:
    """Of a weight or bias [3 * heads * d, ...] of a joint projection, the rows of some heads."""
    if parameter is None or all(len(part) == heads for part in wanted):
        return parameter
    parts = parameter.unflatten(0, (3, heads, -1))
    return torch.cat([parts[i, head] for i, part in enumerate(wanted) for head in part])


def attend_all(project: Project, x: Tensor, rotation: Rotation | None) -> Tensor:
    """Outputs of all heads where every token attends to all of its sequence."""
    query, key, value = project(x, rotation)
    return attention(query, key, value).transpose(1, 2)


def parameter(module: Any, name: str, others: Mapping[str, Tensor]) -> Tensor | None:
    """A parameter of a block by its name, or what is taken in its place; None where there is none."""
    *parts, last = name.split(".")
    for part in parts:
        module = getattr(module, part, None)
    found = others[name] if name in others else getattr(module, last, None)
    # DINOv3 takes keys without their part of the joint bias.
    mask = getattr(module, f"{last}_mask", None)
    return found if found is None or mask is None else found * mask.to(found.dtype)


def after_names(module: Any) -> list[str]:
    """Names of the parameters of what comes after attention."""
    network = GATED if hasattr(module.mlp, "w12") else PLAIN
    names = [f"{m}.{p}" for m in ("attn.proj", "norm2", *network) for p in ("weight", "bias")]
    return [*names, "ls1.gamma", "ls2.gamma"]


def flat_rotation(
    rope: Any, positions: Tensor, width: int, dtype: torch.dtype, get: Callable[..., Rotation] = rotation
) -> Rotation:
    """Cosines and sines [B * L, D] of positions [B, L, 2], by `get`, which may remember them."""
    cos, sin = (t.reshape(-1, width) for t in get(rope, width, dtype, positions))
    return cos, sin


def of_sequences(rotation: Rotation, count: int) -> Rotation:
    """Cosines and sines [count * L, D] of sequences that share theirs, [L, D]."""
    cos, sin = (t.expand(count, *t.shape).flatten(0, 1) for t in rotation)
    return cos, sin


def stock_blocks(
    modules: Iterable[Any], channels: int, rope: Any, argument: str = "pos", by_tables: bool = False
) -> set[int]:
    """`id` of those blocks that `run_block` can run.

    Args:
        modules: blocks.
        channels: C.
        rope: rotary embedding that `rope.rotation` knows, or None: blocks with another one are left out.
        argument: by what name blocks take positions.
        by_tables: whether they take sines and cosines in place of positions, see `rope.table_rotation`.
    """
    found, known = set(), {}
    for module in modules:
        own = getattr(getattr(module, "attn", None), "rope", None)
        if own is not None and own is not rope:
            continue
        like = make(module)
        if like not in known:
            known[like] = is_block(module, channels, argument, by_tables)
        if known[like]:
            found.add(id(module))
    return found


def kinds(module: Any) -> tuple[type, ...]:
    """The classes of a block and of all its parts."""
    return tuple(type(part) for part in module.modules())


def make(module: Any) -> tuple:
    """What two blocks have in common that differ in the values of their parameters only.

    A part with settings that are no plain values has nothing in common with others: it must be the same one.
    """
    parts: list[Any] = []
    for name, part in module.named_modules():
        own = {k: v for k, v in part.__dict__.items() if k not in INTERNALS}
        plain = {k: v for k, v in own.items() if _is_plain(v)}
        if len(plain) < len(own):
            parts.append(id(part))
        shapes = tuple((n, None if p is None else (p.shape, p.dtype)) for n, p in part._parameters.items())
        parts.append((name, type(part), tuple(sorted(plain.items())), shapes, tuple(part._buffers)))
    return tuple(parts)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str, torch.dtype, type(None)))


def is_block(module: Any, channels: int, argument: str = "pos", by_tables: bool = False) -> bool:
    """Whether `run_block` does what this block does, tried on a small example in float32 on the CPU.

    Forks may change a part and keep its name. The block itself is not run, and its values are not looked at.

    Args:
        module: any module.
        channels: C.
        argument: by what name it takes positions.
        by_tables: whether it takes sines and cosines, or none.
    """
    try:
        rope = getattr(module.attn, "rope", None)
        generator = torch.Generator("cpu").manual_seed(0)

        def values(parameter: Tensor) -> Tensor:
            if not parameter.is_floating_point():
                raise TypeError("quantised")
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0
            return scale * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float32, device="cpu"
            )

        bare = bare_copy(module, values)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            x = torch.randn(2, 24, channels, generator=generator, dtype=torch.float32, device="cpu")
            positions = torch.randint(0, 9, (2, 24, 2), generator=generator, device="cpu")
            where = {} if rope is None else {argument: positions}
            tables, turned = (), None
            width = channels // bare.attn.num_heads
            if rope is not None:
                turned = flat_rotation(static_rope(bare.attn.rope), positions, width, torch.float32)
            elif by_tables:
                tables = (torch.randn(2, 20, width, generator=generator, dtype=torch.float32, device="cpu"),)
                turned = of_sequences(table_rotation(*tables, x.shape[1]), len(x))
            theirs = type(module).forward(bare, x, *tables, **where)
            ours = run_block(bare, x.flatten(0, 1), turned, 2, torch.float32, by_tables=by_tables)
        error = (theirs - ours.view_as(theirs)).abs().max()
        return theirs.dtype == ours.dtype and bool(error <= 1e-4 * (theirs - x).abs().max())
    except Exception:  # whatever a block of an unknown type trips over
        return False


def is_open(module: Any, tried: tuple[type, ...]) -> bool:
    """Whether a block is still made of the classes that were tried, nobody watches, replaced or compiled its parts, and
    nothing in it is dropped at random."""
    parts = list(module.modules())
    if tuple(map(type, parts)) != tried or any(part.training and _drops(part) for part in parts):
        return False
    rope = getattr(module.attn, "rope", None)
    return unwatched(part for part in parts[1:] if part is not rope)


def _drops(part: Any) -> bool:
    """Whether a module drops something while it trains."""
    shares = (getattr(part, name, None) for name in ("sample_drop_ratio", "drop_prob"))
    return any(shares) or (isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0)
