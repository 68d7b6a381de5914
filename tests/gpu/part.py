"""One part of `make gpu`, in a process of its own: what it finds is on the disk after every row.

    python -m gpu.part NAME FILE --store STORE --scratch FOLDER --seconds 60

NAME is a module beside this one. Its ``rows`` yields what it measured, a row at a time. FILE then holds
``{"state": ..., "rows": [...]}``; the state is ``done``, ``no GPU`` or ``failed: ...``, and ``running`` until then.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
NO_GPU = "no GPU"


class NoGpu(Exception):
    """A part that needs a GPU, on a machine without one."""


@dataclass(frozen=True)
class Given:
    """What a part has to work with."""

    store: Path
    scratch: Path
    """An empty folder of its own."""
    seconds: float
    """Until it is cut off."""
    started: float = field(default_factory=time.monotonic)

    @functools.cached_property
    def device(self) -> str:
        """``cuda``, or ``cpu`` where torch sees no GPU."""
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def seconds_left(self) -> float:
        """Until the part is cut off."""
        return self.started + self.seconds - time.monotonic()

    def require_gpu(self) -> None:
        """Raise NoGpu where there is none."""
        if self.device != "cuda":
            raise NoGpu


def write_json(path: Path, document: object) -> None:
    """Write a document whole, or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def run_part(name: str, given: Given, path: Path) -> str:
    """Run a part, and write what there is after every row; return its state."""
    found: list[Row] = []
    write_json(path, {"state": "running", "rows": found})
    try:
        for row in importlib.import_module(f"gpu.{name}").rows(given):
            found.append(row)
            write_json(path, {"state": "running", "rows": found})
            print(f"{name}: {told(row)}", flush=True)
        state = "done"
    except NoGpu:
        state = NO_GPU
    except Exception as error:  # whatever it was: the parts after this one stand by themselves
        traceback.print_exc()
        state = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    write_json(path, {"state": state, "rows": found})
    return state


def told(row: Row) -> str:
    """Return a row in one line."""
    if set(row) == {"what", "value"}:
        return f"{row['what']}: {row['value']}"
    return ", ".join(f"{name} {value}" for name, value in row.items() if value is not None)


def main() -> None:
    """Run the part that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("file", type=Path)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    asked = parser.parse_args()
    asked.scratch.mkdir(parents=True, exist_ok=True)
    run_part(asked.name, Given(asked.store, asked.scratch, asked.seconds), asked.file)


if __name__ == "__main__":
    main()
