"""Signals that ask a run to end: it ends after the step that it is at."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class Stopped(KeyboardInterrupt):
    """A signal ended a run; `status` is the exit status of a program that it ended."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number

    def tell(self, step: int, state: Path) -> None:
        """Say after which step that was, and how to go on."""
        how = f"after step {step}: pass --resume to go on" if state.is_file() else "before the first step"
        self.args = (f"{self} {how}",)


class Signals:
    """Inside the `with` block a signal raises `Stopped`, at once or at the end of what is `held`; a second one does
    what it did before.

    Signals that are ignored or have a handler of somebody's own keep it, and other threads can't set any.

    Args:
        world: number of processes; if one of them is asked to stop, all stop at the same step.
    """

    def __init__(self, world: int = 1):
        self.number, self.holding = 0, False
        self.before: dict[int, Any] = {}
        # On the CPU, where it waits for no step.
        self.group = dist.new_group(backend="gloo") if world > 1 else None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self.before[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_: object) -> None:
        while self.before:
            signal.signal(*self.before.popitem())

    def receive(self, number: int, _frame: object) -> None:
        """The handler."""
        self.__exit__()
        self.number = number
        if not self.holding:
            raise Stopped(number)

    @contextmanager
    def held(self) -> Generator[None]:
        """What is inside the `with` block is done to its end, for which it should ask whether it is `asked` to stop."""
        self.holding = True
        try:
            yield
            self.asked()  # for the last time: others must not go on alone
        finally:
            self.holding = False
        if self.number:
            raise Stopped(self.number)

    def asked(self) -> bool:
        """Whether to stop; to be called by all processes alike."""
        if self.group is not None:
            number = torch.tensor(self.number)
            dist.all_reduce(number, dist.ReduceOp.MAX, self.group)
            self.number = int(number)
        return self.number != 0
