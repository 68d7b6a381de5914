"""The server behind `maesil store view`: on this machine's own address alone, for whoever has the token, read only."""

from __future__ import annotations

import hmac
import re
import secrets
import sys
import traceback
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from maesil.errors import UsageError
from maesil.viewer.answers import Answer, answer, told
from maesil.viewer.served_store import ServedStore

LOOPBACK = "127.0.0.1"
_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", re.IGNORECASE)
"""Any port: a tunnel may give it another. Another name means that a foreign page was rebound to this address."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
"""Of every answer. Pages load nothing from elsewhere, nobody frames them, nothing stays in a cache on disk."""


class ViewServer(ThreadingHTTPServer):
    """A server of one store, on a port of the loopback address; port 0 is any that is free.

    `UsageError` if the port is taken or may not be used.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, served: ServedStore, port: int = 0) -> None:
        self.served = served
        self.token = secrets.token_urlsafe(24)
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UsageError(f"--port {port}: expected a free port, found: {error}; leave it out for any") from error

    def url(self, path: str = "/") -> str:
        """Return the address of a page, the token in it."""
        return f"http://{LOOPBACK}:{self.server_port}/{self.token}{path}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Let go of a browser that left before its answer was whole; tell of anything else."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            traceback.print_exc()

    def answered(self, host: str, target: str) -> Answer:
        """Return the answer to a request for a target (path and query) under a ``Host``."""
        if not _HOST.fullmatch(host):
            return told(f"refused: expected {LOOPBACK} or localhost in the address", HTTPStatus.FORBIDDEN)
        address, _, query = target.partition("?")
        root, slash, path = address.removeprefix("/").partition("/")
        if not hmac.compare_digest(root.encode("latin-1", "replace"), self.token.encode()):
            line = "refused: expected the token in the address; open the one that `maesil store view` printed"
            return told(line, HTTPStatus.FORBIDDEN)
        return answer(self.served, f"/{self.token}", slash + path, query)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        self._send(self._answered(), with_body=True)

    def do_HEAD(self) -> None:
        self._send(self._answered(), with_body=False)

    def _answered(self) -> Answer:
        server = cast(ViewServer, self.server)
        hosts = self.headers.get_all("Host") or [""]
        try:
            return server.answered(hosts[0] if len(hosts) == 1 else "", self.path)
        except Exception:  # a fault of ours: the page says that there is one, the terminal which
            traceback.print_exc()
            return told("a fault of maesil itself; its terminal says more", HTTPStatus.INTERNAL_SERVER_ERROR)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what is no request that this server knows, with the headers of every answer."""
        self.close_connection = True
        self._send(told(message or HTTPStatus(code).phrase, HTTPStatus(code)), with_body=self.command != "HEAD")

    def _send(self, found: Answer, *, with_body: bool) -> None:
        self.send_response(found.status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", found.kind)
        self.send_header("Content-Length", str(len(found.body)))
        self.end_headers()
        if with_body:
            self.wfile.write(found.body)

    def version_string(self) -> str:
        """Say no versions."""
        return "maesil"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: the terminal is for errors."""
