"""Install the pruned forward on one model instance, and take it off again.

Nothing but `forward` in the `__dict__` of the aggregator and the heads is touched: `__call__` finds it there, so hooks
run, `state_dict` and the class stay as they are, other instances never notice, and deleting it is a full undo.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..config import DEFAULT_KEEP_RATIO, PaceConfig, device_of
from ..errors import PaceError, UnsupportedModelError
from ..hosts import blocks
from ..hosts import vggt as backbone
from ..hosts.dpt import is_dense_head
from ..method.pipeline import aggregate
from ..planning.break_even import pruning_pays
from ..runtime.attention import autocast_dtype, kernel_name
from ..runtime.compiling import compiled, is_watched, unwatched
from ..weights.pace import PaceWeights, resolve
from .heads import moved, reduced_precision, restored_argument, run_camera_head, run_dense_head
from .summary import StageTimer, Summary, current_device

Model = TypeVar("Model", bound=nn.Module)
STOCK_AGGREGATOR = "stock aggregator (few frames)"


@dataclass
class _State:
    """What the replaced forwards of one model share."""

    config: PaceConfig
    weights: PaceWeights | None
    layers: tuple[int, ...]
    names: tuple[str, ...]  # of the patched submodules
    paused: bool = False
    checkpointing: bool = False
    compiles_heads: bool = True  # where the settings ask for compilation
    timer: StageTimer = field(default_factory=StageTimer)


class _Forward:
    """Stands in for the forward of one module instance. A plain object, so deepcopy and pickle follow it."""

    def __init__(self, module: Any, state: _State, name: str):
        self.module = module
        self.state = state
        self.name = name

    @property
    def stock(self) -> Callable:
        """The module's own forward."""
        return partial(type(self.module).forward, self.module)


class _AggregatorForward(_Forward):
    def __call__(self, images: Tensor, *args, **kwargs):
        state = self.state
        if state.paused:
            return self.stock(images, *args, **kwargs)
        if args or kwargs:
            raise UnsupportedModelError(
                "this aggregator was called with more than images, which the accelerated forward does not know: "
                "use `with paused(model):` for such calls"
            )
        grid = backbone.check_images(self.module, images, state.config.check_finite)
        if state.weights is not None:
            state.weights.to(images.device)
        state.timer.stages.clear()
        frames, patches = images.shape[1], grid[0] * grid[1]
        if not self.prunes(images, patches):
            length = frames * (patches + int(self.module.patch_start_idx))
            with state.timer.stage(STOCK_AGGREGATOR, length, length):
                return self.stock(images)
        tokens = aggregate(
            self.module,
            images,
            grid,
            state.config,
            state.layers,
            state.weights,
            state.timer,
            state.checkpointing,
        )
        return tokens, self.module.patch_start_idx

    def prunes(self, images: Tensor, patches: int) -> bool:
        """Whether clips of that many frames are pruned."""
        config, (clips, frames) = self.state.config, images.shape[:2]
        if config.min_frames is not None:
            return frames >= config.min_frames
        channels = self.module.camera_token.shape[-1]
        special, blocks = int(self.module.patch_start_idx), backbone.depth(self.module)
        kept = config.kept_tokens(patches)
        matching = [] if self.state.weights is None else self.state.weights.matching_shares()
        return pruning_pays(
            images.device.type,
            clips,
            frames,
            patches,
            kept,
            special,
            channels,
            blocks,
            config.dense_frames,
            matching,
        )


class _RopeForward(_Forward):
    def __init__(self, module: Any, state: _State, name: str):
        super().__init__(module, state, name)
        self.rope = backbone.static_rope(module)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        if self.state.paused:
            return self.stock(tokens, positions)
        return backbone.rotate(self.rope, tokens, positions)


