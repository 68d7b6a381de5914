from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.stores import add_volume, make_store, synthetic_hu

from maesil.config.schema import ModelConfig, TrainConfig
from maesil.data.crops import grid_crops, patch_shares, validation_crops, whole_patches
from maesil.data.intensity import measure_intensity
from maesil.data.sampler import CropSampler
from maesil.data.sources import Sources
from maesil.data.split import split_groups
from maesil.errors import NoInputError, StoreError, UsageError
from maesil.models.patches import patchify
from maesil.store.store import Store
from maesil.types import AIR_HU

MODEL = ModelConfig(crop=16, width=8, depth=1, decoder_width=8, decoder_depth=1)
CONFIG = TrainConfig(min_body=0.3, batch=3)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    make_store(folder / "a", [(40, 50, 45), (33, 40, 64)], superpatch=32)
    make_store(folder / "b", [(32, 32, 32)], superpatch=32, seed=10)
    return [folder / "a", folder / "b"]


@pytest.fixture(scope="module")
def sources(stores):
    return Sources.open(stores, MODEL)


def test_the_order_of_the_stores_changes_nothing(stores, sources):
    other_way = Sources.open(stores[::-1], MODEL)
    assert other_way.fingerprints == sources.fingerprints
    ids = [[volume.volume_id for _, volume in s.volumes(s.groups)] for s in (sources, other_way)]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 3


def test_stores_that_do_not_fit_or_are_none_are_named(stores, tmp_path):
    with pytest.raises(UsageError, match=r"/[ab]: its superpatches have an edge of 32"):
        Sources.open(stores, replace(MODEL, crop=48))
    with pytest.raises(StoreError, match="nowhere"):
        Sources.open([tmp_path / "nowhere"], MODEL)
    make_store(tmp_path / "empty", [])
    with pytest.raises(NoInputError, match="empty: no volumes"):
        Sources.open([tmp_path / "empty"], MODEL)


@pytest.mark.parametrize(
    ("patients", "share", "held_out"),
    [(1, 0.2, 0), (2, 0.2, 1), (3, 0.2, 1), (4, 0.2, 1), (10, 0.2, 2), (10, 0.01, 1), (3, 0.9, 2), (50, 0.0, 0)],
)
def test_split_holds_out_whole_patients(patients, share, held_out):
    groups = [f"patient-{n}" for n in range(patients)]
    split = split_groups(groups * 3, share, seed=0)
    assert len(split.validation) == held_out
    assert sorted(split.train + split.validation) == sorted(groups)
    assert split == split_groups(reversed(groups), share, seed=0)


def test_split_depends_on_the_seed_and_a_new_patient_moves_at_most_one():
    groups = [f"patient-{n}" for n in range(40)]
    assert split_groups(groups, 0.2, 0) != split_groups(groups, 0.2, 1)
    before, after = split_groups(groups, 0.2, 0), split_groups([*groups, "new"], 0.2, 0)
    assert len(set(before.validation) - set(after.validation)) <= 1


def test_intensity_is_that_of_the_wholly_valid_cells(tmp_path):
    store = make_store(tmp_path / "s", [])
    rng = np.random.default_rng(0)
    hu = rng.integers(-1024, 3072, (40, 48, 56)).astype(np.int16)
    valid = np.ones(hu.shape, bool)
    valid[:3] = False  # the first layer of cells is partly invalid
    valid[20:, 30:, :] = False
    hu[~valid] = 2000
    add_volume(store, hu, valid=valid)
    sources = Sources.open([tmp_path / "s"], MODEL)
    window = (-500.0, 700.0)
    found = measure_intensity(sources, sources.groups, window)
    cells = [slice(n, n + 8) for n in range(0, 56, 8)]
    kept = [hu[box] for box in itertools.product(cells[:5], cells[:6], cells) if valid[box].all()]
    values = (np.clip(np.stack(kept).astype(np.float64), *window) + 500) / 1200
    assert (found.mean, found.std) == (pytest.approx(values.mean(), rel=1e-12), pytest.approx(values.std(), rel=1e-12))
    assert measure_intensity(sources, sources.groups, window, workers=1) == found


def test_training_volumes_without_contrast_are_refused(sources):
    with pytest.raises(NoInputError, match="no contrast"):
        measure_intensity(sources, sources.groups, (3100.0, 3200.0))
    with pytest.raises(NoInputError, match="0 valid voxels"):
        measure_intensity(sources, [], (-1000.0, 1000.0))


