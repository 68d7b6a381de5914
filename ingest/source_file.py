"""Opening a source: a file or object, or a member of a zip archive read in place (nothing is extracted to disk).

A member is named by the path of its archive with the member's name behind it. What unpacks to more than its budget is
refused before it is unpacked.
"""

from __future__ import annotations

import functools
import io
import os
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import pydicom
from pydicom.dataset import FileDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from maesil.errors import MaesilError, Refused
from maesil.ingest.objects import AHEAD, is_object, open_object, with_known_size
from maesil.ingest.plain_file import read_plain
from maesil.ingest.source_path import ObjectFile, SourcePath
from maesil.store.storage import Stamp

MAX_HEADER_BYTES = 1 << 24
"""A header behind which the pixels have not begun by then is no header."""
MAX_MEMBER_BYTES = 1 << 32
MAX_RATIO = 250
"""Deflated CT shrinks by 2 to 20; beyond this ratio a large source is a bomb."""
RATIO_MATTERS_ABOVE = 1 << 27
WHOLE_MEMBER_BYTES = 1 << 26
_DEFLATED = str(DeflatedExplicitVRLittleEndian).encode()
_META_LENGTH_AT = 140
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
_OTHER_ZIP_METHODS = {9: "Deflate64", 93: "Zstandard", 95: "XZ", 98: "PPMd", 99: "AES"}


def open_source(path: SourcePath, ahead: int = AHEAD) -> IO[bytes]:
    """Return a readable, seekable stream of a file, an object or a member of an archive; `Refused` beyond the limits.

    Of an object at least ``ahead`` bytes are read at once.
    """
    if isinstance(path, ObjectFile) and path.archive is None:
        return open_object(path, ahead)
    try:
        if isinstance(path, Path):
            return path.open("rb")
    except NotADirectoryError:
        pass
    return _open_member(path, ahead)


def file_on_disk(path: SourcePath) -> SourcePath:
    """Return the file or object itself, or the archive it is a member of."""
    if isinstance(path, ObjectFile):
        return path.archive or path
    try:
        path.lstat()
        return path
    except NotADirectoryError:
        return archive_and_member(path)[0]


def archive_and_member(path: SourcePath) -> tuple[SourcePath, str]:
    """Return the archive and the name within it; `Refused` if nothing of that name is there."""
    if isinstance(path, ObjectFile):
        assert path.archive is not None
        return path.archive, path.folder.removeprefix(f"{path.archive.folder}/")
    for parent in path.parents:
        if parent.is_file():
            return parent, path.relative_to(parent).as_posix()
    raise Refused("vanished", "the file was there when the folder was scanned and is gone now")


def member_of(archive: SourcePath, name: str) -> SourcePath:
    """Return what names a member of an archive."""
    return archive.member(name) if isinstance(archive, ObjectFile) else archive / name


def stamp_of(path: SourcePath) -> Stamp:
    """Return the size (bytes) of a file or object, or of the archive of a member, and by what a change of it is seen.

    OSError, or `Refused`, if it is gone.
    """
    there = file_on_disk(path)
    if isinstance(there, ObjectFile):
        there = with_known_size(there)
        return there.size, there.stamp
    status = there.stat()
    return status.st_size, status.st_mtime_ns


def known_stamp(path: SourcePath) -> Stamp | None:
    """Return what `stamp_of` does, None where nothing can be looked at."""
    try:
        return stamp_of(path)
    except (OSError, Refused):
        return None


def is_bomb(packed: int, unpacked: int) -> bool:
    """Return whether a source of so many bytes claims more than CT can unpack to."""
    return unpacked > RATIO_MATTERS_ABOVE and unpacked > MAX_RATIO * max(packed, 1)


@functools.lru_cache(maxsize=4)
def _archive(path: SourcePath, stamp: Stamp, ahead: int) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    archive = zipfile.ZipFile(open_object(path, ahead) if isinstance(path, ObjectFile) else path)
    infos: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if not info.is_dir():
            name = member_name(info)
            while name in infos:  # two members of one name are two files
                name += "~"
            infos[name] = info
    return archive, infos


def members(path: SourcePath) -> dict[str, zipfile.ZipInfo]:
    """Return the members of an archive by a name that stays within it; raises `zipfile.BadZipFile`."""
    return _archive(path, stamp_of(path), AHEAD)[1]


def member_name(info: zipfile.ZipInfo) -> str:
    """Return the name of a member without what would lead out of the archive."""
    parts = info.filename.replace("\\", "/").replace("\0", "").split("/")
    return "/".join(part for part in parts if part not in ("", ".", "..")) or "unnamed"


