"""What the replaced forwards of one model share, and a forward pass that is under way."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import GLOBAL, PaceConfig
from ..errors import UnsupportedModelError
from ..hosts.base import BlockCall, Host
from ..hosts.rope import ROPE_TABLE, Rotations
from ..method.cost import pruning_pays
from ..method.global_pruning import Plan, joined, keep_best
from ..method.propagation import make_propagation
from ..runtime.attention import autocast_dtype
from ..runtime.ranks import ClipExchange, Ranks
from ..weights.fingerprint import agree, fingerprints
from ..weights.pace import PaceWeights
from .summary import StageTimer


class Clip:
    """A forward pass under way: from the first block to the last, or as long as the trunk runs.

    Attributes:
        batch, frames: B and S, if the trunk was called with images [B, S, 3, H, W]; else None.
        prunes: whether it is pruned; None before that is decided.
        config, weights: those of the model when it was decided: a gradient checkpoint may run a block later.
        whole: whether all tokens are kept: the stock model, to the bit.
        parts: for each call of the first block, the patch tokens [n, P, C] that entered and their plan.
        plan: of all frames; None before the first global block.
        rotations: of its positions.
        images: of a model that is to be calibrated, or None.
        loose: whether it ends with the last block, since the trunk was not called.
        crossed: whether a global block ran.
        frame_call: of the frame block before the first global one, without tokens, of a model that is to be calibrated.
        exchange: of a clip over several processes; `frames` are those here.
    """

    def __init__(
        self,
        batch: int | None = None,
        frames: int | None = None,
        loose: bool = False,
        exchange: ClipExchange | None = None,
    ):
        self.batch, self.frames, self.loose, self.exchange = batch, frames, loose, exchange
        self.prunes: bool | None = None
        self.images: Tensor | None = None
        self.frame_call: BlockCall | None = None
        self.config, self.weights, self.whole, self.crossed = PaceConfig(), None, False, False
        self.parts: list[tuple[Tensor, Plan | None]] = []
        self.plan: Plan | None = None
        self.rotations = Rotations()
        self.gathered: dict[tuple, tuple[Tensor, Tensor]] = {}

    def finish(self) -> None:
        """Let go of all that only blocks needed."""
        self.parts, self.gathered, self.rotations = [], {}, Rotations()
        self.plan = self.frame_call = None

    def last_frames(self, count: int) -> list[tuple[Tensor, Plan | None]]:
        """The last parts that are `count` frames together; empty where there are none such."""
        chosen: list[tuple[Tensor, Plan | None]] = []
        for part in reversed(self.parts):
            chosen.insert(0, part)
            frames = sum(len(features) for features, _ in chosen)
            if frames >= count:
                return chosen if frames == count else []
        return []

    def once(self, tensor: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives of a tensor that many blocks are given, made once."""
        # A fake tensor lies nowhere.
        if torch.compiler.is_compiling() or type(tensor) is not Tensor:
            return make()
        inference = tensor.is_inference()
        if inference and not _is_integer(tensor):
            # Whether somebody wrote into it meanwhile can't be told; nobody writes into positions.
            return make()
        version = None if inference else tensor._version
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, version)
        if key not in self.gathered:
            self.gathered[key] = tensor, make()  # the entry holds the tensor: its address stays its own
        return self.gathered[key][1]


def _is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and tensor.dtype != torch.bool


class PerThread(threading.local):
    """What differs between threads that run one model. A copy or a pickle of it is a new one.

    Attributes:
        clip: the forward pass under way.
        grid: patch rows and columns of the images that were embedded last.
        embedding: whether the patch embedding runs.
        paused: how many `paused` blocks are open.
        observer: is handed each global block of an unpruned pass; see `install.observing`.
        exchange: of the clip of the last forward pass, if it was one over several processes.
    """

    clip: Clip | None = None
    exchange: ClipExchange | None = None
    grid: tuple[int, int] | None = None
    embedding: bool = False
    observer: Callable[[int, BlockCall, Callable[..., Any], Clip], Any] | None = None

    def __init__(self):
        self.pauses: list[None] = []  # an item for each open block; one may be closed by another thread

    def __deepcopy__(self, memo: dict) -> PerThread:
        return PerThread()

    def __reduce__(self):
        return PerThread, ()


class Recomputed:
    """Clips by the tokens that entered a block, for gradient checkpoints that run it again. A copy is empty."""

    def __init__(self):
        from torch.utils.weak import WeakIdKeyDictionary

        self.clips = WeakIdKeyDictionary()

    def __deepcopy__(self, memo: dict) -> Recomputed:
        return Recomputed()

    def __reduce__(self):
        return Recomputed, ()


class Outcome(NamedTuple):
    """What a trial told.

    Attributes:
        key: of what was tried, see `trial.key`; None where there was nothing to try it on.
        on_device: whether the trunk gives the same with a CUDA device as torch's default device.
        heads: why the heads that should see all tokens can't where others see few, or None.
    """

    key: tuple | None = None
    on_device: bool = False
    heads: str | None = None


