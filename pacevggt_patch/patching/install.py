"""Install the pruned forward on one model instance, and take it off again.

Nothing but `forward` in the `__dict__` of some modules is touched. `__call__` finds it there, so hooks run. Other
instances, `state_dict` and the class stay as they are, and deleting it is a full undo.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..config import DEFAULT_KEEP_RATIO, GLOBAL, PRE_AA, PaceConfig, config_from
from ..errors import PaceError, UnsupportedModelError
from ..hosts import blocks
from ..hosts.base import Host, find_host
from ..hosts.dpt import is_dense_head
from ..hosts.rope import static_rope
from ..runtime.attention import autocast_dtype, kernel_name
from ..runtime.ranks import Ranks
from ..version import __version__
from ..weights.fingerprint import fingerprints
from ..weights.pace import PaceWeights
from ..weights.resolve import resolve
from . import trial
from .forwards import (
    BlockForward,
    CameraHeadForward,
    DenseHeadForward,
    EmbeddingForward,
    FeaturesForward,
    Forward,
    JoinedCameraHeadForward,
    PreAATrunkForward,
    RopeForward,
    TrunkForward,
)
from .state import State
from .summary import Summary, current_device

Model = TypeVar("Model", bound=nn.Module)


def accelerate(
    model: Model,
    keep_ratio: float | PaceConfig = DEFAULT_KEEP_RATIO,
    merge_budget: float | None = None,
    *,
    weights: str | PathLike[str] | PaceWeights | None = "auto",
    mode: str | None = None,
    min_frames: int | None = None,
    compile: bool = False,
    head_dtype: torch.dtype | None = None,
    output_device: torch.device | str | None = None,
    process_group: Any = None,
) -> Model:
    """Accelerate a model in place by token pruning. It is called as before and returns the same outputs, sooner.

    By default only global attention is pruned. It sees `keep_ratio` of each frame's patch tokens; a few heads that look
    for matches see all. The model's own aggregator runs, with its own arguments and return values.

    Call it again to change the settings, and `remove` to have the stock model back. `keep_ratio=1` is the stock model,
    to the bit without `compile`.

    Args:
        model: a VGGT, a fork with the same parts, or a model of another family that is known (docs/hosts.md).
        keep_ratio: share of each frame's patch tokens that is kept, in (0, 1]. Or a `PaceConfig` with all settings, as
            `fit_budget` returns one.
        merge_budget: share of the clip's patch tokens that is merged into kept ones, in [0, 1 - keep_ratio]. A merge
            budget chooses pre-AA pruning.
        weights: "auto" takes the bundled weights of this checkpoint, else a calibration that is kept on this machine,
            else it calibrates on the first clip. None is training-free. Or a path, a Hugging Face Hub id
            "user/repo[@revision]", or `PaceWeights`, as `calibrate` returns them.
        mode: "global" or "pre-aa", the paper's own method. The latter prunes frame attention, too, and loses more. None
            takes the mode of the weights.
        min_frames: clips of fewer frames run unpruned. None prunes from the number of frames on from which pruning is
            faster; 1 prunes every clip.
        compile: attention blocks and dense heads run by functions that torch.compile makes at the first call, which
            takes a minute or so. Modules with hooks, a replaced forward or an unknown class run uncompiled. Outputs
            differ by rounding.
        head_dtype: torch.bfloat16 or torch.float16. Dense heads run under autocast to it, even if the model switches
            autocast off for them. Outputs of float32 heads stay float32.
        output_device: where the outputs of dense heads go, a chunk of frames at a time. "cpu" leaves the memory of the
            GPU to longer clips.
        process_group: a `torch.distributed.ProcessGroup`, or True for the default one. Its processes share each clip:
            each calls the model with its own frames, see `split_frames`, and gets the outputs of these. Every process
            of the group must make the same calls. For global pruning, without gradients.

    Returns:
        `model`.

    Raises:
        PaceError: a setting is out of range.
        UnsupportedModelError: the model does not fit, and why.
        WeightsError: the weights do not fit or can't be read. After any error the model is as it was before. All
            processes of a group raise where one does, or where they differ.
    """
    settings = dict(
        mode=mode,
        min_frames=min_frames,
        compile=compile,
        head_dtype=head_dtype,
        output_device=output_device,
    )
    ranks = None if process_group is None else Ranks(process_group)

    def prepared() -> tuple[Host, PaceConfig, PaceWeights | None, bool]:
        config = config_from(keep_ratio, merge_budget, settings)
        host = find_host(model)
        _check_settings(host, config)
        before = state_of(model) if is_accelerated(model) else None
        chosen, mode = resolve(weights, config, host)
        auto = isinstance(weights, str) and weights == "auto" and mode == GLOBAL
        known = None if before is None or not before.auto else before.weights
        if auto and chosen is None and _still_fits(known, host):
            chosen = known  # calibrated on a clip that came
        own = None if chosen is None else chosen.copy_for(host)
        return host, replace(config, mode=mode), own, auto

    host, config, own, auto = prepared() if ranks is None else _agreed(ranks, prepared)
    install(model, host, config, own, auto=auto, ranks=ranks)
    return model


def _agreed(
    ranks: Ranks, prepare: Callable[[], tuple[Host, PaceConfig, PaceWeights | None, bool]]
) -> tuple[Host, PaceConfig, PaceWeights | None, bool]:
    """What `prepare` gives, once all ranks have the same."""
    found = None

    def described() -> tuple[None, dict[str, str]]:
        nonlocal found
        found = host, config, weights, auto = prepare()
        _check_for_ranks(host, config, weights, auto)
        ranks.check_device(host.reference.device)
        shown = replace(config, output_device=None)  # each has its own
        return None, {
            "version of pacevggt-patch": __version__,
            "type of device": host.reference.device.type,
            "dtype": str(host.reference.dtype),
            "model": f"{type(host.model).__name__} {' '.join(p[:12] for p in fingerprints(host).values())}",
            "settings": str(shown),
            "weights": "none" if weights is None else f"{weights.mode} {weights.digest()[:12]}",
        }

    ranks.agree(described)
    assert found is not None
    return found


def _check_for_ranks(host: Host, config: PaceConfig, weights: PaceWeights | None, auto: bool) -> None:
    """Raise PaceError where a clip can't be spread over processes."""
    if config.mode != GLOBAL:
        raise PaceError(
            f'process_group does not go with mode="{config.mode}", which is for one process: use mode="global"'
        )
    if config.keep_ratio == 1 or config.min_frames not in (None, 1):
        name = "keep_ratio=1" if config.keep_ratio == 1 else f"min_frames={config.min_frames}"
        raise PaceError(
            f"{name} does not go with process_group: a clip over several processes is always pruned, leave it out"
        )
    if auto and weights is None:
        raise PaceError(
            "a model over several processes does not calibrate itself, and there are no weights for this one yet: pass "
            "those that calibrate(model, images) makes in one process, or weights=None"
        )
    if any(tensor.is_meta for tensor in host.fingerprint_tensors()):
        raise UnsupportedModelError(
            "the model's parameters hold no values, so whether all ranks have the same can't be told: load it first"
        )
    if weights is not None and weights.full_heads and not host.spec().num_heads:
        raise UnsupportedModelError(
            f"the global blocks of {type(host.model).__name__} do not tell how many heads they have, so which of them "
            "see all tokens can't be told over several processes: pass weights=None"
        )
    missing = host.missing_stock_parts()
    if missing:
        raise UnsupportedModelError(
            f"{host.label} lacks {', '.join(missing)}, by which a frame is told that "
            "it is not the first: leave process_group out"
        )


