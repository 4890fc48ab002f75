"""A stock model whose global blocks follow a rule, and how many pairs of queries and keys they compute."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor

from pacevggt_patch import PaceError
from pacevggt_patch.runtime.attention import InterceptAttention

from .base import Context, Layout, Rule


@dataclass
class Pairs:
    """Pairs of queries and keys of all forwards, in global blocks, over clips and heads.

    Attributes:
        computed: by the rule.
        unpruned: what the stock model computes on the same clips.
    """

    computed: int = 0
    unpruned: int = 0

    @property
    def share(self) -> float:
        """Computed ones over those of the stock model."""
        return self.computed / self.unpruned


@contextlib.contextmanager
def applied(model: Any, rule: Rule) -> Generator[Pairs]:
    """Inside, the global blocks of a stock model follow the rule. Merging and choosing keys are no pairs.

    Raises:
        PaceError: the model is accelerated, or its attention is not that of the stock model.
    """
    aggregator, pairs, clip = model.aggregator, Pairs(), {}
    if "forward" in aggregator.__dict__:
        raise PaceError("rules of others stand on the stock model: call pacevggt_patch.remove(model) first")

    def images_come(module: Any, inputs: tuple[Tensor, ...]) -> None:
        images = inputs[0]  # [B, S, 3, H, W]
        grid = images.shape[-2] // module.patch_size, images.shape[-1] // module.patch_size
        layout = Layout(images.shape[1], module.patch_start_idx, grid)
        clip.update(images=images, layout=layout, memory={})

    def features_come(module: Any, inputs: Any, output: Any) -> None:
        found = output["x_norm_patchtokens"] if isinstance(output, dict) else output
        clip["features"] = found.unflatten(0, (-1, clip["layout"].frames))  # [B, S, P, C]

    def forward(block: int, stock: Callable, x: Tensor, **arguments: Any) -> Tensor:
        def handle(run: Callable, query: Tensor, key: Tensor, value: Tensor, options: Any) -> Tensor:
            context = Context(block=block, depth=len(aggregator.global_blocks), tokens=x, **clip)
            found = rule(query, key, value, context)
            pairs.computed += found.pairs
            pairs.unpruned += math.prod(query.shape[:3]) * key.shape[2]
            return found.output

        with InterceptAttention(handle) as watch:
            output = stock(x, **arguments)
        if watch.calls != 1:
            raise PaceError(
                f"global block {block} calls scaled_dot_product_attention {watch.calls} times: rules of others want "
                "blocks of the stock model"
            )
        return output

    with contextlib.ExitStack() as stack:
        hooks = [
            aggregator.register_forward_pre_hook(images_come),
            aggregator.patch_embed.register_forward_hook(features_come),
        ]
        for hook in hooks:
            stack.callback(hook.remove)
        for number, block in enumerate(aggregator.global_blocks):
            replaced = functools.partial(forward, number, block.attn.forward)
            stack.enter_context(mock.patch.object(block.attn, "forward", replaced))
        yield pairs
