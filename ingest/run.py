"""Ingest from start to end: scan, plan, hash, build on workers, commit, index."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

from maesil.errors import InterruptedRun, Refused
from maesil.ingest import stop
from maesil.ingest.earlier import EarlierRuns
from maesil.ingest.execute import Executor, executor, in_order
from maesil.ingest.failures import MAY_PASS, as_refusal
from maesil.ingest.isolated import source_hash
from maesil.ingest.ledger import Ledger
from maesil.ingest.options import IngestOptions
from maesil.ingest.plan import VolumePlan
from maesil.ingest.plan_tables import HASHED, OTHERS, PLANNED, SETTLED, STALE, TO_HASH, Item, PlanOnDisk
from maesil.ingest.planes import scratch_folder
from maesil.ingest.planning import nothing_found, planned_on_disk
from maesil.ingest.privacy import IdentityKey, load_or_create_key, require_map_place, write_id_map
from maesil.ingest.scan import require_no_store_among
from maesil.ingest.source_cache import SourceCache
from maesil.ingest.source_file import file_on_disk, stamp_of
from maesil.ingest.source_path import ObjectFile, SourcePlace
from maesil.ingest.summary import NothingFound, Summary
from maesil.ingest.tables import path_digest, private_tables, room_for_tables
from maesil.ingest.verdict import FileVerdict
from maesil.ingest.verdict_tables import Verdicts
from maesil.ingest.volume import BuildOrder, build
from maesil.progress import Report
from maesil.store.backends import open_storage
from maesil.store.index import index_is_current, write_index
from maesil.store.recipe import Recipe
from maesil.store.records import Refusal, Volume
from maesil.store.store import Store
from maesil.store.urls import StorePlace

__all__ = ["IngestOptions", "ingest"]


def ingest(
    sources: Sequence[SourcePlace],
    out: StorePlace,
    recipe: Recipe | None = None,
    options: IngestOptions | None = None,
    progress: Report = lambda stage, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Turn all CT at or below the sources into volumes of the store at ``out``.

    Volumes already there from the same source and recipe are left alone: an interrupted run goes on where it stopped.
    Stages of ``progress`` are ``list``, ``scan``, ``compare``, ``plan``, ``hash`` and ``build``; ``say`` is told of
    scans that are shared or gone on with. `NoInputError` if a source is missing; `NothingFound`, with the verdict on
    each file, if all hold no CT; `UsageError` if the store has another recipe or key.
    """
    recipe, options = recipe or Recipe(), options or IngestOptions()
    require_no_store_among(sources)
    if not options.dry_run:
        open_storage(out).require_writable("--out")
    if options.id_map is not None:
        require_map_place(options.id_map, out)
    with room_for_tables():
        plan, shared = planned_on_disk(sources, recipe, options, progress, say)
        if not plan.volumes and not plan.refused:
            shared.discard()
            raise NothingFound(nothing_found(sources, plan), _dry_summary(plan, sources, dry_run=options.dry_run))
        if options.dry_run:
            return _dry_summary(plan, sources, dry_run=True)
        key = load_or_create_key(options.key_file)
        store = Store.create(out, recipe, key.fingerprint, update=options.update)
        with (
            stop.on_sigterm(),
            executor(options.workers, scheduler=options.scheduler, task_bytes=plan.largest_task) as workers,
        ):
            summary = _Run(store, recipe, key, options, workers, progress, sources).carry_out(plan)
        shared.done()
        return summary


def _dry_summary(plan: PlanOnDisk, sources: Sequence[SourcePlace], *, dry_run: bool) -> Summary:
    """Return what a plan says before anything is made of it."""
    files = Verdicts(plan.verdicts)
    files.extend(FileVerdict(path, "used", "planned") for item in plan.volumes for path in item.source.paths)
    files.settle()
    return Summary(
        files=files,
        sources=tuple(sources),
        dry_run=dry_run,
        planned=[item.source.name for item in plan.volumes],
        refused_volumes=len(plan.refused),
        damaged_files=plan.damaged_files,
        planned_bytes=_bytes_of_objects(plan),
    )


def _bytes_of_objects(plan: PlanOnDisk) -> int:
    """Return the sizes (bytes) of the objects that planned volumes are fetched from, each once."""
    tables = private_tables()
    tables.execute("CREATE TABLE objects (digest INTEGER PRIMARY KEY, size INTEGER)")
    for item in plan.volumes:
        for path in item.source.paths:
            if isinstance(path, ObjectFile):
                there = file_on_disk(path)
                values = (path_digest(there), stamp_of(there)[0])
                tables.execute("INSERT OR IGNORE INTO objects VALUES (?, ?)", values)
    return int(tables.execute("SELECT coalesce(sum(size), 0) FROM objects").fetchone()[0])


