"""The commit record: complete, canonical, and never believed when a byte of it changed."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maesil.documents import canonical_json
from maesil.errors import StoreError
from maesil.store.records import Superpatch, Volume

finite = st.floats(allow_nan=False, allow_infinity=False)
share = st.floats(0, 1)
count = st.integers(1, 400)
hexes = st.text("0123456789abcdef", min_size=32, max_size=32)
triple = st.tuples(count, count, count)
spacing = st.tuples(*[st.floats(0.1, 20)] * 3)


@st.composite
def volumes(draw) -> Volume:
    volume_id = draw(hexes)
    patches = draw(
        st.lists(
            st.builds(
                Superpatch, index=triple, path=st.just("volumes/c/0/0/0"), offset=count, length=count,
                crc32c=st.integers(0, 2**32 - 1), valid=share, body=share, air=share,
            ),
            max_size=3,
        )
    )  # fmt: skip
    return Volume(
        volume_id=volume_id,
        group=draw(hexes),
        attempt=draw(hexes),
        source_hash=draw(hexes),
        recipe_hash=draw(hexes),
        source_path=draw(hexes),
        shape=draw(triple),
        affine_lps=tuple(tuple(draw(st.lists(finite, min_size=4, max_size=4))) for _ in range(4)),
        spacing=draw(spacing),
        source_shape=draw(triple),
        source_spacing=draw(spacing),
        tile=draw(st.sampled_from([8, 64, 128])),
        codec="fast",
        source={"kind": "dicom", "KVP": draw(finite), "Manufacturer": draw(st.text(max_size=20))},
        hu={"mean": draw(finite), "std": 1e-05},
        notes=tuple(draw(st.lists(st.text(max_size=8), max_size=2))),
        superpatches=tuple(patches),
        generation=draw(st.integers(1, 99_999_999)),
    )


@settings(max_examples=20, deadline=None)
@given(volumes())
def test_round_trip(volume):
    assert Volume.from_json(volume.to_json(), volume.key) == volume


def example() -> Volume:
    patch = Superpatch((0, 1, 2), "volumes/ab/c/0/0/0", 4, 1000, 123456789, 0.5, 1e-05, 1.0)
    return Volume(
        volume_id="ab" * 16, group="g", attempt="a", source_hash="s", recipe_hash="r", source_path="p", shape=(1, 2, 3),
        affine_lps=((0.0, 0.0, 1.0, -1.5),) * 4, spacing=(1.0, 2.5, 3e-07), source_shape=(1, 2, 3),
        source_spacing=(1.0, 1.0, 1.0), tile=64, codec="fast", source={"kind": "nifti"},
        hu={"mean": 1e16, "std": 0.0}, notes=("sheared",), superpatches=(patch,), generation=1,
    )  # fmt: skip


def test_every_flipped_bit_is_found():
    """Some flips leave the same number (1e-05, 1E-05) or the same text under another escape: those count too."""
    volume = example()
    data = volume.to_json()
    for at in range(len(data)):
        for bit in range(8):
            altered = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
            with pytest.raises(StoreError, match=volume.key):
                Volume.from_json(altered, volume.key)


def test_every_other_byte_is_found():
    volume, rng = example(), random.Random(0)
    data = volume.to_json()
    for _ in range(3000):
        at, value = rng.randrange(len(data)), rng.randrange(256)
        altered = data[:at] + bytes([value]) + data[at + 1 :]
        if altered != data:
            with pytest.raises(StoreError):
                Volume.from_json(altered, volume.key)


@pytest.mark.parametrize("change", ["whitespace", "order", "cut", "appended", "empty", "list", "null", "text checksum"])
def test_other_bytes_of_the_same_meaning_are_found(change):
    volume = example()
    data = volume.to_json()
    document = json.loads(data)
    altered = {
        "whitespace": json.dumps(document, sort_keys=True).encode(),
        "order": json.dumps(dict(reversed(document.items())), separators=(",", ":")).encode(),
        "cut": data[: len(data) // 2],
        "appended": data + b"\n",
        "empty": b"",
        "list": b"[]",
        "null": b"null",
        "text checksum": canonical_json(document | {"checksum_crc32c": "12"}),
    }[change]
    with pytest.raises(StoreError):
        Volume.from_json(altered, volume.key)


@pytest.mark.parametrize("change", ["missing field", "unknown field", "wrong type"])
def test_a_record_of_another_version_ends_in_one_line(change):
    volume = example()
    document = json.loads(volume.to_json())
    del document["checksum_crc32c"]
    if change == "missing field":
        del document["tile"]
    elif change == "unknown field":
        document["novelty"] = 1
    else:
        document["superpatches"] = 7
    document["checksum_crc32c"] = google_crc32c.value(canonical_json(document))
    with pytest.raises(StoreError) as caught:
        Volume.from_json(canonical_json(document), volume.key)
    assert "\n" not in str(caught.value)


def test_a_commit_under_another_name_is_found():
    volume = example()
    with pytest.raises(StoreError, match="moved"):
        Volume.from_json(volume.to_json(), replace(volume, volume_id="cd" * 16).key)
    with pytest.raises(StoreError, match="moved"):
        Volume.from_json(volume.to_json(), volume.at_generation(2).key)


def test_same_content_is_a_matter_of_source_and_recipe():
    volume = example()
    assert volume.same_content(replace(volume, attempt="b", generation=9))
    assert not volume.same_content(replace(volume, source_hash="t"))
    assert not volume.same_content(replace(volume, recipe_hash="t"))


@pytest.mark.parametrize(("shape", "grid"), [((64, 64, 64), (1, 1, 1)), ((65, 128, 1), (2, 2, 1))])
def test_grid_rounds_up(shape, grid):
    assert replace(example(), shape=shape).grid == grid
