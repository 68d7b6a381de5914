"""Labels are found by volume id and placed in world space, whatever grid they come on."""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.labelled import affine_of, labelled_store, phantom

from maesil.downstream.labels import UNLABELLED, load_labels, nearest_on_grid
from maesil.errors import NoInputError, UsageError
from maesil.geometry import to_nifti, world_of
from maesil.store.nifti import write_nifti
from maesil.synthetic.phantom import ORGANS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return labelled_store(tmp_path_factory.mktemp("labels"), 2)


def at_zero(affine: np.ndarray) -> np.ndarray:
    """The affine as if the phantom's grid began at the store's origin, which is 0."""
    moved = affine.copy()
    moved[:3, 3] -= affine_of()[:3, 3]
    return moved


def test_labels_on_the_volume_s_own_grid_come_back_as_they_are(world, tmp_path):
    _, folder, volumes = world
    labels = load_labels(folder, volumes, tmp_path)
    assert labels.classes == ORGANS and labels.notes == ("labels of 2 of 2 volumes",)
    for seed, volume in enumerate(volumes):
        _, organs = phantom(seed, volume.shape, affine_of())
        assert np.array_equal(labels.of(volume), organs)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_nearest_label_in_the_world_is_taken_on_any_two_grids(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 9, tuple(rng.integers(3, 9, 3))).astype(np.uint8)

    def a_grid() -> np.ndarray:
        turned, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        affine = np.eye(4)
        affine[:3, :3] = turned * rng.uniform(0.7, 3.0, 3)
        affine[:3, 3] = rng.uniform(-5, 5, 3)
        return affine

    of_labels, of_volume = a_grid(), a_grid()
    shape = tuple(int(n) for n in rng.integers(2, 7, 3))
    found = nearest_on_grid(labels, of_labels, shape, of_volume)
    centres = world_of(of_labels, np.stack(np.indices(labels.shape), -1).reshape(-1, 3))
    box = np.asarray(labels.shape) - 0.5
    for index in np.ndindex(shape):
        here = world_of(of_volume, index)
        inner = np.linalg.inv(of_labels[:3, :3]) @ (here - of_labels[:3, 3])
        if np.abs(inner - np.floor(inner) - 0.5).min() < 1e-6:
            continue  # halfway between two: either is right
        if (inner < -0.5).any() or (inner > box).any():
            assert found[index] == UNLABELLED
        else:
            nearest = np.linalg.norm((centres - here) @ np.linalg.inv(of_labels[:3, :3]).T, axis=1).argmin()
            assert found[index] == labels.reshape(-1)[nearest]


def test_labels_of_the_scan_s_grid_turned_and_finer_mean_the_same(world, tmp_path):
    _, folder, volumes = world
    volume, exact = volumes[0], load_labels(folder, volumes, tmp_path / "a").of(volumes[0])
    fine = affine_of(spacing=(3.5, 3.5, 3.5))
    fine[:3, 3] -= 1.75  # two fine voxels in one, edge to edge
    _, organs = phantom(0, tuple(2 * n for n in volume.shape), fine)
    other = tmp_path / "fine"
    write_nifti(tmp_path / "fine.nii.gz", organs, at_zero(fine))
    image = nib.load(tmp_path / "fine.nii.gz")
    turned = image.as_reoriented(nib.orientations.axcodes2ornt(("P", "I", "R")))
    other.mkdir()
    nib.save(turned, other / f"{volume.volume_id}.nii")
    labels = load_labels(other, volumes, tmp_path / "b")
    assert labels.classes == ("1", "2", "3", "4") and labels.volumes == (volume,)
    assert labels.notes[0] == "labels of 1 of 2 volumes" and "1 label file of" in labels.notes[1]
    assert (labels.of(volume) == exact).mean() > 0.97


