"""Is a CT from a cone beam? Its numbers are HU only roughly, and no attribute of the CT image says so.

Dental, interventional, intraoperative and radiotherapy devices write plain CT images. So the words of the header
decide: what it calls the image or the protocol, and whose device it names. The list is ours, and not complete.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

TEXT_TAGS = ("ImageType", "SeriesDescription", "ProtocolName", "StudyDescription", "ImageComments")
DEVICE_TAGS = ("Manufacturer", "ManufacturerModelName")
_WORDS = re.compile(r"(?<![A-Z0-9])(I?CB[ _-]?CT|CONE[ _-]?BEAM|DYNA[ _-]?CT|XPER[ _-]?CT|INNOVA ?CT)(?![A-Z])")
_DEVICES = re.compile(
    r"(?<![A-Z0-9])("
    # radiotherapy
    r"ON[ -]?BOARD IMAGER|OBI|XVI|TRUEBEAM|HALCYON|LEKSELL GAMMA KNIFE ICON"
    # teeth, jaws, ears
    r"|I-?CAT|NEWTOM|PROMAX|PLANMECA VISO|(3DX?|3D) ?ACCUITOMO|ACCUITOMO|VERAVIEWEPOCS|GALILEOS|ORTHOPHOS|SCANORA"
    r"|CRANEX|ORTHOPANTOMOGRAPH|OP ?300|KODAK 9[05]00|CS ?[89]\d00|PAX-?(I|ZENITH|UNI|FLEX|REVE)\w*|RAYSCAN|ALPHARD"
    r"|AUGE|MINICAT|KAVO"
    # limbs, breast
    r"|ONSIGHT|PEDCAT|LINEUP|KONING|VERITY"
    # angiography and the operating room
    r"|(AXIOM[ -])?ARTIS|CIOS|ARCADIS|ZIEHM|ALLURA|AZURION|INNOVA|O-?ARM|LOOP-?X"
    r")(?![A-Z])"
)


def is_cone_beam(texts: Mapping[str, str]) -> bool:
    """Return whether the texts of a header (by keyword) speak of a cone beam or name a device that has one."""
    words, device = (" ".join(texts[tag] for tag in tags).upper() for tags in (TEXT_TAGS, DEVICE_TAGS))
    return bool(_WORDS.search(words.replace("_", " ")) or _WORDS.search(device) or _DEVICES.search(device))
