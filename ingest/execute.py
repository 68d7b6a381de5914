"""Running tasks in this process or on a local Dask cluster, with back-pressure."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")

_IN_FLIGHT_PER_WORKER = 2


class Executor(Protocol):
    """Runs ``task(item)`` for many items."""

    threads: int
    """How many threads one task may use."""

    def run(self, task: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Yield (number of the item, result or the exception it raised), in order of completion."""


class InProcess:
    """Runs one task after another, here. For debugging, tests, and one-volume jobs."""

    def __init__(self) -> None:
        self.threads = usable_cores()

    def run(self, task: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """See `Executor.run`."""
        for number, arguments in enumerate(items):
            try:
                result: Any = task(*arguments)
            except Exception as error:
                result = error
            yield number, result


class LocalDask:
    """Runs tasks on a cluster of processes of this machine, started at the first task and not before."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.threads = max(1, usable_cores() // workers)
        self._client: Any = None

    def run(self, task: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """See `Executor.run`; a task whose worker died again and again yields Dask's ``KilledWorker``."""
        numbered = list(enumerate(items))
        suspects = []
        for number, result in self._run(task, numbered, self.workers * _IN_FLIGHT_PER_WORKER):
            if type(result).__name__ == "KilledWorker":
                suspects.append(number)
            else:
                yield number, result
        # Dask blames all that waited on a worker when it died. Alone, a task can be blamed for itself only.
        yield from self._run(task, [numbered[number] for number in suspects], 1)

    def _run(
        self, task: Callable[..., Any], numbered: Iterable[tuple[int, tuple[Any, ...]]], in_flight: int
    ) -> Iterator[tuple[int, Any]]:
        from distributed import as_completed

        waiting = iter(numbered)
        first = [self._submit(task, *pair) for pair in islice(waiting, in_flight)]
        if not first:
            return
        running = as_completed(first, loop=self._client.loop)
        for future in running:
            number = int(str(future.key).rsplit("-", 1)[1])
            try:
                result = future.result()  # a result dies with its worker: even a finished task may still fail here
            except Exception as error:
                result = error
            yield number, result
            future.release()
            if (pair := next(waiting, None)) is not None:
                running.add(self._submit(task, *pair))

    def close(self) -> None:
        """Stop the cluster if one was started."""
        if self._client is not None:
            cluster = self._client.cluster
            self._client.close()
            cluster.close()

    def _submit(self, task: Callable[..., Any], number: int, arguments: tuple[Any, ...]) -> Any:
        if self._client is None:
            self._client = _start_cluster(self.workers)
        return self._client.submit(task, *arguments, pure=False, key=f"{task.__name__}-{os.urandom(8).hex()}-{number}")


@contextmanager
def executor(workers: int | None) -> Iterator[Executor]:
    """Yield an executor: None is one process a core, 0 this process."""
    if workers == 0:
        yield InProcess()
        return
    cluster = LocalDask(workers or usable_cores())
    try:
        yield cluster
    finally:
        cluster.close()


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_cluster(workers: int) -> Any:
    import dask
    from distributed import Client, LocalCluster

    dask.config.set(
        {
            "distributed.scheduler.allowed-failures": 1,
            "distributed.worker.daemon": True,
            # On a busy machine a new worker may take longer to come up than Dask's 15 s, after which it is given up.
            "distributed.deploy.lost-worker-timeout": "300 s",
            # Without any worker left, tasks would wait for ever: they fail with NoWorkerError instead.
            "distributed.scheduler.no-workers-timeout": "300 s",
        }
    )
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    # Loopback only: a scheduler unpickles what it receives.
    cluster = LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address="127.0.0.1:0",
        silence_logs=logging.CRITICAL,
    )  # fmt: skip
    return Client(cluster)