def _check_settings(host: Host, config: PaceConfig) -> None:
    """Raise UnsupportedModelError for a setting that can't be followed on this model."""
    for name, why in host.refusals().items():
        value = getattr(config, name)
        if value is not None and value is not False:
            raise UnsupportedModelError(f"{why}, so {name}={value} can't be followed: leave it out")
    if config.mode == PRE_AA or config.merge_budget is not None:
        trial.check_stock_parts(host)


def _still_fits(weights: PaceWeights | None, host: Host) -> bool:
    try:
        return weights is not None and weights.check(host) is None
    except PaceError:
        return False


def install(
    model: nn.Module,
    host: Host,
    config: PaceConfig,
    weights: PaceWeights | None,
    *,
    auto: bool = False,
    ranks: Ranks | None = None,
) -> State:
    """Replace the forwards of a model, after a trial; `weights` are used as they are.

    Args:
        auto: weights are found on the first clip where there are none.
        ranks: processes that each clip is spread over.

    Raises:
        UnsupportedModelError: the model does not fit. It is as it was.
    """
    before = state_of(model) if is_accelerated(model) else None
    state = State(
        config,
        host,
        weights,
        auto=auto,
        pending=auto and weights is None and config.keep_ratio < 1,
        ranks=ranks,
    )
    heads = () if weights is None else weights.full_heads
    if before is not None:
        state.threads, state.told, state.recomputed = before.threads, before.told, before.recomputed
        state.trial = before.trial
        state.threads.exchange = None
    if state.trial.key != trial.key(model, host, config.mode, heads):
        state.trial = trial.run(model, host, config, heads)
    if weights is not None and state.trial.heads is not None:
        problem = f"{weights.source} can't be used: its heads can't see all tokens in this model where others see few"
        if not auto:
            raise UnsupportedModelError(f"{problem} ({state.trial.heads}): pass weights=None")
        state.weights = None
        state.say_once(f"{problem}: it runs without weights, which costs quality ({state.trial.heads})")
    state.check_values(warn=False)
    installed = forwards_of(model)
    remove(model)
    try:
        place(state)
    except Exception:
        for forward in installed:
            forward.module.__dict__[forward.attribute] = forward
        raise
    return state