@dataclass
class State:
    """What the replaced forwards of one model share.

    Attributes:
        config: the settings; its mode is never None.
        host: the model's parts.
        weights: on the model's device, or None.
        auto: whether weights are found by themselves.
        pending: whether full-attention heads are still to be found, on the first clip that will do.
        placed: the replaced forwards.
        trial: what the trial told.
        values: which tensors hold the values that the weights fit, and their versions.
        foreign: whether other values were warned of.
        rope: the host's rotary embedding for `hosts.rope.rotation`, or None.
        forced: prune even where all tokens are kept; for the trial.
        tried: whether this is the model of a trial, which nobody else calls.
        given: what global blocks are given beside tokens and positions, by name.
        kept: [B, S, K] indices of the patch tokens that the last forward pass kept, or None.
        checkpointing: compute blocks once more for the backward pass instead of keeping what is in them.
        compiles_heads: whether dense heads are compiled where the settings ask for compilation.
        ranks: the processes that each clip is spread over, or None.
        knows_special: whether the special tokens that enter the blocks were found to be the host's parameters.
    """

    config: PaceConfig
    host: Host
    weights: PaceWeights | None = None
    auto: bool = False
    pending: bool = False
    placed: list[Any] = field(default_factory=list)
    trial: Outcome = field(default_factory=Outcome)
    values: list[tuple[int, int, int]] = field(default_factory=list)
    foreign: bool = False
    rope: Any = None
    forced: bool = False
    tried: bool = False
    given: set[str] = field(default_factory=set)
    kept: Tensor | None = None
    checkpointing: bool = False
    compiles_heads: bool = True
    ranks: Ranks | None = None
    knows_special: bool = False
    told: set[str] = field(default_factory=set)
    timer: StageTimer = field(default_factory=StageTimer)
    threads: PerThread = field(default_factory=PerThread)
    recomputed: Recomputed = field(default_factory=Recomputed)

    @property
    def paused(self) -> bool:
        return bool(self.threads.pauses)

    def advice(self, attributes: str) -> str:
        """What to do about a call that can't be pruned; `attributes` of its adapter may be the cause."""
        return (
            f"check {attributes} of its adapter" if self.tried else "use `with paused(model):` for such calls"
        )

    def check_values(self, warn: bool = True) -> None:
        """Warn where the model was given other parameters since its weights were last found to fit them."""
        if self.weights is None or torch.compiler.is_compiling():
            return
        tensors = self.host.fingerprint_tensors()
        if any(t.is_meta or hasattr(t, "placements") or t.numel() == 0 for t in tensors):
            return  # offloaded or sharded: their values are elsewhere
        # Writing into a tensor counts its version up; those made in inference mode have none.
        values = [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        changed = warn and not self.foreign and values != self.values
        if changed and not agree(self.weights.fingerprints, fingerprints(self.host)):
            self.foreign = True
            warnings.warn(
                f"this model was given other parameters after accelerate, and its pace weights ({self.weights.source}) "
                "are for the ones before: make or pass weights for these, and call accelerate again",
                UserWarning,
                stacklevel=2,
            )
        self.values = values

    def check_blocks(self) -> None:
        """Warn of blocks that somebody replaced since."""
        trunk, within = self.host.trunk, self.host.trunk_name
        for kind, index, module in self.host.blocks:
            self.check_place(trunk, self.host.block_name(kind, index), module, f"{within}.")

    def check_trunk(self) -> None:
        """Warn of another trunk that somebody put in the place of this one since: it runs unpruned."""
        self.check_place(self.host.model, self.host.trunk_name, self.host.trunk)

    def check_place(self, root: Any, name: str, module: Any, within: str = "") -> None:
        """Warn where another module than this one, wrapped or not, is at a place below `root`."""
        try:
            now = root.get_submodule(name)
        except AttributeError:
            now = nn.Module()
        if now is not module and all(part is not module for part in now.modules()):
            self.say_once(f"{within}{name} was replaced after accelerate: call accelerate again")

    def clear(self) -> None:
        """Forget what the last forward pass did: another begins."""
        self.timer.clear()
        self.remember(None)

    def remember(self, kept: Tensor | None) -> None:
        """Keep in mind which tokens [B, S, K] a forward pass kept, for `summary`."""
        if not torch.compiler.is_compiling():
            self.kept = kept

    def say_once(self, message: str) -> None:
        """Warn, the first time only."""
        if message not in self.told:
            self.told.add(message)
            warnings.warn(message, UserWarning, stacklevel=2)

    def prunes(self, frames: int, patches: int) -> bool:
        """Whether clips of so many frames and patch tokens a frame are pruned, whatever their batch."""
        config, host = self.config, self.host
        kept = config.kept_tokens(patches)
        if self.forced or kept == patches:
            return self.forced
        if self.ranks is not None:
            return True  # unpruned, the keys of all tokens would have to travel
        if config.min_frames is not None:
            return frames >= config.min_frames
        return pruning_pays(
            host.reference.device.type,
            frames,
            patches,
            kept,
            host.special_tokens,
            host.embed_dim,
            len(host.of_kind("global")),
            config.mode == GLOBAL,
            [] if self.weights is None else self.weights.full_head_shares(),
        )

    def begin(self, clip: Clip, frames: int, patches: int) -> None:
        """Decide, once, whether a clip is pruned."""
        if clip.prunes is None:
            if self.weights is not None and self.weights.device not in (None, self.host.reference.device):
                self.weights.to(self.host.reference.device)  # our own copy: the model was moved
            clip.prunes = self.threads.observer is None and self.prunes(frames, patches)
            clip.config, clip.weights = self.config, self.weights
            clip.whole = self.config.kept_tokens(patches) == patches

    def look(self, clip: Clip, tokens: Tensor) -> None:
        """Take note of tokens [n, L, C] that enter the first block, and choose those that are kept.

        Raises:
            UnsupportedModelError: they are not the special and patch tokens of whole frames.
        """
        patches = tokens.shape[1] - self.host.special_tokens
        grid = self.threads.grid
        if grid is None or grid[0] * grid[1] != patches:
            raise UnsupportedModelError(
                f"the blocks of this model are given {tokens.shape[1]} tokens a frame, not {self.host.special_tokens} "
                f"special and {'no' if grid is None else grid[0] * grid[1]} patch tokens, and only models with one "
                f"token for each patch can be pruned: {self.advice('special_tokens')}"
            )
        if self.rope is not None and max(grid) >= ROPE_TABLE:
            raise UnsupportedModelError(f"images of {ROPE_TABLE} patches on a side or more are not supported")
        self.begin(clip, clip.frames or len(tokens), patches)
        if clip.prunes or self.threads.observer is not None:
            # Without gradients: a gradient checkpoint that runs the block once more does not come here, and what holds
            # the tokens of a block would never go, see `Recomputed`.
            with torch.no_grad():
                features = self.host.scored(tokens.detach()[:, self.host.special_tokens :])
            clip.parts.append((features, self.plan(features) if clip.prunes else None))

    @torch.no_grad()
    def plan(self, features: Tensor, kept: Tensor | None = None) -> Plan:
        """Which tokens of features [n, P, C] are kept: those of `kept` [n, K], or the best ones."""
        patches = features.shape[1]
        grid, special = self.threads.grid or (1, patches), self.host.special_tokens
        narrow = autocast_dtype(features.device.type) or features.dtype
        keep = self.config.kept_tokens(patches) if kept is None else kept.shape[1]
        scorer = None if self.weights is None else self.weights.scorer
        with self.timer.stage("selection", len(features) * patches, len(features) * keep):
            if kept is None:
                kept = keep_best(features, grid, keep, scorer)
            return Plan(kept, make_propagation(features, kept, grid, special, narrow))

    def joined_plan(self, clip: Clip, x: Tensor) -> Plan:
        """The plan of the clip whose tokens x [B, S * L, C] enter the first global block.

        Raises:
            UnsupportedModelError: they are not those of the frames that entered the first block.
        """
        batch, tokens = x.shape[:2]
        length = self.host.special_tokens + (clip.parts[-1][0].shape[1] if clip.parts else 0)
        parts = clip.last_frames(batch * (tokens // length)) if length and tokens % length == 0 else []
        if not parts:
            raise UnsupportedModelError(
                f"a global block of this model was given {batch} x {tokens} tokens, which are not those of the frames "
                f"before it: {self.advice('the order of blocks')}"
            )
        clip.parts = parts
        return joined([plan for _, plan in parts if plan is not None], batch, clip.exchange)

    def with_special_of_rest(self, clip: Clip, x: Tensor) -> Tensor:
        """Tokens [n, L, C] that enter the first block, the special tokens of frame 0 those of any but the first frame.

        The trunk gives the first frame of its call special tokens of its own, and by them the blocks tell which frame
        sets the coordinates. It must be the first of the whole clip. To put the right ones in here costs nothing; a
        frame borrowed from the process before would run through all blocks.

        Raises:
            UnsupportedModelError: special tokens are something else than the host's parameters.
        """
        count = self.host.special_tokens
        if not self.knows_special and len(clip.parts) == 1:
            # Once, since the host waits for the device here.
            wanted = self.host.special(1, len(x))[0].to(x.dtype)
            if not torch.equal(x[:, :count], wanted):
                raise UnsupportedModelError(
                    f"the special tokens that enter the blocks of {self.host.label} are not camera_token and "
                    "register_token, so which frame comes first can't be told to this model: leave process_group out"
                )
            self.knows_special = True
        if clip.exchange is None or clip.exchange.before == 0:
            return x
        x = x.clone()
        x[0, :count] = self.host.special(1, 2)[0, 1].to(x.dtype)
        return x
