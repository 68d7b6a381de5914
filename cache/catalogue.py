"""The catalogue of stores that `maesil ingest` made without ``--out``: found by key or name, pinned by runs, pruned.

    $MAESIL_CACHE/stores/<key>/entry.json     name, sources, recipe; what the finished store was made from
                               store.zarr/    the store
                               report/        what ingest reports, paths among it
                               pins/          one file a run that uses it
                  locks/<key>                 held by the one process that builds it

Paths of sources stand here, outside every store, in a folder of the user's own (mode 0700).
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from maesil.cache.key import cache_folder
from maesil.documents import read_json, write_json
from maesil.errors import DamagedError, StoreError, UsageError
from maesil.files import require_folder_place
from maesil.locks import holder_of, locked, locked_now
from maesil.store.recipe import Recipe
from maesil.store.store import Store
from maesil.store.urls import ObjectUrl, StorePlace, place_of
from maesil.text import candidates, without_credentials

RUN_STORES = "stores.json"
"""What a run notes of its stores, in its own folder: the other end of a pin."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,79}")


@dataclass(frozen=True)
class Built:
    """What a finished store was made from and came to."""

    listing: str
    """Of the files of the sources (`maesil.cache.key.listing`); empty where the next ingest must look again."""
    commits: str
    """Of the names of the live commits."""
    volumes: int
    superpatches: int
    patients: int
    refused: int
    fingerprint: str


@dataclass(frozen=True)
class Pin:
    """A note that a run uses a store as it was."""

    run: str
    fingerprint: str
    """Of the store when the run began."""
    since: str


