"""Finding what lies below the sources: headers first, no pixel is touched.

A file is known by its content, never by its name alone. Every file found, members of zip archives among them, leaves
with a header to plan from or with a verdict; nothing is passed over in silence.
"""

from __future__ import annotations

import functools
import gzip
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from maesil.errors import NoInputError, Refused, UsageError
from maesil.ingest.header import InstanceHeader, read_headers
from maesil.ingest.nifti import Claim, claim_of
from maesil.ingest.objects import objects_below, with_heads
from maesil.ingest.source_file import check_member, file_on_disk, is_there, member_of, members, open_source
from maesil.ingest.source_path import ObjectFile, SourcePath, SourcePlace
from maesil.ingest.stand_in import stand_in_for
from maesil.ingest.verdict import FileVerdict, Status
from maesil.store.store import is_store
from maesil.store.urls import ObjectUrl
from maesil.text import counted

_SNIFF = 512
_NIFTI_MAGIC_AT = {348: 344, 540: 4}
_DICOM_GROUPS = (b"\x02\x00", b"\x08\x00")
_APPLE_DOUBLE = b"\0\5\x16\7"
"""What a Mac leaves beside each file on a foreign disk and in archives, under its name with ``._`` before."""
_UNPACK = "an archive that is not read; unpack it and name the folder"
_CONVERT = "which is not read; convert it to NIfTI (for example by SimpleITK) and name that"
_WAY_OUT = {
    "gzip_of_something_else": "a gzip file that is no NIfTI; if it holds scans, unpack it and name the folder",
    "other_archive": _UNPACK,
    "metaimage": f"a MetaImage, {_CONVERT}",
    "nrrd": f"an NRRD image, {_CONVERT}",
}
_LOW_ELEMENTS = (b"\x00\x00", b"\x01\x00", b"\x02\x00", b"\x05\x00", b"\x08\x00", b"\x16\x00")


@dataclass
class ScanResult:
    """What was found: DICOM slices and NIfTI files to plan from, and verdicts on everything else."""

    instances: list[InstanceHeader] = field(default_factory=list)
    niftis: list[SourcePath] = field(default_factory=list)
    claims: dict[SourcePath, Claim] = field(default_factory=dict)
    """What the header of each NIfTI file claims: read while its first bytes are at hand, and once for all parts."""
    verdicts: list[FileVerdict] = field(default_factory=list)

    @property
    def found(self) -> int:
        """How many files were found."""
        return len({header.path for header in self.instances}) + len(self.niftis) + len(self.verdicts)


def scan(
    sources: Iterable[SourcePlace],
    on_file: Callable[[SourcePath], None] = lambda path: None,
    *,
    follow_links: bool = False,
) -> ScanResult:
    """Look at every file at or below the sources; `NoInputError` if a source does not exist.

    Symbolic links below a source are followed only if asked. A path reached twice is looked at once.
    """
    result = ScanResult()
    for path in with_heads(find_files(sources, follow_links=follow_links)):
        on_file(path)
        look_at_listed(path, result, follow_links=follow_links)
    return result


def look_at_listed(path: SourcePath, result: ScanResult, *, follow_links: bool) -> None:
    """Add to a result what one file of a listing is."""
    if isinstance(path, ObjectFile):
        _look_at(path, result)
    elif path.is_symlink() and not (follow_links and path.is_file()):
        result.verdicts.append(FileVerdict(path, "ignored", "symlink", detail=_why_not_followed(path)))
    elif not path.is_file() and not path.is_dir():
        result.verdicts.append(FileVerdict(path, "ignored", "not_a_file", detail="a pipe, socket or device"))
    else:
        _look_at(path, result)


def _why_not_followed(link: Path) -> str:
    if link.exists():
        return "a link, which is not followed; --follow-links follows it"
    if stand_in := stand_in_for(os.fsencode(link.readlink())):
        return stand_in
    return "a link that leads nowhere"


def require_no_store_among(sources: Sequence[SourcePlace]) -> None:
    """Raise UsageError for a store that is given as a source: what it holds was made from scans already."""
    for source in sources:
        if isinstance(source, ObjectUrl):  # its listing tells
            continue
        store = next((folder for folder in (source, *source.absolute().parents) if is_store(folder)), None)
        if store is not None:
            raise UsageError(
                f"{source}: expected scans, found a store that `maesil ingest` made; `maesil train {store} --out RUN` "
                f"trains on it, `maesil store info {store}` says what is in it"
            )


