"""A URL wherever a store is named: the commands end as they do on a disk, also killed and behind a bad network."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.command_line import SMALL, fails, ingest, run
from support.object_server import KEY_ID, SECRET, TRANSIENT, now_and_then
from support.objects import upload
from support.sources import contents
from support.stores import add_volume, make_store, synthetic_hu

from maesil.cache.catalogue import find_stores
from maesil.cache.provenance import recorded_uses
from maesil.cache.stage import Stage
from maesil.config.schema import ModelConfig, TrainConfig
from maesil.data.resident import open_loader
from maesil.data.sampler import CropSampler
from maesil.data.sources import Sources
from maesil.errors import UsageError
from maesil.store.garbage import find_garbage
from maesil.store.nifti import write_nifti
from maesil.store.reader import SuperpatchReader
from maesil.store.store import Store
from maesil.store.urls import place_of
from maesil.store.verify import verify


def url_of(bucket):
    return f"s3://{bucket}/stores/store.zarr"


@pytest.mark.slow
def test_an_ingest_into_a_bucket_commits_what_one_onto_a_disk_does(sources, undisturbed, bucket, here):
    local, key = undisturbed
    code, out, stderr = run(*ingest(sources, url_of(bucket), "--key-file", key, "--phi-scan", *SMALL))
    assert code == 0 and f"committed to {url_of(bucket)}" in out, stderr
    store = Store.open(url_of(bucket))
    assert contents(store) == contents(local) and store.fingerprint == local.fingerprint
    assert verify(store).problems == ()
    assert json.loads((here / "store.report" / "store.json").read_text())["store"] == url_of(bucket)
    told = run("store", "explain", url_of(bucket), store.volumes()[0].volume_id)
    assert told[0] == 0 and str(sources) in told[1], "its files are those that the report in this folder names"
    again = run(*ingest(sources, url_of(bucket), "--key-file", key, *SMALL))
    assert again[0] == 0 and "nothing to do: 3 volumes are up to date" in again[1]
    assert "report of another store" in fails(
        2, *ingest(sources, f"s3://{bucket}/other/store.zarr", "--key-file", key, *SMALL)
    )


@pytest.mark.slow
def test_behind_a_bad_network_the_commits_are_the_same(sources, undisturbed, proxy, bucket, here):
    """Every seventh request is throttled, fails, loses its answer or is cut; superpatches too."""
    local, key = undisturbed
    proxy.faults = now_and_then(7, *TRANSIENT)
    code, out, stderr = run(*ingest(sources, url_of(bucket), "--key-file", key, *SMALL))
    assert code == 0, out + stderr
    store = Store.open(url_of(bucket))
    assert contents(store) == contents(local) and verify(store).problems == ()
    assert {volume.generation for volume in store.volumes()} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("network", ["good", "bad"])
def test_killed_again_and_again_it_ends_the_same(sources, undisturbed, object_server, bucket, here, network):
    """SIGKILL after more and more requests; then undisturbed: as if nothing had happened."""
    local, key = undisturbed
    words = [str(word) for word in ingest(sources, url_of(bucket), "--key-file", key, *SMALL)]
    killed = 0
    with object_server.proxy() as proxy:
        environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.url}
        for requests in (8, 30, 60, 90):
            if network == "bad":
                proxy.faults = now_and_then(5, *TRANSIENT)
            seen = len(proxy.requests)
            process = subprocess.Popen([sys.executable, "-m", "maesil", *words], env=environment)
            while process.poll() is None and len(proxy.requests) < seen + requests:
                time.sleep(0.002)
            killed += process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert killed >= 3
    before = {volume.volume_id: volume.attempt for volume in Store.open(url_of(bucket)).volumes()}
    assert run(*words)[0] == 0
    store = Store.open(url_of(bucket))
    assert contents(store) == contents(local) and verify(store).problems == ()
    assert before.items() <= {volume.volume_id: volume.attempt for volume in store.volumes()}.items()
    assert {volume.generation for volume in store.volumes()} == {1}
    left = find_garbage(store, older_than_hours=-1)
    assert left and run("store", "gc", url_of(bucket), "--older-than", 0)[0] == 0
    assert contents(store) == contents(local) and verify(store).problems == ()


def test_every_command_of_a_store_takes_its_url(bucket, here):
    store = make_store(place_of(url_of(bucket)), [(40, 48, 40), (32, 40, 36)], superpatch=16)
    first = store.volumes()[0].volume_id
    for words in (
        ("info", url_of(bucket)), ("verify", url_of(bucket)), ("gc", url_of(bucket)), ("index", url_of(bucket)),
        ("export", url_of(bucket), "--out", "nifti", first[:8]),
        ("split", url_of(bucket), "--out", "split.json", "--shares", "0.5,0.5,0"),
    ):  # fmt: skip
        code, _, stderr = run("store", *words)
        assert code == 0, (words, stderr)
    assert Path("nifti", f"{first}.nii.gz").stat().st_size > 1000
    assert run("store", "overlap", url_of(bucket), url_of(bucket))[0] == 1
    assert run("doctor", url_of(bucket))[0] == 0


@pytest.mark.slow
def test_training_and_scores_are_those_of_the_same_store_on_a_disk(bucket, here, one_thread):
    shapes = [(48, 64, 64), (64, 48, 48), (40, 40, 40)]
    local = make_store(Path("local.zarr"), shapes, superpatch=32)
    make_store(place_of(url_of(bucket)), shapes, superpatch=32)
    losses = []
    for store, out in (("local.zarr", "run_a"), (url_of(bucket), "run_b")):
        code, _, stderr = run(
            "train", store, "--preset", "tiny", "--out", out, "--steps", 3, "--batch", 2, "--device", "cpu",
            "--set", "model.crop=32", "--validation", 0.3,
        )  # fmt: skip
        assert code == 0, stderr
        losses.append([json.loads(line).get("loss") for line in Path(out, "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1]
    (use,) = recorded_uses(Path("run_b"))
    assert (use.path, use.fingerprint) == (url_of(bucket), local.fingerprint)
    code, _, stderr = run("train", url_of(bucket), "--out", "run_b", "--resume", "--steps", 4)
    assert code == 0, stderr
    code, _, stderr = run("evaluate", "run_b", url_of(bucket), "--volumes", "all", "--out", "scores")
    assert code == 0, stderr


def gets_of_superpatches(proxy):
    return [(one.path, one.range) for one in proxy.of("GET", "/0/c/") if one.range]


@pytest.mark.slow
def test_a_second_run_with_a_stage_fetches_no_superpatch_and_its_losses_are_the_same(bucket, proxy, here, one_thread):
    make_store(place_of(url_of(bucket)), [(48, 64, 64), (64, 48, 48)], superpatch=32)
    losses, fetched = [], []
    for out in ("run_a", "run_b"):
        proxy.requests.clear()
        code, _, stderr = run(
            "train", url_of(bucket), "--preset", "tiny", "--out", out, "--steps", 3, "--batch", 2, "--device", "cpu",
            "--set", "model.crop=32", "--validation", 0.5, "--stage", "stage", "--stage-size", "1GB",
        )  # fmt: skip
        assert code == 0, stderr
        losses.append([json.loads(line).get("loss") for line in Path(out, "metrics.jsonl").read_text().splitlines()])
        fetched.append(gets_of_superpatches(proxy))
    assert losses[0] == losses[1]
    assert fetched[0] and len(fetched[0]) == len(set(fetched[0])), "each superpatch is fetched once"
    assert fetched[1] == []


def test_the_second_epoch_fetches_no_superpatch(bucket, proxy, here):
    """Superpatches of equal body share: an epoch visits each exactly once."""
    store = make_store(place_of(url_of(bucket)), [], superpatch=32)
    for number in range(2):
        hu = synthetic_hu((64, 64, 96), number)
        add_volume(store, hu, name=str(number), body=np.ones(hu.shape, bool))
    proxy.requests.clear()  # the writer reads back
    config = TrainConfig(batch=4, offsets="inside")
    sources = Sources.open([store.path], ModelConfig(crop=32, patch=8), stage=Stage(Path("stage"), 10**9))
    sampler = CropSampler(sources, sources.groups, 32, config)
    steps = round(sampler.epoch_steps)
    assert steps * config.batch == 24
    with open_loader(sampler, config, torch.device("cpu")) as loader:
        for _ in loader.batches(0, steps):
            pass
        once = len(gets_of_superpatches(proxy))
        for _ in loader.batches(steps, 2 * steps):
            pass
    assert once == len(gets_of_superpatches(proxy)) == len({*gets_of_superpatches(proxy)}) == 24
    assert proxy.most_in_flight >= 4, "several GETs are on their way at once"


@pytest.mark.slow
def test_an_archived_store_in_a_bucket_is_upgraded_as_one_on_a_disk(bucket, here):
    with tarfile.open(Path(__file__).parents[1] / "archive" / "store-1.tar.gz") as tar:
        tar.extractall(here, filter="data")
    upload(here / "raw.zarr", bucket, "stores/store.zarr")
    before = contents(Store.open(url_of(bucket)))
    code, out, stderr = run("store", "upgrade", url_of(bucket))
    assert code == 0 and "upgraded 2 volumes" in out, stderr
    store = Store.open(url_of(bucket))
    assert contents(store).keys() == before.keys() and verify(store).problems == () and store.version == 2


def test_labels_are_put_beside_the_volumes_of_a_bucket(bucket, here):
    store = make_store(place_of(url_of(bucket)), [(16, 16, 16)], superpatch=16)
    (volume,) = store.volumes()
    (here / "labels").mkdir()
    labels = (SuperpatchReader(store).read_region(volume.volume_id, (0, 0, 0), volume.shape) > 0).astype(np.uint8)
    write_nifti(here / "labels" / f"{volume.volume_id}.nii.gz", labels, np.array(volume.affine_lps))
    code, out, stderr = run("store", "add-labels", url_of(bucket), "labels", "--name", "organ")
    assert code == 0 and "added 'organ' to 1 volume" in out, stderr
    (live,) = Store.open(url_of(bucket)).volumes()
    assert any("/organ/" in key for key in store.storage.list(live.prefix)) and verify(store).problems == ()


def test_stores_named_by_url_may_have_weights(bucket):
    assert find_stores([f"{url_of(bucket)}=0.3", "s3://other/b=0.7"])[1] == (0.3, 0.7)
    with pytest.raises(UsageError, match="expected each store once"):
        find_stores([url_of(bucket), f"{url_of(bucket)}/"])


@pytest.mark.slow
def test_a_flipped_bit_a_missing_and_a_shortened_object_are_damage(bucket):
    store = make_store(place_of(url_of(bucket)), [(40, 40, 40)], superpatch=16)
    (volume,) = store.volumes()
    key = volume.superpatches[0].path
    whole = store.storage.read(key)
    flipped = bytearray(whole)
    flipped[volume.superpatches[0].offset + 20] ^= 4
    for damaged in (bytes(flipped), whole[:50], None):
        store.storage.remove(key)
        if damaged is not None:
            store.storage.put_new(key, damaged)
        assert verify(store).problems
        assert "damaged" in run("store", "verify", url_of(bucket))[1]
        assert run("store", "verify", url_of(bucket))[0] == 4
    store.storage.put_new(key, whole)
    assert verify(store).problems == ()
    hu = SuperpatchReader(store).read_region(volume.volume_id, (0, 0, 0), volume.shape)
    assert np.array_equal(hu, synthetic_hu((40, 40, 40)))


def test_no_credential_stands_in_any_file_object_or_message(sources, bucket, here, monkeypatch):
    said = [run(*ingest(sources, url_of(bucket), "--key-file", here / "key", *SMALL))]
    said.append(run("store", "info", url_of(bucket), "--json"))
    with monkeypatch.context() as nobody_there:
        nobody_there.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        nobody_there.setattr("maesil.store.object_storage.PATIENCE", 0.5)
        said.append(run("store", "info", url_of(bucket)))
    assert [code for code, _, _ in said] == [0, 0, 5]
    storage = Store.open(url_of(bucket)).storage
    data = [*storage.read_each(list(storage.list(""))), *(p.read_bytes() for p in here.rglob("*") if p.is_file())]
    for secret in (SECRET, KEY_ID):
        assert not any(secret in text for _, *texts in said for text in texts)
        assert not any(secret.encode() in one for one in data)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("store", "info", "s3://k:SECRET@bucket/a"), "expected no credentials in a URL"),
        (("store", "info", "http://host/a"), "expected a path, file:///PATH, or one of s3://BUCKET/FOLDER"),
        (("ingest", "http://host/dicom", "--out", "store.zarr"), "expected a path, file:///PATH, or one of s3://"),
        (("ingest", "s3://k:SECRET@bucket/a", "--out", "store.zarr"), "expected no credentials in a URL"),
        (("ingest", "scans", "--out", "s3://bucket/store.zarr?x=SECRET"), "nothing behind it"),
    ],
)
def test_what_cannot_be_a_url_of_a_store_is_told_in_one_line(words, told, here):
    line = fails(2, *words)
    assert told in line and "SECRET" not in line


def test_a_place_without_a_store_is_told(bucket):
    assert "found no such folder" in fails(4, "store", "info", f"s3://{bucket}/nothing.zarr")


def test_a_data_set_goes_to_another_process_and_reads_there(bucket):
    from maesil.data.dataset import SuperpatchDataset

    make_store(place_of(url_of(bucket)), [(32, 32, 32)], superpatch=16)
    made = SuperpatchDataset(url_of(bucket))
    sent = pickle.loads(pickle.dumps(made))
    assert len(sent) == len(made) == 8 and bool((sent[3]["hu"] == made[3]["hu"]).all())
