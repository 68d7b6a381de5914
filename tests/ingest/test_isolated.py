"""Decoding in a child: crashes, bombs and time-outs cost one volume; nothing of the child outlives its parent."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support.bombs import BOMBS
from support.ct_phantom import base_affine
from support.sources import phantom_hu

from maesil.errors import Refused
from maesil.ingest import decode, isolated
from maesil.ingest.plan import make_plan
from maesil.ingest.scan import scan
from maesil.ingest.source import Source
from maesil.store.nifti import write_nifti
from maesil.synthetic.dicom import SeriesIdentity, write_dicom_series


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    folder = tmp_path_factory.mktemp("series")
    write_dicom_series(folder, phantom_hu(), base_affine(), SeriesIdentity())
    (item,) = make_plan(scan([folder])).volumes
    return item.source


def child_pid() -> int:
    process = isolated._child()._process
    assert process is not None
    return process.pid


def refused_by(source: Source) -> Refused:
    with pytest.raises(Refused) as caught:
        isolated.read(source)
    return caught.value


def test_the_child_gives_what_this_process_would_have_read(source, tmp_path):
    write_nifti(tmp_path / "a.nii.gz", phantom_hu().astype(np.int16), base_affine())
    for item in (source, Source("nifti", (tmp_path / "a.nii.gz",))):
        ours, theirs = decode.read(item), isolated.read(item)
        np.testing.assert_array_equal(ours.hu, theirs.hu)
        np.testing.assert_array_equal(ours.valid, theirs.valid)
        np.testing.assert_allclose(ours.affine, theirs.affine)
        assert (ours.notes, ours.source) == (theirs.notes, theirs.source)
        assert isolated.source_hash(item) == decode.source_hash(item) == isolated.read_hashed(item)[1]
        assert isolated.read_hashed(item, "known before")[1] == "known before"
        theirs.hu[0] += 1  # may be written to


def test_a_child_starts_without_what_it_does_not_need():
    """Each process that reads sources waits for one to start."""
    code = "import sys, maesil.ingest.decode_child; print({'dask', 'torch', 'zarr'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_one_child_serves_all(source):
    isolated.source_hash(source)
    pid = child_pid()
    isolated.read(source)
    assert refused_by(Source("nifti", (Path("/no/such/file.nii"),))).code == "vanished"
    assert child_pid() == pid


@pytest.fixture
def endless(tmp_path) -> Source:
    """A source that is never read to its end."""
    os.mkfifo(tmp_path / "pipe")
    return Source("nifti", (tmp_path / "pipe",))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGSEGV, "decoder_crashed"), (signal.SIGKILL, "decoder_killed")])
def test_a_crash_costs_one_source_and_the_next_is_read(source, endless, number, code):
    isolated.source_hash(source)
    before = child_pid()
    ended = threading.Event()
    killer = threading.Thread(target=_kill_each_child, args=(number, ended))
    killer.start()
    assert refused_by(endless).code == code
    ended.set()
    killer.join()
    np.testing.assert_array_equal(isolated.read(source).hu, phantom_hu())
    assert child_pid() != before


def _kill_each_child(number: int, ended: threading.Event) -> None:
    """What was killed from outside is asked for once more: the second child goes, too."""
    while not ended.wait(0.3):
        with contextlib.suppress(ProcessLookupError, AssertionError):
            os.kill(child_pid(), number)


def test_a_child_that_is_killed_once_costs_no_source(source):
    isolated.source_hash(source)
    before = child_pid()
    os.kill(before, signal.SIGSTOP)  # it must not be done before it is killed
    threading.Timer(0.2, os.kill, (before, signal.SIGKILL)).start()
    np.testing.assert_array_equal(isolated.read(source).hu, phantom_hu())
    assert child_pid() != before


def test_a_child_that_died_between_two_sources_is_nobodys_fault(source):
    isolated.source_hash(source)
    os.kill(child_pid(), signal.SIGKILL)
    time.sleep(0.2)
    np.testing.assert_array_equal(isolated.read(source).hu, phantom_hu())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_end_is_left_to_the_parent(source, number):
    """Job schedulers send it to every process of a job; what is being read must be read to its end."""
    isolated.source_hash(source)
    before = child_pid()
    os.kill(before, number)
    np.testing.assert_array_equal(isolated.read(source).hu, phantom_hu())
    assert child_pid() == before


def test_what_takes_for_ever_is_ended(source, endless, monkeypatch):
    monkeypatch.setattr(isolated, "SECONDS", 0.5)
    assert refused_by(endless).code == "decode_time"
    monkeypatch.undo()
    np.testing.assert_array_equal(isolated.read(source).hu, phantom_hu())


def test_too_much_memory_is_refused(source, monkeypatch):
    monkeypatch.setattr(isolated, "MEMORY_BYTES", 1 << 16)
    large = Source(**{**vars(source), "planes": source.planes * 200})
    assert refused_by(large).code == "decode_memory"
    monkeypatch.undo()
    np.testing.assert_array_equal(isolated.read(source).hu, phantom_hu())


PARENT = """
import sys, time
from pathlib import Path
from maesil.ingest import isolated
from maesil.ingest.source import Source
try:
    isolated.source_hash(Source("nifti", (Path("/no/such/file"),)))
except Exception:
    pass
print(isolated._child()._process.pid, flush=True)
time.sleep(60)
"""


def test_it_dies_with_its_parent():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return  # ended; nobody has asked for its status yet
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


LARGEST_PROCESS = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""  # a small process, since a child counts what its parent held when it was forked off


@pytest.mark.slow
def test_bombs_are_quarantined_under_a_gigabyte(tmp_path):
    """All of them in one run of the command, besides a series that must come through."""
    for bomb in BOMBS:
        bomb(tmp_path / "in" / bomb.__name__)
    write_dicom_series(tmp_path / "in" / "good", phantom_hu(), base_affine(), SeriesIdentity())
    command = [sys.executable, "-m", "maesil", "ingest", str(tmp_path / "in"), "--out", str(tmp_path / "s"), "--json"]
    command += ["--workers", "0", "--spacing", "native", "--superpatch", "64", "--key-file", str(tmp_path / "key")]
    run = subprocess.run(
        [sys.executable, "-c", LARGEST_PROCESS, *command],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 1, run.stderr
    document = json.loads(run.stdout)
    assert len(document["committed"]) == 1
    for bomb in BOMBS:
        statuses = {f["status"] for f in document["files"] if f"/{bomb.__name__}/" in f["path"]}
        assert statuses == {"quarantined"}, bomb.__name__
    assert int(run.stderr.splitlines()[-1]) < 1 << 20  # KiB
