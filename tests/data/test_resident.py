from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stores import make_store

from maesil.config.schema import ModelConfig, TrainConfig
from maesil.data.loader import CropLoader
from maesil.data.resident import ResidentLoader, open_loader, packed
from maesil.data.sampler import CropSampler
from maesil.data.sources import Sources

MODEL = ModelConfig(crop=16, width=8, depth=1, decoder_width=8, decoder_depth=1)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "s"
    make_store(path, [(40, 50, 45), (33, 40, 64), (10, 40, 40)], superpatch=32)
    return Sources.open([path], MODEL)


@pytest.mark.parametrize("offsets", ["across", "inside"])
@pytest.mark.parametrize("crop", [16, 32])
def test_resident_scans_hold_the_same_crops(sources, offsets, crop):
    config = TrainConfig(batch=4, offsets=offsets, min_body=0.05, flips="zyx")
    sampler = CropSampler(sources, sources.groups, crop, config)
    with CropLoader(sampler, 4) as read, ResidentLoader(sampler, 4) as resident:
        for one, two in zip(read.batches(3, 12), resident.batches(3, 12), strict=True):
            assert one.draws == two.draws
            for name in ("valid", "body", "flip"):
                assert torch.equal(getattr(one, name), getattr(two, name))
            for b, (z, y, x) in enumerate(two.hu.origin.tolist()):
                assert torch.equal(one.hu[b], two.hu.scans[b, z : z + crop, y : y + crop, x : x + crop])


def test_all_samples_share_one_copy_of_the_scans(sources):
    sampler = CropSampler(sources, sources.groups, 16, TrainConfig(batch=4))
    with ResidentLoader(sampler, 4) as loader:
        (batch,) = loader.batches(0, 1)
    assert batch.hu.scans.stride(0) == 0
    scans = sum(np.prod([-(-n // 8) * 8 for n in volume.shape]) for _, volume in sampler.volumes)
    assert batch.hu.scans[0].numel() < 2 * scans


boxes = st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(1, 40))


@given(sizes=st.lists(boxes, min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_packed_scans_lie_inside_apart_and_take_no_more_room_than_one_stack(sizes):
    shape, places = packed(sizes)
    taken = np.zeros(shape, np.uint8)
    for size, place in zip(sizes, places, strict=True):
        box = tuple(slice(a, a + n) for a, n in zip(place, size, strict=True))
        assert taken[box].shape == size and not taken[box].any()
        taken[box] = 1
    depths, heights, widths = zip(*sizes, strict=True)
    assert taken.size <= sum(depths) * max(heights) * max(widths)


def test_one_wide_scan_does_not_make_all_others_as_wide():
    sizes = [(300, 512, 512)] + 30 * [(300, 256, 256)]
    shape, _ = packed(sizes)
    assert np.prod(shape) <= 0.5 * 31 * 300 * 512 * 512  # needed are 0.27 of that stack


def test_the_ranks_share_the_batch(sources):
    sampler = CropSampler(sources, sources.groups, 16, TrainConfig(batch=4))
    (single,) = ResidentLoader(sampler, 4).batches(5, 6)
    ranks = [next(ResidentLoader(sampler, 4, rank=rank, world_size=2).batches(5, 6)) for rank in range(2)]
    assert ranks[0].draws + ranks[1].draws == single.draws
    assert torch.equal(torch.cat([rank.hu.origin for rank in ranks]), single.hu.origin)


def test_the_configuration_chooses_the_loader(sources):
    config = TrainConfig(batch=2)
    sampler = CropSampler(sources, sources.groups, 16, config)
    for resident, kind in ((False, CropLoader), (True, ResidentLoader)):
        with open_loader(sampler, replace(config, device_resident=resident), torch.device("cpu")) as loader:
            assert type(loader) is kind
