"""All that a GPU has to show, in nine minutes: `make gpu`.

    python tests/gpu/run.py [--out .] [--minutes 8.6] [PART...]

Leaves ``gpu.json`` and ``gpu.md`` in the folder ``--out``; both are written anew after every row. Parts run one after
the other, each in a process of its own, so that none harms another. A part may take its own seconds and what the parts
before it left over; then it is cut off, and its rows stay. Without a GPU a part does what needs none, or says so.

In a bundle (`make gpu-bundle`) this needs Python 3.12, torch, Triton and numpy alone: the other packages come from the
bundle's wheels. Elsewhere they must be installed, and ``--store`` names a store with superpatches of 128.

Exit codes: 0 no part failed (one that needs a GPU and finds none has not failed), 1 a part failed or was cut off,
2 usage, 130 interrupted (what was found is written).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from gpu.part import NO_GPU, write_json  # noqa: E402
from gpu.report import markdown  # noqa: E402

PARTS = {"machine": 25, "correctness": 115, "kernel_speed": 90, "step_speed": 115, "loader": 40, "training": 125}
"""Seconds of each part, in the order in which they are worth most."""
WITHOUT_GPU = {"correctness": 165, "kernel_speed": 15, "step_speed": 75, "loader": 75, "training": 155}
"""The same where the first part has found no GPU."""
MINUTES = 8.6
STORE, WHEELS, PACKAGES = "store.zarr", "wheels", "site-packages"
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def environment(root: Path = ROOT) -> dict[str, str]:
    """Return the environment of the parts: the source, and in a bundle the packages that its wheels hold."""
    folders = [root, root / "tests", root / "tests" / "benchmarks"]
    if (root / WHEELS).is_dir():
        folders.append(unpacked(root / WHEELS, root / PACKAGES))
    given = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, folders), *([given] if given else [])])}


def unpacked(wheels: Path, packages: Path) -> Path:
    """Lay the packages of a folder of wheels side by side, once.

    A wheel is a zip of what belongs on Python's path, so no pip is needed.
    """
    if not packages.is_dir():
        partial = Path(tempfile.mkdtemp(dir=packages.parent, prefix=packages.name))
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(partial)
        partial.replace(packages)
    return packages


def wrong_python(wheels: Path) -> str:
    """Say which Python the wheels are for, if it is not this one; an empty string: it is."""
    made_for = {part for wheel in wheels.glob("*.whl") for part in wheel.stem.split("-") if part.startswith("cp3")}
    made_for -= {"cp3"}
    here = f"cp{sys.version_info.major}{sys.version_info.minor}"
    if not made_for or here in made_for:
        return ""
    told = ", ".join(sorted(f"{tag[2]}.{tag[3:]}" for tag in made_for if tag[3:].isdigit()))
    return f"expected Python {told}, which the wheels in {wheels} are for, found {here[2]}.{here[3:]}"


class Figures:
    """What was found up to now: one JSON and one Markdown file, written together."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.document: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "seconds": 0.0, "parts": {},
        }  # fmt: skip
        self._started = time.monotonic()

    def set(self, name: str, part: dict[str, Any]) -> None:
        """Take what a part found up to now, and write all there is."""
        parts = self.document["parts"]
        if parts.get(name) == part:
            return
        parts[name] = part
        self.document["seconds"] = round(time.monotonic() - self._started, 1)
        write_json(self._folder / "gpu.json", self.document)
        (self._folder / "gpu.md").write_text(markdown(self.document), encoding="utf-8")


def run_one(name: str, seconds: float, store: Path, scratch: Path, figures: Figures, env: dict[str, str]) -> None:
    """Run one part for so long at most; what it found is in ``figures`` at any moment."""
    path, started = scratch / f"{name}.json", time.monotonic()
    command = [
        sys.executable, "-m", "gpu.part", name, str(path), "--store", str(store), "--scratch", str(scratch / name),
        "--seconds", f"{seconds:.0f}",
    ]  # fmt: skip
    with (scratch / f"{name}.log").open("w") as log:
        child = subprocess.Popen(command, env=env, stderr=log, start_new_session=True)
        try:
            while (code := child.poll()) is None and time.monotonic() - started < seconds:
                figures.set(name, {**_read(path), "seconds": None})
                time.sleep(0.2)
        finally:
            _end(child)
    found = _read(path)
    if code is None:
        found["state"] = f"cut off after {seconds:.0f} s"
    elif found["state"] == "running":
        found["state"] = f"failed: exit code {code}: {_last_line(scratch / f'{name}.log')}"
    figures.set(name, {**found, "seconds": round(time.monotonic() - started, 1)})
    print(f"{name}: {found['state']}", flush=True)
    shutil.rmtree(scratch / name, ignore_errors=True)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a part with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"state": "running", "rows": []}


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it said nothing"


def run_all(parts: list[str], minutes: float, store: Path, out: Path) -> int:
    """Run parts in turn; return the exit code."""
    env, figures = environment(), Figures(out)  # unpacks a bundle's wheels, before the clock runs
    ends = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(dir=out, prefix="gpu-") as scratch:
        for place, name in enumerate(parts):
            first = figures.document["parts"].get("machine", {"state": ""})
            planned = WITHOUT_GPU if first["state"] == NO_GPU else PARTS
            kept_for_later = sum(planned[later] for later in parts[place + 1 :])
            seconds = ends - time.monotonic() - kept_for_later
            run_one(name, max(5.0, seconds), store, Path(scratch), figures, env)
    states = [part["state"] for part in figures.document["parts"].values()]
    return EXIT_FAILED if any(state not in ("done", NO_GPU) for state in states) else 0


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of gpu.json and gpu.md")
    parser.add_argument("--store", type=Path, default=ROOT / STORE)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    asked = parser.parse_args()
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(PARTS)}")
    if told := wrong_python(ROOT / WHEELS):
        parser.error(told)
    if not asked.store.is_dir():
        parser.error(f"{asked.store}: expected a store, found none; `make gpu-bundle` makes a folder that has one")
    asked.out.mkdir(parents=True, exist_ok=True)
    try:
        code = run_all([name for name in PARTS if not asked.parts or name in asked.parts], asked.minutes,
                       asked.store.resolve(), asked.out)  # fmt: skip
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    print(f"{asked.out / 'gpu.json'} and {asked.out / 'gpu.md'} are written")
    return code


if __name__ == "__main__":
    sys.exit(main())
