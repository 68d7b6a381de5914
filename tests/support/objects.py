"""Sources in a bucket: files of a folder as objects, and what a proxy saw of their reading."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import obstore
from obstore.store import ObjectStore, from_url
from support.object_server import FaultyProxy, Request


def bucket_store(bucket: str) -> ObjectStore:
    """A client of the bucket on the server that the environment leads to."""
    return from_url(f"s3://{bucket}", client_options={"allow_http": True})


def upload(folder: Path, bucket: str, prefix: str) -> list[str]:
    """Put all files of a folder below a prefix; return their keys."""
    store, keys = bucket_store(bucket), []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            keys.append(f"{prefix}/{path.relative_to(folder).as_posix()}")
            obstore.put(store, keys[-1], path.read_bytes())
    return keys


def range_of(request: Request) -> tuple[int, int]:
    """First byte and the byte behind the last of a ranged GET."""
    found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.range or "")
    assert found, request
    return int(found[1]), int(found[2]) + 1


def bytes_asked(requests: Iterable[Request]) -> int:
    """How many bytes ranged GETs asked for."""
    return sum(end - start for start, end in map(range_of, requests))


def gets_of(proxy: FaultyProxy, prefix: str) -> list[Request]:
    """GETs of objects below a prefix, listings left out."""
    return [request for request in proxy.of("GET", f"/{prefix}/") if "list-type" not in request.path]
