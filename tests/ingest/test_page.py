"""The report folder: tables that agree with the run, a page that needs nothing else, every code in words."""

from __future__ import annotations

import csv
import json
import re
import stat
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.ct_cases import CASES, everything
from support.sources import Workplace, write_sources
from typer.testing import CliRunner

from maesil.cli import app
from maesil.codes import REFUSAL_CODES
from maesil.documents import read_json
from maesil.ingest.page import RefusedSource, page
from maesil.ingest.report_folder import files_by_volume, known_verdicts, source_text
from maesil.ingest.summary import Summary
from maesil.ingest.verdict import STATUSES, FileVerdict
from maesil.ingest.verdict_tables import Verdicts
from maesil.store.explain import NOTES, explanation, note_in_words
from maesil.store.recipe import ACCEPTABLE, REFUSABLE
from maesil.store.remedies import REMEDIES, remedy

ROOT = Path(__file__).resolve().parents[2]


class Ingested:
    def __init__(self, root: Path) -> None:
        self.place = Workplace(root)
        write_sources(self.place.sources)
        everything()
        for name in ("one_slice_missing", "spacing_changes", "gantry_tilt", "two_phases_told_apart", "junk_around"):
            CASES[name].build(self.place.sources / name, name)
        command = ["ingest", self.place.sources, "--out", self.place.out, "--workers", "0", "--superpatch", "32"]
        command += ["--key-file", self.place.key, "--report", root / "report", "--json"]
        self.result = CliRunner().invoke(app, list(map(str, command)))
        self.document = json.loads(self.result.stdout)
        self.report = root / "report"


@pytest.fixture(scope="module")
def ingested(tmp_path_factory) -> Ingested:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("report")
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        return Ingested(root)


