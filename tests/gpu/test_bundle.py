"""The bundle, made and run in an environment like the machine it is for: torch, Triton and numpy, and no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from gpu import bundle, fill_pages, run
from packaging.requirements import Requirement

OF_THE_MACHINE = ("torch", "triton", "numpy")
OF_THE_WHEELS = (*bundle.MISSING, *(name.partition("==")[0] for name in bundle.OTHER_VERSIONS))


def names_of(packages: tuple[str, ...]) -> set[str]:
    """Distributions and all that they need, by name."""
    found: set[str] = set()
    coming = list(packages)
    while coming:
        name = coming.pop().lower().replace("_", "-")
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:  # for another platform, or an extra
            continue
        if name not in found:
            found.add(name)
            wanted = [Requirement(need) for need in needs]
            coming += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def laid_out(folder: Path, names: set[str]) -> Path:
    """Links to the installed files of distributions, and to nothing else."""
    folder.mkdir(parents=True)
    for name in names:
        one = distribution(name)
        for top in {path.parts[0] for path in one.files or [] if path.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(one.locate_file(top)))
    return folder


def test_a_lean_wheel_lacks_what_is_not_used_and_holds_the_rest(tmp_path):
    path = tmp_path / "pyarrow-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("pyarrow/lib.so", "pyarrow/include/a.h", "pyarrow/_flight.so", "pyarrow/tests/t.py"):
            archive.writestr(name, name)
    bundle.make_lean(path)
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["pyarrow/lib.so"] and archive.read("pyarrow/lib.so") == b"pyarrow/lib.so"


def test_the_wheels_are_all_that_the_bare_machine_lacks():
    """What the named packages need is named, or comes with torch, Triton or numpy."""
    assert names_of(OF_THE_WHEELS) <= {name.lower() for name in OF_THE_WHEELS} | names_of(OF_THE_MACHINE)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_bundle_runs_on_a_bare_machine(tmp_path):
    folder = tmp_path / "bundle"
    bundle.copy_source(folder)
    bundle.make_store(folder / bundle.STORE)
    assert bundle.bytes_of(folder) <= bundle.MOST_BYTES - bundle.WHEEL_BYTES
    venv.create(tmp_path / "bare", symlinks=True)
    machine = names_of(OF_THE_MACHINE)
    bare = laid_out(tmp_path / "of-the-machine", machine)
    (folder / run.WHEELS).mkdir()  # unpacked already: links in place of wheels
    laid_out(folder / run.PACKAGES, names_of(OF_THE_WHEELS) - machine)

    offline = ["unshare", "-rn"] if shutil.which("unshare") and not subprocess.call(["unshare", "-rn", "true"]) else []
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(bare)}
    command = [*offline, "make", "gpu", f"PYTHON={tmp_path / 'bare' / 'bin' / 'python'}"]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    document = json.loads((folder / "gpu.json").read_text(encoding="utf-8"))
    states = {name: part["state"] for name, part in document["parts"].items()}
    assert done.returncode == 0, (states, done.stdout.decode()[-3000:])
    assert states == {
        "machine": "no GPU", "correctness": "done", "kernel_speed": "no GPU", "step_speed": "done", "loader": "done",
        "training": "done",
    }  # fmt: skip
    rows = {name: part["rows"] for name, part in document["parts"].items()}
    assert {row["outcome"] for row in rows["correctness"]} == {"passed"} and len(rows["correctness"]) >= 12
    assert [row["way"] for row in rows["step_speed"] if row["preset"] == "tiny"] == ["eager"]
    assert "small, base, large: no GPU" in (folder / "gpu.md").read_text(encoding="utf-8")
    training = {row["what"]: row["value"] for row in rows["training"]}
    assert training["losses compared after the resume"] == training["of them equal to the bit"] > 0
    # The format of the pages is that of a real run.
    page = fill_pages.filled("<!-- gpu: step -->\n<!-- end -->\n<!-- gpu: kernels -->\n<!-- end -->", document)
    assert "| tiny | eager | 8 |" in page and "not been timed" in page
