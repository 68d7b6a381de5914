"""The whole path on a generated study: files as a hospital would export them, then the commands a user would type.

Nothing is simulated but the patients: every step after the files are written runs `maesil` as a program of its own
and prints its command line first.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import active_children, get_context
from pathlib import Path

import numpy as np
from rich.console import Console

from maesil.documents import as_json, fields_of, read_json, write_json
from maesil.errors import EXIT_INTERRUPTED, MaesilError, UsageError
from maesil.files import write_whole
from maesil.geometry import Affine
from maesil.signals import TOLD_BY_ANOTHER, interrupts_raised
from maesil.text import counted
from maesil.types import FloatArray, Spacing, Zyx

MARKER = "demo.json"
KEY_FILE = "identity.key"
KEY = hashlib.sha256(b"maesil demo").hexdigest()
"""The identity key of every demo: its patients are nobody, and the same ones are held out each time."""
_SIGINT_GRACE_S = 5.0


@dataclass(frozen=True)
class DemoPlan:
    """What the demo makes and how long it trains. Lengths in mm, axes z y x."""

    dicom_patients: int = 3
    nifti_patients: int = 2
    dicom_spacing: Spacing = (2.5, 0.9, 0.9)
    nifti_spacing: Spacing = (1.5, 1.5, 1.5)
    extent: Spacing = (220.0, 345.6, 345.6)
    noise_hu: float = 14.0
    spacing_mm: float = 2.0
    superpatch: int = 128
    workers: int = 2
    steps: int = 400
    options: tuple[str, ...] = ()
    """Further options of ``maesil train``."""


class StepFailed(MaesilError):
    """A command of the demo ended with another exit code than 0, which becomes the demo's own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_demo(out: Path, plan: DemoPlan | None = None) -> None:
    """Write the study below ``out`` and run ingest, train and evaluate on it; go on where an earlier demo stopped.

    Raises UsageError if ``out`` holds anything that no demo of the same plan wrote (it is left as it is), and
    StepFailed with the exit code of the command that failed.
    """
    plan, console, started = plan or DemoPlan(), Console(soft_wrap=True, highlight=False), time.monotonic()
    claim(out, plan)
    with interrupts_raised():  # a killed demo must not leave its command running
        _write_study(out / "study", plan, console)
        for command in commands(out, plan):
            run_command(command, console)
    console.print(f"\n{table_told(out / 'scores.json', plan.steps)}")
    console.print(f"The demo took {time.monotonic() - started:.0f} s. Scores: {out / 'scores.json'}")
    for picture in sorted((out / "evaluation").rglob("*.png")):
        console.print(f"Input, masked, reconstruction, error: {picture}")


def table_told(scores: Path, steps: int) -> str:
    """Say in words what the table of the demo shows: what its floor is, and on which side of it the model ended."""
    with fields_of(scores):
        psnr = {row["model"]: row["psnr_hidden"] for row in read_json(scores)["rows"] if row["region"] == "body"}
        above = psnr["maesil"] - psnr["interpolation"]
    side = (
        f"above it after {counted(steps, 'step')}."
        if above > 0
        else f"below it: {counted(steps, 'step')} are a few minutes. On real CT the same model passes the floor with "
        "about 1,500 steps (docs/log.md)."
    )
    return (
        "The table scores how well hidden parts of a patient that the model has not seen are filled in (PSNR: higher "
        "is better). The floor is `interpolation`: a smooth field through the visible voxels, which needs no "
        f"training. `maesil` ended {abs(above):.1f} dB {side}"
    )


def commands(out: Path, plan: DemoPlan) -> list[list[str]]:
    """Return the arguments of the `maesil` commands that a user would type after each other."""
    study, store, run = (str(out / name) for name in ("study", "store.zarr", "run"))
    spacing, superpatch, workers = f"{plan.spacing_mm:g}", str(plan.superpatch), str(plan.workers)
    ingest = ["--spacing", spacing, "--superpatch", superpatch, "--workers", workers]
    train = ["--preset", "tiny", "--steps", str(plan.steps), "--device", "cpu", *plan.options]
    scores = ["--json", str(out / "scores.json"), "--out", str(out / "evaluation")]
    return [
        ["ingest", study, "--out", store, *ingest, "--key-file", str(out / KEY_FILE)],
        ["store", "info", store],
        ["store", "verify", store],
        ["train", store, *train, "--out", run, "--resume=auto"],
        ["evaluate", run, store, "--device", "cpu", *scores],
    ]


def run_command(arguments: Sequence[str], console: Console) -> None:
    """Print and run one `maesil` command in a process of its own; StepFailed unless it ends with exit code 0."""
    line = shlex.join(["maesil", *arguments])
    console.print(f"\n$ {line}", style="bold", markup=False)
    sys.stdout.flush()
    environment = {**os.environ, TOLD_BY_ANOTHER: "1"}
    child = subprocess.Popen([sys.executable, "-m", "maesil", *arguments], env=environment)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        _end_interrupted(child)
        raise StepFailed("the demo was interrupted; the same command goes on with it", EXIT_INTERRUPTED) from None
    if code != 0:
        code = 128 - code if code < 0 else code
        raise StepFailed(f"`{line}` ended with exit code {code}; the demo stops here", code)


