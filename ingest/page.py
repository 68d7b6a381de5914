"""The page of an ingest report: one HTML file with everything in it, to look at before anything is trained on it."""

from __future__ import annotations

import base64
import io
from collections import Counter
from html import escape
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maesil.ingest.summary import Summary
from maesil.ingest.verdict import STATUSES
from maesil.store.explain import note_in_words
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume
from maesil.store.store import Store
from maesil.types import AIR_HU

_MOST_PICTURES = 200
_NAMED_WIDER_THAN_PX = 45
_PICTURE_PIXELS = 280
"""Edge of the largest plane on the page; the others are shown to the same scale."""
_WINDOW_HU = (-1000.0, 1000.0)
_GAMMA = 0.8
_BINS = np.arange(-1024, 2049, 16)

_PLANES = (
    ("axial", 0, ("A", "P", "R", "L")),
    ("coronal", 1, ("S", "I", "R", "L")),
    ("sagittal", 2, ("S", "I", "A", "P")),
)
"""Name, axis cut (z y x), and the letters at the top, bottom, left and right as shown."""


def page(summary: Summary, store: Store, reader: SuperpatchReader) -> str:
    """Return the page of a run as HTML that needs no other file."""
    volumes = [*summary.committed, *summary.fresh]
    sections = [
        f"<h1>Ingest into {escape(store.path.name)}</h1><p class=lead>{escape(summary.conclusion(store.path))}</p>",
        _totals(summary),
        "<h2>Verdicts on files</h2>" + _verdict_table(summary),
        "<h2>Volumes</h2>" + _volume_table(volumes) if volumes else "",
        "<h2>Refused</h2>" + _refused(store) if store.quarantined() else "",
        "<h2>Pictures</h2>" + _pictures(volumes, reader) if volumes else "",
    ]
    title = f"Ingest into {escape(store.path.name)}"
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title>"
    style = f"<style>{files('maesil.ingest').joinpath('page.css').read_text()}</style>"
    return f"<!doctype html><html lang=en><head>{head}{style}</head><body>{''.join(sections)}</body></html>"


def _totals(summary: Summary) -> str:
    boxes = [("files found", len(summary.files), "")]
    boxes += [(status, count, status) for status, count in summary.counts.items()]
    boxes += [("volumes", len(summary.volumes), ""), ("refused", summary.refused_volumes, "")]
    shown = (f"<div class=total><b class='{kind}'>{count}</b>{name}</div>" for name, count, kind in boxes)
    return f"<div class=totals>{''.join(shown)}</div>"


def _verdict_table(summary: Summary) -> str:
    counted = Counter((verdict.status, verdict.code) for verdict in summary.files)
    first = {(verdict.status, verdict.code): verdict for verdict in reversed(summary.files)}
    rows = []
    for status, code in sorted(counted, key=lambda pair: (STATUSES.index(pair[0]), pair[1])):
        example = first[status, code]
        why = "" if status == "used" else f"{example.path.name}: {example.detail}".rstrip(": ")
        rows.append(
            f"<tr><td class={status}>{status}</td><td><code>{escape(code)}</code></td>"
            f"<td class=n>{counted[status, code]}</td><td>{escape(why)}</td></tr>"
        )
    rows.append(f"<tr><td>sum</td><td></td><td class=n><b>{len(summary.files)}</b></td><td></td></tr>")
    return _table(("verdict", "code", "files:n", "first of them, why"), rows)


def _volume_table(volumes: list[Volume]) -> str:
    rows = [
        f"<tr><td><a href='#{volume.volume_id}'><code>{volume.volume_id[:12]}</code></a></td>"
        f"<td><code>{volume.group[:8]}</code></td><td class=n>{_by(volume.source_shape)}</td>"
        f"<td class=n>{_by(volume.source_spacing)}</td><td class=n>{_by(volume.shape)}</td>"
        f"<td class=n>{volume.hu['mean']:.0f}</td><td class=n>{volume.hu['valid_share']:.0%}</td>"
        f"<td class=n>{volume.hu['body_share']:.0%}</td><td>{escape(', '.join(volume.notes))}</td></tr>"
        for volume in volumes
    ]
    names = (
        "volume",
        "patient",
        "source voxels:n",
        "source mm:n",
        "stored:n",
        "mean HU:n",
        "valid:n",
        "body:n",
        "notes",
    )
    return _table(names, rows)


