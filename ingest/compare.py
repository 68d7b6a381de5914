"""Comparing the pixels of many slices on workers, where planning needs them and headers do not decide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from maesil.errors import InterruptedRun
from maesil.ingest import stop
from maesil.ingest.execute import Executor, executor
from maesil.ingest.header import InstanceHeader
from maesil.ingest.isolated import hu_digests
from maesil.ingest.options import IngestOptions
from maesil.ingest.passes import Digests, by_file, decoded_bytes, decoded_here
from maesil.progress import Report

FEW = 32
"""So many files are decoded here sooner than workers start."""


@contextmanager
def comparing(options: IngestOptions, progress: Report) -> Iterator[Digests]:
    """Yield what gives digests of slices: a few files are decoded here, many by workers; the stage is ``compare``.

    A worker is told a file and numbers of frames, and nothing else of a slice: identities stay in this process.
    """
    with ExitStack() as opened:
        workers: list[Executor] = []

        def digests(slices: Sequence[InstanceHeader]) -> dict[int, bytes]:
            files = list(by_file(slices).items())
            if len(files) <= FEW:
                return decoded_here(slices)
            orders = [(path, [one.frame for one in frames], decoded_bytes(frames)) for path, frames in files]
            if not workers:
                most = max(size for _, _, size in orders)
                chosen = executor(options.workers, scheduler=options.scheduler, task_bytes=most)
                workers.append(opened.enter_context(chosen))
            found: dict[int, bytes] = {}
            with stop.on_sigterm():
                for done, (number, result) in enumerate(workers[0].run(hu_digests, orders), start=1):
                    if isinstance(result, Exception):
                        raise result
                    found |= {id(one): digest for one, digest in zip(files[number][1], result, strict=True)}
                    progress("compare", done, len(files))
            if len(found) < len(slices):
                raise InterruptedRun("ended on request while slices were compared; the same command begins anew")
            return found

        yield digests
