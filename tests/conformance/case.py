"""How outside cases are written: a function a case, or a change to each slice of one series.

The cases, and what each must become, were written without a look at `ingest`. Later ones follow the same rule.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conformance.dicom import each, series, write_all
from conformance.judge import Expected
from conformance.phantom import Scan
from pydicom.dataset import Dataset

Case = Callable[[Path], Expected]
CASES: dict[str, Case] = {}
SCAN = Scan()


def case(function: Case) -> Case:
    """Register a function that writes a case into an empty folder and returns what it must become."""
    CASES[function.__name__] = function
    return function


def simple(name: str, change: Callable[[Dataset, int], None], expected: Expected, scan: Scan = SCAN) -> None:
    """Register a case that changes the slices of one series one by one."""

    def write_case(folder: Path) -> Expected:
        write_all(each(series(scan), change), folder)
        return expected

    CASES[name] = write_case


def tags(**values: object) -> Callable[[Dataset, int], None]:
    """Return a change that sets tags; None removes one."""

    def change(ds: Dataset, _: int) -> None:
        for tag, value in values.items():
            if value is None:
                ds.pop(tag, None)
            else:
                setattr(ds, tag, value)

    return change