def place(state: State, *, trunk_alone: bool = False) -> None:
    """Replace the forwards of a model that has none of ours.

    Args:
        trunk_alone: leave the heads as they are. It takes a good part of the time to tell whether they are stock ones.
    """
    host, config = state.host, state.config
    state.rope = None if host.rope is None else static_rope(host.rope)
    every = [(kind, index, module) for kind, index, module in host.blocks if kind != "special"]
    side_blocks = host.side_blocks() if config.compile else {}
    modules = [*(module for _, _, module in every), *side_blocks.values()]
    stock = blocks.stock_blocks(modules, host.embed_dim, host.rope, host.position_argument, host.by_tables)
    trunk = PreAATrunkForward if config.mode == PRE_AA else TrunkForward
    inside = host.part_name(host.embedding_name)
    parts: list[tuple[str, Any, Callable[..., Forward]]] = [(host.trunk_name, host.trunk, trunk)]
    parts.append((inside, host.embedding, EmbeddingForward))
    if hasattr(host.embedding, "forward_features"):
        parts.append((inside, host.embedding, FeaturesForward))
    if host.rope is not None and state.rope is not None:
        parts.append((host.part_name(host.rope_name), host.rope, RopeForward))
    for kind, index, module in every:
        name = host.part_name(host.block_name(kind, index))
        run = partial(BlockForward, kind=kind, index=index, stock=id(module) in stock)
        parts.append((name, module, run))
    for index, (name, module) in enumerate(side_blocks.items()):
        if id(module) in stock:
            parts.append((name, module, partial(BlockForward, kind="side", index=index, stock=True)))
    for name, head in () if trunk_alone else host.dense_heads.items():
        fast = is_dense_head(head, 2 * host.embed_dim, host.depth)
        parts.append((name, head, partial(DenseHeadForward, fast=fast)))
    if host.camera_head is not None and config.mode == PRE_AA and not trunk_alone:
        parts.append(("camera_head", host.camera_head, CameraHeadForward))
    if host.camera_head is not None and state.ranks is not None:
        parts.append(("camera_head", host.camera_head, JoinedCameraHeadForward))
    state.placed = [make(module, state, name) for name, module, make in parts]
    fast = any(isinstance(forward, DenseHeadForward) and forward.fast for forward in state.placed)
    if config.compile and not stock and not fast:
        raise UnsupportedModelError(
            f"compile=True, but no block and no dense head of this {type(host.model).__name__} works as the stock one "
            "does, so nothing can be compiled: pass compile=False"
        )
    for forward in state.placed:
        forward.module.__dict__[forward.attribute] = forward


def remove(model: Model) -> Model:
    """Give the stock model back, bit for bit. A model that is not accelerated is left as it is.

    Raises:
        PaceError: a forward was replaced after `accelerate`; ours can't be taken out from under it.
    """
    check_foreign(model)
    for forward in forwards_of(model):
        if forward.previous is None:
            del forward.module.__dict__[forward.attribute]
        else:
            forward.module.__dict__[forward.attribute] = forward.previous
    return model


def check_foreign(model: nn.Module) -> None:
    """Raise PaceError where somebody put a forward over one of ours."""
    for ours in {id(forward.state): forward.state for forward in forwards_of(model)}.values():
        for forward in ours.placed:
            theirs = forward.module.__dict__.get(forward.attribute)
            if theirs is not None and not isinstance(theirs, Forward):
                raise PaceError(
                    f"{forward.name}.{forward.attribute} was replaced after accelerate by {theirs!r}: undo that patch "
                    "first"
                )


def is_accelerated(model: nn.Module) -> bool:
    """Whether this model is accelerated, paused or not. It no longer is if its aggregator was replaced since."""
    return bool(_states(model))


