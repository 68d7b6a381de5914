"""Ingest into the catalogue, through real ingest: built once, found at once, never stale."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from support.sources import NATIVE, PATIENTS, Workplace, contents, edit_pixel, slices_of, snapshot, write_sources

from maesil.build import Cached, ingest_into_cache
from maesil.cache.catalogue import Catalogue
from maesil.errors import NoInputError, UsageError
from maesil.store import recipe as recipes
from maesil.store.recipe import Recipe
from maesil.store.store import Store


class Cache:
    """A workplace whose stores are in a catalogue of its own."""

    def __init__(self, place: Workplace) -> None:
        self.place, self.catalogue, self.said = place, Catalogue(place.root / "stores"), []

    def ingest(self, recipe: Recipe = NATIVE, name: str | None = None, **options) -> Cached:
        self.stages = set()
        return ingest_into_cache(
            [self.place.sources], recipe, self.place.options(**options), name=name, catalogue=self.catalogue,
            progress=lambda stage, *_: self.stages.add(stage), say=self.said.append,
        )  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Cache:
    place = Workplace(tmp_path_factory.mktemp("built"))
    write_sources(place.sources)
    (place.sources / "cut.nii.gz").write_bytes(b"\x1f\x8b")
    cache = Cache(place)
    made = cache.ingest()
    assert not made.found and len(made.summary.committed) == 3 and made.entry.built.volumes == 3
    return cache


@pytest.fixture
def cache(built, tmp_path) -> Cache:
    """A copy whose sources lie elsewhere: their store is another one, built in a second from what is remembered."""
    cache = Cache(built.place.copy(tmp_path / "copy"))
    cache.ingest()
    return cache


def attempts(made: Cached) -> dict[str, str]:
    return {volume.volume_id: volume.attempt for volume in Store.open(made.entry.store).volumes()}


def test_the_second_time_it_is_found_at_once_with_the_same_verdicts(built):
    before = snapshot(built.catalogue.entries()[0].store)
    again = built.ingest()
    assert again.found and built.stages == set()  # not even scanned
    assert snapshot(again.entry.store) == before
    assert again.summary.counts == {"used": 49, "skipped": 0, "quarantined": 1, "ignored": 1}
    assert (len(again.summary.fresh), again.summary.refused_volumes) == (3, 1)
    assert "nothing to do: 3 volumes" in again.summary.conclusion("")


@pytest.mark.parametrize("asked", [{"rehash": True}, {"retry_quarantined": ("all",)}], ids=str)
def test_who_asks_for_a_look_gets_one(built, asked):
    assert not built.ingest(**asked).found and "scan" in built.stages


def test_one_edited_slice_makes_exactly_its_volume_new(cache):
    before = attempts(cache.ingest())
    edit_pixel(slices_of(cache.place.sources, PATIENTS[0])[7])
    made = cache.ingest()
    assert not made.found and len(made.summary.committed) == 1
    changed = {volume_id for volume_id, attempt in attempts(made).items() if before[volume_id] != attempt}
    assert changed == {made.summary.committed[0].volume_id}
    assert cache.ingest().found


def test_another_recipe_is_another_store_and_the_first_stays(built):
    first = built.ingest()
    before = snapshot(first.entry.store)
    other = built.ingest(replace(NATIVE, superpatch=16))
    assert other.entry.key != first.entry.key and len(other.summary.committed) == 3
    assert snapshot(first.entry.store) == before
    assert built.ingest().found and built.ingest(replace(NATIVE, superpatch=16)).found


def test_another_library_makes_every_volume_new(built, monkeypatch):
    monkeypatch.setattr(recipes, "_LIBRARIES", (*recipes._LIBRARIES, "zarr"))
    upgraded = built.ingest(Recipe(spacing=None, superpatch=32))
    assert not upgraded.found and len(upgraded.summary.committed) == 3
    assert upgraded.entry.name != built.ingest().entry.name


def test_a_removed_source_leaves_the_store(cache, tmp_path):
    shutil.rmtree(cache.place.sources / "nifti of SMITH")
    (cache.place.sources / "cut.nii.gz").unlink()
    made = cache.ingest()
    assert (len(made.summary.fresh), made.summary.absent, made.summary.refused_volumes) == (2, 0, 0)
    anew = Cache(cache.place.copy(tmp_path / "anew")).ingest()
    assert contents(Store.open(made.entry.store)) == contents(Store.open(anew.entry.store))
    assert Store.open(made.entry.store).quarantined() == []


def test_a_volume_taken_out_by_hand_is_made_again(cache):
    made = cache.ingest()
    volume = made.summary.fresh[0]
    shutil.rmtree((made.entry.store / volume.key).parent)
    again = cache.ingest()
    assert [v.volume_id for v in again.summary.committed] == [volume.volume_id]


def test_a_group_from_the_path_is_a_new_record_of_the_same_voxels(cache):
    before = attempts(cache.ingest())
    made = cache.ingest(group=r"nifti of (\w+)")
    assert not made.found and not made.summary.committed and attempts(made) == before
    (nifti,) = [volume for volume in made.summary.fresh if volume.source["kind"] == "nifti"]
    assert nifti.group != nifti.volume_id
    other = cache.ingest(group="no such thing")
    assert {v.group for v in other.summary.fresh if v.source["kind"] == "nifti"} == {nifti.volume_id}
    assert other.entry.built.fingerprint != made.entry.built.fingerprint


def test_a_pin_is_told_when_the_store_changes(cache, tmp_path):
    entry = cache.ingest().entry
    run = tmp_path / "run"
    run.mkdir()
    (run / "stores.json").write_text(f'{{"stores": [{{"path": "{entry.store}"}}]}}')
    entry.pin(run, entry.built.fingerprint)
    cache.ingest(rehash=True)
    assert cache.said == []
    edit_pixel(slices_of(cache.place.sources, PATIENTS[1])[0])
    cache.ingest()
    assert len(cache.said) == 1 and f"used by {run}" in cache.said[0]


def test_nothing_is_left_of_an_ingest_that_found_nothing(tmp_path):
    cache = Cache(Workplace(tmp_path))
    with pytest.raises(NoInputError):
        cache.ingest()
    cache.place.sources.mkdir()
    with pytest.raises(NoInputError):
        cache.ingest()
    assert cache.catalogue.entries() == []


@pytest.mark.parametrize("options", [{"partition": (1, 2)}, {"update": True}], ids=str)
def test_options_of_a_store_of_ones_own_are_refused(built, options):
    with pytest.raises(UsageError, match="--out"):
        built.ingest(**options)


def test_a_cache_within_its_sources_is_refused(tmp_path):
    cache = Cache(Workplace(tmp_path))
    cache.place.sources.mkdir()
    cache.catalogue = Catalogue(cache.place.sources / "cache")
    with pytest.raises(UsageError, match="lies within the sources"):
        cache.ingest()
    assert list(cache.place.sources.iterdir()) == []


def command(cache: Cache) -> list[str]:
    options = ["--spacing", "native", "--superpatch", "32", "--workers", "0", "--max-refused", "1", "--key-file"]
    return [sys.executable, "-m", "maesil", "ingest", str(cache.place.sources), *options, str(cache.place.key)]


def start(cache: Cache, monkeypatch) -> subprocess.Popen:
    monkeypatch.setenv("MAESIL_CACHE", str(cache.catalogue.root))
    return subprocess.Popen(command(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_build_it_once(built, tmp_path, monkeypatch):
    cache = Cache(built.place.copy(tmp_path / "two"))
    processes = [start(cache, monkeypatch) for _ in range(2)]
    told = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    (waited,) = [text for text in told if "waiting for it" in text]
    assert "being built by" in waited and "found in the cache" in waited  # by which process, once that one has said so
    (entry,) = cache.catalogue.entries()
    assert len(list(entry.store.glob("volumes/??/*/*/0"))) == 3


def test_killed_and_run_again_it_is_finished(built, tmp_path, monkeypatch):
    cache = Cache(built.place.copy(tmp_path / "killed"))
    process = start(cache, monkeypatch)
    stop_at = time.monotonic() + 60
    while not list(cache.catalogue.root.glob("stores/*/store.zarr/commits/*/*/*.json")) and time.monotonic() < stop_at:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (entry,) = cache.catalogue.entries()
    assert entry.built is None and cache.catalogue.builder(entry) is None
    made = cache.ingest()
    assert made.entry.key == entry.key and made.entry.built.volumes == 3
    assert len(made.summary.fresh) >= 1
