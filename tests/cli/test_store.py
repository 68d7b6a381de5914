"""Commands given a store: what is none, what is damaged, what is not in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.command_line import fails, ingest, run

from maesil import errors


def not_a_store(folder: Path, kind: str) -> Path:
    path = folder / "x.zarr"
    if kind == "file":
        path.write_text("x")
    elif kind == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("x")
    elif kind == "other zarr":
        import zarr

        zarr.create_group(path)
    return path


@pytest.mark.parametrize("kind", ["missing", "file", "folder", "other zarr"])
@pytest.mark.parametrize("command", ["info", "verify", "export", "index", "train", "evaluate"])
def test_a_store_that_is_none(tmp_path, kind, command):
    path = not_a_store(tmp_path, kind)
    more = ("--out", tmp_path / "out") if command in ("export", "train") else ()
    if command == "evaluate":
        code, _, stderr = run("evaluate", tmp_path / "no run", path)
        assert code in (errors.EXIT_USAGE, errors.EXIT_STORE) and len(stderr.splitlines()) == 1
        return
    words = (command, path) if command == "train" else ("store", command, path)
    if command == "train":
        more = (*more, "--preset", "tiny", "--device", "cpu")
    fails(errors.EXIT_STORE, *words, *more)


@pytest.mark.parametrize("kind", ["file", "folder", "other zarr"])
def test_ingest_never_writes_into_what_is_no_store(tmp_path, sources, kind):
    path = not_a_store(tmp_path, kind)
    before = sorted(tmp_path.rglob("*"))
    code = errors.EXIT_USAGE if kind in ("file", "folder") else errors.EXIT_STORE
    fails(code, *ingest(sources, path, "--key-file", tmp_path.parent / "k"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("damage", ["shard", "commit", "map", "recipe"])
def test_a_damaged_store(tmp_path, store, damage):
    from maesil.store.store import Store

    shutil.copytree(store, tmp_path / "s.zarr")
    opened = Store.open(tmp_path / "s.zarr")
    volume = opened.volumes()[0]
    path = (
        opened.path
        / {
            "shard": volume.superpatches[0].path,
            "commit": volume.key,
            "map": f"{volume.prefix}/valid/c/0/0/0",
            "recipe": f"recipes/{opened.recipe_hash}.json",
        }[damage]
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    code, stdout, stderr = run("store", "verify", opened.path)
    assert code == errors.EXIT_STORE
    assert "damaged: " in stdout and "1 problem found" in stdout and "Traceback" not in stdout + stderr
    code, stdout, _ = run("store", "verify", opened.path, "--json")
    assert code == errors.EXIT_STORE
    assert json.loads(stdout)["problems"]
    if damage in ("shard", "commit"):
        fails(errors.EXIT_STORE, "store", "export", opened.path, "--out", tmp_path / "out")
    if damage in ("recipe", "commit"):
        fails(errors.EXIT_STORE, "store", "info", opened.path)


@pytest.mark.parametrize("what", ["commit", "root", "recipe"])
@pytest.mark.parametrize("command", ["info", "verify"])
def test_records_nested_too_deeply_are_damage(tmp_path, store, what, command):
    from maesil.store.store import Store

    shutil.copytree(store, tmp_path / "s.zarr")
    opened = Store.open(tmp_path / "s.zarr")
    keys = {"commit": opened.volumes()[0].key, "root": "zarr.json", "recipe": f"recipes/{opened.recipe_hash}.json"}
    (opened.path / keys[what]).write_text("[" * 100_000)
    code, stdout, stderr = run("store", command, opened.path)
    assert code == errors.EXIT_STORE and "Traceback" not in stdout + stderr


def test_a_file_in_place_of_the_index_is_told_in_one_line(tmp_path, store):
    shutil.copytree(store, tmp_path / "s.zarr")
    shutil.rmtree(tmp_path / "s.zarr" / "index")
    (tmp_path / "s.zarr" / "index").write_text("x")
    for command in ("verify", "index"):
        assert "found a file" in fails(errors.EXIT_STORE, "store", command, tmp_path / "s.zarr")


@pytest.mark.parametrize("name", ["zz", "", "0" * 32])
def test_an_unknown_volume(tmp_path, store, name):
    fails(errors.EXIT_USAGE, "store", "export", store, "--out", tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_export_into_a_file(tmp_path, store):
    (tmp_path / "file").write_text("x")
    fails(errors.EXIT_USAGE, "store", "export", store, "--out", tmp_path / "file")
