"""The report and the pages: every figure of the JSON is there, and nothing where there is none."""

from __future__ import annotations

import json
import re
import sys

import pytest
from gpu import fill_pages, report

STEP = {
    "preset": "tiny", "way": "eager", "batch": 8, "ms": 123.45, "crops_per_second": 64.8, "share_of_peak": 0.236,
    "spread": 0.02, "peak_megabytes": None, "first_step_seconds": 1.5, "gflop": 45.6, "peak_teraflops": 0.4,
}  # fmt: skip
CPU = {
    "date": "2026-11-27T10:00:00+00:00", "seconds": 61.0,
    "parts": {
        "machine": {"state": "no GPU", "seconds": 5.0, "rows": [{"what": "torch", "value": "2.11.0"}]},
        "correctness": {"state": "done", "seconds": 30.0, "rows": [
            {"test": "test_gather[8-float32]", "outcome": "passed", "seconds": 1.25},
            {"test": "test_gather[8-bfloat16]", "outcome": "failed", "seconds": 2.0},
        ]},
        "kernel_speed": {"state": "no GPU", "seconds": 4.0, "rows": []},
        "step_speed": {"state": "done", "seconds": 20.0, "rows": [
            {"preset": "base", "way": None, "said": "no GPU"}, {"preset": "large", "way": None, "said": "no GPU"}, STEP,
        ]},
    },
}  # fmt: skip
"""In the format of a run on a CPU; `test_bundle` reads a real one."""
KERNEL = {
    "operation": "gather", "way": "maesil", "batch": 64, "us": 90.12, "gigabytes_per_second": 2500.0,
    "share_of_copy": 0.861, "floor_us": 77.6, "least_megabytes": 225.0, "peak_megabytes": 134.2,
}  # fmt: skip


def of_a_gpu() -> dict:
    document = json.loads(json.dumps(CPU))
    parts = document["parts"]
    parts["machine"]["rows"] += [{"what": "GPU", "value": "Some GPU"}, {"what": "triton", "value": "3.6.0"}]
    parts["kernel_speed"] = {"state": "done", "rows": [KERNEL]}
    return document


def test_the_report_has_a_section_a_part_and_its_figures():
    text = report.markdown(CPU)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [report.TITLES[name] for name in CPU["parts"]]
    assert "## Kernels\n\nno GPU (4 s)\n\n## Step" in text
    assert "| tiny | eager | 8 | 123.45 | 64.8 | 23.6% | 2.0% | - | 1.5 |" in text
    assert "base, large: no GPU" in text
    assert "| test_gather | 2 | 1 | 3.2 |" in text and "* failed: `test_gather[8-bfloat16]`" in text


@pytest.mark.parametrize("page", fill_pages.PAGES, ids=lambda page: page.stem)
def test_pages_are_filled_and_filled_again_alike(page):
    bare = page.read_text(encoding="utf-8")
    names = re.findall(r"<!-- gpu: (\w+) -->", bare)
    assert names and set(names) <= set(fill_pages.SECTIONS)
    assert bare.count("<!-- end -->") == len(names)
    once = fill_pages.filled(bare, of_a_gpu())
    assert once != bare and fill_pages.filled(once, of_a_gpu()) == once
    assert "Taken on 2026-11-27: Some GPU, driver unknown, torch 2.11.0, Triton 3.6.0." in once
    assert fill_pages.MARKED.sub("", once) == fill_pages.MARKED.sub("", bare)
    row = "| gather | maesil | 64 | 90.12 | 77.6 | 2500.0 | 86.1% | 134.2 |"
    assert (row in once) == ("kernels" in names)


def test_what_has_no_figures_has_no_table():
    for page in fill_pages.PAGES:
        text = fill_pages.filled(page.read_text(encoding="utf-8"), {"date": "2026-11-27", "seconds": 0.0, "parts": {}})
        assert not re.search(r"<!-- gpu: \w+ -->\n[^<]*\|", text)
    assert "have not been timed on a GPU yet" in fill_pages.filled("<!-- gpu: kernels -->\n<!-- end -->", CPU)


def test_figures_of_a_machine_without_a_gpu_fill_no_page(tmp_path, monkeypatch, capsys):
    (tmp_path / "gpu.json").write_text(json.dumps(CPU))
    monkeypatch.setattr(sys, "argv", ["fill_pages.py", str(tmp_path / "gpu.json")])
    monkeypatch.setattr(fill_pages, "PAGES", ())
    with pytest.raises(SystemExit):
        fill_pages.main()
    assert "expected figures of a GPU" in capsys.readouterr().err
