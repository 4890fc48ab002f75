"""See and change what goes into attention, and who computes it, whatever module makes the queries, keys and values."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedModelError

# Called with the number of the attention since its mode began, queries, keys and values [B, heads, L, d], and the
# factor of the products queries @ keys^T; returns queries, keys and values to go on with.
Change = Callable[[int, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]


class InAttention(TorchFunctionMode):
    """Passes the inputs of every `scaled_dot_product_attention` inside its block of code through a function.

    Args:
        change: the function.
        first: number that the first of them has.
    """

    ours = True  # compiled code may leave it aside

    def __init__(self, change: Change, first: int = 0):
        super().__init__()
        self.change, self.number = change, first

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")
            inputs = dict(zip(names, args, strict=False))
            query, key, value = ((inputs | kwargs)[name] for name in names)
            scale = kwargs.get("scale")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            changed = dict(zip(names, self.change(self.number, query, key, value, scale), strict=True))
            self.number += 1
            args = (*(changed.pop(name) for name in inputs), *args[3:])
            kwargs = kwargs | changed
        return func(*args, **kwargs)


class Library(NamedTuple):
    """A library with a faster attention than torch's.

    Attributes:
        name: of its module.
        run: of queries, keys and values [B, L, heads, d] and the factor of their products; returns [B, L, heads, d].
        dtypes: what it takes.
    """

    name: str
    run: Callable[..., Tensor]
    dtypes: tuple[torch.dtype, ...]


# FlashAttention-3, by its authors' package or by wheels of its forward pass, which leave float16 out.
LIBRARIES = {
    "flash_attn_interface": (torch.bfloat16, torch.float16),
    "fa3_fwd_interface": (torch.bfloat16,),
}
HOPPER = 9  # the only compute capability (major) that FlashAttention-3 is written for
LARGEST_HEAD = 256


class FasterAttention(TorchFunctionMode):
    """Lets a library compute every `scaled_dot_product_attention` inside its block of code that it can.

    That is attention on CUDA without mask, dropout and gradients, in a dtype that the library takes or under autocast
    to one. All else is torch's own, and everything is where the user switched torch's flash attention off
    (`torch.backends.cuda.enable_flash_sdp(False)`, or `sdpa_kernel` with others).

    Args:
        library: the library.
    """

    ours = True

    def __init__(self, library: Library):
        super().__init__()
        self.library = library

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            found = self.attend(*args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)

    def attend(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ) -> Tensor | None:
        """Attention by the library, or None where it can't."""
        if attn_mask is not None or dropout_p or is_causal or enable_gqa or query.ndim != 4:
            return None
        if not torch.backends.cuda.flash_sdp_enabled():
            return None
        inputs = (query, key, value)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            return None
        narrow, width = autocast_dtype(query.device.type), query.shape[-1]
        dtypes = {tensor.dtype if narrow is None else narrow for tensor in inputs}
        if len(dtypes) > 1 or not dtypes <= {*self.library.dtypes}:
            return None
        if width > LARGEST_HEAD or width % 8 or value.shape[-1] != width or library(query.device) is None:
            return None
        dtype = dtypes.pop()
        query, key, value = (tensor.to(dtype).transpose(1, 2) for tensor in inputs)
        return self.library.run(query, key, value, width**-0.5 if scale is None else scale).transpose(1, 2)


@contextmanager
def faster_attention(device: torch.device) -> Generator[None]:
    """`FasterAttention` where there is a library for the device, else nothing."""
    found = None if torch.compiler.is_compiling() else library(device)
    if found is None:
        yield
    else:
        with FasterAttention(found):
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
        except Exception:  # not there, or built for another torch
            continue
        return Library(name, functools.partial(_run, flash_attn_func), dtypes)
    return None


def _run(flash_attn_func: Callable, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    found = flash_attn_func(query, key, value, softmax_scale=scale)
    return found[0] if isinstance(found, tuple) else found  # older versions return more


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What torch.autocast casts to on a device type, or None where it is off."""
    try:
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    except TypeError:  # torch 2.3, which VGGT asks for, has a function for each
        if device_type == "cpu":
            return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


class FewerKeys:
    """A change of attention: all queries of a clip see the keys and values of only some of its tokens.

    Args:
        index: [B, m], numbers of those tokens among the S * L of a clip.
        length: S * L. Attention over anything else is left as it is.
    """

    def __init__(self, index: Tensor, length: int):
        self.index, self.length, self.done = index, length, 0

    def __call__(self, number: int, query: Tensor, key: Tensor, value: Tensor, scale: float):
        if key.shape[2] != self.length:
            return query, key, value
        self.done += 1
        index = self.index[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])  # [B, heads, m, d]
        return query, key.gather(2, index), value.gather(2, index)

    def check(self) -> None:
        """Raise UnsupportedModelError if no attention was changed."""
        if self.done == 0:
            raise UnsupportedModelError(
                "the global blocks of this model do not call scaled_dot_product_attention over the whole clip, so "
                "their keys can't be chosen: pass global_keys=1"
            )


def key_numbers(scores: Tensor, special: int, keys: int) -> Tensor:
    """Numbers [B, S * (n + keys)] of the tokens of a clip that serve as keys: special ones, and the best kept ones.

    Args:
        scores: of the kept tokens [B, S, K], in the order in which they follow the special ones.
        special: n, special tokens of a frame.
        keys: patch tokens of each frame that serve as keys, in [1, K].
    """
    frames, kept = scores.shape[1:]
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :keys].sort(-1).values  # [B, S, keys]
    first = torch.arange(special, device=scores.device).expand(*best.shape[:2], -1)
    start = torch.arange(frames, device=scores.device).view(-1, 1) * (special + kept)
    return (torch.cat([first, best + special], dim=-1) + start).flatten(1)
