"""Ways to read, load and write superpatches, ours and other people's; run by `read_superpatches.py`.

    PYTHON reading_ways.py WAY DATA.json CORES

Each way runs in a process of its own. It prepares, says ``ready``, and for each line it is given does one round and
answers with megabytes (decoded, as int16) and seconds. So the driver has all ways take turns.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from writing_ways import EDGE, WRITING, Round, save_nnunet

SUPERPATCH_MB = 2 * EDGE**3 / 1e6
BATCH = 8


# Reading: each superpatch once, on one thread.


def memcpy(data: dict[str, Any]) -> Round:
    source, out = np.ones((EDGE,) * 3, np.int16), np.empty((EDGE,) * 3, np.int16)
    return lambda: sum(np.copyto(out, source) is None for _ in data["raw"])


def raw_files(data: dict[str, Any]) -> Round:
    out = np.empty((EDGE,) * 3, np.int16)

    def read(path: str) -> bool:
        descriptor = os.open(path, os.O_RDONLY)
        done = os.preadv(descriptor, [out], 0)
        os.close(descriptor)
        return done == out.nbytes

    return lambda: sum(read(path) for path in data["raw"])


def maesil(codec: str, threads: int = 1) -> Callable[[dict[str, Any]], Round]:
    def prepare(data: dict[str, Any]) -> Round:
        from concurrent.futures import ThreadPoolExecutor

        from maesil.store.reader import SuperpatchReader
        from maesil.store.store import Store

        reader, pool = SuperpatchReader(Store.open(data["stores"][codec])), ThreadPoolExecutor(threads)
        places = [(place["volume"], tuple(place["index"])) for place in data["places"]]
        shares = [places[n::threads] for n in range(threads)]
        outs = np.empty((threads, EDGE, EDGE, EDGE), np.int16)

        def read(share: list[Any], out: np.ndarray) -> int:
            return sum(reader.read_superpatch(*place, out) is out for place in share)

        return (lambda: read(places, outs[0])) if threads == 1 else lambda: sum(pool.map(read, shares, outs))

    return prepare


def bare_threads(data: dict[str, Any]) -> Round:
    """Read superpatches in random order into the batches of a ring on two threads, and nothing else."""
    from concurrent.futures import ThreadPoolExecutor

    from maesil.store.reader import SuperpatchReader
    from maesil.store.store import Store

    reader, pool = SuperpatchReader(Store.open(data["stores"]["fast"])), ThreadPoolExecutor(2)
    order = np.random.default_rng(0).integers(0, len(data["places"]), 32 * BATCH)
    places = [(data["places"][n]["volume"], tuple(data["places"][n]["index"])) for n in order]
    ring = np.empty((3 * BATCH, EDGE, EDGE, EDGE), np.int16)

    def read(first: int) -> int:
        turns = range(first, len(places), 2)
        return sum(reader.read_superpatch(*places[n], ring[n % len(ring)]).ndim == 3 for n in turns)

    return lambda: sum(pool.map(read, range(2)))


def _arrays(data: dict[str, Any], open_array: Callable[[str], Any]) -> Iterator[tuple[Any, tuple[slice, ...]]]:
    """Open each volume's array once; yield array and box of each superpatch."""
    opened = {path: open_array(path) for path in {place["array"] for place in data["places"]}}
    for place in data["places"]:
        yield opened[place["array"]], tuple(slice(i * EDGE, (i + 1) * EDGE) for i in place["index"])


def zarr_python(data: dict[str, Any]) -> Round:
    import numcodecs
    import zarr

    numcodecs.blosc.use_threads = False
    zarr.config.set({"threading.max_workers": 1, "async.concurrency": 1})
    places = list(_arrays(data, lambda path: zarr.open_array(path, mode="r")))
    return lambda: sum(array[box].ndim == 3 for array, box in places)


def zarrs(data: dict[str, Any]) -> Round:
    import zarr
    import zarrs as _  # noqa: F401, registers its pipeline

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": 1})
    zarr.config.set({"async.concurrency": 1})
    places = list(_arrays(data, lambda path: zarr.open_array(path, mode="r")))
    return lambda: sum(array[box].ndim == 3 for array, box in places)


def tensorstore(data: dict[str, Any]) -> Round:
    import tensorstore as ts

    one = {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}, "cache_pool": {}}

    def open_array(path: str) -> Any:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}, "context": one}
        return ts.open(spec, read=True).result()

    places = list(_arrays(data, open_array))
    return lambda: sum(array[box].read().result().ndim == 3 for array, box in places)


