"""Decoding a source to HU and hashing it: what runs in the child process of `maesil.ingest.isolated`.

Nothing here is called from the process that holds the key or writes the store, except by tests.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np

from maesil.errors import Refused
from maesil.ingest.dicom import pixel_digest, read_slices_hu
from maesil.ingest.nifti import read_nifti
from maesil.ingest.planes import like
from maesil.ingest.scanned import Allocate, Scanned, plain_arrays
from maesil.ingest.source import Source
from maesil.ingest.source_path import SourcePath


def source_hash(source: Source, allocate: Allocate = plain_arrays) -> str:
    """Return a SHA-256 (hex) over all that decides the voxels: a rename changes nothing, one edited pixel does."""
    if source.kind == "slices":
        return _hash_of_slices(source, {})
    return _hash_of_scan(source, read(source, allocate))


def read(source: Source, allocate: Allocate = plain_arrays) -> Scanned:
    """Decode a source to HU on its own grid; `Refused` with a code if it cannot be trusted."""
    return read_hashed(source, allocate, "known")[0]


def read_hashed(source: Source, allocate: Allocate = plain_arrays, known: str = "") -> tuple[Scanned, str]:
    """Return what `read` does and its `source_hash`: the known one, or one of the very bytes that were decoded."""
    if source.kind == "nifti":
        volume = source.planes[0][1] if source.planes and source.planes[0] else None
        scan = read_nifti(source.paths[0], volume=volume, prefer=source.prefer, allocate=allocate)
        return scan, known or _hash_of_scan(source, scan)
    digests: dict[SourcePath, bytes] = {}
    scan = _read_slices(source, allocate, None if known else digests)
    return scan, known or _hash_of_slices(source, digests)


def _hash_of_slices(source: Source, digests: dict[SourcePath, bytes]) -> str:
    """Combine the digests of files, made already or now, with what of the plan decides the voxels."""
    digest = hashlib.sha256()
    for path in source.paths:
        digest.update(digests.get(path) or pixel_digest(path))
    digest.update(_order_of(source))
    return digest.hexdigest()


def _hash_of_scan(source: Source, scan: Scanned) -> str:
    digest = hashlib.sha256(str(scan.shape).encode())
    digest.update(np.ascontiguousarray(scan.affine).tobytes())
    for volume in (scan.hu, scan.valid):
        for plane in volume:
            digest.update(np.ascontiguousarray(plane).data)
    digest.update(repr(source.planes).encode() if source.planes else b"")  # which volume of several
    return digest.hexdigest()


def _order_of(source: Source) -> bytes:
    """Return what of a plan decides the voxels beside the files: nothing for a plain stack of single slices."""
    plain = tuple((n, None) for n in range(len(source.paths)))
    return b"" if source.planes == plain else repr(source.planes).encode()


def _read_slices(source: Source, allocate: Allocate, digests: dict[SourcePath, bytes] | None) -> Scanned:
    there = [z for z, plane in enumerate(source.planes) if plane is not None]
    slices = read_slices_hu(((source.paths[n], frame) for n, frame in filter(None, source.planes)), digests)
    first = next(slices)
    rows, columns = first.hu.shape
    hu, valid = allocate((len(source.planes), rows, columns))
    notes: set[str] = set()
    rescaled: set[bool] = set()
    for z, found in zip(there, chain([first], slices), strict=True):
        if found.hu.shape != first.hu.shape:
            sizes = f"{found.hu.shape}, {first.hu.shape}"
            raise Refused("bad_pixels", f"slice {z} has another size than the first: {sizes}")
        hu[z], valid[z] = found.hu, found.valid
        notes |= found.notes
        rescaled.add("no_rescale_tags" not in found.notes)
    if rescaled == {True, False}:
        raise Refused("bad_rescale", "some slices have a rescale slope and intercept, others of the same series none")
    assert source.affine is not None
    return Scanned(hu, valid, source.affine, tuple(sorted(notes)), source.technical)


def with_missing_slices(scan: Scanned, source: Source) -> Scanned:
    """Return the scan with the slices its plan calls missing interpolated between their neighbours, linearly."""
    there = [z for z, plane in enumerate(source.planes) if plane is not None]
    if source.kind == "nifti" or len(there) == len(source.planes):
        return scan
    filled = like(scan.hu, bool)
    for below, above in pairwise(there):
        for z in range(below + 1, above):
            share = np.float32((z - below) / (above - below))
            scan.hu[z] = (1 - share) * scan.hu[below] + share * scan.hu[above]
            filled[z] = scan.valid[below] & scan.valid[above]
    return replace(scan, filled=filled)
