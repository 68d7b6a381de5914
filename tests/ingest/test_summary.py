"""The summary: rows sum to the files found, and the last line says what happened."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from support.stores import make_store

from maesil.ingest.summary import Summary
from maesil.ingest.verdict import STATUSES, FileVerdict
from maesil.ingest.verdict_tables import Verdicts

verdicts = st.builds(
    FileVerdict,
    path=st.text("abc/[]\udce4\x1b\u202e", min_size=1, max_size=12).map(Path),
    status=st.sampled_from(STATUSES),
    code=st.sampled_from(["gap", "fresh", "empty", "[red]"]),
    detail=st.text("a[]\\/ :\x1b\n", max_size=10),
)


def printed(*renderables) -> str:
    console = Console(file=io.StringIO(), width=160)
    for renderable in renderables:
        console.print(renderable, markup=False, highlight=False)
    return console.file.getvalue()


@settings(max_examples=40, deadline=None)
@given(st.lists(verdicts, max_size=30))
def test_rows_sum_to_the_files_found(files):
    summary = Summary(files=Verdicts(files))
    table = summary.table()
    counts = [int(cell) for cell in table.columns[2]._cells]
    assert sum(counts) == len(files) == int(table.columns[2].footer)
    assert sum(summary.counts.values()) == len(files)
    assert list(summary.counts) == list(STATUSES)
    assert json.dumps(summary.document(), ensure_ascii=False).encode().isascii() or files
    text = printed(table, *summary.refusals())  # names with brackets are names, not markup
    text.encode("utf-8")
    assert "\x1b" not in text and "\u202e" not in text


def test_brackets_of_names_and_details_are_printed_as_they_are():
    summary = Summary(files=Verdicts([FileVerdict(Path("a[bold]b"), "quarantined", "gap", detail="[1] missing")]))
    text = printed(summary.table())
    assert "a[bold]b" in text and "[1] missing" in text


def test_refusals_are_listed_once_each_and_the_rest_counted():
    files = [FileVerdict(Path(f"/f{n}/{k}"), "quarantined", "gap", detail=f"{n}") for n in range(12) for k in range(3)]
    lines = Summary(files=Verdicts(files)).refusals()
    assert len(lines) == 9 and "4 more" in lines[-1]


def test_conclusions(tmp_path):
    volumes = make_store(tmp_path / "s", [(9, 9, 9)] * 2, superpatch=16).volumes()
    assert Summary(committed=volumes).conclusion("s").startswith("2 volumes committed to s, 0 were up to date")
    assert Summary(fresh=volumes, absent=3).conclusion("s").startswith("nothing to do: 2 volumes")
    assert "3 volumes of the store came from other sources" in Summary(fresh=volumes, absent=3).conclusion("s")
    assert Summary(fresh=volumes[:1]).conclusion("s") == "nothing to do: 1 volume is up to date in s"
    assert Summary(refused_volumes=2).conclusion("s") == "no volume was made in s; 2 refused"
    assert (
        Summary(committed=volumes[:1], fresh=volumes[1:]).conclusion("s") == "1 volume committed to s, 1 was up to date"
    )
    assert Summary(committed=volumes, refused_volumes=1).conclusion("s").endswith("1 refused")
    assert "1 volume would be made" in Summary(planned=["a"], dry_run=True).conclusion("s")


def test_notes_of_what_was_committed_are_counted_by_volume(tmp_path):
    store = make_store(tmp_path / "store", [(8, 8, 8), (8, 8, 16)], superpatch=8)
    plain, other = store.volumes()
    assert Summary(committed=[plain], fresh=[replace(other, notes=("lossy",))]).noted() == []
    noted = [replace(plain, notes=("head", "lossy")), replace(other, notes=("lossy",))]
    (line,) = Summary(committed=noted).noted()
    assert line.startswith("noted: head (1 volume), lossy (2 volumes); ") and "store explain" in line
