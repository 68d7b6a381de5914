"""What can be known of the GPU table without a GPU: its ways compute the same, and its least bytes are right."""

from __future__ import annotations

import pytest
import torch
from gpu import kernel_speed as script
from gpu.part import Given, NoGpu


def test_all_ways_compute_the_same():
    given = script.Inputs(script.Shape(batch=2, edge=16, width=24, device="cpu"), seed=0)
    ways = {name: way for name, way in script.ways().items() if "compiled" not in name}
    assert set(ways) == {"maesil", "naive", "good"}
    results = {
        way: {name: prepare()() for name, prepare in script.operations(functions, given).items()}
        for way, functions in ways.items()
    }
    for name in script.least_bytes(given):
        for way in ("naive", "good"):
            torch.testing.assert_close(results[way][name], results["maesil"][name], rtol=2e-2, atol=2e-2)


def test_least_bytes_are_those_counted_by_hand():
    given = script.Inputs(script.Shape(batch=1, device="cpu"), seed=0)
    moved = script.least_bytes(given)
    tokens = 4096 * 512 * 2  # bfloat16, all positions
    assert moved["unshuffle"] == tokens + tokens // 4 + 2 * tokens + 4096 * 8
    assert moved["unshuffle backward"] == tokens + tokens // 4 + 4096 * 8
    ids_and_weights = 3072 * (8 + 4)
    sectors = moved["loss"] - tokens * 3 // 4 - ids_and_weights
    # Two patches share a sector: of the volume's bytes, the share of pairs with one hidden patch or two.
    assert sectors == pytest.approx(2 * 128**3 * (1 - 0.25**2), rel=0.02)
    assert moved["loss backward"] == moved["loss"] + tokens * 3 // 4
    visible = moved["gather"] - tokens // 4 - 1024 * 8
    assert visible == pytest.approx(2 * 128**3 * (1 - 0.75**2), rel=0.05)


@pytest.mark.slow
def test_a_row_says_how_far_from_a_copy_it_is():
    shape = script.Shape(batch=2, edge=16, width=32, device="cpu")
    rows = list(script.measure(shape, 2, copy=1e9, chosen=("maesil", "naive", "good")))
    assert [row["way"] for row in rows] == [way for way in ("maesil", "naive", "good") for _ in range(5)]
    least = script.least_bytes(script.Inputs(shape, seed=0))
    for row in rows:
        assert row["floor_us"] == pytest.approx(least[row["operation"]] / 1e3, abs=0.01)  # at a byte a nanosecond
        assert row["share_of_copy"] == pytest.approx(row["floor_us"] / row["us"], abs=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path):
    with pytest.raises(NoGpu):
        next(script.rows(Given(tmp_path, tmp_path, 60)))
