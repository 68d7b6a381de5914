"""The documentation says what the code does: options are listed, commands and links exist."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from support.command_line import COMMAND
from support.pages import commands

import maesil
from maesil.config.schema import MASK_KINDS, MaskConfig
from maesil.models.masking import make_masks

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def script(name: str):
    """Import one of the scripts that lie beside the pages they make."""
    path = ROOT / "docs" / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["reference/make_configuration.py", "reference/make_cli.py"])
def test_pages_of_options_are_made_from_the_code(name):
    module = script(name)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), f"run python docs/{name}"


def test_the_page_of_commands_has_every_option_of_every_command():
    page = script("reference/make_cli.py").page()
    sections = {part.splitlines()[0]: part for part in page.split("\n## ")[1:]}
    for path, command in leaves(COMMAND, []):
        section = sections.pop(" ".join(["maesil", *path]))
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert all(f"| `{name}`" in section or f", `{name}`" in section for name in parameter.opts), path
            else:
                assert re.search(rf"^\| `\[?{re.escape(parameter.metavar.strip('[].'))}", section, re.MULTILINE), path
    assert not sections


def test_the_picture_of_masks_is_drawn_from_the_masks():
    module = script("explanation/draw_masks.py")
    told = [text.get_text() for text in module.draw().texts]
    assert [text for text in told if text in module.WHAT] == [kind for kind in MASK_KINDS if kind != "none"]
    page = (ROOT / "docs" / "explanation" / "masking.md").read_text(encoding="utf-8")
    for kind in module.WHAT:
        hidden = make_masks(MaskConfig(kind=kind), module.GRID, [module.SEED]).ids_masked.shape[1]
        assert f"{hidden} of 512 hidden\n{512 - hidden} visible" in told
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{kind}` |") and "gz" in line]
        assert f"| {hidden} of 512 |" in row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_the_docs_exists_with_its_options(page):
    for words in commands(page):
        command = COMMAND
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


def leaves(command, path: list[str]):
    """Every command below a group, with the words that call it."""
    for name, sub in getattr(command, "commands", {}).items():
        yield from leaves(sub, [*path, name])
    if not hasattr(command, "commands"):
        yield path, command


def test_every_command_has_help_with_an_example():
    for path, command in leaves(COMMAND, []):
        assert f"Example: maesil {' '.join(path)}" in command.help, path


def decisions() -> list[Path]:
    return sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))


def test_decisions_have_no_gap_a_status_a_date_and_a_line_in_the_index():
    index = (ROOT / "docs" / "decisions" / "index.md").read_text(encoding="utf-8")
    for number, path in enumerate(decisions(), start=1):
        text = path.read_text(encoding="utf-8")
        title = text.splitlines()[0].removeprefix(f"# {number}. ")
        status = re.search(r"^Status: (holds|replaced|replaced in part)\.", text, re.MULTILINE)
        date = re.search(r"\bDate: (\d{4}-\d{2}-\d{2})\.", text)
        assert path.name.startswith(f"{number:04d}-") and status and date, path.name
        assert f"| {number} | [{title}]({path.name}) | {status[1]}" in index
        assert f"| {date[1]} |" in index


def test_every_page_is_in_the_navigation_of_the_site_and_in_the_index():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs").rglob("*.md")):
        name = page.relative_to(ROOT / "docs").as_posix()
        if page not in decisions():
            assert f": {name}\n" in site, name
            assert name == "index.md" or f"({name})" in index, name


def test_every_how_to_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs" / "how-to").glob("*.md")):
        assert f"(docs/how-to/{page.name})" in readme, page.name


def test_the_page_of_python_names_what_the_package_offers():
    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    offered = {name for name in maesil.__all__ if name != "__version__"}
    assert set(re.findall(r"heading: maesil\.(\w+)", page)) == offered
    for path in re.findall(r"^::: (\S+)", page, re.MULTILINE):
        found = None
        for depth in range(path.count("."), 0, -1):  # the longest beginning that is a module
            module = ".".join(path.split(".")[:depth])
            if importlib.util.find_spec(module):
                found = functools.reduce(getattr, path.split(".")[depth:], importlib.import_module(module))
                break
        assert found is not None, path


def test_every_block_of_python_is_python():
    blocks = [
        (page.name, block)
        for page in PAGES
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    ]
    assert len(blocks) > 5
    for name, block in blocks:
        compile(block, name, "exec")


ROOMS = (
    "ingest",
    "cache",
    *(f"maesil/{room}" for room in ("store", "data", "models", "training", "evaluation", "downstream")),
)


@pytest.mark.parametrize("room", ROOMS)
def test_the_page_of_the_architecture_names_every_module(room):
    page = (ROOT / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")
    named = {word.rpartition("/")[2] for word in re.findall(r"`([\w/]+)`", page)}
    named |= set(re.findall(rf"\b{Path(room).name}/(\w+)", page))
    modules = {path.stem for path in (ROOT / room).glob("*.py")} - {"__init__"}
    assert modules <= named, f"say in docs/explanation/architecture.md what these are: {sorted(modules - named)}"
