"""Ingest from start to end: scan, plan, hash, build on workers, commit, index."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maesil.errors import MaesilError, NoInputError, Refused, ResourceError
from maesil.index import index_is_current, write_index
from maesil.ingest.execute import Executor, executor
from maesil.ingest.isolated import source_hash
from maesil.ingest.plan import Plan, VolumePlan, make_plan
from maesil.ingest.privacy import IdentityKey, load_or_create_key, without_paths
from maesil.ingest.report import Summary
from maesil.ingest.scan import scan
from maesil.ingest.source_cache import SourceCache
from maesil.ingest.verdict import FileVerdict, one_per_file
from maesil.ingest.volume import BuildOrder, build
from maesil.recipe import Recipe
from maesil.store import Store

Progress = Callable[[str, int, int | None], None]
"""Called with (stage, done, total or None); stages are ``scan``, ``hash`` and ``build``."""

_MAY_PASS = ("out_of_memory", "worker_lost", "unexpected", "vanished", "unreadable")
"""Refusals that need not be the source's fault: tried again by every run."""
_NO_SPACE = (28, 122)  # ENOSPC, EDQUOT


@dataclass(frozen=True)
class IngestOptions:
    """How to run; nothing here changes a voxel (see `Recipe` for what does)."""

    workers: int | None = None
    """Dask worker processes; None is one a core, 0 runs in this process."""
    dry_run: bool = False
    update: bool = False
    """Allow a recipe other than the store's: its volumes are made anew."""
    rehash: bool = False
    """Read every source again instead of trusting size and modification time."""
    key_file: Path | None = None
    cache_folder: Path | None = None
    """Where source hashes are remembered; None is the user's cache folder."""


@dataclass(frozen=True)
class _Hashed:
    """A plan whose identity is known."""

    plan: VolumePlan
    volume_id: str
    source_hash: str