def test_grid_crops_cover_every_valid_voxel_once_padded_at_the_end(sources):
    reader, volume = next(sources.volumes(sources.groups))
    z, y, x = volume.shape
    whole = np.full([-(-n // 16) * 16 for n in volume.shape], AIR_HU, np.int16)
    whole[:z, :y, :x] = reader.read_region(volume.volume_id, (0, 0, 0), volume.shape)
    covered = np.zeros(whole.shape, int)
    for crop in grid_crops(reader, [volume.volume_id], 16):
        box = tuple(slice(o, o + 16) for o in crop.origin)
        covered[box] += 1
        np.testing.assert_array_equal(crop.hu, whole[box])
        assert crop.valid.shape == crop.body.shape == (2, 2, 2)
    assert (covered == 1).all()
    full = list(grid_crops(reader, [volume.volume_id], 16, min_valid=1.0))
    assert len(full) == (z // 16) * (y // 16) * (x // 16)


def test_grid_crops_leave_out_what_lies_outside_the_scan(tmp_path):
    store = make_store(tmp_path / "s", [])
    valid = np.zeros((32, 32, 32), bool)
    valid[:16, :16, :] = True
    volume = add_volume(store, synthetic_hu((32, 32, 32)), valid=valid)
    (reader,) = Sources.open([tmp_path / "s"], MODEL).readers
    origins = [crop.origin for crop in grid_crops(reader, [volume.volume_id], 16)]
    assert origins == [(0, 0, 0), (0, 0, 16)]


def test_validation_crops_are_few_spread_out_and_always_the_same(sources):
    config = replace(CONFIG, validation_crops=5)
    crops = validation_crops(sources, sources.groups, 16, config)
    again = validation_crops(sources, sources.groups, 16, config)
    assert [(c.volume_id, c.origin) for c in crops] == [(c.volume_id, c.origin) for c in again]
    assert len(crops) == 5
    assert len({c.volume_id for c in crops}) >= 2
    assert all(c.body.mean() >= 0.3 * 255 for c in crops)
    assert validation_crops(sources, [], 16, config) == []


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_patch_shares_are_those_of_the_mirrored_voxels(patch):
    rng = np.random.default_rng(0)
    cells = torch.from_numpy(rng.integers(0, 256, (3, 4, 4, 4)).astype(np.uint8))
    flip = torch.tensor([[False, False, False], [True, False, False], [True, False, True]])
    voxels = cells.double()
    for axis in (1, 2, 3):
        voxels = voxels.repeat_interleave(8, dim=axis)
    for shares, turned in (
        (patch_shares(cells, patch), voxels),
        (patch_shares(cells, patch, flip), torch.stack([voxels[0], voxels[1].flip(0), voxels[2].flip(0, 2)])),
    ):
        torch.testing.assert_close(shares.double(), patchify(turned, patch).mean(dim=-1) / 255)


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_patches_that_lie_partly_beyond_the_scan_count_nothing(patch):
    rng = np.random.default_rng(0)
    cells = torch.from_numpy(rng.choice([0, 254, *[255] * 18], (3, 4, 4, 4)).astype(np.uint8))
    flip = torch.tensor([[False, False, False], [True, False, False], [True, False, True]])
    shares = patch_shares(cells, patch, flip)
    whole = whole_patches(cells, patch, flip)
    assert torch.equal(whole > 0, shares == 1) and 0 < whole.mean() < 1 and set(whole.unique().tolist()) == {0.0, 1.0}


def test_a_filter_decides_what_is_drawn_measured_and_validated(tmp_path):
    store = make_store(tmp_path / "s", [(64, 64, 64), (40, 64, 64)], superpatch=32)
    bodies = {(v.volume_id, p.index): p.body for v in store.volumes() for p in v.superpatches}
    limit = sorted(bodies.values())[len(bodies) // 2]
    model = ModelConfig(crop=16, patch=8)
    sources = Sources.open([store.path], model, where=f"body > {limit}")
    taken = {(v.volume_id, p.index) for _, v in sources.volumes(sources.groups) for p in v.superpatches}
    assert taken == {place for place, body in bodies.items() if body > limit}
    sampler = CropSampler(sources, sources.groups, 16, TrainConfig())
    draws = [sampler.draw(step, sample) for step in range(20) for sample in range(8)]
    assert {(draw.volume.volume_id, tuple(o // 32 for o in draw.origin)) for draw in draws} <= taken
    for crop in validation_crops(sources, sources.groups, 16, TrainConfig()):
        assert (crop.volume_id, tuple(o // 32 for o in crop.origin)) in taken
    with pytest.raises(NoInputError, match="--where 'body > 1' takes"):
        Sources.open([store.path], model, where="body > 1")


def test_volumes_that_came_later_are_not_used(sources):
    """Of each store those that a run began with."""
    began = [sorted(reader.volumes)[:1] for reader in sources.readers]
    then = replace(sources, only=tuple(map(set, began)))
    assert [volume.volume_id for _, volume in then.volumes(sources.groups)] == [one for some in began for one in some]
    assert then.left_out == 1 and len(then.groups) == 2 and len(sources.groups) == 3


def test_weights_are_the_shares_of_the_crops_that_stores_give(tmp_path):
    stores = [make_store(tmp_path / "a", [(64, 64, 64)], superpatch=32).path,
              make_store(tmp_path / "b", [(32, 32, 32)], superpatch=32, seed=5).path]  # fmt: skip
    model = ModelConfig(crop=16, patch=8)
    for weights in ((1.0, 3.0), (3.0, 1.0)):
        sources = Sources.open(stores, model, weights=weights)
        assert dict(zip(sources.fingerprints, sources.weights, strict=True)) == {
            Store.open(path).fingerprint: weight for path, weight in zip(stores, weights, strict=True)
        }
        sampler = CropSampler(sources, sources.groups, 16, TrainConfig())
        drawn = [
            sources.readers[sampler.draw(step, sample).store].storage.root for step in range(400) for sample in range(8)
        ]
        assert abs(drawn.count(stores[0]) / len(drawn) - weights[0] / 4) < 0.06


def test_copies_of_a_scan_in_two_stores_are_one_patient(tmp_path):
    first = make_store(tmp_path / "a", [(64, 64, 64)], superpatch=32)
    second = make_store(tmp_path / "b", [], superpatch=32)
    add_volume(second, synthetic_hu((64, 64, 64)), name="renamed", group="another key")
    sources = Sources.open([first.path, second.path], ModelConfig(crop=16, patch=8))
    assert len(sources.groups) == 2 and len(set(sources.patients.values())) == 1
