"""Every error ends with its exit code and one line on standard error."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from support.command_line import fails, ingest, run

from maesil import errors


def test_a_wrong_path(tmp_path):
    line = fails(errors.EXIT_NO_INPUT, *ingest(tmp_path / "nowhere", tmp_path / "s.zarr"))
    assert "nowhere" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize("kind", ["empty", "junk"])
def test_a_folder_without_ct(tmp_path, kind, dry):
    (tmp_path / "in").mkdir()
    if kind == "junk":
        (tmp_path / "in" / "notes.txt").write_text("x")
    code, _, told = run(*ingest(tmp_path / "in", tmp_path / "s.zarr", *dry))
    *before, line = told.splitlines()
    assert code == errors.EXIT_NO_INPUT and line.startswith("error: ")
    assert [part.split(":")[0] for part in before if part.strip()] == ["report"] * (kind == "junk" and not dry)
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--spacing", "isotropic"), ("--spacing", "0"), ("--spacing", "-1"), ("--spacing", "1,2"), ("--spacing", "nan"),
        ("--superpatch", "0"), ("--superpatch", "100"), ("--superpatch", "4096"), ("--codec", "zip"),
        ("--key-file", "/nowhere/at/all/key"), ("--key-file", "/"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_bad_options(tmp_path, sources, options):
    fails(errors.EXIT_USAGE, *ingest(sources, tmp_path / "s.zarr", *options))
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("ingest",),
        ("nonsense",),
        ("ingest", "x", "--out", "y", "--superpatch", "many"),
        ("store",),
        (),
    ],
    ids=" ".join,
)
def test_wrong_use_is_2(arguments):
    code, _, _ = run(*arguments)
    assert code == errors.EXIT_USAGE


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "junk"])
def test_a_run_that_is_none(tmp_path, store, kind):
    path = tmp_path / "run"
    if kind == "file":
        path.write_text("x")
    elif kind != "missing":
        path.mkdir()
        if kind == "junk":
            for name in ("checkpoint.safetensors", "checkpoint.pt", "config.toml", "run.json", "state.json"):
                (path / name).write_bytes(b"\xff junk")
    fails(errors.EXIT_USAGE, "evaluate", path, store)


@pytest.mark.parametrize(
    "options",
    [
        ("--preset", "gigantic"), ("--preset", "tiny", "--steps", "-1"), ("--preset", "tiny", "--device", "abacus"),
        ("--preset", "tiny", "--set", "train.nonsense=1"), ("--preset", "tiny", "--set", "nonsense"),
        ("--preset", "tiny", "--set", "train.lr=fast"), ("--preset", "tiny", "--config", "/nowhere.toml"),
        ("--preset", "tiny", "--validation", "2"), ("--preset", "tiny", "--ram", "5"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_bad_training_options(tmp_path, store, options):
    fails(errors.EXIT_USAGE, "train", store, "--out", tmp_path / "run", "--device", "cpu", *options)


def test_a_model_larger_than_the_superpatches(tmp_path, store):
    """The store's superpatches are of 16 voxels; tiny wants crops of 64."""
    fails(errors.EXIT_USAGE, "train", store, "--out", tmp_path / "run", "--preset", "tiny", "--device", "cpu")


def test_a_full_disk_is_5(tmp_path, sources, monkeypatch):
    from maesil.store.local_storage import LocalStorage

    def full(self, key, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalStorage, "put_new", full)
    fails(errors.EXIT_RESOURCES, *ingest(sources, tmp_path / "s.zarr"))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_what_may_not_be_written_is_told_in_one_line(tmp_path, sources, monkeypatch, number):
    from maesil.store.local_storage import LocalStorage

    def forbidden(self, key, data):
        raise OSError(number, os.strerror(number), key)

    monkeypatch.setattr(LocalStorage, "put_new", forbidden)
    assert os.strerror(number) in fails(errors.EXIT_USAGE, *ingest(sources, tmp_path / "s.zarr"))


def test_an_interrupt_is_130(tmp_path, sources, monkeypatch):
    import maesil.ingest.run

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(maesil.ingest.run, "ingest", interrupted)
    code, _, stderr = run(*ingest(sources, tmp_path / "s.zarr"))
    assert code == errors.EXIT_INTERRUPTED and "interrupted" in stderr and len(stderr.splitlines()) == 1


def test_as_a_process_of_its_own(tmp_path, home):
    """What a shell sees: the exit code, one line on standard error, nothing on standard output, no traceback."""
    environment = {**os.environ, **home}
    command = [sys.executable, "-m", "maesil", "ingest", str(tmp_path / "nowhere"), "--out", str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (errors.EXIT_NO_INPUT, "")
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
