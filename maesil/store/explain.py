"""In words, why a source became the volume it is, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maesil.store.records import Refusal, Volume
from maesil.store.remedies import remedy
from maesil.store.store import Store
from maesil.text import counted

_FILES_SHOWN = 5

NOTES = {
    "animal": "the header names a species: this is an animal",
    "blank_series_uid": "the series UID was blanked; its slices were told apart by folder, geometry and acquisition",
    "burned_in_annotation": "the header says that text is burned into the pixels: look whether it names the patient",
    "cone_beam": "the header names a cone-beam device or says CBCT: its numbers are HU only roughly",
    "coronal_slices": "its slices are coronal: likely a reformat, perhaps of another volume here",
    "filled_border": "a constant region at the border, where nothing was scanned, is air outside the valid region",
    "gaps_filled": "missing slices were interpolated (--fill-gaps); they are marked not valid",
    "head": "the header says the face may be in it, from which a person could be known",
    "identity_affine": "the header's affine is the identity: voxels of 1 mm, or a writer that did not know them",
    "in_meters": "the header counts in metres; lengths were converted",
    "in_microns": "the header counts in micrometres; lengths were converted",
    "lossy": "the pixels went through a lossy encoding",
    "native_under_compressed_syntax": "the pixels are not encoded, though the transfer syntax says so; they are whole",
    "no_rescale_tags": "the header has no rescale; stored values were taken for HU, and look like it",
    "non_finite_voxels": "NaN or infinite voxels became air outside the valid region",
    "one_of_several": "the file holds several volumes along a fourth axis; this is one of them",
    "padding_value_in_tissue_range": "the padding value lies among tissue; it was believed at the margin alone",
    "padding_value_in_tissue_range_ignored": "the padding value lies among tissue and was not believed",
    "patient_id_varies": "its series carries several patient ids and makes one scan only together: one patient",
    "pixdim_ignored": "pixdim is left at 1, against the voxels of the sform, which was taken",
    "positions_rounded": "positions were rounded: each slice lies within 0.05 mm of a regular stack",
    "qform_preferred": "sform and qform differ; qform was taken (--prefer)",
    "quadruped": "an animal on four legs: the axes of the patient mean other directions",
    "quaternion_normalised": "the qform's quaternion was longer than 1 by rounding, and was normalised",
    "sagittal_slices": "its slices are sagittal: likely a reformat, perhaps of another volume here",
    "series_reunited": "each slice had a series UID of its own; by all else they make one scan",
    "sform_preferred": "the sform differs from the qform, or from pixdim; the sform was taken (--prefer)",
    "sheared": "the slices are shifted along the scan (gantry tilt or drift); resampled through the true affine",
    "singular_sform_ignored": "the sform is singular; the qform was taken",
    "split_from_series": "the series held several planes, acquisitions or blocks; this is one of them",
    "study_uid_varies": "its series carries several study UIDs and makes one scan only together",
    "trailing_bytes": "bytes follow the compressed volume, which is whole",
    "undeclared_padding": "values far below air are padding that the header does not declare",
    "zero_dimension": "an axis that is not used has the length 0 in the header; it was taken for 1",
    "unit_ignored": "the header's unit would make impossible voxels; lengths were taken as mm",
    "whole_words": "values need more bits than the header says; the whole words were read",
}
"""What ingest notes of an accepted volume; ``accepted_CODE`` says that a doubt was accepted on purpose (--accept)."""


@dataclass(frozen=True)
class Explanation:
    """What a store says of one id: a volume, a refused source, or both where the source changed since."""

    volume_id: str
    sources: tuple[str, ...]
    """The files that it came from, as far as they are known."""
    volume: Volume | None
    outdated: bool
    """Whether the volume was made by an earlier recipe."""
    refusal: Refusal | None

    def document(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        told = {"what_to_do": remedy(self.refusal.code)} if self.refusal else {}
        return {
            "volume_id": self.volume_id,
            "sources": list(self.sources),
            "volume": _volume_document(self.volume, self.outdated) if self.volume else None,
            "refusal": self.refusal.document() | told if self.refusal else None,
        }

    def lines(self) -> list[str]:
        """Return everything as lines of text."""
        text = _volume_lines(self.volume, self.outdated) if self.volume else []
        if self.refusal is not None:
            text.append(f"source {self.volume_id} was refused: {self.refusal.code}: {self.refusal.detail}")
            text += [f"  {name}: {value}" for name, value in (self.refusal.numbers or {}).items()]
            text.append(f"  what to do: {remedy(self.refusal.code)}")
            if self.volume is not None:
                text.append("  the volume above is of an earlier state of the source")
        return text + _source_lines(self.sources)


def explanation(store: Store, volume_id: str, sources: Mapping[str, Sequence[str]] | None = None) -> Explanation:
    """Return what the store says of a volume or a refused source; `UsageError` unless the id is known and unique.

    ``sources`` are the files that each came from, by id: a store knows no path, the report of its ingest does.
    """
    volumes = {volume.volume_id: volume for volume in (*store.outdated(), *store.volumes())}
    refusals = {record.volume_id: record for record in store.quarantined()}
    found = store.whole_id(volume_id, {*volumes, *refusals}, "volume or refused source")
    volume = volumes.get(found)
    outdated = volume is not None and volume.recipe_hash != store.recipe_hash
    return Explanation(found, tuple((sources or {}).get(found, ())), volume, outdated, refusals.get(found))


def _volume_document(volume: Volume, outdated: bool) -> dict[str, Any]:
    return {
        "group": volume.group,
        "generation": volume.generation,
        "outdated": outdated,
        "source": volume.source,
        "source_shape_zyx": list(volume.source_shape),
        "source_spacing_zyx_mm": list(volume.source_spacing),
        "shape_zyx": list(volume.shape),
        "spacing_zyx_mm": list(volume.spacing),
        "affine_lps": [list(row) for row in volume.affine_lps],
        "hu": volume.hu,
        "notes": {note: note_in_words(note) for note in volume.notes},
    }


def note_in_words(note: str) -> str:
    """Return what a note means."""
    if note.startswith("accepted_"):
        return f"the doubt {note.removeprefix('accepted_')} was accepted on purpose (--accept)"
    return NOTES.get(note, "")


def _source_lines(sources: Sequence[str]) -> list[str]:
    if not sources:
        return ["  files: not known here; --report DIR names the report of its ingest, which knows them"]
    more = [f"    and {len(sources) - _FILES_SHOWN} more (--json lists all)"] if len(sources) > _FILES_SHOWN else []
    return [f"  {counted(len(sources), 'file')}:", *(f"    {path}" for path in sources[:_FILES_SHOWN]), *more]


def _volume_lines(volume: Volume, outdated: bool) -> list[str]:
    source, hu = ", ".join(f"{name} {value}" for name, value in volume.source.items()), volume.hu
    text = [
        f"volume {volume.volume_id}, patient group {volume.group}, generation {volume.generation}",
        f"  source: {source}",
        f"  voxels: {_by(volume.source_shape)} of {_by(volume.source_spacing)} mm (z y x)"
        f" -> {_by(volume.shape)} of {_by(volume.spacing)} mm",
        f"  HU: {hu['min']:.0f} to {hu['max']:.0f}, mean {hu['mean']:.0f}; "
        f"clipped: {hu['clipped_low_share']:.2%} below, {hu['clipped_high_share']:.2%} above",
        f"  shares: {hu['valid_share']:.1%} of the voxels valid, {hu['body_share']:.1%} body",
    ]
    if outdated:
        text.append("  made by an earlier recipe: not read until it is ingested again")
    if not volume.notes:
        text.append("  nothing was split, repaired or accepted with doubt")
    return text + [f"  {note}: {note_in_words(note)}" for note in volume.notes]


def _by(values: Sequence[float]) -> str:
    return " x ".join(f"{round(value, 3):g}" for value in values)
