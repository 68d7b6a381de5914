"""The affine of sform and qform against nibabel's, and where the two, or the header's other fields, disagree."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nibabel.quaternions import angle_axis2mat, mat2quat

from maesil.errors import Refused
from maesil.geometry import from_nifti
from maesil.ingest.nifti_geometry import affine_of, rotation_of

AXES = st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda v: np.linalg.norm(v) > 0.1)
SIZES = st.tuples(*[st.floats(0.3, 8)] * 3)


def header_of(affine=None, *, sform=0, qform=1, **fields) -> nib.Nifti1Header:
    header = nib.Nifti1Header()
    header.set_data_shape((40, 50, 60))
    if affine is not None:
        header.set_qform(affine, qform)
        header.set_sform(affine, sform)
    for name, value in fields.items():
        header[name] = value
    return header


def affine_from(turn: np.ndarray, sizes, *, mirrored: bool = False) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = turn * sizes * (1, 1, -1 if mirrored else 1)
    affine[:3, 3] = (-10, 20, 30)
    return affine


@settings(max_examples=100, deadline=None)
@given(AXES, st.floats(-np.pi, np.pi), SIZES, st.booleans())
def test_a_qform_is_nibabels(axis, angle, sizes, mirrored):
    header = header_of(affine_from(angle_axis2mat(angle, axis), sizes, mirrored=mirrored))
    np.testing.assert_allclose(affine_of(header, set()), from_nifti(header.get_qform()), atol=2e-2)


@settings(max_examples=100, deadline=None)
@given(AXES, st.integers(3, 7))
def test_a_half_turn_may_be_rounded(axis, decimals):
    """The part that is left out is the root of what rounding leaves of 1: that decides how exact a turn can be."""
    turn = angle_axis2mat(np.pi, axis)
    bcd = mat2quat(turn)[1:].round(decimals)
    header = header_of(quatern_b=bcd[0], quatern_c=bcd[1], quatern_d=bcd[2], qform_code=1)
    found = rotation_of(np.array([float(header[f"quatern_{n}"]) for n in "bcd"]))
    np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-5)
    assert np.linalg.det(found) == pytest.approx(1)
    angle = np.arccos(np.clip((np.trace(found.T @ turn) - 1) / 2, -1, 1))
    assert angle <= 2 * np.arcsin(np.sqrt(2 * 3**0.5 * 0.5 * 10.0**-decimals + 1e-6)) + 10.0**-decimals * 2
    affine_of(header, set())


@pytest.mark.parametrize("length", [1.0 + 4e-7, 1.0005, 1.004])
def test_a_quaternion_that_is_too_long_is_normalised_as_by_the_standard(length):
    notes: set[str] = set()
    found = affine_of(header_of(np.diag([2, -3, -4, 1.0]), quatern_b=length), notes)
    np.testing.assert_allclose(found, from_nifti(np.diag([2, -3, -4, 1.0])), atol=1e-5)
    assert ("quaternion_normalised" in notes) == (length > 1 + 1e-6)


UNUSABLE = {
    "neither": ({"qform_code": 0}, "sform_code is 0; qform_code is 0"),
    "too long": ({"quatern_b": 1.3}, "length 1.3"),
    "not finite": ({"quatern_b": np.nan}, "length nan"),
    "no size": ({"pixdim": [1, 0, 3, 4, 1, 1, 1, 1]}, "pixdim"),
    "no place": ({"qoffset_x": np.inf}, "not finite"),
    "sform of zeros": ({"qform_code": 0, "sform_code": 1, "srow_x": 0}, "the sform is singular"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_is_wrong_with_the_forms_is_said(name):
    fields, words = UNUSABLE[name]
    with pytest.raises(Refused) as caught:
        affine_of(header_of(np.diag([2, -3, -4, 1.0]), **fields), set())
    assert caught.value.code == "no_orientation" and words in caught.value.detail


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, AXES, st.floats(-3, 3))
def test_an_sform_alone_agrees_with_pixdim_or_is_refused(sizes, stated, axis, angle):
    sizes, stated = np.float32(sizes).astype(float), np.float32(stated).astype(float)
    affine = affine_from(angle_axis2mat(angle, axis), sizes)
    header = header_of(affine, sform=1, qform=0, pixdim=[1, *stated, 1, 1, 1, 1])
    off = np.abs(stated / sizes - 1).max()
    assume(abs(off - 0.02) > 1e-4)
    if off < 0.02:
        np.testing.assert_allclose(affine_of(header, set()), from_nifti(affine), atol=1e-3)
        return
    with pytest.raises(Refused, match="--prefer sform") as caught:
        affine_of(header, set())
    assert caught.value.code == "forms_differ"
    notes: set[str] = set()
    np.testing.assert_allclose(affine_of(header, notes, "sform"), from_nifti(affine), atol=1e-3)
    assert notes == {"sform_preferred"}


def test_pixdim_left_at_its_default_says_nothing():
    notes: set[str] = set()
    header = header_of(np.diag([2, -3, -4, 1.0]), sform=1, qform=0, pixdim=np.ones(8))
    np.testing.assert_allclose(affine_of(header, notes), from_nifti(np.diag([2, -3, -4, 1.0])))
    assert notes == {"pixdim_ignored"}


@pytest.mark.parametrize("of_faces", [False, True])
def test_pixdim_of_a_sheared_sform_is_of_its_edges_or_its_faces(of_faces):
    affine = np.diag([2, -3, 4, 1.0])
    affine[1, 2] = 1.5
    size = 4 if of_faces else np.hypot(4, 1.5)
    header = header_of(affine, sform=1, qform=0, pixdim=[1, 2, 3, size, 1, 1, 1, 1])
    np.testing.assert_allclose(affine_of(header, set()), from_nifti(affine))


def test_an_identity_is_noted():
    notes: set[str] = set()
    affine_of(header_of(np.eye(4), sform=1), notes)
    assert notes == {"identity_affine"}
