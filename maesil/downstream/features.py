"""Embeddings of scans for search, clustering and plots: one per scan, per superpatch or per token, in one table.

A superpatch is cut into the crops that the encoder was trained on, each is encoded with nothing hidden, and its tokens
are averaged, each counting by how much of its patch is body (where a superpatch has no body: by how much is valid).
A whole scan is encoded in crops that overlap (`maesil.downstream.whole_scan`).
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from maesil.cache.provenance import recorded_uses
from maesil.config.schema import ModelConfig, require_tile
from maesil.data.crops import patch_shares
from maesil.devices import pick_device
from maesil.downstream.card import is_export, one_spacing, read_card
from maesil.downstream.export import load_net
from maesil.downstream.scans import Scan, Scans, scans_of_files, scans_of_store, superpatches
from maesil.downstream.whole_scan import cells_at, cut, embed_scan, encoded, pooled
from maesil.errors import NoInputError, ScanRefused, UsageError
from maesil.files import require_file_place, whole_file
from maesil.geometry import world_of
from maesil.models.encoders import Backbone, encoder_of
from maesil.progress import progress
from maesil.store.backends import open_storage
from maesil.store.store import ZARR_DOCUMENT, Store
from maesil.store.urls import StorePlace
from maesil.store.writer import Image
from maesil.training.checkpoint import content_sha256, load_run
from maesil.types import Spacing, Zyx, edges_told

Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Written:
    """What became of the scans."""

    rows: int
    scans: int
    refused: dict[str, str]
    """Path and code of each scan that could not be read."""


def write_features(
    source: Path, place: StorePlace, out: Path, *, per: str = "superpatch", device: str = "auto"
) -> Written:
    """Write embeddings of all scans of a store, or of scans at a path or in object storage, to a Parquet file.

    ``source`` is a run or an exported encoder. ``per`` is ``scan``, ``superpatch`` or ``token``. Of a store each row
    holds volume_id and group, of other scans source (the path), volume (a number) and series (its UID). All hold valid
    and body (shares, 0..1) and embedding (float32, D numbers; null without any valid voxel). With ``superpatch`` and
    ``token`` iz, iy, ix say which one; tokens have x_mm, y_mm, z_mm (LPS) besides, and only those with a valid voxel
    are written. weighted_by says what a mean counts tokens by.

    What was made of a scan is kept in ``OUT.parts`` until all are done, so that the same command goes on after an
    interruption. Raises CheckpointError, StoreError, NoInputError where there are no scans, UsageError where ``out``
    cannot be written.
    """
    if per not in _PER:
        raise UsageError(f"--per={per}: expected one of {', '.join(_PER)}")
    encoder = open_encoder(source, pick_device(device))
    require_file_place(out)
    with progress({"scan": "file", "features": "scan"}) as report:
        if _is_store_or_missing(place):
            scans = scans_of_store(_fitting(encoder.config, Store.open(place), per))
        else:
            scans = scans_of_files(place, spacing_of_training(source), encoder.config, report)
        if not scans.scans:
            raise NoInputError(f"{place}: the store holds no volumes; run `maesil ingest` first")
        return _Table(encoder, scans, out, per).write(report)


def open_encoder(source: Path, device: torch.device | str = "cpu") -> Backbone:
    """Return the encoder of a run folder or of a folder made by `maesil export`; CheckpointError for another one."""
    if is_export(source):
        return load_net(source, device)
    run = load_run(source, device)
    return encoder_of(run.model, run.intensity).to(device)


def spacing_of_training(source: Path) -> Spacing | None:
    """Return the spacing (mm) of all stores that a run or an exported encoder was trained on; None if they differ."""
    if is_export(source):
        return read_card(source).spacing
    return one_spacing(use.recipe for use in recorded_uses(source))


def _is_store_or_missing(place: StorePlace) -> bool:
    """Return whether a place holds a store, of whatever version, or nothing at all, as `Store.open` then says."""
    if isinstance(place, Path) and not place.exists():
        return True
    return open_storage(place).exists(ZARR_DOCUMENT)


def _fitting(config: ModelConfig, store: Store, per: str) -> Store:
    """Return the store; UsageError unless superpatches, where they are asked for, are cut into whole crops."""
    if per != "superpatch":
        return store
    require_tile(config, store.superpatch, store.path)
    if any(store.superpatch % edge for edge in config.crop_zyx):
        raise UsageError(
            f"{store.path}: expected superpatches that are whole crops of {edges_told(config.crop)} voxels, found an "
            f"edge of {store.superpatch}; take a store of another --superpatch, such as {math.lcm(*config.crop_zyx)}"
        )
    return store


def per_scan(encoder: Backbone, image: Image, tile: int) -> Rows:
    """Yield the row of a scan as a whole."""
    found = embed_scan(encoder, image)
    yield {
        "valid": float(found.valid.mean()), "body": float(found.body.mean()), "weighted_by": found.weighted_by,
        "embedding": found.vector,
    }  # fmt: skip


def per_superpatch(encoder: Backbone, image: Image, tile: int) -> Rows:
    """Yield a row for each superpatch."""
    for (iz, iy, ix), valid, body in superpatches(image, tile):
        vector, weighted_by = embed(encoder, image, (iz, iy, ix), tile)
        yield {
            "iz": iz, "iy": iy, "ix": ix, "valid": valid, "body": body, "weighted_by": weighted_by,
            "embedding": vector,
        }  # fmt: skip


def per_token(encoder: Backbone, image: Image, tile: int) -> Rows:
    """Yield a row for each token whose patch holds a valid voxel."""
    found = embed_scan(encoder, image)
    for iz, iy, ix in np.argwhere(found.valid > 0).tolist():
        x, y, z = world_of(found.affine, (iz, iy, ix)).tolist()
        yield {
            "iz": iz, "iy": iy, "ix": ix, "x_mm": x, "y_mm": y, "z_mm": z,
            "valid": float(found.valid[iz, iy, ix]), "body": float(found.body[iz, iy, ix]),
            "embedding": found.tokens[iz, iy, ix],
        }  # fmt: skip


@torch.no_grad()
def embed(encoder: Backbone, image: Image, index: Zyx, tile: int) -> tuple[Any, str]:
    """Return the weighted mean of a superpatch's tokens (None without a valid voxel), and what weighted it."""
    size = encoder.config.crop_zyx
    starts = [
        range(i * tile, min((i + 1) * tile, n), edge) for i, n, edge in zip(index, image.shape, size, strict=True)
    ]
    origins = [(z, y, x) for z, y, x in product(*starts) if cells_at(image.valid, (z, y, x), size).any()]
    crops = [cut(image, origin, size) for origin in origins]
    if not crops:
        return None, "nothing"
    tokens = np.stack([encoded(encoder, [crop])[0].numpy() for crop in crops])
    shares = {
        name: patch_shares(torch.from_numpy(np.stack([getattr(c, name) for c in crops])), encoder.config.patch).numpy()
        for name in ("body", "valid")
    }
    return pooled(tokens, shares)


