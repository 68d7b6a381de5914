"""The mirror of a run: another machine goes on from it, a bad network costs copies and never the run."""

from __future__ import annotations

import io
import shutil

import pytest
from rich.console import Console
from support.command_line import run
from support.lanes import slow_but
from support.runs import interrupted_after
from support.stores import make_store
from support.training import CONFIG, with_train

from maesil.errors import UsageError
from maesil.store.backends import open_storage
from maesil.store.urls import place_of
from maesil.training.checkpoint import content_sha256, load_run
from maesil.training.mirror import bring_back
from maesil.training.train import train

SHAPES = [(32, 40, 36), (40, 32, 33)]


@pytest.fixture(scope="module")
def store(tmp_path_factory, one_thread):
    return make_store(tmp_path_factory.mktemp("mirror") / "store.zarr", SHAPES, superpatch=32).path


def trained(store, out, config=CONFIG, **options):
    told = io.StringIO()
    train([store], config, out, console=Console(file=told, width=300), **options)
    return told.getvalue()


def weights(out):
    return content_sha256(load_run(out).last_weights)


@pytest.mark.parametrize("where", slow_but(("a bucket", "a folder"), ("a bucket",)))
def test_another_machine_goes_on_from_the_mirror_as_the_first_would_have(store, bucket, tmp_path, where):
    mirror = place_of(f"s3://{bucket}/runs/one" if where == "a bucket" else str(tmp_path / "mirror"))
    interrupted_after(3, [store], CONFIG, tmp_path / "first", mirror=mirror)
    kept = sorted(open_storage(mirror).list(""))
    assert {"checkpoint.pt", "config.toml", "metrics.jsonl", "split.json", "stores.json"} <= {*kept}
    shutil.rmtree(tmp_path / "first")
    told = trained(store, tmp_path / "second", resume=True, mirror=mirror)
    assert f"brought back from {mirror}" in told
    trained(store, tmp_path / "whole")
    assert weights(tmp_path / "second") == weights(tmp_path / "whole")
    assert open_storage(mirror).read("checkpoint.pt") == (tmp_path / "second" / "checkpoint.pt").read_bytes()


def test_the_checkpoint_is_copied_last_and_what_did_not_change_once(store, bucket, proxy, tmp_path):
    trained(store, tmp_path / "run", with_train(steps=3, checkpoint_every=1), mirror=place_of(f"s3://{bucket}/run"))
    names = [request.path.rpartition("/")[2] for request in proxy.of("PUT", "/run/")]
    assert names[-1] == "checkpoint.pt" and names.count("checkpoint.pt") == 3 and names.count("split.json") == 1


def test_a_network_that_fails_costs_copies_and_not_the_run(store, bucket, proxy, tmp_path):
    copies = iter(range(10**6))
    proxy.faults = lambda request: "denied" if request.method == "PUT" and next(copies) < 1 else None
    mirror = place_of(f"s3://{bucket}/run")
    told = trained(store, tmp_path / "run", with_train(steps=3, checkpoint_every=1), mirror=mirror)
    lines = [line for line in told.splitlines() if line.startswith("--mirror: ")]
    assert len(lines) == 1 and "was not copied" in lines[0] and "403" in lines[0]
    assert open_storage(mirror).read("checkpoint.pt") == (tmp_path / "run" / "checkpoint.pt").read_bytes()


def test_a_new_run_does_not_overwrite_a_mirrored_one(store, bucket, tmp_path):
    mirror = place_of(f"s3://{bucket}/run")
    trained(store, tmp_path / "run", with_train(steps=1), mirror=mirror)
    with pytest.raises(UsageError, match="holds the checkpoint of a run; --resume goes on with it"):
        trained(store, tmp_path / "other", with_train(steps=1), mirror=mirror)
    assert bring_back(mirror, tmp_path / "run", resume=True) == "", "what is here already stays"


def test_the_mirror_of_another_run_is_refused_and_stays(store, bucket, tmp_path):
    mirror = place_of(f"s3://{bucket}/run")
    trained(store, tmp_path / "one", with_train(steps=1), mirror=mirror)
    before = open_storage(mirror).read("checkpoint.pt")
    trained(store, tmp_path / "other", with_train(steps=1))
    with pytest.raises(UsageError, match=r"holds another run than .*other; name a place of its own"):
        trained(store, tmp_path / "other", with_train(steps=2), resume=True, mirror=mirror)
    assert open_storage(mirror).read("checkpoint.pt") == before
    trained(store, tmp_path / "one", with_train(steps=2), resume=True, mirror=mirror)
    assert open_storage(mirror).read("checkpoint.pt") == (tmp_path / "one" / "checkpoint.pt").read_bytes()


def test_only_the_files_of_a_run_are_brought_back(store, tmp_path):
    mirror = place_of(str(tmp_path / "mirror"))
    trained(store, tmp_path / "run", with_train(steps=1), mirror=mirror)
    kept = {path.name for path in (tmp_path / "mirror").iterdir()}
    for name in ("scan.dcm", "deep/er/file.json"):
        (tmp_path / "mirror" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mirror" / name).write_text("x")
    bring_back(mirror, tmp_path / "again", resume=True)
    assert {path.name for path in (tmp_path / "again").iterdir()} == kept


def test_the_command_takes_the_configuration_from_the_mirror(store, bucket, tmp_path):
    settings = ("--device", "cpu", "--set", "model.crop=16", "--batch", 2, "--validation", 0)
    words = (*settings, "--mirror", f"s3://{bucket}/r")
    code, _, stderr = run("train", store, "--preset", "tiny", "--out", tmp_path / "a", "--steps", 1, *words)
    assert code == 0, stderr
    more = ("--steps", 2, "--resume", "--mirror", f"s3://{bucket}/r")
    code, _, stderr = run("train", store, "--out", tmp_path / "b", *more)
    assert code == 0 and "brought back from" in stderr, stderr
    assert load_run(tmp_path / "b").step == 2 and load_run(tmp_path / "b").config.train.batch == 2
