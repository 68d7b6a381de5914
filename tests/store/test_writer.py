"""Attempts: zarr-python reads the voxels that were given, however many threads wrote them."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stores import cells, synthetic_hu

from maesil.store.local_storage import LocalStorage
from maesil.store.recipe import CODECS
from maesil.store.writer import Image, write_attempt

SHAPES = st.tuples(*[st.integers(1, 70)] * 3)


def image_of(hu: np.ndarray) -> Image:
    """An image that is valid everywhere, with 2 mm voxels."""
    return Image(hu, np.diag([2.0, 2.0, 2.0, 1.0]), cells(np.ones(hu.shape, bool)), cells(hu > -950))


@settings(max_examples=12, deadline=None)
@given(SHAPES, st.sampled_from([8, 16, 32]), st.sampled_from(CODECS), st.integers(1, 4))
def test_zarr_reads_what_was_written(shape, tile, codec, threads):
    hu = synthetic_hu(shape)
    with tempfile.TemporaryDirectory() as folder:
        patches, documents = write_attempt(
            LocalStorage(Path(folder)), "ab" * 16, "attempt", image_of(hu), tile=tile, codec=codec, threads=threads
        )
        group = zarr.open_group(Path(folder) / "volumes/ab" / ("ab" * 16) / "attempt", mode="r")
        np.testing.assert_array_equal(group["0"][...], hu)
        assert {"zarr.json", "0/zarr.json", "valid/zarr.json", "body/zarr.json"} <= set(documents)
        assert {"thumbnail/zarr.json"} <= set(documents) or not (hu > -400).any()
    grid = tuple(-(-n // tile) for n in shape)
    assert [patch.index for patch in patches] == list(np.ndindex(grid))
    for patch in patches:
        there = hu[tuple(slice(i * tile, (i + 1) * tile) for i in patch.index)]
        inside = cells(np.ones(there.shape, bool)).sum() / 255 / (tile / 8) ** 3
        assert patch.valid == pytest.approx(inside, abs=0.002)
        if inside > 0.2:  # shares of cells are stored as 0 to 255
            assert patch.air == pytest.approx((there <= -900).mean(), abs=0.02)


def test_threads_do_not_change_a_byte(tmp_path):
    hu = synthetic_hu((90, 70, 150))
    made = {}
    for threads in (1, 2, 5):
        root = tmp_path / str(threads)
        patches, documents = write_attempt(
            LocalStorage(root), "ab" * 16, "attempt", image_of(hu), tile=16, codec="fast", threads=threads
        )
        files = {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        made[threads] = (files, patches, documents)
    assert made[1] == made[2] == made[5]
    assert len(made[1][1]) == 6 * 5 * 10  # in several shards


def test_a_disk_that_fills_up_keeps_nothing_of_the_attempt(tmp_path, monkeypatch):
    """So that space which is freed afterwards is free for the next attempt."""
    real = os.fsync

    def full(descriptor: int) -> None:
        if "/c/" in os.fsdecode(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    image = image_of(synthetic_hu((20, 20, 20)))
    with pytest.raises(OSError, match="No space left"):
        write_attempt(LocalStorage(tmp_path), "ab" * 16, "attempt", image, tile=16, codec="raw")
    assert not (tmp_path / "volumes/ab" / ("ab" * 16) / "attempt").exists()