def test_a_folder_of_masks_is_a_label_and_the_first_name_has_what_two_claim(world, tmp_path):
    _, _, volumes = world
    for seed, volume in enumerate(volumes):
        _, organs = phantom(seed, volume.shape, affine_of())
        for number, organ in enumerate(ORGANS, start=1):
            write_nifti(
                tmp_path / "m" / volume.volume_id / f"{organ}.nii.gz",
                (organs == number).astype(np.int16),
                volume.affine,
            )
    everything = np.ones(volumes[1].shape, np.int16)
    write_nifti(tmp_path / "m" / volumes[1].volume_id / "lump.nii.gz", everything, volumes[1].affine)
    labels = load_labels(tmp_path / "m", volumes, tmp_path / "s")
    assert labels.classes == ("heart", "kidney", "liver", "lump", "lung")
    _, organs = phantom(0, volumes[0].shape, affine_of())
    number_of = {organ: labels.classes.index(organ) + 1 for organ in ORGANS}
    expected = np.select([organs == n for n in range(1, 5)], [number_of[organ] for organ in ORGANS], 0)
    assert np.array_equal(labels.of(volumes[0]), expected)
    second = labels.of(volumes[1])
    assert set(np.unique(second)) == {1, 2, 3, 4}  # no lung is left beside the lump


def test_chosen_classes_are_numbered_anew_and_the_others_are_background(world, tmp_path):
    _, folder, volumes = world
    labels = load_labels(folder, volumes, tmp_path, ("kidney", "heart"))
    _, organs = phantom(0, volumes[0].shape, affine_of())
    assert labels.classes == ("heart", "kidney")
    assert np.array_equal(labels.of(volumes[0]), np.select([organs == 2, organs == 4], [1, 2], 0))
    with pytest.raises(UsageError, match="expected some of lung, heart, liver, kidney, found 'brain'"):
        load_labels(folder, volumes, tmp_path, ("brain",))


def test_what_labels_do_not_reach_is_unlabelled(world, tmp_path):
    _, _, volumes = world
    volume = volumes[0]
    _, organs = phantom(0, volume.shape, affine_of())
    write_nifti(tmp_path / "l" / f"{volume.volume_id}.nii.gz", organs[:30], volume.affine)
    array = load_labels(tmp_path / "l", volumes, tmp_path / "s").of(volume)
    assert np.array_equal(array[:30], organs[:30]) and (array[30:] == UNLABELLED).all()


def bad(kind: str, path, volume) -> None:  # noqa: C901 - a list of mistakes
    affine, values = volume.affine.copy(), np.zeros(volume.shape, np.int16)
    values[20:] = 3
    if kind == "elsewhere":
        affine[:3, 3] += 300
    if kind == "fraction":
        image = nib.Nifti1Image(values.transpose(2, 1, 0) * np.float32(0.5), to_nifti(affine))
        path.parent.mkdir()
        return nib.save(image, path)
    if kind == "negative":
        values[0] = -1
    if kind == "nan":
        odd = values.astype(np.float32).transpose(2, 1, 0)
        odd[0, 0, 0] = np.nan
        path.parent.mkdir()
        return nib.save(nib.Nifti1Image(odd, to_nifti(affine)), path)
    if kind == "background":
        values[:] = 0
    write_nifti(path, values, affine)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    if kind == "html":
        path.write_text("<html>not found</html>")
    if kind in ("unplaced", "colours", "flat"):
        plain = nib.Nifti1Image(np.ascontiguousarray(values.transpose(2, 1, 0)), to_nifti(affine))
        if kind == "unplaced":
            plain.header["sform_code"] = plain.header["qform_code"] = 0
            plain = nib.Nifti1Image(plain.dataobj, None, plain.header)
        if kind == "colours":
            rgb = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
            plain = nib.Nifti1Image(np.zeros(volume.shape[::-1], rgb), to_nifti(affine))
        if kind == "flat":
            plain.header["srow_z"] = 0
            plain.header["qform_code"] = 0
            plain = nib.Nifti1Image(plain.dataobj, None, plain.header)
        nib.save(plain, path)
    if kind == "forms":
        image = nib.load(path)
        moved = to_nifti(affine)
        moved[0, 3] += 40
        image = nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header)
        image.set_qform(moved, 1)
        nib.save(image, path)
    return None


@pytest.mark.parametrize("kind, told", [
    ("elsewhere", "of another scan"), ("fraction", "whole numbers"), ("negative", "whole numbers"),
    ("nan", "whole numbers"), ("background", "background alone"), ("cut", "something else"), ("html", "something else"),
    ("forms", "sform and qform"), ("unplaced", "expected an sform or a qform, found neither"),
    ("colours", "volume of numbers"), ("flat", "one that places nothing"),
])  # fmt: skip
def test_labels_that_cannot_be_right_are_refused_by_name(world, tmp_path, kind, told):
    _, _, volumes = world
    path = tmp_path / "l" / f"{volumes[0].volume_id}.nii.gz"
    bad(kind, path, volumes[0])
    with pytest.raises(UsageError, match=told) as caught:
        load_labels(tmp_path / "l", volumes, tmp_path / "s")
    assert str(tmp_path / "l") in str(caught.value)


