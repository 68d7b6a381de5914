"""Outside cases of files: encodings, containers, odd headers, damage, bombs, and what is no CT at all."""

from __future__ import annotations

import bz2
import copy
import gzip
import io
import os
import random
import socket
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000,
    JPEG2000Lossless,
    JPEGLSLossless,
    JPEGLosslessSV1,
    JPEGLSNearLossless,
    RLELossless,
)

from tests.support.outside_dicom import Series, compressed, each, series, set_pixels, stored_of, uid, write, write_all
from tests.support.outside_judge import Expected, expect, refuse
from tests.support.outside_phantom import Scan
from tests.support.outside_slices import SCAN, Case, tags

CASES: dict[str, Case] = {}
OTHER = SCAN.but(enhancement=77)
SMALL = Scan(shape=(16, 40, 48))


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


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


# --- odd but readable files -------------------------------------------------------------------------------------------


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
    """Sixteen-slice series, each with one slice cut somewhere else: none may pass, and the clean one beside them must."""
    write_all(series(OTHER, name="clean", patient="Poe^Eve"), folder / "clean")
    for n, cut in enumerate([*range(140, 1300, 290), *range(1400, 4400, 700), -1, -2, -3000]):
        paths = write_all(series(SMALL, name=f"cut {n}"), folder / f"{n}")
        paths[n % 16].write_bytes(paths[n % 16].read_bytes()[:cut])
    return refuse(beside=(OTHER,))


# --- containers -------------------------------------------------------------------------------------------------------


def _zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def _files(slices: Series) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as scratch:
        return {f"{k:03d}": write(ds, Path(scratch) / f"{k}").read_bytes() for k, ds in enumerate(slices)}


@case
def half_of_a_series_in_each_of_two_zips(folder: Path) -> Expected:
    files = list(_files(series(SCAN)).items())
    _zip(folder / "odd.zip", dict(files[1::2]))
    _zip(folder / "even.bin", dict(files[::2]), zipfile.ZIP_STORED)
    return expect(SCAN)


@case
def same_series_in_two_zips_and_a_folder(folder: Path) -> Expected:
    write_all(series(SCAN), folder / "plain")
    files = _files(series(SCAN))
    _zip(folder / "a.zip", files)
    _zip(folder / "b.zip", files, zipfile.ZIP_BZIP2)
    return expect(SCAN, counted={"duplicate_slice": 52})


@case
def zip_of_evil_names(folder: Path) -> Expected:
    names = [
        "../../../../tmp/maesil_evil",
        "/etc/maesil_evil",
        "C:\\windows\\evil",
        "a/../../b",
        "con",
        "x" * 300,
        "\u202egnp.exe",
        " ",
    ]
    files = list(_files(series(SCAN)).values())
    _zip(folder / "evil.zip", {(names[k] if k < len(names) else f"{k}"): data for k, data in enumerate(files)})
    return expect(SCAN)


@case
def zip_within_a_zip(folder: Path) -> Expected:
    inner = _zip(folder / "inner.zip", _files(series(SCAN)))
    (folder / "inner.zip").unlink()
    _zip(folder / "outer.zip", {"inner.zip": inner, "read me.txt": b"hello"})
    write_all(series(OTHER, name="b", patient="Poe^Eve"), folder / "clean")
    return expect(OTHER)


@case
def zip_cut_and_zip_encrypted_and_zip_with_a_wrong_checksum(folder: Path) -> Expected:
    write_all(series(OTHER, name="b", patient="Poe^Eve"), folder / "clean")
    whole = _zip(folder / "cut.zip", _files(series(SCAN)), zipfile.ZIP_STORED)
    (folder / "cut.zip").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[5000] ^= 1
    (folder / "flipped.zip").write_bytes(bytes(flipped))
    locked = bytearray(_zip(folder / "locked.zip", _files(series(SCAN, name="locked")), zipfile.ZIP_STORED))
    for magic, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = 0
        while (start := locked.find(magic, start)) >= 0:
            locked[start + at] |= 1
            start += 4
    (folder / "locked.zip").write_bytes(bytes(locked))
    return refuse("bad_archive", "encrypted", beside=(OTHER, SCAN.part(1, 26)))  # what is left of flipped.zip is whole


@case
def zip_bomb_beside_a_series(folder: Path) -> Expected:
    write_all(series(SCAN), folder / "clean")
    _zip(folder / "bomb.zip", {f"{k}": bytes(60_000_000) for k in range(6)})
    return expect(SCAN, or_refused=True)


@case
def zip_with_a_dicom_bomb(folder: Path) -> Expected:
    write_all(series(OTHER, name="b", patient="Poe^Eve"), folder / "clean")
    files = _files(series(SCAN))
    files["007"] += bytes(400_000_000)
    _zip(folder / "bomb.zip", files)
    return refuse(beside=(OTHER,))