@contextmanager
def paused(model: nn.Module) -> Generator[None]:
    """Run the stock forward inside the `with` block, in this thread. Blocks may overlap.

    Raises:
        PaceError: the model is not accelerated.
    """
    pauses = state_of(model).threads.pauses
    pauses.append(None)
    try:
        yield
    finally:
        pauses.pop()


@contextmanager
def observing(model: nn.Module, observer: Callable[..., Any]) -> Generator[None]:
    """Run the model unpruned inside the `with` block and hand every global block to a function, in this thread.

    Args:
        model: an accelerated model.
        observer: of the number of the block, its call, its own forward and the clip; returns what the block returns.
    """
    threads = state_of(model).threads
    before, threads.observer = threads.observer, observer
    try:
        yield
    finally:
        threads.observer = before


def retune(
    model: nn.Module, keep_ratio: float, merge_budget: float | None = None, *, checkpointing: bool = False
) -> None:
    """Change the settings of an accelerated model and nothing else; for training, which does so in every step.

    Args:
        model: an accelerated model.
        keep_ratio, merge_budget: as in `accelerate`.
        checkpointing: compute the attention blocks once more for the backward pass instead of keeping what is in them.

    Raises:
        PaceError: a setting is out of range, or the model is not accelerated.
    """
    state = state_of(model)
    state.config = replace(state.config, keep_ratio=keep_ratio, merge_budget=merge_budget)
    state.checkpointing = checkpointing


def summary(model: nn.Module, images: Tensor | None = None) -> Summary:
    """Settings, weights and stages of an accelerated model.

    Args:
        model: an accelerated model.
        images: [S, 3, H, W] or [B, S, 3, H, W]. The model runs on them and each stage is timed; with `compile` a run
            that compiles comes first. None reports the tokens of the last forward pass.

    Raises:
        PaceError: the model is not accelerated.
    """
    state = state_of(model)
    host = state.host
    device = host.reference.device
    if images is not None:
        if not isinstance(images, Tensor):
            raise PaceError(
                f"images must be a tensor [B, S, 3, H, W] in {host.image_values}, got {type(images).__name__}"
            )
        images = images[None] if images.ndim == 4 else images
        with torch.inference_mode(), current_device(device), state.timer.measuring():
            if state.config.compile or state.pending:
                state.timer.timing = False
                model(images)  # what is compiled or calibrated on the way is not what takes the time later
                state.timer.timing = True
            model(images)
    forwards = forwards_of(model)
    return Summary(
        backbone=str(host),
        config=state.config,
        weights=_weights_in_words(state),
        paused=state.paused,
        patched=list(dict.fromkeys(f.name for f in forwards if not isinstance(f, BlockForward))),
        attention=kernel_name(device, autocast_dtype(device.type) or host.reference.dtype),
        compiled=_compiled_parts(forwards) if state.config.compile else "no",
        processes=None if state.ranks is None else f"rank {state.ranks.rank} of {state.ranks.world}",
        stages=list(state.timer.stages),
        kept=state.kept,
    )


def _weights_in_words(state: State) -> str:
    if state.weights is not None:
        return str(state.weights)
    return "none yet (calibrates on the first clip)" if state.pending else "none (training-free)"


def _compiled_parts(forwards: list[Forward]) -> str:
    """Which parts run compiled, in words."""
    count = sum(isinstance(f, BlockForward) and f.kinds is not None for f in forwards)
    heads = [
        f.name
        for f in forwards
        if isinstance(f, DenseHeadForward) and f.fast is type(f.module) and f.state.compiles_heads
    ]
    return ", ".join([f"{count} blocks", *heads])


def forwards_of(model: nn.Module) -> list[Forward]:
    """The replaced forwards of this model. They are looked up, not remembered: a deepcopy finds its own."""
    if not isinstance(model, nn.Module):
        raise PaceError(f"expected a model (torch.nn.Module), got {type(model).__name__}")
    found = (
        module.__dict__.get(name) for module in model.modules() for name in ("forward", "forward_features")
    )
    return [forward for forward in found if isinstance(forward, Forward)]


def state_of(model: nn.Module) -> State:
    """What the forwards of an accelerated model share.

    Raises:
        PaceError: it is not accelerated.
    """
    states = _states(model)
    if not states:
        raise PaceError("this model is not accelerated: call pacevggt_patch.accelerate(model) first")
    return states[0]


def _states(model: nn.Module) -> list[State]:
    """Of the replaced forwards whose trunk is in the model: without it the others do nothing."""
    forwards = forwards_of(model)
    modules = {id(module) for module in model.modules()}
    return [forward.state for forward in forwards if id(forward.state.host.trunk) in modules]
