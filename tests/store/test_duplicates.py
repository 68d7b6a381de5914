"""Copies of one scan are one patient, whatever they are called and however they were resampled."""

from __future__ import annotations

import os
from collections import Counter
from functools import cache
from itertools import cycle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import SimpleITK as sitk
from support.copies import COPIES
from support.labelled import SPACING as LABELLED_SPACING
from support.labelled import affine_of, phantom
from support.lanes import slow_but
from support.stores import add_volume, make_store

from maesil.ingest.maps import body_map
from maesil.ingest.run import IngestOptions, ingest
from maesil.store import duplicates
from maesil.store.duplicates import NEW, copies, merge_groups, same_scan
from maesil.store.index import VOLUMES_KEY, patients, write_index
from maesil.store.nifti import write_nifti
from maesil.store.recipe import Recipe
from maesil.store.store import Store
from maesil.store.thumbnails import THUMBNAILS_KEY, _averaging, thumbnail, thumbnails


@cache
def patient(seed: int, spacing: tuple[float, float, float], start: float = 0.0) -> np.ndarray:
    """An ellipsoid of waves in air, a known function of position (mm): int16 HU of a box of 240 mm from ``start``."""
    rng = np.random.default_rng(seed)
    axes = [np.arange(int(240 / mm)) * mm - 120 + mm / 2 + start for mm in spacing]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    waves = [np.sin(k @ np.stack([z, y, x]).reshape(3, -1) + phase) for k, phase in
             zip(rng.normal(0, 0.04, (12, 3)), rng.uniform(0, 6, 12), strict=True)]  # fmt: skip
    inside = (z / 100) ** 2 + (y / 80) ** 2 + (x / 95) ** 2 < 1
    hu = np.where(inside, 60 * np.sum(waves, axis=0).reshape(z.shape), -1000)
    return np.rint(hu + np.random.default_rng(0).normal(0, 15, hu.shape)).astype(np.int16)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = make_store(tmp_path_factory.mktemp("same") / "s", [], superpatch=64)
    for name, seed, spacing, start in (
        ("fine", 1, (3.0, 3.0, 3.0), 0.0),
        ("coarse", 1, (5.0, 4.0, 4.0), 0.0),
        ("moved", 2, (3.0, 3.0, 3.0), 13.0),
        ("other", 2, (3.0, 3.0, 3.0), 0.0),
        ("third", 3, (4.0, 3.0, 3.0), 0.0),
    ):
        add_volume(store, patient(seed, spacing, start), name=name, group=name, spacing=spacing)
    return store


def test_a_scan_is_known_again_resampled_and_moved_and_others_are_not(store):
    merged = {"fine": "coarse", "coarse": "coarse", "other": "moved", "moved": "moved", "third": "third"}
    assert patients([store]) == merged


def test_the_index_keeps_thumbnails_and_says_who_is_whom(store, monkeypatch):
    before = thumbnails(store)
    write_index(store)
    monkeypatch.setattr("maesil.store.thumbnails.read_thumbnail", None)  # nothing is read but the table
    kept = thumbnails(Store.open(store.path))
    assert list(kept) == list(before) and all(np.array_equal(kept[name], before[name]) for name in before)
    table = pq.read_table(store.path / VOLUMES_KEY).to_pylist()
    assert {row["group"]: row["patient"] for row in table} == patients([store])


@pytest.mark.parametrize("damage", [b"", b"PAR1"])
def test_a_damaged_table_of_thumbnails_is_done_without(store, damage):
    before = thumbnails(store)
    store.storage.put(THUMBNAILS_KEY, damage)
    assert all(np.array_equal(one, before[name]) for name, one in thumbnails(store).items())


def test_a_scan_is_known_again_in_another_store(store, tmp_path):
    other = make_store(tmp_path / "s", [], superpatch=64)
    add_volume(other, patient(3, (3.0, 3.0, 3.0)), name="x", group="again", spacing=(3.0, 3.0, 3.0))
    assert patients([store, other])["third"] == "again"


def test_thumbnails_have_cells_of_8_mm(store):
    found = thumbnails(store)
    by_name = {volume.group: found[volume.volume_id] for volume in store.volumes()}
    assert np.abs(np.subtract(by_name["fine"].shape, by_name["coarse"].shape)).max() <= 1
    assert np.abs(np.subtract(by_name["fine"].shape, (25, 20, 24))).max() <= 1


def test_many_are_compared_without_comparing_all_pairs_in_full(monkeypatch):
    rng = np.random.default_rng(0)
    many = [rng.integers(0, 255, (20, 20, 20), np.uint8).repeat(2, 0)[:20] for _ in range(300)]
    compared = []
    real = duplicates._correlation_near
    monkeypatch.setattr(duplicates, "_correlation_near", lambda *given: compared.append(1) or real(*given))
    names = [str(n) for n in range(301)]
    assert merge_groups(names, [*many, many[7]]) == {name: name for name in names} | {"300": "300", "7": "300"}
    assert len(compared) < 10


