"""Who computes attention, and a look at every `scaled_dot_product_attention` in a block of code."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .chunks import in_chunks

# FlashAttention-3, by its authors' package or by wheels of its forward pass, which leave float16 out.
LIBRARIES = {
    "flash_attn_interface": (torch.bfloat16, torch.float16),
    "fa3_fwd_interface": (torch.bfloat16,),
}
SUMS = "return_attn_probs"  # what gives logarithms of sums of exponentials is called
HOPPER = 9  # the only compute capability (major) that FlashAttention-3 is written for
LARGEST_HEAD = 256
QUERIES = 2**17  # at a time, where outputs are needed twice
MORE = 8  # channels that say how often keys count; kernels want a multiple of that

# Of the call itself, queries, keys and values [B, heads, L, d], and other arguments by name; gives [B, heads, L, d].
Handler = Callable[[Callable[..., Tensor], Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


class InterceptAttention(TorchFunctionMode):
    """Hands every `scaled_dot_product_attention` inside its block of code, in this thread, to a function.

    Args:
        handler: the function.

    Attributes:
        calls: how many there were.
    """

    ours = True  # compiled code may leave it aside
    NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

    def __init__(self, handler: Handler):
        super().__init__()
        self.handler, self.calls = handler, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        options = dict(zip(self.NAMES, args, strict=False)) | kwargs
        query, key, value = (options.pop(name) for name in self.NAMES[:3])
        self.calls += 1
        return self.handler(lambda *inputs: func(*inputs, **options), query, key, value, options)


def is_plain(options: dict[str, Any]) -> bool:
    """Whether attention has no mask, no dropout, and no keys that heads share."""
    return options.get("attn_mask") is None and not any(
        options.get(name) for name in ("dropout_p", "is_causal", "enable_gqa")
    )


class Library(NamedTuple):
    """A library with a faster attention than torch's.

    Attributes:
        name: of its module.
        run: of queries, keys and values [B, L, heads, d] and the factor of their products; returns [B, L, heads, d].
        dtypes: what it takes.
        run_with_sums: returns the logarithms [B, heads, L] of the sums of exponentials, too; None if it can't.
    """

    name: str
    run: Callable[..., Tensor]
    dtypes: tuple[torch.dtype, ...]
    run_with_sums: Callable[..., tuple[Tensor, Tensor]] | None = None


class Repeats(NamedTuple):
    """Which keys count several times in attention.

    Attributes:
        alone: how many keys in front count once.
        weight: how many times each of the others counts.
    """

    alone: int
    weight: float


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Repeats | Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of queries, keys and values [B, heads, L, d], by a library where one serves, else by torch.

    Args:
        query, key, value: [B, heads, L, d].
        counts: how many times each key counts: [B, m], or `Repeats`; None is once.
        scale: factor of the products of queries and keys; None is d ** -0.5.
    """
    if isinstance(counts, Repeats):
        found = library_attention(query, key, value, counts, scale)
        if found is not None:
            return found
        alone, weight = counts
        counts = query.new_full((1, key.shape[2]), weight)
        counts[:, :alone] = 1
    width = query.shape[-1]
    if counts is not None:
        scale = width**-0.5 if scale is None else scale
        query, key, value = counted(query, key, value, counts, scale)
    found = library_attention(query, key, value, scale=scale)
    if found is None:
        found = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return found[..., :width]


def pick_heads(tensor: Tensor, numbers: Sequence[int]) -> Tensor:
    """Some heads of [B, heads, ...]. By slices: numbers would have to travel to the device."""
    return torch.stack([tensor[:, number] for number in numbers], dim=1)


