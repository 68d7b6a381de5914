"""The twists of `support.ct_cases` in one source tree, ingested once and scored in world space."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from support.ct_cases import CASES, Case, everything
from support.ct_encodings import outside_circle
from support.ct_phantom import SHAPE, score_world, valid_voxels
from support.lanes import slow_but

from maesil.ingest.run import IngestOptions, ingest
from maesil.ingest.verdict import STATUSES
from maesil.store.reader import SuperpatchReader
from maesil.store.recipe import Recipe
from maesil.store.store import Store

REPEATED = (
    "instance_numbers_absent", "instance_numbers_constant", "no_ImageOrientationPatient", "no_PixelSpacing",
    "slope_differs", "no_rescale_values_plus_1024", "padding_of_several_values", "jpeg_2000_signed",
    "cut_jpeg_ls", "cut_jpeg_2000", "cut_htj2k", "cut_jpeg_lossless",
    "shortened_rle", "shortened_jpeg_ls", "shortened_htj2k", "shortened_jpeg_lossless",
    "last_slices_empty", "last_slices_are_links_to_nowhere", "last_slice_cut_within_its_header",
    "last_slices_left_in_the_cloud", "last_slices_are_web_pages",
    "uids_blanked_and_spread_over_folders", "uids_blanked_in_two_folders",
    "two_phases_half_a_step_apart", "two_phases_by_their_time", "two_phases_and_a_number_for_every_slice",
    "series_uid_of_its_own_for_each_slice_and_a_gap", "all_uids_of_their_own_for_each_slice",
    "two_phases_with_series_uids_of_their_own_for_each_slice", "frame_of_reference_of_its_own_for_each_slice",
    "frame_of_reference_absent_from_half_of_the_slices", "two_acquisitions_60_mm_apart",
    "positions_of_one_decimal_and_a_slice_missing", "one_slice_aside_by_a_fifth_of_a_millimetre",
    "metal_in_more_bits_than_the_header_says_in_rle", "enhanced_monochrome1_compressed", "enhanced_in_two_parts",
)  # fmt: skip
"""Cases of the slow lane: another one, of the fast lane, has the same fault in other slices or in another encoding."""
ALWAYS = ("clean", "two_patients", "two_patients_one_series_uid", "two_series_same_name")
"""What tests of no one case look at."""


def in_lanes(names: Iterable[str]) -> list:
    names = list(names)
    return slow_but(names, [name for name in names if name not in REPEATED])


class Ingested:
    """The result of one ingest over the cases that are asked for."""

    def __init__(self, root: Path, names: Iterable[str]) -> None:
        self.sources = root / "sources"
        for name in names:
            CASES[name].build(self.sources / name, f"PATIENT-{name}")
        options = IngestOptions(workers=0, key_file=root / "key", cache_folder=root / "cache")
        out = root / "store.zarr"
        self.summary = ingest([self.sources], out, Recipe(spacing=None, superpatch=64), options)
        self.store = Store.open(out)
        self.volumes = {volume.volume_id: volume for volume in self.store.volumes()}
        self.reader = SuperpatchReader(self.store)
        self.by_case: dict[str, list] = defaultdict(list)
        for verdict in self.summary.files:
            self.by_case[str(verdict.path).removeprefix(f"{self.sources}/").partition("/")[0]].append(verdict)

    def verdicts(self, name: str) -> list:
        return self.by_case[name]

    def volumes_of(self, name: str) -> list:
        used = [verdict for verdict in self.verdicts(name) if verdict.status == "used"]
        ids = {volume_id for verdict in used for volume_id in (verdict.volume_id, *verdict.more_volumes)}
        return [self.volumes[volume_id] for volume_id in sorted(ids)]

    def hu(self, name: str) -> np.ndarray:
        (volume,) = self.volumes_of(name)
        return self.reader.read_region(volume.volume_id, (0, 0, 0), volume.shape)


@pytest.fixture(scope="module")
def ingested(request, tmp_path_factory) -> Ingested:
    """All cases of the tests that will run."""
    here = [item for item in request.session.items if item.path == request.path]
    asked = {item.callspec.params["name"] for item in here if hasattr(item, "callspec")} | {*ALWAYS}
    return Ingested(tmp_path_factory.mktemp("hard_dicom"), [name for name in everything() if name in asked])


@pytest.mark.parametrize("name", in_lanes(everything()))
def test_volumes_are_right_or_refused(ingested: Ingested, name: str) -> None:
    expected: Case = CASES[name]
    verdicts, volumes = ingested.verdicts(name), ingested.volumes_of(name)
    found = [(verdict.status, verdict.code) for verdict in verdicts]
    if expected.refusal_is_right_too and not volumes:
        assert all(status == "quarantined" for status, _ in found)
        return
    assert len(volumes) == expected.volumes, found
    assert sum(status == "used" for status, _ in found) == expected.used
    for volume in volumes:
        score = score_world(ingested.store, volume.volume_id, reader=ingested.reader)
        assert score.max_error <= expected.max_error
        assert score.mean_error <= expected.mean_error
        assert score.valid >= 0.4 * score.voxels
        assert set(expected.notes) <= set(volume.notes)
        if expected.shape is not None:
            assert volume.shape == expected.shape


@pytest.mark.parametrize("name", in_lanes(everything()))
def test_every_file_has_one_verdict(ingested: Ingested, name: str) -> None:
    folder = ingested.sources / name
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    verdicts = [verdict for verdict in ingested.verdicts(name) if not verdict.path.is_symlink()]
    assert sorted(verdict.path for verdict in verdicts) == files
    assert all(verdict.status in STATUSES and verdict.code for verdict in verdicts)


@pytest.mark.parametrize("name", in_lanes(name for name in everything() if CASES[name].status or CASES[name].code))
def test_refusals_carry_their_code(ingested: Ingested, name: str) -> None:
    left = [verdict for verdict in ingested.verdicts(name) if verdict.status != "used"]
    assert left
    if CASES[name].status == "quarantined":  # single files may be skipped besides
        assert any(verdict.status == "quarantined" for verdict in left)
    else:
        assert {verdict.status for verdict in left} == {CASES[name].status}
    if CASES[name].code:
        assert {verdict.code for verdict in left} == {CASES[name].code}


PADDED = ("padding_value", "padding_value_not_declared", "padding_of_zero_hu_in_the_corners")
OTHERWISE_SAMPLED = (*PADDED, "acquired_sagittal")
UNTOUCHED = [name for name in everything() if CASES[name].clean and name not in OTHERWISE_SAMPLED]


@pytest.mark.parametrize("name", in_lanes(UNTOUCHED))
def test_equals_the_clean_series(ingested: Ingested, name: str) -> None:
    np.testing.assert_array_equal(ingested.hu(name), ingested.hu("clean"))
    (volume,), (clean,) = ingested.volumes_of(name), ingested.volumes_of("clean")
    np.testing.assert_allclose(volume.affine, clean.affine, atol=1e-5)


@pytest.mark.parametrize("name", PADDED)
def test_padding_is_air_outside_the_valid_map(ingested: Ingested, name: str) -> None:
    (volume,) = ingested.volumes_of(name)
    outside = np.broadcast_to(outside_circle(), SHAPE)
    hu = ingested.hu(name)
    assert (hu[outside] == -1024).all()
    np.testing.assert_array_equal(hu[~outside], ingested.hu("clean")[~outside])
    assert not valid_voxels(ingested.reader, volume)[outside].any()
    share = ingested.reader.read_map(volume.volume_id, "valid")
    assert share[0, 0, 0] < 128 and share[1, 2, 3] == 255


def test_totals_add_up(ingested: Ingested) -> None:
    files = [path for path in ingested.sources.rglob("*") if path.is_file()]
    regular = [verdict for verdict in ingested.summary.files if not verdict.path.is_symlink()]
    assert len(regular) == len(files)
    assert sum(ingested.summary.counts.values()) == len(ingested.summary.files)


@pytest.mark.parametrize("name", ["two_patients", "two_patients_one_series_uid"])
def test_two_patients_are_two_groups(ingested: Ingested, name: str) -> None:
    assert len({volume.group for volume in ingested.volumes_of(name)}) == 2


def test_series_of_one_patient_share_a_group(ingested: Ingested) -> None:
    assert len({volume.group for volume in ingested.volumes_of("two_series_same_name")}) == 1


@pytest.mark.parametrize("name", ["jpeg_ls_lossy", "jpeg_ls_lossy_without_the_tag"])
def test_lossy_is_noted(ingested: Ingested, name: str) -> None:
    (volume,) = ingested.volumes_of(name)
    assert any("lossy" in note for note in volume.notes)


def test_no_identity_reaches_the_store(ingested: Ingested) -> None:
    uids = [b"1.2.826.0.1.3680043.8.498", b"etc/x", b"etc/passwd", b"PATIENT-", b"Synthetic"]
    for path in ingested.store.path.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not [uid for uid in uids if uid in data], path


@pytest.mark.slow
def test_a_second_run_does_nothing(ingested: Ingested) -> None:
    before = {path: path.stat().st_mtime_ns for path in ingested.store.path.rglob("*.json")}
    root = ingested.sources.parent
    options = IngestOptions(workers=0, key_file=root / "key", cache_folder=root / "cache")
    again = ingest([ingested.sources], ingested.store.path, Recipe(spacing=None, superpatch=64), options)
    assert not again.committed
    assert again.counts == ingested.summary.counts
    commits = {path: time for path, time in before.items() if "commits" in path.parts}
    assert commits == {path: path.stat().st_mtime_ns for path in commits}
