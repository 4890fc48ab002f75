"""Calibration on the first clip that comes: its frames tell which heads must see all tokens, in one unpruned pass."""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import torch
from torch import Tensor

from ..errors import PaceError, first_line
from ..hosts.base import BlockCall, Host, value_range
from ..method.full_heads import KEEP_RATIO, choose_full_heads, head_errors
from ..method.global_pruning import Plan, joined, keep_best
from ..runtime.attention import InterceptAttention
from ..weights import cache
from ..weights.pace import PaceWeights
from .global_attention import check_heads
from .state import Clip, State

LEAST_FRAMES, MOST_FRAMES = 4, 24
ADVICE = "call pacevggt_patch.remove(model), then accelerate it with weights=pacevggt_patch.calibrate(model, clips)"
LOGGER = logging.getLogger("pacevggt_patch")


def calibrate_on(state: State, clip: Clip, call: BlockCall) -> None:
    """Find the full-attention heads on a clip that enters its first global block, and keep them on the model.

    At most MOST_FRAMES evenly spread frames of the batch's first clip run through all blocks unpruned. A clip of fewer
    than LEAST_FRAMES frames waits for the next. Where it can't be done here, it is said once, and the clip runs
    without full-attention heads.
    """
    frames = sum(len(features) for features, _ in clip.parts) // len(call.x)
    if torch.compiler.is_compiling():
        _say_while_compiling()
        return
    problem = _problem(state.host, clip, call, frames)
    if problem is not None:
        state.say_once(
            f"this model is not calibrated yet, and {problem}: until then clips run without full-attention heads, "
            f"which costs quality; {ADVICE}"
        )
        return
    start = time.monotonic()
    try:
        with torch.no_grad():
            errors = _unpruned_errors(state, clip, call, frames)
        heads = choose_full_heads(errors, state.host.indices("global"))
    except Exception as error:  # whatever blocks of an unknown type trip over
        state.pending = isinstance(error, torch.cuda.OutOfMemoryError)
        reason = first_line(error)
        state.say_once(
            f"calibration on the first clip failed ({reason}): clips run without full-attention heads; pass "
            "weights=None to choose that without this warning"
        )
        return
    used = min(frames, MOST_FRAMES)
    seconds = time.monotonic() - start
    training = {"calibrated_on": f"{used} frames of the first clip", "seconds": round(seconds, 2)}
    weights = PaceWeights.of_heads(state.host, heads, training, source="calibrated on the first clip")
    state.weights, state.pending = weights, False
    clip.weights = weights
    state.check_values(warn=False)
    where = cache.store(weights)
    names = ", ".join(f"block {block} head {head}" for block, head in heads)
    listed = f" ({names})" if heads else ""
    kept = "" if where is None else f"; kept in {where}"
    LOGGER.warning(
        f"pacevggt-patch calibrated this model on {used} frames in {seconds:.1f} s: {len(heads)} of "
        f"{errors.numel()} heads of global attention match points between frames{listed}{kept}"
    )


@torch.compiler.assume_constant_result
def _say_while_compiling() -> bool:
    """Warn from inside of code that is traced, when it is traced."""
    warnings.warn(
        "this model is not calibrated yet, and compiled code can't do it: run the model once on a clip before "
        f"torch.compile, or {ADVICE}",
        UserWarning,
        stacklevel=2,
    )
    return True


def _problem(host: Host, clip: Clip, call: BlockCall, frames: int) -> str | None:
    """Why a clip can't be calibrated on, in words, or None."""
    if frames < LEAST_FRAMES:
        return f"a clip of {frames} frame{'s' * (frames > 1)} is too short for that (it takes {LEAST_FRAMES})"
    if call.x.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being recorded"
    if call.x.requires_grad and torch.is_grad_enabled():
        return "gradients are being recorded"
    if clip.images is not None and host.far_from_range(*value_range(clip.images)):
        return f"its images are far from {host.image_values}"
    if not call.plain:
        return "its global blocks are given more than tokens and positions"
    return None


