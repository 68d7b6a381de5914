"""Where a store, its report and its maps cannot be: said in one line before the work, and nothing is left behind.

Real file systems are mounted where this process may mount any (root on Linux); else these tests are skipped.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.command_line import fails, run
from support.lanes import slow_but
from support.sources import Workplace, write_sources

from maesil import errors
from maesil.atomic import make_link
from maesil.files import require_writable
from maesil.ingest import limits


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    place = Workplace(tmp_path_factory.mktemp("places"))
    write_sources(place.sources)
    return place.sources / "nifti of SMITH"


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


def options(*more: object) -> tuple[object, ...]:
    return ("--spacing", "native", "--superpatch", 32, "--workers", 0, *more)


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("kind", slow_but(("tmpfs", "overlay"), ("tmpfs",)))
def test_file_systems_with_hard_links_hold_stores(mount, source, tmp_path, kind):
    place = mount("mount", "-t", "tmpfs", "none", "PLACE")
    if kind == "overlay":
        lower = tmp_path / "lower"
        for folder in (lower, place / "upper", place / "work"):
            folder.mkdir()
        layers = f"lowerdir={lower},upperdir={place / 'upper'},workdir={place / 'work'}"
        place = mount("mount", "-t", "overlay", "overlay", "-o", layers, "PLACE")
    assert run("ingest", source, "--out", place / "s.zarr", *options())[0] == 0
    assert run("store", "verify", place / "s.zarr")[0] == 0 and files_in(place / "s.report")


def test_a_file_system_without_hard_links_is_told_before_the_work(mount, source, tmp_path):
    if shutil.which("fusefat") is None or shutil.which("mkfs.fat") is None:
        pytest.skip("needs fusefat and mkfs.fat")
    image = tmp_path / "fat.img"
    image.write_bytes(bytes(32 << 20))
    subprocess.run(["mkfs.fat", image], check=True, capture_output=True)
    place = mount("fusefat", "-o", "rw+", image, "PLACE")
    line = fails(errors.EXIT_USAGE, "ingest", source, "--out", place / "s.zarr", *options())
    assert line.startswith("error: --out: ") and "no hard links" in line and files_in(place) == []


@pytest.mark.parametrize(
    ("size", "inodes"), [("120k", "0"), pytest.param("40k", "0", marks=pytest.mark.slow), ("10m", "25")]
)
def test_a_full_disk_ends_with_its_code_in_one_line(mount, source, size, inodes):
    place = mount("mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes={inodes}", "none", "PLACE")
    if size == "40k":
        with pytest.raises(OSError, match="No space"):
            (place / "fill").write_bytes(bytes(1 << 20))
    code, _, told = run("ingest", source, "--out", place / "s.zarr", *options())
    *progress, line = told.splitlines()
    assert code == errors.EXIT_RESOURCES and line.startswith("error: ") and "the disk is full" in line
    assert all(line.startswith(("scan: ", "hash: ", "build: ")) for line in progress)


@pytest.mark.parametrize("size", slow_but(("60k", "200k", "300k"), ("200k",)))
def test_a_disk_too_small_for_the_voxels_of_a_long_scan(mount, source, monkeypatch, size):
    """While they are decoded, marked, or made ready to be written."""
    monkeypatch.setattr(limits, "WHOLE_VOXELS", 1000)
    place = mount("mount", "-t", "tmpfs", "-o", f"size={size}", "none", "PLACE")
    code, _, told = run("ingest", source, "--out", place / "s.zarr", *options())
    assert code == errors.EXIT_RESOURCES and "the disk is full" in told.splitlines()[-1]


def test_what_cannot_be_written_is_told_by_its_option_before_the_work(mount, source, tmp_path):
    (tmp_path / "kept").mkdir()
    place = mount("mount", "--bind", tmp_path / "kept", "PLACE")
    subprocess.run(["mount", "-o", "remount,ro,bind", place], check=True, capture_output=True)
    out = tmp_path / "s.zarr"
    for option, more in {
        "--out": ("--out", place / "s.zarr"),
        "--report": ("--out", out, "--report", place / "r"),
        "--id-map": ("--out", out, "--id-map", place / "map.json"),
        "--key-file": ("--out", out, "--key-file", place / "key"),
    }.items():
        line = fails(errors.EXIT_USAGE, "ingest", source, *more, *options())
        assert line.startswith(f"error: {option}: ") and "read-only file system" in line and not out.exists()


@pytest.mark.parametrize("place", ["/proc/s.zarr", "/proc/self/s.zarr", "/dev/null", "/dev/null/s.zarr"])
def test_places_that_only_look_like_folders(source, place):
    assert "--out: " in fails(errors.EXIT_USAGE, "ingest", source, "--out", place, *options())


def test_the_cache_is_asked_too(mount, source, monkeypatch):
    monkeypatch.setenv("MAESIL_CACHE", "/proc/cache")
    assert "MAESIL_CACHE: /proc/cache" in fails(errors.EXIT_USAGE, "ingest", source, *options())


@pytest.mark.parametrize("kind", ["full of files", "a file", "below a file"])
def test_folders_of_others_are_left_alone(source, tmp_path, kind):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    out = tmp_path / "mine" / {"full of files": ".", "a file": "thesis.tex", "below a file": "thesis.tex/s"}[kind]
    fails(errors.EXIT_USAGE, "ingest", source, "--out", out, *options())
    assert files_in(tmp_path / "mine") == ["thesis.tex"] and not list(tmp_path.glob("*.report"))


@pytest.mark.parametrize("code", errors.NO_HARD_LINKS)
def test_whatever_says_that_there_are_no_hard_links(tmp_path, monkeypatch, code):
    def link(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(errors.UsageError, match=r"--x: .*no hard links"):
        require_writable(tmp_path / "not yet" / "there", "--x", links=True)
    assert files_in(tmp_path) == [], "nothing is left behind"
    require_writable(tmp_path, "--x")


def test_a_link_is_made_once(tmp_path):
    (tmp_path / "a").write_text("a")
    make_link(tmp_path / "a", tmp_path / "b")
    with pytest.raises(FileExistsError):
        make_link(tmp_path / "a", tmp_path / "b")
    with pytest.raises(OSError) as caught:
        make_link(tmp_path / "missing", tmp_path / "c")
    assert caught.value.errno == errno.ENOENT