def counted(
    query: Tensor, key: Tensor, value: Tensor, counts: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with MORE channels, in which each key says how many times it counts.

    A mask could say so, too, but kernels that are fast take none.

    Args:
        query, key, value: [B, heads, L, d].
        counts: [B, m], or [1, m] for all clips.
        scale: factor of the products of queries and keys.
    """
    logs = counts.to(torch.promote_types(counts.dtype, torch.float32)).log() / scale
    logs = logs.to(key.dtype)[:, None, :, None].expand(*key.shape[:3], 1)
    query = F.pad(F.pad(query, (0, 1), value=1.0), (0, MORE - 1))
    return query, F.pad(torch.cat([key, logs], -1), (0, MORE - 1)), F.pad(value, (0, MORE))


def library_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Repeats | None = None,
    scale: float | None = None,
) -> Tensor | None:
    """Attention by a library, or None where none serves these tensors.

    None serves with gradients, in other dtypes than its own (autocast counts), or where the user switched torch's flash
    attention off (`torch.backends.cuda.enable_flash_sdp(False)`, or `sdpa_kernel` with others).
    """
    found = None if torch.compiler.is_compiling() or query.ndim != 4 else library(query.device)
    if found is None or not torch.backends.cuda.flash_sdp_enabled():
        return None
    inputs = (query, key, value)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return None
    narrow, width = autocast_dtype(query.device.type), query.shape[-1]
    dtypes = {tensor.dtype if narrow is None else narrow for tensor in inputs}
    if len(dtypes) > 1 or not dtypes <= {*found.dtypes}:
        return None
    if width > LARGEST_HEAD or width % 8 or value.shape[-1] != width:
        return None
    dtype = dtypes.pop()
    query, key, value = (tensor.to(dtype).transpose(1, 2) for tensor in inputs)
    scale = width**-0.5 if scale is None else scale
    if counts is None:
        return found.run(query, key, value, scale).transpose(1, 2)
    run = found.run_with_sums
    if run is None:
        return None
    alone, others = (
        (key[:, part], value[:, part]) for part in (slice(counts.alone), slice(counts.alone, None))
    )

    def some(query: Tensor) -> tuple[Tensor]:
        both = (*run(query, *alone, scale), *run(query, *others, scale))
        return (joined_by_sums(*both, math.log(counts.weight)),)

    return in_chunks(some, QUERIES, query, dim=1)[0].transpose(1, 2)


def joined_by_sums(
    first: Tensor, first_sums: Tensor, second: Tensor, second_sums: Tensor, log_weight: float
) -> Tensor:
    """Attention to two sets of keys, those of the second counting more often, from attention to each.

    Args:
        first, second: [B, L, heads, d]; the first becomes what is returned.
        first_sums, second_sums: logarithms of the sums of exponentials, [B, heads, L].
        log_weight: logarithm of how many times a key of the second set counts.
    """
    share = torch.sigmoid(second_sums + log_weight - first_sums).mT.unsqueeze(-1)  # [B, L, heads, 1]
    return first.lerp_(second, share.to(first.dtype))


def _by_library(run: Callable, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    found = library_attention(query, key, value, scale=options.get("scale")) if is_plain(options) else None
    return run(query, key, value) if found is None else found


@contextmanager
def faster_attention(device: torch.device) -> Generator[None]:
    """Inside, a library computes every `scaled_dot_product_attention` that it serves, whoever calls it."""
    if torch.compiler.is_compiling() or library(device) is None:
        yield
    else:
        with InterceptAttention(_by_library):
            yield


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """Who computes attention of some dtype on a device, in words."""
    found = library(device)
    if found is None or not torch.backends.cuda.flash_sdp_enabled():
        return "torch SDPA"
    name = f"flash-attention 3 ({found.name})"
    return name if dtype in found.dtypes else f"torch SDPA; under autocast to bfloat16 {name}"


def library(device: torch.device) -> Library | None:
    """The library that serves a device, or None. It is imported when first asked for."""
    return _loaded() if is_hopper(device) else None


@functools.cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER


@functools.cache
def _loaded() -> Library | None:
    for name, dtypes in LIBRARIES.items():
        try:
            flash_attn_func = importlib.import_module(name).flash_attn_func
            knows = SUMS in inspect.signature(flash_attn_func).parameters
        except Exception:  # not there, or built for another torch
            continue
        with_sums = functools.partial(_run_with_sums, flash_attn_func) if knows else None
        return Library(name, functools.partial(_run, flash_attn_func), dtypes, with_sums)
    return None


def _run(flash_attn_func: Callable, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    found = flash_attn_func(query, key, value, softmax_scale=scale)
    return found[0] if isinstance(found, tuple) else found  # older versions return more


def _run_with_sums(
    flash_attn_func: Callable, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    out, sums, *_ = flash_attn_func(query, key, value, softmax_scale=scale, **{SUMS: True})
    return out, sums


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What torch.autocast casts to on a device type, or None where it is off."""
    try:
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    except TypeError:  # torch 2.3, which VGGT asks for, has a function for each
        if device_type == "cpu":
            return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def half_precision(images: Tensor) -> AbstractContextManager:
    """bfloat16 autocast for images on CUDA; elsewhere all is computed as it is stored."""
    return torch.autocast("cuda", torch.bfloat16) if images.is_cuda else nullcontext()
