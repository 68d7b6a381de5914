"""Slices by their headers alone, for tests of planning."""

from __future__ import annotations

from pathlib import Path

from maesil.ingest.header import CT_IMAGE, InstanceHeader


def header(k: int, position, orientation=(1, 0, 0, 0, 1, 0), **more) -> InstanceHeader:
    """One slice; its file is named after ``k``."""
    values = {
        "path": Path(f"/x/{k}"), "sop_class": CT_IMAGE, "patient": "p", "study": "1.2",
        "series": "1.2.3", "modality": "CT", "image_type": ("ORIGINAL", "PRIMARY", "AXIAL"), "rows": 64,
        "columns": 48, "frames": 1, "position": tuple(map(float, position)),
        "orientation": tuple(map(float, orientation)), "pixel_spacing": (0.7, 0.8),
        "acquisition": ("1", "120", "B40", "", ""), "transfer_syntax": "", "technical": {},
    }  # fmt: skip
    return InstanceHeader(**values | more)


def straight(count=20, gap=2.0, start=0.0, **more) -> list[InstanceHeader]:
    """Slices one above the other."""
    return [header(k, (0, 0, start + gap * k), **more) for k in range(count)]
