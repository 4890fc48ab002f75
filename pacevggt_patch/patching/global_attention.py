"""What runs in place of the attention of a global block, where a block is open to us and where it is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..hosts.blocks import Project, Rotation
from ..method.few_keys import FewKeys
from ..method.full_heads import attend, joined_heads
from ..method.global_pruning import Plan
from ..runtime.attention import Repeats, attention, is_plain, pick_heads


class GlobalAttention(Protocol):
    """Attention of one global block."""

    def open(self, project: Project, x: Tensor, rotation: Rotation | None) -> Tensor:
        """Outputs of all heads [sequences, L, heads, d], for `hosts.blocks.run_block`."""
        ...

    def closed(
        self, run: Callable, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """Stands in for `scaled_dot_product_attention` inside the block's own code, see `InterceptAttention`."""
        ...

    def check(self, calls: int) -> None:
        """Raise UnsupportedModelError where the block's own code called it so many times, and that does not fit."""
        ...


class FewKeysAttention:
    """Kept tokens see the keys of a schedule.

    Args:
        keys: which.
        heads: how many the block has.
        batch, tokens: clips, and special and kept tokens of each.
        compiles: whether `project` is compiled, and so makes queries, keys and values at once.
        say: tells the user something, once.
    """

    def __init__(
        self, keys: FewKeys, heads: int, batch: int, tokens: int, compiles: bool, say: Callable[[str], None]
    ):
        self.keys, self.every, self.compiles = keys, range(heads), compiles
        self.batch, self.tokens, self.say, self.used = batch, tokens, say, False

    def open(self, project: Project, x: Tensor, rotation: Rotation | None) -> Tensor:
        index, counts = self.keys.index, self.keys.counts
        if index is None or self.compiles:
            query, key, value = project(x, rotation)
            # Now: what is no key needs no memory any more.
            key, value = self.keys.of(key), self.keys.of(value)
            return attention(query, *self.keys.everywhere(key, value), counts).transpose(1, 2)
        (query,) = project(x, rotation, (self.every, (), ()))
        first = torch.arange(self.batch, device=x.device) * self.tokens
        rows = (index + first[:, None]).flatten()  # of keys
        turned = None if rotation is None else tuple(t.index_select(0, rows) for t in rotation)
        there = project(x.index_select(0, rows), turned, ((), self.every, self.every))
        return attention(query, *self.keys.everywhere(*there), counts).transpose(1, 2)

    def closed(
        self, run: Callable, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> Tensor:
        sizes = [
            (len(t), *t.shape[2:3]) for t in (key, value) if t.ndim == 4 and t.shape[1] == query.shape[1]
        ]
        if sizes != [(self.batch, self.tokens)] * 2 or not is_plain(options):
            return run(query, key, value)
        self.used = True
        return self.keys.attend(query, key, value, by_host(run, options))

    def check(self, calls: int) -> None:
        if not self.used and self.keys.elsewhere is not None:
            raise UnsupportedModelError(
                "attention in the global blocks of this model has a mask, dropout or keys that heads share, or is none "
                "of scaled_dot_product_attention, so it can't see the frames of other processes: leave process_group "
                "out"
            )
        if not self.used:
            self.say(
                "attention in the global blocks of this model has a mask, dropout or keys that heads share, or is none "
                "of scaled_dot_product_attention, so kept tokens see the keys of kept tokens alone: that costs "
                "quality, and time in long clips"
            )


class FullHeadsAttention:
    """Some heads see all tokens, the others keys of kept ones.

    Args:
        index: of the block.
        heads: numbers of the heads that see all.
        count: how many heads the block has.
        plan: of the clips.
    """

    def __init__(self, index: int, heads: Sequence[int], count: int, plan: Plan):
        self.index, self.heads, self.every, self.plan = index, heads, range(count), plan

    def open(self, project: Project, x: Tensor, rotation: Rotation | None) -> Tensor:
        # Queries and keys exist of full-attention heads and of kept tokens alone.
        rows = self.plan.propagation.rows(len(x) // len(self.plan.kept))
        turned = None if rotation is None else tuple(t.index_select(0, rows) for t in rotation)
        others = [head for head in self.every if head not in self.heads]
        few = project(x.index_select(0, rows), turned, (others,) * 3) if others else []
        query, key, value = project(x, rotation, (self.heads, self.heads, self.every))
        whole = [query, key, pick_heads(value, self.heads)]
        return joined_heads(whole, few, value, self.heads, self.plan, attention).transpose(1, 2)

    def closed(
        self, run: Callable, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> Tensor:
        check_heads(self.index, options, query, key)
        return attend(query, key, value, self.heads, self.plan, by_host(run, options))

    def check(self, calls: int) -> None:
        if calls != 1:
            raise UnsupportedModelError(
                f"global block {self.index} calls scaled_dot_product_attention {calls} times, so none of its heads can "
                "see all tokens where others see few: pass weights=None"
            )


def check_heads(index: int, options: dict[str, Any], query: Tensor, key: Tensor) -> None:
    """Raise UnsupportedModelError for attention that is not that of all tokens to all tokens, head by head."""
    if not is_plain(options) or query.shape != key.shape or query.ndim != 4:
        raise UnsupportedModelError(
            f"the attention of global block {index} has a mask, or is not over all tokens head by head, so no head can "
            "see all tokens where others see few: pass weights=None"
        )


def by_host(run: Callable, options: dict[str, Any]) -> Callable[..., Tensor]:
    """Attention as the host asks for it, and as `attention` does it where keys count several times."""

    def attends(query: Tensor, key: Tensor, value: Tensor, counts: Repeats | Tensor | None = None) -> Tensor:
        if counts is None:
            return run(query, key, value)
        return attention(query, key, value, counts, options.get("scale"))

    return attends
