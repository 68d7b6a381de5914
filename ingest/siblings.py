"""Files that stand in for slices: named like the slices beside them, and holding none.

Slices that were never fetched (Git LFS), links that lead nowhere, empty and cut files, downloads that were not finished
leave what is left regular in itself, if they are the last of their scan. Only their names give them away: the same
folder, the same pattern.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from maesil.errors import Refused
from maesil.ingest.source_path import SourcePath, SourcePlace
from maesil.ingest.verdict import FileVerdict

ACCEPTED = "stand_ins"
_NUMBER = re.compile(r"[0-9a-fA-F]*[0-9][0-9a-fA-F]*")
_UID = re.compile(r"#(\.#)+")
_UNFINISHED = re.compile(
    r"(?:\.(?=.*\.icloud$))?(.+)\.(?:part|partial|crdownload|download|filepart|icloud)", re.IGNORECASE
)
"""What browsers, copying programs and clouds make of the name of a file that is not all there."""
_STAND_INS = ("not_fetched", "symlink", "empty")
"""Codes of ignored files that may stand for a slice. What has another content of its own does not."""

Siblings = Mapping[tuple[SourcePlace, str], Counter[str]]
"""By folder and pattern of names: how many files hold no slice, by what they are."""


def pattern_of(name: str) -> str:
    """Return a file name with its numbers, UIDs and hashes left out, and what says that it is not all there."""
    unfinished = _UNFINISHED.fullmatch(name)
    return _UID.sub("#", _NUMBER.sub("#", unfinished[1] if unfinished else name))


def stand_ins(verdicts: Iterable[FileVerdict]) -> Siblings:
    """Return which names hold no slice: of files that are empty, not fetched or finished, not followed or damaged."""
    found: dict[tuple[SourcePlace, str], Counter[str]] = defaultdict(Counter)
    for verdict in verdicts:
        no_slice = verdict.code in _STAND_INS or _UNFINISHED.fullmatch(verdict.path.name)
        if verdict.status == "quarantined" or (verdict.status == "ignored" and no_slice):
            pattern = pattern_of(verdict.path.name)
            if "#" in pattern:
                found[verdict.path.parent, pattern][verdict.code] += 1
    return found


def missing_slices(slices: Iterable[SourcePath], beside: Siblings) -> Refused | None:
    """Return the doubt that a scan lacks the slices that the files beside its own stand for."""
    if not beside:
        return None
    paths = set(slices)
    codes: Counter[str] = Counter()
    for place in {(path.parent, pattern_of(path.name)) for path in paths}:
        codes += beside.get(place, Counter())
    if not codes:
        return None
    kinds = ", ".join(f"{code} {count}" for code, count in sorted(codes.items()))
    text = (
        f"expected slices in all files of this name, found {codes.total()} without beside {len(paths)} with ({kinds})"
    )
    advice = f"fetch or remove them, or take what is there with --accept {ACCEPTED}"
    return Refused("stand_ins", f"{text}: the scan may lack slices at its end; {advice}", missing=codes.total())
