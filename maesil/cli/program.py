"""The command line as a whole: its commands, and errors mapped to exit codes in one place.

Heavy packages are imported inside the commands only, so that ``maesil --help`` answers at once.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from maesil.cli import cache, demo, doctor, downstream, evaluate, ingest, store, train
from maesil.cli.metavars import readable
from maesil.errors import (
    BROKEN,
    DISK_FULL,
    EXIT_INTERRUPTED,
    EXIT_RESOURCES,
    EXIT_USAGE,
    NOT_ALLOWED,
    EndedWithOthers,
    MaesilError,
    UsageError,
    disk_full,
    out_of_memory,
)
from maesil.signals import TOLD_BY_ANOTHER, interrupts_raised, outlive_closed_pipes
from maesil.text import printable, without_credentials

_GO_ON = ("ingest", "experiment", "demo")
_RESUMES = "the same command goes on where it stopped"
_STARTS_OVER = "nothing was kept of it, the same command begins anew"


class _ErrorMapping(TyperGroup):
    """Ends every foreseen error with one line on standard error and its documented exit code."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        readable(self)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EndedWithOthers as error:
            raise typer.Exit(error.exit_code) from error
        except MaesilError as error:
            _end(f"error: {error}", error.exit_code)
        except KeyboardInterrupt as error:
            _end_interrupted(str(error), ctx.invoked_subcommand)
        except (MemoryError, RuntimeError) as error:
            if told := out_of_memory(error):
                _end(f"error: {told}; free some, or take a device with more: --device cpu", EXIT_RESOURCES)
            raise
        except OSError as error:
            if error.errno in DISK_FULL:
                _end(f"error: {disk_full()}", EXIT_RESOURCES)
            if error.errno in NOT_ALLOWED:
                _end(f"error: {error.filename}: expected to be allowed to use it, found: {error.strerror}", EXIT_USAGE)
            if error.errno in BROKEN:
                _end(
                    f"error: {error.filename or 'a file'}: {error.strerror}; mend it and run the same command again",
                    EXIT_RESOURCES,
                )
            raise


def _end_interrupted(how_to_go_on: str, command: str) -> NoReturn:
    if TOLD_BY_ANOTHER in os.environ:
        raise typer.Exit(EXIT_INTERRUPTED)
    goes_on = command in _GO_ON
    _end(how_to_go_on or f"interrupted; {_RESUMES if goes_on else _STARTS_OVER}", EXIT_INTERRUPTED)


def _end(message: str, code: int) -> NoReturn:
    typer.echo(printable(without_credentials(message)), err=True)
    raise typer.Exit(code)


app = typer.Typer(
    cls=_ErrorMapping,
    name="maesil",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    help="From folders of CT to a pre-trained 3D masked autoencoder.\n\n"
    "Start with `maesil demo`, or: maesil ingest SCANS --out store.zarr; maesil train store.zarr --out run; "
    "maesil evaluate run store.zarr",
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    command, ranks = context.invoked_subcommand, os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and ranks != "1" and command not in (None, "train", "doctor"):
        raise UsageError(f"maesil {command}: started by {ranks} ranks, expected one process; only train takes several")
    if version:
        from maesil import __version__

        typer.echo(__version__)
        raise typer.Exit


ingest.register(app)
app.add_typer(store.app, name="store")
app.add_typer(cache.app, name="cache")
for group in (train, evaluate, downstream, doctor, demo):
    group.register(app)


def main() -> None:
    """Run the command line."""
    outlive_closed_pipes()
    with interrupts_raised():
        app()