def _table(names: tuple[str, ...], rows: list[str]) -> str:
    heads = "".join(f"<th{' class=n' if name.endswith(':n') else ''}>{name.removesuffix(':n')}</th>" for name in names)
    return f"<div class=scroll><table><tr>{heads}</tr>{''.join(rows)}</table></div>"


def _by(values: tuple[float, ...]) -> str:
    return " x ".join(f"{round(value, 2):g}" for value in values)


def _refused(store: Store) -> str:
    cards = []
    for record in store.quarantined():
        places = record.get("numbers", {}).get("places_mm")
        plot = _gap_plot(places) if isinstance(places, list) and len(places) > 1 else ""
        cards.append(
            f"<div class=volume><h3 class=quarantined>{escape(record['code'])}</h3>"
            f"<p><code>{record['volume_id'][:12]}</code> {escape(record['detail'])}</p>{plot}</div>"
        )
    return "".join(cards)


def _gap_plot(places: list[float]) -> str:
    """Each slice as a tick where it lies along the scan (mm); gaps wider than usual are marked with their width."""
    width, height, margin = 1080, 64, 12
    low, high = min(places), max(places)
    scale = (width - 2 * margin) / max(high - low, 1e-6)
    at = [margin + (place - low) * scale for place in places]
    gaps = np.diff(places)
    usual = float(np.median(gaps))
    ticks = "".join(f"<line x1={x:.1f} x2={x:.1f} y1=20 y2=44 stroke='currentColor' />" for x in at)
    wide = [n for n, gap in enumerate(gaps) if abs(gap - usual) > max(0.01 * usual, 0.002)]
    marks = ""
    for n in wide:
        wide_px = max(1.0, at[n + 1] - at[n])
        marks += f"<rect x={at[n]:.1f} y=20 width={wide_px:.1f} height=24 fill='var(--quarantined)' opacity=.35 />"
        if wide_px > _NAMED_WIDER_THAN_PX:
            marks += f"<text x={at[n] + wide_px / 2:.1f} y=14 text-anchor=middle>{gaps[n]:.2f} mm</text>"
    ends = f"<text x={margin} y=60>{low:.1f} mm</text>"
    ends += f"<text x={width - margin} y=60 text-anchor=end>{high:.1f} mm</text>"
    middle = f"<text x={width / 2} y=60 text-anchor=middle>{len(places)} slices, usually {usual:.2f} mm apart</text>"
    return f"<svg viewBox='0 0 {width} {height}' width='100%' role=img>{marks}{ticks}{ends}{middle}</svg>"


def _pictures(volumes: list[Volume], reader: SuperpatchReader) -> str:
    shown = volumes[:_MOST_PICTURES]
    largest_mm = max(n * mm for volume in shown for n, mm in zip(volume.shape, volume.spacing, strict=True))
    cards = [_card(volume, reader, _PICTURE_PIXELS / largest_mm) for volume in shown]
    left = len(volumes) - len(cards)
    more = f"<p class=dim>... and {left} more volumes without pictures; see `maesil store export`</p>" if left else ""
    low, high = (f"{hu:g}" for hu in _WINDOW_HU)
    scale = f"Middle planes, all to one scale, window {low} to {high} HU; letters name the side of the patient."
    return f"<p class=dim>{scale}</p>{''.join(cards)}{more}"


