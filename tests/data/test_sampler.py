from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from support.lanes import slow_but
from support.stores import add_volume, make_store

from maesil.config.schema import ModelConfig, TrainConfig
from maesil.data.sampler import CropSampler, _Block, window_sums
from maesil.data.sources import Sources
from maesil.errors import NoInputError
from maesil.types import AIR_HU, zyx

MODEL = ModelConfig(crop=16, width=8, depth=1, decoder_width=8, decoder_depth=1)
CONFIG = TrainConfig(min_body=0.3, batch=3, crops_per_visit=4)
BOTH = pytest.mark.parametrize("offsets", ["across", "inside"])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    make_store(folder / "a", [(40, 50, 45), (33, 40, 64), (16, 70, 40)], superpatch=32)
    make_store(folder / "b", [(32, 32, 32)], superpatch=32, seed=10)
    return Sources.open([folder / "a", folder / "b"], MODEL)


def make_sampler(sources, crop=16, **changes):
    return CropSampler(sources, sources.groups, crop, replace(CONFIG, **changes))


def all_crops(sources, crop, inside=False):
    """Each crop with enough body and its body, found one by one."""
    found = {}
    for reader, volume in sources.volumes(sources.groups):
        z, y, x = (-(-n // 8) * 8 for n in volume.shape)
        if inside:
            z, y, x = (n * volume.tile for n in volume.grid)
        for origin in np.ndindex(z // 8, y // 8, x // 8):
            origin = tuple(8 * o for o in origin)
            beyond = any(o and o + crop > n for o, n in zip(origin, (z, y, x), strict=True))
            crosses = inside and any(o // 32 != (o + crop - 1) // 32 for o in origin)
            body = reader.read_map_region(volume.volume_id, "body", origin, (crop, crop, crop)).astype(int)
            if not beyond and not crosses and body.mean() >= 0.3 * 255:
                found[volume.volume_id, origin] = body.sum()
    return found


def draws(sampler, steps, sample=None):
    samples = range(sampler.batch) if sample is None else [sample]
    return [sampler.draw(step, one) for step in range(steps) for one in samples]


@BOTH
@pytest.mark.parametrize("crop", [8, 32, (8, 24, 16), (40, 16, 32)])
@pytest.mark.parametrize("changes", [{}, {"thin": "pad", "min_body": 0.6}, {"min_body": 0.0}])
def test_the_weight_of_a_block_is_the_body_of_its_crops(sources, offsets, crop, changes):
    """All of a volume are summed up at once; here one by one."""
    sampler = CropSampler(sources, sources.groups, 16, replace(CONFIG, offsets=offsets, **changes))
    sampler.crop = zyx(crop)
    for reader, volume in sources.volumes(sources.groups):
        store = sources.readers.index(reader)
        alone = [sampler._crops(_Block(store, volume, patch.index))[1].sum() for patch in volume.superpatches]
        assert sampler._weights_of(store, volume).tolist() == alone


RECORDED = {
    ("across", 16, ""): "fcde23aa4bc8f671", ("across", (8, 24, 16), ""): "8fe7a66e951db660",
    ("inside", 16, ""): "d4c44c12e96deb55", ("inside", 32, ""): "86b5ca9d5eb969ff",
    ("across", 16, "body > 0.5 and iz == 0"): "92dfdcd9e7d85638",
    ("inside", 32, "body > 0.5 and iz == 0"): "aa72ea8a08d8b8bd",
}  # fmt: skip


@pytest.mark.parametrize(("offsets", "crop", "where"), RECORDED)
def test_a_run_draws_what_it_drew_with_earlier_versions(sources, offsets, crop, where):
    """So a run that an earlier version began goes on where it was. The digests are of the version before tables."""
    if where:
        sources = Sources.open([store.path for store in sources.stores], MODEL, where=where)
    sampler = make_sampler(sources, crop, offsets=offsets)
    rows = [(d.store, d.volume.volume_id, d.origin, d.visit, d.flip, d.mask_seed) for d in draws(sampler, 40)]
    told = rows, sampler._weights.tolist(), sampler.epoch_steps, [volume.volume_id for _, volume in sampler.volumes]
    assert hashlib.sha256(repr(told).encode()).hexdigest()[:16] == RECORDED[offsets, crop, where]


def test_window_sums_equal_the_loop():
    cells = np.random.default_rng(0).integers(0, 256, (5, 6, 4)).astype(np.uint8)
    sums = window_sums(cells, 3)
    assert sums.shape == (3, 4, 2)
    for z, y, x in np.ndindex(*sums.shape):
        assert sums[z, y, x] == cells[z : z + 3, y : y + 3, x : x + 3].sum(dtype=np.int64)


@BOTH
def test_a_draw_is_a_function_of_seed_step_and_sample(sources, offsets):
    found = draws(make_sampler(sources, offsets=offsets), 40)
    again = make_sampler(sources, offsets=offsets)
    assert [again.draw(step, one) for step in reversed(range(40)) for one in reversed(range(3))] == found[::-1]
    assert len({draw.mask_seed for draw in found}) == 120
    assert draws(make_sampler(sources, offsets=offsets, seed=1), 40) != found


@pytest.mark.parametrize("offsets", slow_but(("across", "inside"), ("across",)))
@pytest.mark.parametrize("crop", [16, 32])
def test_every_crop_with_enough_body_is_drawn_by_its_body_and_no_other(sources, offsets, crop):
    sampler = make_sampler(sources, crop, offsets=offsets)
    expected = all_crops(sources, crop, inside=offsets == "inside")
    drawn = Counter((d.volume.volume_id, d.origin) for d in draws(sampler, 3000))
    assert set(drawn) <= set(expected)
    total, count = sum(expected.values()), sum(drawn.values())
    # Summed into few bins, since there may be more crops than draws: by where in the list of all crops they stand.
    places = sorted(expected)
    for part in np.array_split(np.arange(len(places)), min(8, len(places))):
        share = sum(expected[places[i]] for i in part) / total
        found = sum(drawn[places[i]] for i in part) / count
        assert abs(found - share) < 5 * np.sqrt(share * (1 - share) / count * sampler.crops_per_visit)


@pytest.mark.parametrize("offsets", slow_but(("across", "inside"), ("across",)))
def test_the_crops_of_a_visit_are_drawn_by_their_body(tmp_path, offsets):
    """One block, whose body grows from one side to the other."""
    store, hu = make_store(tmp_path / "s", []), np.full((32, 32, 32), 40, np.int16)
    add_volume(store, hu, body=np.random.default_rng(0).random(hu.shape) < np.linspace(0, 1, 32) ** 2)
    sampler = make_sampler(Sources.open([tmp_path / "s"], MODEL), offsets=offsets, min_body=0.01)
    assert len(sampler._owner) == 1
    block = sampler._block(0)
    cells, body = sampler._crops(block)
    drawn, count = Counter(draw.origin for draw in draws(sampler, 2000)), 6000
    for cell, share in zip(cells, body / body.sum(), strict=True):
        found = drawn[tuple(8 * cell)] / count
        assert abs(found - share) < 5 * np.sqrt(share * (1 - share) / count * sampler.crops_per_visit), cell
    assert body.max() > 5 * body.min(), "all crops hold alike: this test shows less than it says"


@BOTH
def test_an_epoch_visits_each_block_by_its_weight_and_no_block_of_average_weight_twice(sources, offsets):
    sampler = make_sampler(sources, offsets=offsets)
    n, expected = len(sampler._owner), sampler._weights * len(sampler._owner) / sampler._weights.sum()
    epochs = [np.bincount(sampler._draw_epoch(epoch), minlength=n) for epoch in range(50)]
    for visits in epochs:
        assert visits.sum() == n
        assert (np.abs(visits - expected) < 1).all()
    assert len({tuple(sampler._draw_epoch(epoch)) for epoch in range(5)}) == 5
    # Between floor and ceiling by chance alone: over many epochs the weights come out.
    assert np.abs(np.mean(epochs, axis=0) - expected).max() < 5 * 0.5 / np.sqrt(50)


def test_equal_weights_make_a_permutation(tmp_path):
    store = make_store(tmp_path / "s", [])
    hu = np.full((64, 64, 96), 40, np.int16)
    add_volume(store, hu)
    sources = Sources.open([tmp_path / "s"], replace(MODEL, crop=32))
    sampler = make_sampler(sources, 32, offsets="inside")
    assert len(sampler._owner) == 12
    for epoch in range(10):
        visited = [sampler.draw(n // 3, n % 3).origin for n in range(12 * epoch, 12 * epoch + 12)]
        assert len(set(visited)) == 12


def test_places_of_a_batch_work_through_visits_of_their_own_and_change_them_in_turn(sources):
    sampler = make_sampler(sources, batch=4, crops_per_visit=4)
    visits = np.array([[sampler.draw(step, sample).visit for sample in range(4)] for step in range(24)])
    assert all(len(set(row)) == 4 for row in visits)
    changes = visits[1:] != visits[:-1]
    assert (changes.sum(axis=1) == 1).all()
    counts = Counter(visits.ravel().tolist())
    assert all(counts[visit] == 4 for visit in range(4, 16))
    # Crops of one visit lie in one block of 2x2x2 superpatches and are not all the same.
    for visit in range(4, 16):
        origins = [d.origin for d in draws(sampler, 24) if d.visit == visit]
        assert len({tuple(o // 32 for o in origin) for origin in origins}) == 1


def test_stores_with_weights_give_their_share_of_the_crops(sources):
    weighted = replace(sources, weights=(3.0, 1.0))
    sampler = CropSampler(weighted, weighted.groups, 16, CONFIG)
    first = {draw.store for draw in draws(sampler, 10)}
    assert first == {0, 1}
    share = np.mean([draw.store == 0 for draw in draws(sampler, 2000)])
    assert share == pytest.approx(0.75, abs=0.03)


def test_flips_are_those_asked_for(sources):
    flips = {draw.flip for draw in draws(make_sampler(sources, flips="zx"), 60, 0)}
    assert flips == {(z, False, x) for z in (False, True) for x in (False, True)}
    assert {draw.flip for draw in draws(make_sampler(sources, flips=""), 20, 0)} == {(False, False, False)}


def test_window_shifts_are_even_and_those_of_their_sample_alone(sources):
    sampler = make_sampler(sources)
    shifts = np.array([draw.window_shift for draw in draws(sampler, 400, 0)])
    assert np.abs(shifts).max() <= 1
    assert np.abs(shifts.mean(axis=0)).max() < 0.15 and np.abs(np.corrcoef(shifts.T)[0, 1]) < 0.2
    assert sampler.draw(7, 1).window_shift == sampler.draw(7, 1).window_shift != sampler.draw(7, 2).window_shift


@BOTH
def test_a_store_without_enough_body_is_refused(tmp_path, offsets):
    store = make_store(tmp_path / "s", [])
    add_volume(store, np.full((32, 32, 32), AIR_HU, np.int16))
    with pytest.raises(NoInputError, match=r"body share of 0\.3.*train\.min_body"):
        make_sampler(Sources.open([tmp_path / "s"], MODEL), offsets=offsets)


def test_a_volume_smaller_than_a_crop_gives_one_crop_along_that_axis(tmp_path):
    store = make_store(tmp_path / "s", [])
    add_volume(store, np.full((9, 40, 33), 40, np.int16))
    sampler = make_sampler(Sources.open([tmp_path / "s"], replace(MODEL, crop=32)), 32, min_body=0.2)
    origins = {draw.origin for draw in draws(sampler, 200)}
    assert origins == {(0, y, x) for y in (0, 8) for x in (0, 8)}
