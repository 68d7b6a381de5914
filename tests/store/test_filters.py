"""Filters take exactly the rows that Python itself would, and nothing but comparisons is understood."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stores import add_volume, make_store, synthetic_hu

from maesil.errors import UsageError
from maesil.store.filters import COLUMNS, parse, select
from maesil.store.index import SUPERPATCHES_KEY, superpatch_table
from maesil.store.segments import Segment


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = make_store(tmp_path_factory.mktemp("where") / "s", [(20, 33, 17)], superpatch=16)
    add_volume(store, synthetic_hu((16, 40, 16), 3), name="other", group="g", spacing=(3.0, 1.0, 1.0))
    return store


@pytest.fixture(scope="module")
def table(store):
    return superpatch_table(store)


def taken(table, text: str) -> set:
    """What Python's own evaluation takes, row by row."""
    return {
        (row["volume_id"], (row["iz"], row["iy"], row["ix"])) for row in table.to_pylist()
        if eval(text, {"__builtins__": {}}, {**row, "notes": row["notes"].split()})
    }  # fmt: skip


number = st.sampled_from(["body", "air", "iz", "iy", "spacing_z", "volume_body"])
sign = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
constant = st.sampled_from(["0", "1", "0.5", "-1", "2.0", "3"])
leaf = st.one_of(
    st.builds("{} {} {}".format, number, sign, constant),
    st.builds("{} {} {}".format, constant, sign, number),
    st.builds("{} < {} <= {}".format, constant, number, constant),
    st.builds("{} in ({}, {})".format, number, constant, constant),
    st.builds("{} not in []".format, number),
    st.sampled_from(["volume_id in ()", "notes not in []", "codec in []"]),
    st.sampled_from(["group == 'g'", "group not in ['g', 'h']", "codec != 'fast'", "'lossy' in notes"]),
)
filters = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.builds("({}) and ({})".format, inner, inner),
        st.builds("({}) or ({})".format, inner, inner),
        st.builds("not ({})".format, inner),
    ),
    max_leaves=6,
)


@given(filters)
@settings(max_examples=150, deadline=None)
def test_a_filter_takes_what_python_takes(table, text):
    assert select(table, text) == taken(table, text)


def test_what_is_taken_of_a_volume_is_the_same_from_a_commit_and_from_a_table(store, table):
    taken = select(table, "body > 0.4 and iy != 1")
    committed = store.volumes()
    rows = dict(Segment.of(committed).volumes())
    left = 0
    for volume in committed:
        expected = tuple(p for p in volume.superpatches if (volume.volume_id, p.index) in set(taken))
        one, other = taken.part(volume), taken.part(rows[volume.volume_id])
        assert one.superpatches == expected and other.count == len(expected)
        assert other.paths == [patch.path for patch in expected]
        for name in ("iz", "offset", "body"):
            assert np.array_equal(one.column(name), other.column(name))
        assert other == one and (other.volume_id in taken.volumes) == bool(expected)
        left += len(expected)
    assert 0 < left == len(taken) < table.num_rows
    assert ("nobody", (0, 0, 0)) not in taken and select(table, "body > 2").part(committed[0]).count == 0


def test_no_filter_takes_all_and_every_column_can_be_asked_for(table):
    assert len(select(table, "")) == table.num_rows
    assert set(COLUMNS) <= set(table.column_names)
    for name in COLUMNS:
        value = "'x'" if table.schema.field(name).type == "string" else "0"
        select(table, f"{name} == {value}")


def test_notes_are_words():
    import pyarrow as pa

    rows = [{"volume_id": str(n), "iz": 0, "iy": 0, "ix": 0, "notes": notes}
            for n, notes in enumerate(["lossy", "head lossy", "lossy_not", ""])]  # fmt: skip
    assert {volume for volume, _ in select(pa.Table.from_pylist(rows), "'lossy' in notes")} == {"0", "1"}


@pytest.mark.parametrize(
    "text",
    ["body >", "body", "1 < 2", "True", "body > '1'", "group > 1", "body > spacing_z", "body + 1 > 2", "-body > 1",
     "__import__('os').system('x')", "body > (lambda: 1)()", "body.real > 1", "[x for x in (1,)]", "body is 1",
     "body > 1; body", "a = 1", "body > True", "'x' in group", "body in 3", "(" * 500 + "body > 1" + ")" * 500,
     "not " * 3000 + "body > 1", "body > f'{1}'", "\0", "body > 1j", "body > None"],
)  # fmt: skip
def test_what_is_no_filter_is_refused_in_one_line(text):
    with pytest.raises(UsageError, match="--where: expected a filter such as") as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_an_unknown_column_is_named_with_those_meant_and_where_all_are_listed():
    with pytest.raises(UsageError, match=r"no column 'spacing'; did you mean spacing_\w or .* lists all \d+$"):
        parse("body > 0.3 and spacing < 2")
    with pytest.raises(UsageError, match=r"no column 'qqq'; docs/how-to/cache\.md lists all \d+$"):
        parse("qqq < 2")


def test_a_store_without_its_index_is_filtered_alike(tmp_path):
    store = make_store(tmp_path / "s", [(20, 33, 17)], superpatch=16)
    before = superpatch_table(store)
    store.storage.remove(SUPERPATCHES_KEY)
    assert superpatch_table(store).equals(before)
