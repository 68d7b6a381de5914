"""The summary of a store equals its commits, in JSON and on the screen."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from support.stores import make_store

from maesil.store.records import Refusal
from maesil.store.summary import summary_of


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = make_store(tmp_path_factory.mktemp("info") / "s.zarr", [(20, 33, 16), (9, 9, 9)], superpatch=16)
    store.quarantine(Refusal("ab" * 16, "gap", "[1 missing] after 7 mm"))
    return store


def test_describe_adds_up(store):
    found = summary_of(store).document()
    assert json.loads(json.dumps(found)) == found
    volumes = store.volumes()
    assert [v["volume_id"] for v in found["volumes"]] == [v.volume_id for v in volumes]
    assert found["superpatches"] == sum(len(v.superpatches) for v in volumes) == 7
    assert found["patient_groups"] == 2
    shards = {patch.path for v in volumes for patch in v.superpatches}
    on_disk = sum(store.storage.size(path) for path in shards)
    assert 0 < on_disk - found["stored_bytes"] <= (16 * 64 + 4) * len(shards)
    assert found["decoded_bytes"] == 7 * 2 * 16**3
    assert found["fingerprint"] == store.fingerprint
    assert [record["code"] for record in found["refused"]] == ["gap"]


def test_tables_name_every_volume_and_refusal(store):
    console = Console(file=io.StringIO(), width=200)
    for renderable in summary_of(store).tables():
        console.print(renderable, markup=False)
    text = console.file.getvalue()
    for volume in store.volumes():
        assert volume.volume_id[:12] in text
    assert "gap: [1 missing] after 7 mm" in text
