"""What holds for all tests."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import pytest
from support.cpu_time import CpuTimes


def pytest_addoption(parser: pytest.Parser) -> None:
    """`support.cpu_time` tells what the tests take."""
    parser.addoption("--cpu-times", metavar="FILE", help="write the CPU seconds of each test to this file")


def pytest_configure(config: pytest.Config) -> None:
    """Give signals and hypothesis to the tests as they are on a quiet terminal.

    A shell has processes in the background ignore Ctrl-C, and nohup has them ignore a hang-up: tests send both.
    No test of hypothesis fails because the machine is busy.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with contextlib.suppress(ImportError):  # a bare machine with a GPU has no hypothesis
        from hypothesis import HealthCheck, settings

        # How long an example takes says how busy the machine is.
        settings.register_profile("maesil", deadline=None, suppress_health_check=[HealthCheck.too_slow])
        settings.load_profile("maesil")
    config.pluginmanager.register(CpuTimes(config.getoption("--cpu-times")), "cpu-times")


LONG_FILES = (
    "ingest/test_hard_dicom.py",
    "ingest/test_outside.py",
    "training/test_train.py",
    "evaluation/test_experiment.py",
    "training/test_on_a_gpu.py",
    "training/test_interrupted.py",
    "training/test_trackers.py",
    "downstream/test_cohort.py",
    "downstream/test_finetune.py",
    "training/test_resume.py",
    "cli/test_train.py",
    "evaluation/test_seeds.py",
    "test_boxes.py",
    "downstream/test_probe.py",
    "ingest/test_planes.py",
    "test_build.py",
    "ingest/test_read.py",
    "training/test_compiled.py",
    "kernels/test_ahead_of_time.py",
    "store/test_duplicates.py",
    "foundation/test_distributed.py",
    "test_commands_of_pages.py",
    "downstream/test_prove.py",
    "evaluation/test_evaluate.py",
    "cli/test_object_sources.py",
    "cli/test_downstream.py",
    "data/test_loader.py",
    "kernels/test_library.py",
    "training/test_begin.py",
)
"""What takes longest comes first: two processes share the files, and at the end none is to wait for the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first, each file's tests together and in their order."""
    here = Path(__file__).parent
    turns = {here / name: turn for turn, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: turns.get(item.path, len(turns)))


@pytest.fixture(scope="module")
def one_thread():
    """One torch thread while a module's tests run: its models are no work for two, least of all beside other tests."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plain_runs():
    """Runs of a few steps, half of whose time is no training: they draw no pictures, as where matplotlib is missing,
    and the operations of equal models are counted once.
    """
    from support.training import plainly

    with plainly():
        yield


@pytest.fixture(scope="session")
def object_server():
    """A real server of objects on loopback, one for all tests of a process."""
    pytest.importorskip("obstore", reason="stores in object storage need maesil[objects]")
    from support.object_server import running_server

    with running_server() as server:
        yield server


@pytest.fixture
def bucket(object_server, monkeypatch):
    """The name of a new bucket of that server, which the environment leads to."""
    from support.object_server import environment

    for name, value in environment(object_server.url).items():
        monkeypatch.setenv(name, value)
    return object_server.bucket()


@pytest.fixture
def proxy(object_server, bucket, monkeypatch):
    """A proxy that the environment leads to in place of the server: it counts requests, and puts faults in."""
    with object_server.proxy() as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
        yield made


@pytest.fixture
def mount(tmp_path):
    """Mounts a file system at a folder of its own, skips where it may not, takes it off afterwards."""
    from support.mounts import mounting

    with mounting(tmp_path) as mounts:
        yield mounts