def test_what_is_named_after_no_volume_is_told(world, tmp_path):
    _, folder, volumes = world
    given = tmp_path / "l"
    shutil.copytree(folder, given)
    (given / f"{volumes[1].volume_id}.nii.gz").rename(given / "label0001.nii.gz")
    labels = load_labels(given, volumes, tmp_path / "s")
    assert labels.notes == (
        "labels of 1 of 2 volumes; 1 not used, no label named after a volume of the store: label0001.nii.gz",
    )


def test_two_labels_of_one_volume_are_refused(world, tmp_path):
    _, _, volumes = world
    volume, everything = volumes[0], np.ones(volumes[0].shape, np.int16)
    for name in (f"{volume.volume_id}.nii.gz", f"{volume.volume_id}/lung.nii.gz"):
        write_nifti(tmp_path / "l" / name, everything, volume.affine)
    with pytest.raises(UsageError, match="expected one label file or folder of masks a volume"):
        load_labels(tmp_path / "l", volumes, tmp_path / "s")


def test_a_folder_without_masks_is_refused(world, tmp_path):
    _, _, volumes = world
    (tmp_path / "l" / volumes[0].volume_id).mkdir(parents=True)
    with pytest.raises(UsageError, match="expected masks named after their classes"):
        load_labels(tmp_path / "l", volumes, tmp_path / "s")


def test_a_mask_has_one_value_be_it_1_or_255(world, tmp_path):
    _, _, volumes = world
    volume, values = volumes[0], np.zeros(volumes[0].shape, np.int16)
    values[10:] = 255
    path = tmp_path / "l" / volume.volume_id / "liver.nii.gz"
    write_nifti(path, values, volume.affine)
    assert np.array_equal(load_labels(tmp_path / "l", volumes, tmp_path / "s").of(volume), values > 0)
    values[20:] = 2
    write_nifti(path, values, volume.affine)
    with pytest.raises(UsageError, match="expected a binary mask of its class, found the values 2, 255"):
        load_labels(tmp_path / "l", volumes, tmp_path / "s")


def test_one_name_for_two_numbers_is_refused(world, tmp_path):
    _, folder, volumes = world
    shutil.copytree(folder, tmp_path / "l")
    (tmp_path / "l" / "classes.json").write_text(json.dumps({"1": "lung", "2": "lung"}))
    with pytest.raises(UsageError, match="expected a name of its own for each number, found 'lung' twice"):
        load_labels(tmp_path / "l", volumes, tmp_path / "s")


def test_a_store_of_one_volume_takes_a_file_of_any_name(world, tmp_path):
    _, folder, volumes = world
    (tmp_path / "seg.nii.gz").write_bytes((folder / f"{volumes[0].volume_id}.nii.gz").read_bytes())
    labels = load_labels(tmp_path / "seg.nii.gz", volumes[:1], tmp_path / "s")
    _, organs = phantom(0, volumes[0].shape, affine_of())
    assert np.array_equal(labels.of(volumes[0]), organs)
    with pytest.raises(NoInputError, match=r"one volume \(here: 2\), found a file"):
        load_labels(tmp_path / "seg.nii.gz", volumes, tmp_path / "s")


def test_a_folder_without_any_label_is_told(world, tmp_path):
    _, _, volumes = world
    with pytest.raises(NoInputError, match="expected a folder of labels"):
        load_labels(tmp_path / "none", volumes, tmp_path / "s")
    (tmp_path / "l").mkdir()
    with pytest.raises(NoInputError, match="link-labels"):
        load_labels(tmp_path / "l", volumes, tmp_path / "s")
    dead = tmp_path / "l" / f"{volumes[0].volume_id}.nii.gz"
    dead.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="nowhere is no longer there; run `maesil link-labels` again"):
        load_labels(tmp_path / "l", volumes, tmp_path / "s")
    dead.unlink()
    _, labels, _ = world
    (tmp_path / "l" / "classes.json").write_text(json.dumps(["liver"]))
    (tmp_path / "l" / f"{volumes[1].volume_id}.nii.gz").symlink_to(labels / f"{volumes[1].volume_id}.nii.gz")
    with pytest.raises(UsageError, match="expected an object"):
        load_labels(tmp_path / "l", volumes, tmp_path / "s")
