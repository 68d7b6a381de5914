"""Sizes: every unit means what it says, a bare number means nothing, and what is written can be read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maesil.errors import UsageError
from maesil.sizes import parse_size, size_text

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@given(st.integers(0, 10**6), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]), st.booleans())
def test_a_number_times_its_unit(number, unit, space, short):
    written = unit.removesuffix("B") if short and unit != "B" else unit
    assert parse_size(f"{number}{space}{written}", "--x") == number * UNITS[unit]
    assert parse_size(f"{number}{space}{written.lower()}", "--x") == number * UNITS[unit]


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("0.0", 0), ("1.5GB", 15 * 10**8), ("2 TiB", 2**41), (".5GB", 5 * 10**8)]
)
def test_zero_needs_no_unit_and_fractions_are_sizes(text, size):
    assert parse_size(text, "--x") == size


@given(st.floats(0.001, 1e15).map(lambda number: f"{number:.3f}"))
def test_a_number_without_a_unit_is_refused_and_told_how_to_write_it(text):
    if float(text):
        with pytest.raises(UsageError, match=rf"^--x: .* its unit, found '{text}'; did you mean {text}GB\?$"):
            parse_size(text, "--x")


@pytest.mark.parametrize(
    "text", ["", "many", "GB", "-1GB", "1,5GB", "1e3GB", "nan GB", "1 G B", "1GB 2", "8GBs", "1EB"]
)
def test_what_is_no_size_is_refused_by_the_name_of_its_option(text):
    with pytest.raises(UsageError, match=r"^--x: expected auto or a size|^--x: expected a unit"):
        parse_size(text, "--x", "auto or ")


@given(st.integers(0, 10**16))
def test_what_is_written_can_be_read_to_the_digits_shown(count):
    step = next((scale for scale in (10**12, 10**9, 10**6, 10**3) if count >= scale), 10) // 10
    assert abs(parse_size(size_text(count), "--x") - count) <= step / 2 + 1
