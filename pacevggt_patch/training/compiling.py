"""Whether this machine can compile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.compiling import compiled


def works(device: torch.device) -> bool:
    """Whether what a block is made of can be compiled on this machine, and its gradients; takes seconds.

    It takes a C compiler, and on a GPU Triton.
    """
    try:
        with torch.enable_grad():
            compiled(_trial)(torch.ones(8, 16, device=device, requires_grad=True)).sum().backward()
    except Exception:  # whatever a compiler that is not all there trips over
        return False
    return True


def _trial(x: Tensor) -> Tensor:
    return x + F.gelu(F.linear(F.layer_norm(x, x.shape[-1:]), x.mT @ x))
