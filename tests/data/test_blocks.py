from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.stores import make_store

from maesil.config.schema import ModelConfig, TrainConfig
from maesil.data.blocks import CropBuffer, work_of_visit
from maesil.data.crops import read_crop
from maesil.data.sampler import CropSampler
from maesil.data.sources import Sources

CROP, TILE, CROPS = 16, 32, 5


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "s"
    make_store(path, [(40, 50, 45), (70, 40, 64)], superpatch=TILE)
    model = ModelConfig(crop=CROP, width=8, depth=1, decoder_width=8, decoder_depth=1)
    sources = Sources.open([path], model)
    return CropSampler(sources, sources.groups, CROP, TrainConfig(min_body=0.05, batch=1, crops_per_visit=CROPS))


def crops_and_work(sampler, visit, filled_with):
    draws = [sampler.draw(visit * CROPS + turn, 0) for turn in range(CROPS)]
    k = CROP // 8
    buffers = [
        CropBuffer(np.full((CROP,) * 3, filled_with, np.int16), *np.full((2, k, k, k), filled_with, np.uint8))
        for _ in draws
    ]
    return draws, buffers, list(work_of_visit(sampler.readers, draws, buffers))


def assert_crops_are_as_read_alone(sampler, draws, buffers):
    for draw, buffer in zip(draws, buffers, strict=True):
        alone = read_crop(sampler.readers[draw.store], draw.volume.volume_id, draw.origin, CROP)
        for name in ("hu", "valid", "body"):
            np.testing.assert_array_equal(getattr(buffer, name), getattr(alone, name))


@given(visit=st.integers(0, 200), data=st.data(), filled_with=st.sampled_from([0, 77, 255]))
def test_in_any_order_the_crops_are_as_each_read_by_itself(sampler, visit, data, filled_with):
    draws, buffers, work = crops_and_work(sampler, visit, filled_with)
    assert len({draw.visit for draw in draws}) == 1
    for fill in data.draw(st.permutations(work)):
        fill()
    assert_crops_are_as_read_alone(sampler, draws, buffers)


def test_on_many_threads_the_crops_are_as_each_read_by_itself(sampler):
    with ThreadPoolExecutor(6) as pool:
        for visit in range(30):
            draws, buffers, work = crops_and_work(sampler, visit, 77)
            list(pool.map(lambda fill: fill(), work))
            assert_crops_are_as_read_alone(sampler, draws, buffers)


def test_each_voxel_is_written_by_one_piece_of_work(sampler):
    for visit in range(20):
        _, buffers, work = crops_and_work(sampler, visit, 77)
        times = [np.zeros(buffer.hu.shape, int) for buffer in buffers]
        for fill in work:
            for buffer in buffers:
                buffer.hu.fill(9999)  # no HU of the store
            fill()
            for count, buffer in zip(times, buffers, strict=True):
                count += buffer.hu != 9999
        assert all((count == 1).all() for count in times)
