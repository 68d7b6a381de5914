from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.stores import add_volume, make_store, synthetic_hu

from maesil.config.schema import ModelConfig, TrainConfig
from maesil.data.crops import grid_crops
from maesil.data.loader import CropLoader, samples_of_rank
from maesil.data.sampler import CropSampler
from maesil.data.sources import Sources
from maesil.errors import StoreError, UsageError
from maesil.types import AIR_HU

MODEL = ModelConfig(crop=16, width=8, depth=1, decoder_width=8, decoder_depth=1)
CONFIG = TrainConfig(min_body=0.05, batch=3, crops_per_visit=4)
OFFSETS = ("across", "inside")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "s"
    make_store(path, [(40, 50, 45), (33, 40, 64)], superpatch=32)
    return path


def make_sampler(path, crop=16, **changes):
    sources = Sources.open([path], replace(MODEL, crop=crop))
    return CropSampler(sources, sources.groups, crop, replace(CONFIG, **changes))


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("crop", [16, 32])
def test_batches_hold_the_voxels_and_maps_of_their_draws(path, offsets, crop):
    sampler, size = make_sampler(path, crop, offsets=offsets), (crop,) * 3
    with CropLoader(sampler, batch=3, readers=3) as loader:
        for step, batch in enumerate(loader.batches(4, 20), 4):
            assert batch.hu.dtype is torch.int16
            assert batch.draws == tuple(sampler.draw(step, sample) for sample in range(3))
            for b, draw in enumerate(batch.draws):
                hu = sampler.readers[draw.store].read_region(draw.volume.volume_id, draw.origin, size)
                np.testing.assert_array_equal(batch.hu[b].numpy(), hu)
                for name in ("valid", "body"):
                    cells = sampler.readers[draw.store].read_map_region(draw.volume.volume_id, name, draw.origin, size)
                    np.testing.assert_array_equal(getattr(batch, name)[b].numpy(), cells)
                assert batch.flip[b].tolist() == list(draw.flip)


def test_wherever_it_begins_a_step_is_the_same(path):
    sampler = make_sampler(path)
    with CropLoader(sampler, batch=3) as loader:
        whole = [batch.hu.clone() for batch in loader.batches(0, 12)]
        for begin in (1, 5, 11):
            assert all(
                torch.equal(batch.hu, whole[step]) for step, batch in enumerate(loader.batches(begin, 12), begin)
            )


def test_crops_of_a_visit_read_each_superpatch_once(path, monkeypatch):
    sampler, read = make_sampler(path, 32, crops_per_visit=16), []
    reader, *_ = sampler.volumes[0]
    original = type(reader)._read
    monkeypatch.setattr(type(reader), "_read", lambda *a: (read.append((a[1], a[2].index)), original(*a)))
    with CropLoader(sampler, batch=1, ahead=0) as loader:
        assert sum(1 for _ in loader.batches(0, 16)) == 16
    assert len(read) == len(set(read)) > 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_ranks_together_see_the_batches_of_a_single_process(path, world_size):
    """Each sample once, in the order of the ranks."""
    sampler = make_sampler(path, batch=6)
    with CropLoader(sampler, batch=6) as loader:
        single = [(batch.draws, batch.hu.clone()) for batch in loader.batches(0, 6)]
    draws, crops = [[] for _ in single], [[] for _ in single]
    for rank in range(world_size):
        with CropLoader(sampler, batch=6, rank=rank, world_size=world_size) as loader:
            for step, batch in enumerate(loader.batches(0, 6)):
                draws[step] += batch.draws
                crops[step].append(batch.hu.clone())
    for step, (drawn, hu) in enumerate(single):
        assert tuple(draws[step]) == drawn
        assert torch.equal(torch.cat(crops[step]), hu)


def test_a_batch_that_the_ranks_cannot_share_is_refused():
    with pytest.raises(UsageError, match=r"train\.batch=8: expected a multiple of the 3 processes"):
        samples_of_rank(8, 0, 3)


