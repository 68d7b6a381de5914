from __future__ import annotations

import pytest

from maesil.errors import UsageError
from maesil.files import make_folder, require_file_place, require_folder_place, write_whole


def test_a_file_is_written_with_the_folders_above_it_and_replaced_whole(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    write_whole(path, "first, and longer\n")
    write_whole(path, "second: ä\n")
    assert path.read_text(encoding="utf-8") == "second: ä\n"
    assert [one.name for one in path.parent.iterdir()] == ["c.txt"]


def test_what_is_in_the_way_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        for check in (make_folder, require_folder_place):
            with pytest.raises(UsageError, match="expected a folder for the results, found"):
                check(place)
    with pytest.raises(UsageError, match="found a folder"):
        require_file_place(tmp_path)
    with pytest.raises(UsageError, match="name another"):
        make_folder(tmp_path / ("n" * 300))
    require_folder_place(tmp_path / "new" / "folder")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file"]
