"""Run the model's own heads on a chunk of frames at a time."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import GLOBAL
from ..errors import PaceError
from ..hosts import dpt
from ..hosts.base import Host
from ..method.restored_tokens import RestoredTokens
from ..runtime.attention import autocast_dtype
from ..runtime.ranks import ClipExchange

# The largest feature map of a chunk of frames stays below this. On the CPU because from 32 MiB on the C library asks
# the system for fresh memory each time, whose pages are filled one by one; a GPU wants enough frames to be filled.
CPU_BYTES = 20 * 2**20
GPU_BYTES = 2**29
# All that a call of `dpt.dense_head` can stand for, besides the tokens.
ARGUMENTS = {"images", "patch_start_idx", "frames_chunk_size"}


class TokenList(Sequence):
    """The dense tokens of all layers as a plain list, with what a head needs to know of them.

    Args:
        layers: [B, S, n + P, 2C] of each layer, or None.
        grid: patch rows and columns.
        special: n.
    """

    pruned = True

    def __init__(self, layers: Sequence[Tensor | None], grid: tuple[int, int], special: int):
        self.list, self.grid, self.special = layers, grid, special
        self.shape = next(t.shape for t in layers if t is not None)

    def __len__(self) -> int:
        return len(self.list)

    def __getitem__(self, index):
        return self.list[index]

    @property
    def layers(self) -> set[int]:
        """The layers that are not None."""
        return {i for i, tokens in enumerate(self.list) if tokens is not None}

    @property
    def total(self) -> int:
        """S."""
        return self.shape[1]

    @property
    def tokens_held(self) -> int:
        """Patch tokens of a clip."""
        return self.total * (self.shape[2] - self.special)

    tokens_read = tokens_held

    def special_tokens(self, layer: int) -> Tensor:
        """Camera and register tokens [B, S, n, 2C] of a layer that is not None."""
        tokens = self.list[layer]
        assert tokens is not None
        return tokens[:, :, : self.special]

    def select(self, frames: Tensor) -> TokenList:
        """The tokens of some frames, given by their numbers [n] (int64, on the device of the tokens)."""
        some = [None if t is None else t.index_select(1, frames) for t in self.list]
        return TokenList(some, self.grid, self.special)

    def frames(self, start: int, stop: int, layers: Iterable[int]) -> list[Tensor | None]:
        """Tokens [B, stop - start, n + P, 2C] of some frames."""
        wanted = {range(len(self))[i] for i in layers}
        return [t[:, start:stop] if t is not None and i in wanted else None for i, t in enumerate(self.list)]

    def patches(self, start: int, stop: int, layers: Iterable[int]) -> dict[int, Tensor]:
        """Layer -> patch tokens [B * (stop - start), P, 2C] of some frames."""
        some = enumerate(self.frames(start, stop, layers))
        return {i: t[:, :, self.special :].flatten(0, 1) for i, t in some if t is not None}


def tokens_of(found: Any, grid: tuple[int, int], special: int) -> RestoredTokens | TokenList:
    """What a trunk gave, with what is known of it: restored tokens, or a list of dense ones."""
    return found if isinstance(found, RestoredTokens) else TokenList(found, grid, special)


def token_list(args: tuple, kwargs: dict, state: Any) -> TokenList | None:
    """The list of tokens among the arguments of a head's call, if a pruned model gave it; else None."""
    host, values = state.host, (*args, *kwargs.values())
    images = next((v for v in values if isinstance(v, Tensor) and v.ndim == 5), None)
    found = next((v for v in values if type(v) in (list, tuple) and len(v) == host.depth), None)
    if images is None or found is None or state.config.mode != GLOBAL:
        return None
    grid = images.shape[-2] // host.patch_size, images.shape[-1] // host.patch_size
    shape = (*images.shape[:2], host.special_tokens + grid[0] * grid[1], 2 * host.embed_dim)
    tokens = [t for t in found if t is not None]
    if not tokens or not all(isinstance(t, Tensor) and t.shape == shape for t in tokens):
        return None
    if not state.prunes(images.shape[1], grid[0] * grid[1]):
        return None
    return TokenList(found, grid, host.special_tokens)


def restored_argument(args: tuple, kwargs: dict) -> RestoredTokens | None:
    """The restored tokens among the arguments of a head's call, by position or by keyword, or None."""
    return next((a for a in (*args, *kwargs.values()) if isinstance(a, RestoredTokens)), None)


def run_camera_head(stock: Callable, tokens: RestoredTokens, args: tuple, kwargs: dict):
    """Run a camera head on the compact tokens: it reads camera tokens only, and those are never pruned."""
    last = tokens.camera()
    args = tuple(last if a is tokens else a for a in args)
    return stock(*args, **{name: last if a is tokens else a for name, a in kwargs.items()})