def test_a_scan_that_a_group_holds_twice_is_compared_once(monkeypatch):
    """A run keeps the thumbnails of the very store that is scored."""
    found = [np.full((2, 2, 2), value, np.uint8) for value in range(3)]
    compared = []
    monkeypatch.setattr(duplicates, "_guesses", lambda found, _: compared.append(len(found)) or iter(()))
    merge_groups(["a", "b", "c"] * 2, found * 2)
    merge_groups(["a", "b", "c", "d"], [*found, found[0]])
    assert compared == [3, 4]


def test_the_correlation_is_that_of_the_cells_which_show_tissue_in_both():
    rng = np.random.default_rng(0)
    a, b = (np.where(rng.random((20, 15, 18)) < 0.8, rng.normal(100, 30, (20, 15, 18)), 0) for _ in range(2))
    a, b = (np.maximum(one, 0).astype(np.float32) for one in (a + b, b))
    shift = (1, -2, 0)
    x, y = a[1:, :13], b[:19, 2:]
    both = (x > 0) & (y > 0)
    expected = np.corrcoef(x[both], y[both])[0, 1]
    assert duplicates._correlation(a, b, shift) == pytest.approx(expected, abs=1e-6)
    assert duplicates._correlation(a, b, (0, 0, 0)) > 0.5 > abs(expected)
    assert duplicates._correlation(np.full_like(a, 255), np.full_like(b, 7), shift) == -1


SPACING = (3.0, 3.0, 3.0)


SCANS = sorted(Path(os.environ.get("MAESIL_TEST_DATA", "no such folder")).glob("nifti/qin_*.nii.gz"))


