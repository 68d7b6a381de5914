"""The scan on a disk: the same plan as in memory, gone on with after a kill, shared by parts, damage found."""

from __future__ import annotations

import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid
from support.ct_phantom import base_affine
from support.headers import straight
from support.lanes import slow_but
from support.sources import PATIENTS, SLICES, Workplace, contents, phantom_hu, slices_of

from maesil.cli.ingest import _into_store
from maesil.errors import MaesilError
from maesil.ingest import scan as scanning
from maesil.ingest.header_rows import DamagedRow, header_of, rows_of
from maesil.ingest.planning import planned_on_disk, scan_and_plan
from maesil.ingest.report import write_report
from maesil.ingest.report_folder import FILES, read_noted
from maesil.ingest.verdict import FileVerdict, one_per_file
from maesil.ingest.verdict_tables import Verdicts
from maesil.store.recipe import Recipe
from maesil.synthetic.dicom import SeriesIdentity, write_dicom_series


class Stopped(Exception):
    """Ends a scan in its middle, as a kill would."""


class Scans:
    """Plans over one tree, with a count of the headers that were read."""

    def __init__(self, place: Workplace, monkeypatch) -> None:
        self.place, self.read, self.said = place, [], []
        real = scanning.read_headers
        monkeypatch.setattr(scanning, "read_headers", lambda path: self.read.append(path) or real(path))
        monkeypatch.setattr("maesil.ingest.shared_scan._WORTH_TELLING", 1)

    def on_disk(self, after: int | None = None, **options):
        def progress(stage: str, done: int, total: int | None) -> None:
            if (stage, done) == ("scan", after):
                raise Stopped

        self.read.clear()
        self.said.clear()
        found = planned_on_disk(
            [self.place.sources], Recipe(), self.place.options(**options), progress, self.said.append
        )
        return told(found[0])

    def in_memory(self):
        return told(scan_and_plan([self.place.sources], Recipe(), self.place.options(), lambda *_: None))

    @property
    def tables(self) -> Path:
        (file,) = (self.place.root / "cache" / "scans").glob("*.sqlite")
        return file


def told(plan) -> tuple:
    """All that a plan says, in order."""
    volumes = [
        (item.identity, item.patient, item.study, item.series, replace(item.source, affine=None),
         None if item.source.affine is None else item.source.affine.tolist())
        for item in plan.volumes
    ]  # fmt: skip
    refused = [(one.identity, str(one.refusal), repr(one.refusal.numbers), one.paths) for one in plan.refused]
    return volumes, refused, list(plan.verdicts), plan.damaged_files


@pytest.fixture
def scans(first, tmp_path, monkeypatch) -> Scans:
    """A tree with what needs a look at all of it: scattered slices, blanked UIDs over folders, one UID of two."""
    place = first.copy(tmp_path)
    hu = phantom_hu()
    for name, extra in {"scattered": {}, "blank": {"SeriesInstanceUID": ""}, "gap": {}}.items():
        who = SeriesIdentity(patient=f"P-{name}", study=f"study {name}", series=name, extra=extra)
        files = write_dicom_series(place.sources / name, hu, base_affine(), who)
        if name == "scattered":
            _scatter(files)
        elif name == "blank":
            (place.sources / "blank2").mkdir()
            for file in files[::2]:
                file.rename(place.sources / "blank2" / file.name)
        else:
            files[7].unlink()
    shutil.copytree(place.sources / "gap", place.sources / "gap copied")
    (place.sources / "cut.dcm").write_bytes(files[0].read_bytes()[:300])
    return Scans(place, monkeypatch)


def _scatter(files: list[Path]) -> None:
    """Give each slice a series UID of its own."""
    for file in files:
        data = pydicom.dcmread(file)
        data.SeriesInstanceUID = generate_uid(entropy_srcs=[file.name])
        data.save_as(file)


@pytest.mark.parametrize("text", ["", "Ünïcode", "\udce4\x00'\"", "x\\y"])
def test_headers_come_back_as_they_were(text):
    (plain, *_) = straight(2)
    header = replace(
        plain, patient=text, slice_location=text, position=(0.1, -1e-17, 1 / 3), weak=(text, ""), remarks=("head",),
        technical={"KVP": 120.0, "Manufacturer": text}, orientation=None, frame=7,
    )  # fmt: skip
    rows = rows_of(header)
    assert header_of(header.path, rows) == header
    other = rows_of(replace(header, rows=65)).shared
    damaged = {"shared": other, "own": rows.own[:-1] + b"!", "key": ("another", *rows.key[1:])}
    for name, value in damaged.items():
        with pytest.raises(DamagedRow):
            header_of(header.path, replace(rows, **{name: value}))


def test_the_plan_on_a_disk_is_that_in_memory(scans):
    in_memory = scans.in_memory()
    assert scans.on_disk() == in_memory
    volumes, _, verdicts, damaged = in_memory
    assert {note for *_, source, _ in volumes for note in source.notes} >= {"series_reunited", "blank_series_uid"}
    assert len(volumes) == 5 and damaged == 1 and {v.code for v in verdicts} >= {"not_medical"}, verdicts


@pytest.mark.parametrize("after", slow_but((1, 40, 90), (40,)))
def test_a_killed_scan_goes_on_where_it_stopped(scans, after, monkeypatch):
    monkeypatch.setattr("maesil.ingest.scan_tables._FILES_A_TRANSACTION", 5)
    whole = scans.in_memory()
    files = len(scans.read)
    with pytest.raises(Stopped):
        scans.on_disk(after=after)
    assert scans.on_disk() == whole
    assert files - after <= len(scans.read) + 10 and len(scans.read) <= files - after + 10
    assert after == 1 or "going on with an earlier scan" in scans.said[0]