def find_files(sources: Iterable[SourcePlace], *, follow_links: bool = False) -> Iterator[SourcePath]:
    """Yield all that is no folder at or below the sources, each path once, in sorted order; objects as listed."""
    sources = list(sources)
    seen: set[str] | None = set() if follow_links or _overlap(sources) else None
    for source in sources:
        for path in objects_below(source) if isinstance(source, ObjectUrl) else _files_below(source, follow_links):
            if seen is None:  # no file can be met twice, and nothing of millions is remembered
                yield path
                continue
            real = _real_name(path, follow_links)
            if real not in seen:
                seen.add(real)
                yield path


def _overlap(sources: Sequence[SourcePlace]) -> bool:
    """Return whether files of one source may lie within another's."""
    real = [f"{place if isinstance(place, ObjectUrl) else os.path.realpath(place)}/" for place in sources]
    named = [place for place in sources if isinstance(place, Path) and not place.is_dir()]
    if named and len(sources) > 1:
        return True  # a file brings its pair along
    ordered = sorted(real)
    return any(after.startswith(before) for before, after in pairwise(ordered))


def _files_below(source: Path, follow_links: bool) -> Iterable[Path]:
    if not source.exists():
        raise NoInputError(f"{source}: expected a file or folder with CT, found nothing there; check the path")
    return _named(source.resolve()) if source.is_file() else _walk(source, follow_links)


def _real_name(path: SourcePath, follow_links: bool) -> str:
    if isinstance(path, ObjectFile):
        return str(path)
    return os.path.realpath(path) if follow_links else f"{_real_folder(path.parent)}/{path.name}"


def _named(file: Path) -> list[Path]:
    """Return a file that was named by itself (what is named is followed), and the header of one that has none."""
    if file.name.lower().endswith((".img", ".img.gz")):
        return [file, *(header for header in _headers_of(file) if isinstance(header, Path) and header.is_file())]
    return [file]


@functools.lru_cache(maxsize=64)
def _real_folder(folder: Path) -> str:
    return os.path.realpath(folder)


def _walk(folder: Path, follow_links: bool) -> Iterator[Path]:
    """Yield all that is no folder, links to folders that are not followed, and folders that cannot be listed."""
    unlisted: list[Path] = []
    entered: set[str] = set()
    walk = os.walk(folder, onerror=lambda error: unlisted.append(Path(error.filename)), followlinks=follow_links)
    for base, folders, files in walk:
        folders.sort()
        real = os.path.realpath(base) if follow_links else base
        # A store, ours or another's, is no source; a folder that a link leads back to was entered already.
        if real in entered or (Path(base) / "zarr.json").exists():
            folders.clear()
            continue
        entered.add(real)
        links = [] if follow_links else [name for name in folders if Path(base, name).is_symlink()]
        for name in sorted(files + links):
            yield Path(base) / name
    yield from unlisted


def _look_at(path: SourcePath, result: ScanResult) -> None:
    try:
        if isinstance(path, Path) and path.is_dir():
            result.verdicts.append(FileVerdict(path, "quarantined", "unreadable", detail="the folder cannot be listed"))
        else:
            _look_into(path, result)
    except Refused as refusal:
        status: Status = "skipped" if refusal.code.startswith("not_ct") else "quarantined"
        result.verdicts.append(FileVerdict(path, status, refusal.code, detail=refusal.detail))
    except OSError as error:
        result.verdicts.append(FileVerdict(path, "quarantined", "unreadable", detail=error.strerror or str(error)))


def _look_into(path: SourcePath, result: ScanResult) -> None:
    head = _head(path)
    pointer = stand_in_for(head, path.name)
    kind = _claimed_nifti(path, "not_fetched") if pointer else _kind(path, head)
    if kind == "dicom":
        result.instances.extend(read_headers(path))
    elif kind == "nifti":
        result.niftis.append(path)
        result.claims[path] = claim_of(path)
    elif kind == "archive" and file_on_disk(path) == path:
        _look_into_archive(path, result)
    else:
        kind = "other_archive" if kind == "archive" else kind  # one within an archive is not opened
        result.verdicts.append(FileVerdict(path, "ignored", kind, detail=pointer or _WAY_OUT.get(kind, "")))


