"""What may name a store, and what a refusal never repeats."""

from __future__ import annotations

from pathlib import Path

import pytest

from maesil.errors import UsageError
from maesil.store.urls import ObjectUrl, local_path, place_of


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a/b", Path("a/b")),
        ("file:///a%20b", Path("/a b")),
        ("s3://bucket/a/b.zarr", ObjectUrl("s3", "bucket", "a/b.zarr")),
        ("S3://bucket/a//b.zarr/", ObjectUrl("s3", "bucket", "a/b.zarr")),
        ("gs://bucket", ObjectUrl("gs", "bucket")),
        ("az://container/x", ObjectUrl("az", "container", "x")),
    ],
)
def test_a_path_or_url_names_one_place(text, place):
    assert place_of(text) == place
    assert place_of(str(place_of(text))) == place
    assert place_of(place) is place


def test_the_name_of_a_place_is_its_last_part():
    assert place_of("s3://bucket/a/b.zarr").name == "b.zarr" and place_of("s3://bucket").name == "bucket"


@pytest.mark.parametrize(
    "url",
    [
        "http://host/a", "ftp://host/a", "s3://", "s3:///a", "s3://bucket/a?versionId=SECRET", "s3://bucket/a#SECRET",
        "s3://key:SECRET@bucket/a", "https://host/a?sig=SECRET", "s3://bucket/../a", "s3://buck et/a",
    ],
)  # fmt: skip
def test_other_urls_are_refused_in_one_line_without_their_secrets(url):
    with pytest.raises(UsageError) as told:
        place_of(url)
    assert "SECRET" not in str(told.value) and "\n" not in str(told.value) and "expected" in str(told.value)


@pytest.mark.parametrize("url", ["s3://bucket/a", "https://u:SECRET@host/a", "file://host/a"])
def test_what_must_be_local_refuses_urls(url):
    with pytest.raises(UsageError, match="expected a path or file:///PATH") as told:
        local_path(url)
    assert "SECRET" not in str(told.value)
