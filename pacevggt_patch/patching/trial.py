"""Whether a model can be accelerated, tried on a tiny clip and on a second model that shares its tensors."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..config import PRE_AA, PaceConfig
from ..errors import UnsupportedModelError, first_line
from ..hosts.base import Host, find_host
from ..method.full_heads import Heads
from ..runtime.bare_copy import bare_copy
from ..runtime.compiling import outside_modes
from ..weights.pace import PaceWeights
from .state import Outcome, State

FRAMES, ROWS, COLUMNS = 3, 2, 3  # of the clip
KEEP = 0.5
LARGEST_ERROR = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative; narrower dtypes round
LARGEST_NARROW_ERROR = 5e-2


def key(model: nn.Module, host: Host, mode: str | None, heads: Heads) -> tuple:
    """What decides whether a trial passes: it need not be repeated while that stays the same."""
    return (mode, heads, host.reference.device, *(type(module) for module in model.modules()))


def run(model: nn.Module, host: Host, config: PaceConfig, heads: Heads = ()) -> Outcome:
    """Try a model: unpruned it must give what it gives without us, and pruned something must have been left out.

    The model itself is not run: no hooks are called, no caches of modules are filled, and the random state stays as it
    is.

    Args:
        heads: try it with these full-attention heads, too.

    Raises:
        UnsupportedModelError: it does not fit, in one sentence.
    """
    if any(p.is_meta for p in model.parameters()):
        return Outcome()  # nothing to try it on: it is offloaded, or will be loaded later
    kind = type(model).__name__
    if config.mode == PRE_AA:
        check_stock_parts(host)
        theirs = host.trunk.__dict__.get("forward")
        theirs = getattr(theirs, "previous", theirs)  # what ours stands in for
        if theirs is not None:
            raise UnsupportedModelError(
                f"{host.trunk_name}.forward is replaced on this instance by {theirs!r}, which pre-AA pruning would "
                "leave aside: undo that patch first"
            )
    device = host.reference.device
    # Some draw in their forward what they do not use.
    random = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with torch.no_grad(), outside_modes(), random:
        return Outcome(key(model, host, config.mode, heads), *_try(kind, bare_copy(model), config, heads))


def check_stock_parts(host: Host) -> None:
    """Raise UnsupportedModelError for a host that can't be pruned before alternating attention."""
    missing = host.missing_stock_parts()
    if missing:
        raise UnsupportedModelError(
            f"{host.label} lacks {', '.join(missing)}, which pre-AA pruning needs: use global pruning, "
            'mode="global"'
        )


def _try(kind: str, bare: Any, config: PaceConfig, heads: Heads) -> tuple[bool, str | None]:
    from .install import place, remove

    host = find_host(bare)
    with _lengths(host) as lengths:
        images, stock = _stock(kind, host)
    if images is None and config.mode == PRE_AA:
        raise UnsupportedModelError(
            f"{host.label} does not take images alone, as pre-AA pruning needs it: use global pruning, "
            'mode="global"'
        )
    if images is None:
        return False, None  # it is called with more than images, or by another entrance: its calls will show
    _check_kinds(host, lengths, images)
    problem = None
    on_device = images.is_cuda and _alike_on(images.device, host, images, stock)
    whole = PaceConfig(1.0, mode=config.mode)
    state = State(whole, host, forced=True, tried=True)
    place(state, trunk_alone=True)  # no head is called here
    advice = 'use mode="global"' if config.mode == PRE_AA else "it can't be accelerated as it is"
    try:
        same = flat(host.run_trunk(images))
        if not alike(stock, same, host.reference.dtype):
            what = "pruned before alternating attention" if config.mode == PRE_AA else "run through the patch"
            raise UnsupportedModelError(
                f"{kind} gives other outputs when {what} with all tokens kept, so {host.itself} is not the stock "
                f"one: {advice}"
            )
        state.config, state.forced = replace(whole, keep_ratio=KEEP, min_frames=1), False
        state.kept = None
        pruned = flat(host.run_trunk(images))
        if heads:
            problem = _problem_of_heads(state, heads, images)
    except UnsupportedModelError:
        raise
    except Exception as error:
        given = f", beside {', '.join(sorted(state.given))}" if state.given else ""
        if config.mode != PRE_AA:
            advice = "turn off what in it merges, masks or reshapes tokens of the whole grid"
        raise UnsupportedModelError(
            f"{kind} fails when the attention blocks of {host.itself} are given some of the tokens{given} "
            f"({type(error).__name__}: {first_line(error)}): {advice}"
        ) from error
    finally:
        remove(bare)
    if state.kept is None:
        raise UnsupportedModelError(
            f"{host.label} does not call its blocks where accelerate could prune: undo other patches of "
            "their forwards first"
        )
    (leaves, form), (found, other) = stock, pruned
    finite = [
        all(bool(torch.isfinite(t).all()) for t in part if t.is_floating_point()) for part in (leaves, found)
    ]
    if form != other or [t.shape for t in leaves] != [t.shape for t in found] or finite[0] > finite[1]:
        raise UnsupportedModelError(
            f"{kind} gives outputs of other shapes, or that are not finite, when some of its tokens are left out: "
            f"{advice}"
        )
    return on_device, problem


