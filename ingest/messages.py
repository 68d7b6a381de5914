"""What a process and the child that decodes for it say to each other: a request, its answer, or why there is none.

They travel as JSON, so that nothing the child says is executed; voxels go another way, through shared memory or a file
whose descriptor comes with a message.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from maesil.errors import Refused
from maesil.geometry import Affine
from maesil.ingest.source import Source
from maesil.ingest.source_path import SourcePath
from maesil.store.records import Technical
from maesil.types import Zyx

_LENGTH = 4


@dataclass(frozen=True)
class Limits:
    """What a request may take beyond what the child has taken before."""

    memory_bytes: int
    cpu_seconds: int


@dataclass(frozen=True)
class ReadSource:
    """Decode a source; answered by `Decoded`."""

    source: Source
    known_hash: str
    """Empty: to be made of the very bytes that are decoded."""


@dataclass(frozen=True)
class HashSource:
    """Hash a source; answered by `Hash`."""

    source: Source


@dataclass(frozen=True)
class DigestSlices:
    """Make the digests of slices of one file; answered by `Digests`."""

    path: SourcePath
    frames: tuple[int | None, ...]


Request = ReadSource | HashSource | DigestSlices


@dataclass(frozen=True)
class Decoded:
    """A source that was decoded, beside its voxels: the rest of a `maesil.ingest.scanned.Scanned`, and its hash."""

    shape: Zyx
    affine: Affine
    notes: tuple[str, ...]
    source: Technical
    hash: str


@dataclass(frozen=True)
class Hash:
    """The hash of a source (hex)."""

    hash: str


@dataclass(frozen=True)
class Digests:
    """The digests of slices, in the order that was asked for."""

    digests: tuple[bytes, ...]


@dataclass(frozen=True)
class Failure:
    """Why there is no answer."""

    kind: Literal["refused", "os_error", "memory", "unexpected"]
    code: str = ""
    """That of a refusal, or the number of an OSError."""
    detail: str = ""
    numbers: dict[str, Any] | None = None

    def error(self) -> Exception:
        """Return the error to raise on the side that asked."""
        if self.kind == "os_error":
            return OSError(int(self.code), self.detail)
        if self.kind == "memory":
            return Refused("decode_memory", "decoding took more memory than what the header claims can need")
        code = self.code if self.kind == "refused" else "unexpected"
        return Refused(code, self.detail, **(self.numbers or {}))  # type: ignore[arg-type]  # one of our own codes


Answer = Decoded | Hash | Digests | Failure


def request_to_json(request: Request, limits: Limits) -> dict[str, Any]:
    """Return a request as JSON-ready values, its paths absolute: this process may have moved since the child began."""
    name = type(request).__name__
    if isinstance(request, DigestSlices):
        return {"ask": name, "limits": asdict(limits), "path": _absolute(request.path), "frames": list(request.frames)}
    known = {"known_hash": request.known_hash} if isinstance(request, ReadSource) else {}
    return {"ask": name, "limits": asdict(limits), "source": _source_to_json(request.source), **known}


def request_from_json(document: dict[str, Any]) -> tuple[Request, Limits]:
    """Return what `request_to_json` was given."""
    limits = Limits(**document["limits"])
    if document["ask"] == "DigestSlices":
        return DigestSlices(Path(document["path"]), tuple(document["frames"])), limits
    source = _source_from_json(document["source"])
    return ReadSource(source, document["known_hash"]) if document["ask"] == "ReadSource" else HashSource(source), limits


def answer_to_json(answer: Answer) -> dict[str, Any]:
    """Return an answer as JSON-ready values."""
    document = {"answer": type(answer).__name__, **vars(answer)}
    if isinstance(answer, Decoded):
        document["affine"] = np.asarray(answer.affine).tolist()
    if isinstance(answer, Digests):
        document["digests"] = [digest.hex() for digest in answer.digests]
    return document


def answer_from_json(document: dict[str, Any]) -> Answer:
    """Return what `answer_to_json` was given."""
    fields = {name: value for name, value in document.items() if name != "answer"}
    if document["answer"] == "Failure":
        return Failure(**fields)
    if document["answer"] == "Hash":
        return Hash(**fields)
    if document["answer"] == "Digests":
        return Digests(tuple(map(bytes.fromhex, fields["digests"])))
    z, y, x = fields["shape"]
    affine = np.asarray(fields["affine"], dtype=np.float64)
    return Decoded((z, y, x), affine, tuple(fields["notes"]), fields["source"], fields["hash"])


def _source_to_json(source: Source) -> dict[str, Any]:
    return {
        "kind": source.kind,
        "paths": [_absolute(path) for path in source.paths],
        "planes": source.planes,
        "affine": None if source.affine is None else source.affine.tolist(),
        "technical": source.technical,
        "prefer": source.prefer,
    }


def _source_from_json(document: dict[str, Any]) -> Source:
    affine = document["affine"]
    return Source(
        kind=document["kind"],
        paths=tuple(map(Path, document["paths"])),
        planes=tuple(None if plane is None else (plane[0], plane[1]) for plane in document["planes"]),
        affine=None if affine is None else np.asarray(affine, dtype=np.float64),
        technical=document["technical"],
        prefer=document["prefer"],
    )


def _absolute(path: SourcePath) -> str:
    return str(path.absolute())


def send(connection: socket.socket, document: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send a message and, with it, at most one descriptor."""
    data = json.dumps(document, default=_plain).encode()
    header = len(data).to_bytes(_LENGTH, "little")
    if descriptors:
        socket.send_fds(connection, [header], list(descriptors))
    else:
        connection.sendall(header)
    connection.sendall(data)


def _plain(value: Any) -> Any:
    """Return a number of numpy as JSON knows it, anything else as text."""
    return value.item() if isinstance(value, np.generic) else str(value)


def receive(connection: socket.socket) -> tuple[dict[str, Any], int | None]:
    """Return a message and the descriptor that came with it; `EOFError` if the other side is gone."""
    header, descriptors, _, _ = socket.recv_fds(connection, _LENGTH, 1)
    if len(header) < _LENGTH:
        raise EOFError("the other side is gone")
    left, parts = int.from_bytes(header, "little"), []
    while left:
        if not (part := connection.recv(min(left, 1 << 20))):
            raise EOFError("the other side is gone")
        parts.append(part)
        left -= len(part)
    document: dict[str, Any] = json.loads(b"".join(parts))
    return document, descriptors[0] if descriptors else None
