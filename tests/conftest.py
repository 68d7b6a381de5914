"""What holds for all tests."""

from __future__ import annotations

import contextlib
import signal

import pytest


def pytest_configure() -> None:
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


@pytest.fixture(scope="module")
def one_thread():
    """One torch thread while a module's tests run: its models are no work for two, least of all beside other tests."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
