"""The settings of an accelerated model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch

from .errors import PaceError

DEFAULT_KEEP_RATIO = 0.3


@dataclass(frozen=True)
class PaceConfig:
    """How many patch tokens enter alternating attention.

    Args:
        keep_ratio: share of each frame's patch tokens that enters alternating attention, in (0, 1].
        merge_budget: share of the clip's patch tokens that is merged into kept ones, in [0, 1 - keep_ratio];
            the rest is pruned. None merges all that is not kept.
        check_finite: look for NaN and infinity in the images before work starts. None checks on the CPU and
            leaves CUDA alone, where the check would make the host wait for the device.
        min_frames: clips of fewer frames run the stock aggregator on all tokens; None: where that is the faster one
            (see `break_even.pruning_pays`).
        global_keys: share of the kept patch tokens of a frame whose keys and values the global blocks see, in (0, 1].
        output_device: where dense heads put their outputs; None: where they are made.
        compile: run attention blocks and dense heads by functions that torch.compile makes.
        head_dtype: of the autocast that dense heads run under, bfloat16 or float16; None: as the host calls them.
        dense_frames: prune global attention only; nothing is merged then.

    Raises:
        PaceError: a value is out of range or not a number.
    """

    keep_ratio: float = DEFAULT_KEEP_RATIO
    merge_budget: float | None = None
    check_finite: bool | None = None
    min_frames: int | None = None
    global_keys: float = 1.0
    output_device: torch.device | None = None
    compile: bool = False
    head_dtype: torch.dtype | None = None
    dense_frames: bool = False

    def __post_init__(self):
        keep = _number("keep_ratio", self.keep_ratio)
        if not 0 < keep <= 1:
            raise PaceError(
                f"keep_ratio must be in (0, 1], got {keep:g}: 0.3 keeps 30 % of each frame's patch tokens"
            )
        object.__setattr__(self, "keep_ratio", keep)
        if self.merge_budget is not None:
            merge, most = _number("merge_budget", self.merge_budget), 1 - keep
            if not 0 <= merge <= most + 1e-9:
                raise PaceError(
                    f"merge_budget must be in [0, 1 - keep_ratio] = [0, {most:g}], got {merge:g}: "
                    "it is the share of the clip's patch tokens that is merged into kept ones"
                )
            object.__setattr__(self, "merge_budget", merge)
        if self.check_finite not in (None, True, False):
            raise PaceError(f"check_finite must be True, False or None, got {self.check_finite!r}")
        least = self.min_frames
        if least is not None and (isinstance(least, bool) or not isinstance(least, int) or least < 1):
            raise PaceError(f"min_frames must be a whole number of at least 1, or None, got {least!r}")
        keys = _number("global_keys", self.global_keys)
        if not 0 < keys <= 1:
            raise PaceError(
                f"global_keys must be in (0, 1], got {keys:g}: it is the share of the kept tokens that serve as keys"
            )
        object.__setattr__(self, "global_keys", keys)
        if not isinstance(self.compile, bool):
            raise PaceError(f"compile must be True or False, got {self.compile!r}")
        if self.head_dtype not in (None, torch.bfloat16, torch.float16):
            raise PaceError(
                f"head_dtype must be torch.bfloat16, torch.float16 or None, got {self.head_dtype!r}"
            )

        if not isinstance(self.dense_frames, bool):
            raise PaceError(f"dense_frames must be True or False, got {self.dense_frames!r}")
        if self.dense_frames and self.merge_budget:
            raise PaceError(
                f"merge_budget={self.merge_budget:g} does not go with dense_frames=True, where no token is merged: "
                "leave it out"
            )

    def kept_tokens(self, patches: int) -> int:
        """K: patch tokens kept in each frame of `patches` patch tokens."""
        return min(patches, max(1, round(self.keep_ratio * patches)))

    def key_tokens(self, patches: int) -> int:
        """Patch tokens of each frame of `patches` patch tokens that serve as keys in global attention."""
        return max(1, round(self.global_keys * self.kept_tokens(patches)))

    def merged_tokens(self, frames: int, patches: int) -> int:
        """M: patch tokens merged in a clip of `frames` frames with `patches` patch tokens each."""
        if self.dense_frames:
            return 0
        others = frames * (patches - self.kept_tokens(patches))
        return (
            others if self.merge_budget is None else min(others, round(self.merge_budget * frames * patches))
        )

    @property
    def merge_share(self) -> float:
        """Share of the patch tokens that is merged: the merge budget, or all that is not kept."""
        if self.dense_frames:
            return 0.0
        return 1 - self.keep_ratio if self.merge_budget is None else self.merge_budget


def device_of(name: torch.device | str | None) -> torch.device | None:
    """A device by its name; None stays None.

    Raises:
        PaceError: there is no such device on this machine.
    """
    try:
        return None if name is None else torch.empty(0, device=torch.device(name)).device
    except (RuntimeError, TypeError, AssertionError) as error:
        raise PaceError(
            f'output_device must be a torch device of this machine such as "cpu", or None, got {name!r}'
        ) from error


def _number(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        raise PaceError(f"{name} must be a number, got {value!r}")
    return float(value)