def test_the_tables_agree_with_the_run(ingested):
    files = pq.read_table(ingested.report / "files.parquet").to_pylist()
    (run,) = {row.pop("run") for row in files}
    assert files == ingested.document["files"]
    (noted,) = map(json.loads, (ingested.report / "runs.jsonl").read_text().splitlines())
    assert (noted["run"], noted["files_found"]) == (run, len(files))
    assert noted["sources"] == ingested.document["sources"] == [str(ingested.place.sources)]
    summary = read_json(ingested.report / "summary.json")
    assert summary == {name: value for name, value in ingested.document.items() if name not in ("files", "store")}
    assert sum(summary["counts"].values()) == summary["files_found"] == len(files)
    with (ingested.report / "quarantine.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["code"] for row in rows} == {"gap", "irregular_spacing"}
    assert all(Path(row["first_file"]).exists() and json.loads(row["numbers"]) for row in rows)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href") and value]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_shows_every_volume(ingested):
    text = (ingested.report / "index.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert "http" not in text
    for volume in ingested.document["volumes"]:
        assert f'id="{volume["volume_id"]}"' in text
    assert text.count("alt='axial plane'") == len(ingested.document["volumes"]) == 7
    assert text.count("5.20 mm</text>") == 1  # the width of the one gap
    for name, count in ingested.document["counts"].items():
        assert re.search(rf'<b class="{name}">{count}</b>{name}', text)


def test_the_page_names_the_source_of_every_volume_and_refusal_and_what_to_do(ingested):
    text = unescape((ingested.report / "index.html").read_text())
    by_volume = files_by_volume(known_verdicts(ingested.report))
    refused = [record.volume_id for record in ingested.place.store.quarantined()]
    assert len(refused) == 2 and set(by_volume) == {*refused, *(v["volume_id"] for v in ingested.document["volumes"])}
    for volume_id, paths in by_volume.items():
        after = text[text.index(f'id="{volume_id}"') :]
        assert after.index(source_text(paths)) < 200, "the source stands in the card of the volume"
    assert text.count("What to do: ") == 2 and "`--fill-gaps N` interpolates" in text
    with (ingested.report / "quarantine.csv").open() as file:
        assert all(row["what_to_do"] == remedy(row["code"]) for row in csv.DictReader(file))


def test_what_holds_paths_is_for_its_owner_alone(ingested):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in ingested.report.iterdir() if path.name != ".lock"}
    assert set(modes) == {"files.parquet", "index.html", "quarantine.csv", "runs.jsonl", "store.json", "summary.json"}
    assert set(modes.values()) == {0o600}


def test_names_are_escaped(ingested):
    hostile = Path("/x/<script>alert(1)</script>/'\"><b>&")
    files = [FileVerdict(hostile, "quarantined", "gap", detail="<i>a & b\x1b[0m")]
    store = ingested.place.store
    sources = {volume.volume_id: [hostile] for volume in store.volumes()}
    refused = [RefusedSource("", "gap", "<i>a & b", (hostile,))]
    runs = [{"run": "2026", "sources": ["<script>"]}]
    text = page(Summary(files=Verdicts(files)), store.path, store, sources, refused, runs)
    assert "<script" not in text and "<i>" not in text and "\x1b" not in text
    shown = Page()
    shown.feed(text)
    assert shown.open == []


def test_a_report_within_the_store_is_refused(ingested):
    command = ["ingest", ingested.place.sources, "--out", ingested.place.out, "--report", ingested.place.out / "report"]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 2 and "outside the store" in result.stderr


def test_explain_says_why(ingested):
    store = ingested.place.store
    tilted = next(v for v in store.volumes() if "sheared" in v.notes)
    assert any("gantry tilt" in line for line in explanation(store, tilted.volume_id[:10]).lines())
    refused = next(r for r in store.quarantined() if r.code == "gap")
    result = CliRunner().invoke(app, ["store", "explain", str(store.path), refused.volume_id])
    assert result.exit_code == 0 and "gap: slices are missing: 1 after" in result.stdout
    assert CliRunner().invoke(app, ["store", "explain", str(store.path), "zz"]).exit_code == 2


def test_explain_names_the_files_and_what_to_do(ingested):
    store, report = ingested.place.store, ingested.report
    files = files_by_volume(known_verdicts(report))
    refused = next(r for r in store.quarantined() if r.code == "gap")
    command = ["store", "explain", str(store.path), refused.volume_id]
    text = CliRunner().invoke(app, command).stdout
    assert "what to do: look for the missing slices" in text and "files: not known here" in text
    text = CliRunner().invoke(app, [*command, "--report", str(report)]).stdout
    assert f"  {len(files[refused.volume_id])} files:" in text and str(files[refused.volume_id][0]) in text
    told = json.loads(CliRunner().invoke(app, [*command, "--report", str(report), "--json"]).stdout)
    assert told["sources"] == [str(path) for path in files[refused.volume_id]]
    assert told["refusal"]["what_to_do"] == remedy("gap")


def test_a_beginning_that_several_ids_share_names_them(ingested):
    store = ingested.place.store
    ids = sorted({v.volume_id for v in store.volumes()} | {r.volume_id for r in store.quarantined()})
    for command in (["store", "explain", str(store.path), ""], ["store", "export", str(store.path), "--out", "x", ""]):
        result = CliRunner().invoke(app, command)
        known = ids if "explain" in command else sorted(v.volume_id for v in store.volumes())
        assert result.exit_code == 2 and f"found {len(known)}: {known[0][:12]}, {known[1][:12]}" in result.stderr
        assert "give more of the id" in result.stderr and len(result.stderr.splitlines()) == 1


def codes_in(pattern: str) -> set[str]:
    sources = [path.read_text() for path in sorted((ROOT / "ingest").glob("*.py"))]
    return {code for text in sources for code in re.findall(pattern, text)}


def test_every_code_of_a_refusal_is_documented():
    raised = codes_in(r'(?:Refused|FileVerdict)\(\s*(?:[\w.]+, )?(?:"\w+", )?"(\w+)"') - set(STATUSES)
    documented = (ROOT / "docs" / "reference" / "verdicts.md").read_text()
    assert len(raised) > 30
    assert not [code for code in (*raised, *REFUSAL_CODES) if f"`{code}`" not in documented]
    assert {*REMEDIES, *ACCEPTABLE, *REFUSABLE} <= set(REFUSAL_CODES)


def test_every_code_that_is_quarantined_says_what_to_do():
    documented = (ROOT / "docs" / "reference" / "verdicts.md").read_text()
    rows = documented[documented.index("| quarantined |") : documented.index("| ignored |")].splitlines()
    codes = {code for row in rows for code in re.findall(r"`(\w+)`", row.split("|")[2])}
    assert len(codes) > 40
    assert not [code for code in sorted(codes) if "verdicts.md" in remedy(code)]
    assert all(remedy(code)[-1] != "." and "{" not in remedy(code) for code in {*codes, *REMEDIES})


def test_every_note_has_words():
    noted = codes_in(r'(?:notes|found)(?:\.add\(|\.append\(| \+= \[| \|= \{| = \[\] if [^"]+ else \[| = \[)"(\w+)"')
    noted |= codes_in(r'note = "(\w+)"') | codes_in(r'_noted\(outcome, "(\w+)"\)') | codes_in(r'WHOLE_WORDS = "(\w+)"')
    noted |= codes_in(r'[\{\[]"(lossy|trailing_bytes)"[\}\]]')
    assert noted <= set(NOTES)
    assert len(noted) > 15
    assert note_in_words("accepted_windowed") and not note_in_words("unknown")