class _Run:
    """One ingest into an open store; what becomes of each file is written into a ledger."""

    def __init__(
        self,
        store: Store,
        recipe: Recipe,
        key: IdentityKey,
        options: IngestOptions,
        workers: Executor,
        progress: Report,
        sources: Sequence[SourcePlace],
    ) -> None:
        self.store = store
        self.recipe = recipe
        self.key = key
        self.options = options
        self.workers = workers
        self.progress = progress
        self.ledger = Ledger(store, recipe, key, Summary(sources=tuple(sources), whole=options.mirror))
        self.earlier = EarlierRuns(store, recipe, options)
        self.memory = SourceCache(key, options.cache_folder)

    def carry_out(self, plan: PlanOnDisk) -> Summary:
        with closing(self.memory):
            return self._carry_out(plan)

    def _carry_out(self, plan: PlanOnDisk) -> Summary:
        self.ledger.open_with(plan)
        self._leave_to_other_parts(plan)
        self._hash(plan)
        self._leave_fresh_alone(plan)
        self._build(plan)
        if self.options.mirror and not stop.requested():  # else not all of them were looked at
            self.ledger.forget_absent()
        if index_is_current(self.store):
            self.store.keep_table()
        else:
            write_index(self.store)
        if stop.requested():
            raise InterruptedRun("ended on request: running volumes were finished; the same command goes on")
        self.ledger.close(plan)
        if self.options.id_map is not None:
            write_id_map(self.options.id_map, ((item.volume_id, item.plan) for item in plan.items() if item.volume_id))
        return self.ledger.summary

    def _leave_to_other_parts(self, plan: PlanOnDisk) -> None:
        """Leave alone what does not fall to this part of the work: by a hash, whatever else is there."""
        if self.options.partition is None:
            return
        number, count = self.options.partition
        for item in plan.items():
            named = item.plan.identity or item.plan.source.name
            if int(self.key.hash("partition", named), 16) % count != number % count:
                plan.note(item.n, OTHERS)
                self.ledger.leave_to_others(item.plan)

    def _hash(self, plan: PlanOnDisk) -> None:
        """Give every volume its identity; from memory where the files have not changed."""
        refused = {record.volume_id for record in self.store.quarantined()}
        for item in plan.items(PLANNED):
            # Asked before anything is read: what changes meanwhile must look changed to the next run.
            source = item.plan.source
            files = self.memory.files(source.paths, source.planes, source.prefer)
            known = None if self.options.rehash else self.memory.get(files) or None
            if known is None and self._is_new(item.plan, refused):
                known = ""
            plan.note(item.n, TO_HASH, files=files)
            if known is not None:
                self._identify(plan, item, known)
        total, folder = plan.count(TO_HASH), scratch_folder(self.store.path)
        todo = plan.items(TO_HASH)
        for done, (item, result) in enumerate(self._run(source_hash, todo, lambda item: (item.plan.source, folder)), 1):
            self.progress("hash", done, total)
            if isinstance(result, Exception):
                plan.note(item.n, SETTLED)
                self.ledger.refuse(item.plan, self.ledger.provisional_id(item.plan), as_refusal(result))
            else:
                self.memory.put(item.files, result)
                self._identify(plan, item, result)

    def _identify(self, plan: PlanOnDisk, item: Item, source_hash: str) -> None:
        volume_id = self.key.hash("volume", item.plan.identity or source_hash)
        plan.note(item.n, HASHED, volume_id=volume_id, source_hash=source_hash)

    def _run(
        self, task: Callable[..., Any], items: Iterable[Item], arguments: Callable[[Item], tuple[Any, ...]]
    ) -> Iterator[tuple[Item, Any]]:
        """Yield items with what a task makes of each; no more of them is held than what workers are busy with."""
        held: dict[int, Item] = {}

        def orders() -> Iterator[tuple[Any, ...]]:
            for number, item in enumerate(items):
                held[number] = item
                yield arguments(item)

        # Which of two copies is kept must not depend on which worker was faster.
        results = self.workers.run(task, orders())
        keep_first = task is build and self.options.duplicates == "keep-first"
        for number, result in in_order(results) if keep_first else results:
            yield held.pop(number), result

    def _is_new(self, plan: VolumePlan, refused: Collection[str]) -> bool:
        """Return whether a source will be built whatever its hash is, so that it need not be read twice."""
        if plan.identity is None or self.options.duplicates != "keep-all":
            return False
        volume_id = self.key.hash("volume", plan.identity)
        return volume_id not in refused and self.store.live(volume_id) is None

    def _leave_fresh_alone(self, plan: PlanOnDisk) -> None:
        """Mark what must be built; duplicates, fresh volumes and known refusals are dealt with here."""
        holders = {volume.source_hash: volume.volume_id for volume in self.store.volumes()}
        refusals = {record.volume_id: record for record in self.store.quarantined()}
        for item in plan.items(HASHED):
            if not plan.is_first(item):
                self.ledger.verdict(item.plan, "skipped", "duplicate_volume", item.volume_id)
            elif self._is_stale(item, refusals.get(item.volume_id), holders):
                plan.note(item.n, STALE)

    def _is_stale(self, item: Item, refusal: Refusal | None, holders: dict[str, str]) -> bool:
        """Return whether a volume must be built; else its verdict is given here."""
        keep_first = self.options.duplicates == "keep-first"
        live = self.store.live(item.volume_id)
        stale = False
        if self.earlier.made(live, item):
            assert live is not None
            self.ledger.summary.fresh.append(self._regrouped(live, item))
            self.ledger.release(item.plan, item.volume_id)
            self.ledger.verdict(item.plan, "used", "fresh", item.volume_id)
        elif keep_first and refusal and (holder := self.earlier.copied(refusal, item)):
            self.ledger.verdict(item.plan, "skipped", "duplicate_pixels", holder)
            return False
        elif refusal and self.earlier.refused(refusal, item):
            self.ledger.refused_before(item.plan, refusal)
        elif keep_first and holders.get(item.source_hash, item.volume_id) != item.volume_id:
            self.ledger.verdict(item.plan, "skipped", "duplicate_pixels", holders[item.source_hash])
            return False
        else:
            stale = True
        holders.setdefault(item.source_hash, item.volume_id)
        return stale

    def _build(self, plan: PlanOnDisk) -> None:
        total = plan.count(STALE)
        keep_first = self.options.duplicates == "keep-first"
        holders = {volume.pixels: volume.volume_id for volume in self.store.volumes()} if keep_first else {}
        orders = self._run(build, plan.items(STALE), lambda item: (item.plan.source, self._order(item)))
        for done, (item, result) in enumerate(orders, start=1):
            if isinstance(result, Exception):
                refusal = as_refusal(result)
                found = item.source_hash or self._hash_refused(item, refusal)
                self.ledger.refuse(item.plan, item.volume_id, refusal, found)
            elif keep_first and holders.setdefault(result.pixels, item.volume_id) != item.volume_id:
                self.ledger.leave_out(item.plan, item.volume_id, result, holders[result.pixels])
            else:
                self.memory.put(item.files, result.source_hash)
                self.ledger.summary.committed.append(self.store.commit(result, anew=self.options.force))
                self.ledger.release(item.plan, item.volume_id)
                self.ledger.verdict(item.plan, "used", "committed", item.volume_id)
            self.progress("build", done, total)

    def _hash_refused(self, item: Item, refusal: Refused) -> str:
        """Return the hash of a source that was refused while it was read, so that the next run leaves it alone."""
        if refusal.code in MAY_PASS:
            return ""
        with suppress(Refused, OSError):
            found = source_hash(item.plan.source, scratch_folder(self.store.path))
            self.memory.put(item.files, found)
            return found
        return ""

    def _group(self, item: Item) -> str:
        """Return what stands for the patient: whom the files name or ``--group`` finds in the path, else the study."""
        patient, study = item.plan.patient, item.plan.study
        if not patient and self.options.group:
            where = str(item.plan.source.place.absolute())
            if found := re.search(self.options.group, where):
                patient = "\0".join(filter(None, found.groups())) or found[0]
        if patient:
            return self.key.hash("patient", patient)
        return self.key.hash("study", study) if study else item.volume_id

    def _regrouped(self, live: Volume, item: Item) -> Volume:
        """Return a fresh volume under the group it now belongs to: voxels stay, the record alone is new."""
        group = self._group(item)
        return live if live.group == group else self.store.commit(replace(live, group=group), anew=True)

    def _order(self, item: Item) -> BuildOrder:
        return BuildOrder(
            store=self.store.path,
            recipe=self.recipe,
            volume_id=item.volume_id,
            group=self._group(item),
            source_hash=item.source_hash,
            source_path=self.key.hash("path", str(item.plan.source.place.absolute())),
            threads=self.workers.threads,
        )
