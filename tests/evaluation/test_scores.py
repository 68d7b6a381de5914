"""Rows of volumes to rows of tables."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from support.stores import add_volume, make_store, synthetic_hu

from maesil.evaluation.scores import SCORES, Report, mean_rows, thickness_of


@pytest.mark.parametrize(("thickness", "name"), [
    (0.6, "<= 2 mm"), (2.0, "<= 2 mm"), (2.1, "2-3.5 mm"), (3.5, "2-3.5 mm"), (5.0, "> 3.5 mm")
])  # fmt: skip
def test_the_thickness_group_is_that_of_the_scanner_s_slices_and_not_of_the_store_s(tmp_path, thickness, name):
    volume = add_volume(make_store(tmp_path / "s", []), synthetic_hu((16, 16, 16)), spacing=(3.0, 1.0, 1.0))
    assert thickness_of(replace(volume, source_spacing=(thickness, 3.0, 3.0))) == name


def test_a_score_is_the_mean_over_the_volumes_that_have_it():
    """NaN and None are no scores; 0 is one. Rows that differ in a key are not mixed."""
    found = [0.0, 3.0, math.nan, None]
    rows = [{**dict.fromkeys(SCORES, value), "region": "body", "model": "x"} for value in found]
    rows += [{**dict.fromkeys(SCORES, math.inf), "region": "whole", "model": "x"}]
    body, whole = mean_rows(rows, ("region", "model"), {"seed": 7})
    assert (body["region"], body["seed"], body["volumes"]) == ("body", 7, 2)
    assert all(body[name] == 1.5 for name in SCORES)
    assert all(whole[name] is None for name in SCORES)


def test_the_spread_is_over_patients():
    scores = [("a", "body", 10.0), ("a", "body", 12.0), ("b", "body", 14.0), ("c", "whole", 99.0), ("d", "body", None)]
    per_volume = [
        {"model": "x", "group": group, "region": region, "psnr_hidden": psnr} for group, region, psnr in scores
    ]
    report = Report({}, [], [], per_volume, ())
    assert report._spread({"model": "x", "region": "body"}) == " ± 2.12"  # of 11 and 14
    assert report._spread({"model": "x", "region": "whole"}) == ""
