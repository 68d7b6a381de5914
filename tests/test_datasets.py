"""The recipes of docs/how-to/datasets.md, as they stand there, on miniatures of the three layouts."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest

from maesil import SuperpatchDataset
from maesil.store.nifti import write_nifti
from maesil.store.store import Store
from maesil.synthetic.dicom import SeriesIdentity, ct_slice, grid_affine, save_all, write_dicom_series
from maesil.synthetic.phantom import ORGANS, ChestPhantom, sample_on_grid

PAGE = Path(__file__).resolve().parents[1] / "docs" / "how-to" / "datasets.md"
SHAPE, SPACING = (24, 32, 44), (9.0, 8.0, 8.0)
AFFINE = grid_affine(SPACING, (-176.0, -128.0, 20.0))
RAW, TOTAL = "RawData", "Totalsegmentator_dataset_v201"


def commands() -> list[str]:
    return re.findall(r"^ {4}(maesil .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def run(home: Path, command: str) -> str:
    """Run a command of the page by a shell, in a folder with a configuration (and key) of its own."""
    environment = {**os.environ, "XDG_CONFIG_HOME": str(home / "config"), "XDG_CACHE_HOME": str(home / "cache")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(command, shell=True, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def chest(seed: int) -> np.ndarray:
    return np.clip(np.rint(sample_on_grid(ChestPhantom(seed).hu, SHAPE, AFFINE)), -1024, 3071).astype(np.int16)


def organs(seed: int) -> np.ndarray:
    return sample_on_grid(ChestPhantom(seed).organs, SHAPE, AFFINE).astype(np.int16)


def write_btcv(folder: Path) -> None:
    for number in (1, 21):
        write_nifti(folder / f"Training/img/img{number:04d}.nii.gz", chest(number), AFFINE)
        write_nifti(folder / f"Training/label/label{number:04d}.nii.gz", organs(number), AFFINE)
    write_nifti(folder / "Testing/img/img0061.nii.gz", chest(61), AFFINE)


def write_lidc(folder: Path) -> None:
    """Three patients; the first with two CT, nodules as XML, and an X-ray; beside it labels by series."""
    for patient, studies in (("LIDC-IDRI-0001", 2), ("LIDC-IDRI-0132", 1), ("LIDC-IDRI-0250", 1)):
        for study in range(studies):
            who = SeriesIdentity(patient=patient, study=f"study {study}", series=f"series {study}")
            seed = int(patient[-4:]) + 10 * study
            ct = folder / patient / f"01-01-2000-{study}0178" / f"{3000000 + seed}.000000-03192"
            paths = write_dicom_series(ct, chest(seed), AFFINE, who)
            write_nifti(folder.parent / "segs" / f"{ct.name}.nii.gz", organs(seed), AFFINE)
            for number, path in enumerate(paths, start=1):
                path.rename(ct / f"1-{number:03d}.dcm")
            (ct / "069.xml").write_text('<?xml version="1.0"?><LidcReadMessage/>')
    who = SeriesIdentity(patient="LIDC-IDRI-0001", study="x-ray", series="x-ray")
    xray = ct_slice(chest(0)[:, 16], (0, 0, 0), (0, 0, -8.0), (8.0, 0, 0), 1, who)
    xray.SOPClassUID = xray.file_meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    xray.Modality = "DX"
    save_all(folder / "LIDC-IDRI-0001" / "01-01-2000-35511" / "3000923.000000-62357", [xray], ["1-1.dcm"])


def write_totalsegmentator(folder: Path) -> None:
    parts = {"s0000": "train", "s0001": "val", "s0004": "test"}
    for seed, name in enumerate(parts):
        write_nifti(folder / name / "ct.nii.gz", chest(100 + seed), AFFINE)
        numbers = organs(100 + seed)
        for number, organ in enumerate(ORGANS, start=1):
            mask = (numbers == number).astype(np.int16)
            write_nifti(folder / name / "segmentations" / f"{organ}.nii.gz", mask, AFFINE)
    with (folder / "meta.csv").open("w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file, delimiter=";")
        rows.writerows([["image_id", "age", "split"], *([name, 60, part] for name, part in parts.items())])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The three downloads, and all that the page does with them but the experiment."""
    home = tmp_path_factory.mktemp("datasets")
    write_btcv(home / RAW)
    write_lidc(home / "LIDC-IDRI")
    write_totalsegmentator(home / TOTAL)
    for command in commands():
        if command.startswith(("maesil ingest", "maesil link-labels", "maesil store split")):
            run(home, command)
    for number, code in enumerate(snippets()):
        (home / f"{number}.py").write_text(code)
        run(home, f"python {number}.py")
    return home