class _BlockForward(_Forward):
    """An attention block by the functions of `blocks`, compiled; by its own code where that does not fit."""

    def __init__(self, module: Any, state: _State, name: str, rope: Any):
        super().__init__(module, state, name)
        self.rope = rope
        self.kinds = blocks.kinds(module)

    def __call__(self, *args, **kwargs):
        call = blocks.tokens_and_positions(args, kwargs)
        # A compiler that is at work already takes the host's code as it is.
        if call is None or self.state.paused or torch.compiler.is_compiling() or not self.fits(*call):
            return self.stock(*args, **kwargs)
        return backbone.run_fast_block(self.module, self.rope, *call, compiled)

    def fits(self, tokens: Tensor, positions: Tensor | None) -> bool:
        rope = self.module.attn.rope
        if (rope is None) != (positions is None):
            return False
        if positions is not None:
            if positions.shape[:2] != tokens.shape[:2]:
                return False
            # Ours stands in for it; what anybody else put there would not run.
            if not isinstance(rope.__dict__.get("forward"), _RopeForward) or is_watched(rope):
                return False
        if not blocks.is_open(self.module, self.kinds):
            return False
        return (
            tokens.dtype == self.module.attn.qkv.weight.dtype
            or autocast_dtype(tokens.device.type) is not None
        )


class _DenseHeadForward(_Forward):
    def __init__(self, module: Any, state: _State, name: str, fast: bool):
        super().__init__(module, state, name)
        self.fast = type(module) if fast else None  # the class that was tried: somebody may put in another

    def __call__(self, *args, **kwargs):
        state = self.state
        if state.paused:
            return self.stock(*args, **kwargs)
        # A head inside another module, such as a track head, feeds that module: it stays on its device.
        device = None if "." in self.name else state.config.output_device
        tokens = restored_argument(args, kwargs)
        with reduced_precision(self.module, state.config.head_dtype) as restored:
            if tokens is None:
                return moved(restored(self.stock(*args, **kwargs)), device)
            frames = tokens.kept.shape[1]
            with state.timer.stage(self.name, frames * tokens.patches_held, frames * tokens.role.shape[2]):
                fast = self.fast is type(self.module)
                compiles = (
                    state.config.compile
                    and state.compiles_heads
                    and unwatched(list(self.module.modules())[1:])
                )
                speed = compiled if compiles else None
                return restored(
                    run_dense_head(self.module, self.stock, tokens, args, kwargs, fast, device, speed)
                )


class _CameraHeadForward(_Forward):
    def __call__(self, *args, **kwargs):
        tokens = restored_argument(args, kwargs)
        if tokens is None:
            return self.stock(*args, **kwargs)
        frames = tokens.kept.shape[1]
        with self.state.timer.stage(self.name, frames, frames):
            return run_camera_head(self.stock, tokens, args, kwargs)


