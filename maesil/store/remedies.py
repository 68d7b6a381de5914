"""What to do about a refused source, by its code."""

from __future__ import annotations

from typing import cast

from maesil.codes import RefusalCode
from maesil.store.recipe import ACCEPTABLE

_GET_AGAIN = "copy or download the file again; `--retry-quarantined {code}` tries it once more"
_EXPORT_AGAIN = "export the series again from the archive or scanner; the header does not say what is needed"
_LOOK = "open it in a viewer; if its numbers are HU after all, `--accept {code}` takes it"
_CONVERT = "convert it to plain CT with HU first, or leave it out"
_TRIED_AGAIN = "run the same command again: this is tried by every run"

REMEDIES: dict[RefusalCode, str] = {
    "gap": "look for the missing slices; `--fill-gaps N` interpolates up to N in a row",
    "irregular_spacing": "look for missing or foreign slices; a series of several scans must be split first",
    "drift": "look for slices of another scan in the folder",
    "stand_ins": "fetch the files that hold no slice (`git lfs pull`, `--follow-links`) or remove them; "
    "`--accept stand_ins` takes what is there",
    "frame_of_reference": "find out where these slices belong, and put them into a series of their own",
    "several_owners": "find out whose slices these are, and give each patient a series UID",
    "scattered_series": "restore the series UIDs: an anonymiser must give all files of a series the same one",
    "frames_without_positions": "export it as single slices or as Enhanced CT, which say where each one lies",
    "bits_stored": _EXPORT_AGAIN,
    "wrapped": "export it again in words that are wide enough; `--accept wrapped` takes the voxels as they are",
    "animal": "leave out `--refuse animal`",
    "quadruped": "leave out `--refuse quadruped`",
    "patient_id_varies": "leave out `--refuse patient_id_varies` once you know that it is one patient",
    "study_uid_varies": "leave out `--refuse study_uid_varies`",
    "series_reunited": "leave out `--refuse series_reunited`, or restore the series UIDs",
    "positions_rounded": "leave out `--refuse positions_rounded`, or export the series with its full positions",
    "whole_words": "leave out `--refuse whole_words`, or export the series with the right BitsStored",
    "position_conflict": "keep one of the files at each position, or put the scans into folders of their own",
    "no_geometry": _EXPORT_AGAIN,
    "bad_orientation": _EXPORT_AGAIN,
    "bad_spacing": _EXPORT_AGAIN,
    "bad_affine": "write the affine of the original scan into the header, or convert the original again",
    "zip_method": "unpack the archive first, then ingest the folder",
    "other_archive": "unpack the archive first, then ingest the folder",
    "metaimage": "convert it to NIfTI first",
    "nrrd": "convert it to NIfTI first",
    "not_fetched": "fetch the file itself, for example with `git lfs pull` or `git annex get`",
    "implausible_size": "check the unit of the lengths in the header: they must be in mm; `--accept {code}` takes it",
    "mr_or_pet": _LOOK,
    "no_orientation": "convert the original again with a tool that writes an sform or a qform",
    "forms_differ": "find out which of the two is right, then `--prefer sform` or `--prefer qform`",
    "incomplete_series": "see the other refusals of this series: once they are mended, it is taken",
    "size_limit": "check that the header is right; a scan this large must be cut or down-sampled first",
    "slice_offset": "look at the slices it names in a viewer; export the series again with one rescale for all",
    "woven_passes": "put the two passes into folders of their own, every second slice into each",
    "wrong_scale": "look at the values in a viewer; convert the original again, without a factor",
    "nothing_valid": "every voxel is padding: leave it out, or export it again",
    "lossy": "leave out `--refuse lossy`, or find the scan before it was compressed",
    "no_rescale_tags": "leave out `--refuse no_rescale_tags`, or find the scan with its rescale",
    "undeclared_padding": "leave out `--refuse undeclared_padding`",
    "filled_border": "leave out `--refuse filled_border`, or find the scan before it was resampled",
    "sagittal_slices": "leave out `--refuse sagittal_slices`, or find the axial series",
    "coronal_slices": "leave out `--refuse coronal_slices`, or find the axial series",
    "cone_beam": "leave out `--refuse cone_beam`, or find a CT of the same region",
    "burned_in_annotation": "leave out `--refuse burned_in_annotation` once you have seen the pixels",
    "modality_lut": _CONVERT,
    "not_hu": _CONVERT,
    "bad_rescale": _EXPORT_AGAIN,
    "colour": "a picture of a scan, not the scan: look for the original series",
    "missing_decoder": "install what the text names, then `--retry-quarantined missing_decoder`",
    "unknown_transfer_syntax": "decompress the files first, for example with dcmdjpeg or gdcmconv --raw",
    "no_transfer_syntax": _EXPORT_AGAIN,
    "bad_dicom": _GET_AGAIN,
    "bad_header": _GET_AGAIN,
    "bad_pixels": _GET_AGAIN,
    "no_pixels": _GET_AGAIN,
    "bad_enhanced": _EXPORT_AGAIN,
    "bad_archive": "unpack the archive with another tool and name the folder",
    "encrypted": "unpack the archive with its password and name the folder",
    "damaged_file": _GET_AGAIN,
    "not_nifti": _GET_AGAIN,
    "not_3d": "convert it to a volume with three axes first",
    "single_slice": "one slice is no volume: leave it out",
    "bad_dtype": "convert it to integers or floats first",
    "non_finite": "find out why most voxels are NaN, and convert it again",
    "unreadable": "check that you may read the file; every run tries it again",
    "vanished": "do not move files during a run; every run looks again",
    "decode_memory": "decoding took more memory than the header can explain: take the file for damaged or hostile",
    "decode_time": "decoding took longer than the header can explain: take the file for damaged or hostile",
    "decoder_crashed": "take the file for damaged or hostile; decompress it with another tool to be sure",
    "decoder_killed": _TRIED_AGAIN,
    "out_of_memory": "run again with fewer `--workers`, or on a machine with more memory",
    "worker_lost": "run again with fewer `--workers`; if it stays, the file crashes the decoder",
    "unexpected": "this should not happen: please report it with the text; every run tries again",
}
"""By code; ``{code}`` stands for the code itself. Doubts about HU that may be accepted have one remedy together."""


def remedy(code: str) -> str:
    """Return what to do about a refusal; for a code of another version, where to read about it."""
    known = cast(RefusalCode, code)
    found = REMEDIES.get(known) or (_LOOK if known in ACCEPTABLE else "see docs/reference/verdicts.md")
    return found.replace("{code}", code)
