"""Filters over the rows of the superpatch table, as ``--where "body > 0.3 and spacing_z <= 2"``.

Python's own grammar, of which only comparisons of columns with constants, ``and``, ``or``, ``not`` and brackets are
allowed: nothing is ever evaluated as code.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable, Iterator, Set
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from numpy.typing import NDArray

from maesil.errors import UsageError
from maesil.store.records import Volume
from maesil.types import Zyx

COLUMNS = {
    "body": "share of the superpatch inside the patient's body, 0 to 1",
    "valid": "share of the superpatch inside the scan",
    "air": "share of its valid voxels at or below -900 HU",
    "iz": "place on the grid of superpatches, from the feet up",
    "iy": "the same, from front to back",
    "ix": "the same, from right to left",
    "edge": "edge of a superpatch (voxels)",
    "spacing_z": "of the stored voxels (mm)",
    "spacing_y": "of the stored voxels (mm)",
    "spacing_x": "of the stored voxels (mm)",
    "source_spacing_z": "of the source, on the same axes (mm)",
    "source_spacing_y": "of the source, on the same axes (mm)",
    "source_spacing_x": "of the source, on the same axes (mm)",
    "volume_body": "share of the whole volume inside the body",
    "volume_valid": "share of the whole volume inside the scan",
    "volume_hu_mean": "mean of the volume's valid voxels (HU)",
    "volume_id": "id of the volume",
    "group": "patient group",
    "patient": "patient group once copies of one scan are one",
    "source_kind": "'dicom' or 'nifti'",
    "codec": "'fast', 'compact' or 'raw'",
    "notes": "codes of what ingest noticed: \"'lossy' in notes\"",
}
"""What a filter may speak of."""
_TEXT = ("volume_id", "group", "patient", "source_kind", "codec", "notes")
_ORDER: dict[type, Any] = {
    ast.Lt: lambda a, b: a < b, ast.LtE: lambda a, b: a <= b, ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b, ast.Eq: lambda a, b: a == b, ast.NotEq: lambda a, b: a != b,
}  # fmt: skip
_MIRRORED = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}
_EXAMPLE = '"body > 0.3 and spacing_z <= 2"'
_LONGEST = 2000


def parse(text: str) -> pc.Expression:
    """Return the filter that a text describes; UsageError, in one line, for what is no filter over `COLUMNS`."""
    try:
        if len(text) > _LONGEST:
            raise SyntaxError("too long")
        return _expression(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = getattr(error, "msg", None) or str(error)
        raise UsageError(f"--where: expected a filter such as {_EXAMPLE}, found {text[:80]!r} ({reason})") from None


class Taken(Set[tuple[str, Zyx]]):
    """The superpatches that a filter takes, as a set of (volume id, index z y x): an array of each volume's."""

    def __init__(self, table: pa.Table) -> None:
        """Of the rows of a table with the columns ``volume_id``, ``iz``, ``iy`` and ``ix``."""
        self._places: dict[str, NDArray[np.int64]] = {}
        """Of each volume the places ``[n, 3]``."""
        if not table.num_rows:
            return
        coded = table["volume_id"].combine_chunks().dictionary_encode()
        coded = coded.chunk(0) if isinstance(coded, pa.ChunkedArray) else coded
        owners = coded.indices.to_numpy(zero_copy_only=False)
        places = np.stack([table[name].to_numpy() for name in ("iz", "iy", "ix")], axis=1).astype(np.int64)
        order = np.argsort(owners, kind="stable")
        ends = np.cumsum(np.bincount(owners, minlength=len(coded.dictionary)))
        of_volume = np.split(places[order], ends[:-1])
        self._places = dict(zip(coded.dictionary.to_pylist(), of_volume, strict=True))

    @property
    def volumes(self) -> Set[str]:
        """The ids of the volumes that it takes any superpatch of."""
        return self._places.keys()

    def part(self, volume: Volume) -> Volume:
        """Return a volume with those of its superpatches alone that are taken."""
        places = self._places.get(volume.volume_id, np.empty((0, 3), np.int64))
        own = np.stack([volume.column(name) for name in ("iz", "iy", "ix")], axis=1)
        return volume.taking(np.isin(_numbered(own), _numbered(places)))

    def __contains__(self, one: object) -> bool:
        if not isinstance(one, tuple) or one[0] not in self._places:
            return False
        return bool((self._places[one[0]] == one[1]).all(axis=1).any())

    def __iter__(self) -> Iterator[tuple[str, Zyx]]:
        for volume_id, places in self._places.items():
            yield from ((volume_id, (z, y, x)) for z, y, x in places.tolist())

    def __len__(self) -> int:
        return sum(map(len, self._places.values()))

    @classmethod
    def _from_iterable(cls, it: Iterable[Any]) -> Any:  # what `Set` makes of two of them
        return set(it)