def _look_into_archive(path: SourcePath, result: ScanResult) -> None:
    """Treat each member like a file of its own; the archive itself is accounted for besides."""
    try:
        found = members(path)
    except (zipfile.BadZipFile, RuntimeError, ValueError) as error:  # RuntimeError: what zipfile does not know
        raise Refused(
            "bad_archive", f"the zip archive cannot be read ({error}); unpack it and name the folder"
        ) from error
    for name, info in sorted(found.items()):
        member = member_of(path, name)
        try:
            check_member(info)
            _look_at(member, result)
        except Refused as refusal:
            result.verdicts.append(FileVerdict(member, "quarantined", refusal.code, detail=refusal.detail))
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            result.verdicts.append(FileVerdict(member, "quarantined", "bad_archive", detail=str(error)))
    detail = f"{counted(len(found), 'file')} in it, each with a verdict of its own"
    result.verdicts.append(FileVerdict(path, "ignored", "archive", detail=detail))


def _head(path: SourcePath) -> bytes:
    with open_source(path) as file:
        return file.read(_SNIFF)


def _kind(path: SourcePath, head: bytes) -> str:
    """Return ``dicom``, ``nifti``, or the code under which the file is ignored."""
    if head[:4] == _APPLE_DOUBLE:
        return "not_medical"
    if not head:
        return _claimed_nifti(path, "empty")
    if head[128:132] == b"DICM":
        return "dicom" if path.name.upper() != "DICOMDIR" else "dicomdir"
    if head[:2] in _DICOM_GROUPS and head[2:4] in _LOW_ELEMENTS:
        return "dicom"  # no preamble: starts with a low element of group 0002 or 0008
    if head[:2] == b"\x1f\x8b":
        if _is_nifti(_gunzip_head(path)):
            return "nifti"
        is_image = path.name.lower().endswith(".img.gz") and any(map(is_there, _headers_of(path)))
        return "image_of_a_hdr_pair" if is_image else _claimed_nifti(path, "gzip_of_something_else")
    if _is_nifti(head) or _is_nifti(head + _rest_of_header(path, head)):
        # The .img of a pair has no header of its own; its .hdr brings it along.
        return "nifti"
    if path.name.lower().endswith(".img") and any(map(is_there, _headers_of(path))):
        return "image_of_a_hdr_pair"
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "archive"
    return _claimed_nifti(path, _foreign(path, head))


def _foreign(path: SourcePath, head: bytes) -> str:
    """Return the code of a container or an image format that is not read, else that of what is no medical image."""
    if head.startswith((b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07")) or head[257:262] == b"ustar":
        return "other_archive"
    if head.startswith(b"NRRD000"):
        return "nrrd"
    if path.name.lower().endswith((".mha", ".mhd")) and b"NDims" in head and b"=" in head:
        return "metaimage"
    return "not_medical"


def _headers_of(image: SourcePath) -> list[SourcePath]:
    stem = image.with_suffix("") if image.suffix.lower() == ".gz" else image
    return [stem.with_suffix(suffix) for suffix in (".hdr", ".HDR", ".hdr.gz")]


def _claimed_nifti(path: SourcePath, otherwise: str) -> str:
    """A file whose name claims NIfTI goes on as one, so that its refusal says what is wrong with it."""
    return "nifti" if path.name.lower().endswith((".nii", ".nii.gz")) else otherwise


def _rest_of_header(path: SourcePath, head: bytes) -> bytes:
    if head[:4] not in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c"):
        return b""
    with open_source(path) as file:
        file.seek(len(head))
        return file.read(540 - len(head))


def _gunzip_head(path: SourcePath) -> bytes:
    try:
        with open_source(path) as file, gzip.open(file) as stream:
            return stream.read(_SNIFF)
    except (OSError, EOFError, zlib.error):
        return b""


def _is_nifti(head: bytes) -> bool:
    size = head[:4]
    for order in ("little", "big"):
        at = _NIFTI_MAGIC_AT.get(int.from_bytes(size, order))  # type: ignore[arg-type]
        if at is not None:
            return head[at : at + 3] in (b"n+1", b"ni1", b"n+2", b"ni2")
    return False