@pytest.mark.parametrize("offsets", OFFSETS)
def test_what_lies_outside_the_scan_is_air_whatever_the_store_holds(tmp_path, offsets):
    store, valid = make_store(tmp_path / "s", []), np.ones((32, 32, 32), dtype=bool)
    valid[:16] = False
    hu = synthetic_hu((32, 32, 32))
    hu[:16] = 1234
    add_volume(store, hu, valid=valid, body=np.ones(hu.shape, bool) & valid)
    sampler = make_sampler(store.path, 32, offsets=offsets)
    with CropLoader(sampler, batch=1) as loader:
        crop = next(loader.batches(0, 1)).hu[0].numpy()
    reader, volume = sampler.volumes[0]
    (on_grid,) = grid_crops(reader, [volume.volume_id], 32)
    for found in (crop, on_grid.hu):
        assert (found[:16] == AIR_HU).all()
        assert np.array_equal(found[16:], hu[16:])


def flip_a_bit(shard):
    data = bytearray(shard.read_bytes())
    for place in range(50, len(data), 400):  # in every chunk
        data[place] ^= 1
    overwrite(shard, data)


def overwrite(shard, data):
    """In place: at no moment is the file shorter, whoever reads it."""
    with shard.open("r+b") as file:
        file.write(data)


def empty_the_shard(shard):
    """As a program leaves it that crashed before it wrote: the right size, all zeros."""
    overwrite(shard, bytes(shard.stat().st_size))


DAMAGE = {
    "bits flipped": (flip_a_bit, "checksum mismatch"),
    "emptied": (empty_the_shard, "checksum mismatch"),
    "cut": (lambda shard: shard.write_bytes(shard.read_bytes()[:100]), "the file was cut"),
    "deleted": (Path.unlink, "expected a file of the store"),
}


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_while_a_loader_runs_names_volume_and_file(path, tmp_path, offsets, damage):
    harm, message = DAMAGE[damage]
    shutil.copytree(path, tmp_path / "s")
    sampler = make_sampler(tmp_path / "s", offsets=offsets)
    with CropLoader(sampler, batch=3) as loader, pytest.raises(StoreError, match=message) as raised:
        for number, _ in enumerate(loader.batches(0, 200)):
            if number == 3:
                for shard in (tmp_path / "s").glob("volumes/*/*/*/0/c/0/0/0"):
                    shard.chmod(0o644)
                    harm(shard)
    found = [v for _, v in sampler.volumes if v.volume_id in str(raised.value)]
    assert len(found) == 1
    assert found[0].superpatches[0].path in str(raised.value)
    assert not reader_threads()


def reader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("maesil-reader")]


def test_leaving_the_block_early_ends_the_threads(path):
    with pytest.raises(KeyboardInterrupt), CropLoader(make_sampler(path), batch=2) as loader:
        for _ in loader.batches(0, 100):
            assert reader_threads()
            raise KeyboardInterrupt
    assert not reader_threads()


def test_two_loaders_on_one_store_at_once_do_not_notice_each_other(path):
    sampler, other = make_sampler(path), make_sampler(path, seed=1)
    with CropLoader(sampler, batch=3) as loader:
        alone = [batch.hu.clone() for batch in loader.batches(0, 30)]
    with CropLoader(sampler, batch=3) as first, CropLoader(other, batch=3) as second:
        together = zip(first.batches(0, 30), second.batches(0, 30), strict=True)
        for (one, two), expected in zip(together, alone, strict=True):
            assert torch.equal(one.hu, expected)
            assert not torch.equal(two.hu, expected)


def test_batches_are_read_into_the_same_memory_again(path):
    with CropLoader(make_sampler(path), batch=3, ahead=2) as loader:
        places = [batch.hu.data_ptr() for batch in loader.batches(0, 60)]
    assert len(set(places)) == 2 + CONFIG.crops_per_visit
    assert places == (places[:6] * 10)


WORKS = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_loader as t
from maesil.data.loader import CropLoader

