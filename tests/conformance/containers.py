"""Outside cases: archives, links, and files that are no CT."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import random
import socket
import struct
import tarfile
import tempfile
import zipfile
from pathlib import Path

import nibabel
import numpy as np
from conformance.case import SCAN, case
from conformance.dicom import Series, series, uid, write, write_all
from conformance.encodings import OTHER
from conformance.judge import Expected, expect, refuse
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence


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
    # What is left of flipped.zip is regular in itself, and lacks its first slice.
    return refuse("bad_archive", "encrypted", "stand_ins", beside=(OTHER,))


@case
def zip_bomb_beside_a_series(folder: Path) -> Expected:
    write_all(series(SCAN), folder / "clean")
    _zip(folder / "bomb.zip", {f"{k}": bytes(30_000_000) for k in range(4)})
    return expect(SCAN, or_refused=True)


@case
def zip_with_a_dicom_bomb(folder: Path) -> Expected:
    write_all(series(OTHER, name="b", patient="Poe^Eve"), folder / "clean")
    files = _files(series(SCAN))
    files["007"] += bytes(150_000_000)
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


@case
def junk_of_all_kinds(folder: Path) -> Expected:
    write_all(series(SCAN), folder / "clean")
    junk = {
        "empty": b"",
        "bom.txt": b"\xef\xbb\xbfhello",
        "nul": bytes(5000),
        "one": b"D",
        "DICM": b"DICM",
        "report.pdf": b"%PDF-1.7\n",
        ".DS_Store": b"\0\0\0\1Bud1",
        "Thumbs.db": b"\xd0\xcf\x11\xe0" + bytes(600),
        "x.dcm": b"not dicom at all " * 30,
        "y.nii": b"hello",
        "random": random.Random(1).randbytes(40_000),
        "page.nii.gz": b"<!DOCTYPE html><html>404</html>",
        "image.png": b"\x89PNG\r\n\x1a\n" + bytes(90),
        "table.csv": b"a,b\n1,2\n",
        "short.gz": b"\x1f\x8b",
        "short.zip": b"PK\x03\x04",
        "348": struct.pack("<i", 348) + bytes(2000),
        "z.hdr": bytes(348),
    }
    for name, data in junk.items():
        (folder / name).write_bytes(data)
    return expect(SCAN, or_refused=True)


@case
def pipes_sockets_and_links_in_circles(folder: Path) -> Expected:
    write_all(series(SCAN), folder / "clean")
    os.mkfifo(folder / "pipe.dcm")
    here = Path.cwd()
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
