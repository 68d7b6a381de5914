"""Is a CT image a map out of a multi-energy scan (iodine, virtual non-contrast, electron density...)? Then it is no HU.

The standard says so in ImageType or in the unit of the rescaled values. Many scanners and archives say it in the
description of the series alone. The list of such words is ours, and not complete.
"""

from __future__ import annotations

import functools
import re

from maesil.ingest.header import InstanceHeader

_TYPES = {
    "MAT_SPECIFIC", "MAT_REMOVED", "MAT_FRACTIONAL", "MAT_MODIFIED", "MAT_VALUE_BASED", "EFF_ATOMIC_NUM",
    "ELECTRON_DENSITY",
}  # fmt: skip
"""Fourth value of the image type of what a multi-energy scan is made into (PS3.3 C.8.15.2.1.1.5); VMI are HU."""
_WORDS = {"IODINE", "VNC", "VUE", "ZEFF", "RHO"}
"""What vendors write there in place of the standard's terms."""
_UNITS = {"HU_MOD", "MGML", "Z_EFF", "ED", "EDW", "PCT"}
"""Units of rescaled values that are no HU (PS3.3 C.11.1.1.2)."""
_PHRASES = re.compile(
    r"(?<![A-Z0-9])("
    r"(LIVER|LUNG|HEART|BONE|BRAIN)?VNC(A|-?CA)?|VIRTUAL (TRUE )?(NON|UN) ?(CONTRAST|ENHANCED|CALCIUM)"
    r"|(I|IODINE) (MAPS?|OVERLAY|DENSITY|CONCENTRATION|ONLY|NO WATER)|(IODINE|CALCIUM|FAT|HAP) ?\( ?WATER ?\)"
    r"|WATER ?\( ?(IODINE|CALCIUM|FAT|HAP) ?\)|MD (IODINE|WATER|CALCIUM|FAT|HAP)|^IODINE$"
    r"|MATERIAL (DENSITY|MAPS?|DECOMPOSITION)|(Z ?EFF|EFFECTIVE Z|Z EFFECTIVE|EFFECTIVE ATOMIC NUMBER|RHO ?/ ?Z)"
    r"|ELECTRON DENSITY(?! (PHANTOM|CALIBRATION|PLUG))|CALCIUM SUPPRESS(ED|ION)|CASUPP|URIC ACID"
    r"|PERFUSED BLOOD VOLUME|(LUNG )?PBV"
    r")(?![A-Z])"
)
"""Only what no plain scan is called: a scan after contrast may well be called one *with iodine*."""


def material_named(header: InstanceHeader) -> str | None:
    """Return what the header calls a map that is no HU, and where; None for an image of HU."""
    for value in header.image_type[2:]:
        known = ({value} & _TYPES) or (set(re.split(r"[^A-Z]+", value)) & _WORDS)
        if known:
            return f"ImageType {min(known)}"
    if header.rescale_type in _UNITS:
        return f"RescaleType {header.rescale_type}"
    phrase = _phrase(header.said("SeriesDescription"))
    return f"SeriesDescription says {phrase}" if phrase else None


@functools.lru_cache(maxsize=256)
def _phrase(description: str) -> str:
    """Return the words by which a description names such a map, upper case; empty if it does not."""
    found = _PHRASES.search(re.sub(r"[\s_-]+", " ", description.upper()).strip())
    return found[1] if found else ""
