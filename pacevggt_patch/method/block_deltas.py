"""Block deltas: learned changes of the attention blocks, in force only while they run on pruned tokens."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

RANK = 16
# Up to this keep ratio the changes are in full force; from there to 1, the stock model, they fade out.
FULL_STRENGTH = 0.15


class BlockDeltas(nn.Module):
    """Low-rank changes of the matrices of attention blocks, and changes of their vectors.

    A backbone that was trained on all patch tokens of a frame meets few of them, each standing for a group. What the
    kept tokens carry in can be learned by the merge; how blocks read them, only by the blocks. So each matrix W gets
    W + up @ down (LoRA, arXiv 2106.09685) and each vector (biases, norms, layer scales) is shifted. The host's own
    parameters stay as they are: the changed ones exist while a block runs. `up` and the shifts are zero-initialised, so
    that the untrained module changes nothing.

    Args:
        shapes: shapes of the matrices and vectors of the blocks, by name.
        rank: rank of the changes of matrices.
        full_strength: keep ratio up to which they are in full force.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], rank: int = RANK, full_strength: float = FULL_STRENGTH
    ):
        super().__init__()
        if not 0 < full_strength < 1:
            raise ValueError(f"full_strength must lie between 0 and 1, got {full_strength:g}")
        self.rank, self.full_strength = rank, full_strength
        self.down, self.up, self.shift = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for name, shape in shapes.items():
            if len(shape) == 2:
                self.down[key(name)] = nn.Parameter(torch.randn(rank, shape[1]) * shape[1] ** -0.5)
                self.up[key(name)] = nn.Parameter(torch.zeros(shape[0], rank))
            else:
                self.shift[key(name)] = nn.Parameter(torch.zeros(shape))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that it changes, by name."""
        matrices = {name: (len(up), self.down[name].shape[1]) for name, up in self.up.items()}
        vectors = {name: tuple(shift.shape) for name, shift in self.shift.items()}
        return {name.replace("/", "."): shape for name, shape in (matrices | vectors).items()}

    @torch.no_grad()
    def nearest(self, rank: int) -> BlockDeltas:
        """The nearest changes of matrices (in squares) of at most this rank; those of vectors are the same.

        Raises:
            ValueError: the rank is not between 1 and the own one.
        """
        if not 1 <= rank <= self.rank:
            raise ValueError(f"rank must lie between 1 and {self.rank}, got {rank}")
        other = copy.deepcopy(self)
        other.rank = rank
        for name, up in self.up.items():
            # The singular values of up @ down, by way of the small matrix between two orthogonal ones.
            left, small = torch.linalg.qr(up)
            right, other_small = torch.linalg.qr(self.down[name].mT)
            u, values, v = torch.linalg.svd(small @ other_small.mT)
            roots = values[:rank].sqrt()
            other.up[name] = nn.Parameter(left @ u[:, :rank] * roots)
            other.down[name] = nn.Parameter(roots[:, None] * (v[:rank] @ right.mT))
        return other

    @property
    def names(self) -> list[str]:
        """Names of the parameters that it changes."""
        return [name.replace("/", ".") for name in (*self.up, *self.shift)]

    def __len__(self) -> int:
        """How many parameters it changes."""
        return len(self.up) + len(self.shift)

    def strength(self, keep_ratio: float) -> float:
        """Factor on the changes at a keep ratio: 1 up to `full_strength`, 0 for the stock model, between them by the
        logarithm of the ratio.

        What is right with few tokens is too much with many. Weights for dense frames that 900 steps had taught at keep
        ratios from 0.1 to 0.6 in full force gave AUC@30 / AbsRel of 84.4 / .0396 on 12 held-out rooms of 8 views at
        0.5, and 85.1 / .0388 when they ran there at half force.
        """
        if keep_ratio <= self.full_strength:
            return 1.0
        return math.log(keep_ratio) / math.log(self.full_strength)

    def forward(self, parameters: Mapping[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
        """The parameters of some blocks with the changes added, in their own dtype.

        Args:
            parameters: by name.
            strength: factor on the changes.

        Raises:
            UnsupportedModelError: it does not know one of them, or one is offloaded, so that its values are elsewhere.
        """
        changed = {}
        for name, parameter in parameters.items():
            if key(name) in self.shift:
                change = self.shift[key(name)]
            elif key(name) in self.up:
                change = self.up[key(name)] @ self.down[key(name)]
            else:
                raise UnsupportedModelError(
                    f"the pace weights do not know {name}, a parameter of an attention block of this model: if the "
                    "block was wrapped after accelerate, undo that, else pass weights=None"
                )
            if parameter.is_meta and not change.is_meta:
                raise UnsupportedModelError(
                    f"{name} is offloaded, so the pace weights can't change it: load the whole model on its device, or "
                    "pass weights=None"
                )
            changed[name] = parameter + (change * strength).to(parameter)
        return changed


def key(name: str) -> str:
    """The name of a parameter as a `ParameterDict` takes it."""
    return name.replace(".", "/")
