"""One clip over the processes of a `torch.distributed` group: rank 0 has the first frames, the last rank the last."""

from __future__ import annotations

import datetime
import os
import time
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..arguments import shown, whole
from ..errors import PaceError, first_line

Value = TypeVar("Value")
# Names in the store of a group: of the error of a rank that failed, and of ranks that wait for others in vain.
FAILED, WAITS = "pacevggt failed", "pacevggt waits"
# By which processes that torchrun started tell each other their type of device, and how long they wait for each other.
DEVICE, MEETING = "pacevggt device", datetime.timedelta(minutes=10)
GRACE = 2.0  # seconds by which ranks that wait for the same notice it apart
# The error of the first process, and seconds for which others wait for it: in a group less than GRACE, and before.
SAID, SHORTLY, STARTING = "pacevggt said", 0.5, 20.0


def place_of_torchrun() -> tuple[int, int]:
    """Number of this process and how many there are, as torchrun says by RANK and WORLD_SIZE; (0, 1) without.

    Raises:
        PaceError: they are no such numbers, or RANK is missing where WORLD_SIZE is above 1.
    """
    if "WORLD_SIZE" not in os.environ:  # then a RANK is left over from elsewhere
        return 0, 1
    world = number_of_torchrun("WORLD_SIZE", 1)
    if world == 1 and "RANK" not in os.environ:
        return 0, 1
    rank = number_of_torchrun("RANK", 0)
    if rank >= world:
        raise PaceError(
            f"RANK must be below WORLD_SIZE, and is {rank} of {world}: start processes by torchrun, or unset both"
        )
    return rank, world


def number_of_torchrun(name: str, least: int) -> int:
    """The whole number in an environment variable."""
    text = os.environ.get(name, "")
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise PaceError(
            f"{name} must be a whole number of at least {least}, got {text!r}: start processes by torchrun, or unset it"
        )
    return int(text)


def said_by_first(text: str) -> bool:
    """Whether an error that ends this process of torchrun is the one that ends the first process.

    The first one leaves its own with the store of torchrun. Others wait for it a little: longer before there is a
    group, as processes don't start at the same moment. Where they can't meet the answer is no.

    Args:
        text: of the error.
    """
    with suppress(Exception):
        rank, world = place_of_torchrun()
        if world == 1:
            return False
        store = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=GRACE)))[0]
        if rank == 0:
            store.set(SAID, text)
            return False
        start = time.monotonic()
        while not store.check([SAID]):
            if time.monotonic() - start > (SHORTLY if store.check([f"{DEVICE} 0"]) else STARTING):
                return False
            time.sleep(0.05)
        return store.get(SAID).decode() in text
    return False


