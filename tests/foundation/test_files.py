from __future__ import annotations

import stat

import pytest

from maesil.errors import UsageError
from maesil.files import (
    folder_locked,
    make_folder,
    require_file_place,
    require_folder_place,
    results_at_once,
    whole_file,
    write_whole,
)


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


def test_of_what_fails_nothing_is_left_and_what_was_there_stays(tmp_path):
    write_whole(tmp_path / "old", "old\n")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "old") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), results_at_once(tmp_path) as place:
        (place / "old").write_text("half")
        (place / "new").write_text("half")
        raise KeyboardInterrupt
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("old", "old\n")]
    with results_at_once(tmp_path) as place:
        (place / "old").write_text("replaced")
        (place / "new").write_text("new")
    assert sorted((one.name, one.read_text()) for one in tmp_path.iterdir()) == [("new", "new"), ("old", "replaced")]


def test_a_private_file_is_private_from_its_first_byte_and_several_may_write_it(tmp_path):
    path = tmp_path / "paths.json"
    with whole_file(path, private=True) as one, whole_file(path, private=True) as other:
        assert one != other and {stat.S_IMODE(p.stat().st_mode) for p in (one, other)} == {0o600}
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["paths.json"]


def test_a_new_file_never_takes_the_place_of_another(tmp_path):
    path = tmp_path / "key"
    with pytest.raises(FileExistsError), whole_file(path, new=True) as late:
        late.write_text("late")
        with whole_file(path, new=True) as early:
            early.write_text("early")
    assert path.read_text() == "early" and [p.name for p in tmp_path.iterdir()] == ["key"]


def test_what_a_killed_writer_left_is_no_hindrance(tmp_path):
    (tmp_path / "scores.json.partial").write_text("half of an earlier one, which is longer")
    write_whole(tmp_path / "scores.json", "whole")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("scores.json", "whole")]


def test_a_folder_is_locked_against_others_as_long_as_it_is_written(tmp_path):
    place, user = tmp_path / "r", "`maesil test`"
    refused = pytest.raises(UsageError, match=r"another `maesil test` is writing there \(process [0-9]+ on")
    with folder_locked(place, user), refused, folder_locked(place, user):
        pytest.fail("locked twice")
    with folder_locked(place, user):
        pass


def test_nothing_but_its_format_lies_in_a_store(tmp_path):
    (tmp_path / "s" / "volumes").mkdir(parents=True)
    (tmp_path / "s" / "zarr.json").write_text("{}")
    (tmp_path / "s" / "volumes" / "zarr.json").write_text("{}")
    for place in (tmp_path / "s", tmp_path / "s" / "new", tmp_path / "s" / "volumes" / "a" / "b"):
        with pytest.raises(UsageError, match="in the store"):
            make_folder(place)
        with pytest.raises(UsageError, match="in the store"):
            write_whole(place / "file", "x")
    make_folder(tmp_path / "beside")
