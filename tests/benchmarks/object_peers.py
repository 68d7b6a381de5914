"""What others do with scans in a bucket: MONAI on files that fsspec downloads, and LitData's chunks.

They need packages that maesil has no use for: ``pip install s3fs litdata``. Each gives all superpatches of all volumes
as int16 arrays, as maesil does, and keeps nothing between two rounds.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import obstore

from maesil.store.reader import SuperpatchReader
from maesil.store.store import Store

EDGE = 128


def _sample(path: str) -> dict[str, np.ndarray]:
    return {"hu": np.load(path)}


class Peers:
    """The volumes of a store in a bucket as others keep them, and what reads all of them."""

    def __init__(self, store: Store, objects: obstore.store.ObjectStore, bucket: str, scratch: Path) -> None:
        import monai.transforms  # what it takes to import them is nobody's reading
        import s3fs

        assert monai and s3fs
        self.bucket, self.scratch, self.reader = bucket, scratch, SuperpatchReader(store)
        self.volumes = list(self.reader.volumes.values())
        self._put_nifti(objects)
        self._put_chunks(objects)

    def monai(self) -> int:
        """Download each file once and cut all its superpatches, several files at a time."""
        import s3fs
        from monai.transforms import LoadImage

        load = LoadImage(image_only=True, dtype=np.int16)
        files = s3fs.S3FileSystem(client_kwargs={"endpoint_url": os.environ["AWS_ENDPOINT_URL"]})

        def read(volume_id: str) -> int:
            with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
                path = Path(folder, "scan.nii.gz")
                files.get_file(f"{self.bucket}/nifti/{volume_id}.nii.gz", str(path))
                image = load(path)
                return len([np.ascontiguousarray(image[place]) for place in _places(image.shape)])

        with ThreadPoolExecutor(len(self.volumes)) as pool:
            return sum(pool.map(read, [volume.volume_id for volume in self.volumes]))

    def litdata(self) -> int:
        """Stream the chunks into a new folder, as a first epoch does."""
        from litdata import StreamingDataset
        from litdata.streaming import downloader
        from litdata.streaming.resolver import Dir

        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # the server lies on this machine, without TLS

        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
            place = Dir(path=folder, url=f"s3://{self.bucket}/litdata")
            return sum(1 for _ in StreamingDataset(place, storage_options=options, max_cache_size="10GB"))

    def _put_nifti(self, objects: obstore.store.ObjectStore) -> None:
        import nibabel

        for volume in self.volumes:
            hu = self.reader.read_region(volume.volume_id, (0, 0, 0), volume.shape)
            path = self.scratch / "scan.nii.gz"
            nibabel.save(nibabel.Nifti1Image(hu, np.eye(4)), path)
            obstore.put(objects, f"nifti/{volume.volume_id}.nii.gz", path)

    def _put_chunks(self, objects: obstore.store.ObjectStore) -> None:
        from litdata import optimize

        arrays = self.scratch / "arrays"
        arrays.mkdir()
        paths = []
        for volume in self.volumes:
            for patch in volume.superpatches:
                paths.append(str(arrays / f"{len(paths)}.npy"))
                np.save(paths[-1], self.reader.read_superpatch(volume.volume_id, patch.index))
        chunks = self.scratch / "chunks"
        optimize(_sample, paths, str(chunks), chunk_bytes="64MB", num_workers=1, compression="zstd")
        for path in chunks.iterdir():
            obstore.put(objects, f"litdata/{path.name}", path)
        shutil.rmtree(arrays)


def _places(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    for corner in product(*(range(0, n, EDGE) for n in shape)):
        yield tuple(slice(at, at + EDGE) for at in corner)
