"""Whether a model can be accelerated, tried on a tiny clip and on a second model that shares its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PRE_AA, PaceConfig
from ..errors import UnsupportedModelError
from ..hosts.base import Host, find_host
from ..runtime.bare_copy import bare_copy
from ..runtime.compiling import outside_modes

FRAMES, ROWS, COLUMNS = 3, 2, 3  # of the clip
KEEP = 0.5
LARGEST_ERROR = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative; narrower dtypes round
LARGEST_NARROW_ERROR = 5e-2


def key(model: nn.Module, mode: str | None) -> tuple:
    """What decides whether a trial passes: it need not be repeated while that stays the same."""
    return (mode, *(type(module) for module in model.modules()))


def run(model: nn.Module, host: Host, config: PaceConfig) -> None:
    """Try a model: unpruned it must give what it gives without us, and pruned something must have been left out.

    The model itself is not run: no hooks are called, no caches are filled, and the random state stays as it is.

    Raises:
        UnsupportedModelError: it does not fit, in one sentence.
    """
    if any(p.is_meta for p in model.parameters()):
        return  # nothing to try it on: it is offloaded, or will be loaded later
    kind = type(model).__name__
    if config.mode == PRE_AA:
        missing = host.missing_stock_parts()
        if missing:
            raise UnsupportedModelError(
                f"{kind}.{host.trunk_name} lacks {', '.join(missing)}, which pre-AA pruning needs: use global pruning, "
                'mode="global"'
            )
        theirs = host.trunk.__dict__.get("forward")
        theirs = getattr(theirs, "previous", theirs)  # what ours stands in for
        if theirs is not None:
            raise UnsupportedModelError(
                f"{host.trunk_name}.forward is replaced on this instance by {theirs!r}, which pre-AA pruning would "
                "leave aside: undo that patch first"
            )
    with torch.no_grad(), outside_modes():
        _try(kind, bare_copy(model), config)


def _try(kind: str, bare: Any, config: PaceConfig) -> None:
    from .install import place, remove
    from .state import State

    host = find_host(bare)
    images, stock = _stock(kind, host)
    if images is None:
        return  # it is called with more than images, or by another entrance: its calls will show
    whole = PaceConfig(1.0, mode=config.mode)
    state = State(whole, host, forced=True)
    place(state)
    advice = 'use `mode="global"`' if config.mode == PRE_AA else "it can't be accelerated as it is"
    try:
        same = list(tensors(_dense(host.run_trunk(images))))
        if not alike(stock, same, host.reference.dtype):
            what = "pruned before alternating attention" if config.mode == PRE_AA else "run through the patch"
            raise UnsupportedModelError(
                f"{kind} gives other outputs when {what} with all tokens kept, so its {host.trunk_name} is not the "
                f"stock one: {advice}"
            )
        state.config, state.forced = replace(whole, keep_ratio=KEEP, min_frames=1), False
        state.kept = None
        pruned = list(tensors(_dense(host.run_trunk(images))))
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{kind} fails when its blocks are given some of the tokens ({type(error).__name__}: {first_line(error)}): "
            "turn off what in it merges or reshapes tokens of the whole grid, or accelerate the model without that"
        ) from error
    finally:
        remove(bare)
    if state.kept is None:
        raise UnsupportedModelError(
            f"{kind}.{host.trunk_name} does not call its blocks where accelerate could prune: undo other patches of "
            "their forwards first"
        )
    shapes = [[tuple(t.shape) for t in found] for found in (stock, pruned)]
    finite = [
        all(bool(torch.isfinite(t).all()) for t in found if t.is_floating_point())
        for found in (stock, pruned)
    ]
    if shapes[0] != shapes[1] or finite[0] > finite[1]:
        raise UnsupportedModelError(
            f"{kind} gives outputs of other shapes, or that are not finite, when some of its tokens are left out: "
            f"{advice}"
        )


def _stock(kind: str, host: Host) -> tuple[Tensor | None, list[Tensor]]:
    """A clip that the trunk takes, and what it gives; None where it does not take images alone.

    Raises:
        UnsupportedModelError: it takes none of the sizes that are tried.
    """
    grids = [(ROWS, COLUMNS)]
    # Some merge tokens of a grid that they are told beforehand.
    told = ((getattr(m, "patch_height", None), getattr(m, "patch_width", None)) for m in host.trunk.modules())
    grids += [(rows, columns) for rows, columns in told if isinstance(rows, int) and isinstance(columns, int)][:1]
    for grid in grids:
        images = _images(host, grid)
        try:
            return images, list(tensors(host.run_trunk(images)))
        except (TypeError, NotImplementedError):
            return None, []
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
    raise UnsupportedModelError(
        f"{kind}.{host.trunk_name} fails by itself on a tiny clip ({reason}), so pruning can't be tried: if it is set to "
        "one size of images, or merges tokens of one grid, turn that off"
    )


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _images(host: Host, grid: tuple[int, int]) -> Tensor:
    """A clip [1, FRAMES, 3, H, W] for a host, always the same."""
    size, reference = host.patch_size, host.reference
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (1, FRAMES, 3, grid[0] * size, grid[1] * size)
    images = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    return images.to(reference.device, reference.dtype)


def _dense(output: Any) -> Any:
    """The output of a trunk with restored tokens written out."""
    if isinstance(output, tuple):
        return tuple(list(part) if hasattr(part, "kept") else part for part in output)
    return output


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dictionaries; an empty one in place of None."""
    if isinstance(value, Tensor):
        yield value
    elif value is None:
        yield torch.empty(0)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def alike(stock: list[Tensor], found: list[Tensor], dtype: torch.dtype) -> bool:
    """Whether outputs are the same up to rounding."""
    if [t.shape for t in stock] != [t.shape for t in found]:
        return False
    most = LARGEST_ERROR.get(dtype, LARGEST_NARROW_ERROR)
    for a, b in zip(stock, found, strict=True):
        a, b = a.double().nan_to_num(), b.double().nan_to_num()
        if float((a - b).norm()) > most * float(a.norm()):
            return False
    return True