def _problem_of_heads(state: State, heads: Heads, images: Tensor) -> str | None:
    """Why these heads of a model that can be pruned can't see all tokens where others see few, or None."""
    state.weights = PaceWeights.of_heads(state.host, heads, {})
    try:
        state.host.run_trunk(images)
    except Exception as error:  # whatever attention of an unknown type trips over
        return first_line(error)
    finally:
        state.weights = None
    return None


def _stock(kind: str, host: Host) -> tuple[Tensor | None, Any]:
    """A clip that the trunk takes, and what it gives; None where it does not take images alone.

    Raises:
        UnsupportedModelError: it takes none of the sizes that are tried.
    """
    grids = [(ROWS, COLUMNS)]
    # Some merge tokens of a grid that they are told beforehand.
    told = ((getattr(m, "patch_height", None), getattr(m, "patch_width", None)) for m in host.trunk.modules())
    grids += [
        (rows, columns) for rows, columns in told if isinstance(rows, int) and isinstance(columns, int)
    ][:1]
    for grid in grids:
        images = _images(host, grid)
        try:
            return images, flat(host.run_trunk(images))
        except (TypeError, NotImplementedError):
            return None, None
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
    raise UnsupportedModelError(
        f"{host.label} fails by itself on a tiny clip ({reason}), so pruning can't be tried: turn off "
        "what ties it to one size of images or one grid of tokens"
    )


@contextmanager
def _lengths(host: Host) -> Generator[dict[tuple[str, int], int]]:
    """The most tokens of a sequence that each frame and global block is given inside the `with` block."""
    found: dict[tuple[str, int], int] = {}

    def look(at: tuple[str, int], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = host.block_call(args, kwargs)
        if call is not None:
            found[at] = max(call.x.shape[1], found.get(at, 0))

    hooks = [
        module.register_forward_pre_hook(partial(look, (kind, index)), with_kwargs=True)
        for kind, index, module in host.blocks
        if kind in ("frame", "global")
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _check_kinds(host: Host, lengths: dict[tuple[str, int], int], images: Tensor) -> None:
    """Raise UnsupportedModelError where frame blocks were given several frames, and global blocks one."""
    frame = host.special_tokens + images.shape[-2] * images.shape[-1] // host.patch_size**2
    within, across = (
        [n for (kind, _), n in lengths.items() if kind == which] for which in ("frame", "global")
    )
    if within and across and max(within) >= 2 * frame and max(across) <= frame:
        raise UnsupportedModelError(
            f"the frame blocks of {host.label} are given the tokens of several frames, and its global blocks those of "
            "one: `blocks` of its adapter names them the wrong way round"
        )


def _alike_on(device: torch.device, host: Host, images: Tensor, stock: Any) -> bool:
    """Whether the trunk gives the same with a device as torch's default device."""
    try:
        with device:
            return alike(stock, flat(host.run_trunk(images)), host.reference.dtype)
    except Exception:  # whatever it makes on the CPU on purpose
        return False


def _images(host: Host, grid: tuple[int, int]) -> Tensor:
    """A clip [1, FRAMES, 3, H, W] for a host, always the same."""
    size, reference = host.patch_size, host.reference
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (1, FRAMES, 3, grid[0] * size, grid[1] * size)
    images = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    return images.to(reference.device, reference.dtype)


def flat(output: Any) -> tuple[list[Tensor], Any]:
    """The tensors in an output, and the containers that they are in; restored tokens are written out."""
    if isinstance(output, tuple):
        output = tuple(list(part) if hasattr(part, "kept") else part for part in output)
    leaves, form = tree_flatten(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], (form, [type(leaf) for leaf in leaves])


def alike(stock: tuple[list[Tensor], Any], found: tuple[list[Tensor], Any], dtype: torch.dtype) -> bool:
    """Whether outputs are the same up to rounding."""
    if stock[1] != found[1] or [t.shape for t in stock[0]] != [t.shape for t in found[0]]:
        return False
    most = LARGEST_ERROR.get(dtype, LARGEST_NARROW_ERROR)
    for a, b in zip(stock[0], found[0], strict=True):
        a, b = a.double().nan_to_num(), b.double().nan_to_num()
        if float((a - b).norm()) > most * float(a.norm()):
            return False
    return True
