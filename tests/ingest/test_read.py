"""One scan in memory: to the bit what a store holds of it, refused with the code by which ingest refuses it."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from conformance.public import ARCHIVE, Case, names, unpack
from support.ct_cases import CASES, everything
from support.ct_phantom import base_affine
from support.lanes import slow_but
from support.sources import PATIENTS, Workplace, edit_pixel, incomplete, phantom_hu, slices_of

import maesil
from maesil.errors import NoInputError, ScanRefused, UsageError
from maesil.geometry import from_nifti
from maesil.ingest import limits
from maesil.ingest.planning import scan_and_plan
from maesil.ingest.read import CtVolume, read_ct
from maesil.ingest.run import IngestOptions, ingest
from maesil.store.nifti import write_nifti
from maesil.store.reader import SuperpatchReader
from maesil.store.recipe import Recipe
from maesil.store.store import Store
from maesil.synthetic.dicom import SeriesIdentity, write_dicom_series

NATIVE = Recipe(spacing=None, superpatch=32)


def held(source: Path, root: Path, recipe: Recipe = NATIVE) -> tuple[list[CtVolume], set[str]]:
    """What a store holds of each volume of a source, and the codes of the files that became none."""
    options = IngestOptions(workers=0, key_file=root / "key", cache_folder=root / "cache")
    try:
        summary = ingest([source], root / "store.zarr", recipe, options)
    except NoInputError as error:
        return [], {verdict.code for verdict in error.summary.files}
    reader = SuperpatchReader(Store.open(root / "store.zarr"))
    found = []
    for volume in summary.volumes:
        valid, body = (reader.read_map(volume.volume_id, name) for name in ("valid", "body"))
        hu = reader.read_region(volume.volume_id, (0, 0, 0), volume.shape)
        found.append(CtVolume(hu, np.array(volume.affine_lps), valid, body, volume.notes))
    return found, {verdict.code for verdict in summary.files if verdict.status != "used"}


def same(one: CtVolume, other: CtVolume) -> bool:
    arrays = ((getattr(one, name), getattr(other, name)) for name in ("hu", "affine", "valid", "body"))
    return one.notes == other.notes and all(np.array_equal(a, b) for a, b in arrays)


def check(source: Path, work: Path, recipe: Recipe = NATIVE) -> None:
    """Every volume of a source is read as a store holds it, and every other one refused with its code."""
    expected, codes = held(source, work, recipe)
    planned = len(scan_and_plan([source], recipe, IngestOptions(workers=0), lambda *_: None).volumes)
    read, refused = [], set()
    for number in range(1, planned + 1) if planned else [None]:
        try:
            read.append(read_ct(source, recipe=recipe, volume=number))
        except ScanRefused as error:
            refused.add(error.code)
            assert f"refused ({error.code}): " in str(error)
        except NoInputError:
            assert codes <= {"not_medical", "empty", "dicomdir", "symlink", "other_archive", "archive"}
    assert len(read) == len(expected)
    assert all(any(same(one, other) for other in expected) for one in read)
    assert refused <= codes


@pytest.fixture
def series(tmp_path) -> Path:
    write_dicom_series(tmp_path / "in", phantom_hu(), base_affine(), SeriesIdentity(rescale=(0.37, -1024.0)), seed=1)
    return tmp_path / "in"


@pytest.mark.parametrize("spacing", [None, 1.5, (3.0, 1.25, 0.8)])
def test_a_series_is_read_to_the_bit_as_a_store_holds_it(series, tmp_path, spacing):
    read = maesil.read_ct(str(series), spacing)
    given = None if spacing is None else (spacing,) * 3 if isinstance(spacing, float) else spacing
    (expected,), _ = held(series, tmp_path, Recipe(spacing=given, superpatch=32))
    assert same(read, expected)
    assert read.hu.dtype == np.int16 and read.hu.flags.writeable
    np.testing.assert_allclose(read.spacing, given or expected.spacing)


def test_a_nifti_file_keeps_its_place(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", phantom_hu().astype(np.int16), base_affine())
    read = read_ct(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read.hu, np.clip(phantom_hu(), -1024, 3071))
    np.testing.assert_allclose(read.affine, base_affine(), atol=1e-4)
    assert from_nifti(np.eye(4)).shape == read.affine.shape


def test_a_long_scan_made_in_files_is_the_same(series, monkeypatch):
    whole = read_ct(series, 2.0)
    monkeypatch.setattr(limits, "WHOLE_VOXELS", 1000)
    long = read_ct(series, 2.0)
    assert type(long.hu) is np.ndarray and same(long, whole)


FEW = ("clean", "gantry_tilt", "two_phases_told_apart", "one_slice_missing", "file_twice")


@pytest.mark.filterwarnings("ignore:.*beside the volume that is read")
@pytest.mark.parametrize("name", slow_but(everything(), FEW))
def test_every_shared_case_is_read_or_refused_as_by_ingest(name, tmp_path):
    CASES[name].build(tmp_path / "in", f"PATIENT-{name}")
    check(tmp_path / "in", tmp_path)


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> dict[str, Case]:
    return unpack(tmp_path_factory.mktemp("public"))


@pytest.mark.filterwarnings("ignore:.*beside the volume that is read")
@pytest.mark.skipif(not ARCHIVE.is_file(), reason="MAESIL_TEST_DATA holds no public_cases.tar.gz")
@pytest.mark.parametrize("name", slow_but(names(), names()[::6]))
def test_every_public_case_is_read_or_refused_as_by_ingest(public, name, tmp_path):
    check(public[name].source, tmp_path)


def test_of_several_volumes_one_must_be_named(first: Workplace):
    with pytest.raises(UsageError, match=r"expected one volume, found 3; name one by volume=NUMBER.*1: 24 slices") as e:
        read_ct(first.sources)
    assert "\n" not in str(e.value) and "SMITH-42.nii.gz" in str(e.value)
    by_number = [read_ct(first.sources, volume=number) for number in (1, 2, 3)]
    assert len({read.hu.tobytes() for read in by_number}) == 3
    by_name = read_ct(first.sources, volume="SMITH-42")
    assert any(same(by_name, one) for one in by_number)
    for wrong in (4, 0, "nobody", "nifti of SMITH/"[:-1] + "x"):
        with pytest.raises(UsageError, match="found 0 of 3"):
            read_ct(first.sources, volume=wrong)
    with pytest.raises(UsageError, match="found 2 of 3"):
        read_ct(first.sources, volume="export")


def test_what_belongs_to_no_volume_is_told(series):
    path = sorted(series.iterdir())[0]
    edit_pixel(path)
    (series / "cut.dcm").write_bytes(path.read_bytes()[:600])
    with pytest.warns(UserWarning, match="beside the volume that is read there are 1 damaged file"):
        read_ct(series)


def test_refusals_carry_their_code_and_survive_pickling(first: Workplace, tmp_path):
    place = first.copy(tmp_path / "copy")
    shutil.rmtree(place.sources / "nifti of SMITH")
    for path in slices_of(place.sources, PATIENTS[1]):
        path.unlink()
    incomplete(place)
    with pytest.raises(ScanRefused, match=r"refused \(gap\): ") as refused:
        read_ct(place.sources)
    assert refused.value.code == "gap" and refused.value.exit_code == 1
    again = pickle.loads(pickle.dumps(refused.value))
    assert (again.code, str(again)) == ("gap", str(refused.value))
    assert read_ct(place.sources, recipe=Recipe(spacing=None, fill_gaps=1)).shape[0] == 24


def test_what_is_no_scan_is_no_input(tmp_path, first: Workplace):
    (tmp_path / "a.txt").write_text("no scan")
    with pytest.raises(NoInputError, match="none of them CT"):
        read_ct(tmp_path)
    with pytest.raises(NoInputError, match="found nothing there"):
        read_ct(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="found a store"):
        read_ct(first.out)
    for wrong in ((1.0, 2.0), 0.0):
        with pytest.raises(UsageError, match="spacing: expected"):
            read_ct(tmp_path, wrong)


def test_relative_paths_are_found_wherever_the_process_has_moved(tmp_path, monkeypatch):
    for level in (0.0, 50.0):  # files of the same names
        folder = tmp_path / str(level)
        write_dicom_series(folder / "scan", phantom_hu(level), base_affine(), SeriesIdentity(), seed=1)
        monkeypatch.chdir(folder)
        np.testing.assert_array_equal(read_ct("scan").hu, read_ct(folder / "scan").hu)
