"""A server on this machine that speaks as much of the Hugging Face Hub's protocol as uploading and fetching need."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Repositories by their names: the bytes of each file."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub() -> Iterator[Hub]:
    """A running server."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._resolve(body=False)

    def do_GET(self) -> None:
        if match := re.fullmatch(r"/api/models/([^/]+/[^/?]+)(?:/revision/main)?(?:\?.*)?", self.path):
            files = self.server.repos.get(match[1])
            found = {"id": match[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files or {}]}
            self._answer(200 if files is not None else 404, found if files is not None else {"error": "none"})
        else:
            self._resolve(body=True)

    def do_POST(self) -> None:
        self.server.asked.append(self.path)
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            self.server.repos.setdefault(name, {})
            self._answer(200, {"url": f"{self.server.endpoint}/{name}", "id": name, "name": name})
        elif "/preupload/" in self.path:
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for one in json.loads(data)["files"]]  # fmt: skip
            self._answer(200, {"files": files})
        elif match := re.match(r"/api/models/([^/]+/[^/]+)/commit/", self.path):
            for line in data.splitlines():
                if (entry := json.loads(line))["key"] == "file":
                    value = entry["value"]
                    self.server.repos[match[1]][value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.endpoint}/{match[1]}/commit/{COMMIT}"
            self._answer(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})
        else:
            self._answer(200, {})

    def _resolve(self, *, body: bool) -> None:
        self.server.asked.append(self.path)
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        files = self.server.repos.get(match[1]) if match else None
        if files is None or match is None or match[2] not in files:
            code = "RepoNotFound" if files is None else "EntryNotFound"
            return self._answer(404, {"error": code}, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
        data = files[match[2]]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)
        return None

    def _answer(self, status: int, document: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
