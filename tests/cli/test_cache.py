"""The cache on the command line: ingest without --out, names in place of paths, mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command_line import fails, run
from support.sources import write_sources

from maesil import errors
from maesil.sizes import size_text


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("home")
    write_sources(root / "sources")
    return root


@pytest.fixture(autouse=True)
def own_home(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", f"{home}/config")
    monkeypatch.setenv("MAESIL_CACHE", f"{home}/cache")


def ingest(home: Path, *more: object) -> tuple[int, str, str]:
    return run("ingest", home / "sources", "--spacing", "native", "--superpatch", 32, "--workers", 0, *more)


def test_built_found_named_listed_and_removed(home, tmp_path):
    assert run("cache", "list", "--json")[:2] == (0, "[]\n")
    code, stdout, _ = ingest(home, "--dry-run")
    assert code == 0 and "3 volumes would be made in the cache" in stdout and not (home / "cache" / "stores").exists()
    code, stdout, stderr = ingest(home)
    assert code == 0 and "3 volumes committed" in stdout and "built in the cache as sources-native" in stderr
    code, stdout, stderr = ingest(home, "--json", "--name", "mine")
    found = json.loads(stdout)
    assert code == 0 and "found in the cache as mine" in stderr
    assert len(found["fresh"]) == 3 and found["files_found"] == len(found["files"]) == 50

    (listed,) = json.loads(run("cache", "list", "--json")[1])
    assert (listed["name"], listed["state"], listed["volumes"], listed["pins"]) == ("mine", "finished", 3, [])
    assert listed["path"] == found["store"] == run("cache", "path", "mine")[1].strip()
    assert listed["sources"] == [str(home / "sources")] and listed["bytes"] > 1000
    assert "mine" in run("cache", "list")[1]

    assert "3 volumes" in run("store", "info", "mine")[1]
    assert run("store", "verify", f"file://{listed['path']}")[0] == 0
    filtered = json.loads(run("store", "info", "mine", "--where", "source_kind == 'nifti'", "--json")[1])
    assert len(filtered["volumes"]) == 1
    assert "no column" in fails(errors.EXIT_USAGE, "store", "info", "mine", "--where", "x > 1")
    assert "more patients than parts" in fails(
        errors.EXIT_USAGE, "store", "split", "mine", "--out", tmp_path / "s.json"
    )

    assert run("cache", "prune", "--max-size", "1GB")[0] == 0
    unnamed = home / "cache" / "stores" / "0123"
    unnamed.mkdir()
    for command in (["list"], ["prune", "--max-size", "1GB"]):
        assert f"{unnamed}: its entry.json cannot be read" in run("cache", *command)[2]
    unnamed.rmdir()
    code, stdout, _ = run("cache", "rm", "mine")
    assert code == 0 and "removed mine" in stdout
    assert "no stores" in run("cache", "list")[1]


@pytest.mark.parametrize(("code", "words"), [
    (errors.EXIT_USAGE, "cache rm nothing"), (errors.EXIT_USAGE, "cache path nothing"),
    (errors.EXIT_USAGE, "cache prune --max-size many"), (errors.EXIT_STORE, "store info nothing"),
    (errors.EXIT_USAGE, "store info s3://bucket/store"), (errors.EXIT_USAGE, "ingest https://host/x"),
    (errors.EXIT_USAGE, "ingest . --out gs://b/x"), (errors.EXIT_USAGE, "ingest . --out x --name y"),
    (errors.EXIT_USAGE, "ingest . --group ("), (errors.EXIT_USAGE, "ingest . --partition 1/2"),
    (errors.EXIT_NO_INPUT, "ingest nowhere"), (errors.EXIT_STORE, "train nothing=0.5 --out r"),
    (errors.EXIT_STORE, "evaluate . nothing"),
])  # fmt: skip
def test_mistakes_are_told_in_one_line(code, words):
    fails(code, *words.split())


def test_pruning_says_what_goes_before_it_goes(home):
    assert ingest(home, "--name", "old")[0] == 0
    stored = int(json.loads(run("cache", "list", "--json")[1])[0]["bytes"])
    for size in ("200", "1.5", "200 "):
        assert "its unit" in fails(errors.EXIT_USAGE, "cache", "prune", "--max-size", size)
    code, stdout, _ = run("cache", "prune", "--max-size", "1kB", "--dry-run")
    assert (
        code == 0
        and f"1 store, {size_text(stored)} would be removed: old (" in stdout
        and "0 B would be left" in stdout
    )
    assert "old" in run("cache", "list")[1], "a dry run removes nothing"
    code, stdout, _ = run("cache", "prune", "--max-size", "1TB")
    assert code == 0 and "nothing to remove for --max-size 1.0 TB" in stdout
    code, stdout, _ = run("cache", "prune", "--max-size", "0")
    first, second, third = stdout.splitlines()
    assert code == 0 and first.endswith("to remove: " + first.split(": ")[1]) and "last used 20" in first
    assert second == f"removed old ({size_text(stored)})" and third.startswith("0 B left in")
    assert "no stores" in run("cache", "list")[1]


def test_a_wrong_name_is_answered_with_the_right_one(home):
    assert "is empty" in fails(errors.EXIT_USAGE, "cache", "path", "nothing")
    assert ingest(home, "--name", "lungs-1.5mm")[0] == 0
    assert "did you mean lungs-1.5mm?" in fails(errors.EXIT_USAGE, "cache", "path", "lung-1.5mm")
    assert "the cache holds lungs-1.5mm" in fails(errors.EXIT_USAGE, "cache", "rm", "something")
    assert run("cache", "rm", "lungs-1.5mm")[0] == 0
