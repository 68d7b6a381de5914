"""Outside cases: encodings of pixels, and files that are odd but readable."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from conformance.case import CASES, SCAN, case, tags
from conformance.dicom import compressed, each, series, set_pixels, stored_of, write, write_all
from conformance.judge import Expected, expect, refuse
from conformance.phantom import Scan
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.sequence import Sequence
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

OTHER = SCAN.but(enhancement=77)
SMALL = Scan(shape=(16, 40, 48))


def _encoded(
    name: str, syntax: str, scan: Scan = SCAN, signed: bool = False, notes: tuple[str, ...] = (), **more: object
) -> None:
    def write_case(folder: Path) -> Expected:
        slices = series(SCAN)
        if signed:
            for ds in slices:
                set_pixels(ds, stored_of(ds) - 1024, bits=16, signed=1)
                ds.RescaleIntercept = 0
        write_all([compressed(ds, syntax, **more) for ds in slices], folder, syntax=syntax)
        return expect(scan, notes=notes)

    CASES[name] = write_case


_encoded("rle_signed", RLELossless, signed=True)
_encoded("jpeg_2000_of_12_bits", JPEG2000Lossless)
_encoded("jpeg_2000_signed_16_bits", JPEG2000Lossless, signed=True)
_encoded("jpeg_ls_signed_16_bits", JPEGLSLossless, signed=True)
_encoded("jpeg_ls_near_lossless", JPEGLSNearLossless, SCAN.but(tolerance=3.6), notes=("lossy",), jls_error=3)
_encoded("jpeg_2000_lossy", JPEG2000, SCAN.but(tolerance=150), notes=("lossy",), j2k_cr=[4])


def _jpeg_lossless(ds: Dataset) -> Dataset:
    """Return the slice with JPEG Lossless pixels, made by GDCM."""
    import SimpleITK as sitk

    with tempfile.TemporaryDirectory() as scratch:
        writer = sitk.ImageFileWriter()
        writer.SetFileName(f"{scratch}/x.dcm")
        writer.SetImageIO("GDCMImageIO")
        writer.UseCompressionOn()
        writer.SetCompressor("JPEG")
        writer.Execute(sitk.GetImageFromArray(stored_of(ds).astype(np.uint16)[None]))
        made = pydicom.dcmread(f"{scratch}/x.dcm")
        assert made.file_meta.TransferSyntaxUID == JPEGLosslessSV1
        ds.PixelData, ds.BitsStored, ds.HighBit = made.PixelData, made.BitsStored, made.HighBit
    return ds


@case
def jpeg_lossless(folder: Path) -> Expected:
    write_all([_jpeg_lossless(ds) for ds in series(SCAN)], folder, syntax=JPEGLosslessSV1)
    return expect(SCAN)


@case
def every_slice_of_another_encoding(folder: Path) -> Expected:
    syntaxes = (RLELossless, JPEG2000Lossless, JPEGLSLossless)
    for k, ds in enumerate(series(SCAN)):
        if k % 6 < 3:
            write(compressed(ds, syntaxes[k % 3]), folder / f"{k}", syntaxes[k % 3])
        else:
            write(
                ds,
                folder / f"{k}",
                (ExplicitVRBigEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian)[k % 3],
            )
    return expect(SCAN)


@case
def lossy_once_now_native(folder: Path) -> Expected:
    write_all(each(series(SCAN), tags(LossyImageCompression="01", LossyImageCompressionRatio=8)), folder)
    return expect(SCAN, notes=("lossy",))


@case
def lossy_refused_on_request(folder: Path) -> Expected:
    write_all(each(series(SCAN), tags(LossyImageCompression="01")), folder)
    return refuse("lossy", options=("--refuse", "lossy"))


@case
def reencoded_copy_in_another_folder(folder: Path) -> Expected:
    write_all(series(SCAN), folder / "native")
    write_all([compressed(ds, JPEG2000Lossless) for ds in series(SCAN)], folder / "j2k", syntax=JPEG2000Lossless)
    return expect(SCAN, counted={"duplicate_slice": 26})


@case
def reencoded_copy_of_another_series(folder: Path) -> Expected:
    write_all(series(SCAN), folder / "native")
    copies = [compressed(ds, RLELossless) for ds in series(SCAN, name="copy", patient="Poe^Eve")]
    write_all(copies, folder / "rle", syntax=RLELossless)
    return expect(SCAN, SCAN, duplicates=1)


def _fragmented(ds: Dataset, way: str) -> Dataset:
    ds = compressed(ds, JPEG2000Lossless)
    (frame,) = generate_frames(ds.PixelData, number_of_frames=1)
    if way == "fragments":
        ds.PixelData = encapsulate([frame], fragments_per_frame=3)
    elif way == "no table":
        ds.PixelData = encapsulate([frame], fragments_per_frame=2, has_bot=False)
    else:
        ds.PixelData, ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = encapsulate_extended([frame])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    return ds


@case
def several_fragments_and_offset_tables_of_all_kinds(folder: Path) -> Expected:
    for k, ds in enumerate(series(SCAN)):
        write(_fragmented(ds, ("fragments", "no table", "extended")[k % 3]), folder / f"{k}", JPEG2000Lossless)
    return expect(SCAN)


def _bytes_changed(name: str, change: Callable[[bytes, int], bytes], expected: Expected) -> None:
    def write_case(folder: Path) -> Expected:
        for k, path in enumerate(write_all(series(SCAN), folder)):
            path.write_bytes(change(path.read_bytes(), k))
        return expected

    CASES[name] = write_case


_bytes_changed("no_preamble_but_meta", lambda data, _: data[132:], expect(SCAN, or_refused=True))
_bytes_changed("noise_in_the_preamble", lambda data, k: random.Random(k).randbytes(128) + data[128:], expect(SCAN))
_bytes_changed("tiff_in_the_preamble", lambda data, _: b"II*\0" + data[4:], expect(SCAN))
_bytes_changed("zip_in_the_preamble", lambda data, _: b"PK\x03\x04" + data[4:], expect(SCAN))
_bytes_changed("gzip_in_the_preamble", lambda data, _: b"\x1f\x8b\x08" + data[3:], expect(SCAN))
_bytes_changed("zeros_behind_the_end", lambda data, _: data + b"\0" * 512, expect(SCAN))
_bytes_changed("one_byte_behind_the_end", lambda data, _: data + b"\0", expect(SCAN, or_refused=True))
_bytes_changed(
    "crlf_made_of_every_lf_in_one", lambda data, k: data.replace(b"\n", b"\r\n") if k == 12 else data, refuse()
)
_bytes_changed("last_byte_missing_of_one", lambda data, k: data[:-1] if k == 3 else data, refuse())
_bytes_changed("half_of_one_missing", lambda data, k: data[: len(data) // 2] if k == 25 else data, refuse())
_bytes_changed("nothing_but_nul_in_one", lambda data, k: bytes(len(data)) if k == 5 else data, refuse(or_refused=True))
_bytes_changed("dicom_prefix_alone_in_one", lambda data, k: data[:132] if k == 5 else data, refuse())
_bytes_changed(
    "big_endian_named_little",
    lambda data, k: data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.2\0"),
    refuse(),
)
_bytes_changed(
    "deflated_named_but_not",
    lambda data, k: data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"),
    refuse(),
)
_bytes_changed(
    "unknown_transfer_syntax",
    lambda data, k: data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.7\0"),
    refuse(),
)


@case
def implicit_bytes_named_explicit(folder: Path) -> Expected:
    for path in write_all(series(SCAN), folder, syntax=ImplicitVRLittleEndian):
        path.write_bytes(path.read_bytes().replace(b"\x12\x001.2.840.10008.1.2\0", b"\x14\x001.2.840.10008.1.2.1\0"))
    return expect(SCAN, or_refused=True)


@case
def explicit_bytes_named_implicit(folder: Path) -> Expected:
    for path in write_all(series(SCAN), folder):
        path.write_bytes(path.read_bytes().replace(b"\x14\x001.2.840.10008.1.2.1\0", b"\x12\x001.2.840.10008.1.2\0"))
    return expect(SCAN, or_refused=True)


@case
def bare_dataset_without_meta(folder: Path) -> Expected:
    for k, ds in enumerate(series(SCAN)):
        path = folder / f"{k}.ima"
        folder.mkdir(exist_ok=True, parents=True)
        pydicom.dcmwrite(path, ds, implicit_vr=bool(k % 2), little_endian=True, enforce_file_format=False)
    return expect(SCAN)


@case
def private_noise_of_all_kinds(folder: Path) -> Expected:
    slices = series(SCAN)
    for k, ds in enumerate(slices):
        block = ds.private_block(0x0009, "NOISE 1.0", create=True)
        block.add_new(0x01, "UN", random.Random(k).randbytes(333 * 2))
        block.add_new(0x02, "OB", b"\x28\x00\x10\x00US\x02\x00\x01\x00" * 40)
        ds.add_new(0x00110055, "LO", "no creator")
        ds.add_new(0x7FE10010, "LO", "PIXELS OF OUR OWN")
        ds.add_new(0x7FE11010, "OW", b"\x12\x34" * 4000)
        ds.add_new(0x60000010, "US", 40)
        ds.add_new(0x60003000, "OW", b"\xff" * 240)
        ds.add_new(0x00200110, "DS", "-1")
    write_all(slices, folder)
    return expect(SCAN)


def _vr_unknown(data: bytes, _: int) -> bytes:
    return data.replace(b"\x08\x00\x3e\x10LO", b"\x08\x00\x3e\x10ZZ")


_bytes_changed("vr_that_does_not_exist", _vr_unknown, expect(SCAN, or_refused=True))


@case
def icon_with_pixels_of_its_own(folder: Path) -> Expected:
    icon = Dataset()
    set_pixels(icon, np.full((64, 64), 77), bits=8, allocated=8)
    write_all(each(series(SCAN), tags(IconImageSequence=Sequence([icon]))), folder)
    return expect(SCAN)


@case
def referenced_slices_with_positions_of_their_own(folder: Path) -> Expected:
    def change(ds: Dataset, k: int) -> None:
        item = copy.deepcopy(ds)
        del item.PixelData
        item.ImagePositionPatient, item.RescaleIntercept, item.Rows = [9, 9, 9], 5, 3
        ds.SourceImageSequence = Sequence([item])
        ds.ReferencedImageSequence = Sequence([item])

    write_all(each(series(SCAN), change), folder)
    return expect(SCAN)


@case
def character_sets_broken(folder: Path) -> Expected:
    def change(ds: Dataset, k: int) -> None:
        ds.SpecificCharacterSet = ["ISO_IR 999", "nonsense", ""][k % 3]
        ds.add_new(0x00081030, "LO", "Thorax")

    for path in write_all(each(series(SCAN), change), folder):
        path.write_bytes(path.read_bytes().replace(b"Roe^Ada", b"R\xf6\xff^Ada"[:7]))
    return expect(SCAN)


@case
def group_lengths_everywhere(folder: Path) -> Expected:
    def change(ds: Dataset, k: int) -> None:
        for group in (0x0008, 0x0010, 0x0018, 0x0020, 0x0028, 0x7FE0):
            ds.add_new((group, 0), "UL", 4 * k)

    slices = each(series(SCAN), change)
    for k, ds in enumerate(slices):
        folder.mkdir(exist_ok=True, parents=True)
        write(ds, folder / f"{k}")
    return expect(SCAN)


@case
def pixel_data_longer_than_needed(folder: Path) -> Expected:
    def change(ds: Dataset, k: int) -> None:
        ds.PixelData = ds.PixelData + b"\0" * 2

    write_all(each(series(SCAN), change), folder)
    return expect(SCAN, or_refused=True)


@case
def pixel_data_of_undefined_length_without_fragments(folder: Path) -> Expected:
    for path in write_all(series(SCAN), folder):
        data = path.read_bytes()
        at = data.rindex(b"\xe0\x7f\x10\x00OW") + 8
        path.write_bytes(data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :] + b"\xfe\xff\xdd\xe0\0\0\0\0")
    return expect(SCAN, or_refused=True)


@case
def megabytes_of_private_header(folder: Path) -> Expected:
    def change(ds: Dataset, k: int) -> None:
        if k % 13 == 0:
            ds.private_block(0x0029, "BIG", create=True).add_new(1, "OB", bytes(24_000_000))

    write_all(each(series(SCAN), change), folder)
    return expect(SCAN)


def _nested(depth: int) -> bytes:
    opened = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * depth
    return opened + b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0" * depth


@case
def sequences_ten_thousand_deep_in_one_file(folder: Path) -> Expected:
    write_all(series(OTHER, name="b", patient="Poe^Eve"), folder / "clean")
    for k, path in enumerate(write_all(series(SCAN), folder)):
        data = path.read_bytes()
        at = data.index(b"\x10\x00\x10\x00PN")
        if k == 4:
            path.write_bytes(data[:at] + _nested(10_000) + data[at:])
    return refuse(beside=(OTHER,))


@case
def sequences_fifty_deep(folder: Path) -> Expected:
    for path in write_all(series(SCAN), folder):
        data = path.read_bytes()
        at = data.index(b"\x10\x00\x10\x00PN")
        path.write_bytes(data[:at] + _nested(50) + data[at:])
    return expect(SCAN)


@case
def cut_at_every_kilobyte(folder: Path) -> Expected:
    """Series of 16 slices, each with one cut somewhere else: none may pass, and the clean one beside them must."""
    write_all(series(OTHER, name="clean", patient="Poe^Eve"), folder / "clean")
    for n, cut in enumerate([*range(140, 1300, 290), *range(1400, 4400, 700), -1, -2, -3000]):
        paths = write_all(series(SMALL, name=f"cut {n}"), folder / f"{n}")
        paths[n % 16].write_bytes(paths[n % 16].read_bytes()[:cut])
    return refuse(beside=(OTHER,))
