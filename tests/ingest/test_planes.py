"""Volumes on disk: the same values as in memory, and stores that are equal to the bit whichever way they were made."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ct_encodings  # noqa: F401 (it adds its cases)
from support.ct_cases import CASES
from support.ct_phantom import base_affine
from support.sources import phantom_hu

from maesil.errors import Refused
from maesil.ingest import isolated, limits, planes
from maesil.ingest.filled import hanging_together
from maesil.ingest.plan import make_plan
from maesil.ingest.planes import OnDisk, Turned, like, slabs, strided, turned, zeros
from maesil.ingest.scan import scan
from maesil.ingest.stack import SeriesRules
from maesil.ingest.volume import BuildOrder, build
from maesil.store.nifti import write_nifti
from maesil.store.recipe import Recipe
from maesil.store.store import Store
from maesil.synthetic.dicom import SeriesIdentity, write_dicom_series

ORDERS = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]


def on_disk(values: np.ndarray, folder: Path) -> OnDisk:
    volume = OnDisk(planes.temporary_file(folder, values.nbytes + 3), folder, values.shape, values.dtype, offset=3)
    for z, plane in enumerate(values):
        volume[z] = plane
    return volume


@pytest.mark.parametrize("dtype", [np.float32, np.int16, bool])
def test_a_volume_on_disk_gives_what_was_written(tmp_path, dtype):
    values = np.random.default_rng(0).integers(0, 2, (70, 33, 41)).astype(dtype)
    volume = on_disk(values, tmp_path)
    assert (len(volume), volume.shape, volume.dtype) == (70, (70, 33, 41), np.dtype(dtype))
    np.testing.assert_array_equal(np.stack(list(volume)), values)
    for index in (5, -1, slice(60, 90), slice(3, 3), (slice(2, 70), slice(4, 9), 7), (4, 5)):
        np.testing.assert_array_equal(volume[index], values[index])
    volume[10:12] = values[20:22]
    volume[-1] = values[0]
    np.testing.assert_array_equal(volume[10:12], values[20:22])
    np.testing.assert_array_equal(volume[69], values[0])
    assert not list(tmp_path.iterdir())  # the file has no name
    with pytest.raises(ValueError, match="read-only"):
        volume[0][0, 0] = 1
    with pytest.raises(IndexError):
        volume[::-1]
    with pytest.raises(IndexError):
        volume[70]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("flip", [(False, False, False), (True, False, True), (True, True, True)])
def test_turned_volumes_are_those_of_numpy(tmp_path, monkeypatch, order, flip):
    monkeypatch.setattr(planes, "_TRANSPOSED", 16)
    values = np.random.default_rng(1).normal(size=(21, 34, 41)).astype(np.float32)
    expected = turned(values, order, flip)
    found = turned(on_disk(values, tmp_path), order, flip)
    assert isinstance(found, Turned) and found.shape == expected.shape
    np.testing.assert_array_equal(np.stack(list(found)), expected)
    np.testing.assert_array_equal(found[3:17], expected[3:17])
    assert isinstance(like(found, bool), OnDisk)
    with pytest.raises(TypeError):
        found[0] = expected[0]


def test_only_large_volumes_go_to_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "WHOLE_VOXELS", 999)
    assert isinstance(zeros((10, 10, 10), np.int16, tmp_path), OnDisk)
    assert isinstance(zeros((9, 10, 10), np.int16, tmp_path), np.ndarray)
    assert not zeros((10, 10, 10), np.int16, tmp_path)[4].any()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0.05, 0.9), size=st.sampled_from([4, 8, 200]))
def test_what_hangs_together_does_not_depend_on_slabs(tmp_path_factory, seed, share, size):
    """Tunnels that wind through many slabs, there and back."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((12, 6, 6)) > share
    mask = coarse.repeat(4, 0).repeat(4, 1).repeat(4, 2)
    mask &= rng.random(mask.shape) > 0.001
    expected = hanging_together(mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maesil.ingest.filled.slabs", lambda length: slabs(length, size))
        np.testing.assert_array_equal(hanging_together(mask), expected)
        found = hanging_together(on_disk(mask, tmp_path_factory.mktemp("masks")))
    np.testing.assert_array_equal(np.stack(list(found)), expected)
    parts = strided(mask, (slice(1, None, 5), slice(0, None, 3), slice(2, None, 2)))
    np.testing.assert_array_equal(parts, mask[1::5, ::3, 2::2])


def long_phantom() -> np.ndarray:
    """Three times the phantom, end to end, so that there are several slabs of it."""
    hu = phantom_hu()
    return np.concatenate([hu, hu[::-1], hu])


def as_dicom(folder: Path) -> None:
    write_dicom_series(folder, long_phantom(), base_affine(), SeriesIdentity(rescale=(0.37, -1024.0)), seed=1)


def with_padding(folder: Path) -> None:
    hu = long_phantom()
    hu[:, :4] = -3000
    hu[:, 4:6, 3:5] = -2950
    write_dicom_series(folder, hu, base_affine(), SeriesIdentity(), seed=1)


def with_a_gap(folder: Path) -> None:
    as_dicom(folder)
    sorted(folder.iterdir())[11].unlink()


def tilted(folder: Path) -> None:
    affine = base_affine()
    affine[:3, 0] += 0.25 * affine[:3, 1]
    write_dicom_series(folder, long_phantom(), affine, SeriesIdentity(), seed=1)


def as_nifti(folder: Path) -> None:
    hu = long_phantom().astype(np.float32)
    hu[3, 4, 5] = np.nan
    write_nifti(folder / "a.nii.gz", hu, base_affine())


def sagittal(folder: Path) -> None:
    """Slices from left to right: the slow axis of the file is not the slow one of the store."""
    write_nifti(folder / "a.nii.gz", long_phantom().transpose(2, 0, 1), base_affine()[:, [2, 0, 1, 3]])


def with_filling(folder: Path) -> None:
    hu = long_phantom() + np.random.default_rng(0).normal(0, 20, long_phantom().shape)
    hu[:, :9, :12] = 0
    write_nifti(folder / "a.nii.gz", np.rint(hu).astype(np.int16), base_affine())


def as_enhanced(folder: Path) -> None:
    CASES["enhanced_frames_shuffled"].build(folder, "PATIENT")


SCANS = [as_dicom, as_enhanced, with_padding, with_a_gap, tilted, as_nifti, sagittal, with_filling]


def built(tmp_path: Path, name: str, spacing, source_folder: Path):
    recipe = Recipe(spacing=spacing, superpatch=16, fill_gaps=1)
    (item,) = make_plan(scan([source_folder]), SeriesRules(fill_gaps=1)).volumes
    store = Store.create(tmp_path / name, recipe, "0" * 16)
    found = isolated.source_hash(item.source, store.path)
    volume = build(item.source, BuildOrder(store.path, recipe, "ab" * 16, "cd" * 16, "", "ef" * 16))
    assert volume.source_hash == found
    assert not [path for path in store.path.iterdir() if path.is_file() and path.name != "zarr.json"]
    return item.source, volume, store


def what_it_is(volume, store: Store) -> dict:
    """All of a record that is not the attempt's own, and every byte that was written."""
    document = {name: value for name, value in vars(volume).items() if name not in ("attempt", "superpatches")}
    patches = [{**asdict(patch), "path": patch.path.split(volume.attempt)[1]} for patch in volume.superpatches]
    folder = store.path / volume.prefix
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {**document, "superpatches": patches, "files": files}


SPACINGS = {"native": None, "coarse": (1.5, 1.5, 1.5), "mixed": (3.0, 0.7, 0.9)}


@pytest.mark.parametrize(
    ("make", "spacing"),
    [
        pytest.param(make, spacing, marks=[] if of_make % 3 == of_spacing else pytest.mark.slow)
        for of_make, make in enumerate(SCANS)
        for of_spacing, spacing in enumerate(SPACINGS)
    ],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_a_store_is_the_same_to_the_bit_whether_its_volume_was_in_memory_or_on_disk(
    tmp_path, monkeypatch, make, spacing
):
    make(tmp_path / "in")
    whole, in_memory, store = built(tmp_path, "memory", SPACINGS[spacing], tmp_path / "in")
    assert not whole.is_long
    monkeypatch.setattr(limits, "WHOLE_VOXELS", 1000)
    long, on_disk, other = built(tmp_path, "disk", SPACINGS[spacing], tmp_path / "in")
    assert long.is_long
    assert what_it_is(on_disk, other) == what_it_is(in_memory, store)


def deleted_files(pid: int | str, folder: Path) -> list[str]:
    links = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()]
    return [link for link in links if link.startswith(str(folder)) and link.endswith("(deleted)")]


def test_the_file_is_gone_once_nobody_works_on_it(tmp_path, monkeypatch):
    """The child waits for the next source: it must not keep the disk full meanwhile."""
    monkeypatch.setattr(limits, "WHOLE_VOXELS", 1000)
    as_nifti(tmp_path / "in")
    (item,) = make_plan(scan([tmp_path / "in"])).volumes
    read, _ = isolated.read_hashed(item.source, folder=tmp_path)
    child = isolated._child()._process
    assert child is not None and deleted_files("self", tmp_path)
    deadline = time.monotonic() + 10  # it answers before it lets go
    while deleted_files(child.pid, tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not deleted_files(child.pid, tmp_path)
    del read
    gc.collect()
    assert not deleted_files("self", tmp_path)


def test_a_claim_that_its_files_are_too_small_for_is_refused(tmp_path, monkeypatch):
    """Slices of a few hundred bytes that unpack to gigabytes: the disk is as little theirs as memory is."""
    monkeypatch.setattr(limits, "WHOLE_VOXELS", 1000)
    as_dicom(tmp_path / "in")
    for path in (tmp_path / "in").iterdir():
        path.write_bytes(path.read_bytes()[:-3000])
    assert make_plan(scan([tmp_path / "in"])).volumes
    monkeypatch.setattr("maesil.ingest.source_file.RATIO_MATTERS_ABOVE", 1000)
    monkeypatch.setattr("maesil.ingest.source_file.MAX_RATIO", 1)
    plan = make_plan(scan([tmp_path / "in"]))
    assert not plan.volumes
    assert [series.refusal.code for series in plan.refused] == ["size_limit"]


@pytest.mark.parametrize("shape", [(2**13, 2**10, 2**10 + 1), (0, 4, 4)])
def test_more_than_any_scanner_makes_is_refused(shape):
    with pytest.raises(Refused, match="voxels"):
        limits.check_voxels(shape)
    limits.check_voxels((1100, 1024, 1024))


PEAK = """
import os, re, sys
from pathlib import Path
from maesil.ingest import isolated, limits
from maesil.ingest.run import IngestOptions, ingest
from maesil.store.recipe import Recipe
limits.WHOLE_VOXELS = int(sys.argv[2])
root = Path(sys.argv[1])
options = IngestOptions(workers=0, key_file=root / "key", cache_folder=root / "cache")
summary = ingest([root / "in"], root / "store", Recipe(spacing=None, superpatch=64), options)
assert len(summary.committed) == 1, summary.files
pids = os.getpid(), isolated._child()._process.pid
print(max(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) for pid in pids))
"""


def peak_kib(folder: Path, slices: int, whole: int) -> int:
    rng = np.random.default_rng(0)
    hu = np.rint(phantom_hu().repeat(6, axis=1).repeat(5, axis=2)).astype(np.int16)
    hu += rng.integers(-20, 20, hu.shape).astype(np.int16)
    turns = np.concatenate([hu, hu[::-1]])
    fine = base_affine() @ np.diag([0.25, 0.25, 0.25, 1])  # the body is looked for in voxels of 3 mm, held in memory
    write_nifti(folder / "in" / "a.nii", np.resize(turns, (slices, *hu.shape[1:])), fine)
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), str(whole)], capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_a_scan(tmp_path):
    """400 slices more are 23 million voxels: 10 bytes each are 230 MB where a scan is held whole."""
    short, long = (peak_kib(tmp_path / str(n), n, 1 << 20) for n in (120, 520))
    assert long - short < 60 << 10
    assert peak_kib(tmp_path / "whole", 520, 1 << 30) - short > 120 << 10  # what is measured here
