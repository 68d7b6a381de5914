"""What was written is read, by us and by Arrow's own reader; what is no table is told."""

from __future__ import annotations

import io
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maesil.parquet import parquet_metadata, read_parquet, to_parquet

TABLE = pa.table({"name": ["a", None, "c"], "size": [1, 2, 3]}).replace_schema_metadata({"kept": "yes"})


def test_a_table_comes_back_with_what_it_says_of_itself(tmp_path):
    data = to_parquet(TABLE)
    (tmp_path / "t.parquet").write_bytes(data)
    for found in (read_parquet(data), read_parquet(tmp_path / "t.parquet"), pq.read_table(io.BytesIO(data))):
        assert found.equals(TABLE, check_metadata=True)
    assert parquet_metadata(data) == {b"kept": b"yes"}
    assert read_parquet(data, columns=["size"]).equals(TABLE.select(["size"]))


def test_reading_starts_no_thread(tmp_path):
    """In a process of its own, where no other reading has started Arrow's threads."""
    (tmp_path / "t.parquet").write_bytes(to_parquet(TABLE))
    code = """
import os, sys
from pathlib import Path
from maesil.parquet import parquet_metadata, read_parquet
path = Path(sys.argv[1])
before = set(os.listdir("/proc/self/task"))
read_parquet(path), read_parquet(path.read_bytes()), parquet_metadata(path.read_bytes())
assert set(os.listdir("/proc/self/task")) == before
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "t.parquet")], check=True)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no table at all"])
def test_what_is_no_table_is_told(data, tmp_path):
    with pytest.raises(pa.ArrowException):
        read_parquet(data)
    with pytest.raises(OSError):
        read_parquet(tmp_path / "nowhere")