def accelerate(
    model: Model,
    keep_ratio: float = DEFAULT_KEEP_RATIO,
    merge_budget: float | None = None,
    *,
    weights: str | PathLike[str] | PaceWeights | None = "auto",
    check_finite: bool | None = None,
    min_frames: int | None = None,
    global_keys: float = 1.0,
    output_device: torch.device | str | None = None,
    compile: bool = False,
    head_dtype: torch.dtype | None = None,
    dense_frames: bool = False,
) -> Model:
    """Accelerate a VGGT in place: only some of its patch tokens enter alternating attention.

    `model(images)` and the separate calls of aggregator, camera, depth, point and track heads work as before. Call it
    again to change the settings, `remove` to have the stock model back. `keep_ratio=1, merge_budget=0` is the stock
    model, to the bit in float32 on the CPU without `compile`.

    Args:
        model: a VGGT, or a fork with the same parts.
        keep_ratio: share of each frame's patch tokens that enters alternating attention, in (0, 1].
        merge_budget: share of the clip's patch tokens that is merged into kept ones, in [0, 1 - keep_ratio]; the rest
            is pruned. None merges all that is not kept, which measured best without training.
        weights: "auto" keeps the weights in force on a model that is accelerated already with the same `dense_frames`,
            else takes the bundled weights of this backbone, and where there are none the training-free path, with a
            warning; None is training-free; else a path, a Hugging Face Hub id "user/repo[@revision]", or `PaceWeights`.
        check_finite: look for NaN and infinity in the images before work starts. None checks on the CPU only, since
            on CUDA the check makes the host wait for the device.
        min_frames: clips of fewer frames run the stock aggregator, on all tokens: `keep_ratio` is not applied to them,
            and their quality is the stock model's. None takes the number from which on pruning is the faster one (1 on
            the CPU, see `break_even.pruning_pays`); 1 prunes every clip. `summary` says which one ran.
        global_keys: share of the kept patch tokens of each frame whose keys and values the global blocks see, in
            (0, 1]; all queries stay, and so do the keys of camera and register tokens.
        output_device: where the outputs of dense heads go, a chunk of frames at a time; "cpu" leaves the memory of the
            GPU to clips whose depth and points would fill it (the host waits at the end of each head). None leaves them
            on the model's device. Cameras and images stay where they are.
        compile: run the attention blocks (DINO's, too) and the dense heads by functions that torch.compile makes when
            they are first called, which takes a minute or so; other numbers of frames need little more. What is of
            another make, and what somebody watches or replaced, runs as it is. Outputs differ by rounding.
        head_dtype: torch.bfloat16 or torch.float16: dense heads run under autocast to it, also where the host switches
            autocast off for them, as VGGT's own forward does. Outputs of float32 heads stay float32. None leaves that
            to the host.
        dense_frames: keep all patch tokens in frame attention, whose cost grows with the number of frames only, and
            prune global attention alone: what is not kept changes there by what its frame's kept tokens change. Better
            outputs for the time of unpruned frame blocks and for more memory. Nothing is merged then. Frame blocks
            run on a part of a long clip at a time: hooks on them see the parts.

    Returns:
        `model`.

    Raises:
        PaceError: a setting is out of range (`UnsupportedModelError`: the model does not fit; `WeightsError`: the
            weights do not fit or can't be read). The model is as it was before the call.
    """
    config = PaceConfig(
        keep_ratio,
        merge_budget,
        check_finite,
        min_frames,
        global_keys,
        device_of(output_device),
        compile,
        head_dtype,
        dense_frames,
    )
    host = backbone.find_host(model)
    parts: dict[str, tuple[Any, Callable[..., _Forward]]] = {
        "aggregator": (host.aggregator, _AggregatorForward)
    }
    any_fast = False
    for name, head in host.dense_heads.items():
        fast = is_dense_head(
            head, 2 * host.aggregator.camera_token.shape[-1], backbone.depth(host.aggregator)
        )
        any_fast |= fast
        parts[name] = (head, partial(_DenseHeadForward, fast=fast))
    if host.camera_head is not None:
        parts["camera_head"] = (host.camera_head, _CameraHeadForward)
    if host.rope is not None and _foreign(host.rope) is None:
        parts["aggregator.rope"] = (host.rope, _RopeForward)
    if compile:
        rope = backbone.static_rope(host.rope) if "aggregator.rope" in parts else None
        found = backbone.fast_blocks(host.aggregator, rope).items()
        fast_blocks = {name: block for name, block in found if _foreign(block) is None}
        if not fast_blocks and not any_fast:
            raise UnsupportedModelError(
                f"compile=True, but no block and no dense head of this {type(model).__name__} is of the stock make, "
                "which is what can be compiled: pass compile=False"
            )
        run = partial(_BlockForward, rope=rope)
        parts |= {f"aggregator.{name}": (block, run) for name, block in fast_blocks.items()}
    for name, (module, _) in parts.items():
        if _foreign(module) is not None:
            raise UnsupportedModelError(
                f"{name}.forward is already replaced on this instance by {_foreign(module)!r}: undo that patch first"
            )
    before = _state(model) if is_accelerated(model) else None
    known = None if before is None else before.weights
    fits = before is not None and before.config.dense_frames == dense_frames
    chosen = (
        known
        if fits and isinstance(weights, str) and weights == "auto"
        else resolve(weights, host, dense_frames)
    )
    if chosen is not None:
        chosen.to(host.aggregator.camera_token.device)

    remove(model)
    state = _State(
        config, chosen, backbone.returned_layers(host), tuple(parts), before is not None and before.paused
    )
    for name, (module, replacement) in parts.items():
        module.forward = replacement(module, state, name)
    return model


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
    state = _state(model)
    state.config = replace(state.config, keep_ratio=keep_ratio, merge_budget=merge_budget)
    state.checkpointing = checkpointing


