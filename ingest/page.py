"""The page of an ingest report: one HTML file with everything in it, to look at before anything is trained on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from maesil.ingest.report_folder import RunRecord, source_text
from maesil.ingest.source_path import SourcePath
from maesil.ingest.summary import Summary
from maesil.ingest.verdict_tables import Verdicts
from maesil.pages import data_url, rendered
from maesil.store.explain import note_in_words
from maesil.store.pictures import grey_png, middle_plane
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume
from maesil.store.remedies import remedy
from maesil.store.store import Store
from maesil.store.urls import StorePlace
from maesil.text import counted, printable
from maesil.types import AIR_HU

_MOST_PICTURES = 200
_NAMED_WIDER_THAN_PX = 45
_PICTURE_PIXELS = 280
"""Edge of the largest plane on the page; the others are shown to the same scale."""
_BINS = np.arange(-1024, 2049, 16)

_PLANES = (
    ("axial", 0, ("A", "P", "R", "L")),
    ("coronal", 1, ("S", "I", "R", "L")),
    ("sagittal", 2, ("S", "I", "A", "P")),
)
"""Name, axis cut (z y x), and the letters at the top, bottom, left and right as shown."""


@dataclass(frozen=True)
class RefusedSource:
    """A source that became no volume: why, and which files it is."""

    volume_id: str
    """Empty for single files of which nothing more is known."""
    code: str
    detail: str
    paths: tuple[SourcePath, ...]
    """As far as any run met them."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    files: int | None = None
    """How many files the store's own record speaks of."""


def page(
    summary: Summary,
    place: StorePlace,
    store: Store | None,
    sources: Mapping[str, Sequence[SourcePath]],
    refused: Sequence[RefusedSource],
    runs: Sequence[Mapping[str, Any]],
    of_all_parts: Verdicts | None = None,
) -> str:
    """Return the page of a store as HTML that needs no other file: this run, all volumes and refusals, all runs.

    ``place`` is where the store lies, or would: there is none where nothing was found. ``sources`` are the files of
    each volume by its id. ``of_all_parts`` are the verdicts of a run beside those of the other parts of its work: the
    totals then are those of all.
    """
    files = summary.files if of_all_parts is None else of_all_parts
    volumes = _in_order_of_interest(summary, store) if store else []
    numbers = (len(summary.volumes), summary.refused_volumes) if of_all_parts is None else (len(volumes), len(refused))
    where = {volume.volume_id: source_text(sources.get(volume.volume_id, ())) for volume in volumes}
    return rendered(
        "ingest.html",
        name=printable(place.name),
        conclusion=summary.conclusion(place),
        totals=_totals(files, *numbers),
        verdict_heads=_heads("verdict", "code", "files:n", "first of them, why"),
        verdicts=_verdict_rows(files),
        volume_heads=_heads("volume", "source", "patient", "source voxels:n", "source mm:n", "stored:n", "mean HU:n",
                            "valid:n", "body:n", "notes"),
        volumes=[_volume_row(volume, where[volume.volume_id]) for volume in volumes],
        refused=[_refused_card(source) for source in refused],
        cards=_cards(volumes[:_MOST_PICTURES], where, SuperpatchReader(store)) if store else [],
        more=counted(len(volumes) - _MOST_PICTURES, "volume") if len(volumes) > _MOST_PICTURES else "",
        run_heads=_heads("run (UTC)", "sources", "files:n", "made:n", "up to date:n", "refused:n"),
        runs=[_run_row(run) for run in reversed(runs)],
    )  # fmt: skip


def _in_order_of_interest(summary: Summary, store: Store) -> list[Volume]:
    """Return all volumes of the store: those just made, those this run met, the others."""
    met = {volume.volume_id: volume for volume in (*summary.committed, *summary.fresh)}
    others = {volume.volume_id: volume for volume in store.volumes() if volume.volume_id not in met}
    return list((met | others).values())


def _totals(files: Verdicts, volumes: int, refused: int) -> list[tuple[str, int, str]]:
    boxes = [("files found", len(files), "")]
    boxes += [(status, count, status) for status, count in files.counts().items()]
    return [*boxes, ("volumes", volumes, ""), ("refused", refused, "")]


