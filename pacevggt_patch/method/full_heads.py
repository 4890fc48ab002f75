"""Full-attention heads: the few heads of global attention in which all tokens take part, in all others kept ones do.

They see all keys, or in long clips the sample that `few_keys.full_keys` takes.

Most heads gather what many tokens have in common and lose little by seeing few. A few heads look for the one place in
another frame that matches, and lose it if it was dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..runtime.attention import attention, pick_heads
from .global_pruning import Plan
from .propagation import Propagation

# (block, head) of global attention, both counted from 0.
Heads = tuple[tuple[int, int], ...]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    full: Sequence[int],
    plan: Plan,
    attention: Callable[..., Tensor],
) -> Tensor:
    """Attention in which some heads see all tokens, and all others special and kept tokens; see `joined_heads`.

    Args:
        query, key, value: [B, heads, S * (n + P), d], in any dtype that `attention` takes.
        full: numbers of the heads that see all tokens.
        plan: of these clips.
        attention: of queries, keys and values, and how often keys count where the plan says so.

    Returns:
        [B, heads, S * (n + P), d], in the dtype that `attention` gives.
    """
    _, heads, tokens, width = query.shape
    length = tokens * plan.batch // len(plan.kept)
    rows = plan.token_rows(length)[:, None, :, None].expand(
        -1, heads, -1, width
    )  # [B, heads, S * (n + K), d]
    others = [head for head in range(heads) if head not in full]
    few = [pick_heads(t.gather(2, rows), others) for t in (query, key, value)] if others else []
    whole = [pick_heads(t, full) for t in (query, key, value)] if full else []
    return joined_heads(whole, few, value, full, plan, attention)


def joined_heads(
    whole: list[Tensor],
    few: list[Tensor],
    value: Tensor,
    full: Sequence[int],
    plan: Plan,
    attention: Callable[..., Tensor],
) -> Tensor:
    """Outputs of all heads at all tokens.

    What heads that see kept tokens alone would give to dropped ones is filled in from what they give to kept ones, see
    `Propagation.fill`; the values of a token say what heads read there.

    Args:
        whole: queries, keys and values of the `full` heads at all tokens, [B, F, S * (n + P), d]; empty without such.
        few: those of the other heads at special and kept tokens, [B, heads - F, S * (n + K), d]; emptied to free their
            memory.
        value: of all heads at all tokens, [B, heads, S * (n + P), d].
        full: numbers of the heads that see all tokens.
        plan: of these clips.
        attention: of queries, keys and values, and how often keys count where the plan says so.

    Returns:
        [B, heads, S * (n + P), d], in the dtype that `attention` gives.
    """
    batch, heads, tokens, width = value.shape
    propagation, frames = plan.propagation, len(plan.kept)  # of all clips
    length = tokens * batch // frames
    others = [head for head in range(heads) if head not in full]
    seen = []
    if whole:
        seen = [attention(*whole) if plan.full_keys is None else plan.full_keys.attend(*whole, attention)]
    if not others:
        return seen[0]
    query = few.pop(0)
    if plan.keys is None:
        found = attention(query, few.pop(0), few.pop(0))
    else:
        key, value_there = plan.keys.everywhere(*(plan.keys.of(few.pop(0)) for _ in range(2)))
        found = attention(query, key, value_there, plan.keys.counts)
        del key, value_there
    del query
    known = value.transpose(1, 2).reshape(frames, length, heads * width)
    found = found.transpose(1, 2).reshape(frames, -1, len(others) * width)
    seen = [t.transpose(1, 2).reshape(frames, length, len(full), width) for t in seen]
    slope = propagation.dependence(propagation.gather(known), found, batch, plan.exchange)
    dtype = found.dtype

    def filled(some: Propagation, known: Tensor, found: Tensor, *seen: Tensor) -> Tensor:
        spread = some.fill(known, found, slope).unflatten(-1, (len(others), width)).to(dtype)
        parts = dict(zip(others, spread.unbind(2), strict=True))
        for part in seen:
            parts |= zip(full, part.unbind(2), strict=True)
        # Heads innermost, as the projection after attention reads them.
        return torch.stack([parts[head] for head in range(heads)], dim=2)

    out = propagation.by_frames(filled, batch, known, found, *seen)  # [frames, n + P, heads, d]
    return out.view(batch, tokens, heads, width).transpose(1, 2)


# Which heads these are is told by what each would lose.

KEEP_RATIO = 0.3  # at which it is told
# A head is a full-attention head if its output is off by this share of the variance of the tokens that it is added to.
# Long clips have smaller errors: dropped tokens of a frame have more kept ones like them in others.
LEAST_ERROR = 0.004
# At most this share of all heads: their attention costs what it does in the unpruned model.
MOST = 1 / 6


def head_errors(
    query: Tensor, key: Tensor, value: Tensor, scale: float, plan: Plan, matrix: Tensor
) -> Tensor:
    """Mean squares [heads] of how far each head's part of a block's output is off, over all tokens.

    Each head is compared with itself where it sees special and kept tokens alone and the rest is filled in.

    Args:
        query, key, value: [B, heads, S * (n + P), d].
        scale: factor of the products of queries and keys.
        plan: of these clips.
        matrix: from the outputs of all heads to what is added to the tokens, [C, heads * d].
    """
    batch, heads, tokens, width = query.shape
    dtype = value.dtype  # autocast leaves queries and keys in float32
    query, key = query.to(dtype), key.to(dtype)

    attends = partial(attention, scale=scale)
    whole = attends(query, key, value)
    off = (attend(query, key, value, (), plan, attends) - whole).float()  # [B, heads, L, d]
    with torch.autocast(off.device.type, enabled=False):
        # |M e|^2 = tr(M^T M e e^T), which needs no tensor of L x C.
        parts = matrix.float().view(-1, heads, width).transpose(0, 1)  # [heads, C, d]
        squares = (parts.mT @ parts) * (off.mT @ off).sum(0)  # [heads, d, d]
        return squares.sum((1, 2)) / (batch * tokens)


def choose_full_heads(errors: Tensor, blocks: Sequence[int] | None = None) -> Heads:
    """(block, head) of the heads whose errors are above LEAST_ERROR, the largest ones and at most MOST of all.

    The last block has none: no other block attends to what it gives.

    Args:
        errors: [blocks, heads], each over the variance of the tokens that the head's output is added to.
        blocks: their numbers; None counts from 0.
    """
    numbers = range(len(errors)) if blocks is None else blocks
    heads, before_last = errors.shape[1], errors[:-1].flatten()
    most = min(max(1, int(MOST * errors.numel())), len(before_last))
    best = before_last.topk(most)
    chosen = [int(i) for value, i in zip(best.values, best.indices, strict=True) if value >= LEAST_ERROR]
    return tuple(sorted((numbers[i // heads], i % heads) for i in chosen))