def blosc2_files(data: dict[str, Any]) -> Round:
    import blosc2

    blosc2.set_nthreads(1)
    out = np.empty((EDGE,) * 3, np.int16)
    folder = Path(tempfile.mkdtemp(dir=data["work"]))
    lz4 = {"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
    for number, path in enumerate(data["raw"]):
        array = np.fromfile(path, np.int16).reshape(out.shape)
        blosc2.asarray(array, urlpath=str(folder / f"{number}.b2nd"), chunks=out.shape, cparams=lz4)
    paths = [str(folder / f"{number}.b2nd") for number in range(len(data["raw"]))]

    def read(path: str) -> bool:
        blosc2.open(path, mode="r", dparams={"nthreads": 1}).get_slice_numpy(out, ((0, 0, 0), out.shape))
        return True

    try:
        read(paths[0])
    except (AttributeError, TypeError):  # not in every release: then into memory of its own
        return lambda: sum(blosc2.open(path, mode="r", dparams={"nthreads": 1})[:].ndim == 3 for path in paths)
    return lambda: sum(read(path) for path in paths)


# Loading: batches of 8 as torch tensors, on two cores. Batches read ahead while others took their turn are not counted.


def _pull(batches: Iterator[Any], count: int, ahead: int) -> Round:
    def pull() -> int:
        for _ in range(ahead):
            next(batches)
        started = time.perf_counter()
        for _ in range(count):
            next(batches)
        pull.seconds = time.perf_counter() - started  # type: ignore[attr-defined]
        return count * BATCH

    return pull


def maesil_loader(offsets: str, ram: int = 0, crops: int = 8) -> Callable[[dict[str, Any]], Round]:
    def prepare(data: dict[str, Any]) -> Round:
        from maesil.config.schema import ModelConfig, TrainConfig
        from maesil.data.loader import CropLoader
        from maesil.data.sampler import CropSampler
        from maesil.data.sources import Sources

        model = ModelConfig(crop=EDGE, width=64, depth=1, decoder_width=64, decoder_depth=1)
        sources = Sources.open([Path(data["stores"]["fast"])], model, ram=ram)
        config = TrainConfig(offsets=offsets, batch=BATCH, crops_per_visit=crops)
        sampler = CropSampler(sources, sources.groups, EDGE, config)
        return _pull(CropLoader(sampler, BATCH).batches(0, 10**9), 32, 3 if offsets == "inside" else 2 * crops)

    return prepare


def _endless(items: int, load: Callable[[int], Any]) -> Iterator[Any]:
    """Return the batches of a DataLoader with two worker processes over ``load(0)``, ``load(1)``... in random order."""
    from torch.utils.data import DataLoader, Dataset

    order = np.random.default_rng(0).integers(0, items, 10**6)

    class Items(Dataset[Any]):
        def __len__(self) -> int:
            return len(order)

        def __getitem__(self, number: int) -> Any:
            return load(int(order[number]))

    return iter(DataLoader(Items(), BATCH, num_workers=2, multiprocessing_context="fork"))


def dataloader_maesil(data: dict[str, Any]) -> Round:
    import torch

    from maesil.store.reader import SuperpatchReader
    from maesil.store.store import Store

    reader = SuperpatchReader(Store.open(data["stores"]["fast"]))
    places = [(place["volume"], tuple(place["index"])) for place in data["places"]]
    return _pull(_endless(len(places), lambda n: torch.from_numpy(reader.read_superpatch(*places[n]))), 16, 4)


def dataloader_zarr(data: dict[str, Any]) -> Round:
    import numcodecs
    import torch
    import zarr

    numcodecs.blosc.use_threads = False
    places, opened = data["places"], {}

    def load(number: int) -> Any:
        path = places[number]["array"]
        if path not in opened:  # in the worker
            opened[path] = zarr.open_array(path, mode="r")
        return torch.from_numpy(opened[path][tuple(slice(i * EDGE, (i + 1) * EDGE) for i in places[number]["index"])])

    return _pull(_endless(len(places), load), 16, 4)


def monai_persistent(data: dict[str, Any]) -> Round:
    from monai.data import PersistentDataset

    cached = PersistentDataset(data["raw"], _monai_load(), cache_dir=tempfile.mkdtemp(dir=data["work"]))
    for number in range(len(cached)):
        cached[number]  # fills the cache
    return _pull(_endless(len(cached), lambda n: cached[n]), 16, 4)


def monai_cache(data: dict[str, Any]) -> Round:
    from monai.data import CacheDataset

    cached = CacheDataset(data["raw"], _monai_load(), progress=False, num_workers=1)
    return _pull(_endless(len(cached), lambda n: cached[n]), 16, 4)


def monai_volume_crop(data: dict[str, Any]) -> Round:
    from monai.data import PersistentDataset
    from monai.transforms import Compose, EnsureChannelFirst, RandSpatialCrop, SpatialPad

    load = Compose([
        lambda path: np.load(path).astype(np.float32), EnsureChannelFirst(channel_dim="no_channel"),
        SpatialPad((EDGE,) * 3), RandSpatialCrop((EDGE,) * 3, random_size=False),
    ])  # fmt: skip
    cached = PersistentDataset(data["volumes"], load, cache_dir=tempfile.mkdtemp(dir=data["work"]))
    for number in range(len(cached)):
        cached[number]
    return _pull(_endless(len(cached), lambda n: cached[n]), 8, 4)


def _monai_load() -> Any:
    from monai.transforms import Compose, EnsureChannelFirst

    def load(path: str) -> np.ndarray:
        return np.fromfile(path, np.int16).reshape((EDGE,) * 3).astype(np.float32)

    return Compose([load, EnsureChannelFirst(channel_dim="no_channel")])


def _nnunet_cases(data: dict[str, Any]) -> Any:
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    folder = Path(tempfile.mkdtemp(dir=data["work"]))
    for number, path in enumerate(data["volumes"]):
        save_nnunet(np.load(path), folder / f"case{number}")
    return nnUNetDatasetBlosc2(str(folder))


def nnunet_loader(data: dict[str, Any]) -> Round:
    """Load as nnU-Net's trainer does, without augmentation: images and labels, two processes, random crops."""
    from types import SimpleNamespace

    from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

    labels = SimpleNamespace(all_labels=[1], has_ignore_label=False)
    loader = nnUNetDataLoader(_nnunet_cases(data), BATCH, (EDGE,) * 3, (EDGE,) * 3, labels)
    return _pull(NonDetMultiThreadedAugmenter(loader, None, 2, 4, wait_time=0.002), 4, 8)


def nnunet_crop(data: dict[str, Any]) -> Round:
    """Crop volumes as nnU-Net's loader does, the image alone, in PyTorch's loader."""
    import torch
    from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd

    cases, rng = _nnunet_cases(data), np.random.default_rng(os.getpid())

    def load(number: int) -> Any:
        image, *_ = cases.load_case(f"case{number}")
        start = [int(rng.integers(0, max(1, n - EDGE + 1))) for n in image.shape[1:]]
        return torch.from_numpy(np.ascontiguousarray(crop_and_pad_nd(image, [[s, s + EDGE] for s in start], -1024)))

    return _pull(_endless(len(data["volumes"]), load), 8, 4)


READING: dict[str, Callable[[dict[str, Any]], Round]] = {
    "memcpy": memcpy,
    "raw files, preadv": raw_files,
    "maesil fast": maesil("fast"),
    "maesil compact": maesil("compact"),
    "maesil raw": maesil("raw"),
    "zarr-python": zarr_python,
    "zarrs": zarrs,
    "tensorstore": tensorstore,
    "blosc2": blosc2_files,
}
THREADED = {"maesil fast, two threads": maesil("fast", 2)}
LOADING: dict[str, Callable[[dict[str, Any]], Round]] = {
    "maesil, two bare threads into batches": bare_threads,
    "maesil, on the grid": maesil_loader("inside"),
    "maesil, random offsets": maesil_loader("across"),
    "maesil, random offsets, 16 crops per visit": maesil_loader("across", crops=16),
    "maesil, on the grid, --ram": maesil_loader("inside", 10**10),
    "maesil, random offsets, --ram": maesil_loader("across", 10**10),
    "DataLoader(2) + maesil's reader": dataloader_maesil,
    "DataLoader(2) + zarr-python": dataloader_zarr,
    "DataLoader(2) + MONAI PersistentDataset": monai_persistent,
    "DataLoader(2) + MONAI CacheDataset": monai_cache,
    "DataLoader(2) + nnU-Net crop, no labels": nnunet_crop,
    "nnU-Net's own loader, 2 processes": nnunet_loader,
    "DataLoader(2) + MONAI volume + crop": monai_volume_crop,
}
WAYS = READING | THREADED | LOADING | WRITING
OURS = {name for name in WAYS if "maesil" in name}


def main(name: str, data_file: str, cores: int) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    work = WAYS[name](json.loads(Path(data_file).read_text()))
    work()  # warms the page cache and whatever the way keeps
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        count = work()
        seconds = getattr(work, "seconds", time.perf_counter() - started)
        print(json.dumps([count * SUPERPATCH_MB, seconds]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
