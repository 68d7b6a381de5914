"""``maesil store view`` as a shell sees it."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
from support.command_line import fails
from support.lanes import slow_but

from maesil import errors
from maesil.cli import store as commands
from maesil.store.store import Store


@pytest.mark.parametrize("number", slow_but((signal.SIGINT, signal.SIGTERM), (signal.SIGINT,)))
def test_it_answers_until_ctrl_c_which_is_no_error(store, home, number):
    volume_id = Store.open(store).volumes()[0].volume_id
    command = [sys.executable, "-m", "maesil", "store", "view", str(store), volume_id[:8], "--no-browser"]
    environment = {**os.environ, **home}
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        address = urlsplit(process.stdout.readline().strip())
        assert process.stdout.readline() == "Ctrl-C ends it\n"
        connection = http.client.HTTPConnection(address.netloc, timeout=30)
        connection.request("GET", address.path)
        answer = connection.getresponse()
        assert (address.hostname, answer.status) == ("127.0.0.1", 200)
        assert address.path.endswith(f"/volumes/{volume_id}") and volume_id.encode() in answer.read()
        process.send_signal(number)  # while the connection is still open
        stdout, stderr = process.communicate(timeout=30)
        connection.close()
    assert (process.returncode, stdout, stderr) == (0, "ended\n", "")


def test_what_cannot_be_shown_is_told_in_one_line(store, tmp_path):
    fails(errors.EXIT_STORE, "store", "view", tmp_path / "nowhere", "--no-browser")
    assert "0000" in fails(errors.EXIT_USAGE, "store", "view", store, "0000", "--no-browser")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}" in fails(errors.EXIT_USAGE, "store", "view", store, "--no-browser", "--port", port)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("display", [{"DISPLAY": ":0"}, {"WAYLAND_DISPLAY": "wayland-0"}, {"DISPLAY": ""}, {}], ids=str)
def test_a_browser_opens_only_where_somebody_sits_before_it(monkeypatch, terminal, display):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in display.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    assert commands._has_screen() == (terminal and any(display.values()))
