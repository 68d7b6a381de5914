"""What can be known of the GPU table without a GPU: its ways compute the same, and its least bytes are right."""

from __future__ import annotations

import json

import pytest
import torch
from benchmarks import kernels_gpu as script


def test_all_ways_compute_the_same():
    given = script.Inputs(script.Shape(batch=2, edge=16, width=24, device="cpu"), seed=0)
    ways = {name: way for name, way in script.ways(smoke=True).items() if "compiled" not in name}
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


def test_rows_are_on_the_disk_before_the_next_is_measured(tmp_path):
    path = tmp_path / "figures.json"

    def rows():
        yield {"us": 1.0}
        assert json.loads(path.read_text(encoding="utf-8")) == {"device": "d", "latency": [{"us": 1.0}], "step": []}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        script.write_row_by_row({"device": "d"}, {"latency": rows(), "step": iter(())}, path)
