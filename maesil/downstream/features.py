"""One embedding a superpatch, for search, clustering and plots.

A superpatch is cut into the crops that the encoder was trained on, each is encoded with nothing hidden, and its tokens
are averaged, each counting by how much of its patch is body (where a superpatch has no body: by how much is valid).
Shapes: B crops, L tokens, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from maesil.config.schema import ModelConfig, require_tile
from maesil.data.crops import Crop, patch_shares, read_crop
from maesil.devices import pick_device
from maesil.downstream.card import is_export
from maesil.downstream.export import load_encoder
from maesil.errors import NoInputError, UsageError
from maesil.files import require_file_place, whole_file
from maesil.models.encoders import Encoder, encoder_of
from maesil.progress import progress
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Superpatch, Volume
from maesil.store.store import Store
from maesil.training.checkpoint import load_run
from maesil.types import Edges, Zyx, edges_told, zyx

_SCHEMA = [
    pa.field("volume_id", pa.string(), nullable=False),
    pa.field("group", pa.string(), nullable=False),
    *(pa.field(name, pa.int32(), nullable=False) for name in ("iz", "iy", "ix")),
    *(pa.field(name, pa.float64(), nullable=False) for name in ("valid", "body")),
    pa.field("weighted_by", pa.string(), nullable=False),
]


@dataclass(frozen=True)
class Embedding:
    """What one superpatch comes to."""

    vector_D: NDArray[np.float32] | None
    """None where no voxel is valid."""
    weighted_by: str
    """``body``, ``valid`` or ``nothing``."""


def write_features(source: Path, store_path: Path, out: Path, *, device: str = "auto") -> int:
    """Write one row a superpatch of a store to a Parquet file; return how many.

    ``source`` is a run or an exported encoder. Columns: volume_id, group, iz, iy, ix, valid, body (shares 0..1),
    weighted_by, embedding (float32, D numbers; null without any valid voxel). Raises CheckpointError, StoreError,
    NoInputError for a store without volumes, UsageError where ``out`` cannot be written.
    """
    encoder, store = open_encoder(source, pick_device(device)), Store.open(store_path)
    _require_whole_crops(encoder.config, store)
    require_file_place(out)
    reader, volumes = SuperpatchReader(store), store.volumes()
    if not volumes:
        raise NoInputError(f"{store.path}: the store holds no volumes; run `maesil ingest` first")
    schema = pa.schema([*_SCHEMA, pa.field("embedding", pa.list_(pa.float32(), encoder.width))])
    facts = {"maesil.store_fingerprint": store.fingerprint, "maesil.encoder": encoder.config.kind}
    rows = 0
    with (
        whole_file(out) as partial,
        progress({"features": "volume"}) as report,
        pq.ParquetWriter(partial, schema.with_metadata(facts), compression="zstd") as writer,
    ):
        for number, volume in enumerate(volumes):
            of_volume = [_row(volume, patch, embed(encoder, reader, volume, patch)) for patch in volume.superpatches]
            writer.write_table(pa.Table.from_pylist(of_volume, schema=schema))
            rows += len(of_volume)
            report("features", number + 1, len(volumes))
    return rows


def _require_whole_crops(config: ModelConfig, store: Store) -> None:
    """Raise UsageError unless superpatches of the store are cut into whole crops."""
    require_tile(config, store.superpatch, store.path)
    if any(store.superpatch % edge for edge in config.crop_zyx):
        raise UsageError(
            f"{store.path}: expected superpatches that are whole crops of {edges_told(config.crop)} voxels, found an "
            f"edge of {store.superpatch}; take a store of another --superpatch, such as {math.lcm(*config.crop_zyx)}"
        )


def open_encoder(source: Path, device: torch.device | str = "cpu") -> Encoder:
    """Return the encoder of a run folder or of a folder made by `maesil export`; CheckpointError for another one."""
    if is_export(source):
        return load_encoder(source, device)
    run = load_run(source, device)
    return encoder_of(run.model, run.intensity).to(device)


@torch.no_grad()
def embed(encoder: Encoder, reader: SuperpatchReader, volume: Volume, patch: Superpatch) -> Embedding:
    """Return the weighted mean of a superpatch's tokens."""
    device = next(encoder.parameters()).device
    totals = {name: np.zeros(encoder.width) for name in ("body", "valid")}
    weights = dict.fromkeys(totals, 0.0)
    for crop in _crops(reader, volume, patch.index, encoder.config.crop):
        tokens_LD = encoder.forward_features(torch.from_numpy(crop.hu)[None].to(device))[0].double().cpu()
        for name, cells in (("body", crop.body), ("valid", crop.valid)):
            share_L = patch_shares(torch.from_numpy(cells)[None], encoder.config.patch)[0].double()
            totals[name] += (share_L @ tokens_LD).numpy()
            weights[name] += float(share_L.sum())
    for name, weight in weights.items():
        if weight > 0:
            return Embedding((totals[name] / weight).astype(np.float32), name)
    return Embedding(None, "nothing")


def _crops(reader: SuperpatchReader, volume: Volume, index: Zyx, crop: Edges) -> Iterator[Crop]:
    """Yield the crops of one superpatch that hold any valid voxel."""
    starts = [
        range(i * volume.tile, min((i + 1) * volume.tile, n), edge)
        for i, n, edge in zip(index, volume.shape, zyx(crop), strict=True)
    ]
    for z, y, x in product(*starts):
        if reader.read_map_region(volume.volume_id, "valid", (z, y, x), zyx(crop)).any():
            yield read_crop(reader, volume.volume_id, (z, y, x), crop)


def _row(volume: Volume, patch: Superpatch, embedding: Embedding) -> dict[str, object]:
    iz, iy, ix = patch.index
    vector = embedding.vector_D
    return {
        "volume_id": volume.volume_id, "group": volume.group, "iz": iz, "iy": iy, "ix": ix,
        "valid": patch.valid, "body": patch.body, "weighted_by": embedding.weighted_by,
        "embedding": None if vector is None else vector.tolist(),
    }  # fmt: skip
