"""NIfTI files altered anywhere: read right or refused in one line without a path (twists: test_hard_nifti)."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maesil.documents import canonical_json
from maesil.errors import Refused
from maesil.geometry import from_nifti
from maesil.ingest.nifti import read_nifti

RNG = np.random.default_rng(0)
DATA = RNG.integers(-1000, 1500, (9, 8, 7)).astype(np.int16)
AFFINE = np.array([[-0.7, 0.1, 0, 20], [0.1, 0.7, 0, -30], [0, 0, 2.5, 100], [0, 0, 0, 1.0]])


def file_of(folder: Path, data=DATA, affine=AFFINE, kind=nib.Nifti1Image, name="DOE.nii") -> Path:
    path = folder / name
    nib.save(kind(data, affine), path)
    return path


def refusal_of(path: Path) -> Refused:
    with pytest.raises(Refused) as caught:
        read_nifti(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) not in message and path.name not in message
    canonical_json(caught.value.numbers)
    return caught.value


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.float32, np.float64, np.int8])
def test_values_and_places_are_nibabels(tmp_path, kind, name, dtype):
    data = np.clip(DATA, *(-128, 127) if dtype == np.int8 else (0, 1500) if dtype == np.uint16 else (-1000, 1500))
    path = file_of(tmp_path, data.astype(dtype), kind=kind, name=name)
    scan = read_nifti(path)
    np.testing.assert_array_equal(scan.hu, nib.load(path).get_fdata().transpose(2, 1, 0))
    np.testing.assert_allclose(scan.affine, from_nifti(nib.load(path).affine), atol=1e-5)
    assert scan.valid.all() and scan.hu.flags.c_contiguous and scan.hu.dtype == np.float32
    canonical_json(scan.source)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 30).map(lambda v: float(np.float32(v))), st.integers(-2000, 2000))
def test_scaling_is_nibabels(tmp_path_factory, slope, inter):
    path = tmp_path_factory.mktemp("s") / "s.nii"
    image = nib.Nifti1Image(DATA, AFFINE)
    image.header.set_slope_inter(slope, inter)
    nib.save(image, path)
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([slope, inter], "<f4").tobytes()  # nibabel writes 1 and 0 for data in memory
    path.write_bytes(bytes(content))
    stored = np.asarray(nib.load(path).dataobj.get_unscaled(), np.float64)
    np.testing.assert_allclose(read_nifti(path).hu, (stored * slope + inter).transpose(2, 1, 0), rtol=1e-5, atol=1e-2)


def test_three_hundred_altered_headers(tmp_path):
    """Any byte of the header may be anything: a result, or a refusal in one line; nothing else."""
    rng = random.Random(3)
    path = file_of(tmp_path)
    original = path.read_bytes()
    refused = 0
    for _ in range(300):
        data = bytearray(original)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(352)] = rng.randrange(256)
        path.write_bytes(bytes(data))
        try:
            scan = read_nifti(path)
            assert scan.hu.shape == scan.valid.shape and np.isfinite(scan.affine).all()
            assert np.isfinite(scan.hu[scan.valid]).all()
        except Refused as refusal:
            assert "\n" not in str(refusal) and "DOE" not in str(refusal)
            refused += 1
    assert refused > 20


def test_every_cut_and_every_flip_of_a_gzip_stream_is_noticed(tmp_path):
    rng = random.Random(5)
    path = file_of(tmp_path, name="DOE.nii.gz")
    original = path.read_bytes()
    assert read_nifti(path).hu.size == DATA.size
    for length in [*rng.sample(range(20, len(original)), 20), len(original) - 1]:
        path.write_bytes(original[:length])
        refusal_of(path)
    same = 0
    for _ in range(40):
        data = bytearray(original)
        at = rng.randrange(10 + 8, len(original))  # behind the gzip header, whose time and name decide nothing
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))
        try:
            np.testing.assert_array_equal(read_nifti(path).hu, DATA.transpose(2, 1, 0))
            same += 1
        except Refused:
            pass
    assert same <= 2


def test_a_vanished_file_is_refused_without_its_name(tmp_path):
    refusal_of(tmp_path / "DOE.nii.gz")
    refusal_of(tmp_path / "DOE.hdr")


def test_two_gzip_members_and_bytes_behind_the_voxels_are_right(tmp_path):
    plain = file_of(tmp_path).read_bytes()
    path = tmp_path / "two.nii.gz"
    path.write_bytes(gzip.compress(plain[:500]) + gzip.compress(plain[500:] + b"more"))
    np.testing.assert_array_equal(read_nifti(path).hu, DATA.transpose(2, 1, 0))
