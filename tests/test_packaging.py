"""What is installed is what the tree holds: sdist, wheel, editable install; layers and docstrings."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml

import maesil

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"maesil": "maesil", "maesil/ingest": "ingest", "maesil/kernels": "kernels", "maesil/cache": "cache"}
NO_CODE = {"__pycache__", ".DS_Store"}


def tree() -> dict[str, Path]:
    """Every file of the four folders, and of the rooms in them, by the name it must have inside the package."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*")):  # it follows no links
            if path.is_file() and path.suffix != ".pyc" and not NO_CODE & set(path.parts):
                found[f"{package}/{path.relative_to(ROOT / folder).as_posix()}"] = path
    return found


def modules() -> list[str]:
    names = [name.removesuffix(".py").replace("/", ".") for name in tree() if name.endswith(".py")]
    return sorted(name.removesuffix(".__init__") for name in names)


def run(*command: object, **options) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def clean_copy(folder: Path) -> Path:
    """The files that a clone would have, links as links; outside of git, the files that the build needs."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = listed.stdout.split("\0")[:-1] if listed.returncode == 0 else []
    if not names:
        links = [name for name in FOLDERS if "/" in name]
        needed = [
            *links,
            "pyproject.toml",
            "README.md",
            "LICENSE",
            *(str(p.relative_to(ROOT)) for p in tree().values()),
        ]
        names = [name for name in needed if (ROOT / name).exists()]
    for name in names:
        source, target = ROOT / name, folder / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return folder


def setuptools_is_here() -> bool:
    """Whether the build back end that pyproject asks for is installed; else the build fetches it by itself."""
    try:
        return int(version("setuptools").split(".")[0]) >= 77
    except PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel made from the sdist made from a clean copy."""
    copy = clean_copy(tmp_path_factory.mktemp("copy"))
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", *["--no-isolation"] * setuptools_is_here(), "--outdir", out, copy)
    (found,) = out.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_holds_the_tree_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        different = [name for name, path in tree().items() if name in names and archive.read(name) != path.read_bytes()]
        information = [name.split(".dist-info/")[1] for name in archive.namelist() if ".dist-info/" in name]
    assert names == set(tree())
    assert different == []
    assert "maesil/py.typed" in names
    assert "entry_points.txt" in information and any("LICENSE" in name for name in information)


@pytest.mark.slow
def test_every_module_of_the_installed_wheel_imports(wheel, tmp_path):
    target = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    code = (
        "import importlib, json, sys\n"
        "print(json.dumps({name: importlib.import_module(name).__file__ for name in json.loads(sys.argv[1])}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    output = run(sys.executable, "-c", code, json.dumps(modules()), cwd=tmp_path, env=environment)
    files = json.loads(output.splitlines()[-1])
    assert set(files) == set(modules())
    assert all(Path(path).is_relative_to(target) for path in files.values())
    # Nobody else's packages of these names are touched.
    assert not {path.name for path in target.iterdir()} & {"ingest", "kernels", "cache", "tests"}


@pytest.mark.slow
def test_the_wheel_has_the_version_of_the_code_and_triton_as_an_extra(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    assert f"Version: {maesil.__version__}" in lines
    of_triton = [line for line in lines if line.startswith("Requires-Dist: triton")]
    assert of_triton and all('extra == "gpu"' in line for line in of_triton)
    assert any("maesil[gpu]" in line and 'extra == "test"' in line for line in lines)


def test_the_version_stands_in_one_place():
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert document["project"]["dynamic"] == ["version"]
    assert document["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "maesil.version.__version__"}
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_the_licence_names_those_of_the_files_of_others():
    """The wheel holds the viewer's script, which holds packages under licences of their own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    told = (ROOT / "maesil/viewer/static/licences.txt").read_text()
    of_others = set(re.findall(r"^=+\n\S.*: (\S+)\n", told, re.MULTILINE))
    assert len(of_others) > 1
    assert set(project["license"].split(" AND ")) == {"Apache-2.0"} | of_others
    assert {"LICENSE", "maesil/viewer/static/licences.txt"} <= set(project["license-files"])


def test_what_github_reads_is_whole():
    """The workflow runs the script that everybody runs; forms have what GitHub asks of them."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["run"]["steps"]
    assert steps[-1] == {"run": ".ci/run"} and os.access(ROOT / ".ci" / "run", os.X_OK)
    tried = workflow["jobs"]["run"]["strategy"]["matrix"]["python"]
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    assert [f"Programming Language :: Python :: {version}" for version in tried] == [
        line for line in told if line.startswith("Programming Language")
    ]
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        document = yaml.safe_load(form.read_text())
        if form.name != "config.yml":
            assert {"name", "description", "body"} <= set(document)
            assert all("label" in part["attributes"] for part in document["body"] if part["type"] != "markdown")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_this_installation_is_the_tree(tmp_path):
    names = ("maesil", "maesil.ingest", "maesil.kernels", "maesil.store.reader")
    code = f"from importlib.util import find_spec\nprint(*[find_spec(name).origin for name in {names}], sep='\\n')"
    found = [Path(line).resolve() for line in run(sys.executable, "-c", code, cwd=tmp_path).splitlines()]
    wanted = ("maesil/__init__.py", "ingest/__init__.py", "kernels/__init__.py", "maesil/store/reader.py")
    assert found == [ROOT / name for name in wanted]


def test_links_lead_to_the_folders():
    for name in ("ingest", "kernels", "cache"):
        link = ROOT / "maesil" / name
        assert link.is_symlink() and str(link.readlink()) == f"../{name}"
        assert not [path for path in (ROOT / name).iterdir() if path.is_dir() and path.name not in NO_CODE]


def test_the_command_is_installed():
    """The entry point of pyproject leads to the function that exists."""
    (target,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].values()
    module, function = target.split(":")
    code = f"from {module} import {function}; assert callable({function})"
    run(sys.executable, "-c", code)


def test_the_import_contract_holds():
    script = Path(sys.executable).with_name("lint-imports")
    assert "Contracts: " in run(script, "--no-cache", cwd=ROOT)


def public(body: list[ast.stmt], prefix: str = "") -> list[tuple[str, ast.AST]]:
    """Public functions, classes and methods; what an underscore or a function hides is not public."""
    found: list[tuple[str, ast.AST]] = []
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            found.append((f"{prefix}{node.name}", node))
            if isinstance(node, ast.ClassDef):
                found += public(node.body, f"{prefix}{node.name}.")
    return found


@pytest.mark.parametrize("name", [name for name in tree() if name.endswith(".py")])
def test_every_public_part_says_what_it_is(name):
    content = ast.parse(tree()[name].read_text())
    silent = [] if ast.get_docstring(content) else ["the module"]
    silent += [where for where, node in public(content.body) if not ast.get_docstring(node)]
    assert silent == []
