from __future__ import annotations

import json

import pytest
import torch

from maesil.kernels import configs
from maesil.kernels.configs import TABLE, Launch, by_rule, settings


def powers_of_two(launch: Launch) -> bool:
    return all(n > 0 and n & (n - 1) == 0 for n in (launch.rows, launch.columns, launch.warps))


def test_the_table_holds_sound_settings_and_says_where_they_come_from():
    document = json.loads(TABLE.read_text(encoding="utf-8"))
    assert set(document["made_by"]) == set(document["architectures"]) == {"80", "90", "100"}
    for architecture, operations in document["architectures"].items():
        for operation, widths in operations.items():
            for width in widths:
                launch = settings(operation, int(width), int(architecture))
                assert launch == Launch(**widths[width])
                assert powers_of_two(launch)
                assert launch.columns <= 2 * int(width)


@pytest.mark.parametrize("operation", ["gather", "loss_backward", "unshuffle_backward", "unshuffle_subset"])
def test_the_rule_covers_every_width(operation):
    for width in (1, 2, 8, 33, 100, 216, 343, 1000, 1728, 32768, 65536):
        launch = by_rule(operation, width)
        assert powers_of_two(launch)
        assert launch.columns in (512, 1024) or width <= launch.columns < 2 * width or width % launch.columns == 0


def test_other_architectures_take_the_newest_settings_before_them(monkeypatch):
    table = {name: {"gather": {"512": Launch(1, int(name), 1)}} for name in ("80", "90")}
    monkeypatch.setattr(configs, "_table", lambda: table)
    found = {arch: settings.__wrapped__("gather", 512, arch).columns for arch in (75, 80, 86, 90, 100)}
    assert found == {75: 80, 80: 80, 86: 80, 90: 90, 100: 90}
    assert settings.__wrapped__("gather", 216, 90) == by_rule("gather", 216)


def test_nothing_of_the_choice_depends_on_the_batch():
    assert torch.initial_seed() >= 0  # no GPU is asked
    assert settings("gather", 512, 90) is settings("gather", 512, 90)
