"""Searching a finished store for what its sources say of their patients. It finds; it removes nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib

from maesil.errors import Refused
from maesil.ingest.header import tags_of, without_warnings
from maesil.ingest.source_file import MAX_HEADER_BYTES, open_source, read_dataset
from maesil.parquet import read_parquet
from maesil.store.store import Store

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
_TAGS = frozenset(tag for tag, _ in tags_of(*_TAGS_BY_WORD, *_TAGS_AS_A_WHOLE).values())
"""Single words of these are words of anybody."""
_NIFTI_TEXTS = ("descrip", "db_name", "aux_file", "intent_name")
_SHORTEST = 4
_WORD = re.compile(r"[^\s\\/^=,;:\"'<>()\[\]{}|]+")
_CHUNK_FOLDER = "/0/c/"


def patient_words(paths: Iterable[Path]) -> set[str]:
    """Return what the headers of these files say of patients and studies, in lower case, names word by word."""
    words: set[str] = set()
    for path in paths:
        named, other = _texts(path)
        words.update(word.lower() for text in named for word in _WORD.findall(text) if len(word) >= _SHORTEST)
        words.update(text.lower() for text in other if len(text) > 2 * _SHORTEST)
    return words


def findings(store: Store, words: set[str]) -> list[str]:
    """Return the keys of the store whose name or content holds one of the words.

    Chunks hold voxels alone and are not searched.
    """
    keys = [key for key in store.storage.list("") if _CHUNK_FOLDER not in f"/{key}"]
    return [key for key in keys if any(_holds(text, words) for text in (*_names(key), *_values(store, key)))]


def _names(key: str) -> list[str]:
    """Return the names along a key, with and without what follows a dot."""
    return [name for part in key.split("/") for name in (part, part.split(".")[0])]


def _holds(text: str, words: set[str]) -> bool:
    lowered = text.lower()
    return not words.isdisjoint(_WORD.findall(lowered)) or lowered in words


@without_warnings
def _texts(path: Path) -> tuple[list[str], list[str]]:
    """Return texts of which each word counts, and texts that count as a whole."""
    try:
        with open_source(path) as stream:
            head = stream.read(540)
        if head[128:132] == b"DICM" or head[:1] in (b"\x02", b"\x08"):
            dataset = read_dataset(path, tags=_TAGS, max_bytes=MAX_HEADER_BYTES)
            named, other = ([str(dataset.get(tag) or "") for tag in part] for part in (_TAGS_BY_WORD, _TAGS_AS_A_WHOLE))
            return named, other
        if head[344:347] in (b"n+1", b"ni1"):
            header = nib.Nifti1Header(head[:348], check=False)
            return [], [bytes(header[name]).rstrip(b"\0").decode("latin-1") for name in _NIFTI_TEXTS]
    except (OSError, Refused, ValueError):
        pass  # what cannot be read put nothing into the store
    return [], []


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
