"""What each output head costs and leaves of the patch grid: trained alike, scored on another store's patients.

    python tests/benchmarks/compare_heads.py TRAIN_STORE TEST_STORE --steps 250

Prints the table of ``docs/explanation/heads.md``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console

from maesil.config.schema import HEADS
from maesil.config.toml import load_config
from maesil.evaluation.evaluate import evaluate
from maesil.training.train import train


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("train_store", type=Path)
    parser.add_argument("test_store", type=Path)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--set", nargs="*", default=[], help="further options, as of `maesil train --set`")
    given = parser.parse_args()
    print("| head | seconds | PSNR hidden (dB) | border ratio | seam ratio |\n|" + " --- |" * 5)
    for head in HEADS:
        options = [f"model.head={head}", f"train.steps={given.steps}", *given.set]
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            summary = train([given.train_store], load_config("tiny", None, options), run, console=Console(quiet=True))
            report = evaluate(run, given.test_store)
        row = next(row for row in report.rows if (row["model"], row["region"]) == ("maesil", "body"))
        seams = [r["seam_ratio"] for r in report.per_volume if (r["model"], r["region"]) == ("maesil", "body")]
        seam = sum(seams) / len(seams)
        scores = f"{row['psnr_hidden']:.2f} | {row['border_ratio']:.2f} | {seam:.2f}"
        print(f"| `{head}` | {summary.seconds:.0f} | {scores} |", flush=True)


if __name__ == "__main__":
    main()
