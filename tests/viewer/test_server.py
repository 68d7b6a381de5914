"""Who is answered, and with which headers; what a store's server never gives away."""

from __future__ import annotations

import hashlib
import http.client
import re
import socket
import threading
from importlib.resources import files

import pytest

from maesil.errors import UsageError
from maesil.viewer.served_store import ServedStore
from maesil.viewer.server import HEADERS, ViewServer


def ask(server: ViewServer, target: str, method: str = "GET", **headers: str):
    """The status, the headers and the body of an answer; ``target`` is sent as it stands."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.putrequest(method, target, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def below(server: ViewServer, path: str) -> str:
    return f"/{server.token}{path}"


@pytest.fixture(scope="module")
def every_path(ids) -> list[str]:
    volume = f"/volumes/{ids['turned']}"
    parts = ("", "/ct.nii", "/picture.png", "/overlays/valid", "/overlays/body")
    names = ("page.css", "viewer.css", "viewer.js", "niivue.js", "licences.txt")
    return ["/", *(volume + part for part in parts), *(f"/static/{name}" for name in names)]


def test_every_part_is_served_with_headers_that_keep_it_here(server, every_path):
    for path in every_path:
        status, headers, body = ask(server, below(server, path))
        assert status == 200 and len(body) > 100, path
        assert headers.items() >= HEADERS.items()
        assert int(headers["Content-Length"]) == len(body)
        status, of_head, nothing = ask(server, below(server, path), "HEAD")
        assert (status, nothing) == (200, b"") and of_head["Content-Length"] == headers["Content-Length"]


def test_the_policy_lets_nothing_in_from_elsewhere():
    policy = dict(part.strip().split(" ", 1) for part in HEADERS["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    sources = {word for value in policy.values() for word in value.split()}
    assert sources == {"'none'", "'self'", "data:", "blob:"}
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert HEADERS["X-Content-Type-Options"] == "nosniff" and HEADERS["Cache-Control"] == "no-store"
    assert HEADERS["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize("wrong", ["", "x", "short", "longer", "case", "%"])
def test_nothing_is_told_without_the_token(server, every_path, wrong):
    token = {"short": server.token[:-1], "longer": server.token + "a", "case": server.token.swapcase()}.get(
        wrong, wrong
    )
    for path in every_path:
        status, headers, body = ask(server, f"/{token}{path}" if token else path)
        assert status == 403 and body.startswith(b"refused: ") and server.token.encode() not in body
        assert headers.items() >= HEADERS.items() and headers["Content-Type"].startswith("text/plain")


def test_each_server_has_a_token_of_its_own_that_nobody_guesses(store):
    tokens = set()
    for _ in range(3):
        with ViewServer(ServedStore(store)) as server:
            tokens.add(server.token)
            assert re.fullmatch(r"[\w-]{32}", server.token)
    assert len(tokens) == 3


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "evil.example:8", "localhost.evil", "", "127.0.0.1:x", "[::1]", "127.1"],
)  # fmt: skip
def test_a_page_that_was_rebound_to_this_address_is_refused(server, host):
    status, _, body = ask(server, below(server, "/"), Host=host)
    assert status == 403 and b"phantoms" not in body


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:65535"])
def test_the_names_of_this_machine_are_taken_at_any_port(server, host):
    """A tunnel may end at another port."""
    assert ask(server, below(server, "/"), Host=host)[0] == 200


def test_no_host_or_several_are_refused(server):
    for hosts in (b"", b"Host: localhost\r\nHost: evil.example\r\n"):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
            connection.sendall(b"GET " + below(server, "/").encode() + b" HTTP/1.1\r\n" + hosts + b"\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 403 ")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"])
def test_it_can_only_be_read(server, ids, method):
    status, headers, _ = ask(server, below(server, f"/volumes/{ids['turned']}"), method)
    assert status == 501 and headers.items() >= HEADERS.items()


@pytest.mark.parametrize(
    "path",
    [
        "/static/../pages.py", "/static/%2e%2e/pages.py", "/static/..%2fpages.py", "/static//etc/passwd", "/static/",
        "/static", "/..", "/../../../../etc/passwd", "/zarr.json", "/commits", "/volumes", "/volumes/", "//",
        "/volumes/../zarr.json", "/volumes/{id}/../../zarr.json", "/volumes/{id}/overlays/..%2f..%2fzarr.json",
        "/volumes/{id}/overlays/%2e%2e", "/volumes/{id}/overlays/", "/volumes/{id}/overlays/thumbnail",
        "/volumes/{id}/ct.nii/", "/volumes/{id}/ct.nii%00", "/volumes/{short}", "/volumes/" + "0" * 32,
        "/volumes/{id}\\ct.nii", "/volumes/{id}/ct.nii;x", "",
    ],
)  # fmt: skip
def test_whatever_is_not_named_is_not_found(server, ids, path):
    target = path.format(id=ids["turned"], short=ids["turned"][:12])
    status, headers, body = ask(server, below(server, target))
    assert status == 404 and headers["Content-Type"].startswith("text/plain"), body


def test_a_request_that_is_none_ends_with_the_same_headers(server):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        assert b"Bad request" in connection.recv(4096)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
        connection.sendall(b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n")
        answer = connection.recv(4096)
    assert b" 414 " in answer and b"nosniff" in answer


def test_it_listens_on_the_loopback_address_alone(server):
    assert server.server_address[0] == "127.0.0.1"
    assert server.url("/x") == f"http://127.0.0.1:{server.server_port}/{server.token}/x"


def test_a_port_that_is_taken_is_told_in_one_line(server, store):
    with pytest.raises(
        UsageError, match=rf"--port {server.server_port}: expected a free port, found: .*in use"
    ) as error:
        ViewServer(ServedStore(store), server.server_port)
    assert "\n" not in str(error.value)


def test_several_ask_at_the_same_time_and_one_leaves_early(server, ids, capfd):
    target = below(server, f"/volumes/{ids['turned']}/ct.nii")
    bodies = []
    threads = [threading.Thread(target=lambda: bodies.append(ask(server, target)[2])) for _ in range(4)]
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bodies) == 4 and len(set(bodies)) == 1
    assert capfd.readouterr().err == ""


def test_the_file_of_others_is_the_one_whose_licences_are_told():
    """Whoever replaces it also replaces its version, its sum and the licences."""
    folder = files("maesil.viewer") / "static"
    told = (folder / "licences.txt").read_text()
    script = (folder / "niivue.js").read_bytes()
    assert re.search(r"sha256 +(\w{64})", told)[1] == hashlib.sha256(script).hexdigest()
    assert re.search(r"version +(\S+)", told)[1].encode() in script
    for name in (
        "NiiVue",
        "gl-matrix",
        "fflate",
        "nifti-reader-js",
        "zarrita",
        "numcodecs",
        "Blosc",
        "LZ4",
        "Zstandard",
    ):
        assert re.search(rf"^=+\n{name} .*\n\n.*(?:Licen[sc]e|Blosc|LZ4|Copyright|MIT)", told, re.MULTILINE), name
