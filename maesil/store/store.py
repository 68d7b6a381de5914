"""A superpatch store: opening, creating, and the commits that say what is in it.

Format: ``docs/reference/store-format.md``. This module knows records; pixels are written by `maesil.store.writer` and
read by `maesil.store.reader`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from maesil.documents import CHECKSUM, canonical_json, parsed_json, reason, sealed, unsealed
from maesil.errors import StoreError, UsageError
from maesil.store.backends import open_storage
from maesil.store.commit import commit_key, live_keys, quarantine_key
from maesil.store.recipe import Recipe
from maesil.store.records import Refusal, Volume
from maesil.store.storage import Stamp, Storage
from maesil.store.table import StaleTableError, VolumeTable
from maesil.store.urls import StorePlace
from maesil.text import candidates

FORMAT_NAME = "maesil-superpatch-store"
FORMAT_VERSION = 2
"""What is written. All versions from 1 on are read."""
TABLE_VERSION = 3
"""What a store becomes once it has a table of its volumes, which every writer must keep (`maesil.store.table`)."""
TABLE_FROM = 256
"""Volumes from which on a store has a table; the commits of fewer are read one by one."""
_SETTLE_EVERY = 64
ZARR_DOCUMENT = "zarr.json"
"""What Zarr v3 calls the metadata of a group or an array."""
_ROOT_KEY = ZARR_DOCUMENT
_log = logging.getLogger(__name__)


class Store:
    """An open store. `Store.open` an existing one, `Store.create` one or open it if its recipe is the same."""

    def __init__(self, storage: Storage, attributes: dict[str, Any]) -> None:
        self.storage = storage
        self.recipe_hash: str = attributes["recipe_hash"]
        self.key_fingerprint: str = attributes["key_fingerprint"]
        self.version: int = attributes["version"]
        self._known: dict[str, tuple[Stamp, Volume]] = {}
        self.table = VolumeTable(storage, self._volume)
        self._told = self._unsettled = 0

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, volumes={len(self.live_commits())}, recipe={self.recipe_hash[:12]!r})"

    @property
    def path(self) -> StorePlace:
        """The folder of the store, or its place in object storage."""
        return self.storage.root

    @classmethod
    def open(cls, path: StorePlace | str) -> Store:
        """Open a store; `StoreError` if there is none, or one of a format this version cannot read."""
        storage = open_storage(path)
        if not storage.exists(_ROOT_KEY):
            found = "no zarr.json in it" if storage.exists("") else "no such folder"
            raise StoreError(f"{path}: expected a store made by `maesil ingest`, found {found}")
        try:
            document = storage.read(_ROOT_KEY)
            attributes = parsed_json(document)["attributes"]["maesil"]
            name, version = attributes["format"], attributes["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path}: expected a store made by `maesil ingest`, found another Zarr or JSON file"
            ) from error
        if name != FORMAT_NAME or version not in range(1, TABLE_VERSION + 1):
            newer = isinstance(version, int) and version > TABLE_VERSION
            advice = "read it with a newer maesil" if newer else "ingest again with this one"
            found = f"{name} version {version}; {advice}"
            raise StoreError(f"{path}: expected {FORMAT_NAME} version 1 to {TABLE_VERSION}, found {found}")
        if not all(isinstance(attributes.get(field), str) for field in ("recipe_hash", "key_fingerprint")):
            raise StoreError(f"{path}: zarr.json is damaged: expected the hashes of a recipe and a key in it")
        if CHECKSUM not in attributes:
            raise StoreError(f"{path}: made before the format was published; delete the folder and ingest again")
        if document != _root_document(attributes["recipe_hash"], attributes["key_fingerprint"], version):
            raise StoreError(f"{path}: zarr.json does not match its own checksum; it was altered")
        return cls(storage, attributes)

    @classmethod
    def create(cls, path: StorePlace, recipe: Recipe, key_fingerprint: str, *, update: bool = False) -> Store:
        """Create a store, or open it if it exists with the same recipe and key.

        `UsageError` if it has another recipe and not `update`, was made with another key, or if the folder holds
        something else.
        """
        if isinstance(path, Path) and path.exists() and not path.is_dir():
            raise UsageError(f"{path}: expected a folder for the store, found a file; name another --out")
        storage = open_storage(path)
        if not storage.exists(_ROOT_KEY):
            if any(True for _ in storage.list("")) and not storage.exists("recipes"):
                raise UsageError(f"{path}: expected a store or an empty folder, found other files; name another --out")
            storage.put_new(f"recipes/{recipe.hash}.json", canonical_json(recipe.document()))
            storage.put_new(_ROOT_KEY, _root_document(recipe.hash, key_fingerprint, FORMAT_VERSION))
            storage.put_new("volumes/zarr.json", GROUP_DOCUMENT)
        store = cls.open(path)
        if store.key_fingerprint != key_fingerprint:
            raise UsageError(
                f"{path}: the store was made with identity key {store.key_fingerprint}, found {key_fingerprint}; "
                "give the key of the store with --key-file, or name another --out"
            )
        if store.recipe_hash != recipe.hash:
            if not update:
                raise UsageError(
                    f"{path}: the store has another recipe ({store.recipe.difference(recipe)}); "
                    "name another --out, or --update to remake its volumes"
                )
            storage.put_new(f"recipes/{recipe.hash}.json", canonical_json(recipe.document()))
            store._put_root(recipe.hash)
        store.require_current()
        return store

    def require_current(self) -> None:
        """Say in the root that the store has volumes of this version, before it gets one: earlier maesil refuse it."""
        if self.version < FORMAT_VERSION:
            self._put_root(self.recipe_hash)

    def _put_root(self, recipe_hash: str) -> None:
        version = max(self.version, FORMAT_VERSION)
        self.storage.put(_ROOT_KEY, _root_document(recipe_hash, self.key_fingerprint, version))
        self.recipe_hash, self.version = recipe_hash, version

    @property
    def recipe(self) -> Recipe:
        """The live recipe."""
        damaged = f"{self.path}: the record of recipe {self.recipe_hash[:12]} is damaged"
        try:
            recipe = Recipe.from_document(parsed_json(self.storage.read(f"recipes/{self.recipe_hash}.json")))
        except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
            raise StoreError(f"{damaged} ({reason(error)})") from error
        if recipe.hash != self.recipe_hash:
            raise StoreError(f"{damaged}: its hash is {recipe.hash[:12]}")
        return recipe

    @property
    def superpatch(self) -> int:
        """Edge of a superpatch (voxels)."""
        return self.recipe.superpatch

    def volumes(self) -> list[Volume]:
        """Return the live volumes made by the live recipe, by id; `StoreError` on a damaged commit."""
        return [volume for volume in self._all_volumes() if volume.recipe_hash == self.recipe_hash]

    def outdated(self) -> list[Volume]:
        """Return the volumes still as an earlier recipe made them: they wait to be made anew, and are not read."""
        return [volume for volume in self._all_volumes() if volume.recipe_hash != self.recipe_hash]

    def _all_volumes(self) -> list[Volume]:
        """Return the volumes of all live commits, by id: from the table where there is one."""
        if self.version >= TABLE_VERSION:
            try:
                return [volume for _, volume in sorted(self.table.volumes().items())]
            except StaleTableError as error:
                if not self._told:
                    told = "the commits are read one by one; the next ingest or `maesil store index` makes it anew"
                    _log.warning("%s: the table of volumes %s; %s", self.path, error, told)
                self._told += 1
        return self._committed()

    def _committed(self) -> list[Volume]:
        """Return the volumes of all live commits; those that were read before are read again only if they changed."""
        stamps = self.storage.stamps("commits")
        keys = live_keys(stamps)
        new = [key for key in keys if key not in self._known or self._known[key][0] != stamps[key]]
        read = {key: self._volume(key, data) for key, data in zip(new, self.storage.read_each(new), strict=True)}
        self._known = {key: (stamps[key], read[key] if key in read else self._known[key][1]) for key in keys}
        return [volume for _, volume in self._known.values()]

    def live_commits(self, prefix: str = "commits") -> list[str]:
        """Return the keys of the live commits below a folder, by volume id: of each volume the highest generation."""
        return live_keys(self.storage.list(prefix))

    def read_commit(self, key: str) -> Volume:
        """Return the volume of one commit; `StoreError` if the record is damaged."""
        return self._volume(key, self.storage.read(key))

    def _volume(self, key: str, data: bytes) -> Volume:
        try:
            return Volume.from_json(data, key)
        except StoreError as error:
            raise StoreError(f"{self.path}: {error}") from error

    def volume(self, volume_id: str) -> Volume:
        """Return one live volume by its id or by a beginning of it that is unique; `UsageError` if there is none."""
        volumes = {volume.volume_id: volume for volume in self.volumes()}
        return volumes[self.whole_id(volume_id, volumes, "volume")]

    def whole_id(self, beginning: str, ids: Iterable[str], what: str) -> str:
        """Return the one id of several that begins like this; `UsageError` names those it could be."""
        known = sorted(ids)
        found = [beginning] if beginning in known else [one for one in known if one.startswith(beginning)]
        if len(found) == 1:
            return found[0]
        shown = candidates(one[: max(12, len(beginning) + 4)] for one in found)
        told = (
            f"found {len(found)}: {shown}; give more of the id (`maesil store info`)"
            if found
            else "found none; see `maesil store info`"
        )
        raise UsageError(f"{self.path}: expected one {what} whose id begins with {beginning!r}, {told}")

    def live(self, volume_id: str) -> Volume | None:
        """Return the live commit of exactly this id, or None."""
        keys = self.live_commits(f"commits/{volume_id[:2]}/{volume_id}")
        return self.read_commit(keys[0]) if keys else None

    def commit(self, volume: Volume, *, anew: bool = False) -> Volume:
        """Record a volume whose attempt is complete and durable; return the live commit.

        If another process committed the same content first, its commit is returned and this attempt is discarded,
        unless the volume was asked for ``anew``.
        """
        while True:
            live = self.live(volume.volume_id)
            if live is not None and live.same_content(volume) and not anew:
                if live.attempt != volume.attempt:
                    self.storage.remove(volume.prefix)
                return live
            candidate = volume.at_generation(live.generation + 1 if live else 1)
            if self.put_commit(candidate):
                return candidate

    def put_commit(self, volume: Volume) -> bool:
        """Write the commit of a volume; return False if there is one of this generation. Every commit is written here.

        A mark before it leads readers of the table to it, whenever this process ends.
        """
        mark = self.table.mark(volume.volume_id, volume.generation) if self.version >= TABLE_VERSION else None
        won = self.storage.put_new(commit_key(volume.volume_id, volume.generation), volume.to_json())
        # The table may have been begun since this store was opened, from a list without this commit; and of a writer
        # that slept for long another one may have believed that it was dead.
        if won and (self._has_table_now() if mark is None else not self.storage.exists(mark)):
            mark = self.table.mark(volume.volume_id, volume.generation)
        if mark is not None:
            self.table.done(mark)
            self._unsettled += 1
        if won and self._unsettled >= _SETTLE_EVERY:
            self.keep_table(whole=False)
        return won

    def _has_table_now(self) -> bool:
        root = parsed_json(self.storage.read(_ROOT_KEY))
        self.version = max(self.version, root["attributes"]["maesil"]["version"])
        return self.version >= TABLE_VERSION

    def keep_table(self, *, whole: bool = True) -> None:
        """Bring the table of volumes up to date, and begin it in a store that has grown.

        ``whole`` compares it with the list of all commits, so that nothing stays amiss whoever wrote them.
        """
        if self.version < TABLE_VERSION:
            if self.version < FORMAT_VERSION or len(self.live_commits()) < TABLE_FROM:
                return
            # Before the commits are listed: whoever commits later sees it, and marks.
            self.storage.put(_ROOT_KEY, _root_document(self.recipe_hash, self.key_fingerprint, TABLE_VERSION))
            self.version = TABLE_VERSION
        self._unsettled = 0
        self.table.settle(whole=whole)

    def forget(self, volume_id: str) -> None:
        """Take a volume out of the store by its commits; its attempts are left to whoever reads them now."""
        marked = self.version >= TABLE_VERSION
        mark = self.table.mark(volume_id, None) if marked else None
        self.storage.remove(f"commits/{volume_id[:2]}/{volume_id}")
        if mark is None and self._has_table_now():
            mark = self.table.mark(volume_id, None)
        if mark is not None:
            self.table.done(mark)

    def quarantine(self, refusal: Refusal) -> None:
        """Record why a source was refused."""
        key, data = quarantine_key(refusal.volume_id), sealed(refusal.document())
        if (
            not self.storage.exists(key) or self.storage.read(key) != data
        ):  # a run that finds nothing new writes nothing
            self.storage.put(key, data)

    def release(self, volume_id: str) -> None:
        """Drop the record of a refusal, once the source has become a volume after all."""
        self.storage.remove(quarantine_key(volume_id))

    def quarantined(self) -> list[Refusal]:
        """Return the records of all refused sources; `StoreError` on a damaged one."""
        keys = [key for key in self.storage.list("quarantine") if key.endswith(".json")]
        return [self._refusal(key, data) for key, data in zip(keys, self.storage.read_each(keys), strict=True)]

    def refusal(self, key: str) -> Refusal:
        """Return one record of a refusal; `StoreError` if it is damaged."""
        return self._refusal(key, self.storage.read(key))

    def _refusal(self, key: str, data: bytes) -> Refusal:
        try:
            return Refusal.from_document(unsealed(data))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self.path}: {key}: expected the record of a refusal, found damage ({reason(error)})"
            ) from error

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over content and patients of all live volumes: same sources and recipe, same fingerprint."""
        digest = hashlib.sha256()
        for volume in self.volumes():
            digest.update(f"{volume.volume_id} {volume.group} {volume.source_hash} {volume.recipe_hash}\n".encode())
        return digest.hexdigest()


def is_store(place: StorePlace) -> bool:
    """Return whether a place holds a store of ours, of whatever version, by what its root says."""
    try:
        attributes = parsed_json(open_storage(place).read(ZARR_DOCUMENT))["attributes"]["maesil"]
        return bool(attributes["format"] == FORMAT_NAME)
    except (OSError, StoreError, ValueError, KeyError, TypeError):
        return False


GROUP_DOCUMENT = canonical_json({"zarr_format": 3, "node_type": "group", "attributes": {}})
"""A plain Zarr v3 group, for the folders between the root and an image."""


def _root_document(recipe_hash: str, key_fingerprint: str, version: int) -> bytes:
    attributes = {
        "format": FORMAT_NAME,
        "version": version,
        "recipe_hash": recipe_hash,
        "key_fingerprint": key_fingerprint,
    }
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"maesil": json.loads(sealed(attributes))}}
    return canonical_json(group)
