"""The runner: parts of their own, cut off in time, rows kept; a bundle's packages; exit codes."""

from __future__ import annotations

import json
import os
import sys
import zipfile

import pytest
from gpu import report, run

PARTS = {
    "quick": "yield {'what': 'quick', 'value': 1}",
    "slow": "import time\n    yield {'what': 'first', 'value': 1}\n    time.sleep(60)\n    yield {}",
    "broken": "yield {'what': 'first', 'value': 1}\n    raise ValueError('no')",
    "killed": "import os\n    yield {'what': 'first', 'value': 1}\n    os._exit(9)",
}


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Parts of the runner's own package, in a folder of their own."""
    for name, body in PARTS.items():
        (tmp_path / "gpu").mkdir(exist_ok=True)
        (tmp_path / "gpu" / f"{name}.py").write_text(f"def rows(given):\n    {body}\n")
        monkeypatch.setitem(report.TITLES, name, name)
        monkeypatch.setitem(report.TABLES, name, report.TABLES["machine"])
    monkeypatch.setattr(run, "PARTS", dict.fromkeys(PARTS, 3))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def states(folder) -> dict[str, str]:
    return {name: part["state"] for name, part in json.loads((folder / "gpu.json").read_text())["parts"].items()}


def test_each_part_stands_by_itself_and_rows_are_kept(parts):
    assert run.run_all(list(PARTS), 16 / 60, parts / "store.zarr", parts) == run.EXIT_FAILED
    found = states(parts)
    assert found["quick"] == "done" and found["broken"] == "failed: ValueError: no"
    assert found["slow"].startswith("cut off after ") and found["killed"].startswith("failed: exit code 9")
    document = json.loads((parts / "gpu.json").read_text())
    assert all(len(part["rows"]) == 1 for part in document["parts"].values())
    assert (parts / "gpu.md").read_text().count("| first | 1 |") == 3
    assert not [path for path in parts.iterdir() if path.name.startswith("gpu-")]


def test_all_went_well(parts):
    assert run.run_all(["quick"], 1.0, parts / "store.zarr", parts) == 0
    assert states(parts) == {"quick": "done"}


def test_a_part_takes_what_the_parts_before_it_left_over(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(run, "run_one", lambda name, seconds, *rest: given.update({name: round(seconds)}))
    run.run_all(list(run.PARTS), run.MINUTES, tmp_path / "store.zarr", tmp_path)
    last = list(run.PARTS)[-1]
    assert given["machine"] == run.PARTS["machine"] + given[last] - sum(run.PARTS.values())
    assert given[last] == round(60 * run.MINUTES)  # nothing was taken before it
    assert sum(run.PARTS.values()) <= 60 * run.MINUTES < 540
    assert sum(run.WITHOUT_GPU.values()) + run.PARTS["machine"] <= 60 * run.MINUTES


def wheel(folder, tag: str) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"thing-1-{tag}-manylinux_2_28_x86_64.whl", "w") as archive:
        archive.writestr("thing/__init__.py", "answer = 42\n")


def test_packages_of_a_bundle_are_unpacked_once_and_come_before_others(tmp_path, monkeypatch):
    wheel(tmp_path / run.WHEELS, "cp312-cp312")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    for _ in range(2):
        folders = run.environment(tmp_path)["PYTHONPATH"].split(os.pathsep)
        assert folders[:2] == [str(tmp_path), str(tmp_path / "tests")]
        assert folders[-2:] == [str(tmp_path / run.PACKAGES), "elsewhere"]
    assert (tmp_path / run.PACKAGES / "thing" / "__init__.py").read_text() == "answer = 42\n"
    assert run.environment(tmp_path / "no bundle")["PYTHONPATH"].split(os.pathsep)[-1] == "elsewhere"


def test_wheels_for_another_python_are_told(tmp_path):
    here = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheel(tmp_path, f"{here}-{here}")
    assert run.wrong_python(tmp_path) == ""
    other = tmp_path / "other"
    wheel(other, "cp37-cp37m")
    told = f"expected Python 3.7, which the wheels in {other} are for, found 3.{sys.version_info.minor}"
    assert run.wrong_python(other) == told
    assert run.wrong_python(tmp_path / "none") == ""


@pytest.mark.parametrize(
    ("words", "told"), [(["frobnicate"], "frobnicate: expected some of machine"), ([], "expected a store, found none")]
)
def test_usage_is_told_in_a_line(tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.setattr(sys, "argv", ["run.py", *words, "--store", str(tmp_path / "no"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == run.EXIT_USAGE and told in capsys.readouterr().err
