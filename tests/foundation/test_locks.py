"""Locks between processes: one at a time, the other says whom it waits for, and a killed holder holds nothing."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading

import pytest

from maesil.errors import UsageError
from maesil.locks import holder_of, locked, locked_now

HOLD = """
import sys, time
from pathlib import Path
from maesil.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "l"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_free_lock_is_taken_at_once_and_given_back(tmp_path):
    assert holder_of(tmp_path / "deep" / "l") is None
    for _ in range(2):
        with locked(tmp_path / "deep" / "l", on_wait=pytest.fail):
            assert f"process {__import__('os').getpid()} on" in holder_of(tmp_path / "deep" / "l")
    assert holder_of(tmp_path / "deep" / "l") is None


def test_who_waits_says_for_whom_and_goes_on_when_the_holder_is_killed(tmp_path, holder):
    assert f"process {holder.pid} on" in holder_of(tmp_path / "l")
    refused = pytest.raises(UsageError, match=rf"STORE is being built by process {holder.pid} ")
    with refused, locked_now(tmp_path / "l", "STORE"):
        pytest.fail("two held it")
    said, got = [], threading.Event()

    def wait() -> None:
        with locked(tmp_path / "l", said.append):
            got.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not got.wait(0.3)
    holder.send_signal(signal.SIGKILL)
    assert got.wait(10)
    thread.join()
    assert len(said) == 1 and str(holder.pid) in said[0]


def test_who_holds_a_lock_may_be_asked_while_its_folder_goes(tmp_path):
    """One process looks whether a folder is in use, and its owner removes it just then: nobody fails for that."""
    folder, ended = tmp_path / "f", threading.Event()

    def make_and_remove() -> None:
        while not ended.is_set():
            with locked(folder / "l"):
                pass
            shutil.rmtree(folder)

    thread = threading.Thread(target=make_and_remove)
    thread.start()
    try:
        for _ in range(5000):
            holder_of(folder / "l")
    finally:
        ended.set()
        thread.join()
    assert not folder.exists(), "to ask makes no file, which would have kept the folder"
