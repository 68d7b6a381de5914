"""What the scores of `maesil prove` allow to be said, in words, and what they do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from maesil.downstream.few_shot import SCRATCH, frozen_name
from maesil.downstream.scored import EVERYWHERE, FROZEN, SCORES, SEGMENTED, SHUFFLED, Rows, ScoreName, by_patient
from maesil.evaluation.intervals import Difference, paired_difference
from maesil.text import counted

LEAST_PATIENTS = 6
"""With fewer, chance alone has all patients agree in more than one of twenty studies (sign test, two-sided)."""
_CHANCE: dict[ScoreName, float] = {"share_r2": 0.0, "presence_auroc": 0.5}
_NEAR_CHANCE = 0.05


@dataclass(frozen=True)
class Finding:
    """One comparison."""

    score: ScoreName
    ours: str
    theirs: str
    shots: int
    difference: Difference | None
    verdict: str
    """``helps``, ``harms``, ``undecided``, or ``too few`` patients to tell."""

    def told(self) -> str:
        """Return the comparison in one sentence."""
        learnt = f", learnt from {counted(self.shots, 'patient')}" if self.shots else ""
        what = f"{SCORES[self.score]}{learnt}: {self.ours} against {self.theirs}"
        if self.difference is None:
            return f"{what}: nothing can be said, fewer than two patients could be scored"
        found = self.difference
        numbers = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
        patients = counted(found.patients, "patient")
        who = "the encoder" if self.theirs == "voxels" else "pre-training"
        return (
            f"{what}: "
            + {
                "helps": f"{who} helps by {numbers}, {patients}",
                "harms": f"{who} harms by {numbers}, {patients}",
                "undecided": f"no difference could be shown with {patients} ({numbers})",
                "too few": f"{numbers}, but {patients} are too few to show a difference (at least {LEAST_PATIENTS})",
            }[self.verdict]
        )


def verdict_of(found: Difference | None) -> str:
    """Return what an interval allows to be said."""
    if found is None or found.patients < LEAST_PATIENTS:
        return "too few"
    if found.low > 0:
        return "helps"
    return "harms" if found.high < 0 else "undecided"


def findings(rows: Rows, first: str) -> list[Finding]:
    """Return the comparisons that were decided on beforehand: what is trained against the same thing untrained."""
    asked: list[tuple[ScoreName, str, str, int]] = []
    for score in FROZEN:
        asked += [(score, first, other, 0) for other in ("untrained", "voxels")]
    for shots in rows.shots():
        for score in SEGMENTED:
            asked += [
                (score, first, SCRATCH, shots),
                (score, frozen_name(first), frozen_name("untrained"), shots),
            ]
    found = []
    for score, ours, theirs, shots in asked:
        if rows.of(score, ours, shots):
            difference = rows.difference(score, ours, theirs, shots)
            found.append(Finding(score, ours, theirs, shots, difference, verdict_of(difference)))
    return found


def limits(found: list[Finding], part: str) -> Iterator[str]:
    """Say what may not be concluded."""
    if part == "validation":
        yield (
            "These are validation patients: choices may rest on them, claims may not. "
            "Score the test patients once, when all is chosen (--part test)."
        )
    if few := sum(one.verdict == "too few" for one in found):
        yield (
            f"{few} of {counted(len(found), 'comparison')} rest on fewer than {LEAST_PATIENTS} patients: "
            "their intervals are too narrow, and nothing may be concluded from them."
        )
    if len(found) > 1:
        yield (
            f"{len(found)} comparisons were made. Where nothing differs, one in twenty still has an interval that "
            "leaves zero out."
        )
    yield "What holds for these organs, scanners and patients may not hold for others."


def chance(rows: Rows) -> Iterator[str]:
    """Say whether shuffled labels score as chance does: if not, something tells the answers."""
    for score, level in _CHANCE.items():
        if patients := by_patient(rows.of(score, SHUFFLED)):
            yield _compared_with_chance(SCORES[score], patients, dict.fromkeys(patients, level))
    for shots in rows.shots():
        patients, everywhere = (by_patient(rows.of("dice", name, shots)) for name in (SHUFFLED, EVERYWHERE))
        if patients:
            learnt = f"{SCORES['dice']}, learnt from {counted(shots, 'patient')}"
            yield _compared_with_chance(learnt, patients, everywhere, "at most ")


def _compared_with_chance(what: str, found: Mapping[str, float], levels: Mapping[str, float], bound: str = "") -> str:
    value, level = (sum(one.values()) / len(one) for one in (found, levels))
    above = paired_difference(found, levels)
    well = value <= level + _NEAR_CHANCE or (above is not None and above.low <= 0)
    told = f"{what}: shuffled labels score {value:.3f}, chance is {bound}{level:.3g}"
    return f"{told}, as it must be." if well else f"{told}: WARNING, believe no score of this page."
