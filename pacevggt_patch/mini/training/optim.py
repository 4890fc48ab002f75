"""Optimisers over one flat buffer: Muon for the matrices of the blocks, AdamW for all else.

All parameters are views of one buffer and all gradients of another, so that gradients are exchanged between GPUs and
clipped in one operation each, and a step has no Python loop over parameters but Muon's over shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MUON_UPDATE = 0.2  # root mean square of Muon's update at learning rate 1, as AdamW's tends to have
MUON_MOMENTUM = 0.95
ADAM_BETAS = (0.9, 0.95)
EPS = 1e-8
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Muon's fifth-order iteration


@dataclass(frozen=True)
class Group:
    """A run of parameters in the buffer."""

    start: int
    end: int
    weight_decay: float


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes a parameter: the matrices within transformer blocks."""
    return parameter.ndim == 2 and ("blocks." in name or "trunk." in name) and min(parameter.shape) >= 16


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay acts on a parameter: on all weights, not on biases, norms, scales, tokens and positions."""
    return parameter.ndim >= 2 and "token" not in name and "pos_embed" not in name


class FlatOptimizer:
    """Parameters, gradients and optimiser state of modules, each in one flat tensor.

    Args:
        modules: what to train; parameters that need no gradient are left alone. Their storage is replaced by views.
        weight_decay: decoupled, for weights.
    """

    def __init__(self, modules: Iterable[nn.Module], weight_decay: float = 0.05):
        module = nn.ModuleList(modules)
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        matrices = [(n, p) for n, p in named if is_matrix(n, p)]
        weights = [(n, p) for n, p in named if not is_matrix(n, p) and decays(n, p)]
        others = [(n, p) for n, p in named if not is_matrix(n, p) and not decays(n, p)]
        # Matrices of one shape lie together; the three of a joint projection count as three.
        matrices.sort(key=lambda item: (*matrix_shape(*item), item[0]))
        self.names = [name for name, _ in matrices + weights + others]
        self.parameters = parameters = [p for _, p in matrices + weights + others]
        device = parameters[0].device
        total = sum(p.numel() for p in parameters)
        self.values, self.gradients = torch.empty(total, device=device), torch.zeros(total, device=device)
        start = 0
        for parameter in parameters:
            piece = slice(start, start + parameter.numel())
            self.values[piece] = parameter.detach().flatten()
            parameter.data = self.values[piece].view(parameter.shape)
            parameter.grad = self.gradients[piece].view(parameter.shape)
            start += parameter.numel()
        self.shapes: dict[tuple[int, int], Group] = {}
        start = 0
        for name, parameter in matrices:
            shape, end = matrix_shape(name, parameter), start + parameter.numel()
            first = self.shapes[shape].start if shape in self.shapes else start
            self.shapes[shape] = Group(first, end, weight_decay)
            start = end
        self.muon_end = start
        middle = start + sum(p.numel() for _, p in weights)
        self.adam = [Group(start, middle, weight_decay), Group(middle, total, 0.0)]
        self.momentum = torch.zeros(start, device=device)
        self.mean, self.square = (
            torch.zeros(total - start, device=device),
            torch.zeros(total - start, device=device),
        )

    @torch.no_grad()
    def step(self, muon_rate: Tensor, adam_rate: Tensor, number: Tensor, clip: float = 1.0) -> Tensor:
        """Clip the gradients to norm `clip` and take a step; returns the norm before clipping.

        Args:
            muon_rate: learning rate of the matrices, a tensor without dimensions.
            adam_rate: learning rate of all else, likewise.
            number: number of this step since the state was empty, from 1 on, likewise.
            clip: largest norm of all gradients together.
        """
        norm = self.gradients.norm()
        self.gradients.mul_((clip / (norm + 1e-6)).clamp(max=1))
        if self.muon_end:
            gradient = self.gradients[: self.muon_end]
            self.momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
            ahead = gradient.lerp(self.momentum, MUON_MOMENTUM)  # Nesterov
            for (rows, columns), group in self.shapes.items():
                piece = slice(group.start, group.end)
                update = orthogonalise(ahead[piece].view(-1, rows, columns))
                update = update.flatten() * (MUON_UPDATE * math.sqrt(max(rows, columns)))
                self.values[piece].mul_(1 - muon_rate * group.weight_decay).sub_(update * muon_rate)
        gradient = self.gradients[self.muon_end :]
        self.mean.lerp_(gradient, 1 - ADAM_BETAS[0])
        self.square.lerp_(gradient.square(), 1 - ADAM_BETAS[1])
        mean = self.mean / (1 - ADAM_BETAS[0] ** number)
        root = (self.square / (1 - ADAM_BETAS[1] ** number)).sqrt() + EPS
        for group in self.adam:
            piece, own = (
                slice(group.start, group.end),
                slice(group.start - self.muon_end, group.end - self.muon_end),
            )
            self.values[piece].mul_(1 - adam_rate * group.weight_decay).sub_(
                adam_rate * mean[own] / root[own]
            )
        return norm

    def state(self) -> dict[str, Any]:
        """Everything needed to go on, parameters included."""
        return {
            "names": self.names,
            "values": self.values,
            "momentum": self.momentum,
            "mean": self.mean,
            "square": self.square,
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Take over a `state`.

        Raises:
            ValueError: it belongs to other parameters.
        """
        if state["names"] != self.names or state["values"].shape != self.values.shape:
            raise ValueError("the state belongs to a model with other parameters")
        for name in ("values", "momentum", "mean", "square"):
            getattr(self, name).copy_(state[name])


def matrix_shape(name: str, parameter: Tensor) -> tuple[int, int]:
    """Shape in which Muon sees a matrix: queries, keys and values are three."""
    rows, columns = parameter.shape
    return (rows // 3 if "qkv" in name else rows), columns


def orthogonalise(matrices: Tensor) -> Tensor:
    """`[N, r, c]` matrices with the singular vectors of the given ones and singular values near 1 (Newton-Schulz)."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).float()


def learning_rate(step: int, warm_up: int, decay_start: int | None, end: int | None) -> float:
    """Factor on the learning rates at a step, from 0 on: up in a line, level, and down in a line to the end."""
    rate = min(1.0, (step + 1) / max(warm_up, 1))
    if decay_start is not None and end is not None and step >= decay_start:
        rate *= max(end - step, 0) / max(end - decay_start, 1)
    return rate
