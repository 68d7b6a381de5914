"""Runs `maesil ingest` over an outside case and judges what came of it, by public commands and the public format."""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import typer.main
import zarr
from conformance.phantom import Scan
from numpy.typing import NDArray

from maesil.cli import app

AIR_STORED = -1024
_STEP = 5
"""Every fifth voxel along each axis tells most scans from another."""
_COMMAND = typer.main.get_command(app)


@dataclass(frozen=True)
class Expected:
    """What an input must become, written down before it was first run."""

    scans: tuple[Scan, ...] = ()  # each must be a volume of the store, and there must be no other
    refused: bool = False  # at least one file must be quarantined
    codes: tuple[str, ...] = ()  # where given, the quarantine codes that may appear
    or_refused: bool = False  # the scans, or a refusal: the principles allow both
    counted: dict[str, int] = field(default_factory=dict)  # verdict code -> number of files
    options: tuple[str, ...] = ()
    invalid: NDArray[np.bool_] | None = None  # voxels of the first scan that are padding
    interpolated: bool = False  # some slices are, so not all voxels are valid
    notes: tuple[str, ...] = ()  # must be on the first volume
    groups: int | None = None  # patient groups of the volumes
    duplicates: int | None = None  # groups of copies the summary must report


@dataclass(frozen=True)
class Exported:
    """A volume as `maesil store export` gives it, and what its commit says besides."""

    voxels: NDArray[Any]
    affine: NDArray[np.float64]
    valid: NDArray[Any]
    notes: list[str]
    group: str


def expect(*scans: Scan, **more: Any) -> Expected:
    """Return that ``scans`` must be found."""
    return Expected(scans=scans, **more)


def refuse(*codes: str, beside: tuple[Scan, ...] = (), **more: Any) -> Expected:
    """Return that something must be refused (with one of ``codes``, if any are given) and ``beside`` be found."""
    return Expected(scans=beside, refused=True, codes=codes, **more)


def judge(source: Path, work: Path, expected: Expected) -> list[str]:
    """Ingest ``source`` and return what is wrong with the result, a line each; empty if it is right."""
    store = work / "store.zarr"
    arguments = ["ingest", str(source), "--out", str(store), "--spacing", "native", "--superpatch", "64"]
    arguments += ["--workers", "0", "--key-file", str(work / "key"), "--json", *expected.options]
    try:
        exit_code, printed, said = run_command(arguments)
    except Exception as error:
        return [f"crash: {type(error).__name__}: {error}"]
    if "Traceback" in printed + said:
        return ["crash: a stack trace was printed"]
    try:
        summary = json.loads(printed)
    except json.JSONDecodeError:
        return [f"exit {exit_code}: {said.strip()[-300:]}"]
    (work / "summary.json").write_text(json.dumps(summary, indent=1))
    if exit_code == 3 and (expected.or_refused or not expected.scans):
        return _accounting(source, summary, expected.options)  # nothing usable at all
    volumes = exported(store, work)
    wrong = [
        *_accounting(source, summary, expected.options),
        *_verdicts(summary, expected),
        *_volumes(volumes, summary, expected),
    ]
    if expected.scans and not expected.or_refused:
        wanted = {1} if expected.refused else {0}
        if exit_code not in wanted:
            wrong.append(f"exit code {exit_code}, not {wanted}")
    elif exit_code not in (0, 1, 3):
        wrong.append(f"exit code {exit_code}")
    return wrong


