"""Experiment trackers behind one small interface: TensorBoard, W&B and MLflow.

They are told numbers and options. Nobody tells them a path, a command line or a line that the run printed: a folder
may bear the name of a patient. Where they send it is their own affair (``WANDB_*``, ``MLFLOW_*``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from maesil.config.schema import TrackerName
from maesil.errors import UsageError
from maesil.installed import EVENTS, MLFLOW, WANDB, not_installed
from maesil.training.log import Outcome, Record

PROJECT = "maesil"
"""Project of W&B and experiment of MLflow, where their own variables name none."""
_NEEDS = {"tensorboard": EVENTS, "wandb": WANDB, "mlflow": MLFLOW}
_SECONDS = 30
"""How long one request to a server may take."""


@dataclass(frozen=True)
class Told:
    """What a tracker is told of a run before its first step."""

    name: str
    parameters: dict[str, dict[str, Any]]
    """Options and facts, by section and name."""
    step: int
    """Steps done before."""

    def flat(self) -> dict[str, str]:
        """Return the parameters as texts by ``section.name``."""
        return {
            f"{section}.{name}": str(value)
            for section, values in self.parameters.items()
            for name, value in values.items()
        }


class Tracker(Protocol):
    """A run in a tracker, from its opening on. Any method may raise whatever its package raises."""

    run: str
    """By which the tracker knows the run again; empty where the folder says it."""
    place: str
    """Where to look, in words."""

    def write(self, records: Sequence[Record]) -> None:
        """Add records, in the order of their steps."""

    def close(self, outcome: Outcome) -> None:
        """Say how the run ended, and wait until all is delivered."""


def require_tracker(name: TrackerName) -> None:
    """Raise UsageError where the package of a tracker is missing; without TensorBoard's a run only says so."""
    missing = not_installed(_NEEDS[name])
    if missing and name != "tensorboard":
        raise UsageError(
            f"train.tracker={name}: expected the package {missing}, found none; pip install 'maesil[{name}]'"
        )


def open_tracker(name: TrackerName, out: Path, told: Told, run: str) -> Tracker | None:
    """Open a run in a tracker, or the one that is known as ``run``; None where TensorBoard is not installed."""
    if not_installed(_NEEDS[name]):
        return None
    openers: dict[TrackerName, Callable[[Path, Told, str], Tracker]] = {
        "tensorboard": _TensorBoard,
        "wandb": _WandB,
        "mlflow": _MLflow,
    }
    return openers[name](out, told, run)


class _TensorBoard:
    """Event files in ``RUN/tensorboard``."""

    def __init__(self, out: Path, told: Told, run: str) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second to import, and only training needs it

        self.run, self.place = run, ""
        self._events = SummaryWriter(str(out / "tensorboard"), purge_step=told.step + 1)
        rows = "".join(f"| {name} | {value} |\n" for name, value in told.flat().items())
        self._events.add_text("parameters", f"| name | value |\n| --- | --- |\n{rows}", told.step)

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            for name, value in _measured(record).items():
                self._events.add_scalar(name, value, int(record["step"]))

    def close(self, outcome: Outcome) -> None:
        self._events.close()


class _WandB:
    """A run of Weights & Biases; its files lie in ``RUN/wandb``."""

    _EXIT_CODES: ClassVar[dict[Outcome, int]] = {"finished": 0, "interrupted": 130, "failed": 1}

    def __init__(self, out: Path, told: Told, run: str) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read as the package is imported
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run or None,
            resume="allow",
            name=told.name,
            dir=str(out),
            config=told.parameters,
            allow_val_change=True,  # what a resumed run may change
            settings=wandb.Settings(
                # By itself it would send the command line, what is printed, the machine, the packages, the code.
                console="off", x_disable_meta=True, x_disable_machine_info=True, x_disable_stats=True,
                x_save_requirements=False, disable_git=True, disable_code=True, save_code=False,
                silent=True, login_timeout=_SECONDS, init_timeout=_SECONDS, finish_timeout=_SECONDS,
            ),
        )  # fmt: skip
        self.run = self._run.id
        self.place = f"W&B: run {self.run}, " + (
            f"offline, `wandb sync {Path(self._run.dir).parent}` sends it" if self._run.offline else str(self._run.url)
        )

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            self._run.log(_measured(record), step=int(record["step"]), commit=True)

    def close(self, outcome: Outcome) -> None:
        self._run.finish(exit_code=self._EXIT_CODES[outcome])


class _MLflow:
    """A run of MLflow, wherever ``MLFLOW_TRACKING_URI`` says."""

    _STATUS: ClassVar[dict[Outcome, str]] = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
    _AT_ONCE = 100
    """Parameters that a server takes in one request; of metrics it takes 1000."""

    def __init__(self, out: Path, told: Told, run: str) -> None:
        for name, value in (("DISABLE_TELEMETRY", "true"), ("HTTP_REQUEST_MAX_RETRIES", "2"),
                            ("HTTP_REQUEST_TIMEOUT", str(_SECONDS)), ("LOGGING_LEVEL", "WARNING")):  # fmt: skip
            os.environ.setdefault(f"MLFLOW_{name}", value)
        from mlflow.tracking import MlflowClient

        self._client, self._experiment = MlflowClient(), os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        self.run = run or self._client.create_run(self._experiment_id(), run_name=told.name).info.run_id
        self._client.update_run(self.run, status="RUNNING")
        self._tell(told.flat())
        self.place = f"MLflow: run {self.run} of experiment {self._experiment}"

    def _experiment_id(self) -> str:
        known = self._client.get_experiment_by_name(self._experiment)
        return known.experiment_id if known else self._client.create_experiment(self._experiment)

    def _tell(self, parameters: dict[str, str]) -> None:
        """Record parameters. A parameter never changes there: what a resumed run changed becomes a tag of its name."""
        from mlflow.entities import Param, RunTag

        before = self._client.get_run(self.run).data.params
        new = [Param(name, value) for name, value in parameters.items() if name not in before]
        changed = [RunTag(name, value) for name, value in parameters.items() if before.get(name, value) != value]
        for first in range(0, len(new), self._AT_ONCE):
            self._client.log_batch(self.run, params=new[first : first + self._AT_ONCE])
        self._client.log_batch(self.run, tags=changed)

    def write(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for record in records:
            values = [Metric(name, value, now, int(record["step"])) for name, value in _measured(record).items()]
            self._client.log_batch(self.run, metrics=values)

    def close(self, outcome: Outcome) -> None:
        self._client.set_terminated(self.run, self._STATUS[outcome])


def _measured(record: Record) -> Record:
    return {name: value for name, value in record.items() if name != "step"}
