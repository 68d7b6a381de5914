"""Signals that ask for an end, put off to a moment at which an end does no harm; pipes that were closed."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What asks a process to end: Ctrl-C, ``kill`` and batch systems, a terminal that closes, SLURM before the time is up
(``--signal=USR1@60``)."""
TOLD_BY_ANOTHER = "MAESIL_INTERRUPT_IS_TOLD"
"""Set in the environment of a command whose caller says how to go on: two messages would say two things."""


@contextmanager
def interrupts_raised() -> Iterator[None]:
    """Let every signal that asks for an end raise KeyboardInterrupt, so that whoever is at work cleans up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with handled(interrupt):
        yield


@contextmanager
def interrupts_deferred(told: str = "") -> Iterator[threading.Event]:
    """Let the first signal that asks for an end set the yielded event, to be looked at between steps.

    A second one interrupts at once. ``told`` is a line for people, written as the first one comes. Outside the main
    thread, where Python allows no handlers, signals are left as they are.
    """
    interrupted = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        if told:
            with contextlib.suppress(OSError):  # past all buffers: a handler must not re-enter them
                os.write(2, f"{told}\n".encode())

    with handled(note):
        yield interrupted


@contextmanager
def interrupts_kept_from_children() -> Iterator[None]:
    """Start processes, and threads that start some, which a terminal's or batch system's interrupt does not reach.

    Such a signal goes to the whole process group. This process alone decides what it means, and ends its children.
    What comes meanwhile is not lost: it is delivered at the end of this. SIGTERM still ends a child.
    """
    kept = set(ENDS) - {signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, kept)
    resource_tracker.ensure_running()  # a child of multiprocessing's own; its start unblocks SIGINT again
    signal.pthread_sigmask(signal.SIG_BLOCK, kept)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def handled(
    handler: Callable[[int, FrameType | None], None], numbers: Sequence[signal.Signals] = ENDS
) -> Iterator[None]:
    """Handle signals for a while; outside the main thread, where Python allows no handlers, they are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Under nohup a terminal that closes is to be ignored.
    taken = [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    before: dict[int, Any] = {number: signal.signal(number, handler) for number in taken}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            if handler_before is not None:  # else not one of Python's, which cannot be set again
                signal.signal(number, handler_before)


def outlive_closed_pipes() -> None:
    """Let standard output and error swallow what a closed pipe no longer takes: ``| head`` must not end the work."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            raw = io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False))
            by_lines = stream.line_buffering
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=by_lines))


class _Pipe(io.FileIO):
    """A file that goes on as a sink once nobody reads it any more."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, self.fileno())
            os.close(sink)
            return memoryview(data).nbytes
