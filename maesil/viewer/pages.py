"""The two pages of the viewer: the volumes of a store, and one volume in three planes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from maesil.geometry import coarser, spacing_of, turn_degrees, world_of
from maesil.pages import rendered
from maesil.store.explain import Explanation, note_in_words
from maesil.store.records import Volume
from maesil.store.remedies import remedy
from maesil.text import counted, printable
from maesil.types import AIR_HU, Window, Zyx
from maesil.viewer.served_store import ServedStore

PER_PAGE = 120
WINDOWS: dict[str, Window] = {
    "Lung": (-1350.0, 150.0),
    "Soft tissue": (-160.0, 240.0),
    "Bone": (-500.0, 1300.0),
    "Brain": (0.0, 80.0),
}
"""What grey stands for (HU), black to white: as is usual in radiology."""
_HIGHEST_HU = 3071.0
_STRAIGHT_BELOW_DEGREES = 0.05


def list_page(served: ServedStore, root: str, find: str = "", first: int = 0) -> str:
    """Return the page of the volumes in which some words are found, ``PER_PAGE`` of them from a place on, as HTML."""
    found = served.found(find)
    shown = found[first : first + PER_PAGE]
    return rendered(
        "view_list.html",
        root=root,
        name=printable(served.store.path.name),
        find=find,
        conclusion=_conclusion(served, found, first, shown),
        cards=[_card(volume) for volume in shown],
        refused=[
            (refusal.volume_id[:12], refusal.code, printable(refusal.detail), remedy(refusal.code))
            for refusal in served.store.quarantined()
        ],
        before=max(0, first - PER_PAGE) if first else None,
        after=first + PER_PAGE if first + PER_PAGE < len(found) else None,
    )


def _conclusion(served: ServedStore, found: Sequence[Volume], first: int, shown: Sequence[Volume]) -> str:
    told = counted(len(served.volumes), "volume")
    if len(found) < len(served.volumes):
        told = f"{len(found)} of {told} found"
    if len(shown) < len(found):
        told += f", {first + 1} to {first + len(shown)} shown"
    if outdated := len(served.store.outdated()):
        told += f"; {counted(outdated, 'volume')} made by an earlier recipe, not shown until ingested again"
    return told


def _card(volume: Volume) -> dict[str, Any]:
    return {
        "id": volume.volume_id,
        "size": f"{_by(volume.shape)} voxels of {_by(volume.spacing)} mm",
        "about": printable(", ".join(f"{name} {value}" for name, value in volume.source.items())),
        "patient": volume.group[:8],
        "notes": volume.notes,
    }


def scan_page(served: ServedStore, root: str, volume_id: str, step: Zyx) -> str:
    """Return the page of one volume, of which every ``step``-th voxel along z, y, x is shown, as HTML."""
    told = served.explained(volume_id)
    volume = served.volumes[volume_id]
    ids = list(served.volumes)
    at = ids.index(volume_id)
    return rendered(
        "view_scan.html",
        root=root,
        name=printable(served.store.path.name),
        id=volume_id,
        before=ids[at - 1] if at else "",
        after=ids[at + 1] if at + 1 < len(ids) else "",
        step=_by(step) if math.prod(step) > 1 else "",
        scan=_for_script(served, root, volume, step),
        overlays=[*served.overlays, *served.labels(volume_id)],
        facts=_facts(volume),
        affine=[[f"{value:.6g}" for value in row] for row in volume.affine_lps],
        notes=[(note, note_in_words(note)) for note in volume.notes],
        refusal=_refusal(told),
        files=told.sources,
    )


def _for_script(served: ServedStore, root: str, volume: Volume, step: Zyx) -> dict[str, Any]:
    """Return what the page's script must know: addresses, windows, and how to get from mm LPS to a voxel."""
    here = f"{root}/volumes/{volume.volume_id}"
    affine = coarser(volume.affine, step)
    shape = [-(-n // every) for n, every in zip(volume.shape, step, strict=True)]
    last = np.asarray(volume.shape) - 1
    corners = world_of(volume.affine, np.array(list(np.ndindex(2, 2, 2))) * last)
    full = volume.hu.get("min", float(AIR_HU)), volume.hu.get("max", _HIGHEST_HU)
    return {
        "ct": f"{here}/ct.nii" + ("?whole" if math.prod(step) == 1 else ""),
        "shape": shape,
        "step": list(step),
        "spacing": spacing_of(affine),
        "index_of_lps": np.linalg.inv(affine)[:3].tolist(),
        "lowest": corners.min(axis=0).tolist(),
        "highest": corners.max(axis=0).tolist(),
        "windows": [
            {"name": name, "low": low, "high": high} for name, (low, high) in {**WINDOWS, "Full": full}.items()
        ],
        "overlays": [{"name": name, "address": f"{here}/overlays/{name}", "classes": None} for name in served.overlays]
        + [_labels_for_script(served, here, volume, name, step) for name in served.labels(volume.volume_id)],
    }


def _labels_for_script(served: ServedStore, here: str, volume: Volume, name: str, step: Zyx) -> dict[str, Any]:
    image = served.label_image(volume.volume_id, name)
    classes = [
        {"number": number, "name": printable(label), "colour": image.colours.get(number, [0, 0, 0, 0])}
        for number, label in image.classes.items()
    ]
    whole = "?whole" if math.prod(step) == 1 else ""
    return {"name": name, "address": f"{here}/labels/{name}{whole}", "classes": classes}


def _facts(volume: Volume) -> list[tuple[str, str]]:
    """Return names and values of what the store knows of a volume, as `maesil store explain` tells it."""
    hu = volume.hu
    facts = [
        ("Volume", volume.volume_id),
        ("Patient group", volume.group),
        ("Source", printable(", ".join(f"{name} {value}" for name, value in volume.source.items()))),
        ("Voxels of the source", f"{_by(volume.source_shape)} of {_by(volume.source_spacing)} mm (z y x)"),
        ("Voxels stored", f"{_by(volume.shape)} of {_by(volume.spacing)} mm (z y x)"),
        ("Axes", _axes_told(volume)),
        ("First voxel", " ".join(map(_side, volume.affine[:3, 3], _SIDES))),
    ]
    if {"min", "max", "mean"} <= hu.keys():
        facts.append(("HU", f"{hu['min']:.0f} to {hu['max']:.0f}, mean {hu['mean']:.0f}"))
    if {"clipped_low_share", "clipped_high_share"} <= hu.keys():
        facts.append(("Clipped", f"{hu['clipped_low_share']:.2%} below, {hu['clipped_high_share']:.2%} above"))
    return [*facts, ("Shares", f"{hu['valid_share']:.1%} of the voxels valid, {hu['body_share']:.1%} body")]


_SIDES = ("LR", "PA", "SI")
"""The letters of x, y, z in mm LPS: above 0, below 0."""


def _side(value: float, letters: str) -> str:
    return f"{letters[0] if value >= 0 else letters[1]} {abs(value):.1f} mm"


def _axes_told(volume: Volume) -> str:
    turned = turn_degrees(volume.affine)
    if turned < _STRAIGHT_BELOW_DEGREES:
        return "z to the head, y to the back, x to the left, as the patient lies"
    return f"z about to the head, y to the back, x to the left; turned by up to {turned:.1f} degrees"


def _refusal(told: Explanation) -> dict[str, str] | None:
    if told.refusal is None:
        return None
    return {
        "code": told.refusal.code,
        "detail": printable(told.refusal.detail),
        "remedy": remedy(told.refusal.code),
    }


def _by(values: Sequence[float]) -> str:
    return " x ".join(f"{round(value, 3):g}" for value in values)
