"""A report folder over many runs: nothing is lost, each volume keeps its files, no two stores share one."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.command_line import fails, run
from support.sources import PATIENTS, SLICES, Workplace, incomplete, write_sources

from maesil import errors
from maesil.ingest.report_folder import (
    EARLIER,
    FILES,
    Noted,
    files_by_volume,
    files_of,
    known_verdicts,
    merged,
    read_noted,
    source_text,
    write_noted,
)  # fmt: skip
from maesil.ingest.verdict import FileVerdict

NAMES = st.sampled_from(["a", "b", "c", "d"]) | st.binary(min_size=1, max_size=6).map(os.fsdecode)
VERDICTS = st.builds(
    FileVerdict,
    path=NAMES.filter(lambda name: "\0" not in name).map(Path),
    status=st.sampled_from(["used", "quarantined"]),
    code=st.sampled_from(["committed", "fresh", "gap"]),
    volume_id=st.sampled_from([None, "v1", "v2", "v3"]),
    detail=st.sampled_from(["", "why"]),
    more_volumes=st.sampled_from([(), ("v4",)]),
)
ROWS = st.lists(st.builds(Noted, VERDICTS, st.just("1")), max_size=8, unique_by=lambda noted: noted.verdict.path)


def newer(rows: list[Noted]) -> list[Noted]:
    return [Noted(noted.verdict, "2") for noted in rows]


@given(ROWS, ROWS, st.sets(st.sampled_from(["v1", "v2", "v3", "v4"])), st.booleans())
def test_every_row_is_kept_replaced_or_said_again(before, now, known, whole):
    rows, replaced = merged(before, newer(now), known, whole=whole)
    assert set(newer(now)) <= set(rows), "what this run says holds"
    said = {noted.fact for noted in rows} | {noted.fact for noted in replaced}
    assert {noted.fact for noted in before} <= said, "and nothing else is lost"
    assert max(Counter(noted.verdict.path for noted in rows).values(), default=1) == 1, "one verdict a file"
    for noted in rows:
        if noted.run == "1":
            ids = set(noted.verdict.volume_ids)
            assert not whole and (not ids or ids & known)
            assert not ids & {one for other in now for one in other.verdict.volume_ids}, "a volume has one source"


@given(ROWS)
def test_the_same_run_again_changes_no_fact_and_moves_nothing_aside(rows):
    known = {"v1", "v2", "v3", "v4"}
    again = [Noted(FileVerdict(v.path, v.status, "fresh" if v.status == "used" else v.code, v.volume_id, v.detail,
                               v.more_volumes), "2") for v in (noted.verdict for noted in rows)]  # fmt: skip
    found, replaced = merged(rows, again, known, whole=False)
    assert replaced == [] and {noted.fact for noted in found} == {noted.fact for noted in rows}


@settings(deadline=None, max_examples=30)
@given(rows=ROWS)
def test_tables_give_back_every_name(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("table") / FILES
    write_noted(path, rows)
    assert read_noted(path) == rows
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_parts_of_a_job_array_do_not_forget_what_other_parts_did():
    mine = [Noted(FileVerdict(Path("a"), "used", "committed", "v1"), "1")]
    left = [Noted(FileVerdict(Path(name), "skipped", "other_partition"), "2") for name in "ab"]
    rows, replaced = merged(mine, left, {"v1"}, whole=False)
    assert rows == [mine[0], left[1]] and replaced == []


def test_sources_are_told_in_one_line():
    assert source_text([Path("/x/a.nii.gz")]) == "/x/a.nii.gz" and source_text([]) == ""
    assert source_text([Path("/x/p/1"), Path("/x/q/2")]) == "/x (2 files)"


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> Workplace:
    """A store that grew by two runs over other sources, the second of them with a series that lacks a slice."""
    place = Workplace(tmp_path_factory.mktemp("grown"))
    write_sources(place.sources)
    hidden = incomplete(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place.root / "cache"))
        assert ingested(place, place.sources / "nifti of SMITH")[0] == 0
        assert ingested(place, place.sources / "export")[0] == errors.EXIT_REFUSED
    (place.root / "kept").mkdir()
    shutil.move(hidden, place.root / "kept")
    return place


def ingested(place: Workplace, *more: object) -> tuple[int, str, str]:
    options = ("--out", place.out, "--spacing", "native", "--superpatch", 32, "--workers", 0, "--key-file", place.key)
    return run("ingest", *more, *options)


def report(place: Workplace) -> Path:
    return place.root / "store.report"


def test_a_second_run_keeps_what_the_first_one_found(grown):
    rows = known_verdicts(report(grown))
    assert len(rows) == 1 + 2 * SLICES - 1 and len({noted.run for noted in rows}) in (1, 2)
    files = files_by_volume(rows)
    volumes, refused = grown.store.volumes(), grown.store.quarantined()
    assert set(files) == {v.volume_id for v in volumes} | {r.volume_id for r in refused} and len(refused) == 1
    assert sorted(len(paths) for paths in files.values()) == [1, SLICES - 1, SLICES]
    page = (report(grown) / "index.html").read_text()
    assert page.count("SMITH-42.nii.gz") >= 2 and page.count("axial plane") == 2, "all volumes of the store are shown"
    runs = [json.loads(line) for line in (report(grown) / "runs.jsonl").read_text().splitlines()]
    assert [len(found["committed"]) for found in runs] == [1, 1] and runs[1]["refused_volumes"] == 1


def test_what_is_mended_moved_or_gone_is_moved_aside(grown, tmp_path):
    place = Workplace(tmp_path)
    shutil.copytree(grown.root, tmp_path, dirs_exist_ok=True)
    hidden = place.root / "kept" / "hidden.dcm"
    hidden.rename(place.sources / "export" / "mended.dcm")
    (place.sources / "nifti of SMITH").rename(place.sources / "moved")
    assert ingested(place, place.sources)[0] == 0
    rows = known_verdicts(report(place))
    assert all(noted.verdict.path.is_relative_to(place.sources) for noted in rows), "the newest place of each file"
    assert not [noted for noted in rows if noted.verdict.status == "quarantined"]
    earlier = read_noted(report(place) / EARLIER)
    assert [n.verdict.code for n in earlier if n.verdict.status == "quarantined"] == ["gap"] * (SLICES - 1)
    assert len(files_of(report(place), place.out)) == 3
    with (report(place) / "quarantine.csv").open() as file:
        assert len(file.readlines()) == 1


def test_store_and_report_may_move_together_but_no_other_store_writes_here(grown, tmp_path):
    shutil.copytree(grown.root, tmp_path / "copy")
    place = Workplace(tmp_path / "copy")
    assert ingested(place, grown.sources / "nifti of SMITH")[0] == 0, "a copy of both is at home"
    other = tmp_path / "copy" / "store"  # its default report would be store.report, too
    options = ("--spacing", "native", "--superpatch", 32, "--workers", 0, "--key-file", place.key)
    line = fails(errors.EXIT_USAGE, "ingest", grown.sources, "--out", other, *options)
    assert f"the report of another store, {place.out}" in line and not other.exists(), "told before any work"
    assert files_of(report(place), other) == {}, "nor does it explain the volumes of another store"
    line = fails(errors.EXIT_USAGE, "ingest", grown.sources, "--out", other, "--report", report(grown), *options)
    assert f"the report of another store, {grown.out}" in line
    shutil.rmtree(place.out)
    assert run("ingest", grown.sources / "nifti of SMITH", "--out", other, *options)[0] == 0, "its store is gone"
    ids = set(files_of(report(place), other))
    assert ids == {v.volume_id for v in grown.store.volumes() if v.source["kind"] == "nifti"}


def test_a_folder_with_another_page_in_it_is_no_report(grown, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("my page")
    line = fails(errors.EXIT_USAGE, "ingest", grown.sources, "--out", tmp_path / "s", "--report", tmp_path / "site")
    assert "index.html that is not of a report" in line
    assert (tmp_path / "site" / "index.html").read_text() == "my page"


@pytest.mark.parametrize("damage", [b"", b"{", b"PAR1", b"[]"])
def test_a_damaged_report_is_made_anew(grown, tmp_path, damage):
    shutil.copytree(grown.root, tmp_path, dirs_exist_ok=True)
    place = Workplace(tmp_path)
    for name in (FILES, "store.json", "runs.jsonl"):
        (report(place) / name).write_bytes(damage)
    assert ingested(place, place.sources / "nifti of SMITH")[0] == 0
    assert len(known_verdicts(report(place))) == 1


def test_names_that_are_no_utf_8_pass_from_scan_to_report(tmp_path):
    place = Workplace(tmp_path)
    write_sources(place.sources)
    raw = os.fsencode(place.sources) + b"/Sch\xe4del \x1b[31m\n"
    (place.sources / "nifti of SMITH").rename(os.fsdecode(raw))
    incomplete(place)
    code, out, _ = ingested(place, place.sources, "--json", "--phi-scan", "--id-map", tmp_path / "map.json")
    document = json.loads(out)
    assert code == errors.EXIT_REFUSED and document["files_found"] == len(document["files"]) == 2 * SLICES + 1
    shown = str(place.sources) + "/Sch\\xe4del \\x1b[31m\\x0a/SMITH-42.nii.gz"
    assert shown in [row["path"] for row in document["files"]]
    assert Path(os.fsdecode(raw)) / "SMITH-42.nii.gz" in [n.verdict.path for n in known_verdicts(report(place))]
    page = (report(place) / "index.html").read_text(encoding="utf-8")
    assert shown in page and "\x1b" not in page
    code, out, err = ingested(place, os.fsdecode(raw))
    assert code == 0 and "\x1b" not in out + err
    volume = next(v for v in place.store.volumes() if v.source["kind"] == "nifti")
    assert shown in run("store", "explain", place.out, volume.volume_id)[1]
    assert PATIENTS[1] in (tmp_path / "map.json").read_text()