def verdicts(home: Path, name: str) -> Counter:
    rows = pq.read_table(home / f"{name}.report" / "files.parquet").to_pylist()
    return Counter((row["status"], row["code"]) for row in rows)


@pytest.mark.slow
def test_every_layout_becomes_the_store_that_the_page_promises(home):
    assert verdicts(home, "btcv") == {("used", "committed"): 3}
    assert verdicts(home, "totalsegmentator") == {("used", "committed"): 3}
    lidc = verdicts(home, "lidc")
    assert lidc.pop(("used", "committed")) == 4 * SHAPE[0]
    assert lidc.pop(("skipped", "not_ct_image")) == 1
    assert {status for status, _ in lidc} == {"ignored"} and sum(lidc.values()) == 4
    volumes = Store.open(home / "lidc.zarr").volumes()
    assert (len(volumes), len({volume.group for volume in volumes})) == (4, 3)
    assert {volume.spacing for volume in volumes} == {(1.5, 1.5, 1.5)}


@pytest.mark.slow
def test_labels_lie_under_the_ids_of_their_scans(home):
    used = {row["volume_id"]: row["path"] for row in pq.read_table(home / "btcv.report" / "files.parquet").to_pylist()}
    links = {path.name.partition(".")[0]: path.resolve() for path in (home / "btcv-labels").iterdir()}
    assert {Path(used[volume_id]).name.replace("img", "label") for volume_id in links} == {
        p.name for p in links.values()
    }
    assert len(links) == 2
    series = {
        row["volume_id"]: Path(row["path"]).parent.name
        for row in pq.read_table(home / "lidc.report" / "files.parquet").to_pylist()
    }
    links = {path.name.partition(".")[0]: path.resolve().name for path in (home / "lidc-labels").iterdir()}
    assert len(links) == 4 and all(name == f"{series[volume_id]}.nii.gz" for volume_id, name in links.items())
    for link in (home / "totalsegmentator-labels").iterdir():
        assert {path.name for path in link.iterdir()} == {f"{organ}.nii.gz" for organ in ORGANS}


@pytest.mark.slow
def test_splits_divide_patients_and_are_taken_by_the_data_set(home):
    for name in ("btcv-split", "lidc-split", "totalsegmentator-split", "totalsegmentator-official"):
        split = json.loads((home / f"{name}.json").read_text())
        volumes = Store.open(home / f"{name.rpartition('-')[0]}.zarr").volumes()
        everyone = [group for part in ("train", "validation", "test") for group in split[part]]
        assert sorted(everyone) == sorted({volume.group for volume in volumes})
    official = home / "totalsegmentator-official.json"
    assert all(len(json.loads(official.read_text())[part]) == 1 for part in ("train", "validation", "test"))
    parts = [
        {item["group"] for item in SuperpatchDataset(home / "totalsegmentator.zarr", split=(official, part))}
        for part in ("train", "validation", "test")
    ]
    assert [len(part) for part in parts] == [1, 1, 1] and len(set.union(*parts)) == 3


def test_the_experiment_of_the_page_names_the_stores_that_the_page_makes():
    (experiment,) = [command for command in commands() if command.startswith("maesil experiment")]
    stores = re.findall(r"--out (\S+\.zarr)", "\n".join(commands()))
    assert re.findall(r"--store (\S+)", experiment) == stores and "--budget paper" in experiment
