"""Ingest from start to end: scan, plan, hash, build on workers, commit, index."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from contextlib import closing, suppress
from dataclasses import replace

from maesil.errors import InterruptedRun, Refused
from maesil.ingest import stop
from maesil.ingest.earlier import EarlierRuns, Hashed
from maesil.ingest.execute import Executor, executor, in_order
from maesil.ingest.failures import MAY_PASS, as_refusal
from maesil.ingest.isolated import source_hash
from maesil.ingest.ledger import Ledger
from maesil.ingest.options import IngestOptions
from maesil.ingest.plan import Plan, VolumePlan
from maesil.ingest.planes import scratch_folder
from maesil.ingest.planning import nothing_found, scan_and_plan
from maesil.ingest.privacy import IdentityKey, load_or_create_key, require_map_place, write_id_map
from maesil.ingest.scan import require_no_store_among
from maesil.ingest.source_cache import SourceCache
from maesil.ingest.source_file import file_on_disk, stamp_of
from maesil.ingest.source_path import ObjectFile, SourcePath, SourcePlace
from maesil.ingest.summary import NothingFound, Summary
from maesil.ingest.verdict import FileVerdict, one_per_file
from maesil.ingest.volume import BuildOrder, build, task_bytes
from maesil.progress import Report
from maesil.store.backends import open_storage
from maesil.store.index import index_is_current, write_index
from maesil.store.recipe import Recipe
from maesil.store.records import Volume
from maesil.store.store import Store
from maesil.store.urls import StorePlace

__all__ = ["IngestOptions", "ingest"]


def ingest(
    sources: Sequence[SourcePlace],
    out: StorePlace,
    recipe: Recipe | None = None,
    options: IngestOptions | None = None,
    progress: Report = lambda stage, done, total: None,
) -> Summary:
    """Turn all CT at or below the sources into volumes of the store at ``out``.

    Volumes already there from the same source and recipe are left alone: an interrupted run goes on where it stopped.
    Stages of ``progress`` are ``scan``, ``compare``, ``hash`` and ``build``. `NoInputError` if a source is missing;
    `NothingFound`, with the verdict on each file, if all hold no CT; `UsageError` if the store has another recipe or
    key.
    """
    recipe, options = recipe or Recipe(), options or IngestOptions()
    require_no_store_among(sources)
    if not options.dry_run:
        open_storage(out).require_writable("--out")
    if options.id_map is not None:
        require_map_place(options.id_map, out)
    plan = scan_and_plan(sources, recipe, options, progress)
    if not plan.volumes and not plan.refused:
        raise NothingFound(nothing_found(sources, plan), _dry_summary(plan, sources, dry_run=options.dry_run))
    if options.dry_run:
        return _dry_summary(plan, sources, dry_run=True)
    key = load_or_create_key(options.key_file)
    store = Store.create(out, recipe, key.fingerprint, update=options.update)
    largest = max((task_bytes(item.source) for item in plan.volumes), default=0)
    with (
        stop.on_sigterm(),
        executor(options.workers, scheduler=options.scheduler, task_bytes=largest) as workers,
    ):
        return _Run(store, recipe, key, options, workers, progress, sources).carry_out(plan)


def _dry_summary(plan: Plan, sources: Sequence[SourcePlace], *, dry_run: bool) -> Summary:
    """Return what a plan says before anything is made of it."""
    used = [FileVerdict(path, "used", "planned") for item in plan.volumes for path in item.source.paths]
    names = [item.source.name for item in plan.volumes]
    return Summary(
        files=one_per_file(plan.verdicts + used),
        sources=tuple(sources),
        dry_run=dry_run,
        planned=names,
        refused_volumes=len(plan.refused),
        damaged_files=plan.damaged_files,
        planned_bytes=sum(_objects_of(plan).values()),
    )


def _objects_of(plan: Plan) -> dict[SourcePath, int]:
    """Return the objects that planned volumes are fetched from, and their sizes (bytes)."""
    paths = {file_on_disk(path) for item in plan.volumes for path in item.source.paths if isinstance(path, ObjectFile)}
    return {path: stamp_of(path)[0] for path in paths}


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

    def carry_out(self, plan: Plan) -> Summary:
        with closing(self.memory):
            return self._carry_out(plan)

    def _carry_out(self, plan: Plan) -> Summary:
        self.ledger.open_with(plan)
        hashed = self._hash(self._of_this_partition(plan.volumes))
        stale = self._leave_fresh_alone(hashed)
        self._build(stale)
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
            write_id_map(self.options.id_map, [(item.volume_id, item.plan) for item in hashed])
        return self.ledger.summary

    def _of_this_partition(self, plans: Sequence[VolumePlan]) -> list[VolumePlan]:
        """Return the volumes that fall to this part of the work: by a hash, whatever else is there."""
        if self.options.partition is None:
            return list(plans)
        number, count = self.options.partition
        mine = []
        for plan in plans:
            if int(self.key.hash("partition", plan.identity or plan.source.name), 16) % count == number % count:
                mine.append(plan)
            else:
                self.ledger.verdict(plan, "skipped", "other_partition", None)
        return mine

    def _hash(self, plans: Sequence[VolumePlan]) -> list[Hashed]:
        """Give every plan its identity; from memory where the files have not changed."""
        # Asked before anything is read: what changes meanwhile must look changed to the next run.
        files = [self.memory.files(plan.source.paths, plan.source.planes, plan.source.prefer) for plan in plans]
        known = {} if self.options.rehash else {n: h for n, key in enumerate(files) if (h := self.memory.get(key))}
        refused = {record.volume_id for record in self.store.quarantined()}
        known |= {n: "" for n, plan in enumerate(plans) if n not in known and self._is_new(plan, refused)}
        todo = [n for n in range(len(plans)) if n not in known]
        items = [(plans[n].source, scratch_folder(self.store.path)) for n in todo]
        for done, (number, result) in enumerate(self.workers.run(source_hash, items), start=1):
            self.progress("hash", done, len(todo))
            plan = plans[todo[number]]
            if isinstance(result, Exception):
                self.ledger.refuse(plan, self.ledger.provisional_id(plan), as_refusal(result))
            else:
                known[todo[number]] = result
                self.memory.put(files[todo[number]], result)
        return [
            Hashed(plans[n], self.key.hash("volume", plans[n].identity or known[n]), known[n], files[n])
            for n in sorted(known)
        ]

    def _is_new(self, plan: VolumePlan, refused: Collection[str]) -> bool:
        """Return whether a source will be built whatever its hash is, so that it need not be read twice."""
        if plan.identity is None or self.options.duplicates != "keep-all":
            return False
        volume_id = self.key.hash("volume", plan.identity)
        return volume_id not in refused and self.store.live(volume_id) is None

    def _leave_fresh_alone(self, hashed: Sequence[Hashed]) -> list[Hashed]:
        """Return what must be built; duplicates, fresh volumes and known refusals are dealt with here."""
        stale: list[Hashed] = []
        seen: set[str] = set()
        keep_first = self.options.duplicates == "keep-first"
        holders = {volume.source_hash: volume.volume_id for volume in self.store.volumes()}
        refusals = {record.volume_id: record for record in self.store.quarantined()}
        for item in hashed:
            if item.volume_id in seen:
                self.ledger.verdict(item.plan, "skipped", "duplicate_volume", item.volume_id)
                continue
            seen.add(item.volume_id)
            live = self.store.live(item.volume_id)
            refusal = refusals.get(item.volume_id)
            if self.earlier.made(live, item):
                assert live is not None
                self.ledger.summary.fresh.append(self._regrouped(live, item))
                self.ledger.release(item.plan, item.volume_id)
                self.ledger.verdict(item.plan, "used", "fresh", item.volume_id)
            elif keep_first and refusal and (holder := self.earlier.copied(refusal, item)):
                self.ledger.verdict(item.plan, "skipped", "duplicate_pixels", holder)
                continue
            elif refusal and self.earlier.refused(refusal, item):
                self.ledger.refused_before(item.plan, refusal)
            elif keep_first and holders.get(item.source_hash, item.volume_id) != item.volume_id:
                self.ledger.verdict(item.plan, "skipped", "duplicate_pixels", holders[item.source_hash])
                continue
            else:
                stale.append(item)
            holders.setdefault(item.source_hash, item.volume_id)
        return stale

    def _build(self, stale: Sequence[Hashed]) -> None:
        orders = [(item.plan.source, self._order(item)) for item in stale]
        keep_first = self.options.duplicates == "keep-first"
        holders = {volume.pixels: volume.volume_id for volume in self.store.volumes()} if keep_first else {}
        results = self.workers.run(build, orders)
        # Which of two copies is kept must not depend on which worker was faster.
        for done, (number, result) in enumerate(in_order(results) if keep_first else results, start=1):
            item = stale[number]
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
            self.progress("build", done, len(stale))

    def _hash_refused(self, item: Hashed, refusal: Refused) -> str:
        """Return the hash of a source that was refused while it was read, so that the next run leaves it alone."""
        if refusal.code in MAY_PASS:
            return ""
        with suppress(Refused, OSError):
            found = source_hash(item.plan.source, scratch_folder(self.store.path))
            self.memory.put(item.files, found)
            return found
        return ""

    def _group(self, item: Hashed) -> str:
        """Return what stands for the patient: whom the files name or ``--group`` finds in the path, else the study."""
        patient, study = item.plan.patient, item.plan.study
        if not patient and self.options.group:
            where = str(item.plan.source.place.absolute())
            if found := re.search(self.options.group, where):
                patient = "\0".join(filter(None, found.groups())) or found[0]
        if patient:
            return self.key.hash("patient", patient)
        return self.key.hash("study", study) if study else item.volume_id

    def _regrouped(self, live: Volume, item: Hashed) -> Volume:
        """Return a fresh volume under the group it now belongs to: voxels stay, the record alone is new."""
        group = self._group(item)
        return live if live.group == group else self.store.commit(replace(live, group=group), anew=True)

    def _order(self, item: Hashed) -> BuildOrder:
        return BuildOrder(
            store=self.store.path,
            recipe=self.recipe,
            volume_id=item.volume_id,
            group=self._group(item),
            source_hash=item.source_hash,
            source_path=self.key.hash("path", str(item.plan.source.place.absolute())),
            threads=self.workers.threads,
        )
