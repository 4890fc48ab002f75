"""The forwards that stand in for those of a model's parts while it is accelerated.

Each is a plain object in the `__dict__` of one module instance, so deepcopy and pickle follow it, and deleting it is a
full undo. What it does not know runs as the module's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..config import GLOBAL, PRE_AA
from ..errors import PaceError, UnsupportedModelError
from ..hosts import blocks
from ..hosts.base import BlockCall
from ..hosts.rope import rotate, rotation, table_rotation
from ..method import pre_aa
from ..method.few_keys import all_keys
from ..method.global_pruning import Plan, run_on_kept
from ..method.restored_tokens import RestoredTokens
from ..runtime.attention import InterceptAttention, autocast_dtype, faster_attention
from ..runtime.chunks import chunk_rows, in_chunks
from ..runtime.compiling import compiled, is_watched, unwatched
from ..runtime.other_parameters import OtherParameters, run_with
from .first_clip import calibrate_on
from .global_attention import FewKeysAttention, FullHeadsAttention, GlobalAttention
from .heads import (
    moved,
    reduced_precision,
    restored_argument,
    run_camera_head,
    run_dense_head,
    run_joined_camera_head,
    token_list,
)
from .state import Clip, State

UNPRUNED = "unpruned (few frames)"
FLAGS = (bool, int, float, str, type(None))  # what is no tensor, and so the same for all frames


class Forward:
    """Stands in for a method of one module instance.

    Args:
        module: the module.
        state: of its model.
        name: of the module in the model.
    """

    pacevggt = True  # `runtime.bare_copy` leaves it behind
    attribute = "forward"

    def __init__(self, module: Any, state: State, name: str):
        self.module, self.state, self.name = module, state, name
        self.previous = module.__dict__.get(self.attribute)  # what somebody else put there

    @property
    def own(self) -> Callable:
        """What runs without us."""
        if self.previous is not None:
            return self.previous
        return partial(getattr(type(self.module), self.attribute), self.module)


class TrunkForward(Forward):
    """The trunk's own forward, with a look at its images before it starts."""

    def __init__(self, module: Any, state: State, name: str):
        super().__init__(module, state, name)
        self.takes_images = state.host.takes_images(self.own)

    def on_device(self, images: Any) -> AbstractContextManager:
        """The images' device as torch's default device, where that was tried.

        Tensors that the trunk makes on its way then need no copy from the CPU, for which CUDA would wait.
        """
        some = self.state.trial.on_device and isinstance(images, Tensor) and images.is_cuda
        return images.device if some and not torch.compiler.is_compiling() else nullcontext()

    def __call__(self, *args, **kwargs):
        state, threads = self.state, self.state.threads
        if state.paused:
            return self.own(*args, **kwargs)
        images = state.host.images_of(args, kwargs)
        if state.ranks is not None:
            return self.over_ranks(images, args, kwargs)
        if self.takes_images:
            state.host.check_images(images)
        state.check_values()
        state.check_blocks()
        state.clear()
        before = threads.clip
        whole = isinstance(images, Tensor) and images.ndim == 5
        clip = threads.clip = Clip(*images.shape[:2]) if whole else Clip()
        clip.images = images if whole and state.pending else None
        try:
            with self.on_device(images):
                return self.own(*args, **kwargs)
        finally:
            threads.clip = before

    def over_ranks(self, images: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The frames here of a clip that is spread over processes."""
        state, threads = self.state, self.state.threads
        assert state.ranks is not None
        threads.exchange = exchange = state.ranks.clip(partial(self.described, images, args, kwargs))
        state.clear()
        before, threads.clip = threads.clip, Clip(1, exchange.here, exchange=exchange)
        try:
            with state.ranks.in_step(), self.on_device(images):
                return self.own(*args, **kwargs)
        finally:
            threads.clip = before

    def described(self, images: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[int, dict[str, str]]:
        """The number of frames here, and what must be the same in all processes.

        Raises:
            PaceError: such a call can't be one of several processes.
        """
        state = self.state
        if torch.compiler.is_compiling():
            raise PaceError(
                "torch.compile can't trace a model over several processes: use accelerate(model, compile=True)"
            )
        if torch.is_grad_enabled() or self.module.training:
            raise PaceError(
                "a clip over several processes runs without gradients: call model.eval(), and the model inside "
                "torch.inference_mode()"
            )
        if len(args) + len(kwargs) > 1:
            raise PaceError(
                f"{state.host.label} was called with more than images, which can't be spread over processes: leave "
                "process_group out"
            )
        state.host.check_images(images)
        if len(images) > 1:
            raise PaceError(
                f"images are {len(images)} clips, and one at a time is spread over processes: call the model for each"
            )
        state.check_values()
        state.check_blocks()
        height, width = images.shape[-2:]
        patches = height * width // state.host.patch_size**2
        if state.config.kept_tokens(patches) == patches:
            raise PaceError(
                f"keep_ratio={state.config.keep_ratio:g} keeps all {patches} patch tokens of a frame, and clips over "
                "several processes are always pruned: lower it"
            )
        same = {
            "size of images": f"{height}x{width}",
            "dtype of images": str(images.dtype),
            "autocast": str(autocast_dtype(images.device.type)),
        }
        return images.shape[1], same


class PreAATrunkForward(TrunkForward):
    """Pre-AA pruning in place of the trunk's own forward."""

    def __call__(self, images: Tensor, *args, **kwargs):
        state, threads = self.state, self.state.threads
        if state.paused:
            return self.own(images, *args, **kwargs)
        if args or kwargs:
            raise UnsupportedModelError(
                f"{self.name} was called with more than images, which pre-AA pruning does not know: "
                "use `with paused(model):` for such calls"
            )
        state.host.check_images(images)
        state.check_values()
        state.check_blocks()
        state.clear()
        patch, before = state.host.patch_size, threads.clip
        threads.grid = images.shape[-2] // patch, images.shape[-1] // patch
        clip = threads.clip = Clip(len(images))
        try:
            state.begin(clip, images.shape[1], threads.grid[0] * threads.grid[1])
            if clip.prunes:
                return self.pruned(images, threads.grid)
            tokens = images.shape[1] * (threads.grid[0] * threads.grid[1] + state.host.special_tokens)
            with state.timer.stage(UNPRUNED, tokens, tokens), self.on_device(images):
                return self.own(images)
        finally:
            threads.clip = before

    def pruned(self, images: Tensor, grid: tuple[int, int]) -> tuple[RestoredTokens, int]:
        state, (batch, frames) = self.state, images.shape[:2]
        host, config, weights, timer = state.host, state.config, state.weights, state.timer
        patches = grid[0] * grid[1]
        keep, merge = config.kept_tokens(patches), config.merged_tokens(frames, patches)
        scorer = adapter = restoration = None
        if weights is not None:
            scorer, adapter, restoration = weights.scorer, weights.merge, weights.restoration
        features = host.embed(images)  # [B, S, P, C]
        with timer.stage("selection", frames * patches, frames * keep):
            chosen = pre_aa.choose_tokens(features, grid, keep, merge, scorer)
        with timer.stage("merging", frames * patches, frames * keep):
            tokens = pre_aa.entering_tokens(features, chosen, grid, merge > 0, adapter)
        where = host.patch_positions(grid, images.device)
        positions = pre_aa.positions_of(chosen.kept, where, host.special_tokens)
        entering = [torch.cat([host.special(batch, frames), tokens], dim=2)]  # [B, S, n + K, C]
        del tokens

        def run(kind: str, index: int, x: Tensor, where: Tensor | None) -> Tensor:
            module = host.of_kind(kind)[index]
            return module(x, pos=where)

        # Popped, so that nobody holds them while the blocks run.
        compact = pre_aa.alternate(host.blocks, entering.pop(), positions, host.cached_layers, run)
        state.remember(chosen.kept)
        restored = RestoredTokens(
            compact, host.depth, features, chosen.kept, chosen.role, grid, host.special_tokens, restoration
        )
        return restored, host.special_tokens


class EmbeddingForward(Forward):
    """The patch embedding, a chunk of frames at a time; it tells the grid of patches."""

    rows: list[str] | None = None  # names of the tensors in its output, if all are of one row a frame

    def __call__(self, *args, **kwargs):
        state, threads = self.state, self.state.threads
        images = args[0] if args else None
        if state.paused or threads.embedding or not isinstance(images, Tensor) or images.ndim != 4:
            return self.own(*args, **kwargs)
        patch = state.host.patch_size
        grid = threads.grid = images.shape[-2] // patch, images.shape[-1] // patch
        patches = grid[0] * grid[1]
        tokens = len(images) * patches
        threads.embedding = True  # a forward may call the other entrance
        try:
            with state.timer.stage(state.host.embedding_stage, tokens, tokens, add=True):
                if state.config.kept_tokens(patches) == patches:
                    return self.own(*args, **kwargs)  # to the bit
                with faster_attention(images.device):
                    if any(not isinstance(value, FLAGS) for value in (*args[1:], *kwargs.values())):
                        return self.own(*args, **kwargs)
                    run = lambda images: self.own(images, *args[1:], **kwargs)  # noqa: E731
                    return self.in_parts(
                        run, images, chunk_rows(patches * state.host.embed_dim, images.device)
                    )
        finally:
            threads.embedding = False

    def in_parts(self, run: Callable[[Tensor], Any], images: Tensor, size: int) -> Any:
        """What `run` gives of images [N, 3, H, W], at most `size` at a time: a tensor or a dictionary of them."""
        if len(images) <= size or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return run(images)
        if self.rows is None:
            one = run(images[:1])
            named = one if isinstance(one, dict) else {"": one}
            tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
            # What is not of one row a frame can't be joined.
            joins = all(value.ndim and len(value) == 1 for value in tensors.values())
            self.rows = [*tensors] if joins else []
        if not self.rows:
            return run(images)
        whole: dict[str, Any] = {}

        def some(part: Tensor) -> tuple[Tensor, ...]:
            found = run(part)
            whole.update(found if isinstance(found, dict) else {"": found})
            return tuple(whole[name] for name in self.rows or ())

        joined = dict(zip(self.rows, in_chunks(some, size, images), strict=True))
        return joined[""] if "" in joined else whole | joined


class FeaturesForward(EmbeddingForward):
    """The other entrance of a patch embedding."""

    attribute = "forward_features"


class RopeForward(Forward):
    """The rotary embedding without a look at the largest position, its tables made once for each forward pass."""

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        state = self.state
        if state.paused:
            return self.own(tokens, positions)
        clip = state.threads.clip
        get = rotation if clip is None else clip.rotations.get
        return rotate(tokens, *get(state.rope, tokens.shape[-1], tokens.dtype, positions))


class BlockForward(Forward):
    """An attention block: by the functions of `hosts.blocks` where that fits and serves, else by its own code.

    Args:
        kind: "frame", "global", "early" (see `Host.blocks`), or "side" for a block that is none of the trunk's.
        index: among the blocks of its kind.
        stock: whether the functions of `hosts.blocks` can run it.
    """

    def __init__(self, module: Any, state: State, name: str, kind: str, index: int, stock: bool):
        super().__init__(module, state, name)
        self.kind, self.index = kind, index
        self.kinds = blocks.kinds(module) if stock else None
        ours = [block for found, _, block in state.host.blocks if found in ("frame", "global")]
        self.first, self.last = (kind != "side" and block is module for block in (ours[0], ours[-1]))

    def heads(self, clip: Clip | None) -> list[int]:
        """Numbers of the full-attention heads of this block."""
        found = () if clip is None or clip.weights is None else clip.weights.full_heads
        return [head for block, head in found if block == self.index]

    def __call__(self, *args, **kwargs):
        state, threads = self.state, self.state.threads
        call = state.host.block_call(args, kwargs)
        if call is None:
            return self.own(*args, **kwargs)
        keeps = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if state.paused and not keeps:
            return self.own(*args, **kwargs)
        known = state.recomputed.clips
        again = keeps and torch._C._current_graph_task_id() != -1 and call.x in known  # by the backward pass
        if known[call.x] is None if again else state.paused:
            # The backward pass may run in another thread, and after the `with` block of `paused`.
            known[call.x] = None
            threads.pauses.append(None)
            try:
                return self.own(*args, **kwargs)
            finally:
                threads.pauses.pop()
        if self.kind == "side":
            return self.run(call, None)
        clip = known[call.x] if again else self.clip(call)
        if self.first and clip.exchange is not None:
            length = clip.parts[-1][0].shape[1] + state.host.special_tokens
            frames = call.x.reshape(-1, length, call.x.shape[-1])
            call = call.on(state.with_special_of_rest(clip, frames).reshape(call.x.shape), call.positions)
        if keeps:
            known[call.x] = clip
        try:
            if state.checkpointing and keeps and not again:
                return checkpoint(partial(self.stage, clip), call, use_reentrant=False)
            return self.stage(clip, call)
        except BaseException:
            if clip.loose and threads.clip is clip:
                threads.clip = None
            raise

    def clip(self, call: BlockCall) -> Clip:
        """The forward pass that a call belongs to."""
        state, threads = self.state, self.state.threads
        clip = threads.clip
        if clip is None or (self.first and clip.crossed and (clip.loose or clip.plan is not None)):
            if state.config.mode == PRE_AA:
                raise UnsupportedModelError(
                    f"{self.name} was called outside of the forward that pre-AA pruning replaces: use global pruning, "
                    'mode="global", or `with paused(model):` for such calls'
                )
            if state.ranks is not None:
                raise UnsupportedModelError(
                    f"{self.name} was called outside of {state.host.label}, so which frames other processes have "
                    "is not known: leave process_group out, or use `with paused(model):` for such calls"
                )
            if not self.first and self.kind != "early" and call.x.requires_grad and torch.is_grad_enabled():
                raise UnsupportedModelError(
                    f"{self.name} was called outside of a forward pass, as gradient checkpoints with "
                    "use_reentrant=True do: pass use_reentrant=False to them, or train inside `with paused(model):`"
                )
            clip = threads.clip = Clip(loose=True)
            state.remember(None)
        if self.first and (state.config.mode == GLOBAL or threads.observer is not None):
            tokens = call.x
            if self.kind == "global":
                grid = threads.grid or (0, 0)
                tokens = tokens.reshape(-1, grid[0] * grid[1] + state.host.special_tokens, tokens.shape[-1])
            state.look(clip, tokens)
        if self.kind == "early":
            state.begin(clip, clip.frames or len(call.x), call.x.shape[1] - state.host.special_tokens)
        return clip

    def stage(self, clip: Clip, call: BlockCall) -> Any:
        state, x = self.state, call.x
        tokens = x.shape[0] * x.shape[1]
        if state.pending and self.kind == "frame" and not clip.crossed:
            # Without its tokens, whose memory is needed.
            clip.frame_call = call.on(call.x.new_empty(len(call.x), 0, 0), call.positions)
        clip.crossed = clip.crossed or self.kind == "global"
        if self.kind == "global" and state.threads.observer is not None:
            return state.threads.observer(self.index, call, self.own, clip)
        attend = self.attend(clip, tokens)
        with state.timer.stage(f"{self.kind} blocks", tokens, tokens, add=True, attend=attend):
            if not clip.prunes or clip.config.mode == PRE_AA:
                out = self.run(call, clip)
            elif self.kind == "global":
                out = self.pruned(clip, call)
            else:
                out = self.in_frames(clip, call)
        if self.last and not torch.is_grad_enabled():
            clip.finish()
        if self.last and clip.loose and state.threads.clip is clip:
            state.threads.clip = None
        return out

    def attend(self, clip: Clip, tokens: int) -> int:
        """How many of `tokens` that enter attend to each other, in heads that are no full-attention heads."""
        grid, special = self.state.threads.grid, self.state.host.special_tokens
        if self.kind != "global" or not clip.prunes or clip.config.mode == PRE_AA or grid is None:
            return tokens
        patches = grid[0] * grid[1]
        return tokens // (special + patches) * (special + clip.config.kept_tokens(patches))

    def in_frames(self, clip: Clip, call: BlockCall) -> Any:
        """A frame block on a part of the frames at a time, which bounds the memory of its hidden layer."""
        size = chunk_rows(call.x.shape[1] * call.x.shape[2], call.x.device)
        if len(call.x) <= size or not (call.plain or call.shared):
            return self.run(call, clip)
        return in_chunks(lambda x, where: (self.run(call.on(x, where), clip),), size, call.x, call.positions)[
            0
        ]

    def pruned(self, clip: Clip, call: BlockCall) -> Any:
        """A global block that special and kept tokens take part in, or all for its full-attention heads."""
        state, x = self.state, call.x
        if clip.exchange is not None and not call.plain:
            raise UnsupportedModelError(
                f"{self.name} is given {', '.join(sorted(call.given))}, which can't be spread over processes: leave "
                "process_group out"
            )
        if clip.plan is None:
            plan = state.joined_plan(clip, x)
            if state.pending:
                calibrate_on(state, clip, call)
            if call.cached:
                plan = self.fixed_plan(clip, len(x))
            clip.plan, clip.parts = plan, []
            state.remember(plan.kept.unflatten(0, (plan.batch, -1)))
        plan = clip.plan
        length = x.shape[1] * plan.batch // len(plan.kept)
        if heads := self.heads(clip):
            # What is given besides can't be followed head by head: such a call sees all tokens.
            count = state.host.spec().num_heads
            some = FullHeadsAttention(self.index, heads, count, plan) if len(heads) < count else None
            if some is None and plan.exchange is not None:  # all heads see all tokens, here and elsewhere
                whole = plan._replace(full_keys=all_keys(plan.exchange, length))
                some = FullHeadsAttention(self.index, range(count), count, whole)
            return self.run(call, clip, some if call.plain else None)
        rows = plan.token_rows(length)
        count = getattr(getattr(self.module, "attn", None), "num_heads", 0)
        followed = Followed(clip, rows, x.shape[1], count)
        state.given |= call.given
        args, kwargs = followed.tree(call.args), followed.tree(call.kwargs)
        positions = None if call.positions is None else followed.tensor(call.positions)
        rest: tuple | None = None
        fewer = None
        if plan.keys is not None and not followed.masked:
            compiles = state.config.compile and not torch.compiler.is_compiling()
            fewer = FewKeysAttention(plan.keys, count, *rows.shape, compiles, state.say_once)

        def few(tokens: Tensor) -> Tensor:
            nonlocal rest
            found = self.run(call.on(tokens, positions, args, kwargs), clip, fewer)
            if isinstance(found, tuple):
                found, *others = found
                rest = tuple(others)
            return found

        out = run_on_kept(x, plan, few, apart=followed.masked)
        return out if rest is None else (out, *rest)

    def fixed_plan(self, clip: Clip, batch: int) -> Plan:
        """A plan in which all frames keep the same tokens: a cache of keys from call to call relies on it."""
        features = torch.cat([part for part, _ in clip.parts])
        kept = self.state.plan(torch.ones_like(features[:1])).kept  # spread evenly over the grid
        return self.state.plan(features, kept.expand(len(features), -1))._replace(batch=batch)

    def run(self, call: BlockCall, clip: Clip | None, attends: GlobalAttention | None = None) -> Any:
        """The block on the tokens of a call, with its own attention or the one given."""
        state = self.state
        others = self.changed_parameters(clip)
        needs = state.config.compile or others or attends is not None
        if needs and self.fits(call):
            return self.run_open(call, clip, others, None if attends is None else attends.open)
        args, kwargs = call.arguments()
        if torch.compiler.is_compiling() and others:
            return run_with(self.module, others, self.own, args, kwargs)
        with ExitStack() as stack:
            if clip is None or not clip.whole:
                stack.enter_context(faster_attention(call.x.device))
            if others:
                stack.enter_context(OtherParameters.of(self.module, others))
            if attends is None:
                return self.own(*args, **kwargs)
            mode = stack.enter_context(InterceptAttention(attends.closed))
            found = self.own(*args, **kwargs)
        attends.check(mode.calls)
        return found

    def run_open(
        self, call: BlockCall, clip: Clip | None, others: Mapping[str, Tensor], attend: Callable | None
    ) -> Tensor:
        """The block by the functions of `hosts.blocks`."""
        state, x = self.state, call.x
        narrow = autocast_dtype(x.device.type)
        turned = None
        if call.tables is not None:
            turned = blocks.of_sequences(table_rotation(call.tables, x.shape[1]), len(x))
        elif call.positions is not None:
            dtype = state.host.rope_dtype(x.dtype, narrow)
            width = x.shape[-1] // self.module.attn.num_heads
            clip_at_hand = clip or state.threads.clip
            get = rotation if clip_at_hand is None else clip_at_hand.rotations.get
            turned = blocks.flat_rotation(state.rope, call.positions, width, dtype, get)
        out = blocks.run_block(
            self.module,
            x.flatten(0, 1),
            turned,
            len(x),
            x.dtype if narrow is None else narrow,
            compiled if state.config.compile and not torch.compiler.is_compiling() else None,
            others,
            chunk_rows(x.shape[-1], x.device),
            attend,
            call.tables is not None,
        )
        return out.view(x.shape)

    def fits(self, call: BlockCall) -> bool:
        """Whether the functions of `hosts.blocks` do what the block would do in this call."""
        if self.kinds is None or self.previous is not None or not (call.plain or call.tables is not None):
            return False
        rope: Any = getattr(self.module.attn, "rope", None)
        positions = call.positions
        if (rope is None) != (positions is None):
            return False
        if positions is not None:
            if positions.shape[:2] != call.x.shape[:2]:
                return False
            # Ours stands in for it; what anybody else put there would not run.
            if not isinstance(rope.__dict__.get("forward"), RopeForward) or is_watched(rope):
                return False
        if not blocks.is_open(self.module, self.kinds):
            return False
        weight = self.module.attn.qkv.weight
        return call.x.dtype == weight.dtype or autocast_dtype(call.x.device.type) is not None

    def changed_parameters(self, clip: Clip | None) -> dict[str, Tensor]:
        """What the block runs with in place of parameters of its own, by their names in the block."""
        deltas = None if clip is None or clip.weights is None else clip.weights.block_deltas
        if clip is None or deltas is None or not clip.prunes or clip.whole or self.kind == "early":
            return {}
        own = self.state.host.block_parameters(self.kind, self.index)
        prefix = self.state.host.block_name(self.kind, self.index) + "."
        gone = [name for name in deltas.names if name.startswith(prefix) and name not in own]
        if gone:
            raise UnsupportedModelError(
                f"the pace weights change {gone[0]}, which this model has no more: if it was wrapped or quantised "
                "after accelerate, undo that, else pass weights=None"
            )
        changed = deltas(own, deltas.strength(clip.config.keep_ratio))
        return {name.removeprefix(prefix): value for name, value in changed.items()}


class Followed:
    """Arguments of a global block, with the tokens that take part in place of all.

    Args:
        clip: whose blocks are given the same arguments again and again.
        rows: [B, m] numbers of the tokens that take part.
        tokens: S * L, of a clip.
        heads: of the block; 0 where it does not tell.

    Attributes:
        masked: whether one says which token may see which.
    """

    def __init__(self, clip: Clip, rows: Tensor, tokens: int, heads: int):
        self.clip, self.rows, self.tokens, self.heads, self.masked = clip, rows, tokens, heads, False

    def tree(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, dict):
            return {key: self.tree(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            return type(value)(map(self.tree, value))
        return value

    def tensor(self, value: Tensor) -> Tensor:
        """Every dimension of as many as the tokens of a clip, but for a batch in front, reduced to those of `rows`.

        Raises:
            UnsupportedModelError: whether a mask is one for each clip or for each head can't be told.
        """
        n, batch, dims = self.tokens, len(self.rows), value.ndim
        where = [d for d in range(dims) if value.shape[d] == n]
        if dims > 3:  # [B, heads, queries, keys]; a cache of keys is no matter of the tokens at hand
            mask = value.shape[-1] == n and value.shape[-2] in (1, n)
            where = [d for d in where if mask and d >= dims - 2]
        elif dims > 1 and (dims == 3 or value.shape[0] == batch):
            where = [d for d in where if d > 0]
        if not where:
            return value
        self.masked |= len(where) > 1
        if dims == 1 and batch > 1:
            raise UnsupportedModelError(
                f"one value for each of the {n} tokens of {batch} clips can't be followed: give it a batch in front, "
                "or use `with paused(model):` for such calls"
            )
        if dims == 3 and len(where) == 2 and 1 < batch == value.shape[0] == self.heads:
            raise UnsupportedModelError(
                f"a mask {list(value.shape)} for {batch} clips and {self.heads} heads may be of either: give it four "
                "dimensions, or use `with paused(model):` for such calls"
            )
        return self.clip.once(
            value, lambda: self.reduced(value, where, value.shape[0] == batch and 0 not in where)
        )

    def reduced(self, value: Tensor, where: list[int], batched: bool) -> Tensor:
        parts = []
        for i, rows in enumerate(self.rows):
            part = value[i] if batched else value
            for d in where:
                part = part.index_select(d - batched, rows)
            parts.append(part)
        if not batched and len(parts) == 1:
            return parts[0]
        if not batched and (value.ndim == 4 or (value.shape[0] == 1 and len(where) == 1)):  # one of all clips
            return torch.cat(parts)
        found = torch.stack(parts)
        # [queries, keys] for all clips is for all heads, too.
        return found[:, None] if not batched and value.ndim == 2 and len(where) == 2 else found


class DenseHeadForward(Forward):
    """A DPT head: on restored tokens, or by `hosts.dpt` where that fits; in the dtype and on the device asked for."""

    def __init__(self, module: Any, state: State, name: str, fast: bool):
        super().__init__(module, state, name)
        self.fast = type(module) if fast else None  # the class that was tried: somebody may put in another

    def __call__(self, *args, **kwargs):
        state = self.state
        if state.paused:
            return self.own(*args, **kwargs)
        state.check_trunk()
        if state.ranks is not None and "." in self.name:
            raise UnsupportedModelError(
                f"{self.name.split('.')[0]} follows points through all frames, which are not all in this process: "
                "leave process_group out, or call the model without query points"
            )
        # A head inside another module, such as a track head, feeds that module: it stays on its device.
        device: Any = None if "." in self.name else state.config.output_device
        tokens = restored_argument(args, kwargs) or token_list(args, kwargs, state)
        with reduced_precision(self.module, state.config.head_dtype) as restored:
            if tokens is None:
                return moved(restored(self.own(*args, **kwargs)), device)
            with state.timer.stage(self.name, tokens.tokens_held, tokens.tokens_read):
                fast = self.fast is type(self.module) and self.previous is None
                compiles = state.config.compile and state.compiles_heads
                speed = compiled if compiles and unwatched(list(self.module.modules())[1:]) else None
                return restored(
                    run_dense_head(self.module, self.own, tokens, args, kwargs, fast, device, speed)
                )


class CameraHeadForward(Forward):
    """A camera head, which reads special tokens only: nothing is restored for it."""

    def __call__(self, *args, **kwargs):
        tokens = restored_argument(args, kwargs)
        if tokens is None:
            return self.own(*args, **kwargs)
        frames = tokens.kept.shape[1]
        with self.state.timer.stage(self.name, frames, frames):
            return run_camera_head(self.own, tokens, args, kwargs)


class JoinedCameraHeadForward(Forward):
    """A camera head, which compares all frames: it is given the special tokens of all processes."""

    def __call__(self, *args, **kwargs):
        state, exchange = self.state, self.state.threads.exchange
        if state.paused:
            return self.own(*args, **kwargs)
        if exchange is None or state.ranks is None:
            raise PaceError(
                f"{self.name} was called before {state.host.label} in this thread, so the frames of other "
                "processes are not known: call aggregator and heads in turn"
            )
        with state.ranks.in_step(), state.timer.stage(self.name, exchange.total, exchange.total):
            return run_joined_camera_head(self.own, exchange, state.host, args, kwargs)
