"""The documentation says what the code does: options are listed, commands and links exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer

from maesil.cli import app
from maesil.config.schema import MASK_KINDS, MaskConfig
from maesil.models.masking import make_masks

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_page_of_options_is_made_from_the_code():
    path = ROOT / "docs" / "reference" / "make_configuration.py"
    spec = importlib.util.spec_from_file_location("make_configuration", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page()


def test_the_picture_of_masks_is_drawn_from_the_masks():
    path = ROOT / "docs" / "explanation" / "draw_masks.py"
    spec = importlib.util.spec_from_file_location("draw_masks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    told = [text.get_text() for text in module.draw().texts]
    assert [text for text in told if text in module.WHAT] == [kind for kind in MASK_KINDS if kind != "none"]
    page = (ROOT / "docs" / "explanation" / "masking.md").read_text(encoding="utf-8")
    for kind in module.WHAT:
        hidden = make_masks(MaskConfig(kind=kind), module.GRID, [module.SEED]).ids_masked.shape[1]
        assert f"{hidden} of 512 hidden\n{512 - hidden} visible" in told
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{kind}` |") and "gz" in line]
        assert f"| {hidden} of 512 |" in row


def commands(page: Path) -> list[list[str]]:
    """The words of every indented `maesil` command of a page, without what a shell adds."""
    found = []
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))  # a command may go on in the next line
    for line in text.splitlines():
        if match := re.match(r"(?: {4,}|\t)(?:\$ )?(maesil .*)", line):
            words = shlex.split(match[1].replace("...", ""), comments=True)
            found.append([word for word in words if word not in ("[VOLUME_ID]",)])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_the_docs_exists_with_its_options(page):
    for words in commands(page):
        command = typer.main.get_command(app)
        rest = words[1:]
        while hasattr(command, "commands"):
            assert rest and rest[0] in command.commands, shlex.join(words)
            command, rest = command.commands[rest[0]], rest[1:]
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for word in rest:
            if word.startswith("--"):
                assert word.partition("=")[0] in known | {"--help"}, shlex.join(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_command_has_help_with_an_example():
    def leaves(command, path):
        for name, sub in getattr(command, "commands", {}).items():
            yield from leaves(sub, [*path, name])
        if not hasattr(command, "commands"):
            yield path, command

    for path, command in leaves(typer.main.get_command(app), []):
        assert f"Example: maesil {' '.join(path)}" in command.help, path
