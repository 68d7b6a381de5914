"""Trackers, each read back from its own files: what they are told, what they never learn, and what happens without."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from types import SimpleNamespace

import pytest
from rich.console import Console
from support.lanes import slow_but
from support.runs import interrupted_after
from support.stores import make_store
from support.training import CONFIG, metrics, run, with_train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maesil.config.schema import TRACKERS
from maesil.documents import write_json
from maesil.errors import UsageError
from maesil.installed import not_installed
from maesil.store.store import Store
from maesil.training import trackers
from maesil.training.follow import TRACKER, Follower, _known
from maesil.training.log import METRICS, NoLog, RunLog
from maesil.training.train import _log

PATIENT = "Mustermann_Erika"
"""Folders bear this name here; no tracker may."""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp(PATIENT) / f"{PATIENT}.zarr"
    make_store(path, [(32, 40, 36), (40, 32, 33), (32, 32, 48)], superpatch=32)
    return path


@pytest.fixture
def database(tmp_path, monkeypatch) -> str:
    """A file of this machine that MLflow writes to."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri := f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return uri


@pytest.fixture
def offline(monkeypatch):
    for name in [one for one in os.environ if one.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")


NAMES = ("loss", "lr", "validation_psnr", "encoder_gain_db")


def points(out: Path) -> dict[str, list[tuple[int, float]]]:
    """What the metrics of a run hold under some names, by step."""
    held = metrics(out)
    return {name: [(one["step"], pytest.approx(one[name], rel=1e-6)) for one in held if name in one] for name in NAMES}


class TensorBoard:
    """What lies in the event files of a run."""

    def __init__(self, out: Path) -> None:
        self._events = EventAccumulator(str(out / "tensorboard")).Reload()
        self._out = out

    def points(self) -> dict[str, list[tuple[int, float]]]:
        return {name: [(one.step, one.value) for one in self._events.Scalars(name)] for name in NAMES}

    def parameters(self) -> dict[str, str]:
        (text, *_) = self._events.Tensors("parameters/text_summary")
        rows = text.tensor_proto.string_val[0].decode().splitlines()[2:]
        return dict(
            row.strip("| ").split(" | ", 1) if not row.endswith("|  |") else (row.split()[1], "") for row in rows
        )

    def everything(self) -> bytes:
        return b"".join(path.read_bytes() for path in (self._out / "tensorboard").rglob("events*"))


class MLflow:
    """What lies in the database of MLflow."""

    def __init__(self, out: Path) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        (experiment,) = [one for one in self._client.search_experiments() if one.name == "maesil"]
        (self.run,) = self._client.search_runs([experiment.experiment_id])

    def points(self) -> dict[str, list[tuple[int, float]]]:
        return {
            name: [(one.step, one.value) for one in self._client.get_metric_history(self.run.info.run_id, name)]
            for name in NAMES
        }

    def parameters(self) -> dict[str, str]:
        return dict(self.run.data.params)

    def everything(self) -> bytes:
        return Path(os.environ["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///")).read_bytes()


class WandB:
    """What lies in the files of W&B, which `wandb sync` sends as they are."""

    def __init__(self, out: Path) -> None:
        import wandb

        wandb.teardown()  # its process has written all once it has ended
        self._files = sorted((out / "wandb").glob("*run-*/*.wandb"))
        self._records = [record for path in self._files for record in _wandb_records(path)]

    def points(self) -> dict[str, list[tuple[int, float]]]:
        found: dict[str, list[tuple[int, float]]] = {name: [] for name in NAMES}
        for record in self._records:
            items = {one.key or one.nested_key[0]: json.loads(one.value_json) for one in record.history.item}
            for name in found.keys() & items.keys():
                found[name].append((record.history.step.num, items[name]))
        return found

    def parameters(self) -> dict[str, str]:
        updates = [one for record in self._records for one in (*record.run.config.update, *record.config.update)]
        given = {one.key: json.loads(one.value_json) for one in updates if one.key in ("model", "mask", "train", "run")}
        return {f"{section}.{name}": str(value) for section, values in given.items() for name, value in values.items()}

    def ids(self) -> set[str]:
        return {record.run.run_id for record in self._records if record.run.run_id}

    def everything(self) -> bytes:
        return b"".join(path.read_bytes() for path in self._files)


def _wandb_records(path: Path):
    """The records of a file of W&B: 7 bytes, then chunks with headers of 7 bytes, in blocks of 32 KiB as in LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(parts)
            parts = b""


READ = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}


@pytest.mark.parametrize("name", slow_but(READ, ("tensorboard", "wandb")))
def test_each_tracker_holds_the_metrics_the_options_and_no_name_of_a_folder(store, tmp_path, database, offline, name):
    out = tmp_path / PATIENT / "run-7"
    config = with_train(tracker=name, where="group != 'Mustermann_Erika'", stage=str(tmp_path / PATIENT / "stage"))
    _, printed = run(store, out, config)
    read = READ[name](out)
    assert read.points() == points(out) and len(read.points()["loss"]) == 8
    parameters = read.parameters()
    expected = {"model.width": "16", "train.lr": str(CONFIG.train.lr), "train.tracker": name, "train.where": "True",
                "train.stage": "True", "run.patients": "2", "run.held_out": "1", "run.stores": "1", "run.ranks": "1",
                "run.store_fingerprints": str([Store.open(store).fingerprint])}  # fmt: skip
    assert expected.items() <= parameters.items()
    assert PATIENT.encode() not in read.everything() and b"Mustermann" not in read.everything()
    assert str(tmp_path).encode() not in read.everything() or name == "mlflow"  # its own place for artifacts
    assert len(re.findall("^followed by", printed, re.MULTILINE)) == (name != "tensorboard")
    assert "failed" not in printed


@pytest.mark.parametrize("name", slow_but(READ, ("tensorboard",)))
def test_a_resumed_run_goes_on_where_the_tracker_knows_it_and_no_step_is_doubled(
    store, tmp_path, database, offline, name
):
    out = tmp_path / "run"
    interrupted_after(5, [store], with_train(tracker=name), out)
    shutil.copy(out / "checkpoint.pt", tmp_path / "checkpoint.pt")  # of step 5
    run(store, out, with_train(tracker=name, steps=7, checkpoint_every=100), resume=True)
    # As if killed later: the tracker and the metrics are beyond the checkpoint.
    shutil.copy(tmp_path / "checkpoint.pt", out / "checkpoint.pt")
    _, printed = run(store, out, with_train(tracker=name, lr=1e-4), resume=True)
    read = READ[name](out)
    steps = [step for step, _ in read.points()["loss"]]
    assert steps == list(range(1, 9)) and "failed" not in printed
    assert [one["step"] for one in metrics(out)] == steps
    if name == "wandb":
        assert len(read.ids()) == 1 and read.parameters()["train.lr"] == "0.0001"
    if name == "mlflow":
        assert read.run.data.tags["train.lr"] == "0.0001" and read.run.info.status == "FINISHED"
        assert read.parameters()["train.lr"] == str(CONFIG.train.lr)


def test_what_a_tracker_was_told_is_known_after_a_second_kill(tmp_path):
    assert _known(tmp_path, "mlflow") == ("", 0)
    write_json(tmp_path / TRACKER, {"tracker": "mlflow", "run": "r", "sent": 12})
    assert _known(tmp_path, "mlflow") == ("r", 12)
    for last, sent in ((10, 12), (15, 15)):  # killed again before, and beyond, where it was killed first
        (tmp_path / METRICS).write_text("".join(f'{{"step": {step}}}\n' for step in range(1, last + 1)))
        assert _known(tmp_path, "mlflow") == ("r", sent)
    assert _known(tmp_path, "wandb") == ("", 0)  # another one begins


@pytest.mark.parametrize("name", TRACKERS[1:])
def test_a_package_that_is_missing_is_refused_before_anything_is_written(store, tmp_path, monkeypatch, name):
    monkeypatch.setattr(trackers, "_NEEDS", {**trackers._NEEDS, name: ("no_such_package",)})
    with pytest.raises(
        UsageError, match=rf"train\.tracker={name}: expected the package no_such_package, .*maesil\[{name}\]"
    ):
        run(store, tmp_path / "run", with_train(tracker=name))
    assert not (tmp_path / "run").exists() and UsageError.exit_code == 2


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not_installed(("no_such_package",)) == "no_such_package"


def test_a_server_that_is_not_there_costs_one_line(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    summary, printed = run(store, tmp_path / "run", with_train(tracker="mlflow"))
    told = [line for line in printed.splitlines() if "tracker" in line]
    assert len(told) == 1 and "left behind" in told[0] and "training goes on" in told[0]
    assert summary.steps == len(metrics(tmp_path / "run")) == 8


class Breaking:
    """A tracker that takes some records and then fails, or never answers."""

    run = place = ""

    def __init__(self, records: int, answers: bool = True) -> None:
        self.taken: list[float] = []
        self.closed, self.release = "", threading.Event()
        self._records, self._answers = records, answers

    def write(self, records) -> None:
        for record in records:
            if len(self.taken) == self._records:
                self._answers or self.release.wait(30)
                raise ConnectionError(f"no way to {'x' * 1000}\nanymore")
            self.taken.append(record["step"])

    def close(self, outcome) -> None:
        self.closed = outcome


def test_a_tracker_that_fails_on_the_way_is_left_behind_with_one_line():
    console, tracker = Console(file=io.StringIO(), width=1000), Breaking(2)
    follower = Follower(tracker, 3, console)
    for step in range(1, 9):
        follower.write({"step": step, "loss": 1.0})
    follower.close("finished")
    told = console.file.getvalue()
    assert tracker.taken == [4, 5] and tracker.closed == ""
    assert told.count("\n") == 1 and "ConnectionError: no way to" in told and len(told) < 400


def test_a_tracker_that_does_not_answer_costs_no_step_and_ends_no_run(monkeypatch):
    monkeypatch.setattr("maesil.training.follow._PATIENCE", 0.2)
    console, tracker = Console(file=io.StringIO(), width=1000), Breaking(0, answers=False)
    follower, began = Follower(tracker, 0, console), time.monotonic()
    for step in range(1, 1001):
        follower.write({"step": step})
    follower.close("failed")
    assert "did not answer" in console.file.getvalue() and time.monotonic() - began < 20
    tracker.release.set()


@pytest.mark.parametrize(
    "error, outcome", [(None, "finished"), (KeyboardInterrupt, "interrupted"), (OSError, "failed")]
)
def test_a_tracker_learns_how_the_run_ended(tmp_path, error, outcome):
    tracker = Breaking(9)
    follower = Follower(tracker, 0, quiet := Console(file=io.StringIO()))
    with pytest.raises(error) if error else nullcontext(), RunLog(tmp_path, 0, 1, quiet, follower) as log:
        log.write({"step": 1, "loss": 1.0})
        if error:
            raise error
    assert tracker.taken == [1] and tracker.closed == outcome


def test_other_ranks_than_the_first_open_no_tracker(monkeypatch, tmp_path):
    monkeypatch.setattr("maesil.training.train.follow", lambda *_: pytest.fail("a second rank opened a tracker"))
    second = SimpleNamespace(ranks=SimpleNamespace(first=False))
    assert isinstance(_log(second, tmp_path, Console()), NoLog)


class Calls(ThreadingTCPServer):
    """A server that counts who connects, and hangs up."""

    daemon_threads = allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), StreamRequestHandler)
        self.calls = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def process_request(self, request, client_address) -> None:
        self.calls += 1
        self.shutdown_request(request)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("mode, asked", [("offline", False), ("online", True)])
def test_wandb_offline_asks_no_server_and_online_one_that_fails_costs_one_line(store, tmp_path, mode, asked):
    """Server and proxy are both here, for W&B's own process too: what goes out is counted, and online does count."""
    with Calls() as calls:
        known = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        known |= {"WANDB_MODE": mode, "WANDB_BASE_URL": calls.url, "WANDB_API_KEY": "0" * 40,
                  "PYTHONPATH": os.pathsep.join(sys.path)}  # fmt: skip
        known |= {f"{name}_PROXY": calls.url for name in ("HTTP", "HTTPS", "ALL")}
        words = ["-m", "maesil", "train", store, "--out", tmp_path / "run", "--preset", "tiny", "--device", "cpu"]
        sizes = {
            "model.crop": 16,
            "model.width": 16,
            "model.depth": 1,
            "model.decoder_width": 16,
            "train.tracker": "wandb",
        }
        options = [word for name, value in sizes.items() for word in ("--set", f"{name}={value}")]
        command = [sys.executable, *map(str, words), "--steps", "2", "--batch", "2", *options]
        done = subprocess.run(command, env=known, capture_output=True, text=True, timeout=250, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert (calls.calls > 0) is asked
    told = [line for line in done.stderr.splitlines() if "tracker failed" in line or "followed by" in line]
    assert len(told) == 1 and ("left behind" in told[0]) is asked
    assert len(metrics(tmp_path / "run")) == 2