sampler = t.make_sampler(Path(sys.argv[2]))
"""

GROWS = """
import gc
with CropLoader(sampler, batch=3) as loader:
    for step, _ in enumerate(loader.batches(0, 10_000)):
        if step == 1000:
            gc.collect()
            before = t.resident_bytes()
gc.collect()
print(t.resident_bytes() - before)
"""

INTERRUPTED = """
with CropLoader(sampler, batch=3) as loader:
    for step, _ in enumerate(loader.batches(0, 10**9)):
        if step == 5:
            print("reading", flush=True)
"""

WAITING = """
with CropLoader(sampler, batch=3) as loader:
    for step, _ in enumerate(loader.batches(0, 10**9)):
        if step == 5:
            print("reading", flush=True)
            time.sleep(60)  # the ring is full, the threads have nothing to do
"""

RAISES = """
import maesil.data.blocks
read = maesil.data.blocks._read_maps
def fail(reader, draws, buffers):
    if failing: raise ZeroDivisionError("in a thread")
    read(reader, draws, buffers)
maesil.data.blocks._read_maps, failing = fail, False
with CropLoader(sampler, batch=3) as loader:
    for step, _ in enumerate(loader.batches(0, 10**9)):
        failing = step >= 5
"""

LEFT_OPEN = """
batches = CropLoader(sampler, batch=3).batches(0, 10**9)
next(batches)
"""

FORKED = """
with CropLoader(sampler, batch=3) as loader:
    batches = loader.batches(0, 10**9)
    for _ in range(5):
        next(batches)
        child = os.fork()
        if child == 0:
            # What a worker of a DataLoader does: reads through the reader it was given, by loaders of its own.
            with CropLoader(sampler, batch=3) as own:
                assert sum(1 for _ in own.batches(0, 3)) == 3
            try:
                next(batches)
            except RuntimeError as error:
                assert "do not survive a fork" in str(error)
                sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""

DATA_LOADER = """
import torch
class Crops(torch.utils.data.Dataset):
    def __len__(self): return 24
    def __getitem__(self, number):
        draw = sampler.draw(number, 0)
        reader = sampler.readers[draw.store]
        return torch.from_numpy(reader.read_region(draw.volume.volume_id, draw.origin, (16, 16, 16)))
with CropLoader(sampler, batch=3) as loader:
    batches = loader.batches(0, 100)
    next(batches)
    loaded = torch.utils.data.DataLoader(Crops(), batch_size=3, num_workers=2, multiprocessing_context="fork")
    assert sum(len(batch) for batch in loaded) == 24
    assert sum(1 for _ in batches) == 99
"""


def start(code, path, **options):
    words = [sys.executable, "-c", WORKS + code, Path(__file__).parent, path]
    paths = os.pathsep.join(str(folder) for folder in Path(__file__).parents[1:3])
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.Popen(
        [str(word) for word in words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        **options,
    )  # fmt: skip


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.slow
def test_ten_thousand_batches_do_not_grow(path):
    """In a process of its own: what other tests left there would be counted too."""
    process = start(GROWS, path)
    grown, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    assert int(grown) < 4e6


@pytest.mark.parametrize(
    "code", [pytest.param(INTERRUPTED, id="reading"), pytest.param(WAITING, id="waiting", marks=pytest.mark.slow)]
)
def test_an_interrupt_ends_the_process_at_once(path, code):
    process = start(code, path)
    assert process.stdout.readline() == "reading\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_what_a_thread_raises_ends_the_process(path):
    process = start(RAISES, path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.rstrip().endswith("ZeroDivisionError: in a thread")


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(LEFT_OPEN, id="left open"),
        pytest.param(FORKED, id="forked", marks=pytest.mark.slow),
        pytest.param(DATA_LOADER, id="DataLoader", marks=pytest.mark.slow),
    ],
)
def test_no_thread_and_no_fork_keeps_a_process_alive(path, code):
    process = start(code, path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
