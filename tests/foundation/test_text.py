"""Text for people: nothing in a file name can steer a terminal or end a line, and nothing else is touched."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from maesil.text import candidates, counted, exact, printable, written

NAMES = st.binary(min_size=1, max_size=40).map(os.fsdecode)


@given(NAMES)
@example("\x1b]0;owned\x07")
@example("a\u202egnp.exe")
@example("a\nrefused b")
def test_any_name_becomes_one_line_that_any_file_and_terminal_takes(name):
    shown = printable(Path(name) if "\0" not in name else name)
    shown.encode("utf-8")
    assert len(shown.splitlines()) <= 1
    assert not {unicodedata.category(letter) for letter in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}


@given(NAMES | st.text())
@example(r"a\x41\x5cx41")
@example("\x85\xad")
def test_the_name_can_be_had_back(name):
    assert exact(written(name)) == name
    assert printable(written(name)) == written(name) and printable(printable(name)) == printable(name)


@given(st.text(st.characters(categories=["L", "M", "N", "P", "S", "Zs"], exclude_characters="\\"), max_size=40))
def test_letters_of_all_scripts_stay(text):
    assert printable(text) == text


def test_a_backslash_stays_unless_it_would_read_like_a_byte():
    assert written(r"sub-(\d+)\x") == r"sub-(\d+)\x" and written(r"\xe4") == r"\x5cxe4"
    assert printable(r"\xe4") == r"\xe4"


def test_what_cannot_be_shown_is_named_by_its_number():
    assert printable(os.fsdecode(b"Sch\xe4del 1")) == r"Sch\xe4del 1"
    assert printable("\x1b[31m\t\u202e\U000e0001") == r"\x1b[31m\x09\u202e\U000e0001"


def test_counts_agree_with_their_noun():
    assert [counted(n, "volume") for n in (0, 1, 2)] == ["0 volumes", "1 volume", "2 volumes"]
    assert [counted(n, "superpatch", "superpatches") for n in (1, 3)] == ["1 superpatch", "3 superpatches"]


def test_candidates_end_after_a_few():
    assert candidates("abc") == "a, b, c"
    assert candidates("abcdefg") == "a, b, c, d, e and 2 more"
