"""Documents: what is none is told in words, not in those of a parser."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maesil.documents import CHECKSUM, as_json, canonical_json, fields_of, parsed_json, read_json, reason, write_json
from maesil.errors import DamagedError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=8,
)


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


@settings(max_examples=40)
@given(st.dictionaries(st.text().filter(lambda name: name != CHECKSUM), VALUES, max_size=4))
def test_what_was_written_comes_back_and_nothing_that_was_cut_does(tmp_path_factory, document):
    path = tmp_path_factory.mktemp("d") / "d.json"
    write_json(path, document)
    assert read_json(path) == as_json(document)
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedError, match=r"d\.json: expected a file as maesil wrote it, found it damaged"):
            read_json(path)


def test_an_altered_value_is_found_and_the_way_out_is_told(tmp_path):
    path = tmp_path / "scores.json"
    write_json(path, {"rows": [{"psnr": 31.25, "patient": (1, 2)}], "none": None})
    altered = path.read_text().replace("31.25", "31.26")
    path.write_text(altered)
    with pytest.raises(DamagedError, match=f"its {CHECKSUM} is of other values") as error:
        read_json(path)
    assert error.value.exit_code == 4
    own = json.loads(altered)
    del own[CHECKSUM]
    path.write_text(json.dumps(own))  # laid out in another way, too
    assert read_json(path)["rows"][0]["psnr"] == 31.26


def test_numbers_that_only_python_reads_are_refused_unless_allowed(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "d", {"psnr": math.inf})
    assert not (tmp_path / "d").exists()
    write_json(tmp_path / "d", {"psnr": math.inf, "nan": math.nan}, allow_nan=True)
    assert math.isnan(read_json(tmp_path / "d")["nan"])


@pytest.mark.parametrize(
    "take", [lambda d: d["b"], lambda d: d["a"]["x"], lambda d: d["a"].items(), lambda d: int("x")]
)
def test_a_field_that_is_not_as_expected_is_damage(tmp_path, take):
    with pytest.raises(DamagedError, match="found it damaged"), fields_of(tmp_path):
        take({"a": [1]})
