"""See and change what goes into attention, whatever module computes the queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .config import UnsupportedModelError

# Called with the number of the attention since its mode began, queries, keys and values [B, heads, L, d], and the
# factor of the products queries @ keys^T; returns queries, keys and values to go on with.
Change = Callable[[int, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]


class InAttention(TorchFunctionMode):
    """Passes the inputs of every `scaled_dot_product_attention` inside its block of code through a function.

    Args:
        change: the function.
        first: number that the first of them has.
    """

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
