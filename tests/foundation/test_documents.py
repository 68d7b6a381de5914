"""Documents: what is none is told in words, not in those of a parser."""

from __future__ import annotations

import pytest

from maesil.documents import canonical_json, parsed_json, reason


@pytest.mark.parametrize(("data", "words"), [
    (b"", "no JSON but an empty file"), (b" \n", "no JSON but an empty file"), (b"{}\n{", "no JSON from line 2 on"),
    (b'{"a": 1,', "no JSON from line 1 on"), (b"\xff\xfe\xff", "no text in UTF-8"),
    (b"[" * 100_000, "nested too deeply"),
])  # fmt: skip
def test_what_is_no_json_is_told_in_plain_words(data, words):
    with pytest.raises(ValueError, match=words):
        parsed_json(data)


def test_what_json_says_comes_back():
    assert parsed_json(canonical_json({"b": [1, None], "a": "x"})) == {"a": "x", "b": [1, None]}


def test_reasons_speak_of_fields():
    assert reason(KeyError("grid")) == "the field 'grid' is missing"
    assert reason(TypeError("'int' object is not iterable")) == "a field holds another kind of value"
    assert reason(ValueError("too large")) == "too large"
