"""Hard DICOM after public reports: files that stand in for slices, and what is no slice (see `support.ct_cases`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from support.ct_cases import case, refused, renew_uid, series, stored_of
from support.ct_phantom import SHAPE

from maesil.synthetic.dicom import save_all, set_pixels

LONG = (40, 40, 48)
THIN = (48, 40, 48)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 24012\n"


def _uid(*parts: object) -> str:
    return str(pydicom.uid.generate_uid(entropy_srcs=[*map(str, parts)]))


# Files that stand in for slices ----------------------------------------------------------------------


@refused()
def last_slices_not_fetched(folder: Path, who: str) -> None:
    for path in save_all(folder, series(who))[18:]:
        path.write_text(POINTER)


@refused()
def last_slices_empty(folder: Path, who: str) -> None:
    for path in save_all(folder, series(who), [f"1.2.840.{k}.{7 * k}.dcm" for k in range(SHAPE[0])])[20:]:
        path.write_bytes(b"")


@refused()
def last_slices_are_links_to_nowhere(folder: Path, who: str) -> None:
    for path in save_all(folder, series(who), [f"{k:03d}" for k in range(SHAPE[0])])[20:]:
        path.unlink()
        path.symlink_to("/nowhere/at/all")


@refused()
def last_slice_cut_within_its_header(folder: Path, who: str) -> None:
    path = save_all(folder, series(who))[-1]
    path.write_bytes(path.read_bytes()[:300])


@refused()
def last_slices_half_downloaded(folder: Path, who: str) -> None:
    for path in save_all(folder, series(who), [f"IM{k:04d}.dcm" for k in range(SHAPE[0])])[20:]:
        path.with_name(f"{path.name}.part").write_bytes(path.read_bytes()[:140])
        path.unlink()


@refused()
def last_slices_left_in_the_cloud(folder: Path, who: str) -> None:
    for path in save_all(folder, series(who), [f"IM{k:04d}.dcm" for k in range(SHAPE[0])])[20:]:
        path.with_name(f".{path.name}.icloud").write_bytes(b"bplist00\xd3" + bytes(150))
        path.unlink()


@refused()
def last_slices_are_web_pages(folder: Path, who: str) -> None:
    for path in save_all(folder, series(who), [f"IM{k:04d}.dcm" for k in range(SHAPE[0])])[20:]:
        path.write_text("\n<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n")


@case(status="ignored")
def web_page_beside_the_scan(folder: Path, who: str) -> None:
    save_all(folder, series(who), [f"IM{k:04d}.dcm" for k in range(SHAPE[0])])
    (folder / "IM0024.html").write_text("<html><body>An index</body></html>")


@case(status="ignored")
def empty_file_of_another_name(folder: Path, who: str) -> None:
    save_all(folder, series(who))
    (folder / "0.lock").write_bytes(b"")


# What is no volume -----------------------------------------------------------------------------------


@case(status="skipped", code="time_series")
def bolus_tracking_beside_the_scan(folder: Path, who: str) -> None:
    (place,) = series(who, (1, 40, 48), series="bolus", number=5)
    save_all(folder / "scan", series(who))
    images = [pydicom.dcmread(save_all(folder / "bolus", [place])[0]) for _ in range(20)]
    for k, data in enumerate(images):
        renew_uid(data, k)
        data.AcquisitionTime = f"1014{k:02d}"
        set_pixels(data, stored_of(data) + np.int16(k))
    save_all(folder / "bolus", images)


@case(status="skipped", code="material_map")
def iodine_beside_the_scan(folder: Path, who: str) -> None:
    kind = {"ImageType": ["DERIVED", "PRIMARY", "AXIAL", "MAT_SPECIFIC"], "RescaleType": "MGML"}
    save_all(folder / "scan", series(who))
    save_all(folder / "iodine", series(who, series="iodine", extra=kind))


@refused("frames_without_positions")
def many_frames_in_an_object_of_the_single_frame_class(folder: Path, who: str) -> None:
    slices = series(who)
    volume = slices[0]
    volume.PixelData = b"".join(data.PixelData for data in slices)
    volume.NumberOfFrames = len(slices)
    save_all(folder, [volume])


@case(status="skipped", code="no_slice")
def a_page_of_the_ct_class_without_a_place(folder: Path, who: str) -> None:
    (page,) = series(who, (1, 40, 48), series="page")
    for name in ("ImagePositionPatient", "ImageOrientationPatient"):
        delattr(page, name)
    save_all(folder / "scan", series(who))
    save_all(folder / "page", [page])
