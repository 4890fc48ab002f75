"""The settings of an accelerated model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from .arguments import number, shown, whole
from .errors import PaceError
from .runtime.device import existing_device

DEFAULT_KEEP_RATIO = 0.3
GLOBAL, PRE_AA = "global", "pre-aa"
MODES = (GLOBAL, PRE_AA)


@dataclass(frozen=True)
class PaceConfig:
    """What is pruned, and how what is left runs. Pass one to `accelerate` in place of loose settings.

    Args:
        keep_ratio: share of each frame's patch tokens that is kept, in (0, 1]. 1 is the stock model.
        merge_budget: share of the clip's patch tokens that is merged into kept ones, in [0, 1 - keep_ratio]; the rest
            is pruned. None merges all that is not kept. For pre-AA pruning only.
        mode: "global" prunes global attention only. "pre-aa" prunes frame and global attention (PaceVGGT,
            arXiv 2605.08371). None takes the mode of the weights; without weights "pre-aa" if there is a merge budget,
            else "global".
        min_frames: clips of fewer frames run unpruned. None prunes where `method.cost.pruning_pays`. 1 prunes every
            clip.
        compile: attention blocks and dense heads run by functions that torch.compile makes at the first call.
        head_dtype: dtype of the autocast of dense heads, bfloat16 or float16. None leaves that to the model.
        output_device: where the outputs of dense heads go, a chunk of frames at a time. None: they stay where they are
            made.

    Raises:
        PaceError: a value is out of range or of another type.
    """

    keep_ratio: float = DEFAULT_KEEP_RATIO
    merge_budget: float | None = None
    mode: str | None = None
    min_frames: int | None = None
    compile: bool = False
    head_dtype: torch.dtype | None = None
    output_device: torch.device | str | None = None

    def __post_init__(self):
        keep = number("keep_ratio", self.keep_ratio)
        if not 0 < keep <= 1:
            raise PaceError(
                f"keep_ratio must be in (0, 1], got {keep:g}: 0.3 keeps 30 % of each frame's patch tokens"
            )
        object.__setattr__(self, "keep_ratio", keep)
        if self.mode is not None:
            check_mode(self.mode)
        if self.merge_budget is not None:
            merge, most = number("merge_budget", self.merge_budget), 1 - keep
            if not 0 <= merge <= most + 1e-9:
                raise PaceError(
                    f"merge_budget must be in [0, 1 - keep_ratio] = [0, {most:g}], got {merge:g}: "
                    "it is the share of the clip's patch tokens that is merged into kept ones"
                )
            if self.mode == GLOBAL:
                raise PaceError(
                    f'merge_budget={merge:g} does not go with mode="global", where no token is merged: leave it out'
                )
            object.__setattr__(self, "merge_budget", merge)
        if self.min_frames is not None:
            whole("min_frames", self.min_frames)
        if not isinstance(self.compile, bool):
            raise PaceError(f"compile must be True or False, got {shown(self.compile)}")
        if not any(self.head_dtype is dtype for dtype in (None, torch.bfloat16, torch.float16)):
            raise PaceError(
                f"head_dtype must be torch.bfloat16, torch.float16 or None, got {shown(self.head_dtype)}"
            )
        if self.output_device is not None:
            object.__setattr__(self, "output_device", existing_device(self.output_device, "output_device"))

    def kept_tokens(self, patches: int) -> int:
        """K: patch tokens kept in each frame of `patches` patch tokens."""
        return min(patches, max(1, round(self.keep_ratio * patches)))

    def merged_tokens(self, frames: int, patches: int) -> int:
        """M of pre-AA pruning: patch tokens merged in a clip of `frames` frames with `patches` patch tokens each."""
        others = frames * (patches - self.kept_tokens(patches))
        return (
            others if self.merge_budget is None else min(others, round(self.merge_budget * frames * patches))
        )

    def plain(self) -> PaceConfig:
        """The settings alone, of a config that carries more."""
        return PaceConfig(**{field.name: getattr(self, field.name) for field in fields(PaceConfig)})


def config_from(keep_ratio: Any, merge_budget: Any, settings: dict[str, Any]) -> PaceConfig:
    """One config of the arguments of `accelerate`, the first of which may be a config already.

    Raises:
        PaceError: a setting is out of range, or given beside a config.
    """
    if not isinstance(keep_ratio, PaceConfig):
        return PaceConfig(keep_ratio, merge_budget, **settings)
    default = PaceConfig()
    loose = [name for name, value in settings.items() if value is not getattr(default, name)]
    loose += ["merge_budget"] * (merge_budget is not None)
    if loose:
        raise PaceError(f"{', '.join(loose)} beside a config: set it in the config")
    return keep_ratio.plain()


def check_mode(mode: Any) -> None:
    """Raise PaceError for what is no mode."""
    if not isinstance(mode, str) or mode not in MODES:
        raise PaceError(f'mode must be "global" or "pre-aa", got {shown(mode)}')
