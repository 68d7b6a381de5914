"""Fill the pages of figures from a ``gpu.json`` that `make gpu` left: one command, and the same pages a second time.

    python tests/gpu/fill_pages.py gpu.json

Between two comments of a page, ``<!-- gpu: NAME -->`` and ``<!-- end -->``, stands what a section of `SECTIONS` says of
the figures, and nothing where there are none. Figures without a GPU are refused, since the pages speak of one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from gpu import report  # noqa: E402

PAGES = tuple(ROOT / "docs" / "explanation" / name for name in ("kernels.md", "step-speed.md"))
MARKED = re.compile(r"(<!-- gpu: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def section(part: str, missing: str = "") -> Callable[[report.Document], str]:
    """Return what writes a part's table and what was left out of it; ``missing`` where it has no figures."""

    def written(document: report.Document) -> str:
        rows = document["parts"].get(part, {"rows": []})["rows"]
        table = report.table(part, rows)
        return "\n\n".join([table, *report.left_out(rows)]) if table else missing

    return written


def taken_on(document: report.Document) -> str:
    """Say which GPU the figures are of, and when they were taken."""
    found = {row["what"]: row["value"] for row in document["parts"].get("machine", {"rows": []})["rows"]}
    if "GPU" not in found:
        return ""
    copy = found.get("copy of 1 GiB (GB/s, read and written)")
    peak = found.get("large matrix product, bfloat16 (TFLOP/s)")
    return (
        f"Taken on {document['date'][:10]}: {found['GPU']}, driver {found.get('driver', 'unknown')}, "
        f"torch {found['torch']}, Triton {found['triton']}.\n"
        f"In the same run a copy of 1 GiB moved {copy} GB/s, and a large matrix product reached {peak} TFLOP/s."
    )


SECTIONS: dict[str, Callable[[report.Document], str]] = {
    "machine": taken_on,
    "correctness": section("correctness"),
    "kernels": section("kernel_speed", "The kernels have not been timed on a GPU yet."),
    "step": section("step_speed", "On a GPU the step has not been timed yet."),
    "loader": section("loader"),
    "training": section("training"),
}


def filled(page: str, document: report.Document) -> str:
    """Return a page with what the figures say between its marks; KeyError for a mark of another name."""

    def between(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        text = SECTIONS[name](document)
        return f"{begin}{text}\n{end}" if text else f"{begin}{end}"

    return MARKED.sub(between, page)


def main() -> None:
    """Fill the pages of the documentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, metavar="gpu.json")
    document = json.loads(parser.parse_args().figures.read_text(encoding="utf-8"))
    if report.device_of(document) is None:
        parser.error("expected figures of a GPU, found those of a machine without one; the pages stay as they are")
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), document), encoding="utf-8")
        print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