def run_command(arguments: list[str]) -> tuple[int, str, str]:
    """Run a command as a terminal would; return exit code, standard output and standard error."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            _COMMAND.main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def exported(store: Path, work: Path) -> list[Exported]:
    """Return every volume of the store: voxels z y x, affine in LPS."""
    if not store.exists():
        return []
    out = work / "export"
    exit_code, _, said = run_command(["store", "export", str(store), "--out", str(out)])
    found = []
    for path in sorted(out.glob("*.nii.gz")):
        image = nibabel.load(path)
        affine = np.diag([-1.0, -1, 1, 1]) @ image.affine
        affine[:, :3] = affine[:, 2::-1]
        identity = path.name.removesuffix(".nii.gz")
        commit = json.loads(max((store / "commits" / identity[:2] / identity).iterdir()).read_text())
        attempt = store / "volumes" / identity[:2] / identity / commit["attempt"]
        valid = zarr.open_array(attempt / "valid", mode="r")[:]
        voxels = np.asarray(image.dataobj).transpose(2, 1, 0)
        found.append(Exported(voxels, affine, valid, commit["notes"], commit["group"]))
    assert exit_code == 0 or not found, said
    return found


def _accounting(source: Path, summary: dict[str, Any], options: tuple[str, ...]) -> list[str]:
    """Every file once: those on disk, and the members of archives beside their archive."""
    if "--follow-links" in options:
        return []
    on_disk = members = 0
    for folder, folders, names in os.walk(source):
        on_disk += len(names) + sum((Path(folder) / name).is_symlink() for name in folders)
        for name in names:
            path = Path(folder) / name
            if stat.S_ISREG(path.lstat().st_mode) and path.stat().st_mode & 0o400 and zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    members += sum(not member.is_dir() for member in archive.infolist())
    verdicts = len(summary["files"])
    totals = {verdicts, summary["files_found"], sum(summary["counts"].values()), sum(summary["codes"].values())}
    if len(totals) != 1 or not on_disk <= verdicts <= on_disk + members:
        return [f"accounting: {on_disk} files and {members} members, {verdicts} verdicts, totals {totals}"]
    return []


def _counts(summary: dict[str, Any]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for file in summary["files"]:
        counts[file["code"]] = counts.get(file["code"], 0) + 1
    return counts


def _verdicts(summary: dict[str, Any], expected: Expected) -> list[str]:
    codes = {file["code"] for file in summary["files"] if file["status"] == "quarantined"}
    wrong = []
    if codes & {"unexpected", "worker_lost", "out_of_memory", "decoder_killed"}:
        wrong.append(
            f"crash: {codes}: " + "; ".join(f["detail"] for f in summary["files"] if f["code"] == "unexpected")[:300]
        )
    if expected.refused and not codes:
        wrong.append("silently wrong: nothing was refused")
    if codes and not expected.refused and not expected.or_refused:
        detail = next(f["detail"] for f in summary["files"] if f["status"] == "quarantined")
        wrong.append(f"refused although it could be right: {sorted(codes)}: {detail}")
    if expected.codes and not codes <= set(expected.codes):
        wrong.append(f"refused as {sorted(codes)}, not {expected.codes}")
    counts = _counts(summary)
    for code, number in expected.counted.items():
        if counts.get(code, 0) != number:
            wrong.append(f"{counts.get(code, 0)} files {code}, not {number}; found {counts}")
    if expected.duplicates is not None and len(summary.get("duplicates", [])) != expected.duplicates:
        wrong.append(f"{len(summary.get('duplicates', []))} duplicates reported, not {expected.duplicates}")
    return wrong


def _volumes(volumes: list[Exported], summary: dict[str, Any], expected: Expected) -> list[str]:
    if expected.or_refused and not volumes and any(f["status"] == "quarantined" for f in summary["files"]):
        return []
    left = list(expected.scans)
    wrong = []
    for volume in volumes:
        right = next((scan for scan in left if _is(volume, scan, expected)), None)
        if right is None:
            faults = [fault_of(volume, scan, expected) for scan in left]
            best = min((fault for fault in faults if fault), key=len, default="no scan was expected")
            wrong.append(f"silently wrong: {best}" if not expected.or_refused else f"wrong: {best}")
            continue
        left.remove(right)
        wrong += [f"note {note} is missing from {volume.notes}" for note in expected.notes if note not in volume.notes]
    if expected.groups is not None and (groups := len({volume.group for volume in volumes})) != expected.groups:
        wrong.append(f"{groups} patient groups, not {expected.groups}")
    if left:
        counts = _counts(summary)
        wrong.append(f"{len(left)} of {len(expected.scans)} scans missing; verdicts {counts}")
    return wrong


def _is(volume: Exported, scan: Scan, expected: Expected) -> bool:
    """Return whether a volume is a scan. Where one voxel of a few is wrong, it is another one: all need not be seen."""
    if expected.invalid is None and not scan.resampled:
        few = volume.affine @ np.diag([_STEP, _STEP, _STEP, 1])
        thinned = volume.voxels[::_STEP, ::_STEP, ::_STEP]
        world, inside = _inside(thinned.shape, few, scan)
        if inside.any() and _wrong_hu(thinned, world, inside, scan):
            return False
    return fault_of(volume, scan, expected) is None


def fault_of(volume: Exported, scan: Scan, expected: Expected) -> str | None:
    """Return what is wrong with a volume if it is to be ``scan``, or None; its own affine says where voxels lie."""
    voxels, affine, valid = volume.voxels, volume.affine, volume.valid
    world, inside = _inside(voxels.shape, affine, scan)
    known = np.repeat(np.repeat(np.repeat(valid == 255, 8, 0), 8, 1), 8, 2)[tuple(slice(n) for n in voxels.shape)]
    invalid, whole_cells = expected.invalid, tuple(slice(n // 8) for n in voxels.shape)
    if invalid is None:
        scored = inside
        if not (scan.resampled or expected.interpolated) and (valid[whole_cells] < 255).any():
            return "voxels of the scan are marked not valid"
    else:
        lost = _looked_up(invalid, world, scan)
        if (voxels[lost & inside] > -1000).any():
            return "padding is not air"
        if (known & lost).any():
            return "padding is marked valid"
        scored = inside & ~lost
    return _wrong_hu(voxels, world, scored, scan) or _coverage(scan, affine, voxels.shape)


def fault_of_reader(voxels: NDArray[Any], affine: NDArray[np.float64], scan: Scan) -> str | None:
    """As `fault_of`, of a reader without a map of what is valid: -1024 and below is taken for padding."""
    world, inside = _inside(voxels.shape, affine, scan)
    return _wrong_hu(voxels, world, inside & (voxels > AIR_STORED), scan) or _coverage(scan, affine, voxels.shape)


def _inside(shape: tuple[int, ...], affine: NDArray[np.float64], scan: Scan) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return where each voxel lies, and which lie inside the scan."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    return world, _within(world, scan, margin=1e-3 if not scan.resampled else -0.75)


def _wrong_hu(voxels: NDArray[Any], world: NDArray[Any], scored: NDArray[np.bool_], scan: Scan) -> str | None:
    if not scored.any():
        return "lies elsewhere"
    error = np.abs(voxels[scored] - np.clip(scan.at(world[scored]), AIR_STORED, 3071))
    worst = float(np.quantile(error, 0.98) if scan.resampled else error.max())
    if not worst <= scan.tolerance:
        return f"HU off by {worst:.0f} (allowed {scan.tolerance}), median {np.median(error):.1f}"
    return None


def _within(world: NDArray[np.float64], scan: Scan, margin: float) -> NDArray[np.bool_]:
    index = (world - scan.affine[:3, 3]) @ np.linalg.inv(scan.affine[:3, :3]).T
    return np.asarray(((index >= -margin) & (index <= np.asarray(scan.shape) - 1 + margin)).all(axis=-1))


def _looked_up(mask: NDArray[np.bool_], world: NDArray[np.float64], scan: Scan) -> NDArray[np.bool_]:
    index = np.rint((world - scan.affine[:3, 3]) @ np.linalg.inv(scan.affine[:3, :3]).T).astype(int)
    bounded = np.clip(index, 0, np.asarray(scan.shape) - 1)
    return np.asarray(mask[tuple(bounded[..., i] for i in range(3))] & (index == bounded).all(axis=-1))


def _coverage(scan: Scan, affine: NDArray[np.float64], shape: tuple[int, ...]) -> str | None:
    """The whole scan must lie on the volume's grid; where the grid is kept, the voxels must be as many."""
    corners = np.array([[z, y, x] for z in (0, 1) for y in (0, 1) for x in (0, 1)]) * (np.asarray(scan.shape) - 1)
    world = corners @ scan.affine[:3, :3].T + scan.affine[:3, 3]
    index = (world - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    slack = 0.01 if not scan.resampled else 0.75
    if (index < -slack).any() or (index > np.asarray(shape) - 1 + slack).any():
        return "does not cover the scan"
    if not scan.resampled and sorted(shape) != sorted(scan.shape):
        return f"shape {shape}, not {scan.shape}"
    return None
