"""Hard NIfTI inputs that follow from the principles without being on any list (see `support.nifti_cases`)."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
from support.ct_phantom import base_affine
from support.nifti_cases import _hu_xyz, _save, _scaled, case, image, refused, xyz_affine


def _patched(folder: Path, at: int, values, name: str = "ct.nii", picture=None) -> Path:
    """Write an uncompressed image, then these bytes of its header as they are."""
    path = _save(folder, image() if picture is None else picture, name)
    raw = bytearray(path.read_bytes())
    data = np.asarray(values).tobytes()
    raw[at : at + len(data)] = data
    path.write_bytes(raw)
    return path


# Geometry ----------------------------------------------------------------------------------------


def _in_unit(folder: Path, factor: float, unit: str) -> None:
    affine = xyz_affine(base_affine())
    affine[:3] *= factor
    picture = image(affine=affine)
    picture.header.set_xyzt_units(unit)
    _save(folder, picture)


@case()
def lengths_in_metres(folder: Path) -> None:
    _in_unit(folder, 0.001, "meter")


@case()
def lengths_in_micrometres(folder: Path) -> None:
    _in_unit(folder, 1000.0, "micron")


@case()
def unit_says_metres_but_lengths_are_millimetres(folder: Path) -> None:
    _in_unit(folder, 1.0, "meter")


@case()
def unit_not_defined(folder: Path) -> None:
    _patched(folder, 123, np.uint8(7))


@refused("bad_spacing")
def voxels_of_half_a_metre(folder: Path) -> None:
    affine = xyz_affine(base_affine())
    affine[:3, :3] *= 400
    _save(folder, image(affine=affine))


@case()
def qform_not_finite_sform_right(folder: Path) -> None:
    _patched(folder, 256, np.full(3, np.nan, "<f4"))


@refused()
def both_forms_not_finite(folder: Path) -> None:
    path = _patched(folder, 256, np.full(3, np.nan, "<f4"))
    raw = bytearray(path.read_bytes())
    raw[280:296] = np.full(4, np.nan, "<f4").tobytes()
    path.write_bytes(raw)


@refused("implausible_size")
def lengths_in_centimetres(folder: Path) -> None:
    _in_unit(folder, 0.1, "unknown")


@refused("bad_spacing")
def lengths_in_metres_not_said(folder: Path) -> None:
    _in_unit(folder, 0.001, "unknown")


@refused("implausible_size")
def lengths_twenty_fold(folder: Path) -> None:
    _in_unit(folder, 20.0, "mm")


@refused("forms_differ")
def identity_sform_against_pixdim(folder: Path) -> None:
    """The sform was left at its default; pixdim alone knows the voxels."""
    picture = image(codes=(1, 0))
    path = _save(folder, picture, "ct.nii")
    raw = bytearray(path.read_bytes())
    raw[280:328] = np.eye(4, dtype="<f4")[:3].tobytes()
    path.write_bytes(raw)


@case()
def pixdim_left_at_its_default(folder: Path) -> None:
    _patched(folder, 80, np.ones(3, "<f4"), picture=image(codes=(1, 0)))


@case()
def pixdim_rounded(folder: Path) -> None:
    _patched(folder, 80, np.array([1.31, 1.69, 2.62], "<f4"), picture=image(codes=(1, 0)))


@case()
def quaternion_a_hair_longer_than_one(folder: Path) -> None:
    _patched(folder, 256, np.array([0, 0, 1.0000002], "<f4"), picture=image(codes=(0, 1)))


@case()
def quaternion_rounded_up_to_three_decimals(folder: Path) -> None:
    _patched(folder, 256, np.array([0, 0, 1.0005], "<f4"), picture=image(codes=(0, 1)))


@refused("no_orientation")
def quaternion_that_is_none(folder: Path) -> None:
    _patched(folder, 256, np.array([0.9, 0.9, 0.9], "<f4"), picture=image(codes=(0, 1)))


# Values --------------------------------------------------------------------------------------------


@refused()
def negative_values_in_uint16(folder: Path) -> None:
    _save(folder, image(_hu_xyz().astype(np.int16).view(np.uint16), dtype=np.uint16))


@refused("bad_rescale")
def inter_nan(folder: Path) -> None:
    _scaled(folder, _hu_xyz(), 1.0, np.nan, np.int16)


@case()
def negative_slope(folder: Path) -> None:
    _scaled(folder, -_hu_xyz(), -1.0, 0.0, np.int16)


@refused("odd_background")
def background_of_zero(folder: Path) -> None:
    data = _hu_xyz()
    _save(folder, image(np.where(data < -950, 0, data)))


@refused("too_dense")
def inverted(folder: Path) -> None:
    _save(folder, image(-_hu_xyz()))


@refused()
def air_is_zero_and_water_is_one_thousand(folder: Path) -> None:
    _save(folder, image(_hu_xyz() + 1000))


def _dimensions(folder: Path, *dim: int, data=None) -> None:
    _patched(folder, 40, np.array(dim, "<i2"), picture=None if data is None else image(data))


@case()
def fourth_dimension_of_zero(folder: Path) -> None:
    _dimensions(folder, 4, 48, 40, 24, 0)


@case()
def all_other_dimensions_of_zero(folder: Path) -> None:
    _dimensions(folder, 7, 48, 40, 24, 0, 0, 0, 0)


@refused("not_3d")
def fourth_dimension_of_zero_before_two_volumes(folder: Path) -> None:
    _dimensions(folder, 4, 48, 40, 24, 0, data=np.stack([_hu_xyz(), _hu_xyz()], axis=-1))


@refused("size_limit")
def third_dimension_of_zero(folder: Path) -> None:
    _dimensions(folder, 3, 48, 40, 0)


@refused("mr_or_pet")
def mr(folder: Path) -> None:
    """Bright fat, grey muscle, dark bone and air, noise of magnitudes; no value below 0."""
    hu, rng = _hu_xyz(), np.random.default_rng(0)
    level = np.select([hu < -500, hu < -50, hu < 300], [0, 420, 230], 40)
    noise = rng.normal(0, 9, (2, *hu.shape))
    _save(folder, image(np.rint(np.hypot(level + noise[0], noise[1]))))


@refused("mr_or_pet")
def pet_in_becquerel(folder: Path) -> None:
    hu, rng = _hu_xyz(), np.random.default_rng(0)
    uptake = np.select([hu < -500, hu < -50, hu < 300], [60.0, 900, 2400], 1500)
    _save(folder, image(uptake * rng.gamma(8, 1 / 8, hu.shape), dtype=np.float32))


@refused("eight_bit")
def pet_in_suv(folder: Path) -> None:
    hu, rng = _hu_xyz(), np.random.default_rng(0)
    _save(folder, image(np.where(hu < -500, 0.02, 1.4) * rng.gamma(8, 1 / 8, hu.shape), dtype=np.float32))


# Files -----------------------------------------------------------------------------------------------


@refused("not_fetched")
def git_lfs_pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 10500000\n"
    (folder / "ct.nii.gz").write_text(text)


@refused("not_fetched")
def git_annex_pointer(folder: Path) -> None:
    (folder / "ct.nii.gz").write_text("/annex/objects/SHA256E-s10500000--" + "0" * 64 + ".nii.gz\n")


@case()
def gzip_with_garbage_behind_it(folder: Path) -> None:
    path = _save(folder, image())
    path.write_bytes(path.read_bytes() + b"garbage" * 9)


@case()
def gzip_with_zeros_behind_it(folder: Path) -> None:
    path = _save(folder, image())
    path.write_bytes(path.read_bytes() + bytes(512))


@refused()
def voxels_begin_within_the_header(folder: Path) -> None:
    _patched(folder, 108, np.float32(100))


@case()
def voxels_begin_where_the_header_does_not_say(folder: Path) -> None:
    """Left out as 0: right behind the header is the one place where they can begin."""
    _patched(folder, 108, np.float32(0))


@case()
def header_extension(folder: Path) -> None:
    picture = image()
    picture.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"patient DOE" * 20))
    _save(folder, picture)


@case()
def pair_compressed(folder: Path) -> None:
    _save(folder, image(kind=nib.Nifti1Pair), "ct.img")
    content = (folder / "ct.img").read_bytes()
    (folder / "ct.img").unlink()
    (folder / "ct.img.gz").write_bytes(gzip.compress(content))


@refused()
def pair_cut(folder: Path) -> None:
    path = _save(folder, image(kind=nib.Nifti1Pair), "ct.img")
    path.write_bytes(path.read_bytes()[:-10])


@refused()
def pair_without_its_image(folder: Path) -> None:
    _save(folder, image(kind=nib.Nifti1Pair), "ct.img").unlink()


@refused("size_limit")
def pair_claims_more_than_its_image(folder: Path) -> None:
    _save(folder, image(kind=nib.Nifti1Pair), "ct.img")
    raw = bytearray((folder / "ct.hdr").read_bytes())
    raw[42:48] = np.array([1000, 1000, 1000], "<i2").tobytes()
    (folder / "ct.hdr").write_bytes(raw)


@refused("size_limit")
def gzip_of_a_billion_zeros(folder: Path) -> None:
    picture = image()
    picture.header["dim"][1:4] = 1000
    head = picture.header.copy()
    head["vox_offset"] = 352
    body = gzip.compress(bytes(1 << 20), 9)
    (folder / "ct.nii.gz").write_bytes(gzip.compress(head.binaryblock + bytes(4)) + body * 1000)


@refused("size_limit")
def gzip_with_a_gigabyte_behind_the_voxels(folder: Path) -> None:
    path = _save(folder, image())
    path.write_bytes(path.read_bytes() + gzip.compress(bytes(1 << 20), 9) * 1000)
