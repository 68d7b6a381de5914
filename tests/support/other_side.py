"""Code of others that cannot live in this environment, run in one of its own.

``MAESIL_NNUNET_PYTHON`` names the Python of an environment with nnU-Net as of 0e495086, and so with
``dynamic-network-architectures`` (`pip install` of a checkout). Without it these tests are skipped.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

PYTHON = os.environ.get("MAESIL_NNUNET_PYTHON", "")
with_nnunet = pytest.mark.skipif(not PYTHON, reason="MAESIL_NNUNET_PYTHON names no Python with nnU-Net")


def run_there(script: str, folder: Path, **environment: str) -> str:
    """Run a script in a folder by the other Python; return what it printed."""
    known = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **environment}
    command = [PYTHON, "-W", "ignore", "-c", script]
    done = subprocess.run(command, cwd=folder, env=known, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