@dataclass(frozen=True)
class Entry:
    """One store of the catalogue."""

    folder: Path
    name: str
    sources: tuple[str, ...]
    recipe: dict[str, Any]
    created: str
    built: Built | None = None
    """None while it is being built, and after that was cut off."""

    @property
    def key(self) -> str:
        """What the store is known by (`maesil.cache.key.store_key`)."""
        return self.folder.name

    @property
    def store(self) -> Path:
        """The store itself."""
        return self.folder / "store.zarr"

    @property
    def report(self) -> Path:
        """The report of the last ingest into it."""
        return self.folder / "report"

    @property
    def used(self) -> float:
        """When it was last asked for (seconds since the epoch)."""
        marker = self.folder / "used"
        return (marker if marker.exists() else self.folder / "entry.json").stat().st_mtime

    @property
    def bytes(self) -> int:
        """What it takes on disk."""
        return sum(path.lstat().st_size for path in self.folder.rglob("*") if not path.is_dir())

    def touch(self) -> None:
        """Note that it is in use: what was not for the longest time is pruned first."""
        (self.folder / "used").touch()

    def pin(self, run: Path, fingerprint: str) -> None:
        """Note that a run uses this store as it is now."""
        run = run.resolve()
        pin = Pin(str(run), fingerprint, _now())
        name = hashlib.sha256(str(run).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        write_json(self.folder / "pins" / f"{name}.json", asdict(pin))

    def pins(self) -> list[Pin]:
        """Return the pins whose runs are still there and still name this store; those of others are taken off."""
        live = []
        for path in sorted((self.folder / "pins").glob("*.json")):
            pin = _read_pin(path)
            if pin is not None and _uses(Path(pin.run), self.store.resolve()):
                live.append(pin)
            else:
                path.unlink(missing_ok=True)
        return live


class Catalogue:
    """All stores below one folder; safe for several processes."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or cache_folder()
        require_folder_place(self.root)

    def entries(self) -> list[Entry]:
        """Return all stores, by name."""
        found = (self._entry(path.parent) for path in self.root.glob("stores/*/entry.json"))
        return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.name)

    def unreadable(self) -> list[Path]:
        """Return the folders of stores whose entry is damaged, missing or of another version: nothing names them."""
        return sorted(folder for folder in self.root.glob("stores/*/") if self._entry(folder) is None)

    def get(self, key: str) -> Entry | None:
        """Return the store of a key, or None."""
        return self._entry(self.root / "stores" / key)

    def named(self, name: str) -> Entry:
        """Return the store of a name; UsageError if there is none."""
        entries = self.entries()
        for entry in entries:
            if entry.name == name:
                return entry
        if not entries:
            found = f"but the cache {self.root} is empty"
            raise UsageError(f"{without_credentials(name)}: expected the name of a store in the cache, {found}")
        known = [entry.name for entry in entries]
        near = get_close_matches(name, known, n=1)
        told = f"did you mean {near[0]}?" if near else f"the cache holds {candidates(known)}"
        raise UsageError(
            f"{without_credentials(name)}: expected the name of a store in the cache, found no such name; {told}"
        )

    def building(self, key: str, on_wait: Callable[[str], None]) -> AbstractContextManager[None]:
        """Be the one process that builds the store of a key; where another one is, say so and wait for it."""
        self._make_root()
        return locked(self._lock(key), on_wait)

    def builder(self, entry: Entry) -> str | None:
        """Return which process builds a store now, None if none does."""
        return holder_of(self._lock(entry.key))

    def begin(self, key: str, name: str | None, sources: Sequence[StorePlace], recipe: Recipe) -> Entry:
        """Return the entry of a store to build, under ``name`` or one derived; UsageError if the name is taken."""
        self._make_root()
        with locked(self._lock("names")):
            entry = self.get(key)
            if entry is None:
                folder = self.root / "stores" / key
                places = tuple(str(source.resolve()) for source in sources)
                chosen = self._free_name(name, key) if name else self._derived_name(sources, recipe, key)
                entry = Entry(folder, chosen, places, recipe.document(), _now())
            elif name and name != entry.name:
                entry = replace(entry, name=self._free_name(name, key))
            return self.save(entry)

    def save(self, entry: Entry) -> Entry:
        """Write an entry down; by whoever builds its store alone."""
        document = {name: value for name, value in asdict(entry).items() if name != "folder"}
        write_json(entry.folder / "entry.json", document)
        return entry

    def remove(self, entry: Entry, *, force: bool = False, dry_run: bool = False) -> int:
        """Remove a store, and return how many bytes that frees; UsageError while a run or a builder uses it.

        ``force`` removes it in spite of its pins; ``dry_run`` asks whether it could be and removes nothing.
        """
        with locked_now(self._lock(entry.key), entry.name):
            pins = entry.pins()
            if pins and not force:
                raise UsageError(f"{entry.name}: {pinned_by(pins)}; remove what is no longer needed, or --force")
            freed = entry.bytes
            if not dry_run:
                self.discard(entry)
        return freed

    def discard(self, entry: Entry) -> None:
        """Remove an entry by whoever holds its lock; a kill meanwhile leaves no half store behind."""
        doomed = self.root / "removed" / uuid.uuid4().hex
        doomed.parent.mkdir(exist_ok=True)
        entry.folder.rename(doomed)
        shutil.rmtree(doomed.parent, ignore_errors=True)  # with what an earlier kill left there

    def prune(self, max_bytes: int, *, force: bool = False, dry_run: bool = False) -> Iterator[tuple[Entry, int, str]]:
        """Remove stores, those not used for the longest time first, until what is left takes ``max_bytes`` at most.

        Yields each store with what it takes and why it stays (empty: it was removed), as far as pruning had to go; with
        ``dry_run`` nothing is removed, and what is yielded would be.
        """
        sizes = [(entry, entry.bytes) for entry in sorted(self.entries(), key=lambda entry: entry.used)]
        total = sum(size for _, size in sizes)
        for entry, size in sizes:
            if total <= max_bytes:
                return
            try:
                self.remove(entry, force=force, dry_run=dry_run)
                total -= size
                yield entry, size, ""
            except UsageError as refusal:
                yield entry, size, str(refusal).removeprefix(f"{entry.name}: ").removeprefix(f"{entry.name} ")

    def _make_root(self) -> None:
        """Make the folder, readable by its owner alone: paths of sources stand in it."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _lock(self, key: str) -> Path:
        return self.root / "locks" / key

    def _entry(self, folder: Path) -> Entry | None:
        document = _read_json(folder / "entry.json")
        if document is None:
            return None
        try:
            built = Built(**document["built"]) if document["built"] else None
            return Entry(folder, **{**document, "sources": tuple(document["sources"]), "built": built})
        except (KeyError, TypeError):
            return None  # of another version: its store is made anew

    def _free_name(self, name: str, key: str) -> str:
        if not _NAME.fullmatch(name):
            raise UsageError(f"--name: expected letters, digits and . _ + -, found {name!r}")
        for entry in self.entries():
            if entry.name == name and entry.key != key:
                raise UsageError(
                    f"--name: {name} is the store of {', '.join(entry.sources)}; choose another, "
                    f"or `maesil cache rm {name}`"
                )
        return name

    def _derived_name(self, sources: Sequence[StorePlace], recipe: Recipe, key: str) -> str:
        """Return a name from the first source and the spacing; with the beginning of the key where that is taken."""
        stem = sources[0].resolve().name.removesuffix(".gz").removesuffix(".nii").removesuffix(".zip")
        stem = re.sub(r"[^A-Za-z0-9._+-]+", "-", stem).lstrip("._+-") or "store"
        spacing = "native" if recipe.spacing is None else "x".join(f"{mm:g}" for mm in dict.fromkeys(recipe.spacing))
        name = f"{stem[:40]}{f'+{len(sources) - 1}' if len(sources) > 1 else ''}-{spacing}"
        name += "mm" if recipe.spacing else ""
        return f"{name}-{key[:6]}" if any(entry.name == name for entry in self.entries()) else name


def find_store(text: str, catalogue: Catalogue | None = None) -> StorePlace:
    """Return where a store lies that is given by path, URL or name in the catalogue; a path to a store wins.

    StoreError for what is neither, and for a store of the catalogue that is not finished.
    """
    path = place_of(text)
    if isinstance(path, ObjectUrl) or "/" in text or (path / "zarr.json").exists():
        return path
    catalogue = catalogue or Catalogue()
    try:
        entry = catalogue.named(text)
    except UsageError:
        if path.exists():
            return path
        raise StoreError(
            f"{text}: expected a store made by `maesil ingest` or the name of one in `maesil cache list`, found neither"
        ) from None
    if entry.built is None:
        builder = catalogue.builder(entry)
        state = f"is being built by {builder}" if builder else "is unfinished; run its `maesil ingest` again"
        raise StoreError(f"{text}: the store {state}")
    entry.touch()
    return entry.store


def find_stores(texts: Sequence[str], catalogue: Catalogue | None = None) -> tuple[list[StorePlace], tuple[float, ...]]:
    """Return the stores of ``STORE`` or ``STORE=WEIGHT`` texts, and their weights if they have any.

    UsageError unless all of them have a weight above 0, or none.
    """
    stores, weights = [], []
    for text in texts:
        name, equals, number = text.rpartition("=")
        weighted = equals and re.fullmatch(r"[0-9.eE+-]+", number) and not _is_folder_of_store(text)
        stores.append(find_store(name if weighted else text, catalogue))
        weights += [_weight(text, number)] if weighted else []
    if weights and len(weights) != len(stores):
        raise UsageError(f"{' '.join(texts)}: expected a weight for every store or for none, as A=0.7 B=0.3")
    if len({store.resolve() for store in stores}) < len(stores):
        raise UsageError(f"{' '.join(texts)}: expected each store once")
    return stores, tuple(weights)


def _is_folder_of_store(text: str) -> bool:
    place = place_of(text)
    return isinstance(place, Path) and (place / "zarr.json").exists()


def _weight(text: str, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UsageError(f"{text}: expected a weight above 0 behind the =, found {number!r}")
    return weight


def entry_of(store: StorePlace) -> Entry | None:
    """Return the entry that a store belongs to, None for a store outside the catalogue."""
    if isinstance(store, ObjectUrl):
        return None
    folder = store.resolve().parent
    if store.name != "store.zarr" or folder.parent.name != "stores":
        return None
    return Catalogue(folder.parent.parent).get(folder.name)


def state_of_commits(store: Store) -> str:
    """Return SHA-256 over the names of the live commits: another one as soon as a volume comes, goes or is remade."""
    return hashlib.sha256("\n".join(store.live_commits()).encode()).hexdigest()


def pinned_by(pins: Sequence[Pin]) -> str:
    """Return in words which runs hold a store."""
    return f"used by {', '.join(pin.run for pin in pins)}"


def _read_pin(path: Path) -> Pin | None:
    """Return a pin; None for a file that is none."""
    try:
        return Pin(**(_read_json(path) or {}))
    except TypeError:
        return None


def _uses(run: Path, store: Path) -> bool:
    """Return whether a run folder is there and names a store as its own."""
    document = _read_json(run / RUN_STORES)
    stores = document.get("stores") if document else None
    return isinstance(stores, list) and any(isinstance(s, dict) and s.get("path") == str(store) for s in stores)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except (OSError, DamagedError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
