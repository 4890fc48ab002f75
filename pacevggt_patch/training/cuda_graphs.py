"""What is done in every step of training, as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MOST = 64  # recordings: each holds its outputs, and memory for launches


class Recording(NamedTuple):
    """A recorded call: the tensors that it reads, and those that it returns."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: Sequence[Tensor]


class Recorder:
    """Calls functions of tensors, from the second call of a kind on by replaying what the GPU did in it.

    A step on a small model is thousands of short kernels, which the host takes longer to launch than the GPU to run.
    The first call of a kind runs as it is and fills every cache. The second is recorded, so it must make the same
    kernels of any inputs of the same shapes, and nothing in it may wait for the GPU. After MOST kinds others run as
    they are.

    Args:
        on: whether to record; without, all calls run as they are.
    """

    def __init__(self, on: bool):
        self.on = on
        self.seen: set[Hashable] = set()
        self.recordings: dict[Hashable, Recording] = {}
        # Inputs of the same shapes share their memory: one recording is replayed at a time.
        self.buffers: dict[Hashable, list[Tensor]] = {}

    def __call__(
        self, kind: Hashable, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """`function(*inputs)`. Calls of one kind do the same, but for the values of the inputs."""
        shapes = tuple((tuple(value.shape), value.dtype) for value in inputs)
        key = kind, shapes
        full = len(self.recordings) >= MOST and key not in self.recordings
        if not self.on or full or key not in self.seen:
            self.seen.add(key)
            return function(*inputs)
        if shapes not in self.buffers:
            self.buffers[shapes] = [torch.empty_like(value) for value in inputs]
        for place, value in zip(self.buffers[shapes], inputs, strict=True):
            place.copy_(value)
        if key not in self.recordings:
            self.recordings[key] = self.record(function, self.buffers[shapes])
        recording = self.recordings[key]
        recording.graph.replay()
        return [output.clone() for output in recording.outputs]  # the next replay may write there

    def record(self, function: Callable[..., Sequence[Tensor]], inputs: list[Tensor]) -> Recording:
        """Record a call; nothing is computed."""
        pool = next(iter(self.recordings.values())).graph.pool() if self.recordings else None
        graph = torch.cuda.CUDAGraph()
        # Other threads go on talking to the GPU meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = function(*inputs)
        return Recording(graph, inputs, outputs)
