"""The demo: its study, its own folder, and the whole path at a size for tests."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from rich.console import Console
from support.lanes import slow_but

from maesil.documents import write_json
from maesil.errors import UsageError
from maesil.geometry import to_nifti
from maesil.ingest.privacy import load_or_create_key
from maesil.synthetic.demo import (
    DemoPlan,
    StepFailed,
    claim,
    commands,
    run_command,
    run_demo,
    scan,
    table_told,
    write_patient,
)

SMALL = DemoPlan(
    dicom_patients=2,
    nifti_patients=1,
    dicom_spacing=(9.0, 5.0, 5.0),
    nifti_spacing=(8.0, 5.0, 5.0),
    extent=(180.0, 345.6, 345.6),
    spacing_mm=6.0,
    superpatch=64,
    workers=0,
    steps=2,
    options=("--batch", "1", "--set", "model.crop=32", "--set", "model.width=32", "--set", "model.depth=1"),
)


def test_the_study_is_one_folder_of_shuffled_slices(tmp_path: Path) -> None:
    for number in range(3):
        write_patient(tmp_path / "study", SMALL, number)
    slices = [pydicom.dcmread(path) for path in sorted((tmp_path / "study" / "dicom").iterdir())]
    assert len(slices) == 2 * 20
    assert len({data.SeriesInstanceUID for data in slices}) == len({data.PatientID for data in slices}) == 2
    heights = [float(data.ImagePositionPatient[2]) for data in slices]
    assert heights != sorted(heights)
    assert all(data.pixel_array[0, 0] == data.PixelPaddingValue == -2000 for data in slices)


def test_the_nifti_lies_where_the_phantom_lies(tmp_path: Path) -> None:
    write_patient(tmp_path / "study", SMALL, 2)
    (path,) = (tmp_path / "study").rglob("*.nii.gz")
    image = nib.load(path)
    hu, affine = scan(2, SMALL.nifti_spacing, SMALL.extent)
    index = np.array([9, 30, 21, 1])  # z y x
    i, j, k = np.rint(np.linalg.inv(image.affine) @ (to_nifti(affine) @ index[[2, 1, 0, 3]]))[:3].astype(int)
    assert abs(float(image.dataobj[i, j, k]) - hu[9, 30, 21]) < 6 * SMALL.noise_hu
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")


def test_a_patient_is_written_the_same_again(tmp_path: Path) -> None:
    for name in "ab":
        write_patient(tmp_path / name / "study", SMALL, 0)
    first, second = (sorted((tmp_path / name / "study").rglob("*.dcm")) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_the_table_is_told_with_its_floor(tmp_path: Path) -> None:
    def told(maesil: float) -> str:
        rows = [
            {"model": model, "region": region, "psnr_hidden": psnr if region == "body" else 99.0}
            for region in ("whole", "body")
            for model, psnr in (("maesil", maesil), ("mean", 13.0), ("interpolation", 21.5))
        ]
        write_json(tmp_path / "scores.json", {"rows": rows})
        return table_told(tmp_path / "scores.json", 400)

    assert "ended 1.3 dB below it" in told(20.2) and "400 steps" in told(20.2)
    assert "ended 0.5 dB above it" in told(22.0)


@pytest.mark.slow
def test_the_whole_demo_and_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    run_demo(out, SMALL)
    printed = capfd.readouterr().out
    typed = [line.split() for line in printed.splitlines() if line.startswith("$ ")]
    assert [words[2] for words in typed] == ["ingest", "store", "store", "train", "evaluate"]
    rows = json.loads((out / "scores.json").read_text())["rows"]
    assert {"maesil", "mean", "interpolation"} <= {row["model"] for row in rows}
    assert printed.count("The table scores") == 1 and "The floor is `interpolation`" in printed
    pictures = [line.rsplit(" ", 1)[1] for line in printed.splitlines() if line.endswith(".png")]
    assert pictures and all(Path(picture).stat().st_size > 1000 for picture in pictures)

    # Again, with a store damaged in between: the study is kept, and the failing command ends the demo.
    written = {path: path.stat().st_mtime_ns for path in (out / "study").rglob("*")}
    (out / "store.zarr" / "zarr.json").write_text("{}")
    with pytest.raises(StepFailed, match="maesil ingest") as failed:
        run_demo(out, SMALL)
    assert failed.value.exit_code == 4
    assert "written by an earlier demo" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (out / "study").rglob("*")} == written


def test_every_demo_holds_out_the_same_patient(tmp_path: Path) -> None:
    """Splits go by hashes with the key alone, and the ingest is given the one that lies there."""
    hashes = set()
    for name in "ab":
        claim(tmp_path / name, SMALL)
        words = commands(tmp_path / name, SMALL)[0]
        key = Path(words[words.index("--key-file") + 1])
        assert key.stat().st_mode & 0o777 == 0o600
        hashes.add(load_or_create_key(key).hash("group", "patient-1"))
    assert len(hashes) == 1


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("draft")
    with pytest.raises(UsageError, match="other files"):
        run_demo(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("draft")
    with pytest.raises(UsageError, match="found a file"):
        run_demo(tmp_path / "out", SMALL)


def test_a_demo_of_another_plan_is_left_alone(tmp_path: Path) -> None:
    marker = tmp_path / "demo.json"
    marker.write_text("{}")
    with pytest.raises(UsageError, match="other settings"):
        run_demo(tmp_path, SMALL)
    assert marker.read_text() == "{}"


def test_a_failing_command_ends_the_demo_with_its_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StepFailed, match=r"store info.*exit code 4") as failed:
        run_command(["store", "info", str(tmp_path)], Console())
    assert failed.value.exit_code == 4
    assert "$ maesil store info" in capfd.readouterr().out


@pytest.mark.parametrize("number", slow_but((signal.SIGINT, signal.SIGTERM), (signal.SIGINT,)))
def test_an_interrupt_ends_the_demo_and_its_command(tmp_path: Path, number: signal.Signals) -> None:
    """The signal reaches the outer program alone, which hands it on; nothing is left running.

    The command run is a demo itself: it has patients to write for far longer than this test takes.
    """
    script = (
        "import sys; import maesil.synthetic.demo as demo; from maesil.signals import interrupts_raised\n"
        "from rich.console import Console\n"
        "demo._SIGINT_GRACE_S = 0.5\n"
        "try:\n with interrupts_raised(): demo.run_command(sys.argv[1:], Console())\n"
        "except demo.StepFailed as stop: print(stop, flush=True); sys.exit(stop.exit_code)\n"
    )
    command = [sys.executable, "-c", script, "demo", "--out", str(tmp_path / "inner")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        while "Writing" not in demo.stdout.readline():
            pass
        time.sleep(0.5)
        demo.send_signal(number)
        printed, told = demo.communicate(timeout=30)  # ends only when every process has let go of the pipe
    assert demo.returncode == 130
    assert (printed + told).count("interrupted") == 1  # the command within would say something else
    assert not list((tmp_path / "inner").rglob("written/*"))
