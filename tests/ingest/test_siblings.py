"""Files named like slices that hold none: a scan may lack its last slices."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maesil.ingest.siblings import missing_slices, pattern_of, stand_ins
from maesil.ingest.verdict import FileVerdict


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(["IM{}.dcm", "{}", "slice_{}", "CT.{}.img"]))
def test_names_that_differ_in_numbers_are_alike(a, b, form):
    assert pattern_of(form.format(a)) == pattern_of(form.format(b))


@pytest.mark.parametrize(
    ("one", "other"),
    [("CT.1.2.840.113619.dcm", "CT.1.3.6.1.4.1.9590.100.1.dcm"), ("9f86d081884c7d.dcm", "60303ae22b9988.dcm"),
     ("IM7.dcm", "IM1234.dcm")],
)  # fmt: skip
def test_uids_and_hashes_are_numbers(one, other):
    assert pattern_of(one) == pattern_of(other)


@pytest.mark.parametrize("other", ["empty.dcm", "IM0001.txt", "._IM0001.dcm", "DICOMDIR", "notes.dcm", "XM0001.dcm"])
def test_other_names_are_not_alike(other):
    assert pattern_of(other) != pattern_of("IM0002.dcm")


SLICES = [Path(f"/x/IM{k:04d}.dcm") for k in range(20)]


@pytest.mark.parametrize(
    ("status", "code"), [("ignored", "empty"), ("ignored", "symlink"), ("ignored", "not_fetched"),
                         ("quarantined", "bad_dicom")],
)  # fmt: skip
def test_a_file_of_the_same_name_without_a_slice_is_a_doubt(status, code):
    doubt = missing_slices(SLICES, stand_ins([FileVerdict(Path("/x/IM0020.dcm"), status, code)]))
    assert doubt is not None and doubt.code == "stand_ins" and code in str(doubt)


@pytest.mark.parametrize(
    "verdict",
    [
        FileVerdict(Path("/y/IM0020.dcm"), "ignored", "empty"),  # another folder
        FileVerdict(Path("/x/lock"), "ignored", "empty"),
        FileVerdict(Path("/x/IM0020.dcm"), "skipped", "not_ct_image"),  # understood
        FileVerdict(Path("/x/IM0020.dcm"), "ignored", "archive"),
        FileVerdict(Path("/x/IM0020.dcm"), "ignored", "not_medical"),
    ],
)
def test_other_files_are_none(verdict):
    assert missing_slices(SLICES, stand_ins([verdict])) is None
