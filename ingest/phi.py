"""Searching a finished store for what its sources say of their patients. It finds; it removes nothing."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import nibabel as nib

from maesil.errors import Refused
from maesil.ingest.header import without_warnings
from maesil.ingest.objects import with_heads
from maesil.ingest.source_file import MAX_HEADER_BYTES, open_source, read_dataset
from maesil.ingest.source_path import SourcePath
from maesil.ingest.values import tags_of
from maesil.parquet import read_parquet
from maesil.store.store import Store
from maesil.text import counted

_TAGS_BY_WORD = (
    "PatientName",
    "PatientID",
    "OtherPatientIDs",
    "OtherPatientNames",
    "PatientBirthDate",
    "PatientAddress",
    "PatientTelephoneNumbers",
    "AccessionNumber",
    "StudyDate",
    "ReferringPhysicianName",
    "PerformingPhysicianName",
    "OperatorsName",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "FrameOfReferenceUID",
)
_TAGS_AS_A_WHOLE = ("InstitutionName", "InstitutionAddress", "StudyDescription", "SeriesDescription", "PatientComments")
"""Searched for as a whole: their single words may be of anybody."""
_VENDOR_TAGS = ("Manufacturer", "ManufacturerModelName")
TAGS = (*_TAGS_BY_WORD, *_TAGS_AS_A_WHOLE)
"""What headers are asked for."""
_TAGS = frozenset(tag for tag, _ in tags_of(*TAGS, *_VENDOR_TAGS).values())
_NIFTI_TEXTS = ("descrip", "db_name", "aux_file", "intent_name")
_SHORTEST = 4
_WORD = re.compile(r"[^\s\\/^=,;:\"'<>()\[\]{}|]+")
_CHUNK_FOLDER = "/0/c/"


@dataclass(frozen=True)
class PhiScan:
    """What a search looked at and what it found."""

    files: int
    """Files of the sources whose headers were read."""
    headers: int
    """Of those, DICOM and NIfTI headers that could be read."""
    terms: int
    """Different terms that these headers say of patients and studies."""
    searched: int
    """Files of the store whose names and contents were searched for the terms."""
    voxels: int
    """Files of the store that hold voxels alone and were not searched."""
    found: tuple[str, ...]
    """Keys of the store that hold a term."""

    def document(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        return {**asdict(self), "found": list(self.found), "tags": list(TAGS), "shortest_term": _SHORTEST}

    def told(self) -> str:
        """Return in one line what was searched, and whether that proves anything."""
        looked = (
            f"phi scan: {counted(self.terms, 'term')} from {counted(self.headers, 'header')} of "
            f"{counted(self.files, 'file')}; searched {counted(self.searched, 'file')} of the store, left out "
            f"{counted(self.voxels, 'file')} of voxels"
        )
        if not self.terms:
            return f"{looked}: nothing to search for, since no header says anything of a patient; this proves nothing"
        return f"{looked}: found {'something' if self.found else 'nothing'}"


def search(store: Store, paths: Sequence[SourcePath]) -> PhiScan:
    """Search a store for what the headers of its sources say of patients and studies."""
    files = list(dict.fromkeys(paths))
    headers, words, vendors = _collected(files)
    keys = list(store.storage.list(""))
    voxels = sum(_is_voxels(key) for key in keys)
    found = tuple(findings(store, words, vendors)) if words else ()
    return PhiScan(len(files), headers, len(words), len(keys) - voxels, voxels, found)


def patient_words(paths: Iterable[SourcePath]) -> set[str]:
    """Return what the headers of these files say of patients and studies, in lower case, names word by word."""
    return _collected(paths)[1]


def _collected(paths: Iterable[SourcePath]) -> tuple[int, set[str], set[str]]:
    """Return how many headers could be read, the words they say, and what they say of the scanner's maker."""
    headers, words, vendors = 0, set[str](), set[str]()
    for path in with_heads(paths):
        named, other, of_scanner = _texts(path)
        vendors.update(text.lower() for text in of_scanner)
        headers += bool(named or other)
        words.update(word.lower() for text in named for word in _WORD.findall(text) if len(word) >= _SHORTEST)
        words.update(text.lower() for text in other if len(text) > 2 * _SHORTEST)
    return headers, words, vendors


def findings(store: Store, words: set[str], vendors: Collection[str] = ()) -> list[str]:
    """Return the keys of the store whose name or content holds one of the words.

    Chunks hold voxels alone and are not searched. The maker of the scanner, as the headers say it (``vendors``), may
    share a word with a patient, but must not consist of such words alone.
    """
    keys = [key for key in store.storage.list("") if not _is_voxels(key)]
    return [key for key in keys if any(_holds(text, words, vendors) for text in (*_names(key), *_values(store, key)))]


def _is_voxels(key: str) -> bool:
    return _CHUNK_FOLDER in f"/{key}"


def _names(key: str) -> list[str]:
    """Return the names along a key, with and without what follows a dot."""
    return [name for part in key.split("/") for name in (part, part.split(".")[0])]


def _holds(text: str, words: set[str], vendors: Collection[str]) -> bool:
    lowered = text.lower()
    if lowered in vendors and not words.issuperset(_WORD.findall(lowered)):
        return False
    return not words.isdisjoint(_WORD.findall(lowered)) or lowered in words


@without_warnings
def _texts(path: SourcePath) -> tuple[list[str], list[str], list[str]]:
    """Return texts of which each word counts, texts that count as a whole, and those of the scanner's maker."""
    try:
        with open_source(path) as stream:
            head = stream.read(540)
            if head[:2] == b"\x1f\x8b":
                stream.seek(0)
                with gzip.open(stream) as unpacked:
                    head = unpacked.read(540)
        if head[128:132] == b"DICM" or head[:1] in (b"\x02", b"\x08"):
            dataset = read_dataset(path, tags=_TAGS, max_bytes=MAX_HEADER_BYTES)
            parts = (_TAGS_BY_WORD, _TAGS_AS_A_WHOLE, _VENDOR_TAGS)
            named, other, of_scanner = ([str(dataset.get(tag) or "").strip() for tag in part] for part in parts)
            return named, other, of_scanner
        kind: Any = {b"n+1": nib.Nifti1Header, b"ni1": nib.Nifti1Header}.get(head[344:347])
        kind = kind or {b"n+2": nib.Nifti2Header, b"ni2": nib.Nifti2Header}.get(head[4:7])
        if kind is not None:
            header = kind(head[: kind.sizeof_hdr], check=False)
            return (
                [],
                [bytes(header[name]).rstrip(b"\0").decode("latin-1") for name in _NIFTI_TEXTS if name in header],
                [],
            )
    except (OSError, EOFError, zlib.error, Refused, ValueError, nib.spatialimages.HeaderDataError):
        pass  # what cannot be read put nothing into the store
    return [], [], []


def _values(store: Store, key: str) -> Iterator[str]:
    """Yield every text that a record or table of the store says; names of fields are the format's own."""
    data = store.storage.read(key)
    if key.endswith(".parquet"):
        table = read_parquet(data)
        values = (value for column in table.itercolumns() for value in column.unique().to_pylist())
        yield from (value for value in values if isinstance(value, str))
        yield from (str(value) for value in (table.schema.metadata or {}).values())
        return
    try:
        yield from _strings(json.loads(data))
    except ValueError:
        yield data.decode("latin-1")


def _strings(document: Any) -> Iterator[str]:
    if isinstance(document, str):
        yield document
    elif isinstance(document, dict):
        for value in document.values():
            yield from _strings(value)
    elif isinstance(document, list):
        for value in document:
            yield from _strings(value)