def test_what_changed_is_read_again_and_nothing_else(scans):
    scans.on_disk()
    assert scans.on_disk() == scans.in_memory()
    scans.on_disk()
    assert scans.read == [] and "were read by another run" in scans.said[0]
    slices = slices_of(scans.place.sources / "export", PATIENTS[0])
    slices[3].touch()
    found = scans.on_disk()
    assert scans.read == [slices[3]] and "changed" in scans.said[0]
    assert found == scans.in_memory()
    slices[3].unlink()
    found = scans.on_disk()
    assert slices[3] not in scans.read
    assert found == scans.in_memory()
    (scans.place.sources / "export" / "new.dcm").write_bytes(slices[4].read_bytes())
    found = scans.on_disk()
    assert scans.place.sources / "export" / "new.dcm" in scans.read
    assert found == scans.in_memory()


@pytest.mark.parametrize("part", slow_but(("whole file", "one page", "one byte"), ("one byte",)))
def test_damaged_tables_are_found_and_said(scans, part):
    whole = scans.on_disk()
    data = bytearray(scans.tables.read_bytes())
    if part == "whole file":
        data[:] = bytes(len(data))
    elif part == "one page":
        data[4096 * 5 : 4096 * 6] = bytes(4096)
    else:
        at = data.index(b'["ORIGINAL"')
        data[at + 3] ^= 1
    scans.tables.write_bytes(data)
    assert scans.on_disk() == whole
    assert any("damaged" in line or "changed" in line for line in scans.said), scans.said


def test_verdicts_on_a_disk_are_those_of_a_list():
    rng = np.random.default_rng(3)
    statuses = ("used", "skipped", "quarantined", "ignored")
    verdicts = [
        FileVerdict(Path(f"/x/{rng.integers(40)}"), statuses[rng.integers(4)], f"c{rng.integers(3)}", f"v{number}")
        for number in range(120)
    ]
    table = Verdicts()
    table.extend(verdicts)
    assert list(table) == verdicts and table[5] == verdicts[5] and table[-1] == verdicts[-1] and len(table) == 120
    table.settle()
    expected = one_per_file(verdicts)
    assert list(table) == expected and table == expected
    paths = [verdict.path for verdict in verdicts]
    assert table.are_one_for_each(paths)
    assert not table.are_one_for_each(paths[:1]) and not table.are_one_for_each([*paths, Path("/y")])
    first = {(v.status, v.code): v for v in reversed(expected)}
    assert {key: one for key, (_, one) in table.tally().items()} == first


def test_parts_share_one_scan_which_goes_with_the_last(first, tmp_path, monkeypatch):
    place = first.copy(tmp_path)
    read = []
    real = scanning.read_headers
    monkeypatch.setattr(scanning, "read_headers", lambda path: read.append(path) or real(path))
    for number in range(3):
        summary = place.ingest(partition=(number, 3))
        assert summary.absent == 0, "what other parts made came from somewhere"
        assert len(read) == 2 * SLICES
        write_report(tmp_path / "report", summary, place.out)
        left = list((tmp_path / "cache" / "scans").glob("*.sqlite"))
        assert len(left) == (number < 2)
    assert contents(place.store) == contents(first.store)
    page = (tmp_path / "report" / "index.html").read_text()
    assert "other_partition" not in page and ">committed<" in page, "the page shows all parts"


def test_a_run_that_ends_well_leaves_no_tables(first, tmp_path):
    place = first.copy(tmp_path)
    place.ingest()
    assert {path.suffix for path in (tmp_path / "cache" / "scans").iterdir()} == {".lock"}
    with pytest.raises(MaesilError):
        place.ingest(tmp_path / "cache")
    assert {path.suffix for path in (tmp_path / "cache" / "scans").iterdir()} == {".lock"}


def _one_part(root: Path, number: int, count: int) -> None:
    place = Workplace(root)
    options = place.options(partition=(number, count))
    _into_store([place.sources], place.out, Recipe(spacing=None, superpatch=32), options, root / "report")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_four_parts_at_once_make_what_one_run_makes(tmp_path):
    """Hundreds of tiny series; the parts begin together, one scans, and their reports become one."""
    place = Workplace(tmp_path / "parts")
    for number in range(200):
        who = SeriesIdentity(patient=f"P{number}", study=f"s{number}", series=f"r{number}")
        hu = np.full((16, 16, 16), -1000.0)
        hu[:, 4:12, 4:12] = 40 + number % 7 + np.arange(16)[:, None, None]
        write_dicom_series(place.sources / f"{number:03d}", hu, base_affine(), who)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["maesil.ingest.run", "maesil.ingest.report"])
    (tmp_path / "parts" / "identity.key").write_text("a" * 64)
    parts = [context.Process(target=_one_part, args=(place.root, number, 4)) for number in range(4)]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
        assert part.exitcode == 0
    alone = place.copy(tmp_path / "alone")
    alone.ingest()
    assert contents(place.store) == contents(alone.store)
    assert len(place.store.volumes()) == 200
    rows = [noted.verdict for noted in read_noted(place.root / "report" / FILES)]
    assert len(rows) == 3200 and {verdict.status for verdict in rows} == {"used"}
