"""What a run leaves out where packages for pictures and TensorBoard are not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.stores import make_store

from maesil.installed import EVENTS, PICTURES, not_installed

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = "matplotlib,PIL,tensorboard,pydicom,nibabel,SimpleITK,dask,distributed"
"""And what reads CT: a store is trained on without."""
WITHOUT = """
import importlib.util
import sys

hidden, find_spec = sys.argv.pop(1).split(","), importlib.util.find_spec

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

importlib.util.find_spec = lambda name, *of: None if name in hidden else find_spec(name, *of)
sys.meta_path.insert(0, Hidden())
from maesil.cli import main
sys.exit(main())
"""
"""The command line, as if packages were not there."""


def test_the_first_that_is_missing_is_named():
    assert not_installed(PICTURES) == not_installed(EVENTS) == ""
    assert not_installed(("json", "no_such_package", "another")) == "no_such_package"


@pytest.mark.slow
def test_commands_do_all_but_pictures_and_tensorboard(tmp_path):
    make_store(tmp_path / "store.zarr", [(64, 64, 64)] * 3, superpatch=64)
    run, store = str(tmp_path / "run"), str(tmp_path / "store.zarr")
    sizes = ["model.crop=32", "model.width=48", "model.depth=1", "model.decoder_width=48", "train.validation=0"]
    options = [word for size in sizes for word in ("--set", size)]
    said = []
    for command in (
        ["train", store, "--preset", "tiny", "--steps", "2", "--batch", "2", "--device", "cpu", "--out", run, *options],
        ["evaluate", run, store, "--device", "cpu", "--volumes", "all"],
        ["features", run, store, "--device", "cpu", "--out", str(tmp_path / "features.parquet")],
    ):
        words = [sys.executable, "-c", WITHOUT, HIDDEN, *command]
        done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        said.append(done.stdout)
    assert "no pictures: matplotlib is not installed" in said[0] and "no pictures" in said[1]
    assert "no log for TensorBoard: tensorboard is not installed" in said[0]
    assert not list(tmp_path.rglob("*.png")) and not (tmp_path / "run" / "tensorboard").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    rows = json.loads((tmp_path / "run" / "evaluation" / "scores.json").read_text())["rows"]
    assert rows and (tmp_path / "features.parquet").exists()
