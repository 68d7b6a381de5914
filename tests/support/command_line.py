"""Running the command line inside a test."""

from __future__ import annotations

from functools import cache

from typer import testing
from typer.main import get_command
from typer.testing import CliRunner

from maesil.cli import app

# typer makes all commands anew for each call, which takes longer than most calls.
testing._get_command = cache(get_command)
COMMAND = testing._get_command(app)

SMALL = ("--superpatch", 32, "--spacing", 4)
"""Options of an ingest that make several superpatches of a small phantom."""


def run(*arguments: object) -> tuple[int, str, str]:
    """Run a command in this process; return exit code, standard output and standard error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def fails(code: int, *arguments: object) -> str:
    """Run a command that must end with this code and one plain line; return the line."""
    found, _, stderr = run(*arguments)
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert found == code, stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def ingest(source: object, out: object, *more: object) -> tuple[object, ...]:
    """Return the words of an ingest within one process."""
    return ("ingest", source, "--out", out, "--workers", 0, *more)