@case
def every_slice_gzipped(folder: Path) -> Expected:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in _files(series(SCAN)).items():
        (folder / f"{name}.dcm.gz").write_bytes(gzip.compress(data, 1))
    write_all(series(OTHER, name="b", patient="Poe^Eve"), folder / "clean")
    return expect(OTHER, counted={"gzip_of_something_else": 26})


@case
def tar_and_bz2_and_rar_and_7z(folder: Path) -> Expected:
    write_all(series(SCAN), folder / "clean")
    with tarfile.open(folder / "a.tar", "w") as archive:
        archive.add(folder / "clean", "clean")
    (folder / "b.tar.gz").write_bytes(gzip.compress((folder / "a.tar").read_bytes(), 1))
    (folder / "c.tar.bz2").write_bytes(bz2.compress((folder / "a.tar").read_bytes(), 1))
    (folder / "d.rar").write_bytes(b"Rar!\x1a\x07\x00" + bytes(500))
    (folder / "e.7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(500))
    return expect(SCAN)


# --- what is no CT ----------------------------------------------------------------------------------------------------


@case
def junk_of_all_kinds(folder: Path) -> Expected:
    write_all(series(SCAN), folder / "clean")
    junk = {
        "empty": b"", "bom.txt": b"\xef\xbb\xbfhello", "nul": bytes(5000), "one": b"D", "DICM": b"DICM", "report.pdf": b"%PDF-1.7\n",
        ".DS_Store": b"\0\0\0\1Bud1", "Thumbs.db": b"\xd0\xcf\x11\xe0" + bytes(600), "x.dcm": b"not dicom at all " * 30, "y.nii": b"hello",
        "random": random.Random(1).randbytes(40_000), "page.nii.gz": b"<!DOCTYPE html><html>404</html>", "image.png": b"\x89PNG\r\n\x1a\n" + bytes(90),
        "table.csv": b"a,b\n1,2\n", "short.gz": b"\x1f\x8b", "short.zip": b"PK\x03\x04", "348": struct.pack("<i", 348) + bytes(2000), "z.hdr": bytes(348),
    }  # fmt: skip
    for name, data in junk.items():
        (folder / name).write_bytes(data)
    return expect(SCAN, or_refused=True)


@case
def pipes_sockets_and_links_in_circles(folder: Path) -> Expected:
    write_all(series(SCAN), folder / "clean")
    os.mkfifo(folder / "pipe.dcm")
    here = os.getcwd()
    os.chdir(folder)  # a socket's path may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket")
    finally:
        os.chdir(here)
    (folder / "up").symlink_to("..")
    (folder / "self").symlink_to("self")
    (folder / "nowhere").symlink_to("/nonexistent/x")
    (folder / "zero").symlink_to("/dev/zero")
    return expect(SCAN)


@case
def links_followed_on_request(folder: Path) -> Expected:
    target = folder.with_name(folder.name + "_elsewhere")
    write_all(series(SCAN), target)
    write_all(series(OTHER, name="b", patient="Poe^Eve"), folder / "clean")
    (folder / "link").symlink_to(target)
    (folder / "loop").symlink_to(".")
    (folder / "zero").symlink_to("/dev/zero")
    return expect(SCAN, OTHER, options=("--follow-links",))


@case
def hard_links_of_every_slice(folder: Path) -> Expected:
    for k, path in enumerate(write_all(series(SCAN), folder / "clean")):
        os.link(path, folder / f"{k}")
    return expect(SCAN, counted={"duplicate_slice": 26})


@case
def files_that_may_not_be_read(folder: Path) -> Expected:
    """Mode 000 stops nobody who is root."""
    write_all(series(OTHER, name="b", patient="Poe^Eve"), folder / "clean")
    for path in write_all(series(SCAN), folder):
        path.chmod(0)
    return expect(OTHER, SCAN) if os.geteuid() == 0 else refuse("unreadable", beside=(OTHER,))


@case
def sparse_giants(folder: Path) -> Expected:
    write_all(series(SCAN), folder / "clean")
    for name, head in (
        ("giant.dcm", bytes(132)),
        ("giant.nii", struct.pack("<i", 348) + bytes(344)),
        ("giant", bytes(128) + b"DICM"),
    ):
        with (folder / name).open("wb") as file:
            file.write(head)
            file.truncate(9_000_000_000)
    return expect(SCAN, or_refused=True)


@case
def dicom_named_nifti_and_nifti_named_dicom(folder: Path) -> Expected:
    for k, ds in enumerate(series(SCAN)):
        write(ds, folder / f"{k}.nii")
    affine = np.diag([-1.0, -1, 1, 1]) @ OTHER.affine
    affine[:, :3] = affine[:, 2::-1]
    image = nibabel.Nifti1Image(OTHER.values().transpose(2, 1, 0).astype(np.int16), affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    (folder / "000.dcm").write_bytes(image.to_bytes())
    (folder / "image.dcm.gz").write_bytes(gzip.compress(b"not an image"))
    return expect(SCAN, OTHER)


@case
def dicomdir_of_a_disc(folder: Path) -> Expected:
    write_all(series(SCAN), folder / "A" / "B")
    directory = Dataset()
    directory.SOPClassUID, directory.SOPInstanceUID, directory.FileSetID = "1.2.840.10008.1.3.10", uid("dir"), "DISC"
    item = Dataset()
    item.DirectoryRecordType, item.ReferencedFileID = "IMAGE", ["..", "..", "etc", "passwd"]
    directory.DirectoryRecordSequence = Sequence([item])
    write(directory, folder / "DICOMDIR")
    write(directory, folder / "index.bin")
    return expect(SCAN, counted={"dicomdir": 1, "not_ct_image": 1})


# --- bombs ------------------------------------------------------------------------------------------------------------


def _bomb(name: str, change: Callable[[Dataset], str | None]) -> None:
    def write_case(folder: Path) -> Expected:
        write_all(series(OTHER, name="b", patient="Poe^Eve"), folder / "clean")
        slices = series(SMALL)
        syntaxes = [change(ds) for ds in slices]
        for k, (ds, syntax) in enumerate(zip(slices, syntaxes, strict=True)):
            write(ds, folder / f"{k}", syntax or "1.2.840.10008.1.2.1")
        return refuse(beside=(OTHER,))

    CASES[name] = write_case


def _huge_matrix(ds: Dataset) -> None:
    ds.Rows = ds.Columns = 65535


def _rows_zero(ds: Dataset) -> None:
    ds.Rows = 0


def _j2k_claims_more(ds: Dataset) -> str:
    (frame,) = generate_frames(compressed(ds, JPEG2000Lossless).PixelData, number_of_frames=1)
    at = frame.index(b"\xff\x51") + 6
    frame = frame[:at] + struct.pack(">II", 60_000, 60_000) + frame[at + 8 :]
    ds.PixelData = encapsulate([frame])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    return JPEG2000Lossless


def _rle_bomb(ds: Dataset) -> str:
    ds.Rows = ds.Columns = 8192
    run = b"\x81\x00" * 262_144
    ds.PixelData = encapsulate([struct.pack("<16I", 2, 64, 64 + len(run), *[0] * 13) + run * 2])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    return RLELossless


def _rle_segments_past_the_end(ds: Dataset) -> str:
    ds.PixelData = encapsulate([struct.pack("<16I", 15, *[0xFFFFFF00] * 15) + bytes(100)])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    return RLELossless


def _jls_of_noise(ds: Dataset) -> str:
    ds.PixelData = encapsulate([b"\xff\xd8\xff\xf7" + random.Random(1).randbytes(3000)])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    return JPEGLSLossless


def _j2k_of_another_size(ds: Dataset) -> str:
    small = copy.deepcopy(ds)
    set_pixels(small, stored_of(ds)[:36, :36])
    ds.PixelData = compressed(small, JPEG2000Lossless).PixelData
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    return JPEG2000Lossless


def _two_samples(ds: Dataset) -> None:
    ds.SamplesPerPixel = 2


_bomb("matrix_of_65535", _huge_matrix)
_bomb("matrix_without_rows", _rows_zero)
_bomb("jpeg_2000_claims_60000", _j2k_claims_more)
_bomb("rle_of_zeros_8192_wide", _rle_bomb)
_bomb("rle_segments_past_the_end", _rle_segments_past_the_end)
_bomb("jpeg_ls_of_noise", _jls_of_noise)
_bomb("jpeg_2000_of_another_size", _j2k_of_another_size)
_bomb("two_samples_a_pixel", _two_samples)


@case
def deflated_bomb(folder: Path) -> Expected:
    write_all(series(OTHER, name="b", patient="Poe^Eve"), folder / "clean")
    ds = series(SCAN)[0]
    ds.PixelData = ds.PixelData + bytes(300_000_000)
    write(ds, folder / "bomb", DeflatedExplicitVRLittleEndian)
    return expect(OTHER)


@case
def element_that_claims_four_gigabytes(folder: Path) -> Expected:
    write_all(series(OTHER, name="b", patient="Poe^Eve"), folder / "clean")
    for path in write_all(series(SMALL), folder):
        data = path.read_bytes()
        at = data.rindex(b"\xe0\x7f\x10\x00OW") + 8
        path.write_bytes(data[:at] + b"\xf0\xff\xff\xff" + data[at + 4 :])
    return refuse(beside=(OTHER,))


@case
def gzip_bomb_named_nifti(folder: Path) -> Expected:
    write_all(series(SCAN), folder / "clean")
    (folder / "bomb.nii.gz").write_bytes(gzip.compress(bytes(300_000_000), 9))
    (folder / "twice.nii.gz").write_bytes(gzip.compress(gzip.compress(bytes(100_000_000), 9), 9))
    return expect(SCAN, or_refused=True)
