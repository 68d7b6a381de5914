"""A real server of objects on loopback (moto's, which speaks S3), and a proxy before it that counts and puts faults in.

The server is a process of its own. `FaultyProxy.faults` decides of each request what goes wrong with it.
"""

from __future__ import annotations

import http.client
import itertools
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Fault = Literal[
    "slow down", "internal error", "lost answer", "cut body", "slow", "ignore condition", "denied",
    "full", "over quota", "flipped",
]  # fmt: skip
TRANSIENT: tuple[Fault, ...] = ("slow down", "internal error", "lost answer", "cut body")
"""Faults that go away when the request is made again."""
NO_ROOM: tuple[Fault, ...] = ("full", "over quota")
SECRET = "wJalrXUtnFEMI-a-secret-that-must-not-leak"
KEY_ID = "AKIAEXAMPLEOFATEST"
_ERRORS = {
    "slow down": (503, "SlowDown"),
    "internal error": (500, "InternalError"),
    "denied": (403, "AccessDenied"),
    "full": (507, "XMinioStorageFull"),  # as MinIO says it
    "over quota": (403, "QuotaExceeded"),  # as Ceph does
}
_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length", "date", "server"}


@dataclass(frozen=True)
class Request:
    """One request as the proxy met it; ``range`` is (first, last) byte or None, ``sent`` the bytes of its body."""

    method: str
    path: str
    range: str | None
    sent: int = 0


class FaultyProxy:
    """Passes requests on to a server, notes them, and does to each what ``faults`` says."""

    def __init__(self, server: tuple[str, int]) -> None:
        self.requests: list[Request] = []
        self.faults: Callable[[Request], Fault | None] = lambda request: None
        self.delay = 0.3
        """Seconds until the first byte of a slow answer."""
        self.latency = 0.0
        self.bandwidth = float("inf")
        """Bytes of answers per second, of all requests together."""
        self._line_free = 0.0
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self, "server_address_of": server})
        self._http = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        """Return where it listens."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def of(self, method: str, part: str = "") -> list[Request]:
        """Return the requests of a method whose path holds a text."""
        return [request for request in self.requests if request.method == method and part in request.path]

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def begins(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            return self.faults(request)

    def carries(self, length: int) -> None:
        """Wait until so many bytes have gone over a line of this bandwidth, behind those of other answers."""
        with self._lock:
            self._line_free = max(self._line_free, time.monotonic()) + length / self.bandwidth
            wait = self._line_free - time.monotonic()
        time.sleep(max(0.0, wait))

    def ends(self) -> None:
        with self._lock:
            self.in_flight -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy
    server_address_of: tuple[str, int]

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.begins(Request(self.command, self.path, self.headers.get("Range"), len(body)))
        if fault == "flipped" and self.command == "PUT":
            body = _flipped(body)
        try:
            time.sleep(self.proxy.latency + (self.proxy.delay if fault == "slow" else 0))
            if fault in _ERRORS:
                status, code = _ERRORS[fault]
                self._answer(
                    status, {"Content-Type": "application/xml"}, f"<Error><Code>{code}</Code></Error>".encode()
                )
                return
            status, headers, answer = self._asked(body, ignore_condition=fault == "ignore condition")
            if fault == "lost answer":
                self.close_connection = True
                return
            self.proxy.carries(len(answer))
            if fault == "flipped" and self.command == "GET":
                answer = _flipped(answer)
            self._answer(status, headers, answer, cut=fault == "cut body")
        finally:
            self.proxy.ends()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

    def _asked(self, body: bytes, *, ignore_condition: bool) -> tuple[int, dict[str, str], bytes]:
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        if ignore_condition:
            headers = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
        upstream = http.client.HTTPConnection(*self.server_address_of, timeout=60)
        try:
            upstream.request(self.command, self.path, body=body or None, headers=headers)
            answer = upstream.getresponse()
            data = answer.read()
            kept = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
            if self.command == "HEAD":
                kept["Content-Length"] = answer.getheader("Content-Length") or "0"
            return answer.status, kept, data
        finally:
            upstream.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _flipped(body: bytes) -> bytes:
    """Return the bytes with one bit in their middle turned over."""
    half = len(body) // 2
    return body[:half] + bytes([body[half] ^ 4]) + body[half + 1 :]


class ObjectServer:
    """A running server, its address, and what a client's environment says of it."""

    def __init__(self, port: int) -> None:
        self.address = ("127.0.0.1", port)

    @property
    def url(self) -> str:
        """Return where it listens."""
        return f"http://{self.address[0]}:{self.address[1]}"

    def bucket(self) -> str:
        """Make a bucket of a new name, and return it."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/{name}", method="PUT")).close()
        return name

    def uploads(self, bucket: str) -> int:
        """Return how many multipart uploads of a bucket were begun and neither completed nor aborted."""
        with urllib.request.urlopen(f"{self.url}/{bucket}?uploads") as answer:
            return answer.read().count(b"<UploadId>")

    @contextmanager
    def proxy(self) -> Iterator[FaultyProxy]:
        """Put a proxy before the server."""
        made = FaultyProxy(self.address)
        try:
            yield made
        finally:
            made.close()


def environment(url: str) -> dict[str, str]:
    """Return the variables by which clients find a server and prove who they are."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def now_and_then(number: int, *faults: Fault) -> Callable[[Request], Fault | None]:
    """Return what gives one of so many requests a fault, each in turn, and leaves the others alone."""
    asked = itertools.count()

    def fault(_: Request) -> Fault | None:
        n = next(asked)
        return faults[n // number % len(faults)] if n % number == 0 else None

    return fault


def quota(size: int, fault: Fault) -> Callable[[Request], Fault | None]:
    """Return what takes so many bytes of objects, and answers every further one with a fault."""
    taken = 0

    def full(request: Request) -> Fault | None:
        nonlocal taken
        if request.method != "PUT":
            return None
        taken += request.sent
        return fault if taken > size else None

    return full


@contextmanager
def running_server() -> Iterator[ObjectServer]:
    """Start the server as a process of its own; it ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, process)
        yield ObjectServer(port)
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(f"the server of objects ended with code {process.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("the server of objects did not start within 30 s")
