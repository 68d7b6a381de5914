"""What a store of the catalogue is known by, and how a change of its sources shows without reading them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from maesil.cache.key import cache_folder, listing, store_key
from maesil.ingest.source_file import known_stamp


def test_the_variable_says_where_the_cache_is_and_is_read_when_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("MAESIL_CACHE", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.setenv("MAESIL_CACHE", "~/b")
    assert cache_folder() == Path.home() / "b"
    for unset in ("", "  "):
        monkeypatch.setenv("MAESIL_CACHE", unset)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_folder() == tmp_path / "maesil"


def test_a_key_knows_places_recipe_identity_and_choices_not_their_order(tmp_path, monkeypatch):
    a, b = tmp_path / "a", tmp_path / "b"
    key = store_key([a, b], "recipe", "identity", "keep-all")
    assert key == store_key([b, a, a], "recipe", "identity", "keep-all")
    monkeypatch.chdir(tmp_path)
    assert key == store_key([Path("a"), Path("./b")], "recipe", "identity", "keep-all")
    others = [
        store_key([a], "recipe", "identity", "keep-all"),
        store_key([a, b], "other", "identity", "keep-all"),
        store_key([a, b], "recipe", "other", "keep-all"),
        store_key([a, b], "recipe", "identity", "keep-first"),
    ]
    assert len({key, *others}) == 5


def _touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


CHANGES = {
    "edited": lambda f: (f / "a").write_bytes(b"other length"),
    "edited, same length": lambda f: _touch(f / "a"),
    "renamed": lambda f: (f / "a").rename(f / "c"),
    "removed": lambda f: (f / "a").unlink(),
    "added": lambda f: (f / "c").write_bytes(b""),
    "target of a link edited": lambda f: (f.parent / "elsewhere").write_bytes(b"more"),
    "target of a link gone": lambda f: (f.parent / "elsewhere").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_file_shows_in_the_listing(tmp_path, change):
    (tmp_path / "elsewhere").write_bytes(b"")
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in "ab":
        (folder / name).write_bytes(name.encode())
    (folder / "link").symlink_to(tmp_path / "elsewhere")

    def now(*choices: str) -> str:
        return listing(((str(path), known_stamp(path)) for path in sorted(folder.iterdir())), choices)

    before = now()
    assert before == now() != now("another choice")
    CHANGES[change](folder)
    assert now() != before
