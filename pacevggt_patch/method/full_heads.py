"""The few heads of global attention that find what matches between frames: they see all tokens, all others the kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedModelError
from .propagation import Following

# (block, head) of global attention, both counted from 0.
Heads = tuple[tuple[int, int], ...]


class MatchingHeads(TorchFunctionMode):
    """Global attention over all tokens of a clip, of which only some heads make use.

    Most heads gather what many tokens have in common: they lose little by seeing few. Some look for the one place that
    matches, and lose it if it was dropped. So every `scaled_dot_product_attention` inside the block of code runs on all
    tokens for those heads, and on the special and kept ones for the others, whose outputs at dropped tokens are filled
    in, see `Following.spread`.

    Args:
        following: which tokens are kept.
        heads: those that see all.
        first: number of the block whose attention comes first; `number` is then that of the next one.
    """

    ours = True  # compiled code may leave it aside

    def __init__(self, following: Following, heads: Heads, first: int):
        super().__init__()
        self.following, self.heads, self.number = following, heads, first

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value")
        inputs = dict(zip(names, args, strict=False)) | {n: kwargs[n] for n in names if n in kwargs}
        others = {name: value for name, value in kwargs.items() if name not in names}
        self.check(*inputs.values(), *args[3:4], **others)
        block, self.number = self.number, self.number + 1
        seeing = [head for of, head in self.heads if of == block]
        return attend(
            *(inputs[name] for name in names),
            seeing,
            self.following,
            lambda *few: func(*few, *args[3:], **others),
        )

    def check(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ) -> None:
        """Raise UnsupportedModelError for attention that is not that of all tokens to all tokens, head by head."""
        frames, length = self.following.weights.shape[:2]
        same = query.shape == key.shape == value.shape and query.ndim == 4
        if not same or len(query) * query.shape[2] != frames * length:
            problem = "its attention is not over all tokens of a clip at once"
        elif attn_mask is not None or is_causal or enable_gqa:
            problem = "its attention has a mask, or shares keys between heads"
        else:
            return
        raise UnsupportedModelError(
            f"global block {self.number} of this model can't let some heads see all tokens, since {problem}: pass "
            "weights without matching heads, or weights=None"
        )

    def check_number(self, block: int) -> None:
        """Raise UnsupportedModelError unless every block up to this one called `scaled_dot_product_attention` once."""
        if self.number != block:
            raise UnsupportedModelError(
                "the global blocks of this model do not call scaled_dot_product_attention once each, so none of their "
                "heads can see all tokens where others see few: pass weights without matching heads, or weights=None"
            )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seeing: Sequence[int],
    following: Following,
    attention: Callable[..., Tensor],
) -> Tensor:
    """Attention of which some heads see all tokens, and all others the special and kept ones.

    Args:
        query, key, value: [B, heads, S * (n + P), d], in any dtype that `attention` takes.
        seeing: numbers of those heads.
        following: of B * S frames.
        attention: of queries, keys and values.

    Returns:
        [B, heads, S * (n + P), d], in the dtype that `attention` gives.
    """
    batch, heads, tokens, width = query.shape
    frames = len(following.index)  # of all clips
    length = tokens * batch // frames
    others = [head for head in range(heads) if head not in seeing]
    if not others:
        return attention(query, key, value)
    whole = [attention(*(_heads(t, seeing) for t in (query, key, value)))] if seeing else []
    rows = following.rows(length).view(batch, -1)  # among the tokens of all clips
    rows = rows - torch.arange(batch, device=rows.device)[:, None] * tokens
    rows = rows[:, None, :, None].expand(-1, heads, -1, width)  # [B, heads, S * (n + K), d]
    few = attention(*(_heads(t.gather(2, rows), others) for t in (query, key, value)))
    # Values say of a token what heads read there.
    known = value.transpose(1, 2).reshape(frames, length, heads * width)
    found = few.transpose(1, 2).reshape(frames, -1, len(others) * width)
    whole = [t.transpose(1, 2).reshape(frames, length, len(seeing), width) for t in whole]
    slope, dtype = following.dependence(following.compact(known), found, batch), few.dtype

    def filled(some: Following, known: Tensor, found: Tensor, *whole: Tensor) -> Tensor:
        spread = some.spread(known, found, slope).unflatten(-1, (len(others), width)).to(dtype)
        parts = dict(zip(others, spread.unbind(2), strict=True))
        for part in whole:
            parts |= zip(seeing, part.unbind(2), strict=True)
        # Heads innermost, as what comes next wants them.
        return torch.stack([parts[head] for head in range(heads)], dim=2)

    out = following.by_frames(filled, batch, known, found, *whole)  # [frames, n + P, heads, d]
    return out.view(batch, tokens, heads, width).transpose(1, 2)


def _heads(tensor: Tensor, numbers: Sequence[int]) -> Tensor:
    """Some heads of [B, heads, L, d]. By slices: numbers would have to travel to the device."""
    return torch.stack([tensor[:, number] for number in numbers], dim=1)
