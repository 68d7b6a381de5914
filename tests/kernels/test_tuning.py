"""The tuner of launches, cut off and begun again; its clock on a GPU is replaced, its table is real."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict

import pytest
from benchmarks import tune_kernels as script

from maesil.kernels.configs import Launch, by_rule

OURS = "some GPU, torch 2, Triton 3"
ALL = list(script.shapes())


def tuned(path, most=None, machine=OURS, **options):
    """Tune with a measurement that is killed after ``most`` shapes; return what it was asked for."""
    asked = []

    def measure(operation, width):
        if len(asked) == most:
            raise KeyboardInterrupt
        asked.append((operation, width))
        return Launch(len(asked), width, 1)

    if most is None:
        assert script.tune("90", machine, measure, path=path, **options) == len(asked)
    else:
        with pytest.raises(KeyboardInterrupt):
            script.tune("90", machine, measure, path=path, **options)
    return asked


def test_what_is_measured_survives_a_kill_and_is_not_measured_again(tmp_path):
    path = tmp_path / "table.json"
    first = tuned(path, most=3)
    document = json.loads(path.read_text(encoding="utf-8"))
    launches = document["architectures"]["90"]
    for number, (operation, width) in enumerate(first, start=1):
        assert launches[operation][str(width)] == asdict(Launch(number, width, 1))
    operation, width = ALL[3]
    assert launches[operation][str(width)] == asdict(by_rule(operation, width))
    assert document["made_by"]["90"] == f"measured on {OURS}; {len(ALL) - 3} of {len(ALL)} shapes by the rule"
    assert first + tuned(path) == ALL
    assert json.loads(path.read_text(encoding="utf-8"))["made_by"]["90"] == f"measured on {OURS}"
    assert tuned(path) == []


def test_another_machine_or_version_measures_anew(tmp_path):
    path = tmp_path / "table.json"
    tuned(path)
    assert tuned(path, machine="another") == ALL


def test_the_budget_ends_it_between_shapes(tmp_path, monkeypatch):
    ticks = itertools.count(0.0, 10.0)
    monkeypatch.setattr(script.time, "monotonic", lambda: next(ticks))
    assert tuned(tmp_path / "table.json", seconds=35.0) == ALL[:3]


def test_every_shape_of_the_table_is_named_once_and_those_of_the_presets_first():
    assert len(set(ALL)) == len(ALL)
    assert {(name, 512) for name in script.BY_PATCH} | {(name, 384) for name in script.BY_WIDTH} == set(ALL[:6])
