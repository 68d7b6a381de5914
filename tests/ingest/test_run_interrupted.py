"""Killed runs, several at once, damage: all end as an undisturbed run does."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from support.lanes import slow_but
from support.sources import (
    Workplace,
    attempts,
    contents,
)

from maesil.store.index import index_is_current
from maesil.store.verify import verify


def forked():
    """Processes that start at once: everything heavy is imported before they fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["maesil.store.storage", "maesil.ingest.run"])
    return context


def ingest_there(root: Path, go=None) -> None:
    if go is not None:
        go.wait()
    Workplace(root).ingest()


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_the_same(first, tmp_path):
    """SIGKILL again and again, each time a little later; then undisturbed: as if nothing had happened."""
    place, context, rng = first.copy(tmp_path), forked(), random.Random(4)
    warm_up = context.Process(target=ingest_there, args=(first.copy(tmp_path / "warm").root,))
    warm_up.start()
    warm_up.join()
    started = time.perf_counter()
    undisturbed = context.Process(target=ingest_there, args=(first.copy(tmp_path / "undisturbed").root,))
    undisturbed.start()
    undisturbed.join()
    seconds = time.perf_counter() - started
    killed = 0
    for share in np.linspace(0.3, 1.0, 5):
        process = context.Process(target=ingest_there, args=(place.root,))
        process.start()
        process.join(max(0.0, share + rng.uniform(-0.1, 0.0)) * seconds)
        killed += process.is_alive()
        process.kill()
        process.join()
        if (place.out / "zarr.json").exists():
            assert verify(place.store).problems == ()  # what is committed is always whole
    assert killed >= 2
    committed = {v.volume_id: v.attempt for v in place.store.volumes()} if (place.out / "zarr.json").exists() else {}
    place.ingest()
    assert contents(place.store) == contents(first.store)
    assert {v.generation for v in place.store.volumes()} == {1}
    assert committed.items() <= {v.volume_id: v.attempt for v in place.store.volumes()}.items()
    assert index_is_current(place.store)
    assert place.ingest().committed == []


@pytest.mark.slow
def test_the_command_killed_with_its_workers_ends_the_same(first, tmp_path):
    """SIGKILL to the whole process group of `maesil ingest` with two workers, while the first attempt is written."""
    place = first.copy(tmp_path)
    process = place.start_until(
        "volumes/??/*/*/zarr.json", workers=2, start_new_session=True, stderr=subprocess.DEVNULL
    )
    assert process.poll() is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    place.ingest()
    assert contents(place.store) == contents(first.store)
    assert verify(place.store).problems == ()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_an_interrupt_of_the_whole_group_is_told_once(first, tmp_path, number):
    """A terminal's Ctrl-C and a batch system's signal reach the workers, too: they say nothing, and end."""
    place = first.copy(tmp_path)
    process = place.start_until(
        "volumes/??/*/*/zarr.json", workers=2, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    assert process.poll() is None, "it ended before it could be interrupted"
    os.killpg(process.pid, number)
    _, said = process.communicate()  # ends only when every process has let go of the pipe
    assert process.returncode == 130
    assert "Traceback" not in said and said.count("interrupted") == 1, said


def test_two_at_once_commit_each_volume_once(first, tmp_path):
    place, context = first.copy(tmp_path), forked()
    place.key.unlink()  # made by whoever comes first
    go = context.Event()
    processes = [context.Process(target=ingest_there, args=(place.root, go)) for _ in range(2)]
    for process in processes:
        process.start()
    time.sleep(0.3)
    go.set()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    commits = list(place.store.storage.list("commits"))
    assert len(commits) == 3 and all(key.endswith("00000001.json") for key in commits)
    assert attempts(place.store) == sorted(f"{v.volume_id}/{v.attempt}" for v in place.store.volumes())
    assert verify(place.store).problems == ()
    assert index_is_current(place.store)


@pytest.mark.parametrize("workers", slow_but((1, 2), (1,)))
def test_dask_makes_the_same_store(first, tmp_path, workers):
    """Processes of Dask; besides, a refusal that has to come back from one."""
    place = first.copy(tmp_path)
    bad = place.sources / "bad.nii.gz"
    shutil.copy(next(place.sources.rglob("SMITH-42.nii.gz")), bad)
    bad.write_bytes(bad.read_bytes()[:-50])
    summary = place.ingest(workers=workers)
    assert contents(place.store) == contents(first.store)
    assert summary.refused_volumes == 1
    assert [f.code for f in summary.files if f.path == bad] == ["damaged_file"]
    assert place.ingest().committed == []


def test_a_damaged_volume_is_made_again_as_its_message_says(place, first):
    volume = place.store.volumes()[0]
    shard = place.out / volume.superpatches[0].path
    shard.write_bytes(bytes(shard.stat().st_size))
    assert "delete the volume's folder below commits/" in str(verify(place.store).problems)
    shutil.rmtree((place.out / volume.key).parent)
    summary = place.ingest()
    assert [v.volume_id for v in summary.committed] == [volume.volume_id]
    assert contents(place.store) == contents(first.store)
    assert verify(place.store).problems == ()
    assert index_is_current(place.store)