def _numbered(places: NDArray[Any]) -> NDArray[np.int64]:
    """Return a number for each place on a grid, ``[n, 3]`` to ``[n]``."""
    numbers: NDArray[np.int64] = places.astype(np.int64) @ np.array([1 << 40, 1 << 20, 1])
    return numbers


def select(table: pa.Table, text: str) -> Taken:
    """Return the superpatches of a table that a filter takes; every one for no text."""
    return Taken(filtered(table, parse(text)) if text else table)


def filtered(table: pa.Table, condition: pc.Expression) -> pa.Table:
    """Return the rows of a table that a filter takes, in their order, on this thread."""
    return ds.dataset(table).to_table(filter=condition, use_threads=False)


def _expression(node: ast.expr) -> pc.Expression:
    if isinstance(node, ast.BoolOp):
        parts = [_expression(value) for value in node.values]
        whole = parts[0]
        for part in parts[1:]:
            whole = (whole & part) if isinstance(node.op, ast.And) else (whole | part)
        return whole
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return ~_expression(node.operand)
    if isinstance(node, ast.Compare):
        left, whole = node.left, None
        for operator, right in zip(node.ops, node.comparators, strict=True):  # 0.3 < body < 0.9 is two comparisons
            part = _comparison(left, operator, right)
            left, whole = right, part if whole is None else whole & part
        assert whole is not None
        return whole
    raise SyntaxError(f"{ast.unparse(node)[:40]!r} is no comparison of a column with a number or text")


def _comparison(left: ast.expr, operator: ast.cmpop, right: ast.expr) -> pc.Expression:
    if isinstance(operator, ast.In | ast.NotIn):
        found = _membership(left, right)
        return ~found if isinstance(operator, ast.NotIn) else found
    kind = type(operator)
    if not isinstance(left, ast.Name):
        left, right, kind = right, left, _MIRRORED.get(kind, kind)
    if not isinstance(left, ast.Name) or kind not in _ORDER:
        raise SyntaxError("expected a column on one side of each comparison and a constant on the other")
    name = _column(left)
    return _ORDER[kind](pc.field(name), _constant(name, right))


def _membership(left: ast.expr, right: ast.expr) -> pc.Expression:
    """Return ``column in (...)``, or ``'code' in notes``: one of the words of a column of text."""
    if isinstance(right, ast.Name):
        name = _column(right)
        word = re.escape(str(_constant(name, left)))
        if name != "notes":
            raise SyntaxError(f"{name} holds a single value; compare it by ==, or ask for {name} in ('a', 'b')")
        return pc.match_substring_regex(pc.field(name), rf"(^| ){word}( |$)")
    if not isinstance(left, ast.Name) or not isinstance(right, ast.Tuple | ast.List):
        raise SyntaxError("expected COLUMN in ('a', 'b'), or 'code' in notes")
    name = _column(left)
    kind = pa.string() if name in _TEXT else pa.float64()  # an empty list has none of its own
    return pc.field(name).isin(pa.array([_constant(name, item) for item in right.elts], kind))


def _column(node: ast.Name) -> str:
    if node.id not in COLUMNS:
        close = difflib.get_close_matches(node.id, COLUMNS, n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise UsageError(
            f"--where: there is no column {node.id!r}; {hint}docs/how-to/cache.md lists all {len(COLUMNS)}"
        )
    return node.id


def _constant(name: str, node: ast.expr) -> float | str:
    sign = -1 if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else 1
    value = getattr(node.operand if isinstance(node, ast.UnaryOp) and sign < 0 else node, "value", None)
    if name in _TEXT and isinstance(value, str) and sign > 0:
        return value
    if name not in _TEXT and isinstance(value, int | float) and not isinstance(value, bool):
        return sign * float(value)
    kind = "a text in quotes" if name in _TEXT else "a number"
    raise SyntaxError(f"expected {kind} to compare {name} with, found {ast.unparse(node)[:40]}")