def run_joined_camera_head(
    stock: Callable, exchange: ClipExchange, host: Host, args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Run a camera head on the special tokens of all processes, and give what it says of the frames here.

    It reads camera tokens of the last layer only: nothing else travels.

    Raises:
        PaceError: the tokens are not those of the last forward pass.
    """
    values = (*args, *kwargs.values())
    found = next((v for v in values if type(v) in (list, tuple) and len(v) == host.depth), None)
    last = None if found is None else found[-1]
    if not isinstance(last, Tensor) or last.ndim != 4 or last.shape[:2] != (1, exchange.here):
        raise PaceError(
            f"the camera head was not given the tokens of the {exchange.here} frames that the aggregator saw last, so "
            "those of other processes don't fit: call aggregator and heads in turn"
        )
    parts = exchange.gather(last[:, :, : host.special_tokens], exchange.counts, 1)
    whole: list[Any] = [None] * host.depth
    whole[-1] = torch.cat(parts, 1)  # [1, S, n, 2C]
    args = tuple(whole if a is found else a for a in args)
    outputs = stock(*args, **{name: whole if a is found else a for name, a in kwargs.items()})

    def here(tensor: Tensor) -> Tensor:
        if tensor.ndim < 2 or tensor.shape[1] != exchange.total:
            raise PaceError(
                f"the camera head returned a tensor {list(tensor.shape)} for {exchange.total} frames, which can't be "
                "shared out over processes: leave process_group out"
            )
        return tensor.narrow(1, exchange.before, exchange.here)

    return changed(outputs, here)


def run_dense_head(
    head: Any,
    stock: Callable,
    tokens: RestoredTokens | TokenList,
    args: tuple,
    kwargs: dict,
    fast: bool = False,
    device: torch.device | None = None,
    speed: Callable[..., Callable] | None = None,
):
    """Run a DPT head a chunk of frames at a time, restoring the tokens of just those frames.

    A pruned grid goes through `dpt.dense_head` where that fits. Its chunks have as many frames as suit the memory
    (`chunk_frames`), never more than the caller's `frames_chunk_size`. All else goes through the stock head, in that
    head's own chunks, so on an unpruned grid the outputs are its own. A head that does not work in chunks gets the
    tokens as they are: they read like a list.

    Args:
        head: a module with `intermediate_layer_idx`.
        stock: its own forward.
        tokens: the restored tokens among the arguments.
        args, kwargs: the arguments of the call.
        fast: whether `dpt.dense_head` does what this head does.
        device: where the outputs go, chunk by chunk; None leaves them where they are made.
        speed: gives the function to call in place of `dpt.dense_head`, given that and what it is compiled for. All
            chunks are of one size then: the last one goes over some frames again.

    Returns:
        What the stock head returns.

    Raises:
        PaceError: the images are not those of the tokens, or the head's outputs can't be joined over frames.
    """
    kind = type(head).__name__
    call = inspect.signature(stock).bind(*args, **kwargs)
    chosen = "frames_chunk_size" in call.arguments
    call.apply_defaults()
    total = tokens.total
    images, frames = call.arguments.get("images"), call.arguments.get("frames_chunk_size", 0)
    if isinstance(images, Tensor) and images.ndim == 5 and images.shape[1] != total:
        raise PaceError(f"{kind} got {images.shape[1]} images for the tokens of {total}")
    if not isinstance(images, Tensor) or images.ndim != 5 or (frames is not None and frames < 1):
        return moved(stock(*args, **kwargs), device)
    own = tokens.list if isinstance(tokens, TokenList) else tokens
    name = next(name for name, a in call.arguments.items() if a is own)
    frames, one_size = frames or total, False
    if fast and _is_plain(call.arguments, name, tokens, images, head):
        tables = dpt.dense_tables(head, tokens.grid)
        fitting = chunk_frames(len(images) * dpt.frame_bytes(head, tables), images.device)
        frames = min(frames, fitting) if chosen else fitting
        run, one_size = _fast_run(head, tokens, tables, speed), speed is not None
    elif own is not tokens and device is None:
        return stock(*args, **kwargs)
    else:

        def run(start: int, stop: int):
            call.arguments[name] = tokens.frames(start, stop, head.intermediate_layer_idx)
            call.arguments["images"] = images[:, start:stop].contiguous()
            return stock(*call.args, **call.kwargs)

    outputs = None
    for start in range(0, total, frames):
        if one_size:
            start = max(0, min(start, total - frames))
        part = run(start, min(start + frames, total))
        if start == 0 and frames >= total:
            return moved(part, device)
        if outputs is None:
            outputs = room(part, frames, total, device, kind)
        write(outputs, part, start)
    if images.is_cuda and device is not None and device.type != "cuda":
        torch.cuda.current_stream(images.device).synchronize()  # the last copies may be on their way
    return outputs


def chunk_frames(frame_bytes: int, device: torch.device) -> int:
    """Frames whose largest feature maps of `frame_bytes` each a device handles well at once; at least one."""
    return max(1, (CPU_BYTES if device.type == "cpu" else GPU_BYTES) // frame_bytes)


def _is_plain(
    arguments: dict, name: str, tokens: RestoredTokens | TokenList, images: Tensor, head: Any
) -> bool:
    """Whether a head's call is one that `dpt.dense_head` can stand for, on a pruned grid."""
    if not tokens.pruned or arguments.keys() != {name} | ARGUMENTS:
        return False
    grid = tuple(side // int(head.patch_size) for side in images.shape[-2:])
    if grid != tokens.grid or arguments["patch_start_idx"] != tokens.special:
        return False
    layers = {range(len(tokens))[i] for i in head.intermediate_layer_idx}
    return layers <= tokens.layers and dpt.is_open(head)


def _fast_run(
    head: Any,
    tokens: RestoredTokens | TokenList,
    tables: dpt.DenseTables,
    speed: Callable[..., Callable] | None,
) -> Callable[[int, int], Any]:
    by_products = torch.is_grad_enabled()
    dense_head: Callable = dpt.dense_head
    if speed is not None and not torch.compiler.is_compiling():
        dense_head = speed(dpt.dense_head, *dpt.make(head, tables), tokens.grid, by_products)

    def run(start: int, stop: int):
        dense = tokens.patches(start, stop, head.intermediate_layer_idx)
        layers = [dense[i % len(tokens)] for i in head.intermediate_layer_idx]
        outputs = dense_head(head, layers, tokens.grid, tables, by_products=by_products)
        shape = -1, stop - start
        if isinstance(outputs, Tensor):
            return outputs.unflatten(0, shape)
        return tuple(output.unflatten(0, shape) for output in outputs)

    return run


@contextmanager
def reduced_precision(head: Any, dtype: torch.dtype | None) -> Generator[Callable[[Any], Any]]:
    """Autocast to a dtype inside the `with` block; None leaves all as it is.

    Gives a function that casts the outputs of the head back to float32 (or float64) where its weights are, unless
    autocast was on before.
    """
    weight = next(iter(head.parameters()), None)
    if dtype is None or weight is None:
        yield lambda outputs: outputs
        return
    wide = weight.dtype in (torch.float32, torch.float64) and autocast_dtype(weight.device.type) is None
    with torch.autocast(weight.device.type, dtype):
        yield partial(cast, dtype=weight.dtype) if wide else lambda outputs: outputs


def cast(outputs: Any, dtype: torch.dtype) -> Any:
    """The outputs of a head in a dtype, its tensors inside tuples, lists and dicts."""
    return changed(outputs, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def room(part: Any, frames: int, total: int, device: torch.device | None, head: str) -> Any:
    """Empty tensors for all frames of a clip, in tuples, lists and dicts like those that a head returned for a chunk.

    Args:
        part: what it returned for `frames` frames, in dimension 1 of its tensors.
        total: frames of the clip.
        device: where they go; None: where `part` is.

    Raises:
        PaceError: a tensor does not have its frames in dimension 1, or there is something else in the output.
    """
    if isinstance(part, Tensor) and part.ndim > 1 and part.shape[1] == frames:
        where = part.device if device is None else device
        shape = (len(part), total, *part.shape[2:])
        # Only from pinned memory can the GPU copy while it computes.
        pin = part.is_cuda and where.type == "cpu"
        return torch.empty(shape, dtype=part.dtype, device=where, pin_memory=pin)
    if isinstance(part, dict):
        return like(part, [room(value, frames, total, device, head) for value in part.values()])
    if isinstance(part, (tuple, list)):
        return like(part, [room(value, frames, total, device, head) for value in part])
    if part is None:
        return None
    what = f"a tensor {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
    raise PaceError(
        f"{head} returned {what} for {frames} frames, which can't be joined over frames: "
        "call it with frames_chunk_size=None"
    )


def write(outputs: Any, part: Any, start: int) -> None:
    """Write what a head returned for some frames to their place, from frame `start` on."""
    if isinstance(part, Tensor):
        # Off CUDA nothing is pinned, and nothing waits for a copy that is on its way.
        outputs[:, start : start + part.shape[1]].copy_(part, non_blocking=part.is_cuda)
    elif part is not None:
        keys = part.keys() if isinstance(part, dict) else range(len(part))
        for key in keys:
            write(outputs[key], part[key], start)


def like(outputs: dict | tuple | list, values: list) -> Any:
    """`values` in a dictionary, tuple, list or named tuple of the kind of `outputs`."""
    if isinstance(outputs, dict):
        found = copy.copy(outputs)  # its items may be attributes, too
        for key, value in zip(outputs, values, strict=True):
            found[key] = value
        return found
    return type(outputs)(*values) if hasattr(outputs, "_fields") else type(outputs)(values)


def moved(outputs: Any, device: torch.device | None) -> Any:
    """The outputs of a head on a device; None leaves them where they are."""
    return outputs if device is None else changed(outputs, lambda tensor: tensor.to(device))


def changed(outputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The outputs of a head with its tensors changed, those inside tuples, lists and dicts, too."""
    if isinstance(outputs, Tensor):
        return change(outputs)
    if isinstance(outputs, dict):
        return like(outputs, [changed(value, change) for value in outputs.values()])
    if isinstance(outputs, (tuple, list)):
        return like(outputs, [changed(value, change) for value in outputs])
    return outputs