def _card(volume: Volume, reader: SuperpatchReader, px_per_mm: float) -> str:
    cuts = [_cut(volume, reader, axis) for _, axis, _ in _PLANES]
    planes = "".join(_plane(cut, volume, px_per_mm, *plane) for cut, plane in zip(cuts, _PLANES, strict=True))
    histogram = _histogram(np.concatenate([cut.ravel() for cut in cuts]))
    notes = "".join(f"<li><code>{escape(note)}</code> {escape(note_in_words(note))}</li>" for note in volume.notes)
    source = ", ".join(f"{name} {value}" for name, value in volume.source.items())
    return (
        f"<div class=volume id='{volume.volume_id}'><h3><code>{volume.volume_id[:12]}</code></h3>"
        f"<p class=dim>{_by(volume.shape)} voxels of {_by(volume.spacing)} mm (z y x); {escape(source)}</p>"
        f"<div class=planes>{planes}{histogram}</div>{f'<ul class=notes>{notes}</ul>' if notes else ''}</div>"
    )


def _cut(volume: Volume, reader: SuperpatchReader, axis: int) -> NDArray[np.int16]:
    """Return the middle plane across an axis; only the superpatches it goes through are read."""
    start = [volume.shape[n] // 2 if n == axis else 0 for n in range(3)]
    size = [1 if n == axis else volume.shape[n] for n in range(3)]
    cut = reader.read_region(volume.volume_id, (start[0], start[1], start[2]), (size[0], size[1], size[2]))
    return cut.squeeze(axis)


def _plane(
    cut: NDArray[np.int16], volume: Volume, px_per_mm: float, name: str, axis: int, letters: tuple[str, ...]
) -> str:
    if axis != 0:
        cut = cut[::-1]  # z grows to the head, and the head is shown above
    height_mm, width_mm = (n * mm for n, mm in zip(cut.shape, np.delete(volume.spacing, axis), strict=True))
    width, height = (max(1, round(mm * px_per_mm)) for mm in (width_mm, height_mm))
    low, high = _WINDOW_HU
    grey = np.clip((cut.astype(np.float32) - low) / (high - low), 0, 1) ** _GAMMA
    picture = Image.fromarray(np.rint(grey * 255).astype(np.uint8)).resize((2 * width, 2 * height))
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    sides = "".join(f"<span class={side}>{letter}</span>" for side, letter in zip("tblr", letters, strict=True))
    image = f"<img alt='{name} plane' width={width} height={height} src='data:image/png;base64,{data}'>"
    plane = f"<div class=plane style='width:{width}px'>{image}{sides}</div>"
    return f"<figure>{plane}<figcaption>{name}</figcaption></figure>"


def _histogram(hu: NDArray[np.int16]) -> str:
    """Counts of HU on a logarithmic scale; air outside the scan is left out."""
    counts, _ = np.histogram(hu[hu > AIR_HU], bins=_BINS)
    width, height, base = 300, 150, 128
    logs = np.log10(1 + counts.astype(np.float64))
    top = max(float(logs.max()), 1e-9)
    x = np.linspace(8, width - 8, len(counts))
    points = " ".join(f"{a:.1f},{base - 112 * b / top:.1f}" for a, b in zip(x, logs, strict=True))
    marks = "".join(
        f"<line x1={at:.1f} x2={at:.1f} y1=12 y2={base} stroke='var(--line)' /><text x={at:.1f} y={base + 14} "
        f"text-anchor=middle>{value}</text>"
        for value in (-800, 0, 1000, 1800)
        if (at := 8 + (value - _BINS[0]) / (_BINS[-1] - _BINS[0]) * (width - 16)) < width
    )
    area = f"<polygon points='8,{base} {points} {width - 8},{base}' fill='currentColor' opacity=.3 />"
    line = f"<polyline points='{points}' fill=none stroke='currentColor' stroke-width=1.2 />"
    picture = f"<svg viewBox='0 0 {width} {height}' width={width} height={height} role=img>{marks}{area}{line}</svg>"
    return f"<figure>{picture}<figcaption>HU of these planes above {AIR_HU} (log count)</figcaption></figure>"
