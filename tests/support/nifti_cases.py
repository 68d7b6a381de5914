"""NIfTI as data sets really hold it: one file a twist, and what must come of it (see `support.ct_cases`)."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from support.ct_phantom import SHAPE, base_affine, rotated, sample

Builder = Callable[[Path], None]
ROUNDING = 0.51
RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # LPS to RAS


@dataclass(frozen=True)
class NiftiCase:
    """What must come of the files that ``build`` writes into an empty folder."""

    build: Builder
    volumes: int = 1
    max_error: float = ROUNDING
    mean_error: float = ROUNDING
    code: str | None = None
    valid: float = 1.0  # least share of voxels in fully valid cells
    refusal_is_right_too: bool = False


CASES: dict[str, NiftiCase] = {}


def case(**expected) -> Callable[[Builder], Builder]:
    def register(build: Builder) -> Builder:
        CASES[build.__name__] = NiftiCase(build, **expected)
        return build

    return register


def refused(code: str | None = None) -> Callable[[Builder], Builder]:
    return case(volumes=0, code=code)


def image(data=None, affine=None, dtype=np.int16, kind=nib.Nifti1Image, codes=(1, 1)):
    """A NIfTI image of the phantom: data [x, y, z], axes L P S; ``affine`` takes [x, y, z, 1] to RAS mm."""
    if data is None:
        data = np.rint(sample(base_affine())).transpose(2, 1, 0)
    affine = xyz_affine(base_affine()) if affine is None else affine
    result = kind(np.asarray(data, dtype), affine)
    result.set_sform(affine if codes[0] else None, code=codes[0])
    if np.allclose(_shear(affine), 0, atol=1e-6):
        result.set_qform(affine if codes[1] else None, code=codes[1])
    else:
        result.set_qform(None, code=0)
    return result


def xyz_affine(zyx_to_lps: np.ndarray) -> np.ndarray:
    """The NIfTI affine of a [z, y, x] grid in LPS: columns reversed, x and y negated."""
    affine = RAS @ zyx_to_lps
    return affine[:, [2, 1, 0, 3]]


def _shear(affine: np.ndarray) -> np.ndarray:
    unit = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return unit.T @ unit - np.eye(3)


def _save(folder: Path, picture, name: str = "ct.nii.gz") -> Path:
    nib.save(picture, folder / name)
    return folder / name


# Geometry ----------------------------------------------------------------------------------------


@case()
def plain(folder: Path) -> None:
    _save(folder, image())


@case()
def not_compressed(folder: Path) -> None:
    _save(folder, image(), "ct.nii")


def _turned(codes: str) -> Builder:
    def build(folder: Path) -> None:
        turn = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("LPS"), nib.orientations.axcodes2ornt(tuple(codes))
        )
        _save(folder, image().as_reoriented(turn))

    return build


for _codes in ("RAS", "LPI", "PSR", "AIL", "SLP", "IRA"):
    CASES[f"axes_{_codes}"] = NiftiCase(_turned(_codes))


@case()
def oblique(folder: Path) -> None:
    affine = rotated(base_affine(), (12.0, -6.0, 9.0))
    _save(folder, image(np.rint(sample(affine)).transpose(2, 1, 0), xyz_affine(affine)))


@case(max_error=32.0, mean_error=3.5, valid=0.4)  # interpolated
def sheared(folder: Path) -> None:
    affine = base_affine()
    affine[:3, 1:3] = rotated(affine, (14.0, 0.0, 0.0))[:3, 1:3]
    affine[:3, 3] += (0.0, 1.0, -5.0)
    _save(folder, image(np.rint(sample(affine)).transpose(2, 1, 0), xyz_affine(affine)))


@case()
def sform_only(folder: Path) -> None:
    _save(folder, image(codes=(1, 0)))


@case()
def qform_only(folder: Path) -> None:
    _save(folder, image(codes=(0, 1)))


@case()
def qform_only_turned(folder: Path) -> None:
    affine = rotated(base_affine(), (5.0, 20.0, -8.0))
    _save(folder, image(np.rint(sample(affine)).transpose(2, 1, 0), xyz_affine(affine), codes=(0, 2)))


@case()
def sform_singular(folder: Path) -> None:
    picture = image()
    picture.header["srow_x"] = 0
    _save(folder, picture)


@case()
def pixdim_zero_sform_right(folder: Path) -> None:
    picture = image(codes=(1, 0))
    picture.header["pixdim"][3] = 0
    path = _save(folder, picture, "ct.nii")
    raw = bytearray(path.read_bytes())  # nibabel mends pixdim on saving
    raw[76 + 12 : 76 + 16] = np.float32(0).tobytes()
    path.write_bytes(raw)


@refused()
def forms_differ_by_a_shift(folder: Path) -> None:
    picture = image()
    shifted = picture.affine.copy()
    shifted[2, 3] += 25.0
    picture.set_qform(shifted, code=1)
    _save(folder, picture)


@refused()
def forms_differ_by_a_flip(folder: Path) -> None:
    picture = image()
    flipped = picture.affine.copy()
    flipped[:3, 0] *= -1.0
    flipped[0, 3] *= -1.0
    picture.set_qform(flipped, code=1)
    _save(folder, picture)


@case()
def forms_differ_by_half_a_millimetre(folder: Path) -> None:
    picture = image()
    shifted = picture.affine.copy()
    shifted[2, 3] += 0.5
    picture.set_qform(shifted, code=1)
    _save(folder, picture)


@refused()
def neither_form(folder: Path) -> None:
    _save(folder, image(codes=(0, 0)))


# Values --------------------------------------------------------------------------------------------


def _scaled(folder: Path, stored: np.ndarray, slope: float, inter: float, dtype) -> None:
    """Write stored values and scl_slope, scl_inter as they are: nibabel would choose its own on saving."""
    path = _save(folder, image(np.zeros(stored.shape), dtype=dtype), "ct.nii")
    raw = bytearray(path.read_bytes())
    raw[112:120] = np.array([slope, inter], "<f4").tobytes()
    raw[352:] = np.asarray(stored, np.dtype(dtype).newbyteorder("<")).tobytes(order="F")
    path.write_bytes(raw)


def _hu_xyz() -> np.ndarray:
    return np.rint(sample(base_affine())).transpose(2, 1, 0)


@case()
def slope_zero(folder: Path) -> None:
    _scaled(folder, _hu_xyz(), 0.0, 77.0, np.int16)  # slope 0: neither slope nor inter apply


@case()
def slope_nan(folder: Path) -> None:
    _scaled(folder, _hu_xyz(), np.nan, np.nan, np.int16)


@case(max_error=0.76)
def slope_half(folder: Path) -> None:
    _scaled(folder, np.rint((sample(base_affine()).transpose(2, 1, 0) + 7.0) * 2.0), 0.5, -7.0, np.int16)


@case()
def uint16_inter_minus_1024(folder: Path) -> None:
    _scaled(folder, _hu_xyz() + 1024.0, 1.0, -1024.0, np.uint16)


for _dtype in (np.int32, np.float32, np.float64):

    def _build(folder: Path, dtype=_dtype) -> None:
        _save(folder, image(dtype=dtype))

    CASES[np.dtype(_dtype).name] = NiftiCase(_build)


@case()
def big_endian(folder: Path) -> None:
    picture = image()
    header = picture.header.as_byteswapped(">")
    path = folder / "ct.nii.gz"
    data = np.asarray(picture.dataobj).astype(">i2").tobytes(order="F")
    header["vox_offset"] = 352
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4) + data))


@case()
def nifti_2(folder: Path) -> None:
    _save(folder, image(kind=nib.Nifti2Image))


@case()
def header_and_image(folder: Path) -> None:
    _save(folder, image(kind=nib.Nifti1Pair), "ct.img")


@case()
def four_d_one_volume(folder: Path) -> None:
    _save(folder, image(_hu_xyz()[..., None]))


@case(volumes=2, refusal_is_right_too=True)
def four_d_two_volumes(folder: Path) -> None:
    _save(folder, image(np.stack([_hu_xyz(), _hu_xyz()], axis=-1)))


@case(valid=0.5)
def nan_border(folder: Path) -> None:
    data = _hu_xyz()
    data[:6] = np.nan
    data[:, -1] = np.inf
    _save(folder, image(data, dtype=np.float32))


@refused()
def mostly_nan(folder: Path) -> None:
    data = _hu_xyz()
    data[:, 2:] = np.nan
    _save(folder, image(data, dtype=np.float32))


@refused()
def zero_to_one(folder: Path) -> None:
    _save(folder, image((_hu_xyz() + 1000.0) / 2200.0, dtype=np.float32))


@refused()
def zero_to_255(folder: Path) -> None:
    _save(folder, image(np.clip((_hu_xyz() + 160.0) / 400.0, 0, 1) * 255, dtype=np.uint8))


@refused()
def plus_1024(folder: Path) -> None:
    _save(folder, image(_hu_xyz() + 1024.0))


@refused()
def standardised(folder: Path) -> None:
    data = _hu_xyz()
    _save(folder, image((data - data.mean()) / data.std(), dtype=np.float32))


@refused()
def label_map(folder: Path) -> None:
    _save(folder, image(np.digitize(_hu_xyz(), [-500, -50, 200]), dtype=np.uint8))


@refused()
def colours(folder: Path) -> None:
    rgb = np.zeros(SHAPE[::-1], dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    rgb["R"] = 90
    nib.save(nib.Nifti1Image(rgb, xyz_affine(base_affine())), folder / "ct.nii.gz")


# Damage -------------------------------------------------------------------------------------------------


@refused()
def gzip_truncated(folder: Path) -> None:
    path = _save(folder, image())
    path.write_bytes(path.read_bytes()[:-2000])


@refused()
def gzip_without_its_checksum(folder: Path) -> None:
    path = _save(folder, image())
    path.write_bytes(path.read_bytes()[:-8])


@refused()
def bit_flipped_in_the_voxels(folder: Path) -> None:
    path = _save(folder, image())
    raw = bytearray(gzip.decompress(path.read_bytes()))
    packed = bytearray(gzip.compress(bytes(raw), compresslevel=0))  # only the checksum can tell
    packed[len(packed) // 2] ^= 4
    path.write_bytes(packed)


@refused()
def not_gzipped_and_short(folder: Path) -> None:
    path = _save(folder, image(), "ct.nii")
    path.write_bytes(path.read_bytes()[:-100])


@refused()
def html(folder: Path) -> None:
    (folder / "ct.nii.gz").write_bytes(b"<!DOCTYPE html><html><body>403 Forbidden</body></html>" * 40)


@refused()
def empty(folder: Path) -> None:
    (folder / "ct.nii.gz").write_bytes(b"")


@case()
def gzip_named_nii(folder: Path) -> None:
    path = _save(folder, image())
    path.rename(folder / "ct.nii")


@case()
def plain_named_gz(folder: Path) -> None:
    path = _save(folder, image(), "ct.nii")
    path.rename(folder / "ct.nii.gz")


@refused()
def claims_eight_gigavoxels(folder: Path) -> None:
    path = _save(folder, image(), "ct.nii")
    raw = bytearray(path.read_bytes())
    raw[42:48] = np.array([2000, 2000, 2000], "<i2").tobytes()
    (folder / "ct.nii.gz").write_bytes(gzip.compress(bytes(raw)))
    path.unlink()


@refused()
def negative_shape(folder: Path) -> None:
    path = _save(folder, image(), "ct.nii")
    raw = bytearray(path.read_bytes())
    raw[42:44] = np.array([-48], "<i2").tobytes()
    path.write_bytes(raw)
