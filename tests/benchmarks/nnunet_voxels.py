"""One scan through nnU-Net's preprocessor and through ours: how far the encoder's voxels are apart.

    PYTHONPATH=.:tests python tests/benchmarks/nnunet_voxels.py SCAN --spacing 1.5 [--json FILE]

SCAN is a NIfTI. Both read the same file, with the axes of a store: nnU-Net turns none. ``MAESIL_NNUNET_PYTHON`` or
``MAESIL_NNUNET_SOURCE`` names nnU-Net's code, see `support.other_side`. Three rows: nothing resampled; resampled to the
spacing asked for; and the same with our voxels on nnU-Net's own grid, which it stretches to whole voxels. What is left
there is the interpolation alone. Differences are over the voxels inside the body, in the encoder's units and in HU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
from pathlib import Path

import numpy as np
from support.other_side import COMMIT, run_there

import maesil
from maesil.downstream.nnunet import ct_normalisation
from maesil.store.nifti import write_nifti
from maesil.types import MAP_CELL, Intensity

INTENSITY = Intensity((-1000.0, 1000.0), 0.4, 0.3)
"""A window and two numbers as of any encoder."""
INSIDE = 128
"""Least share of a cell inside the body, of 255."""
THERE = """
import json
import numpy as np
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

given = json.load(open("given.json"))
configuration = {
    "data_identifier": "x", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2, "patch_size": [32, 32, 32],
    "architecture": {"network_class_name": "none", "arch_kwargs": {}, "_kw_requires_import": []},
    "spacing": given["spacing"], "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False],
    "resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_seg": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
    "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
}
plans = PlansManager({
    "dataset_name": "Dataset001_X", "plans_name": "p", "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
    "image_reader_writer": "SimpleITKIO", "configurations": {"3d_fullres": configuration},
    "foreground_intensity_properties_per_channel": {"0": given["numbers"]},
})
data, facts = SimpleITKIO().read_images(["scan.nii.gz"])
out, _, facts = DefaultPreprocessor(verbose=False).run_case_npy(
    data, None, facts, plans, plans.get_configuration("3d_fullres"), {"file_ending": ".nii.gz"})
assert facts["shape_after_cropping_and_before_resampling"] == data.shape[1:], "nnU-Net cropped the scan"
np.save("there.npy", out[0])
"""
"""nnU-Net's preprocessor with the plan that it writes by default for CT, and our four numbers in it."""


def there(folder: Path, spacing: tuple[float, float, float]) -> np.ndarray:
    """Return the voxels that nnU-Net makes of ``folder/scan.nii.gz``."""
    numbers = ct_normalisation(INTENSITY)
    (folder / "given.json").write_text(json.dumps({"spacing": spacing, "numbers": numbers}))
    places = {name: str(folder) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    run_there(THERE, folder, **places)
    return np.load(folder / "there.npy")


def differences(folder: Path, spacing: tuple[float, float, float], theirs: np.ndarray) -> dict[str, float]:
    """Compare with the same scan as we read it at a spacing (mm), voxel by voxel where both have some."""
    ours = maesil.read_ct(folder / "scan.nii.gz", spacing)
    body = ours.body.repeat(MAP_CELL, 0).repeat(MAP_CELL, 1).repeat(MAP_CELL, 2) >= INSIDE  # to whole cells
    shared = tuple(slice(0, min(sizes)) for sizes in zip(ours.shape, theirs.shape, strict=True))
    low, high = INTENSITY.window
    seen = ((np.clip(ours.hu.astype(np.float64), low, high) - low) / (high - low) - INTENSITY.mean) / INTENSITY.std
    apart = np.abs(seen[shared] - theirs[shared])[body[shared]]
    hu = INTENSITY.std * (high - low)
    return {"mean": apart.mean(), "largest": apart.max(), "mean_hu": hu * apart.mean(), "largest_hu": hu * apart.max(),
            "p99_hu": hu * float(np.quantile(apart, 0.99)), "voxels": int(apart.size)}  # fmt: skip


def measured(scan: Path, spacing: float, folder: Path) -> list[dict[str, object]]:
    """Return the three rows."""
    native = maesil.read_ct(scan)
    write_nifti(folder / "scan.nii.gz", native.hu, native.affine)
    asked = (spacing,) * 3
    as_it_is, resampled = there(folder, native.spacing), there(folder, asked)
    edges = zip(native.shape, native.spacing, resampled.shape, strict=True)
    stretched = tuple(count * edge / now for count, edge, now in edges)
    cases = {
        "not resampled": (native.spacing, as_it_is),
        "resampled": (asked, resampled),
        "on nnU-Net's grid": (stretched, resampled),
    }
    facts = {"from": [round(edge, 4) for edge in native.spacing], "to": spacing}
    return [{"case": name, **facts, **differences(folder, at, given)} for name, (at, given) in cases.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scan", type=Path)
    parser.add_argument("--spacing", type=float, default=1.5, help="of the encoder (mm)")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(given.scan, given.spacing, Path(folder))
    print("| scan | case | mean | largest | mean (HU) | 99 % below (HU) | largest (HU) |\n" + "| --- " * 7 + "|")
    for row in rows:
        print(
            f"| {given.scan.name}, {row['from']} mm to {row['to']} mm | {row['case']} | {row['mean']:.2g} | "
            f"{row['largest']:.2g} | {row['mean_hu']:.2f} | {row['p99_hu']:.1f} | {row['largest_hu']:.1f} |"
        )
    if given.json:
        facts = {"nnunet": COMMIT, "machine": platform.machine(), "date": str(datetime.date.today())}
        given.json.write_text(json.dumps({**facts, "scan": given.scan.name, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
