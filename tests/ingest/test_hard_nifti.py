"""Every twist of `support.nifti_cases` in one source tree, ingested once and scored in world space."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import support.nifti_unlisted  # noqa: F401  (registers its cases)
from support.ct_phantom import SHAPE, score_world
from support.nifti_cases import CASES

from maesil.geometry import spacing_of
from maesil.ingest.run import IngestOptions, ingest
from maesil.ingest.verdict import STATUSES
from maesil.store.reader import SuperpatchReader
from maesil.store.recipe import Recipe
from maesil.store.store import Store


class Ingested:
    """One ingest over all cases. Many hold the same volume, which is committed once: the others are its duplicates."""

    def __init__(self, root: Path) -> None:
        self.sources = root / "sources"
        for name, case in CASES.items():
            (self.sources / name).mkdir(parents=True)
            case.build(self.sources / name)
        options = IngestOptions(workers=0, key_file=root / "key", cache_folder=root / "cache")
        out = root / "store.zarr"
        self.summary = ingest([self.sources], out, Recipe(spacing=None, superpatch=64), options)
        self.store = Store.open(out)
        self.reader = SuperpatchReader(self.store)
        self.by_case: dict[str, list] = defaultdict(list)
        for verdict in self.summary.files:
            self.by_case[str(verdict.path).removeprefix(f"{self.sources}/").partition("/")[0]].append(verdict)
        self.live = {volume.volume_id: volume for volume in self.store.volumes()}

    def verdicts(self, name: str) -> list:
        return self.by_case[name]

    def volumes_of(self, name: str) -> list:
        met = [v for v in self.verdicts(name) if v.status == "used" or v.code == "duplicate_volume"]
        ids = {volume_id for verdict in met for volume_id in (verdict.volume_id, *verdict.more_volumes)}
        return [self.live[volume_id] for volume_id in sorted(ids)]


@pytest.fixture(scope="module")
def ingested(tmp_path_factory) -> Ingested:
    return Ingested(tmp_path_factory.mktemp("hard_nifti"))


@pytest.mark.parametrize("name", CASES)
def test_volumes_are_right_or_refused(ingested: Ingested, name: str) -> None:
    case, volumes = CASES[name], ingested.volumes_of(name)
    found = [(verdict.status, verdict.code) for verdict in ingested.verdicts(name)]
    if not volumes and (case.volumes == 0 or case.refusal_is_right_too):
        assert all(status == "quarantined" for status, _ in found)
        return
    assert len(volumes) == case.volumes, found
    for volume in volumes:
        score = score_world(ingested.store, volume.volume_id, reader=ingested.reader)
        assert score.max_error <= case.max_error
        assert score.mean_error <= case.mean_error
        assert score.valid >= case.valid * score.voxels
        assert np.prod(volume.shape) >= np.prod(SHAPE)


@pytest.mark.parametrize("name", CASES)
def test_every_file_has_one_verdict(ingested: Ingested, name: str) -> None:
    files = sorted(path for path in (ingested.sources / name).rglob("*") if path.is_file())
    verdicts = ingested.verdicts(name)
    assert sorted(verdict.path for verdict in verdicts) == files
    assert all(verdict.status in STATUSES and verdict.code for verdict in verdicts)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if name.startswith("axes_")])
def test_axes_are_canonical(ingested: Ingested, name: str) -> None:
    (volume,), (plain,) = ingested.volumes_of(name), ingested.volumes_of("plain")
    assert volume.shape == plain.shape == SHAPE
    np.testing.assert_allclose(volume.affine, plain.affine, atol=1e-4)
    np.testing.assert_allclose(spacing_of(volume.affine), spacing_of(plain.affine), atol=1e-5)


def test_infinite_and_nan_voxels_are_air_outside_the_scan(ingested: Ingested) -> None:
    (volume,) = ingested.volumes_of("nan_border")
    hu = ingested.reader.read_region(volume.volume_id, (0, 0, 0), volume.shape)
    assert (hu[:, :, :6] == -1024).all() and (hu[:, -1] == -1024).all()
    assert (hu[:, :-1, 6:] > -1024).all()
    assert ingested.reader.read_map(volume.volume_id, "valid")[0, 0, 0] <= 0.25 * 255 + 1


def test_refusals_name_no_traceback(ingested: Ingested) -> None:
    codes = {name: [verdict.code for verdict in ingested.verdicts(name)] for name in CASES}
    assert not [name for name, found in codes.items() if "unexpected" in found]