def _heads(*names: str) -> list[tuple[str, bool]]:
    """Return titles of columns, and whether a column holds numbers (``:n``)."""
    return [(name.removesuffix(":n"), name.endswith(":n")) for name in names]


def _verdict_rows(files: Verdicts) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for status, code, count, example in files.ordered_tally():
        why = "" if status == "used" else printable(f"{example.path.name}: {example.detail}".rstrip(": "))
        told = Markup("<span class='{}'>{}</span>").format(status, status)
        rows.append((told, code, count, why))
    return [*rows, ("sum", "", len(files), "")]


def _volume_row(volume: Volume, source: str) -> tuple[Any, ...]:
    link = Markup("<a href='#{}'><code>{}</code></a>").format(volume.volume_id, volume.volume_id[:12])
    path = Markup("<span class=path>{}</span>").format(source)
    shares = (f"{volume.hu[name]:.0%}" for name in ("valid_share", "body_share"))
    shapes = (_by(volume.source_shape), _by(volume.source_spacing), _by(volume.shape))
    return link, path, volume.group[:8], *shapes, f"{volume.hu['mean']:.0f}", *shares, ", ".join(volume.notes)


def _run_row(run: RunRecord) -> tuple[Any, ...]:
    sources = Markup("<span class=path>{}</span>").format(", ".join(run.get("sources", ())))
    made, refused = len(run.get("committed", ())), run.get("refused_volumes", "")
    return run["run"], sources, run.get("files_found", ""), made, run.get("fresh", ""), refused


def _refused_card(source: RefusedSource) -> dict[str, Any]:
    places = source.numbers.get("places_mm")
    return {
        "id": source.volume_id,
        "code": source.code,
        "source": source_text(source.paths) or "its files are not known here; ingest them again to see them",
        "detail": printable(source.detail),
        "remedy": remedy(source.code),
        "plot": _gap_plot(places) if isinstance(places, list) and len(places) > 1 else "",
    }


def _cards(volumes: Sequence[Volume], where: Mapping[str, str], reader: SuperpatchReader) -> list[dict[str, Any]]:
    largest_mm = max(
        (n * mm for volume in volumes for n, mm in zip(volume.shape, volume.spacing, strict=True)), default=1
    )
    return [
        {
            "id": volume.volume_id,
            "source": where[volume.volume_id],
            "about": _about(volume),
            "pictures": _pictures(volume, reader, _PICTURE_PIXELS / largest_mm),
            "notes": [(note, note_in_words(note)) for note in volume.notes],
        }
        for volume in volumes
    ]


def _about(volume: Volume) -> str:
    technical = ", ".join(f"{name} {value}" for name, value in volume.source.items())
    return printable(f"{_by(volume.shape)} voxels of {_by(volume.spacing)} mm (z y x); {technical}")


def _pictures(volume: Volume, reader: SuperpatchReader, px_per_mm: float) -> Markup:
    cuts = [middle_plane(volume, reader, axis) for _, axis, _ in _PLANES]
    planes = "".join(_plane(cut, volume, px_per_mm, *plane) for cut, plane in zip(cuts, _PLANES, strict=True))
    return Markup(planes + _histogram(np.concatenate([cut.ravel() for cut in cuts])))


def _by(values: tuple[float, ...]) -> str:
    return " x ".join(f"{round(value, 2):g}" for value in values)


def _gap_plot(places: list[float]) -> Markup:
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
    return Markup(f"<svg viewBox='0 0 {width} {height}' width='100%' role=img>{marks}{ticks}{ends}{middle}</svg>")


def _plane(
    cut: NDArray[np.int16], volume: Volume, px_per_mm: float, name: str, axis: int, letters: tuple[str, ...]
) -> str:
    if axis != 0:
        cut = cut[::-1]  # z grows to the head, and the head is shown above
    height_mm, width_mm = (n * mm for n, mm in zip(cut.shape, np.delete(volume.spacing, axis), strict=True))
    width, height = (max(1, round(mm * px_per_mm)) for mm in (width_mm, height_mm))
    rows, columns = cut.shape
    picture = grey_png(cut, min(2 * width, columns), min(2 * height, rows))  # a browser makes it larger by itself
    sides = "".join(f"<span class={side}>{letter}</span>" for side, letter in zip("tblr", letters, strict=True))
    image = f"<img alt='{name} plane' width={width} height={height} src='{data_url('image/png', picture)}'>"
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
