"""Running tasks in this process or on Dask workers, with back-pressure.

The driver keeps a few tasks a worker in flight and submits the next as one completes: it never holds a graph of all.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, Protocol, TypeVar

from maesil.ingest import stop
from maesil.ingest.connect import connect
from maesil.signals import interrupts_kept_from_children

Item = TypeVar("Item")

_IN_FLIGHT_PER_WORKER = 2
_FOR_THE_SYSTEM = 0.9
"""Share of the memory that workers may have."""


class Executor(Protocol):
    """Runs ``task(item)`` for many items."""

    threads: int
    """How many threads one task may use."""

    def run(self, task: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Yield (number of the item, result or the exception it raised), in order of completion.

        Once the run was asked to end, no further item is begun.
        """


class InProcess:
    """Runs one task after another, here. For debugging, tests, and one-volume jobs."""

    def __init__(self) -> None:
        self.threads = usable_cores()

    def run(self, task: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """See `Executor.run`."""
        for number, arguments in enumerate(items):
            if stop.requested():
                return
            try:
                result: Any = task(*arguments)
            except Exception as error:
                result = error
            yield number, result


class OnDask:
    """Runs tasks on a Dask cluster that is started, or connected to, at the first task and not before."""

    def __init__(self, connect: Callable[[], Any], threads: int) -> None:
        self.threads = threads
        self._connect = connect
        self._client: Any = None

    def run(self, task: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """See `Executor.run`; a task whose worker died again and again yields Dask's ``KilledWorker``."""
        waiting = enumerate(items)
        first = next(waiting, None)
        if first is None:
            return
        if self._client is None:
            self._client = self._connect()
        suspects = []
        in_flight = self._workers() * _IN_FLIGHT_PER_WORKER
        for number, arguments, result in self._run(task, chain([first], waiting), in_flight):
            if type(result).__name__ == "KilledWorker":
                suspects.append((number, arguments))
            else:
                yield number, result
        # Dask blames all that waited on a worker when it died. Alone, a task can be blamed for itself only.
        for number, _, result in self._run(task, iter(suspects), 1):
            yield number, result

    def close(self) -> None:
        """End the connection, and the cluster if it is this one's own."""
        if self._client is not None:
            cluster = self._client.cluster
            self._client.close()
            if cluster is not None:
                cluster.close()

    def _run(
        self, task: Callable[..., Any], waiting: Iterator[tuple[int, tuple[Any, ...]]], in_flight: int
    ) -> Iterator[tuple[int, tuple[Any, ...], Any]]:
        from distributed import as_completed

        running: dict[int, tuple[Any, ...]] = {}

        def submit(number: int, arguments: tuple[Any, ...]) -> Any:
            running[number] = arguments
            return self._client.submit(
                task, *arguments, pure=False, key=f"{task.__name__}-{os.urandom(8).hex()}-{number}"
            )

        first = [submit(*pair) for pair in islice(waiting, in_flight)]
        if not first:
            return
        completed = as_completed(first, loop=self._client.loop)
        for future in completed:
            number = int(str(future.key).rsplit("-", 1)[1])
            try:
                result = future.result()  # a result dies with its worker: even a finished task may still fail here
            except Exception as error:
                result = error
            yield number, running.pop(number), result
            future.release()
            if not stop.requested() and (pair := next(waiting, None)) is not None:
                completed.add(submit(*pair))

    def _workers(self) -> int:
        return max(1, len(self._client.scheduler_info(n_workers=-1)["workers"]))


def in_order(results: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Yield results by their numbers: what is done early waits for those before it."""
    early: dict[int, Any] = {}
    due = 0
    for number, result in results:
        early[number] = result
        while due in early:
            yield due, early.pop(due)
            due += 1
    yield from sorted(early.items())  # a run that was asked to end leaves some out


@contextmanager
def executor(workers: int | None, *, scheduler: str | None = None, task_bytes: int = 0) -> Iterator[Executor]:
    """Yield an executor: on a running scheduler, in this process (0 workers), or on a cluster of one's own.

    None workers is one process per core, or as many as have room for a task of ``task_bytes``.
    """
    if scheduler is None and workers == 0:
        yield InProcess()
        return
    if scheduler is not None:
        cluster = OnDask(lambda: connect(scheduler), threads=1)
    else:
        count = workers or workers_that_fit(task_bytes)
        cluster = OnDask(lambda: _start_cluster(count), threads=max(1, usable_cores() // count))
    try:
        yield cluster
    finally:
        cluster.close()


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_that_fit(task_bytes: int) -> int:
    """Return how many workers have room for a task of this size each; at least one, at most one per core."""
    from distributed.system import MEMORY_LIMIT

    return max(1, min(usable_cores(), int(_FOR_THE_SYSTEM * MEMORY_LIMIT) // max(1, task_bytes)))


def _start_cluster(workers: int) -> Any:
    import dask
    from distributed import Client, LocalCluster
    from distributed.system import MEMORY_LIMIT

    dask.config.set(
        {
            "distributed.scheduler.allowed-failures": 1,
            "distributed.worker.daemon": True,
            # On a busy machine a new worker may take longer to come up than Dask's 15 s, after which it is given up.
            "distributed.deploy.lost-worker-timeout": "300 s",
            # The profiler looks at all threads every 10 ms. If a thread begins just then and Python collects garbage,
            # the worker stands still for ever (CPython issue 106883, seen with Python 3.11.7).
            "distributed.worker.profile.enabled": False,
            # Without any worker left, tasks would wait for ever: they fail with NoWorkerError instead.
            "distributed.scheduler.no-workers-timeout": "300 s",
        }
    )
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    # Loopback only: a scheduler unpickles what it receives.
    with interrupts_kept_from_children():  # else each worker prints a traceback on Ctrl-C
        cluster = LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, host="127.0.0.1",
            dashboard_address="127.0.0.1:0", memory_limit=int(_FOR_THE_SYSTEM * MEMORY_LIMIT / workers),
            silence_logs=logging.CRITICAL,
        )  # fmt: skip
    return Client(cluster)
