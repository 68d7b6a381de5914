"""The summary of a store, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from maesil.store.filters import select
from maesil.store.index import patients, superpatch_table
from maesil.store.records import Volume
from maesil.store.store import Store
from maesil.text import counted


@dataclass(frozen=True)
class StoreSummary:
    """What a store holds, or what a filter takes of it."""

    store: Store
    volumes: tuple[Volume, ...]
    """Each with the superpatches that count."""
    patients: Mapping[str, str]
    """By patient group, the group that stands for all copies of its scans (`maesil.store.index.patients`)."""

    @property
    def patient_groups(self) -> int:
        """How many patients."""
        return len({self.patients[volume.group] for volume in self.volumes})

    @property
    def superpatches(self) -> int:
        """How many superpatches."""
        return sum(volume.count for volume in self.volumes)

    @property
    def stored_bytes(self) -> int:
        """Their size on disk."""
        return sum(int(volume.column("length").sum()) for volume in self.volumes)

    @property
    def decoded_bytes(self) -> int:
        """Their size in memory."""
        return sum(2 * volume.tile**3 * volume.count for volume in self.volumes)

    def document(self) -> dict[str, Any]:
        """Return the summary as JSON-ready values; lengths in mm, sizes in bytes."""
        return {
            "path": str(self.store.path),
            "fingerprint": self.store.fingerprint,
            "key_fingerprint": self.store.key_fingerprint,
            "recipe_hash": self.store.recipe_hash,
            "recipe": self.store.recipe.document(),
            "volumes": [_volume(volume, self.patients[volume.group]) for volume in self.volumes],
            "patient_groups": self.patient_groups,
            "superpatches": self.superpatches,
            "stored_bytes": self.stored_bytes,
            "decoded_bytes": self.decoded_bytes,
            "refused": [refusal.document() for refusal in self.store.quarantined()],
        }

    def tables(self) -> list[Table | str]:
        """Return the summary as tables and lines to print."""
        recipe = self.store.recipe.document()
        lines = [
            f"{self.store.path}: {counted(len(self.volumes), 'volume')} of {counted(self.patient_groups, 'patient')}, "
            f"{counted(self.superpatches, 'superpatch', 'superpatches')} of {recipe['superpatch_voxels']}^3, "
            f"{self.stored_bytes / 1e6:.1f} MB stored ({self.decoded_bytes / 1e6:.1f} MB decoded)",
            f"spacing {recipe['spacing_zyx_mm']} mm, HU {recipe['hu_range']}, codec {recipe['codec']}, "
            f"recipe {self.store.recipe_hash[:12]}, fingerprint {self.store.fingerprint[:12]}",
        ]
        refused = [
            f"refused {refusal.volume_id[:12]}: {refusal.code}: {refusal.detail}"
            for refusal in self.store.quarantined()
        ]
        return [*lines, self._volume_table(), *refused]

    def _volume_table(self) -> Table:
        table = Table(title="Volumes", title_justify="left")
        for name in _COLUMNS:
            left = name in ("volume", "patient", "notes")
            table.add_column(name, justify="left" if left else "right", no_wrap=name != "notes")
        for volume in self.volumes:
            table.add_row(
                volume.volume_id[:12], self.patients[volume.group][:8], _by(volume.shape, "x"),
                _by(volume.spacing, " "), _by(volume.source_spacing, " "), str(volume.count),
                f"{volume.hu['body_share']:.0%}", f"{volume.hu['mean']:.0f}", " ".join(volume.notes),
            )  # fmt: skip
        return table


_COLUMNS = ("volume", "patient", "shape zyx", "spacing mm", "source mm", "superpatches", "body", "HU mean", "notes")


def summary_of(store: Store, where: str = "") -> StoreSummary:
    """Return the summary of a store, or of what a filter takes of it."""
    volumes = store.volumes()
    if where:
        taken = select(superpatch_table(store), where)
        volumes = [taken.part(volume) for volume in volumes if volume.volume_id in taken.volumes]
    return StoreSummary(store, tuple(volumes), patients([store]))


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
        "superpatches": volume.count,
        "source": volume.source,
        "hu": volume.hu,
        "notes": list(volume.notes),
    }


def _by(values: Sequence[float], separator: str) -> str:
    return separator.join(f"{value:g}" for value in (round(value, 3) for value in values))
