"""Can these numbers be HU? A volume whose histogram says no is refused with a code and the numbers.

Air is -1000 HU and water 0 by definition; a scan of a person holds soft tissue around 40 HU. The rules are ours.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maesil.errors import Refused
from maesil.ingest.coherent import incoherent
from maesil.ingest.extent import plane_note, size_doubts
from maesil.ingest.far_below import FAR_BELOW_AIR_HU, padding_among
from maesil.ingest.filled import filled_border
from maesil.ingest.planes import any_of, count, different_values, each, every, face
from maesil.ingest.scanned import Scanned
from maesil.ingest.wrapped import wrapped
from maesil.store.recipe import ACCEPTABLE
from maesil.types import Planes

_MAX_SAMPLES = 1_000_000
_MAX_PADDING_VALUES = 2
_BONE_HU = 300
_AIR_BELOW_HU = -900
_NO_METAL_ABOVE_HU = 16000
_MOST_DENSE = 1.5
_NO_TISSUE_HU = (-650, -250)
_DARKER_THAN_AIR_HU = -1150
_PEAK_HU = 60
_PEAK_SHARE = 0.1
_MIN_SOFT_BESIDE_ODD_PADDING = 0.1
_AIR_HU = (-1100, -960)
_LITTLE_AIR = 0.02
_WATER_HU = (0, 100)
_MOSTLY_WATER = 0.8
_ABOUT_ZERO_HU = -30


def plausible(scan: Scanned, accept: Collection[str] = ()) -> Scanned:
    """Return the scan, without undeclared padding and filling; `Refused` unless its valid voxels look like a body's HU.

    A doubt whose code the user accepts becomes a note.
    """
    notes = []
    try:
        scan = without_undeclared_padding(scan)
    except Refused as doubt:
        notes += _accepted(doubt, accept)
    notes += _weighed(scan, accept)
    # Of numbers that are no HU, but wanted, the lowest and the highest mean air and metal.
    no_hu = set(notes) - {"accepted_odd_background", "accepted_implausible_size"}
    filled = filled_border(scan.hu, scan.known, _ends(scan.hu, scan.valid) if no_hu else ())
    if filled is not None:
        scan = _without(scan, filled)
        notes += [note for note in _weighed(scan, accept) if note not in notes]
    notes += plane_note(scan)
    return replace(scan, notes=(*scan.notes, *notes)) if notes else scan


def _weighed(scan: Scanned, accept: Collection[str]) -> list[str]:
    """Return a note for each doubt that the user accepts; raise the first of the others."""
    doubts = chain(size_doubts(scan), _doubts(scan.hu, scan.valid))
    return [note for doubt in doubts for note in _accepted(doubt, accept)]


def _accepted(doubt: Refused, accept: Collection[str]) -> list[str]:
    if doubt.code in accept:
        return [f"accepted_{doubt.code}"]
    if doubt.code not in ACCEPTABLE:
        raise doubt
    raise Refused(doubt.code, f"{doubt.detail}; --accept {doubt.code} takes it as it is", **doubt.numbers)


def _ends(hu: Planes, valid: Planes) -> tuple[float, float]:
    ends = [(plane[inside].min(), plane[inside].max()) for plane, inside in zip(hu, valid, strict=True) if inside.any()]
    return float(min(low for low, _ in ends)), float(max(high for _, high in ends))


def _without(scan: Scanned, filled: Planes) -> Scanned:
    """Return the scan without what was filled, which is neither measured nor interpolated."""
    source = {**scan.source, "filled_border_voxels": count(filled)}
    between = None if scan.filled is None else each(_and_not, scan.filled, filled)
    notes = (*scan.notes, "filled_border")
    return replace(scan, valid=each(_and_not, scan.valid, filled), filled=between, notes=notes, source=source)


def _and_not(mask: NDArray[np.bool_], other: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return mask & ~other


def without_undeclared_padding(scan: Scanned) -> Scanned:
    """Return the scan with values far below air taken out of its valid voxels.

    Scanners fill the corners outside the field of view with a constant such as -2000 or -3024 and often do not declare
    it. `Refused` if no bone is left above them, or hardly any soft tissue: then HU were rescaled twice. What lies among
    air, as noise does, or beside metal, stays.
    """
    if min(float(plane.min()) for plane in scan.hu) > FAR_BELOW_AIR_HU:
        return scan
    low = each(lambda hu, inside: inside & (hu <= FAR_BELOW_AIR_HU), scan.hu, scan.valid)
    if not any_of(low):
        return scan
    left = _sample(scan.hu, each(_and_not, scan.valid, low))
    top = float(np.percentile(left, 99.9)) if left.size else _ends(scan.hu, low)[1]
    soft = _share(left, -200, 300) if left.size else 0.0
    one_constant = different_values(scan.hu, low, _MAX_PADDING_VALUES) <= _MAX_PADDING_VALUES
    if top < _BONE_HU or not (one_constant or soft > _MIN_SOFT_BESIDE_ODD_PADDING):
        share = count(low) / math.prod(low.shape)
        text = f"{share:.0%} of the voxels lie below {FAR_BELOW_AIR_HU} HU, p99.9 is {top:g}, {soft:.0%} is soft tissue"
        raise Refused("rescaled_twice", text, share=share, top=top, soft_tissue=soft)
    padding = padding_among(scan.hu, low, scan.valid)
    if padding is None:
        return scan
    return replace(scan, valid=each(_and_not, scan.valid, padding), notes=(*scan.notes, "undeclared_padding"))


def check_plausible(hu: Planes, valid: Planes) -> None:
    """Raise `Refused` unless the valid voxels look like HU of a body."""
    for doubt in _doubts(hu, valid):
        raise doubt


def _doubts(hu: Planes, valid: Planes) -> Iterator[Refused]:
    """Yield every reason why valid voxels cannot be HU; the first is the plainest."""
    values = _sample(hu, valid)
    if not values.size:
        raise Refused("nothing_valid", "every voxel is padding")
    low, high = (float(v) for v in np.percentile(values, [0.1, 99.9]))
    least, most = float(values.min()), float(values.max())
    numbers: dict[str, float] = {"min": least, "p0.1": low, "p99.9": high, "max": most}
    if most - least < 1e-3:
        yield Refused("constant", f"every voxel is {least:g}", **numbers)
    for doubt in _other_image(values, numbers):
        if doubt.code == "mr_or_pet":  # without air below zero are numbers that ran over their end, too
            yield from wrapped(hu, valid)
        yield doubt
    if (share := float((values > _NO_METAL_ABOVE_HU).mean())) > 0.01:
        why = "negative values read as unsigned, or times a factor"
        text = f"{share:.0%} of the voxels lie above {_NO_METAL_ABOVE_HU} HU: {why}"
        yield Refused("unsigned", text, share=share, **numbers)
    if (share := float((values > 700).mean())) > 0.3 and share > 3 * float((values < -700).mean()):
        yield Refused("too_dense", f"{share:.0%} of the voxels lie above 700 HU: inverted or offset", **numbers)
    if (soft := _share(values, -200, 300)) < 0.01:
        text = f"{soft:.2%} of the voxels lie at -200 to 300 HU: no soft tissue; rescaled twice, or no CT of a body"
        yield Refused("no_soft_tissue", text, share=soft, **numbers)
    yield from _odd_background(hu, valid, values, numbers)
    floor = float((values == least).mean())
    if least > -900 and floor > 0.05:
        text = f"{floor:.0%} of the voxels are exactly {least:g}, the smallest value: clipped to a window, or masked"
        yield Refused("windowed", text, share=floor, **numbers)
    left_out = _sample(hu, valid, outside=True)
    yield from _wrong_scale(values, left_out[left_out <= FAR_BELOW_AIR_HU], numbers)
    yield from wrapped(hu, valid)
    yield from incoherent(hu, valid)


def _other_image(values: NDArray[np.float32], numbers: dict[str, float]) -> Iterator[Refused]:
    """Values that belong to another kind of image, or to a CT whose rescale is missing."""
    low, least, most = numbers["p0.1"], numbers["min"], numbers["max"]
    if least >= -2 and most <= 2:
        text = f"values lie in {least:g} to {most:g}: normalised, or a mask or probability map, not HU"
        yield Refused("normalised", text, **numbers)
    if least >= 0 and most <= 255:
        whole = bool((values == np.rint(values)).all())
        kind = "a windowed 8-bit image or labels" if whole else "PET in SUV, a dose or another map"
        yield Refused("eight_bit", f"values lie in {least:g} to {most:g}: {kind}, not HU", **numbers)
    # Tissue + 1024 is a peak; real bone falls off from 300 HU upward, and fat keeps the low end below -100.
    offset = _share(values, 900, 1200)
    if low >= -100 and offset > 0.005 and offset > 2 * _share(values, 500, 800):
        text = f"no air below {low:g}, and {offset:.0%} of the voxels at 900 to 1200: HU + 1024, or MR, not HU"
        yield Refused("offset_1024", text, share=offset, **numbers)
        return
    # The noise of brain and water reaches below 0 HU. Without such noise, only a smooth brain by itself is CT.
    darkest, water = float(np.percentile(values, 1)), _share(values, *_WATER_HU)
    if most > 255 and low > _ABOUT_ZERO_HU and darkest >= 0 and water < _MOSTLY_WATER:
        text = f"99 % of the voxels lie above {darkest:g}: no air, lung, fat or noise around water, as in MR or PET"
        yield Refused("mr_or_pet", text, **numbers)


def _wrong_scale(
    values: NDArray[np.float32], far_below: NDArray[np.float32], numbers: dict[str, float]
) -> Iterator[Refused]:
    """Soft tissue is the bulk of a body, and the darkest there is in it is air, lung or fat.

    ``far_below`` was taken for padding: where that has many values, it may be lung and air times a factor.
    """
    soft, dense = _share(values, -200, 250), _share(values, 300, 900)
    if dense > _MOST_DENSE * soft and np.unique(far_below).size > _MAX_PADDING_VALUES:
        text = f"{dense:.0%} of the voxels lie at 300 to 900 HU and {soft:.0%} at -200 to 250: HU times a factor"
        yield Refused("wrong_scale", text, dense=dense, soft_tissue=soft, **numbers)
    darkest = float(np.percentile(values, 2))
    peak = _share(values, darkest - _PEAK_HU, darkest + _PEAK_HU)
    dark = values[values < _NO_TISSUE_HU[0]]
    # Noise spreads air to both sides; a factor moves all of it.
    too_dark = (
        float((values < _DARKER_THAN_AIR_HU).mean()) if dark.size and np.median(dark) < _DARKER_THAN_AIR_HU else 0.0
    )
    if (_NO_TISSUE_HU[0] < darkest < _NO_TISSUE_HU[1] and peak > _PEAK_SHARE) or too_dark > _PEAK_SHARE:
        text = f"the darkest voxels, {max(peak, too_dark):.0%}, lie around {darkest:.0f} HU: neither air, lung nor fat"
        yield Refused("wrong_scale", text, darkest=darkest, share=max(peak, too_dark), **numbers)


def _odd_background(
    hu: Planes, valid: Planes, values: NDArray[np.float32], numbers: dict[str, float]
) -> Iterator[Refused]:
    """All eight corners share a value that is not that of air, and air there is none: it was replaced, inside too."""
    corners = [_corners(hu, end) for end in (0, -1)]
    background = float(corners[0].flat[0])
    known = all(_corners(valid, end).all() for end in (0, -1))
    if not known or any((corner != background).any() for corner in corners) or background <= _AIR_BELOW_HU:
        return
    share = float((values == background).mean())
    if share > 0.05 and _share(values, *_AIR_HU) < _LITTLE_AIR:
        text = f"all corners and {share:.0%} of the voxels are exactly {background:g}: a background in place of air"
        yield Refused("odd_background", text, share=share, background=background, **numbers)


def _corners(volume: Planes, end: int) -> NDArray[Any]:
    return np.asarray(face(volume, 0, end)[np.ix_((0, -1), (0, -1))])


def _sample(hu: Planes, valid: Planes, *, outside: bool = False) -> NDArray[np.float32]:
    """Return evenly spread voxels, those that are valid of them, or those that are not."""
    stride = max(1, math.prod(hu.shape) // _MAX_SAMPLES)
    pairs = zip(every(hu, stride), every(valid, stride), strict=True)
    return np.concatenate([some[inside != outside] for some, inside in pairs])


def _share(values: NDArray[np.float32], low: float, high: float) -> float:
    return float(((values >= low) & (values <= high)).mean())
