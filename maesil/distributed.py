"""Several processes that train one model: who is who, sums over all, and one end for all.

``torchrun`` starts the same command in every process (*rank*) and names each in its environment. Without it there is
one rank, and whatever is asked for here is answered at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from maesil.errors import (
    EXIT_INTERRUPTED,
    EXIT_RESOURCES,
    EndedWithOthers,
    MaesilError,
    ResourceError,
    UsageError,
)

_LONGEST_STEP = timedelta(minutes=10)
"""A rank that answers no collective for so long counts as lost; one whose process ended is noticed at once."""
_LONGEST_SETUP = timedelta(days=1)
"""For what the first rank does alone before the first step, such as reading all training volumes once."""
_SIGNS_OF_LOSS = ("gloo", "nccl", "connection", "timed out", "broken pipe", "socket")

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One process among those that train together; by default it is alone."""

    number: int = 0
    count: int = 1
    local: int = 0
    """Number among the ranks of this machine: the GPU it takes."""
    on_this_machine: int = 1
    patient: dist.ProcessGroup | None = None
    """For values that the first rank takes long to make."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.number == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of all ranks' tensors, equal to the bit on all of them."""
        if self.count == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Return on every rank whether the flag is set on any of them."""
        return (self.count > 1 and bool(self.sum(torch.tensor(int(flag))))) or flag

    def gather(self, value: T) -> list[T]:
        """Return all ranks' values, on every rank."""
        if self.count == 1:
            return [value]
        values: list[T | None] = [None] * self.count
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def from_first(self, make: Callable[[], T]) -> T:
        """Let the first rank make a value, however long it takes, and give it to all."""
        if self.count == 1:
            return make()
        values = [make() if self.first else None]
        dist.broadcast_object_list(values, src=0, group=self.patient)
        return values[0]  # type: ignore[return-value]


ALONE = Ranks()
_current = ALONE


def current() -> Ranks:
    """Return this process's place among the ranks, inside of `joined`; alone elsewhere."""
    return _current


def several() -> bool:
    """Return whether a launcher such as ``torchrun`` started more than one of this command."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other ranks, if there are any, until the block is left; a block inside another joins nothing anew.

    If one rank fails, all end: those that wait for it get an error within seconds, and its reason is told once. Raises
    UsageError for an incomplete environment, ResourceError for a rank that ended without a word.
    """
    global _current
    if _current.count > 1 or not several():
        yield _current
        return
    _current, store = _join()
    try:
        yield _current
        _current.any(False)  # nobody leaves before all are done: a launcher ends the others with the first that ends
        dist.destroy_process_group()
    except BaseException as error:
        told = _told_once(error, _current, store)
        if told is error:
            raise
        raise told from error
    finally:
        _current = ALONE


def _join() -> tuple[Ranks, Store]:
    try:
        store, number, count = next(rendezvous("env://", timeout=_LONGEST_STEP))
        local, on_this_machine = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    except (ValueError, KeyError) as error:
        raise UsageError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: expected the environment that torchrun sets, found it incomplete "
            f"({error}); start with `torchrun --nproc-per-node N -m maesil train ...`, or unset WORLD_SIZE"
        ) from error
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=_LONGEST_STEP)
    patient = dist.new_group(backend="gloo", timeout=_LONGEST_SETUP)
    return Ranks(number, count, local, on_this_machine, patient), store


def _told_once(error: BaseException, ranks: Ranks, store: Store) -> BaseException:
    """Return what this rank ends with: the reason where it is the first to know it, else a silent error."""
    if not isinstance(error, MaesilError | KeyboardInterrupt) and not _is_loss(error):
        return error
    code = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", EXIT_RESOURCES)
    reason = str(error)
    try:
        if store.add("maesil/ended", 1) > 1:
            store.wait(["maesil/reason"], timedelta(seconds=5))
            if not isinstance(error, MaesilError) or store.get("maesil/reason").decode() == reason:
                return EndedWithOthers(code)
        else:
            store.set("maesil/reason", reason)
    except (RuntimeError, ValueError):  # the store went with the first rank or the launcher
        pass
    name = "" if ranks.first else f"rank {ranks.number}: "
    if isinstance(error, MaesilError):
        return type(error)(name + reason)
    if isinstance(error, KeyboardInterrupt):
        return error
    return ResourceError(
        f"{name}another rank ended without a word (killed, out of memory, or cut off from the network), so this run "
        f"ends; go on from its last checkpoint with --resume ({reason.splitlines()[0][:120]})"
    )


def _is_loss(error: BaseException) -> bool:
    """Return whether an error of a collective says that another rank is gone."""
    told = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in told for sign in _SIGNS_OF_LOSS)
