"""The commands of the pages, as they stand there and in their order, on small scans in a folder of their own."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.command_line import run
from support.labelled import labelled_store
from support.pages import DOCS, commands

from maesil.errors import EXIT_REFUSED, EXIT_USAGE
from maesil.files import write_whole
from maesil.store.nifti import write_nifti
from maesil.synthetic.dicom import SeriesIdentity, grid_affine, write_dicom_series
from maesil.synthetic.phantom import ChestPhantom, sample_on_grid

pytestmark = [pytest.mark.timeout(1200), pytest.mark.usefixtures("one_thread")]

SHAPE, SPACING = (100, 32, 44), (2.0, 8.0, 8.0)
AFFINE = grid_affine(SPACING, (-176.0, -128.0, 20.0))
KEY = hashlib.sha256(b"pages 0").hexdigest()
"""The identity key: with it the patient that `store split` sets aside for scores is one of those in ``data/LIDC``."""
SMALL = (
    "--device", "cpu", "--batch", "2", "--set", "train.threads=1", "--set", "train.validation_crops=2",
    *(word for name in ("width", "decoder_width") for word in ("--set", f"model.{name}=16")),
    "--set", "model.crop=64", "--set", "model.depth=1",
)  # fmt: skip
"""What a command of training gets besides: the model of the page would take hours."""


@dataclass(frozen=True)
class Page:
    """A page, what its commands find in their folder, and what is left out."""

    name: str
    prepared: tuple[str, ...] = ()
    """Commands that other pages have explained."""
    left_out: tuple[str, ...] = ()
    """Words of commands that are run elsewhere, or nowhere."""
    ends: tuple[tuple[str, int], ...] = ()
    """Words of commands that are to end with another exit code than 0."""
    made: bool = False
    """Whether it begins with a labelled store that no command made, as every page does that begins with `A_RUN`."""
    steps: int = 2


A_RUN = "maesil train store.zarr --out run"
PAGES = (
    Page("../README.md"),
    Page("tutorial.md"),
    Page("how-to/ingest.md"),
    Page(
        "how-to/cache.md",
        ("maesil ingest data/btcv --out btcv.zarr",),
        ends=(("cache rm", EXIT_USAGE),),  # the run pins it, as the page says
    ),
    Page("how-to/slurm.md"),
    Page(
        "how-to/train.md",
        (
            "maesil ingest data/LIDC --out store.zarr --spacing 2",
            "maesil ingest data/btcv --out other.zarr --spacing 2",
        ),
    ),
    Page("how-to/reconstruct.md", (A_RUN,), left_out=("--lpips-weights",)),
    Page("how-to/other-programs.md", made=True),
    Page("how-to/use-encoder.md", (A_RUN,), left_out=("--push", "--format")),
    Page(
        "explanation/same-scan.md",
        (
            A_RUN,
            "maesil ingest data/LIDC --out test.zarr --spacing 4",
            "maesil ingest data/ct --out train.zarr --spacing 4",
        ),
        ends=(("store overlap", EXIT_REFUSED),),  # they hold the same scans
    ),
    Page("explanation/step-speed.md", (A_RUN,), steps=12),  # a profile leaves four steps alone and takes six
)
ELSEWHERE = {
    "explanation/results.md": "evaluation/test_experiment.py",
    "explanation/results-tiny.md": "evaluation/test_experiment.py",
    "how-to/datasets.md": "test_datasets.py",
    "how-to/does-it-help.md": "downstream/test_prove.py",
    "how-to/experiment.md": "evaluation/test_experiment.py",
    "how-to/nnunet.md": "downstream/test_nnunet.py",
    "how-to/object-storage.md": "cli/test_object_stores.py",
    "how-to/view.md": "cli/test_view.py",
    "reference/cli.md": "cli/test_help.py",
}
"""Tests of the commands of other pages, with options of their own."""


def chest(seed: int) -> np.ndarray:
    return np.clip(np.rint(sample_on_grid(ChestPhantom(seed).hu, SHAPE, AFFINE)), -1024, 3071).astype(np.int16)


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """Five patients, three as DICOM and two as NIfTI, under the names that the pages have for them."""
    root = tmp_path_factory.mktemp("scans")
    for seed in range(3):
        who = SeriesIdentity(patient=f"patient {seed}", study=f"study {seed}", series=f"series {seed}")
        write_dicom_series(root / "data" / "LIDC" / str(seed), chest(seed), AFFINE, who)
    for seed in range(3, 5):
        write_nifti(root / "data" / "btcv" / f"sub-{seed}.nii.gz", chest(seed), AFFINE)
    for name in ("demo/study", "data/ct", "scans"):
        shutil.copytree(root / "data" / "LIDC", root / name)
    shutil.copytree(root / "data" / "btcv", root / "data" / "nifti")
    shutil.copytree(root / "data" / "LIDC", root / "three")
    shutil.copytree(root / "data" / "btcv", root / "fourth")
    return root


@pytest.fixture
def place(scans, tmp_path, monkeypatch) -> Path:
    """A folder with links to the scans, a key and a cache of its own."""
    for name in ("data", "demo", "scans", "three", "fourth"):
        (tmp_path / name).symlink_to(scans / name)
    for name in ("CONFIG", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.delenv("MAESIL_CACHE", raising=False)
    write_whole(tmp_path / "config" / "maesil" / "identity.key", KEY, private=True)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_place(word: str, volume_id: str) -> str:
    """A word as the shell of the page's reader would give it, with places that are in the folder."""
    word = os.path.expandvars(word).replace("~/", "")
    for theirs in ("1882660a", "VOLUME_ID"):
        word = word.replace(theirs, volume_id)
    return word.removeprefix("/") if word.startswith(("/data", "/scratch")) else word


def test_every_page_with_commands_is_run_here_or_elsewhere():
    with_commands = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if commands(path)}
    here = {page.name for page in PAGES} - {"../README.md"}
    assert with_commands - {"log.md"} <= here | {*ELSEWHERE}
    assert [test for test in ELSEWHERE.values() if not (Path(__file__).parent / test).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_runs(page, place):
    volume_id = ""
    if A_RUN in page.prepared or page.made:
        store, _, volumes = labelled_store(place, 3, shape=(64, 64, 64), superpatch=64)
        store.path.rename(place / "store.zarr")
        volume_id = volumes[0].volume_id[:8]
    ran = 0
    for words in [*(one.split() for one in page.prepared), *commands(DOCS / page.name)]:
        command = " ".join(words)
        if "://" in command or any(word in command for word in page.left_out):
            continue  # no test asks another machine
        words = [in_place(word, volume_id) for word in words[1:]]
        if words[0] == "train":
            shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
            words += [*SMALL, "--steps", str(page.steps)]
        elif words[0] == "ingest":
            words += ["--workers", "0"]
        expected = next((code for start, code in page.ends if start in command), 0)
        code, out, err = run(*words)
        assert code == expected, f"{command}\n{out}\n{err}"
        ran += 1
    assert ran