def compile_blocks_alone(model: nn.Module) -> None:
    """Run the dense heads of an accelerated model as they are, whatever `compile` was; for training.

    Raises:
        PaceError: the model is not accelerated.
    """
    _state(model).compiles_heads = False


def remove(model: Model) -> Model:
    """Give the stock model back, bit for bit. A model that is not accelerated is left as it is.

    Raises:
        PaceError: somebody replaced a forward of an accelerated model, so that ours can't be taken out from under it.
    """
    found = _forwards(model)
    modules = dict(model.named_modules())
    for name in {name for forward in found for name in forward.state.names} & modules.keys():
        # A block that torch.compile wrapped meanwhile has a forward of torch's; ours is on the one inside.
        theirs = _foreign(modules[name]._modules.get("_orig_mod", modules[name]))
        if theirs is not None:
            raise PaceError(
                f"{name}.forward was replaced after accelerate by {theirs!r}: undo that patch first"
            )
    for forward in found:
        del forward.module.forward
    return model


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate` is in force on this model (paused or not)."""
    return bool(_forwards(model))


@contextmanager
def paused(model: nn.Module) -> Generator[None]:
    """Run the stock forward inside the `with` block.

    Raises:
        PaceError: the model is not accelerated.
    """
    state = _state(model)
    before, state.paused = state.paused, True
    try:
        yield
    finally:
        state.paused = before


def summary(model: nn.Module, images: Tensor | None = None) -> Summary:
    """Settings, weights and stages of an accelerated model.

    Args:
        model: an accelerated model.
        images: [S, 3, H, W] or [B, S, 3, H, W]; runs the model on them and times every stage (with `compile`, after a
            run that compiles). None reports the tokens of the last forward pass.

    Raises:
        PaceError: the model is not accelerated.
    """
    state, host = _state(model), backbone.find_host(model)
    device = host.aggregator.camera_token.device
    if images is not None:
        state.timer.stages.clear()
        try:
            with torch.inference_mode(), current_device(device):
                if state.config.compile:
                    model(images)  # what is compiled on the way is not what takes the time later
                state.timer.timing = True
                model(images)
        finally:
            state.timer.timing = False
    forwards = _forwards(model)
    return Summary(
        backbone=str(backbone.spec(host)),
        config=state.config,
        weights="none (training-free)" if state.weights is None else str(state.weights),
        paused=state.paused,
        patched=[forward.name for forward in forwards if not isinstance(forward, _BlockForward)],
        attention=kernel_name(device, autocast_dtype(device.type) or host.aggregator.camera_token.dtype),
        compiled=_compiled_parts(forwards) if state.config.compile else "no",
        stages=list(state.timer.stages),
    )


def _compiled_parts(forwards: list[_Forward]) -> str:
    """Which parts run compiled, in words."""
    count = sum(isinstance(forward, _BlockForward) for forward in forwards)
    heads = [
        f.name
        for f in forwards
        if isinstance(f, _DenseHeadForward) and f.fast is type(f.module) and f.state.compiles_heads
    ]
    return ", ".join([f"{count} blocks", *heads])


def _forwards(model: nn.Module) -> list[_Forward]:
    """The replaced forwards of this model. They are looked up, not remembered: a deepcopy finds its own."""
    found = (module.__dict__.get("forward") for module in model.modules())
    return [forward for forward in found if isinstance(forward, _Forward)]


def _foreign(module: Any) -> Any:
    """A forward that somebody else put on this instance, or None."""
    forward = module.__dict__.get("forward")
    return None if isinstance(forward, _Forward) else forward


def _state(model: nn.Module) -> _State:
    forwards = _forwards(model)
    if not forwards:
        raise PaceError("this model is not accelerated: call pacevggt_patch.accelerate(model) first")
    return forwards[0].state
