"""What there is one of is not spelled as many, in no line of any command over a store of one volume."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.command_line import run
from support.ct_phantom import base_affine
from support.sources import phantom_hu
from support.stores import make_store

from maesil.synthetic.dicom import SeriesIdentity, write_dicom_series

_MANY = re.compile(r"(?<![\d.,x^])\b1 (?!is\b|was\b|has\b|this\b)[a-z]+s\b")
_NO_NOUNS = ("1 lies", "1 makes")


def many_of_one(text: str) -> list[str]:
    return [found for found in _MANY.findall(text) if found not in _NO_NOUNS]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("store") / "s.zarr", [(16, 16, 16)], superpatch=16).path


@pytest.mark.parametrize(
    "command",
    [
        ("store", "info"), ("store", "verify"), ("store", "index"), ("store", "gc"),
        ("store", "export", "--out", "DIR"),
        ("store", "split", "--out", "DIR/split.json", "--shares", "1,0,0"), ("doctor",), ("cache", "list"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_commands_over_one_volume(store, tmp_path, command):
    given = [part.replace("DIR", str(tmp_path)) for part in command]
    where = [] if given[0] == "cache" else [store]
    if given[:2] == ["doctor"]:
        where = ["--store", store] if "--store" in run("doctor", "--help")[1] else [store]
    code, out, err = run(*given[:2], *where, *given[2:])
    assert code in (0, 1), err
    assert not many_of_one(out + err)


def test_an_ingest_of_one_volume(tmp_path):
    write_dicom_series(tmp_path / "in", phantom_hu(), base_affine(), SeriesIdentity())
    command = ("ingest", tmp_path / "in", "--out", tmp_path / "s", "--key-file", tmp_path / "key", "--workers", 0)
    for _ in range(2):
        code, out, err = run(*command, "--phi-scan")
        assert code == 0 and "1 volume" in out
        assert not many_of_one(out + err)


def test_what_counts_as_many():
    assert many_of_one("1 volumes of 1 patients") == ["1 volumes", "1 patients"]
    assert not many_of_one("1 volume of 11 patients, 0.1 seconds, 2 of 1 superpatch")