def thumbnail_of(hu: np.ndarray, spacing: tuple[float, float, float] = SPACING) -> np.ndarray:
    hu = np.ascontiguousarray(hu)
    valid = np.full([-(-n // 8) for n in hu.shape], 255, np.uint8)
    return thumbnail(hu, body_map(hu, valid, spacing), spacing)


@pytest.mark.parametrize("change", COPIES.values(), ids=list(COPIES))
@pytest.mark.parametrize("seed", slow_but((1, 2, 3), (1,)))
def test_a_changed_copy_is_known_again(seed, change):
    hu = patient(seed, SPACING)
    one, copy = thumbnail_of(hu), thumbnail_of(change(hu))
    assert same_scan(one, copy) and same_scan(copy, one)


def test_changed_scans_of_others_are_not_taken_for_a_copy():
    names = list(COPIES)[::3]
    found = [thumbnail_of(COPIES[name](patient(seed, SPACING))) for seed in (4, 5) for name in names]
    merged = merge_groups([f"{seed} {name}" for seed in (4, 5) for name in names], found)
    assert all(group[0] == leader[0] for group, leader in merged.items())
    assert len(set(merged.values())) == 2


@cache
def mixed() -> tuple[list[np.ndarray], set[tuple[int, int]]]:
    """Scans, changed copies of them, and noise; and which two are one scan, each two compared alone."""
    scans = [patient(seed, (6.0, 6.0, 6.0)) for seed in (1, 2)]
    copies = [COPIES[name](scans[n % 2]) for n, name in enumerate(list(COPIES)[::2])]
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, shape, np.uint8) for shape in rng.integers((16, 14, 18), (26, 22, 26), (2, 3))]
    found = [*(thumbnail_of(one, (6.0, 6.0, 6.0)) for one in (*scans, *copies)), *noise, noise[0].copy()]
    same = {(i, j) for j in range(len(found)) for i in range(j) if same_scan(found[i], found[j])}
    return found, same


def test_the_pairs_are_those_of_comparing_each_two_alone():
    found, same = mixed()
    assert {tuple(sorted(pair)) for pair in copies(found, lambda i, j: True)} == same
    assert len(same) > 6  # else there is nothing to find


def test_what_was_compared_before_is_not_compared_again():
    """Whatever was compared with each other: the pairs of the rest are found, and no other."""
    found, same = mixed()
    numbers = np.random.default_rng(4).choice([NEW, 0, 1], len(found)).tolist()
    before = {(i, j) for i, j in same if numbers[i] == numbers[j] != NEW}
    assert {tuple(sorted(pair)) for pair in copies(found, lambda i, j: True, numbers)} == same - before
    names = [str(n) for n in range(len(found))]
    joined = [(names[i], names[j]) for i, j in before]
    assert 0 < len(before) < len(same)
    assert merge_groups(names, found, numbers, joined) == merge_groups(names, found)


@pytest.mark.parametrize("patients", [pytest.param(range(14), marks=pytest.mark.slow, id="14"), range(4)])
def test_phantoms_of_one_design_are_not_taken_for_one_patient(patients):
    """They are more alike than patients."""
    found = [thumbnail_of(phantom(seed, (48, 34, 48), affine_of())[0], LABELLED_SPACING) for seed in patients]
    names = [str(seed) for seed in patients]
    assert merge_groups(names, found) == {name: name for name in names}


@pytest.mark.slow
@pytest.mark.skipif(not SCANS, reason="MAESIL_TEST_DATA names no folder with scans")
def test_real_scans_are_known_again_and_kept_apart():
    """Of each scan the whole, and one changed copy in turn; no two patients become one."""
    whole, copies, groups = [], [], []
    for path, change in zip(SCANS, cycle(COPIES.values())):
        hu = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(np.int16)
        whole.append(thumbnail_of(hu, (2.0, 2.0, 2.0)))
        copies.append(thumbnail_of(change(hu), (2.0, 2.0, 2.0)))
        groups.append(path.name)
    merged = merge_groups([*groups, *(f"copy of {name}" for name in groups)], [*whole, *copies])
    assert len({merged[name] for name in groups}) == len(groups)
    assert [merged[f"copy of {name}"] for name in groups] == [merged[name] for name in groups]


def test_a_thumbnail_holds_means():
    values = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    by_half = np.repeat(values, 2, axis=0)  # 2.5 voxels are 5 halves
    for edges, expected in (
        (np.arange(0, 13, 3.0), values.reshape(4, 3, 3).mean(axis=1)),
        (np.arange(0, 11, 2.5), by_half[:20].reshape(4, 5, 3).mean(axis=1)),
        (np.array([0.5, 3.5]), by_half[1:7].mean(axis=0, keepdims=True)),
    ):
        np.testing.assert_allclose(_averaging(12, edges) @ values, expected, atol=1e-6)


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """One patient as three NIfTI files of other spacings, axis orders and directions, and another patient."""
    folder = tmp_path_factory.mktemp("turned")
    scans = {"one": (1, (3.0, 3.0, 3.0)), "two": (1, (4.0, 3.2, 3.5)), "three": (2, (3.0, 3.0, 3.0))}
    for name, (seed, spacing) in scans.items():
        affine = np.diag([0.0, 0.0, 0.0, 1.0])
        affine[2, 0], affine[1, 1], affine[0, 2] = spacing
        hu = patient(seed, spacing)
        write_nifti(folder / f"{name}.nii.gz", hu, affine)
        if name == "one":  # x y z in another order, two of them backwards; the affine says so
            order = affine[:, [2, 0, 1, 3]].copy()
            turned = hu.transpose(2, 0, 1)[::-1, :, ::-1]
            order[:3, 3] = affine[:3, 2] * (hu.shape[2] - 1) + affine[:3, 1] * (hu.shape[1] - 1)
            order[:3, [0, 2]] *= -1
            write_nifti(folder / "renamed.nii.gz", np.ascontiguousarray(turned), order)
    return folder


def test_copies_through_ingest_are_one_patient(turned, tmp_path):
    options = IngestOptions(workers=0, key_file=tmp_path / "key", cache_folder=tmp_path)
    summary = ingest([turned], tmp_path / "s", Recipe(spacing=(3.5, 3.5, 3.5), superpatch=64), options)
    assert len(summary.volumes) == 4
    counts = Counter(patients([Store.open(tmp_path / "s")]).values())
    assert sorted(counts.values()) == [1, 3]


DATA = Path(os.environ.get("MAESIL_TEST_DATA", "no such folder"))


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="MAESIL_TEST_DATA names no folder")
@pytest.mark.parametrize("mm", [4.0])
def test_the_dicom_and_nifti_copies_of_a_real_scan_are_one_patient(tmp_path, mm):
    names = ("qin_lung_01_0013_2mm", "qin_lsc_0014_2mm", "qin_lsc_0028_2mm")
    sources = [DATA / "dicom" / "qin_lung_01_0013", *(DATA / "nifti" / f"{name}.nii.gz" for name in names)]
    options = IngestOptions(workers=0, key_file=tmp_path / "key", cache_folder=tmp_path)
    ingest(sources, tmp_path / "s", Recipe(spacing=(mm, mm, mm), superpatch=128), options)
    store = Store.open(tmp_path / "s")
    leaders = patients([store])
    same = {v.group for v in store.volumes() if v.source["kind"] == "dicom"}
    (leader,) = {leaders[group] for group in same}
    assert Counter(leaders.values())[leader] == 2 and len(set(leaders.values())) == 3


def test_empty_and_flat_thumbnails_match_nothing():
    flat, empty = np.zeros((4, 4, 4), np.uint8), np.zeros((0, 0, 0), np.uint8)
    assert not same_scan(flat, flat)
    assert not same_scan(empty, empty)
