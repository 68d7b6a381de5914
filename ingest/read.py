"""One scan to voxels in memory, without a store: by the rules of ingest, with its refusals as exceptions."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from maesil.errors import NoInputError, Refused, ScanRefused, UsageError
from maesil.geometry import spacing_of
from maesil.ingest.execute import usable_cores
from maesil.ingest.failures import as_refusal
from maesil.ingest.options import IngestOptions
from maesil.ingest.plan import Plan, VolumePlan
from maesil.ingest.planning import nothing_found, scan_and_plan
from maesil.ingest.scan import require_no_store_among
from maesil.ingest.source_path import SourcePlace
from maesil.ingest.volume import make
from maesil.store.recipe import Recipe
from maesil.store.urls import place_of
from maesil.store.writer import Image
from maesil.text import counted, printable
from maesil.types import HuArray, Spacing

_LISTED = 10


@dataclass(frozen=True)
class CtVolume(Image):
    """A scan in memory: int16 HU ``[z, y, x]`` whose axes point to the head, the back and the left.

    ``affine`` (4x4, float64) leads from a voxel ``[z, y, x, 1]`` to a position in mm in DICOM's LPS. ``valid`` and
    ``body`` are uint8 shares (0..255) of each 8^3 cell.
    """

    hu: HuArray
    notes: tuple[str, ...] = ()
    """Codes of what is worth knowing of the scan, see ``docs/reference/verdicts.md``."""

    @property
    def spacing(self) -> Spacing:
        """Distance between neighbouring voxels along z, y, x (mm)."""
        return spacing_of(self.affine)


def read_ct(
    path: SourcePlace | str,
    spacing: float | Sequence[float] | None = None,
    *,
    volume: int | str | None = None,
    recipe: Recipe | None = None,
) -> CtVolume:
    """Read one CT scan: a folder or archive of DICOM files, one multi-frame DICOM file, or a NIfTI file.

    It lies at a path, or where a URL of object storage says (``s3://BUCKET/FOLDER``): then it is fetched first.
    The result is what a store would hold of the scan, voxel by voxel. ``spacing`` (mm; one number, or three along
    z, y, x) resamples it; None keeps its own. Where a folder holds several volumes, ``volume`` names one: its number in
    the list that the error gives, or text that its series UID or its path alone holds. ``recipe`` says all else that
    may be said to ``maesil ingest``, such as ``Recipe(accept=("eight_bit",))``; its spacing counts where none is given.

    Raises ScanRefused, with the code of ``docs/reference/verdicts.md``, for a scan that ingest refuses; NoInputError
    where there is no CT; UsageError where several volumes were found or none is the one that was named.
    """
    place, recipe = place_of(path), _recipe(spacing, recipe)
    require_no_store_among([place])
    plan = scan_and_plan([place], recipe, IngestOptions(workers=0), lambda stage, done, total: None)
    if not plan.volumes:
        raise none_of(place, plan)
    chosen = _choose(place, plan.volumes, volume)
    _tell_what_is_left(place, plan)
    return read_volume(chosen, recipe)


def _recipe(spacing: float | Sequence[float] | None, recipe: Recipe | None) -> Recipe:
    if spacing is None:
        return recipe or Recipe(spacing=None)
    given = [float(spacing)] * 3 if isinstance(spacing, int | float) else [float(mm) for mm in spacing]
    if len(given) != 3:
        raise UsageError(f"spacing: expected a number of mm, or three (z, y, x), found {spacing!r}")
    return replace(recipe or Recipe(), spacing=(given[0], given[1], given[2]))


def read_volume(plan: VolumePlan, recipe: Recipe) -> CtVolume:
    """Read one planned volume; `ScanRefused`."""
    try:
        # A long volume is made in temporary files, and is in memory once: as the result.
        made = make(plan.source, recipe, Path(tempfile.gettempdir()), threads=usable_cores())
    except Exception as error:
        raise refused(plan.source.name, as_refusal(error)) from error
    image = made.image
    hu = image.hu if isinstance(image.hu, np.ndarray) else np.stack(list(image.hu))
    return CtVolume(hu=hu, affine=image.affine, valid=image.valid, body=image.body, notes=made.notes)


def refused(place: object, refusal: Refused) -> ScanRefused:
    """Return the refusal of what was asked for by name."""
    return ScanRefused(f"{printable(place)}: refused ({refusal.code}): {refusal.detail}", refusal.code)


def none_of(place: SourcePlace, plan: Plan) -> ScanRefused | NoInputError:
    """Return why nothing can be read: the first refusal, else the first verdict on what is no volume of CT."""
    for series in plan.refused:
        return refused(series.paths[0].parent if len(series.paths) > 1 else series.paths[0], series.refusal)
    for verdict in sorted(plan.verdicts, key=lambda verdict: verdict.status == "skipped"):
        if verdict.status != "ignored":
            return ScanRefused(
                f"{printable(verdict.path)}: refused ({verdict.code}): {verdict.detail or 'no volume of CT'}",
                verdict.code,
            )
    return NoInputError(nothing_found([place], plan))


def _choose(place: SourcePlace, volumes: Sequence[VolumePlan], wanted: int | str | None) -> VolumePlan:
    if wanted is None and len(volumes) == 1:
        return volumes[0]
    found = [
        plan for number, plan in enumerate(volumes, start=1)
        if wanted is not None and (wanted == number if isinstance(wanted, int) else _is_named(plan, wanted))
    ]  # fmt: skip
    if len(found) == 1:
        return found[0]
    listed = "; ".join(f"{number}: {_told(plan)}" for number, plan in enumerate(volumes[:_LISTED], start=1))
    more = f"; and {len(volumes) - _LISTED} more" if len(volumes) > _LISTED else ""
    asked = "one volume" if wanted is None else f"one volume for volume={wanted!r}"
    count = len(volumes) if wanted is None else f"{len(found)} of {len(volumes)}"
    raise UsageError(
        f"{printable(place)}: expected {asked}, found {count}; name one by volume=NUMBER or by text that its series "
        f"UID or path alone holds ({listed}{more})"
    )


def _is_named(plan: VolumePlan, text: str) -> bool:
    return text in plan.series or text in plan.source.name


def _told(plan: VolumePlan) -> str:
    source, name = plan.source, printable(plan.source.name)
    if source.kind == "nifti":
        return f"{name}, volume {(source.planes[0][1] or 0) + 1}" if source.planes and source.planes[0] else name
    return f"{counted(len(source.planes), 'slice')} of series {plan.series or '(blank)'} in {name}"


def _tell_what_is_left(place: SourcePlace, plan: Plan) -> None:
    """Warn where a part of what was named is not in the volume that is read, and may belong to it."""
    codes = [series.refusal.code for series in plan.refused]
    left = [counted(plan.damaged_files, "damaged file")] if plan.damaged_files else []
    left += [f"{counted(len(codes), 'refused volume')} ({', '.join(sorted(set(codes)))})"] if codes else []
    if left:
        warnings.warn(
            f"{printable(place)}: beside the volume that is read there are {' and '.join(left)}", stacklevel=3
        )
