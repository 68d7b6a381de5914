"""The page: names are escaped, tables hold what was scored."""

from __future__ import annotations

from maesil.downstream.findings import chance, findings, limits
from maesil.downstream.prove_page import Proof, write_page
from maesil.downstream.scored import SHUFFLED, Row, Rows

NASTY = "<script>alert(1)</script> $x^ & \x1b[31m"


def proof(organ: str = "liver", note: str = "") -> Proof:
    patients = [f"p{number}" for number in range(7)]
    frozen = {"mine": 0.9, "untrained": 0.6, "voxels": 0.55, NASTY: 0.3, SHUFFLED: 0.5}
    rows = [Row("presence_auroc", name, p, value, organ) for name, value in frozen.items() for p in patients]
    starts = {"mine": 0.8, "scratch": 0.7, "mine, frozen": 0.6, "untrained, frozen": 0.6, f"{NASTY}, frozen": 0.1}
    for name, value in starts.items():
        rows += [
            Row("dice", name, p, value * step / 10, organ, n, 0, step)
            for p in patients
            for step in (5, 10)
            for n in (1, 7)
        ]
    budget = {"name": "tiny", "patients": [1, 0], "steps": 10, "batch": 2, "seeds": 1, "tolerance_mm": 3.0}
    made = {"budget": budget, "part": "test", "seed": 0, "patients_learnt_from": ["a"], "patients_scored": patients}
    found = findings(Rows(rows), "mine")
    checks, limited = tuple(chance(Rows(rows))), tuple(limits(found, "test"))
    return Proof("mine", Rows(rows), found, checks, limited, (note,) * bool(note), made)


def test_names_are_escaped_everywhere(tmp_path):
    write_page(proof(NASTY, f"note {NASTY}"), tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "http" not in page
    assert "\x1b" not in page
    assert page.count("&lt;script&gt;") >= 4  # encoder, start, organ, note


def test_tables_and_sentences_hold_what_was_scored(tmp_path):
    one = proof()
    write_page(one, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert one.frozen_table()[1] == ["mine", "0.900", ""]
    assert one.frozen_table()[2] == ["untrained", "0.600", "+0.300 [+0.300, +0.300]"]
    assert one.frozen_table()[-1][0] == SHUFFLED
    assert ["7", "scratch", "0.700", "+0.100 [+0.100, +0.100]"] in one.segmentation_table()
    assert one.organ_table()[1][:4] == ["liver", "7", "0.800", "0.700"]
    assert "pre-training helps by +0.100" in page and "no difference could be shown with 7 patients" in page
    assert one.summary() == "6 comparisons: helps in 4, harms in 0, undecided in 2, too few patients in 0"
    assert 'class="used"' in page and "data:image/png" in page


def test_what_was_not_scored_has_no_table(tmp_path):
    one = proof()
    alone = Proof("mine", Rows([row for row in one.rows.rows if not row.shots]), [], (), (), (), one.made_from)
    assert [title for title, _ in alone.tables()] == ["Frozen encoders"]
    write_page(alone, tmp_path)
    assert "<img" not in (tmp_path / "index.html").read_text()
