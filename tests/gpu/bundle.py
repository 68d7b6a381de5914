"""One folder that runs `make gpu` on a bare machine: the source, a small synthetic store, wheels of what is missing.

    python tests/gpu/bundle.py [--out gpu-bundle] [--python 3.12]      # `make gpu-bundle`

The bare machine has Python, torch, Triton and numpy, and no network. The wheels are of the versions installed here,
for Python 3.12 on x86-64 Linux. The folder stays under 60 MB, and a folder that would not is refused.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from maesil.synthetic.demo import DemoPlan, commands, run_command, write_patient

ROOT = Path(__file__).resolve().parents[2]
STORE, WHEELS = "store.zarr", "wheels"
MOST_BYTES, WHEEL_BYTES = 60_000_000, 49_000_000
"""Of the folder, and what of it the wheels take."""
SOURCE = (
    "Makefile", "LICENSE", "pyproject.toml", "maesil", "ingest", "kernels", "cache", "tests/conftest.py", "tests/gpu",
    "tests/kernels", "tests/support", "tests/benchmarks", ":(exclude)maesil/viewer/static",
)  # fmt: skip
"""What the parts of `make gpu` are made of, without the script of the viewer (2 MB)."""
MISSING = (
    "zarr", "numcodecs", "google-crc32c", "donfig", "pyyaml", "packaging", "msgpack",  # the store
    "safetensors", "platformdirs",
    "typer", "click", "shellingham", "annotated-doc", "rich", "markdown-it-py", "mdurl", "pygments",  # the command line
    "pydantic", "pydantic-core", "annotated-types", "typing-inspection",  # what typer makes of options
    "pytest", "pluggy", "iniconfig", "hypothesis", "sortedcontainers", "pytest-xdist", "execnet",  # the tests
)  # fmt: skip
"""What torch, Triton and numpy do not bring along, of the versions that are installed here. Pictures and TensorBoard's
events are left out: they weigh 30 MB, and a run can do without."""
OTHER_VERSIONS = ("pyarrow==18.1.0",)
"""The newest with a wheel of 40 MB; later ones weigh up to 55."""
NOT_USED = ("pyarrow/include/", "pyarrow/tests/", "flight")
"""What is taken out of pyarrow's wheel, by names in it: 9 MB that nothing here imports."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
PLAN = DemoPlan(
    dicom_patients=0, nifti_patients=3, nifti_spacing=(2.0, 2.0, 2.0), extent=(256.0, 352.0, 352.0), noise_hu=0.0
)
"""Patients without noise, which no codec can make small; each somewhat larger than one superpatch of 128."""


def make_bundle(out: Path, python: str = "3.12") -> int:
    """Write the folder; return its size in bytes."""
    copy_source(out)
    make_store(out / STORE)
    fetch_wheels(out / WHEELS, python)
    size = bytes_of(out)
    if size > MOST_BYTES:
        raise SystemExit(f"{out}: expected at most {MOST_BYTES / 1e6:.0f} MB, found {size / 1e6:.1f} MB")
    return size


def bytes_of(folder: Path) -> int:
    """Return what the files of a folder weigh; links weigh nothing."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def copy_source(out: Path) -> None:
    """Copy the files that git knows, or would: links as links."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *SOURCE],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_symlink() or (ROOT / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, out / name, follow_symlinks=False)


def make_store(path: Path, plan: DemoPlan = PLAN) -> None:
    """Write the demo's patients, and ingest them."""
    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder) / "study"
        for number in range(plan.nifti_patients):
            print(write_patient(study, plan, number), flush=True)
        ingest, *_ = commands(Path(folder), plan)
        run_command(ingest, Console(soft_wrap=True, highlight=False))
        shutil.copytree(Path(folder) / STORE, path)


def fetch_wheels(folder: Path, python: str) -> None:
    """Fetch the wheels by pip, without what they need: all is named."""
    wanted = [*(f"{name}=={version(name)}" for name in MISSING), *OTHER_VERSIONS]
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version",
         python, "--implementation", "cp", *platforms, "--dest", str(folder), *wanted],
        check=True,
    )  # fmt: skip
    for wheel in folder.glob("pyarrow-*.whl"):
        make_lean(wheel)


def make_lean(wheel: Path) -> None:
    """Write a wheel anew without what is not used. `run.py` unpacks it; pip would find that files are missing."""
    lean = wheel.with_suffix(".lean")
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(lean, "w", zipfile.ZIP_DEFLATED) as kept:
        for entry in whole.infolist():
            if not any(name in entry.filename for name in NOT_USED):
                kept.writestr(entry, whole.read(entry))
    lean.replace(wheel)


def main() -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-bundle")
    parser.add_argument("--python", default="3.12", help="version of Python on the bare machine")
    asked = parser.parse_args()
    if asked.out.exists():
        shutil.rmtree(asked.out) if (asked.out / STORE).is_dir() else parser.error(
            f"{asked.out}: expected a new folder, or an earlier bundle to replace, found something else"
        )
    size = make_bundle(asked.out, asked.python)
    print(f"{asked.out}: {size / 1e6:.1f} MB; carry it to the machine with the GPU, and run `make gpu` in it")


if __name__ == "__main__":
    main()