def _end_interrupted(child: subprocess.Popen[bytes]) -> None:
    """Wait for a command to finish what it is writing; a terminal has interrupted it too, another sender has not."""
    for number in (None, signal.SIGINT, signal.SIGKILL):
        if number is not None:
            child.send_signal(number)
        try:
            child.wait(_SIGINT_GRACE_S)
            return
        except subprocess.TimeoutExpired:
            continue


def claim(out: Path, plan: DemoPlan) -> None:
    """Make ``out`` the demo's own, or find that it is already; never touch what another program wrote."""
    marker, document = out / MARKER, as_json({"made_by": "maesil demo", "plan": asdict(plan)})
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: expected a folder for the demo, found a file; name another --out")
    if marker.exists():
        if read_json(marker) != document:
            raise UsageError(f"{out}: holds a demo made with other settings; name another --out")
        return
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out}: expected an empty or new folder for the demo, found other files; name another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / KEY_FILE, KEY, private=True)
    write_json(marker, document)


def _write_study(folder: Path, plan: DemoPlan, console: Console) -> None:
    """Write what is missing of the patients' files, two patients at a time."""
    patients = range(plan.dicom_patients + plan.nifti_patients)
    missing = [number for number in patients if not _complete(folder, number).exists()]
    if not missing:
        console.print(f"{folder}: {counted(len(patients), 'patient')}, written by an earlier demo")
        return
    console.print(
        f"Writing {folder}: {counted(plan.dicom_patients, 'patient')} as DICOM (one folder, shuffled names), "
        f"{plan.nifti_patients} as NIfTI"
    )
    # Processes of their own, started afresh: nothing of this one (threads, open files) is copied into them.
    context, count = get_context("spawn"), len(missing)
    with ProcessPoolExecutor(min(2, count), context, initializer=_leave_interrupts_to_the_parent) as pool:
        try:
            for line in pool.map(write_patient, [folder] * count, [plan] * count, missing):
                console.print(f"  {line}")
        except KeyboardInterrupt:
            for process in active_children():
                process.terminate()
            raise


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def write_patient(folder: Path, plan: DemoPlan, number: int) -> str:
    """Write one synthetic patient below ``folder`` and return a line about it; the same number, the same files."""
    from maesil.store.nifti import write_nifti
    from maesil.synthetic.dicom import SeriesIdentity, add_noise, write_dicom_series

    as_dicom = number < plan.dicom_patients
    spacing = plan.dicom_spacing if as_dicom else plan.nifti_spacing
    hu, affine = scan(number, spacing, plan.extent)
    hu = add_noise(hu, plan.noise_hu, np.random.default_rng([number, 1]))
    shape = "x".join(str(n) for n in hu.shape)
    name = f"patient-{number + 1}"
    if as_dicom:
        padding = -2000
        hu[:, outside_circle(hu.shape)] = padding
        identity = SeriesIdentity(patient=name, number=number + 1, rescale=(1.0, 0.0), padding=padding)
        write_dicom_series(folder / "dicom", hu, affine, identity, seed=number)
    else:
        # As most data sets have them: axes to the right and the front, air clipped at -1024.
        stored = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)[:, ::-1, ::-1]
        flipped = affine.copy()
        flipped[:3, 3] += affine[:3, 1:3] @ (np.array(hu.shape[1:]) - 1)
        flipped[:3, 1:3] *= -1
        write_nifti(folder / "nifti" / f"{name}.nii.gz", stored, flipped)
    write_whole(_complete(folder, number), "complete\n")
    return f"{name}: {'DICOM' if as_dicom else 'NIfTI'}, {shape} voxels of {'x'.join(f'{mm:g}' for mm in spacing)} mm"


def scan(seed: int, spacing: Spacing, extent: Spacing) -> tuple[FloatArray, Affine]:
    """Return a noiseless scan of the patient ``seed`` (HU, [z, y, x]) and its affine to LPS mm.

    Every patient lies a little elsewhere on the table, as patients do.
    """
    from maesil.synthetic.dicom import grid_affine
    from maesil.synthetic.phantom import ChestPhantom, sample_on_grid

    shape: Zyx = (int(extent[0] / spacing[0]), int(extent[1] / spacing[1]), int(extent[2] / spacing[2]))
    shift = np.random.default_rng([seed, 2]).uniform(-4.0, 4.0, 3)
    centre = np.array([0.0, 8.0, 22.0 + extent[0] / 2]) + shift
    affine = grid_affine(spacing, centre - np.array(extent)[::-1] / 2)
    return sample_on_grid(ChestPhantom(seed).hu, shape, affine), affine


def outside_circle(shape: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Return where [y, x] lies outside the round field of a reconstruction that fills the matrix."""
    y, x = (np.linspace(-1.0, 1.0, n) for n in shape[-2:])
    return np.asarray(y[:, None] ** 2 + x[None] ** 2 > 1.0)


def _complete(folder: Path, number: int) -> Path:
    """The mark that a patient's files are all there; beside the study, which holds nothing but CT."""
    return folder.with_name("written") / f"patient-{number + 1}"
