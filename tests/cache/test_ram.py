from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.stores import make_store

from maesil.cache.memory import available_memory
from maesil.cache.ram import budget_bytes, ram_readers
from maesil.errors import StoreError
from maesil.store.reader import SuperpatchReader

EDGE, DECODED = 16, 2 * 16**3


@pytest.fixture(params=["fast", "raw"])
def store(request, tmp_path):
    return make_store(tmp_path / "s", [(40, 36, 33), (16, 20, 40)], superpatch=EDGE, codec=request.param)


def superpatches(reader):
    return [(volume_id, patch.index) for volume_id, v in reader.volumes.items() for patch in v.superpatches]


def read_all(reader):
    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(lambda place: reader.read_superpatch(*place), superpatches(reader)))


def encoded_bytes(store):
    return sum(patch.length for volume in store.volumes() for patch in volume.superpatches)


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 1.0, 10])
def test_whatever_stays_in_memory_the_voxels_are_the_same_and_the_budget_is_kept(store, share):
    expected = read_all(SuperpatchReader(store))
    budget = int(share * encoded_bytes(store))
    (reader,) = ram_readers([store], budget)
    for _ in range(2):
        for found, truth in zip(read_all(reader), expected, strict=True):
            np.testing.assert_array_equal(found, truth)
    assert reader.nbytes <= budget
    longest = max(DECODED, *(p.length for v in store.volumes() for p in v.superpatches))
    everything = max(encoded_bytes(store), DECODED * len(expected) * (budget >= DECODED * len(expected)))
    assert reader.nbytes > min(budget, everything) - 2 * longest


@pytest.mark.parametrize("decoded", [False, True])
def test_what_stays_is_read_once_and_later_damage_of_the_file_does_not_reach_it(store, decoded):
    budget = DECODED * 100 if decoded else encoded_bytes(store)
    (reader,) = ram_readers([store], budget)
    before = read_all(reader)
    for shard in store.path.glob("volumes/*/*/*/0/c/0/0/0"):
        shard.unlink()
    for found, truth in zip(read_all(reader), before, strict=True):
        np.testing.assert_array_equal(found, truth)
    with pytest.raises(StoreError):
        read_all(SuperpatchReader(store))


def test_the_superpatches_with_the_most_body_stay(store):
    (reader,) = ram_readers([store], encoded_bytes(store) // 2)
    body = {(p.path, p.offset): p.body for v in store.volumes() for p in v.superpatches}
    assert reader._kept and min(body[place] for place in reader._kept) >= max(
        share for place, share in body.items() if place not in reader._kept
    )


def test_held_memory_is_not_handed_out(store):
    (reader,) = ram_readers([store], DECODED * 100)
    first = read_all(reader)[0].copy()
    reader.read_superpatch(*superpatches(reader)[0])[:] = 77
    np.testing.assert_array_equal(read_all(reader)[0], first)


def test_several_stores_share_a_budget(tmp_path):
    stores = [make_store(tmp_path / name, [(32, 32, 32)], superpatch=16, seed=n) for n, name in enumerate("ab")]
    budget = sum(map(encoded_bytes, stores)) // 2
    readers = ram_readers(stores, budget)
    for reader in readers:
        read_all(reader)
    assert 0 < sum(reader.nbytes for reader in readers) <= budget
    assert [reader.storage.root for reader in readers] == [store.path for store in stores]


def test_budgets_are_read_and_measured():
    assert (budget_bytes(""), budget_bytes("8GB"), budget_bytes("0.5GB")) == (0, 8 * 10**9, 5 * 10**8)
    assert (budget_bytes("500MB"), budget_bytes("1GiB")) == (5 * 10**8, 2**30)
    assert 10**6 < budget_bytes("auto") < available_memory()
    assert budget_bytes("8GB", processes=8) == 10**9, "the ranks of a machine share it"
    assert budget_bytes("auto", processes=8) < available_memory() / 12
