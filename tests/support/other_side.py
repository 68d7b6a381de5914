"""Code of others that cannot live in this environment, run in one of its own: nnU-Net as of `COMMIT`.

``MAESIL_NNUNET_SOURCE`` names a checkout or snapshot of it. An environment is made of it once, in the cache folder of
this user: minutes, and what its requirements take. ``MAESIL_NNUNET_PYTHON`` names the Python of an environment that is
there already. Without either these tests are skipped. By itself,

    PYTHONPATH=.:tests python -m support.other_side SOURCE

makes the environment and prints its Python.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from maesil.locks import locked

COMMIT = "0e495086eb108ff79afe106291e8c15bd2f2bc3a"
CONTENT = "9262d6ae780bbdd324dc67aee339b0c41315b76ea596a9cf607b98dd1621b04d"
"""What `content` makes of the commit: a snapshot need not know its commit."""
PYTHON, SOURCE = (os.environ.get(f"MAESIL_NNUNET_{name}", "") for name in ("PYTHON", "SOURCE"))


def with_nnunet(test: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a test that needs nnU-Net's code: skipped without, and given the time that an environment takes."""
    reason = "MAESIL_NNUNET_PYTHON names no Python with nnU-Net, MAESIL_NNUNET_SOURCE no snapshot of its code"
    marked: Callable[..., Any] = pytest.mark.skipif(not (PYTHON or SOURCE), reason=reason)(test)
    return pytest.mark.timeout(1800)(marked)


def run_there(script: str, folder: Path, **environment: str) -> str:
    """Run a script in a folder by the other Python; return what it printed."""
    known = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **environment}
    command = [PYTHON or str(python_of(Path(SOURCE))), "-W", "ignore", "-c", script]
    done = subprocess.run(command, cwd=folder, env=known, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def python_of(source: Path) -> Path:
    """Return the Python of an environment with a snapshot's code, made where there is none yet."""
    found = content(source)
    if found != CONTENT:
        raise ValueError(f"{source}: expected the code of nnU-Net at {COMMIT[:8]}, found another (or none)")
    place = platformdirs.user_cache_path("maesil") / "tests" / f"nnunet-{found[:12]}-{sys.version_info.minor}"
    python, whole = place / "bin" / "python", place / "whole"
    with locked(place.with_suffix(".lock")):
        if not whole.exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
            copy = place / "source"  # pip writes into what it installs
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns(".git", "build", "*.egg-info"))
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", str(copy)], check=True)
            whole.touch()
    return python


def content(source: Path) -> str:
    """Return a hash over the Python files of the package and what it requires, by name and content."""
    found = hashlib.sha256()
    for path in [source / "pyproject.toml", *sorted((source / "nnunetv2").rglob("*.py"))]:
        if path.is_file():
            data = path.read_bytes()
            found.update(f"{path.relative_to(source).as_posix()} {len(data)}\n".encode() + data)
    return found.hexdigest()


if __name__ == "__main__":
    print(python_of(Path(sys.argv[1]).resolve()))
