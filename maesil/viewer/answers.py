"""From the path of a request to its answer: pages, scripts, scans. What is not named here is not found."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from importlib.resources import files
from urllib.parse import parse_qs, unquote

from maesil.errors import MaesilError, StoreError
from maesil.text import printable
from maesil.viewer.pages import list_page, scan_page
from maesil.viewer.served_store import ServedStore, step_for

_HTML, _TEXT = "text/html; charset=utf-8", "text/plain; charset=utf-8"
_NIFTI = "application/octet-stream"
_STATIC = {
    "page.css": ("maesil", "templates", "text/css; charset=utf-8"),
    "viewer.css": ("maesil.viewer", "static", "text/css; charset=utf-8"),
    "viewer.js": ("maesil.viewer", "static", "text/javascript; charset=utf-8"),
    "niivue.js": ("maesil.viewer", "static", "text/javascript; charset=utf-8"),
    "licences.txt": ("maesil.viewer", "static", _TEXT),
}
_ADDRESS = re.compile(
    r"/(?P<kind>volumes)/(?P<volume>[0-9a-f]{32})(?:/(?P<part>ct\.nii|picture\.png|overlays/[^/]+|labels/[\w-]+))?"
)


@dataclass(frozen=True)
class Answer:
    """What goes back to the browser."""

    body: bytes
    kind: str = _HTML
    """The media type."""
    status: HTTPStatus = HTTPStatus.OK


def told(text: str, status: HTTPStatus) -> Answer:
    """Return an answer of one line for people, which no browser takes for HTML."""
    return Answer(f"{printable(text)}\n".encode(), _TEXT, status)


def answer(served: ServedStore, root: str, path: str, query: str) -> Answer:
    """Return the answer to a request; ``root`` is the address below which all of this lies, ``/TOKEN``.

    A damaged store is told in one line, status 500.
    """
    try:
        return _answer(served, root, path, query)
    except StoreError as error:
        return told(str(error), HTTPStatus.INTERNAL_SERVER_ERROR)
    except MaesilError as error:
        return told(str(error), HTTPStatus.NOT_FOUND)


def _answer(served: ServedStore, root: str, path: str, query: str) -> Answer:
    asked = {name: values[-1] for name, values in parse_qs(query, keep_blank_values=True).items()}
    if path == "/":
        served.refresh()
        return Answer(list_page(served, root, asked.get("find", ""), _number(asked.get("from", ""))).encode())
    if path.startswith("/static/") and (place := _STATIC.get(path.removeprefix("/static/"))):
        package, folder, kind = place
        return Answer((files(package) / folder / path.removeprefix("/static/")).read_bytes(), kind)
    address = _ADDRESS.fullmatch(path)
    if address is None or address["volume"] not in served.volumes:
        return told("not found: the store has no such volume, or this no such page", HTTPStatus.NOT_FOUND)
    return _of_volume(served, root, address["volume"], address["part"] or "", whole="whole" in asked)


def _of_volume(served: ServedStore, root: str, volume_id: str, part: str, *, whole: bool) -> Answer:
    step = (1, 1, 1) if whole else step_for(served.volumes[volume_id])
    if part.startswith("overlays/"):
        name = unquote(part.removeprefix("overlays/"))
        if name not in served.overlays:
            return told("not found: the volume has no such overlay", HTTPStatus.NOT_FOUND)
        return Answer(served.overlay(volume_id, name), _NIFTI)
    if part.startswith("labels/"):
        name = part.removeprefix("labels/")
        if name not in served.labels(volume_id):
            return told("not found: the volume has no such labels", HTTPStatus.NOT_FOUND)
        return Answer(served.label_voxels(volume_id, name, step), _NIFTI)
    parts: dict[str, Callable[[], Answer]] = {
        "": lambda: Answer(scan_page(served, root, volume_id, step).encode()),
        "ct.nii": lambda: Answer(served.ct(volume_id, step), _NIFTI),
        "picture.png": lambda: Answer(served.picture(volume_id), "image/png"),
    }
    return parts[part]()


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
