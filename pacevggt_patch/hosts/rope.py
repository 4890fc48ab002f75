"""VGGT's two-dimensional rotary embedding (RoPE), without its look at the largest position."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROPE_TABLE = 1024  # rows of the table: more patches than any image has on a side
# What makes the table, of channels, rows, device and dtype, and what keeps it: VGGT's and Pi3's names.
TABLES = ("_compute_frequency_components", "get_cos_sin")
CACHES = {"frequency_cache", "cache"}

# Cosines and sines of tokens' positions; the sines of the first half of each pair of channels are negative.
Rotation = tuple[Tensor, Tensor]


def static_rope(rope: Any) -> Any:
    """A copy of the host's RoPE for `rotate`, or None where the host's does something else.

    The copy has tables of its own, so that the host's stay as they are. Whether `rotate` does what the host does is
    tried on a small example, since forks may change one and not the other.
    """
    if not any(hasattr(rope, name) for name in TABLES):
        return None
    static = copy.copy(rope)
    static.__dict__.pop("forward", None)
    for name in CACHES & static.__dict__.keys():
        static.__dict__[name] = {}
    tokens = torch.linspace(-1, 1, 32, device="cpu", dtype=torch.float32).view(1, 1, 4, 8)
    positions = torch.tensor([[[0, 0], [1, 2], [3, 1], [2, 5]]], device="cpu")
    try:
        theirs = type(rope).forward(static, tokens.clone(), positions)
        known = torch.equal(theirs, rotate(tokens, *rotation(static, 8, tokens.dtype, positions)))
    except Exception:  # whatever a RoPE of an unknown type trips over
        known = False
    return static if known else None


def rotation(rope: Any, width: int, dtype: torch.dtype, positions: Tensor) -> Rotation:
    """Cosines and sines [B, 1, L, D] of `positions` [B, L, 2] for heads of D = `width`.

    The table has the same rows whatever its length, so that the outputs are the host's own. Its length is fixed: to ask
    for the largest position would make the host wait for the device in every block.
    """
    half = width // 2
    make = next(getattr(rope, name) for name in TABLES if hasattr(rope, name))
    cos, sin = make(half, ROPE_TABLE, positions.device, dtype)  # [rows, half]
    sin = torch.cat([-sin[:, : half // 2], sin[:, half // 2 :]], dim=-1)
    cos, sin = (F.embedding(positions, table).flatten(-2).unsqueeze(1) for table in (cos, sin))
    return cos, sin


def table_rotation(tables: Any, length: int) -> Rotation:
    """Cosines and sines [L, D] of L = `length` tokens of a frame, of sines and cosines of its patches [P, D].

    Those are of DINOv3, which leaves tokens in front of the patches as they are, and turns the two halves of all
    channels against each other.
    """
    sin, cos = tables
    half, front = sin.shape[-1] // 2, (0, 0, length - len(sin), 0)
    sin = torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)
    return F.pad(cos, front, value=1.0), F.pad(sin, front)


def rotate(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys [B, heads, L, D], rotated."""
    # Each half of the channels, for y and for x, turns its own two halves against each other.
    # Not by `unflatten`, which compilers can't trace under a function mode.
    turned = tokens.reshape(*tokens.shape[:-1], 2, 2, -1).flip(-2).flatten(-3)
    return (tokens * cos).add_(turned.mul_(sin))


class Rotations:
    """Rotations of one forward pass: every block asks for the same positions twice."""

    def __init__(self):
        self.known: dict[tuple, tuple[Tensor, Rotation]] = {}

    def get(self, rope: Any, width: int, dtype: torch.dtype, positions: Tensor) -> Rotation:
        """`rotation`, made once for positions at one address."""
        # A fake tensor lies nowhere.
        if torch.compiler.is_compiling() or type(positions) is not Tensor or not positions.is_contiguous():
            return rotation(rope, width, dtype, positions)
        key = (id(rope), positions.data_ptr(), positions.numel(), width, dtype)
        if key not in self.known:
            # The entry holds the positions: what lies at their address stays what it is.
            self.known[key] = positions, rotation(rope, width, dtype, positions)
        cos, sin = self.known[key][1]
        shape = (len(positions), 1, positions.shape[1], width)
        return cos.view(shape), sin.view(shape)
