"""How long MONAI and nnU-Net take to preprocess one CT; run by `ingest_speed.py` in an environment of their own.

    PYTHON peer_preprocessing.py monai DICOM_FOLDER SPACING WORK
    PYTHON peer_preprocessing.py nnunet NIFTI SPACING WORK      # it reads no DICOM: the NIfTI is for nothing

Prints the seconds of three runs after one that warms up, on one thread.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

RUNS = 4


def monai(folder: Path, spacing: float, work: Path) -> list[float]:
    """Load, orient, resample, keep: what a PersistentDataset does at first sight of a case."""
    from monai.data import PersistentDataset
    from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Orientation, Spacing

    transform = Compose(
        [
            LoadImage(image_only=True, reader="PydicomReader"),
            EnsureChannelFirst(),
            Orientation(axcodes="RAS", labels=None),
            Spacing(pixdim=(spacing,) * 3, mode="bilinear"),
        ]
    )
    seconds = []
    for run in range(RUNS):
        cases = PersistentDataset([str(folder)], transform, cache_dir=work / f"monai{run}")
        started = time.perf_counter()
        shape = tuple(cases[0].shape)
        seconds.append(time.perf_counter() - started)
    print("monai shape", shape, file=sys.stderr)
    return seconds


def nnunet(nifti: Path, spacing: float, work: Path) -> list[float]:
    """The default preprocessor with this target spacing; a threshold stands for the labels it cannot do without."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(work / name)
    import SimpleITK as sitk
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    raw = work / "nnUNet_raw" / "Dataset001_CT"
    (raw / "imagesTr").mkdir(parents=True)
    (raw / "labelsTr").mkdir()
    image, label = raw / "imagesTr" / "case_0000.nii.gz", raw / "labelsTr" / "case.nii.gz"
    shutil.copy(nifti, image)
    sitk.WriteImage(sitk.Cast(sitk.ReadImage(str(nifti)) > -400, sitk.sitkUInt8), str(label))
    about = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "body": 1},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(about))
    extract_fingerprints([1], num_processes=1)
    plan_experiments([1])
    plans = json.loads((work / "nnUNet_preprocessed" / raw.name / "nnUNetPlans.json").read_text())
    plans["configurations"]["3d_fullres"]["spacing"] = [spacing] * 3
    manager = PlansManager(plans)
    preprocessor = DefaultPreprocessor(verbose=False)
    seconds = []
    for run in range(RUNS):
        started = time.perf_counter()
        preprocessor.run_case_save(
            str(work / f"out{run}"), [str(image)], str(label), manager, manager.get_configuration("3d_fullres"), about
        )
        seconds.append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    name, source, spacing, work = sys.argv[1:]
    print(json.dumps({"monai": monai, "nnunet": nnunet}[name](Path(source), float(spacing), Path(work))[1:]))
