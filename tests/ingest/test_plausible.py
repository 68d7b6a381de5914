"""What cannot be HU is refused with its code; what a CT may look like passes."""

from __future__ import annotations

import numpy as np
import pytest

from maesil.documents import canonical_json
from maesil.errors import Refused
from maesil.ingest.plausible import check_plausible, plausible
from maesil.ingest.scanned import Scanned


def mixture(shares: dict[tuple[float, float], float], n: int = 200_000, seed: int = 0) -> np.ndarray:
    """Values drawn from normal distributions: {(mean, std): share}."""
    rng = np.random.default_rng(seed)
    parts = [rng.normal(mean, std, round(share * n)) for (mean, std), share in shares.items()]
    return np.rint(np.concatenate(parts)).clip(-1024, 3071).astype(np.float32)


AIR, LUNG, FAT, SOFT, BONE, DENSE = (-995, 15), (-830, 60), (-100, 25), (45, 25), (350, 150), (900, 300)
REAL = {
    "chest": mixture({AIR: 0.45, LUNG: 0.2, FAT: 0.1, SOFT: 0.2, BONE: 0.05}),
    "abdomen": mixture({AIR: 0.4, FAT: 0.25, SOFT: 0.3, BONE: 0.05}),
    "brain, all air masked away": mixture({(35, 8): 0.85, (5, 6): 0.1, DENSE: 0.05}),
    "small field of view without air": mixture({FAT: 0.4, SOFT: 0.5, BONE: 0.1}),
    "spine, small field, much bone": mixture({SOFT: 0.6, BONE: 0.3, (700, 200): 0.1}),
    "teeth and jaw, small field": mixture({SOFT: 0.5, (600, 350): 0.4, (1800, 400): 0.1}),
    "temporal bone, small field": mixture({SOFT: 0.55, (700, 250): 0.45}),
    "knee, small field, thick cortex": mixture({FAT: 0.3, SOFT: 0.5, (400, 150): 0.1, (1150, 150): 0.1}),
    "contrast and metal": mixture({AIR: 0.4, FAT: 0.2, SOFT: 0.3, (350, 40): 0.08, (3071, 1): 0.02}),
    "emphysema, almost all lung": mixture({AIR: 0.5, (-950, 20): 0.4, SOFT: 0.06, BONE: 0.04}),
    "a large field around a child": mixture({AIR: 0.96, FAT: 0.015, SOFT: 0.02, BONE: 0.005}),
    "padding with the lowest value": np.concatenate([np.full(60_000, -1024.0), mixture({AIR: 0.5, SOFT: 0.5}, 90_000)]),
    "noisy, low dose": mixture({(-980, 90): 0.5, (30, 110): 0.45, (300, 200): 0.05}),
}


def check(values: np.ndarray, valid: np.ndarray | None = None) -> None:
    shape = (-1, 10, 10)
    hu = values[: len(values) // 100 * 100].reshape(shape)
    check_plausible(hu, np.ones(hu.shape, bool) if valid is None else valid.reshape(shape))


@pytest.mark.parametrize("name", REAL)
def test_a_ct_passes(name):
    check(REAL[name])


def code_of(values: np.ndarray, valid: np.ndarray | None = None) -> str:
    with pytest.raises(Refused) as caught:
        check(values.astype(np.float32), valid)
    canonical_json(caught.value.numbers)  # goes into the store
    assert "\n" not in str(caught.value)
    return caught.value.code


@pytest.mark.parametrize("name", REAL)
def test_stored_values_plus_1024_are_refused(name):
    if "field" in name or "brain" in name:  # no air to tell by: any refusal is right
        assert code_of(REAL[name] + 1024)
    else:
        assert code_of(REAL[name] + 1024) == "offset_1024"


@pytest.mark.parametrize("value", [0, -1024, 40])
def test_constant(value):
    assert code_of(np.full(2000, float(value))) == "constant"


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_normalised(low):
    chest = REAL["chest"].astype(np.float64)
    assert code_of(low + (chest - chest.min()) / np.ptp(chest) * (1 - low)) == "normalised"


def test_windowed_8_bit():
    assert code_of(np.rint(np.clip((REAL["chest"] + 160) / 400, 0, 1) * 255)) == "eight_bit"


@pytest.mark.parametrize("window", [(-160, 240), (-500, 500), (-800, 1000)])
def test_clipped_to_a_window(window):
    assert code_of(np.clip(REAL["chest"], *window)) == "windowed"


def test_rescaled_twice():
    assert code_of(REAL["chest"] - 1024) in ("no_soft_tissue", "offset_minus_1024")


def test_air_only():
    assert code_of(mixture({AIR: 1.0})) == "no_soft_tissue"


def test_nothing_valid():
    values = REAL["chest"]
    assert code_of(values, np.zeros(len(values), bool)) == "nothing_valid"


def test_padding_takes_no_part():
    values = REAL["chest"].copy()
    valid = np.ones(len(values), bool)
    valid[::3] = False
    values[::3] = 1e9
    check(values, valid)
    values[::3] = np.nan
    check(values, valid)


def test_large_volumes_are_sampled_over_all_of_their_depth():
    """The tissue lies in the last slices only."""
    hu = np.full((80, 300, 300), -1000, np.float32)
    hu[60:] = 40
    check_plausible(hu, np.ones(hu.shape, bool))


@pytest.mark.parametrize("factor", [10, 20])
def test_hu_times_a_factor(factor):
    shares = {AIR: 0.45, LUNG: 0.2, FAT: 0.1, SOFT: 0.2, BONE: 0.05}
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(mean, std, round(share * 200_000)) for (mean, std), share in shares.items()])
    hu = (values * factor).astype(np.float32).reshape(-1, 10, 10)
    scan = Scanned(hu, np.ones(hu.shape, bool), np.eye(4), (), {})
    with pytest.raises(Refused) as caught:
        plausible(scan)
    assert caught.value.code in ("wrong_scale", "rescaled_twice", "no_soft_tissue")


@pytest.mark.parametrize("low", [0, 100])
def test_a_ramp_of_dense_matter_has_its_scale(low):
    """A phantom, not a body; nothing says that its numbers are not HU."""
    ramp = np.concatenate([np.full(40_000, -1000.0), np.linspace(low - 60, 900, 60_000)])
    check(ramp)


def test_half_of_hu():
    assert code_of(REAL["abdomen"] / 2) == "wrong_scale"