_INDEX = [pa.field(name, pa.int32(), nullable=False) for name in ("iz", "iy", "ix")]
_SHARES = [pa.field(name, pa.float64(), nullable=False) for name in ("valid", "body")]
_WEIGHTED = [pa.field("weighted_by", pa.string(), nullable=False)]
_PLACE = [pa.field(name, pa.float64(), nullable=False) for name in ("x_mm", "y_mm", "z_mm")]
_PER: dict[str, tuple[Callable[[Backbone, Image, int], Rows], list[Any]]] = {
    "scan": (per_scan, [*_SHARES, *_WEIGHTED]),
    "superpatch": (per_superpatch, [*_INDEX, *_SHARES, *_WEIGHTED]),
    "token": (per_token, [*_INDEX, *_PLACE, *_SHARES]),
}
PER = tuple(_PER)


class _Table:
    """The table, made of one part for each scan."""

    def __init__(self, encoder: Backbone, scans: Scans, out: Path, per: str) -> None:
        self.encoder, self.scans, self.out = encoder, scans, out
        self.make_rows, fields = _PER[per]
        names = [
            pa.field(name, pa.int32() if isinstance(value, int) else pa.string(), nullable=False)
            for name, value in scans.scans[0].columns.items()
        ]
        self.schema = pa.schema([*names, *fields, pa.field("embedding", pa.list_(pa.float32(), encoder.width))])
        weights = content_sha256(dict(encoder.state_dict()))
        self.facts = {"maesil.encoder": encoder.config.kind, "maesil.per": per, "maesil.weights_sha256": weights}
        if scans.fingerprint:
            self.facts["maesil.store_fingerprint"] = scans.fingerprint
        self.parts = out.with_name(f"{out.name}.parts")

    def write(self, report: Any) -> Written:
        refused, done = dict(self.scans.refused), []
        for number, scan in enumerate(self.scans.scans, start=1):
            try:
                done.append(self._part(scan))
            except ScanRefused as error:
                refused[str(scan.columns["source"])] = error.code
                if number == len(self.scans.scans) and not done:
                    raise
            report("features", number, len(self.scans.scans))
        rows = self._joined(done)
        shutil.rmtree(self.parts, ignore_errors=True)
        return Written(rows, len(done), refused)

    def _part(self, scan: Scan) -> Path:
        """Return the file with the rows of one scan, made unless an interrupted command has made it."""
        what = repr((sorted(self.facts.items()), sorted(scan.columns.items()), scan.made_from))
        path = self.parts / f"{hashlib.sha256(what.encode()).hexdigest()}.parquet"
        if not path.exists():
            rows = [scan.columns | row for row in self.make_rows(self.encoder, scan.read(), scan.tile)]
            with whole_file(path) as partial:
                pq.write_table(pa.Table.from_pylist(rows, schema=self.schema), partial, compression="zstd")
        return path

    def _joined(self, parts: list[Path]) -> int:
        rows, schema = 0, self.schema.with_metadata(self.facts)
        with whole_file(self.out) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            for part in parts:
                table = pq.read_table(part, schema=self.schema)
                writer.write_table(table.replace_schema_metadata(self.facts))
                rows += table.num_rows
        return rows
