"""Streams of a GPU that is not there: who did what after whom, by vector clocks (Lamport's happened-before).

Part of `support.pretend_gpu`.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

Clock = dict[str, int]


def place() -> str:
    """The innermost line of maesil on the stack."""
    for frame in reversed(traceback.extract_stack()):
        if "/maesil/" in frame.filename or "/kernels/" in frame.filename:
            return f"{frame.filename.rpartition('/')[2]}:{frame.lineno} ({frame.line})"
    return "no line of maesil"


class Hazard(AssertionError):
    """What a GPU would refuse, or do wrong now and then."""


def behind(clock: Clock, seen: Clock) -> bool:
    """Whether all that ``clock`` names happened before what has ``seen``."""
    return all(tick <= seen.get(name, 0) for name, tick in clock.items())


def join(into: Clock, other: Clock) -> None:
    for name, tick in other.items():
        into[name] = max(into.get(name, 0), tick)


class Memory:
    """A piece of memory of the device; once no tensor of it is left, its history stays to be looked at."""

    def __init__(self, gpu: Gpu, size: int) -> None:
        self.history = History(size, gpu.stream.name)
        weakref.finalize(self, gpu.release, self.history)


@dataclass(eq=False)
class History:
    """Who made a piece of memory, wrote it and read it, by stream and tick."""

    size: int
    stream: str
    written: Clock = field(default_factory=dict)
    read: Clock = field(default_factory=dict)
    kept_for: set[str] = field(default_factory=set)
    """Streams of `Tensor.record_stream`."""


class Stream:
    """A queue of the device."""

    def __init__(self, *_: object, name: str = "", **__: object) -> None:
        gpu = current_gpu()
        self.gpu, self.name = gpu, name or f"stream {len(gpu.streams)}"
        self.clock: Clock = {}
        gpu.streams.append(self)

    def tick(self) -> Clock:
        join(self.clock, self.gpu.host)
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return {self.name: self.clock[self.name]}

    def synchronize(self) -> None:
        self.gpu.host_sees(self.clock)

    def wait_stream(self, other: Stream) -> None:
        join(self.clock, other.clock)

    def wait_event(self, event: Event) -> None:
        join(self.clock, event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event


class Event:
    """A mark in a queue."""

    def __init__(self, *_: object, **__: object) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict((stream or current_gpu().stream).clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_gpu().stream).wait_event(self)

    def synchronize(self) -> None:
        current_gpu().host_sees(self.clock)

    def query(self) -> bool:
        return behind(self.clock, current_gpu().host)


class Gpu:
    """The device's state."""

    def __init__(self, memory: int) -> None:
        self.lock = threading.RLock()
        self.memory, self.used, self.peak = memory, 0, 0
        self.streams: list[Stream] = []
        self.host: Clock = {}
        """What the host knows to be done."""
        self.waits: list[str] = []
        self.launches: list[str] = []
        self.freed: list[History] = []
        self.pinned: set[int] = set()
        self.copying: list[tuple[Clock, Tensor, Tensor]] = []
        """Copies from pinned memory that may still run: their place in the queue, their source, what it held."""
        self.of_thread = threading.local()
        self.in_backward = False

    @property
    def makes_tensors_of_its_own(self) -> bool:
        """Whether torch is inside a function of tensors of the device, or a gradient of them.

        What its core makes there without naming a tensor, on the device that it knows of, is of the device as well.
        """
        return self.in_backward or getattr(self.of_thread, "depth", 0) > 0

    @contextlib.contextmanager
    def composing(self) -> Iterator[None]:
        self.of_thread.depth = getattr(self.of_thread, "depth", 0) + 1
        try:
            yield
        finally:
            self.of_thread.depth -= 1

    @property
    def stream(self) -> Stream:
        return getattr(self.of_thread, "stream", self.streams[0])

    def host_sees(self, clock: Clock) -> None:
        with self.lock:
            join(self.host, clock)
            ended = [one for one in self.copying if behind(one[0], self.host)]
            self.copying = [one for one in self.copying if not behind(one[0], self.host)]
            for _, source, held in ended:
                if not torch.equal(source, held):
                    raise Hazard("a pinned buffer was changed before its copy to the device had ended")

    def waits_for(self, what: str) -> None:
        """Note that the host stands still until the current stream has done all it was given."""
        self.waits.append(f"{what} at {place()}")
        self.host_sees(self.stream.clock)

    def allocate(self, size: int) -> Memory:
        with self.lock:
            self._require_free()
            if self.used + size > self.memory:
                free = (self.memory - self.used) / 2**20
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU 0 has a total capacity of "
                    f"{self.memory / 2**20:.2f} MiB of which {free:.2f} MiB is free. And more advice of torch."
                )
            self.used += size
            self.peak = max(self.peak, self.used)
            return Memory(self, size)

    def release(self, memory: History) -> None:
        with self.lock:
            self.used -= memory.size
            self.freed.append(memory)

    def _require_free(self) -> None:
        """The allocator gives freed memory to the stream it was made on, at once."""
        name, seen = self.stream.name, {**self.host}
        join(seen, self.stream.clock)
        for memory in [one for one in self.freed if one.stream == name]:
            self.freed.remove(memory)
            uses = {**memory.written}
            join(uses, memory.read)
            uses = {stream: tick for stream, tick in uses.items() if stream not in memory.kept_for}
            if not behind(uses, seen):
                raise Hazard(f"memory of {name} was freed and is used again while another stream may still work on it")

    def use(self, name: str, reads: list[History], writes: list[History]) -> None:
        """Put an operation into the current stream."""
        with self.lock:
            stamp = self.stream.tick()
            self.launches.append(name)
            for memory in reads:
                if not behind(memory.written, self.stream.clock):
                    raise Hazard(f"{name} reads what another stream may not have written yet, at {place()}")
                join(memory.read, stamp)
            for memory in writes:
                if not (behind(memory.written, self.stream.clock) and behind(memory.read, self.stream.clock)):
                    raise Hazard(f"{name} writes what another stream may still use, at {place()}")
                memory.written, memory.read = dict(stamp), {}


_GPU: list[Gpu] = []


def current_gpu() -> Gpu:
    return _GPU[-1]
