"""The words by which ingest says why a source became no volume. Each is explained in ``docs/reference/verdicts.md``."""

from __future__ import annotations

from typing import Literal, get_args

RefusalCode = Literal[
    "animal", "bad_affine", "bad_archive", "bad_dicom", "bad_dtype", "bad_enhanced", "bad_header", "bad_orientation",
    "bad_pixels", "bad_rescale", "bad_spacing", "bits_stored", "burned_in_annotation", "colour", "colour_picture",
    "cone_beam", "constant", "coronal_slices", "damaged_file", "decode_memory", "decode_time", "decoder_crashed",
    "decoder_killed", "derived_reformat", "drift", "duplicate_pixels", "duplicate_slice", "eight_bit", "encrypted",
    "filled_border", "forms_differ", "frame_of_reference", "frames_without_positions", "gap", "implausible_size",
    "incomplete_series", "irregular_spacing", "localizer", "lossy", "material_map", "metaimage", "missing_decoder",
    "modality_lut", "mr_or_pet", "no_geometry", "no_orientation", "no_pixels", "no_rescale_tags", "no_slice",
    "no_soft_tissue", "no_transfer_syntax", "non_finite", "normalised", "not_3d", "not_ct_image", "not_ct_modality",
    "not_fetched", "not_hu", "not_nifti", "nothing_valid", "nrrd", "odd_background", "offset_1024", "other_archive",
    "out_of_memory", "patient_id_varies", "position_conflict", "positions_rounded", "quadruped", "rescaled_twice",
    "sagittal_slices", "scattered_series", "series_reunited", "several_owners", "single_slice", "size_limit",
    "slice_offset", "stand_ins", "study_uid_varies", "time_series", "too_dense", "too_few_slices", "undeclared_padding",
    "unexpected", "unknown_transfer_syntax", "unreadable", "unsigned", "vanished", "whole_words", "windowed",
    "worker_lost", "woven_passes", "wrapped", "wrong_scale", "zip_method",
]  # fmt: skip
REFUSAL_CODES: tuple[RefusalCode, ...] = get_args(RefusalCode)
