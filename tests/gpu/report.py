"""Tables of what `make gpu` found, in Markdown: for ``gpu.md``, and for the pages that `fill_pages` fills."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gpu.part import NO_GPU, Row

Document = dict[str, Any]
TITLES = {
    "machine": "Machine",
    "correctness": "Correctness",
    "kernel_speed": "Kernels",
    "step_speed": "Step",
    "loader": "From the store to the device",
    "training": "A training: killed, resumed, scored, used",
}
PERCENT = {"share_of_copy", "share_of_peak", "data_wait_share", "spread"}
HEADERS = {
    "us": "µs", "gigabytes_per_second": "GB/s", "share_of_copy": "of a copy", "floor_us": "floor µs",
    "least_megabytes": "least MB", "peak_megabytes": "peak MB", "crops_per_second": "crops/s",
    "share_of_peak": "of peak", "data_wait_share": "waiting", "first_step_seconds": "first step s",
    "alone_crops_per_second": "crops/s alone", "alone_megabytes_per_second": "MB/s alone",
    "scans_megabytes": "scans MB", "held_megabytes": "held on the GPU MB",
}  # fmt: skip
"""What a column is called where its name is not."""
KERNEL_COLUMNS = (
    "operation", "way", "batch", "us", "floor_us", "gigabytes_per_second", "share_of_copy", "peak_megabytes",
)  # fmt: skip
STEP_COLUMNS = (
    "preset", "way", "batch", "ms", "crops_per_second", "share_of_peak", "spread", "peak_megabytes",
    "first_step_seconds",
)  # fmt: skip
LOADER_COLUMNS = (
    "preset", "loader", "batch", "alone_crops_per_second", "alone_megabytes_per_second", "crops_per_second",
    "share_of_peak", "data_wait_share", "scans_megabytes", "held_megabytes", "peak_megabytes",
)  # fmt: skip


def markdown(document: Document) -> str:
    """Return the whole page: a section a part, its state and its table."""
    sections = [f"# GPU figures\n\n{document['date']}, {document['seconds']:.0f} s in all."]
    for name, part in document["parts"].items():
        took = f" ({part['seconds']:.0f} s)" if part.get("seconds") is not None else ""
        section = [f"## {TITLES[name]}", f"{part['state']}{took}", table(name, part["rows"]), *left_out(part["rows"])]
        sections.append("\n\n".join(piece for piece in section if piece))
    return "\n\n".join(sections) + "\n"


def table(part: str, rows: Sequence[Row]) -> str:
    """Return the table of a part; an empty string where it has no rows."""
    return TABLES[part](rows)


def left_out(rows: Sequence[Row]) -> list[str]:
    """Say in a line what was not measured, and why."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "said" in row:
            reasons.setdefault(row["said"], []).append(" ".join(filter(None, (row["preset"], row["way"]))))
    return [f"{', '.join(what)}: {why}" for why, what in reasons.items()]


def facts(rows: Sequence[Row]) -> str:
    """Return rows of ``what`` and ``value``."""
    return lines(("what", "value"), ((str(row["what"]), str(row["value"])) for row in rows))


def tests(rows: Sequence[Row]) -> str:
    """Return how many cases of each test passed, and what did not."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["test"].partition("[")[0], []).append(row)
    counted = lines(
        ("test", "cases", "passed", "seconds"),
        (
            (name, str(len(of)), str(sum(one["outcome"] == "passed" for one in of)), f"{_seconds(of):.1f}")
            for name, of in cases.items()
        ),
    )
    others = [f"* {row['outcome']}: `{row['test']}`" for row in rows if row["outcome"] != "passed"]
    return "\n\n".join(piece for piece in (counted, "\n".join(others)) if piece)


def _seconds(rows: Sequence[Row]) -> float:
    return sum(row["seconds"] for row in rows)


def columns(names: Sequence[str]) -> Callable[[Sequence[Row]], str]:
    """Return what makes a table of these columns of rows that were measured."""

    def made(rows: Sequence[Row]) -> str:
        headers = [HEADERS.get(name, name) for name in names]
        return lines(headers, ([_cell(name, row[name]) for name in names] for row in rows if "said" not in row))

    return made


def _cell(name: str, value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if name in PERCENT else str(value)


def lines(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; an empty string without rows."""
    body = ["| " + " | ".join(row) + " |" for row in rows]
    head = ["| " + " | ".join(headers) + " |", "|" + " --- |" * len(headers)]
    return "\n".join([*head, *body]) if body else ""


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "machine": facts, "correctness": tests, "kernel_speed": columns(KERNEL_COLUMNS),
    "step_speed": columns(STEP_COLUMNS), "loader": columns(LOADER_COLUMNS), "training": facts,
}  # fmt: skip


def device_of(document: Document) -> str | None:
    """Return the name of the GPU that figures are of, or None."""
    machine = document["parts"].get("machine", {"rows": [], "state": NO_GPU})
    return next((row["value"] for row in machine["rows"] if row["what"] == "GPU"), None)