def _unpruned_errors(state: State, clip: Clip, call: BlockCall, frames: int) -> Tensor:
    """Errors [blocks, heads] on some frames of a clip."""
    count, host, x = min(frames, MOST_FRAMES), state.host, call.x
    chosen = torch.arange(count, device=x.device) * frames // count
    length = x.shape[1] // frames
    features = torch.cat([part for part, _ in clip.parts]).index_select(0, chosen)
    plan = training_free_plan(state, features)
    tokens = x[0].unflatten(0, (frames, length)).index_select(0, chosen)  # [n, L, C]
    within = _frame_arguments(state, clip, call, chosen)
    found: list[Tensor] = []
    begun = False
    for kind, index, module in host.blocks:
        begun = begun or kind == "global"
        if not begun:
            continue  # that is behind the clip
        if kind == "special":
            some = module(tokens[:, : host.special_tokens].flatten(0, 1)[None])
            tokens = torch.cat([some.view(count, -1, x.shape[-1]), tokens[:, host.special_tokens :]], 1)
            continue
        own = module.__dict__["forward"].own
        if kind == "frame":
            args, kwargs = within.on(tokens, within.positions).arguments()
            out = own(*args, **kwargs)
        else:
            where = call.positions
            if where is not None:
                where = where[0].unflatten(0, (frames, length)).index_select(0, chosen).flatten(0, 1)[None]
            args, kwargs = call.on(tokens.flatten(0, 1)[None], where).arguments()
            errors, out = measured(state, index, plan, own, args, kwargs)
            found.append(errors)
        tokens = (out[0] if isinstance(out, tuple) else out).view(tokens.shape)
    return torch.stack(found)


def _frame_arguments(state: State, clip: Clip, call: BlockCall, chosen: Tensor) -> BlockCall:
    """A call of a frame block on `chosen` frames of the first clip: where its tokens are, and what else it is given.

    It is told by the clip's own last one, or by the host where there was none. Where that one was given a part of the
    frames, as hosts that go through them in chunks do, positions are those of the global block.
    """
    before = clip.frame_call
    known = None
    if before is None and state.threads.grid is not None:
        known = state.host.frame_positions(state.threads.grid, call.x.device)
    if known is not None:
        return call.on(call.x, known.expand(len(chosen), -1, -1), (), {})
    frames = sum(len(features) for features, _ in clip.parts)
    whole = before is not None and len(before.x) == frames
    where = before.positions if before is not None and whole else call.positions
    if where is not None:
        where = where.reshape(frames, -1, where.shape[-1]).index_select(0, chosen)
    if before is not None and before.shared:
        return before.on(before.x, where)
    # What differs from frame to frame, or is for global blocks alone, says nothing here.
    return call.on(call.x, where, (), {})


def training_free_plan(state: State, features: Tensor, batch: int = 1) -> Plan:
    """The plan by which full-attention heads are told, of features [n, P, C] of `batch` clips."""
    patches = features.shape[1]
    kept = keep_best(features, state.threads.grid or (1, patches), max(1, round(KEEP_RATIO * patches)))
    return joined([state.plan(features, kept)], batch)


def measured(state: State, index: int, plan: Plan, own: Any, args: tuple, kwargs: dict) -> tuple[Tensor, Any]:
    """What each head of a global block would lose, [heads], over the variance of its tokens; and the block's output.

    Raises:
        PaceError: the block does not call `scaled_dot_product_attention` once.
    """
    matrix, found = state.host.attention_output(index), []

    def look(run: Any, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        check_heads(index, options, query, key)
        scale = options.get("scale")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        found.append(head_errors(query, key, value, scale, plan, matrix))
        return run(query, key, value)

    with InterceptAttention(look):
        out = own(*args, **kwargs)
    if len(found) != 1:
        raise PaceError(
            f"global block {index} calls scaled_dot_product_attention {len(found)} times, so what its heads lose can't "
            "be told"
        )
    variance = args[0].float().flatten(0, -2).var(0, unbiased=False).sum()
    return found[0] / variance, out