def member_in(path: SourcePath, ahead: int = AHEAD) -> tuple[zipfile.ZipFile, zipfile.ZipInfo]:
    """Return the archive of a member and its entry there; `Refused` if it is gone, or must not be unpacked."""
    place, name = archive_and_member(path)
    try:
        archive, infos = _archive(place, stamp_of(place), ahead)
        info = infos[name]
    except (zipfile.BadZipFile, KeyError) as error:
        raise Refused("vanished", "the archive no longer holds this file") from error
    check_member(info)
    return archive, info


def _open_member(path: SourcePath, ahead: int) -> IO[bytes]:
    archive, info = member_in(path, ahead)
    member = archive.open(info)
    if info.file_size > WHOLE_MEMBER_BYTES or isinstance(path, ObjectFile):  # from afar, no more than is asked for
        return member
    with member:  # reading back and forth in a compressed stream is slow: small members are unpacked at once
        return io.BytesIO(member.read())


def check_member(info: zipfile.ZipInfo) -> None:
    """Raise `Refused` for what must not be unpacked."""
    if info.flag_bits & 1:
        raise Refused("encrypted", "the member of the archive is encrypted; unpack it and name the folder")
    if info.compress_type not in _ZIP_METHODS:
        name = _OTHER_ZIP_METHODS.get(info.compress_type, "an unknown method")
        text = f"the member is compressed by {name} (method {info.compress_type}), which is not read here"
        raise Refused("zip_method", f"{text}; unpack the archive and name the folder")
    if info.file_size > MAX_MEMBER_BYTES or is_bomb(info.compress_size, info.file_size):
        text = f"{info.compress_size} bytes claim to unpack to {info.file_size}"
        raise Refused("size_limit", f"expected at most {MAX_RATIO} times as many bytes, found: {text}")


def read_dataset(
    path: SourcePath, *, tags: Collection[int] | None = None, max_bytes: int = MAX_MEMBER_BYTES
) -> FileDataset:
    """Parse a DICOM file, with ``tags`` only these and no pixels; a deflated one to ``max_bytes`` at most.

    Sequences that say nothing of pixels may be left out. `Refused` if it is no DICOM, or unpacks to more.
    """
    options: dict[str, Any] = {"stop_before_pixels": True, "specific_tags": list(tags)} if tags else {}
    try:
        with open_source(path) as stream:
            if (plain := read_plain(stream, tags)) is not None:
                return plain
            stream.seek(0)
            head = stream.read(1024)
            deflated = _DEFLATED in head
            stream.seek(0)
            source = _inflated(stream, max_bytes, cut=tags is not None) if deflated else stream
            dataset = pydicom.dcmread(_Header(source) if tags else source, force=True, **options)
        if deflated:
            dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        return dataset
    except FileNotFoundError as error:
        raise Refused("vanished", "the file was there when the folder was scanned and is gone now") from error
    except (OSError, Refused, MaesilError, MemoryError):
        raise
    except Exception as error:  # a broken file makes pydicom raise anything
        raise Refused("bad_dicom", f"the file cannot be parsed as DICOM ({type(error).__name__})") from error


class _Header:
    """A stream of which only so much may be read: gigabytes of zeros are a header without end."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._left = MAX_HEADER_BYTES
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int = -1) -> bytes:
        """Read on; `Refused` beyond the limit. What is skipped by `seek` does not count."""
        data = self._stream.read(size if 0 <= size <= self._left else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise Refused("size_limit", f"expected a header of at most {MAX_HEADER_BYTES} bytes, found no end of it")
        return data


def _inflated(stream: IO[bytes], max_bytes: int, *, cut: bool) -> io.BytesIO:
    """Return a deflated DICOM file (PS3.5 A.5) as plain explicit little endian, inflated to a limit."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    data = stream.read(size)
    start = _META_LENGTH_AT + 4 + int.from_bytes(data[_META_LENGTH_AT : _META_LENGTH_AT + 4], "little")
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    body = inflater.decompress(data[start:], max_bytes)
    if inflater.unconsumed_tail and not cut:
        raise Refused("size_limit", f"expected at most {max_bytes} bytes once inflated, found more")
    if not inflater.eof and not inflater.unconsumed_tail:
        raise EOFError("the deflated data set was cut")
    plain = str(ExplicitVRLittleEndian).encode().ljust(len(_DEFLATED), b"\0")
    return io.BytesIO(data[:start].replace(_DEFLATED, plain) + body)


def is_there(path: SourcePath) -> bool:
    """Return whether a file or object, or a member of an archive, exists."""
    if isinstance(path, ObjectFile) and path.archive is None:
        return is_object(path)
    if isinstance(path, Path) and path.is_file():
        return True
    try:
        archive, name = archive_and_member(path)
        return name in members(archive)
    except (Refused, zipfile.BadZipFile):
        return False
