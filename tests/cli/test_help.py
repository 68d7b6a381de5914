"""The command line: help with examples, words for people and for the shell, nothing heavy before its time."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from support.command_line import COMMAND, run

HEAVY = (
    "torch",
    "zarr",
    "dask",
    "distributed",
    "numpy",
    "pydicom",
    "nibabel",
    "SimpleITK",
    "matplotlib",
    "pyarrow",
    "rich",
)


def commands(group=None, path=()) -> list[tuple[str, ...]]:
    group = COMMAND if group is None else group
    found = []
    for name, command in group.commands.items():
        here = (*path, name)
        found += commands(command, here) if hasattr(command, "commands") else [here]
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_has_help_with_an_example_that_parses(command):
    code, stdout, _ = run(*command, "--help")
    assert code == 0
    text = " ".join(stdout.split())
    example = re.search(r"Example: (maesil .*?)(?= Arguments| Options|$)", text)
    assert example, text
    words = example[1].split()
    assert tuple(words[1 : 1 + len(command)]) == command
    options = {word for word in words if word.startswith("--")}
    assert all(option in text.replace(example[1], "") for option in options)


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_help_names_no_types_of_python(command):
    """Neither ``<path>`` nor ``<list[str]>``: the value of an option is a word, and so is an argument."""
    told = run(*command, "--help")[1]
    assert not re.findall(r"<[a-z][^>\n]*>|\b(?:Path|str|int|float)\b|INTEGER", told)


@pytest.mark.parametrize("group", ["ingest", "store", "cache"])
def test_values_of_options_have_names_that_people_can_read(group):
    for path in [path for path in commands() if path[0] == group]:
        told = run(*path, "--help")[1]
        assert not re.findall(r"--[\w-]+ (?:<\w+|TEXT|PATH|INTEGER|FLOAT)", told), path


def test_h_is_help_everywhere():
    for path in [(), *commands()]:
        assert run(*path, "-h")[1] == run(*path, "--help")[1] != ""


def test_all_commands_of_this_version_are_there():
    names = {" ".join(command) for command in commands()}
    assert names >= {"ingest", "train", "evaluate", "demo", "store info", "store verify", "store export", "store index"}


def test_version():
    from maesil import __version__

    assert run("--version")[:2] == (0, f"{__version__}\n")


def test_help_needs_no_heavy_package():
    code = (
        "import sys; from typer.testing import CliRunner; import maesil.cli\n"
        f"early = [m for m in {HEAVY!r} if m in sys.modules and m != 'rich']\n"
        "r = CliRunner().invoke(maesil.cli.app, ['--help']); assert r.exit_code == 0\n"
        "r = CliRunner().invoke(maesil.cli.app, ['ingest', '--help']); assert r.exit_code == 0\n"
        f"print(sorted(set(early) | {{m for m in {HEAVY!r} if m in sys.modules and m != 'rich'}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def lungs(sources, home):
    """A store of that name among those that `maesil cache` keeps."""
    options = ("--spacing", "native", "--superpatch", 32, "--workers", 0)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in home.items():
            patch.setenv(name, value)
        patch.delenv("MAESIL_CACHE", raising=False)
        assert run("ingest", sources / "nifti of SMITH", "--name", "lungs", *options)[0] == 0


@pytest.mark.usefixtures("lungs")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("ingest x --codec ", {"fast", "compact", "raw"}),
        ("ingest x --prefer s", {"sform"}),
        ("ingest x --duplicates keep-f", {"keep-first"}),
        ("ingest x --refuse lo", {"lossy"}),
        ("ingest x --accept wind", {"windowed"}),
        ("ingest x --retry-quarantined al", {"all"}),
        ("cache rm lun", {"lungs"}),
        ("cache path ", {"lungs"}),
    ],
)
def test_the_shell_completes_closed_sets_of_words(home, words, expected):
    environment = {**os.environ, **home, "_MAESIL_COMPLETE": "complete_bash", "COMP_WORDS": f"maesil {words}"}
    environment["COMP_CWORD"] = str(len(words.split(" ")))
    entry = [sys.executable, "-c", "from maesil.cli import app; app(prog_name='maesil')"]
    done = subprocess.run(entry, env=environment, capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == expected, done.stderr