def split_frames(total: int, rank: int, world: int) -> slice:
    """Which frames of a clip are those of a rank: as evenly as can be, in order.

    Args:
        total: frames of the clip, at least one for each rank.
        rank: number of the process in its group, from 0.
        world: processes of the group.

    Raises:
        PaceError: a number is out of range, or there are more ranks than frames.
    """
    total, rank, world = whole("total", total), whole("rank", rank, 0), whole("world", world)
    if rank >= world:
        raise PaceError(f"rank must be below world, got rank {rank} of {world}")
    if total < world:
        frames = "1 frame is" if total == 1 else f"{total} frames are"
        raise PaceError(f"{frames} too few for {world} processes: each needs one at least")
    return slice(rank * total // world, (rank + 1) * total // world)


@contextmanager
def processes_of_torchrun(
    device: torch.device, timeout: datetime.timedelta | None = None
) -> Generator[Ranks | None]:
    """The processes that torchrun started, as one group inside the `with` block; None where there is but one.

    A group that was there before is taken, and left.

    Args:
        device: of this process; made the current one where it is a GPU.
        timeout: how long a process waits for others; None is torch's own. torchrun itself ends all where one ends.

    Raises:
        PaceError: the group can't be made, or processes are on devices of different types.
    """
    world = place_of_torchrun()[1]
    if world == 1:
        yield None
        return
    if not dist.is_available():
        raise PaceError(f"torch was built without torch.distributed, and {world} processes were started")
    makes = not dist.is_initialized()
    if makes:
        try:
            store, rank, world = next(dist.rendezvous("env://", timeout=MEETING))
            store.set(f"{DEVICE} {rank}", device.type)
            kinds = [store.get(f"{DEVICE} {other}").decode() for other in range(world)]
        except (RuntimeError, ValueError) as error:
            raise PaceError(
                f"the {world} processes can't form a group ({first_line(error)}): start them by torchrun"
            ) from error
        other = next((rank for rank, kind in enumerate(kinds) if kind != kinds[0]), None)
        if other is not None:  # they would wait for each other in different groups
            raise PaceError(
                f"rank 0 runs on {kinds[0]} and rank {other} on {kinds[other]}: give all the same --device"
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store.set_timeout(timeout or MEETING)  # NCCL connects by it at the first call
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    ranks = Ranks(True)
    try:
        yield ranks
    except Exception:
        # With NCCL others that wait in a call would keep this process from ending.
        makes = makes and device.type != "cuda"
        raise
    finally:
        if makes:
            dist.destroy_process_group()


def gather_outputs(outputs: Any, group: Any = True, dst: int = 0) -> Any:
    """The outputs of all ranks for all frames, on one of them. Every rank of the group calls it.

    Args:
        outputs: what the model or a head returned for the frames of this rank. Tensors [B, S, ...] in dictionaries,
            lists and tuples are joined over S; all else is that of rank `dst`.
        group: a `torch.distributed.ProcessGroup`, or True for the default one.
        dst: rank in the group that gets them.

    Returns:
        On rank `dst` the same with the frames of all ranks, where its own tensors are; on others None.

    Raises:
        PaceError: on all ranks, if outputs differ in more than their frames, or one has none.
    """
    ranks = Ranks(group)
    whole("dst", dst, 0)
    leaves, form = tree_flatten(outputs)
    own = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def described() -> tuple[list[int], dict[str, str]]:
        if dst >= ranks.world:
            raise PaceError(f"dst must be a rank of the group, below {ranks.world}, got {dst}")
        flat = next((tensor for tensor in own if tensor.ndim < 2), None)
        if flat is not None:
            raise PaceError(f"outputs must have their frames in dimension 1, got a tensor {list(flat.shape)}")
        others = [(t.shape[0], *t.shape[2:], str(t.dtype), t.device.type) for t in own]
        return [tensor.shape[1] for tensor in own], {"outputs": f"{form}, {others}"}

    frames = [found for found, _ in ranks.agree(described)]
    joined = []
    for number, tensor in enumerate(own):
        sizes = [counts[number] for counts in frames]
        parts = ranks.gather(tensor, sizes, 1, dst)
        joined.append(torch.cat(parts, 1).to(tensor.device) if parts else None)
    if ranks.rank != dst:
        return None
    found = iter(joined)
    return tree_unflatten([next(found) if isinstance(leaf, Tensor) else leaf for leaf in leaves], form)


class LostError(PaceError):
    """Other ranks could not be reached."""


class Ranks:
    """The processes of a group. A copy is of the same group; it can't be pickled.

    Args:
        group: a `torch.distributed.ProcessGroup`, or True for the default one.

    Attributes:
        rank: of this process in the group.
        world: how many there are.
        store: what they meet by, or None where torch does not tell.
        broken: what went wrong in the middle of a call, after which the ranks are out of step; or None.

    Raises:
        PaceError: `group` is none, torch.distributed is not set up, or this process is not in the group.
    """

    def __init__(self, group: Any):
        if not dist.is_available() or not dist.is_initialized():
            raise PaceError(
                "a clip over several processes needs a process group: start them by torchrun, and call "
                "torch.distributed.init_process_group first"
            )
        if group is not True and not isinstance(group, dist.ProcessGroup):
            raise PaceError(
                "process_group must be a torch.distributed.ProcessGroup, or True for the default one, got "
                f"{shown(group)}: this process may not be in it"
            )
        # Not held: threads of a group that is alive at the end of the interpreter may abort it.
        self.reference = weakref.ref(dist.group.WORLD if group is True else group)
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.broken: str | None = None
        self.store: Any = None
        with suppress(AttributeError, KeyError):
            self.store = dist.distributed_c10d._world.pg_map[self.group][1]
        if self.rank < 0:
            raise PaceError("this process is not in process_group: pass the group that it belongs to")

    def __deepcopy__(self, memo: dict) -> Ranks:
        return self

    def __reduce__(self) -> NoReturn:
        raise PaceError(
            "a model over several processes can't be pickled: call pacevggt_patch.remove(model) first"
        )

    @property
    def backends(self) -> dict[str, str]:
        """Who moves the tensors of each type of device."""
        return dict(pair.split(":") for pair in dist.get_backend_config(self.group).split(","))

    @property
    def group(self) -> Any:
        """The group.

        Raises:
            PaceError: it was ended since.
        """
        group = self.reference()
        try:
            dist.get_backend_config(group)
        except Exception:  # of a kind that torch changes
            group = None
        if group is None:
            raise PaceError(
                "the process group that this model was accelerated for is no more: call pacevggt_patch.accelerate "
                "again, with the process_group that there is now"
            )
        return group

    def check_device(self, device: torch.device) -> None:
        """Raise PaceError where the backend of the group can't move tensors of a device."""
        backend = self.backends.get(device.type)
        if backend is None or (device.type == "cuda" and backend == "gloo"):
            raise PaceError(
                f"the model is on {device}, and the group has {backend or 'no backend'} for it: call "
                'init_process_group("nccl") for models on CUDA, "gloo" for those on the CPU'
            )
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            raise PaceError(
                f"the model is on {device} and the current device is cuda:{torch.cuda.current_device()}: call "
                f"torch.cuda.set_device({device.index}) before init_process_group"
            )

    def agree(self, describe: Callable[[], tuple[Value, Mapping[str, str]]]) -> list[tuple[Value, Mapping]]:
        """What each rank says of itself, by rank; all ranks raise where one does, or where they differ.

        The host waits for the device here, and nowhere else.

        Args:
            describe: gives anything that can be pickled, and by name what must be the same on all ranks.

        Raises:
            PaceError: what `describe` raised on this rank or on another, or in what two ranks differ.
        """
        error: Exception | None = None
        mine: tuple[Any, str | None] = None, None
        try:
            mine = describe(), None
        except Exception as caught:
            error, mine = caught, (None, first_line(caught))
        every: list[Any] = [None] * self.world
        with self.reaching():
            dist.all_gather_object(every, mine, group=self.group)
        if error is not None:
            raise error
        for rank, (_, problem) in enumerate(every):
            if problem is not None:
                raise PaceError(f"rank {rank} can't go on, so no other does: {problem}")
        found = [said for said, _ in every]
        first = found[0][1]
        for rank, (_, same) in enumerate(found):
            for name, value in same.items():
                if value != first.get(name):
                    raise PaceError(
                        f"the ranks differ in {name}, {first.get(name)} on rank 0 and {value} on rank {rank}: give all "
                        "of them the same"
                    )
        return found

    def clip(self, describe: Callable[[], tuple[int, Mapping[str, str]]]) -> ClipExchange:
        """A clip that begins, of as many frames here as `describe` gives; see `agree`."""
        if self.broken is not None:
            raise PaceError(
                f"an earlier call failed on rank {self.rank} ({self.broken}), so the ranks are out of step: end all "
                "processes and start again"
            )
        return ClipExchange(self, [frames for frames, _ in self.agree(describe)])

    @contextmanager
    def in_step(self) -> Generator[None]:
        """A call that breaks off inside leaves the ranks out of step, and others are told why."""
        try:
            yield
        except BaseException as error:
            self.broken = first_line(error)
            if not isinstance(error, LostError):
                self.note(FAILED, self.broken)
            raise

    @contextmanager
    def reaching(self) -> Generator[None]:
        """Inside, this rank talks to the others.

        Raises:
            PaceError: one of them is gone, or did not come within the timeout of the group; names it where it can.
        """
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = first_line(error).split(". ")[0]
            raise LostError(
                f"rank {self.rank} can't reach the others ({reason}): {self.lost()}; end all processes and start again"
            ) from error

    def note(self, name: str, text: str) -> None:
        """Leave a text of this rank for the others, if their store can still be reached."""
        with suppress(Exception):
            self.store.set(f"{name} {self.rank}", text)

    def lost(self) -> str:
        """Which ranks failed, and why, in words; for ranks that waited in vain."""
        self.note(WAITS, "")
        time.sleep(GRACE)
        failed, silent = [], []
        try:
            for rank in range(self.world):
                if self.store.check([f"{FAILED} {rank}"]):
                    failed.append(f"rank {rank} failed ({self.store.get(f'{FAILED} {rank}').decode()})")
                elif not self.store.check([f"{WAITS} {rank}"]):
                    silent.append(f"rank {rank} was killed, or took longer than the timeout of the group")
        except Exception:  # whatever the store raises where the process that kept it is gone
            failed, silent = [], []
        return "; ".join(failed or silent) or (
            "one failed, was killed, or took longer than the timeout of the group, and its own message says why"
        )

    def gather(self, tensor: Tensor, sizes: Sequence[int], dim: int, dst: int | None = None) -> list[Tensor]:
        """The tensors of all ranks, alike but for their `sizes` in dimension `dim`.

        Args:
            dst: rank that gets them, all others get nothing; None is all.
        """
        # Backends gather tensors of one shape.
        padding = [0, 0] * (tensor.ndim - dim - 1) + [0, max(sizes) - tensor.shape[dim]]
        sent = F.pad(tensor.detach(), padding).contiguous()
        if sent.device.type not in self.backends:  # outputs that left their GPU
            sent = sent.cuda()
        mine = dst is None or dst == self.rank
        found = [torch.empty_like(sent) for _ in sizes] if mine else []
        with self.reaching():
            if dst is None:
                dist.all_gather(found, sent, group=self.group)
            else:
                place = dist.get_global_rank(self.group, dst)
                dist.gather(sent, found if mine else None, dst=place, group=self.group)
        return [part.narrow(dim, 0, size) for part, size in zip(found, sizes, strict=True)] if mine else []

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        """The sums over all ranks of tensors of one dtype."""
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        with self.reaching():
            dist.all_reduce(flat, group=self.group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class ClipExchange:
    """One clip over the ranks of a group, as `method.exchange.Exchange` wants it.

    Args:
        ranks: of the group.
        counts: frames of each.

    Attributes:
        here: frames of this rank.
    """

    def __init__(self, ranks: Ranks, counts: Sequence[int]):
        self.ranks, self.counts, self.here = ranks, tuple(counts), counts[ranks.rank]
        self.before, self.total = sum(counts[: ranks.rank]), sum(counts)

    def gather(self, tensor: Tensor, sizes: Sequence[int], dim: int) -> list[Tensor]:
        return self.ranks.gather(tensor, sizes, dim)

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        return self.ranks.sum(*tensors)
