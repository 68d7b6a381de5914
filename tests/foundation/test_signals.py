"""What asks for an end ends the work cleanly; what nobody reads ends nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from maesil.signals import ENDS, interrupts_deferred, interrupts_raised


@pytest.mark.parametrize("number", ENDS)
def test_every_signal_that_asks_for_an_end_can_interrupt(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interrupts_raised():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert signal.getsignal(number) == before


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts_deferred() as interrupted:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupted.wait(0.2)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_one_is_answered_at_once(capfd):
    with interrupts_deferred("it will end soon") as interrupted:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupted.wait(1)
    assert capfd.readouterr().err == "it will end soon\n"


SPEAKS = """
import sys
from maesil.signals import outlive_closed_pipes
outlive_closed_pipes()
for number in range(5000):
    print(number, "out", "x" * 50)
    print(number, "err", "x" * 50, file=sys.stderr)
open(sys.argv[1], "w").write("all said")
"""


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_pipe_that_is_closed_ends_nothing(tmp_path, closed):
    other = {"stdout": "stderr", "stderr": "stdout"}[closed]
    process = subprocess.Popen(
        [sys.executable, "-c", SPEAKS, tmp_path / "done"],
        **{closed: subprocess.PIPE, other: subprocess.DEVNULL},
    )
    getattr(process, closed).readline()
    getattr(process, closed).close()
    assert process.wait(60) == 0
    assert (tmp_path / "done").read_text() == "all said"


def test_what_is_read_arrives_whole_and_in_the_stream_s_encoding():
    code = "from maesil.signals import outlive_closed_pipes as f; f(); print('ü' * 3); print('end', end='')"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
    assert done.stdout == b"\xfc\xfc\xfc\nend"
