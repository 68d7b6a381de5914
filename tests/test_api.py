"""What `import maesil` offers: light to import, whole, and short to print."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
from support.stores import make_store, synthetic_hu

import maesil
from maesil.config.presets import PRESETS
from maesil.errors import NoInputError, UsageError
from maesil.ingest.options import IngestOptions
from maesil.store.nifti import write_nifti
from maesil.store.recipe import Recipe

SMALL = (
    "model.crop=32", "model.width=48", "model.depth=1", "model.decoder_width=48", "model.decoder_depth=1",
    "train.batch=2", "train.device=cpu", "train.threads=1", "train.readers=1",
)  # fmt: skip


def test_every_name_is_there_and_says_what_it_is():
    for name in maesil.__all__:
        assert name in dir(maesil)
        assert name == "__version__" or len(inspect.getdoc(getattr(maesil, name))) > 40
    with pytest.raises(AttributeError, match="no attribute 'inges'"):
        maesil.inges  # noqa: B018


def test_importing_is_light_and_ingest_is_a_function_and_a_folder():
    code = (
        "import json, sys, maesil; light = sorted({name.split('.')[0] for name in sys.modules});"
        "before = maesil.ingest; import maesil.ingest.options;"
        "print(json.dumps([light, before is maesil.ingest, callable(maesil.ingest), maesil.ingest.options.__name__]))"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    light, same, callable_, name = json.loads(told)
    assert not {"torch", "numpy", "dask", "typer"} & set(light)
    assert same and callable_ and name == "maesil.ingest.options"


def test_from_a_scan_to_a_store_with_text_for_paths(tmp_path):
    hu = synthetic_hu((40, 48, 40))
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    write_nifti(tmp_path / "scan.nii.gz", hu, affine)
    options = IngestOptions(workers=0, key_file=tmp_path / "key", cache_folder=tmp_path / "memory")
    summary = maesil.ingest(
        str(tmp_path / "scan.nii.gz"), str(tmp_path / "s"), recipe=Recipe(spacing=None, superpatch=32), options=options
    )
    assert len(summary.committed) == 1 and "committed=1" in repr(summary) and "used=1" in repr(summary)
    store = maesil.Store.open(str(tmp_path / "s"))
    (volume,) = store.volumes()
    assert repr(store) == f"Store('{tmp_path / 's'}', volumes=1, recipe='{store.recipe_hash[:12]}')"
    z, y, x = volume.shape
    assert f"{z}x{y}x{x} voxels of (1.5, 1.5, 1.5) mm" in repr(volume) and len(repr(volume)) < 100


def test_from_a_store_to_scores_with_text_for_paths(tmp_path):
    make_store(tmp_path / "s", [(32, 40, 36)] * 3)
    run = maesil.train(str(tmp_path / "s"), str(tmp_path / "r"), preset="tiny", overrides=[*SMALL, "train.steps=2"])
    assert run.steps == 2 and (tmp_path / "r" / "metrics.jsonl").exists()
    report = maesil.evaluate(str(tmp_path / "r"), str(tmp_path / "s"), device="cpu")
    told = repr(report)
    (row,) = [row for row in report.rows if row["model"] == "maesil" and row["region"] == "body"]
    assert f"body maesil {row['psnr_hidden']:.2f} dB" in told and len(told) < 600
    assert repr(maesil.SuperpatchDataset(tmp_path / "s")) == f"SuperpatchDataset('{tmp_path / 's'}', superpatches=12)"


def test_a_configuration_takes_the_place_of_preset_and_file(tmp_path):
    make_store(tmp_path / "s", [(32, 40, 36)] * 2)
    nobody = {"where": "body > 2", "overrides": SMALL}
    with pytest.raises(NoInputError, match="body > 2"):
        maesil.train(tmp_path / "s", tmp_path / "r", config=PRESETS["tiny"], **nobody)
    with pytest.raises(UsageError, match="preset"):
        maesil.train(tmp_path / "s", tmp_path / "r", preset="tiny", config=PRESETS["tiny"], **nobody)
