"""The summary of a store, for people and for programs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.table import Table

from maesil.store.filters import select
from maesil.store.index import patients, superpatch_table
from maesil.store.records import Volume
from maesil.store.store import Store
from maesil.text import counted
from maesil.types import Zyx


def describe(store: Store, where: str = "") -> dict[str, Any]:
    """Return the summary as JSON-ready values; lengths in mm, sizes in bytes; of what a filter takes, if given."""
    volumes, leaders = store.volumes(), patients([store])
    if where:
        volumes = _filtered(volumes, select(superpatch_table(store), where))
    return {
        "path": str(store.path),
        "fingerprint": store.fingerprint,
        "key_fingerprint": store.key_fingerprint,
        "recipe_hash": store.recipe_hash,
        "recipe": store.recipe.document(),
        "volumes": [_volume(volume, leaders[volume.group]) for volume in volumes],
        "patient_groups": len({leaders[volume.group] for volume in volumes}),
        "superpatches": sum(len(volume.superpatches) for volume in volumes),
        "stored_bytes": sum(patch.length for volume in volumes for patch in volume.superpatches),
        "decoded_bytes": sum(2 * volume.tile**3 * len(volume.superpatches) for volume in volumes),
        "refused": store.quarantined(),
    }


def tables(store: Store, where: str = "") -> list[Table | str]:
    """Return the summary as tables and lines to print."""
    found = describe(store, where)
    recipe = found["recipe"]
    lines = [
        f"{found['path']}: {counted(len(found['volumes']), 'volume')} of "
        f"{counted(found['patient_groups'], 'patient')}, "
        f"{counted(found['superpatches'], 'superpatch', 'superpatches')} of {recipe['superpatch_voxels']}^3, "
        f"{found['stored_bytes'] / 1e6:.1f} MB stored ({found['decoded_bytes'] / 1e6:.1f} MB decoded)",
        f"spacing {recipe['spacing_zyx_mm']} mm, HU {recipe['hu_range']}, codec {recipe['codec']}, "
        f"recipe {found['recipe_hash'][:12]}, fingerprint {found['fingerprint'][:12]}",
    ]
    table = Table(title="Volumes", title_justify="left")
    for name, justify in (("volume", "left"), ("patient", "left"), ("shape zyx", "right"), ("spacing mm", "right"),
                          ("source mm", "right"), ("tiles", "right"), ("body", "right"), ("HU mean", "right"),
                          ("notes", "left")):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=name != "notes")  # type: ignore[arg-type]
    for volume in found["volumes"]:
        table.add_row(
            volume["volume_id"][:12], volume["patient"][:8], _by(volume["shape_zyx"], "x"),
            _by(volume["spacing_zyx_mm"], " "), _by(volume["source_spacing_zyx_mm"], " "), str(volume["superpatches"]),
            f"{volume['hu']['body_share']:.0%}", f"{volume['hu']['mean']:.0f}", " ".join(volume["notes"]),
        )  # fmt: skip
    refused = [
        f"refused {record['volume_id'][:12]}: {record['code']}: {record['detail']}" for record in found["refused"]
    ]
    return [*lines, table, *refused]


def _filtered(volumes: list[Volume], taken: set[tuple[str, Zyx]]) -> list[Volume]:
    """Return the volumes of which a filter takes any superpatch, each with those it takes."""
    kept = [
        replace(v, superpatches=tuple(patch for patch in v.superpatches if (v.volume_id, patch.index) in taken))
        for v in volumes
    ]
    return [volume for volume in kept if volume.superpatches]


def _volume(volume: Volume, patient: str) -> dict[str, Any]:
    return {
        "volume_id": volume.volume_id,
        "group": volume.group,
        "patient": patient,
        "shape_zyx": list(volume.shape),
        "spacing_zyx_mm": list(volume.spacing),
        "source_shape_zyx": list(volume.source_shape),
        "source_spacing_zyx_mm": list(volume.source_spacing),
        "affine_lps": [list(row) for row in volume.affine_lps],
        "superpatches": len(volume.superpatches),
        "source": volume.source,
        "hu": volume.hu,
        "notes": list(volume.notes),
    }


def _by(values: list[float], separator: str) -> str:
    return separator.join(f"{value:g}" for value in (round(value, 3) for value in values))