def ingest(
    sources: Sequence[Path],
    out: Path,
    recipe: Recipe | None = None,
    options: IngestOptions | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Summary:
    """Turn all CT at or below the sources into volumes of the store at ``out``.

    Volumes already there from the same source and recipe are left alone: an interrupted run goes on where it stopped.
    `NoInputError` if a source is missing or holds no CT; `UsageError` if the store has another recipe or key.
    """
    recipe, options = recipe or Recipe(), options or IngestOptions()
    plan = _scan_and_plan(sources, progress)
    if not plan.volumes and not plan.refused:
        raise NoInputError(_nothing_found(sources, plan))
    if options.dry_run:
        return _dry_summary(plan)
    key = load_or_create_key(options.key_file)
    store = Store.create(out, recipe, key.fingerprint, update=options.update)
    with executor(options.workers) as workers:
        run = _Run(store, recipe, key, options, workers, progress)
        return run.carry_out(plan)


def _scan_and_plan(sources: Sequence[Path], progress: Progress) -> Plan:
    looked_at = 0

    def on_file(path: Path) -> None:
        nonlocal looked_at
        looked_at += 1
        progress("scan", looked_at, None)

    return make_plan(scan(sources, on_file))


def _dry_summary(plan: Plan) -> Summary:
    used = [FileVerdict(path, "used", "planned") for item in plan.volumes for path in item.source.paths]
    names = [item.source.name for item in plan.volumes]
    return Summary(
        files=one_per_file(plan.verdicts + used), dry_run=True, planned=names, refused_volumes=len(plan.refused)
    )


def _nothing_found(sources: Sequence[Path], plan: Plan) -> str:
    where = ", ".join(str(source) for source in sources)
    codes = sorted({verdict.code for verdict in plan.verdicts})
    found = f"{len(plan.verdicts)} files ({', '.join(codes)})" if codes else "no file at all"
    return f"{where}: expected DICOM or NIfTI files with CT, found {found}; name the folder that holds the scans"


class _Run:
    """One ingest into an open store; collects the summary as it goes."""

    def __init__(
        self,
        store: Store,
        recipe: Recipe,
        key: IdentityKey,
        options: IngestOptions,
        workers: Executor,
        progress: Progress,
    ) -> None:
        self.store = store
        self.recipe = recipe
        self.key = key
        self.options = options
        self.workers = workers
        self.progress = progress
        self.summary = Summary()

    def carry_out(self, plan: Plan) -> Summary:
        self.summary.files.extend(plan.verdicts)
        for series in plan.refused:
            self._quarantine(self.key.hash("volume", series.identity), series.refusal, (), {"files": series.files})
        stale = self._leave_fresh_alone(self._hash(plan.volumes))
        self._build(stale)
        if not index_is_current(self.store):
            write_index(self.store)
        self.summary.files = one_per_file(self.summary.files)
        self._require_all_accounted_for(plan)
        known = {volume.volume_id for volume in self.summary.volumes}
        self.summary.absent = sum(volume.volume_id not in known for volume in self.store.volumes())
        return self.summary

    def _require_all_accounted_for(self, plan: Plan) -> None:
        """Every file found must have met exactly one verdict: a lost volume must never pass for a finished run."""
        expected = sorted({*(v.path for v in plan.verdicts), *(p for item in plan.volumes for p in item.source.paths)})
        if sorted(verdict.path for verdict in self.summary.files) != expected:
            raise MaesilError(
                f"expected a verdict on each of {len(expected)} files, found {len(self.summary.files)}; "
                "run the same command again, and report this"
            )

    def _hash(self, plans: Sequence[VolumePlan]) -> list[_Hashed]:
        """Give every plan its identity; from memory where the files have not changed."""
        cache = SourceCache(self.key, self.options.cache_folder)
        try:
            # Asked before anything is read: what changes meanwhile must look changed to the next run.
            files = [cache.files(plan.source.paths, plan.source.planes, plan.source.prefer) for plan in plans]
            known = {} if self.options.rehash else {n: h for n, key in enumerate(files) if (h := cache.get(key))}
            todo = [n for n in range(len(plans)) if n not in known]
            items = [(plans[n].source,) for n in todo]
            for done, (number, result) in enumerate(self.workers.run(source_hash, items), start=1):
                self.progress("hash", done, len(todo))
                plan = plans[todo[number]]
                if isinstance(result, Exception):
                    self._refuse(plan, self._provisional_id(plan), _as_refusal(result))
                else:
                    known[todo[number]] = result
                    cache.put(files[todo[number]], result)
        finally:
            cache.close()
        return [
            _Hashed(plans[n], self.key.hash("volume", plans[n].identity or known[n]), known[n]) for n in sorted(known)
        ]

    def _leave_fresh_alone(self, hashed: Sequence[_Hashed]) -> list[_Hashed]:
        """Return what must be built; duplicates, fresh volumes and known refusals are dealt with here."""
        stale: list[_Hashed] = []
        seen: set[str] = set()
        refusals = {record["volume_id"]: record for record in self.store.quarantined()}
        for item in hashed:
            if item.volume_id in seen:
                self._verdict(item.plan, "skipped", "duplicate_volume", item.volume_id)
                continue
            seen.add(item.volume_id)
            live = self.store.live(item.volume_id)
            refusal = refusals.get(item.volume_id, {})
            if live and (live.source_hash, live.recipe_hash) == (item.source_hash, self.recipe.hash):
                self.summary.fresh.append(live)
                self._release(item)
                self._verdict(item.plan, "used", "fresh", item.volume_id)
            elif self._refused_before(refusal, item):
                self.summary.refused_volumes += 1
                self._verdict(item.plan, "quarantined", refusal["code"], item.volume_id, refusal["detail"])
            else:
                stale.append(item)
        return stale

    def _refused_before(self, refusal: dict[str, Any], item: _Hashed) -> bool:
        same = (refusal.get("source_hash"), refusal.get("recipe_hash")) == (item.source_hash, self.recipe.hash)
        return same and refusal["code"] not in _MAY_PASS

    def _build(self, stale: Sequence[_Hashed]) -> None:
        orders = [(item.plan.source, self._order(item)) for item in stale]
        for done, (number, result) in enumerate(self.workers.run(build, orders), start=1):
            item = stale[number]
            if isinstance(result, Exception):
                self._refuse(item.plan, item.volume_id, _as_refusal(result), item.source_hash)
            else:
                self.summary.committed.append(self.store.commit(result))
                self._release(item)
                self._verdict(item.plan, "used", "committed", item.volume_id)
            self.progress("build", done, len(stale))

    def _release(self, item: _Hashed) -> None:
        """Drop the records of earlier refusals of what is a volume now."""
        self.store.release(item.volume_id)
        if item.plan.identity is None:
            self.store.release(self._provisional_id(item.plan))

    def _provisional_id(self, plan: VolumePlan) -> str:
        """Return the id under which a source is refused whose content, its identity, could not be read."""
        return self.key.hash("volume", plan.identity or plan.source.name)

    def _order(self, item: _Hashed) -> BuildOrder:
        patient = item.plan.patient
        return BuildOrder(
            store=self.store.path,
            recipe=self.recipe,
            volume_id=item.volume_id,
            group=self.key.hash("patient", patient) if patient else item.volume_id,
            source_hash=item.source_hash,
            source_path=self.key.hash("path", str(Path(item.plan.source.name).absolute())),
            threads=self.workers.threads,
        )

    def _refuse(self, plan: VolumePlan, volume_id: str, refusal: Refused, source_hash: str = "") -> None:
        more = {"files": len(plan.source.paths), "source_hash": source_hash}
        self._quarantine(volume_id, refusal, plan.source.paths, more)
        self._verdict(plan, "quarantined", refusal.code, volume_id, refusal.detail)

    def _quarantine(self, volume_id: str, refusal: Refused, paths: Sequence[Path], more: dict[str, Any]) -> None:
        self.summary.refused_volumes += 1
        detail, numbers = without_paths(refusal.detail, paths), _json_ready(refusal.numbers)
        document = {"volume_id": volume_id, "code": refusal.code, "detail": detail, "numbers": numbers}
        self.store.quarantine(volume_id, document | {"recipe_hash": self.recipe.hash} | more)

    def _verdict(self, plan: VolumePlan, status: str, code: str, volume_id: str, detail: str = "") -> None:
        self.summary.files.extend(FileVerdict(path, status, code, volume_id, detail) for path in plan.source.paths)


def _json_ready(numbers: dict[str, Any]) -> dict[str, Any]:
    """Return numbers as JSON knows them: neither numpy's nor infinite ones."""
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in numbers.items()}
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in plain.items()
    }


def _as_refusal(error: Exception) -> Refused:
    """Return the refusal that a failed task amounts to; errors that concern the whole run are raised again."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        raise ResourceError("the disk is full; free space and run the same command again") from error
    if isinstance(error, MaesilError):
        raise error
    if isinstance(error, MemoryError):
        return Refused("out_of_memory", "the volume does not fit in this worker's memory; use fewer workers")
    if type(error).__name__ == "NoWorkerError":
        raise ResourceError(
            "all workers died and none came back; run the same command again, with fewer --workers"
        ) from error
    if type(error).__name__ == "KilledWorker":
        return Refused("worker_lost", "the worker died while it read this volume (memory, or a decoder crashed)")
    return Refused("unexpected", f"{type(error).__name__}: {error}")
