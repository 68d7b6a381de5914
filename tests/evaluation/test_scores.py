"""Rows of volumes to rows of tables."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.stores import add_volume, make_store, synthetic_hu

from maesil.evaluation.scores import thickness_of


@pytest.mark.parametrize(("thickness", "name"), [
    (0.6, "<= 2 mm"), (2.0, "<= 2 mm"), (2.1, "2-3.5 mm"), (3.5, "2-3.5 mm"), (5.0, "> 3.5 mm")
])  # fmt: skip
def test_the_thickness_group_is_that_of_the_scanner_s_slices_and_not_of_the_store_s(tmp_path, thickness, name):
    volume = add_volume(make_store(tmp_path / "s", []), synthetic_hu((16, 16, 16)), spacing=(3.0, 1.0, 1.0))
    assert thickness_of(replace(volume, source_spacing=(thickness, 3.0, 3.0))) == name
