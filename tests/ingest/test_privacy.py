"""The identity key and the memory of sources: made once, kept from others, and no plain name in either."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maesil.errors import UsageError
from maesil.ingest.privacy import IdentityKey, default_key_file, load_or_create_key, without_paths
from maesil.ingest.source_cache import SourceCache

KEY = IdentityKey(b"k" * 32)


@settings(max_examples=50, deadline=None)
@given(st.text(), st.text(), st.sampled_from(["volume", "patient", "path"]))
def test_hashes_tell_identities_purposes_and_keys_apart(a, b, purpose):
    assert (KEY.hash(purpose, a) == KEY.hash(purpose, b)) == (a == b)
    assert KEY.hash(purpose, a) != IdentityKey(b"l" * 32).hash(purpose, a)
    assert KEY.hash(purpose, a) != KEY.hash("other", a)
    assert len(KEY.hash(purpose, a)) == 32 and set(KEY.hash(purpose, a)) <= set("0123456789abcdef")


def test_any_file_name_can_be_hashed():
    assert KEY.hash("path", os.fsdecode(b"/x/\xff\xfe.dcm"))


def test_the_key_is_made_once_for_the_owner_alone(tmp_path):
    path = tmp_path / "k"
    first = load_or_create_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_create_key(path).fingerprint == first.fingerprint
    assert load_or_create_key(tmp_path / "other").fingerprint != first.fingerprint
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_default_key_lies_in_the_configuration_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    load_or_create_key()
    assert default_key_file().is_relative_to(tmp_path) and default_key_file().exists()


def test_eight_at_once_get_one_key(tmp_path):
    found, barrier = [], threading.Barrier(8)

    def load() -> None:
        barrier.wait()
        found.append(load_or_create_key(tmp_path / "deep" / "k").fingerprint)

    (tmp_path / "deep").mkdir()
    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["k"]


@pytest.mark.parametrize("kind", ["empty", "short", "blank", "folder", "nowhere"])
def test_what_is_no_key_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "k"
    if kind == "folder":
        path.mkdir()
    elif kind == "nowhere":
        path = tmp_path / "missing" / "k"
    else:
        path.write_bytes({"empty": b"", "short": b"x" * 31, "blank": b" " * 64}[kind])
    with pytest.raises(UsageError, match="key"):
        load_or_create_key(path)


def test_the_fingerprint_gives_the_key_not_away():
    assert KEY.fingerprint not in (KEY.hash("volume", ""), "k" * 16)
    assert len(KEY.fingerprint) == 16


@pytest.fixture
def files(tmp_path) -> list[Path]:
    paths = [tmp_path / f"DOE{number}.dcm" for number in range(3)]
    for path in paths:
        path.write_text("x")
    return paths


def test_the_memory_knows_files_until_they_change(tmp_path, files):
    cache = SourceCache(KEY, tmp_path / "cache")
    assert cache.get(cache.files(files)) is None
    cache.put(cache.files(files), "hash")
    cache.close()
    cache = SourceCache(KEY, tmp_path / "cache")
    assert cache.get(cache.files(files)) == "hash"
    assert cache.get(cache.files(files[:2])) is None and cache.get(cache.files(files[::-1])) is None
    os.utime(files[1], ns=(1, 1))
    assert cache.get(cache.files(files)) is None
    cache.put(cache.files(files), "new")
    assert cache.get(cache.files(files)) == "new"
    files[0].write_text("xy")
    assert cache.get(cache.files(files)) is None
    files[0].unlink()
    assert cache.get(cache.files(files)) is None
    cache.close()


def test_the_memory_holds_no_name_and_is_the_owners(tmp_path, files):
    cache = SourceCache(KEY, tmp_path / "cache")
    cache.put(cache.files(files), "a" * 64)
    cache.close()
    data = b"".join(path.read_bytes() for path in (tmp_path / "cache").iterdir())
    assert b"DOE" not in data and str(tmp_path).encode() not in data and b"a" * 64 in data
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    other = SourceCache(IdentityKey(b"l" * 32), tmp_path / "cache")
    assert other.get(other.files(files)) is None
    other.close()


@pytest.mark.parametrize("kind", ["junk", "folder", "file"])
def test_a_memory_that_cannot_be_opened_is_just_empty(tmp_path, files, kind):
    folder = tmp_path / "cache"
    if kind == "file":
        folder.write_text("x")
    else:
        folder.mkdir()
        (folder / "sources.sqlite").mkdir() if kind == "folder" else (folder / "sources.sqlite").write_bytes(
            b"x" * 5000
        )
    cache = SourceCache(KEY, folder)
    cache.put(cache.files(files), "hash")
    assert cache.get(cache.files(files)) in (None, "hash")
    cache.close()


def test_many_processes_may_share_a_memory(tmp_path, files):
    def work(worker: int) -> None:
        cache = SourceCache(KEY, tmp_path / "cache")
        for number in range(10):
            cache.put(cache.files(files[: number % 3 + 1]), f"hash{number % 3}")
            assert cache.get(cache.files(files[: number % 3 + 1])) == f"hash{number % 3}"
        cache.close()

    failures: list[BaseException] = []

    def guarded(worker: int) -> None:
        try:
            work(worker)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


HARD_NAMES = ["DOE-JANE", "4711", "28", "CT", "JANE.dcm", "1.2.840.5", "smith", "Sch\udce4del", "\x1b[0m", "it's"]
SENTENCE = "the 2nd of 28 slices is 45.5 % air at -1024 HU, a CT number of 1.5 mm (line 7): expected soft tissue"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 2000).map(str), st.floats(0, 99).map("{:.1f}".format), st.sampled_from(
    ["CT", "HU", "a", "of", "mm", "sof", "numb", "slic", "exp"]))))  # fmt: skip
def test_numbers_and_words_of_a_message_are_no_file_names(names):
    paths = [Path("/scans/DOE JANE") / name for name in names] + [Path(name) for name in names]
    assert without_paths(SENTENCE, paths) == SENTENCE


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from(HARD_NAMES), min_size=2, max_size=4),
    st.sampled_from(["{}: cut", "cannot open {}", "[Errno 2] no such file: '{}'", "({})"]),
    st.booleans(),
)
def test_no_path_and_no_name_by_itself_is_left(names, sentence, quoted):
    path = Path("/scans", *names)
    for told in (str(path), str(path.parent), str(Path(*names))):
        told = repr(told)[1:-1] if quoted else told
        kept = without_paths(sentence.format(told), [path, Path(*names)])
        assert kept.count("<source>") == 1 and kept.replace("<source>", "") == sentence.format("")


def test_a_name_is_taken_from_beside_punctuation_and_from_quotes():
    paths = [Path("/x/DOE.dcm"), Path("/x/28"), Path("/x/CT")]
    assert without_paths("DOE.dcm: cut. See DOE.dcm.", paths) == "<source>: cut. See <source>."
    assert without_paths("no file '28', no \"CT\"; 28 CT", paths) == "no file '<source>', no \"<source>\"; 28 CT"
    assert without_paths("28: cut at 28", paths) == "<source>: cut at 28"
    assert without_paths("MCDOE.dcm2 and DOE.dcm-7", paths) == "MCDOE.dcm2 and DOE.dcm-7"
