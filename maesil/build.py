"""Ingest without a place of one's own for the store: found in the catalogue, or built there by one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from maesil.cache.catalogue import Built, Catalogue, Entry, pinned_by, state_of_commits
from maesil.cache.key import listing, store_key
from maesil.errors import NoInputError, StoreError, UsageError
from maesil.files import require_writable
from maesil.ingest.failures import MAY_PASS
from maesil.ingest.options import IngestOptions
from maesil.ingest.privacy import load_or_create_key
from maesil.ingest.report import write_report
from maesil.ingest.report_folder import FILES, read_noted
from maesil.ingest.run import ingest
from maesil.ingest.scan import find_files
from maesil.ingest.source_file import known_stamp
from maesil.ingest.summary import Summary
from maesil.ingest.verdict_tables import Verdicts
from maesil.progress import Report
from maesil.store.index import index_is_current, patients
from maesil.store.recipe import Recipe
from maesil.store.store import Store
from maesil.store.urls import StorePlace, lies_in, place_of


@dataclass(frozen=True)
class Cached:
    """Where the store of an ingest is, and what the ingest did."""

    entry: Entry
    summary: Summary
    found: bool
    """It was there, finished, and its sources have not changed: none of them was read."""


def ingest_into_cache(
    sources: Sequence[StorePlace],
    recipe: Recipe,
    options: IngestOptions,
    *,
    name: str | None = None,
    catalogue: Catalogue | None = None,
    progress: Report = lambda stage, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Cached:
    """Find the store of these sources and this recipe in the catalogue, or build it; two processes build it once.

    ``say`` is told of waiting for another process and of runs whose store changes. Raises what `ingest` raises, and
    UsageError for a name that is taken and for options that make no sense here.
    """
    if options.partition or options.update:
        option = "--partition" if options.partition else "--update"
        raise UsageError(f"{option}: a store of the cache is all of its sources by one recipe; name a store with --out")
    catalogue = catalogue or Catalogue()
    require_writable(catalogue.root, "MAESIL_CACHE", links=True)
    if any(lies_in(catalogue.root, source) for source in sources):
        raise UsageError(f"{catalogue.root}: the cache lies within the sources; set MAESIL_CACHE to a folder elsewhere")
    identity = load_or_create_key(options.key_file)
    choices = (options.duplicates, "follow-links" if options.follow_links else "")
    key = store_key(sources, recipe.hash, identity.fingerprint, *choices)
    with catalogue.building(key, lambda holder: say(f"the store is being built by {holder}; waiting for it")):
        files = find_files(sources, follow_links=options.follow_links)
        now = listing(((str(file.absolute()), known_stamp(file)) for file in files), (options.group,))
        entry = catalogue.begin(key, name, sources, recipe)
        entry.touch()
        look = options.force or options.rehash or options.retry_quarantined or options.id_map
        if not look and (found := _unchanged(entry, now)):
            return Cached(entry, found, found=True)
        return Cached(*_build(catalogue, entry, sources, recipe, options, now, progress, say), found=False)


def _build(
    catalogue: Catalogue,
    entry: Entry,
    sources: Sequence[StorePlace],
    recipe: Recipe,
    options: IngestOptions,
    now: str,
    progress: Report,
    say: Callable[[str], None],
) -> tuple[Entry, Summary]:
    before = entry.built
    catalogue.save(replace(entry, built=None))  # until it is whole again, nobody is to train on it
    try:
        summary = ingest(sources, entry.store, recipe, replace(options, mirror=True), progress, say)
    except NoInputError:
        if before is None:
            catalogue.discard(entry)
        raise
    store = Store.open(entry.store)
    write_report(entry.report, summary, entry.store)
    entry = catalogue.save(replace(entry, built=_outcome(store, summary, now)))
    assert entry.built is not None
    if before and before.fingerprint != entry.built.fingerprint and (pins := entry.pins()):
        say(f"the store changed, and was {pinned_by(pins)}: what was trained on it as it was cannot be resumed")
    return entry, summary


def _outcome(store: Store, summary: Summary, now: str) -> Built:
    volumes = store.volumes()
    may_pass = any(verdict.status == "quarantined" and verdict.code in MAY_PASS for verdict in summary.files)
    return Built(
        listing="" if may_pass else now,
        commits=state_of_commits(store),
        volumes=len(volumes),
        superpatches=sum(volume.count for volume in volumes),
        patients=len(set(patients([store]).values())),
        refused=summary.refused_volumes,
        fingerprint=store.fingerprint,
    )


def _unchanged(entry: Entry, now: str) -> Summary | None:
    """Return what an ingest would say that finds nothing to do; None where it has to look."""
    if entry.built is None or entry.built.listing != now:
        return None
    try:
        store = Store.open(entry.store)
        if state_of_commits(store) != entry.built.commits or not index_is_current(store):
            return None
        known = [noted.verdict for noted in read_noted(entry.report / FILES)]
    except (StoreError, OSError, ValueError, KeyError):
        return None
    return Summary(
        files=Verdicts(replace(one, code="fresh") if one.status == "used" else one for one in known),
        fresh=store.volumes(),
        sources=tuple(map(place_of, entry.sources)),
        whole=True,
        refused_volumes=entry.built.refused,
        damaged_files=sum(verdict.status == "quarantined" and not verdict.volume_ids for verdict in known),
    )
