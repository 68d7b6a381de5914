"""A recipe's hash tells apart what can change a voxel, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maesil.documents import canonical_json, parsed_json
from maesil.errors import UsageError
from maesil.store.recipe import CODECS, Recipe, parse_spacing

RECIPE = Recipe(spacing=(2.0, 1.5, 1.5), superpatch=64)


@settings(max_examples=40, deadline=None)
@given(
    st.none() | st.tuples(*[st.floats(0.1, 20)] * 3),
    st.integers(1, 64).map(lambda n: 8 * n),
    st.sampled_from(CODECS),
)
def test_document_round_trip_keeps_the_hash(spacing, superpatch, codec):
    recipe = Recipe(spacing=spacing, superpatch=superpatch, codec=codec)
    again = Recipe.from_document(recipe.document())
    assert again == recipe
    assert again.hash == recipe.hash


@pytest.mark.parametrize(
    "change",
    [
        {"spacing": None},
        {"spacing": (2.0, 1.5, 1.6)},
        {"superpatch": 128},
        {"hu_range": (-1024, 2000)},
        {"codec": "raw"},
        {"method": "other"},
        {"libraries": (("SimpleITK", "0"),)},
    ],
)
def test_every_field_changes_the_hash_and_is_named(change):
    other = replace(RECIPE, **change)
    assert other.hash != RECIPE.hash
    assert RECIPE.difference(other)
    assert RECIPE.difference(RECIPE) == ""


def test_equal_numbers_are_the_same_recipe():
    whole = Recipe(spacing=(2, 2, 2), superpatch=np.int64(64), hu_range=(np.int16(-1024), np.int16(3071)))
    assert whole.hash == Recipe(spacing=(2.0, 2.0, 2.0), superpatch=64).hash


def test_difference_names_the_library_that_changed():
    libraries = tuple((name, "0.0" if name == "pydicom" else v) for name, v in RECIPE.libraries)
    text = RECIPE.difference(replace(RECIPE, libraries=libraries))
    assert text.startswith("pydicom: ") and text.endswith("-> 0.0")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("native", None),
        (" Native ", None),
        ("1.5", (1.5, 1.5, 1.5)),
        ("3,0.8,0.7", (3.0, 0.8, 0.7)),
        ("2e0", (2.0,) * 3),
    ],
)
def test_parse_spacing(text, expected):
    assert parse_spacing(text) == expected


@pytest.mark.parametrize(
    "text", ["", "isotropic", "1,2", "1,2,3,4", "1;2;3", "1,,2", "nan", "inf", "0", "-1", "1e-9", "21"]
)
def test_impossible_spacings_are_refused_by_name(text):
    with pytest.raises(UsageError, match="--spacing"):
        Recipe(spacing=parse_spacing(text))


@pytest.mark.parametrize("superpatch", [0, -8, 7, 12, 1024, 100_000])
def test_impossible_superpatches_are_refused_by_name(superpatch):
    with pytest.raises(UsageError, match="--superpatch"):
        Recipe(superpatch=superpatch)


def test_unknown_codec_is_refused_by_name():
    with pytest.raises(UsageError, match="--codec"):
        Recipe(codec="gzip")


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, b"\xff"])
def test_what_is_no_json_or_nested_too_deeply_is_a_value_error(text):
    with pytest.raises(ValueError):
        parsed_json(text)


def test_canonical_json_knows_no_order_and_no_nan():
    assert canonical_json({"b": 1, "a": [1.0, "é"]}) == canonical_json({"a": [1.0, "é"], "b": 1})
    with pytest.raises(ValueError):
        canonical_json({"a": float("nan")})
