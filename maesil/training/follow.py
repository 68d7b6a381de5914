"""A run and its tracker: opened with what may be told, written to beside the steps, left behind where it fails."""

from __future__ import annotations

from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from rich.console import Console

from maesil.config.toml import to_document
from maesil.documents import fields_of, read_json, write_json
from maesil.training.log import METRICS, Outcome, Record, read_metrics
from maesil.training.trackers import Told, Tracker, open_tracker
from maesil.training.trainer import Trainer
from maesil.version import __version__

TRACKER = "tracker.json"
"""Beside the checkpoint: which tracker knows the run, by which name, and the last step that it was told."""
_TEXTS = ("stage", "where")
"""Options of training whose text could name a folder or a patient: a tracker learns only that they are set."""
_PATIENCE = 60.0
"""Seconds that a run waits at its end for what is not yet delivered."""


class Follower:
    """A tracker behind a queue: a thread writes to it, so that one that is slow or fails costs no step.

    Records up to step ``sent`` are left out: the tracker has them from before the run was cut off.
    """

    def __init__(self, tracker: Tracker, sent: int, console: Console) -> None:
        self._tracker, self._sent, self._console = tracker, sent, console
        self._queue: SimpleQueue[Record | Outcome] = SimpleQueue()
        self._thread = Thread(target=self._work, name="maesil-tracker", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        """Have a record written, soon."""
        if record["step"] > self._sent:
            self._queue.put(record)

    def close(self, outcome: Outcome) -> None:
        """Have the run ended as it did; wait for that, but not forever."""
        self._queue.put(outcome)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            self._console.print(f"the tracker did not answer in {_PATIENCE:.0f} s: some records may be missing there")

    def _work(self) -> None:
        try:
            while True:
                records, outcome = self._waiting()
                if records:
                    self._tracker.write(records)
                if outcome:
                    return self._tracker.close(outcome)
        except Exception as error:  # a server that is down, a full disk, a limit of theirs: whatever they raise
            failed(error, self._console)

    def _waiting(self) -> tuple[list[Record], Outcome | None]:
        """Wait for a record; return all that are there, and how the run ended if it did."""
        records: list[Record] = []
        item = self._queue.get()
        while not isinstance(item, str):
            records.append(item)
            if self._queue.empty():
                return records, None
            item = self._queue.get()
        return records, item


def follow(trainer: Trainer, out: Path, console: Console) -> Follower | None:
    """Open the tracker of a run, before its metrics are cut to its checkpoint; None, and a line, where that fails."""
    name = trainer.config.train.tracker
    run, sent = _known(out, name)
    try:
        tracker = open_tracker(name, out, told(trainer, out.resolve().name), run)
    except Exception as error:
        failed(error, console)
        return None
    if tracker is None:
        return None
    if name == "tensorboard":  # its folder says which run it is, and it drops later steps itself
        return Follower(tracker, trainer.step, console)
    write_json(out / TRACKER, {"tracker": name, "run": tracker.run, "sent": sent})
    console.print(f"followed by {tracker.place}", highlight=False, markup=False, soft_wrap=True)
    return Follower(tracker, sent, console)


def told(trainer: Trainer, name: str) -> Told:
    """Return what a tracker is told: every option that is no free text, and what the run was found to be."""
    options = to_document(trainer.config)
    for text in _TEXTS:
        options["train"][text] = bool(options["train"][text])
    facts: dict[str, Any] = {
        "maesil": __version__,
        "patients": len(trainer.split.train),
        "held_out": len(trainer.split.validation) + len(trainer.split.test),
        "model_parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "stores": len(trainer.store_fingerprints),
        "store_fingerprints": list(trainer.store_fingerprints),
        "ranks": trainer.ranks.count,
        "device": trainer.device.type,
    }
    return Told(name, {**options, "run": facts}, trainer.step)


def failed(error: Exception, console: Console) -> None:
    """Say that the tracker is left behind."""
    reason = " ".join(str(error).split())[:200]
    told = f"the tracker failed and is left behind ({type(error).__name__}: {reason})"
    console.print(f"{told}; training goes on, {METRICS} has all", highlight=False, markup=False, soft_wrap=True)


def _known(out: Path, name: str) -> tuple[str, int]:
    """Return by which name a tracker knows the run in a folder, and the last step that it was told; else none."""
    if not (out / TRACKER).exists():
        return "", 0
    document = read_json(out / TRACKER)
    with fields_of(out / TRACKER):
        known, run, sent = document["tracker"], str(document["run"]), int(document["sent"])
    if known != name:
        return "", 0
    records = read_metrics(out / METRICS) if (out / METRICS).exists() else []
    return run, max([sent, *(int(record["step"]) for record in records)])
