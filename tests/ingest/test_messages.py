"""What a process and its child say to each other arrives as it was said."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest

from maesil.errors import Refused
from maesil.ingest.messages import (
    Decoded,
    Digests,
    DigestSlices,
    Failure,
    Hash,
    HashSource,
    Limits,
    ReadSource,
    answer_from_json,
    answer_to_json,
    receive,
    request_from_json,
    request_to_json,
    send,
)
from maesil.ingest.source import Source

LIMITS = Limits(memory_bytes=1 << 33, cpu_seconds=61)
SLICES = Source(
    "slices", (Path("/a/1.dcm"), Path("/a/2.dcm")), ((0, None), None, (1, 3)), np.diag([1.0, 2, 3, 1]),
    technical={"KVP": 120, "kernel": "B30f"},
)  # fmt: skip
NIFTI = Source("nifti", (Path("/n.nii.gz"),), prefer="sform")


def through_a_socket(document: dict, descriptors: list[int] = []) -> tuple[dict, int | None]:  # noqa: B006
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, document, descriptors)
        return receive(theirs)


@pytest.mark.parametrize("request_", [
    ReadSource(SLICES, "ab" * 32), ReadSource(NIFTI, ""), HashSource(SLICES), DigestSlices(Path("/e.dcm"), (0, None, 7))
])  # fmt: skip
def test_a_request_arrives_as_it_was_made(request_):
    found, limits = request_from_json(through_a_socket(request_to_json(request_, LIMITS))[0])
    assert limits == LIMITS and type(found) is type(request_)
    if isinstance(request_, DigestSlices):
        assert found == request_
        return
    for name in ("kind", "paths", "planes", "technical", "prefer"):
        assert getattr(found.source, name) == getattr(request_.source, name)
    np.testing.assert_array_equal(found.source.affine, request_.source.affine)


@pytest.mark.parametrize("answer", [
    Hash("c" * 64), Digests((b"\x00\xff", b"")), Failure("memory"), Failure("os_error", "2", "No such file"),
    Failure("refused", "gap", "one is missing", {"missing": [1], "mm": 2.5}),
])  # fmt: skip
def test_an_answer_arrives_as_it_was_given(answer):
    assert answer_from_json(through_a_socket(answer_to_json(answer))[0]) == answer


def test_a_decoded_source_arrives_with_its_affine_and_the_descriptor_of_its_voxels():
    said = Decoded((2, 3, 4), np.arange(16.0).reshape(4, 4) / 3, ("sheared",), {"KVP": 120}, "d" * 64)
    there, back = os.pipe()
    document, descriptor = through_a_socket(answer_to_json(said), [back])
    found = answer_from_json(document)
    assert isinstance(found, Decoded)
    assert (found.shape, found.notes, found.source, found.hash) == (said.shape, said.notes, said.source, said.hash)
    np.testing.assert_array_equal(found.affine, said.affine)
    os.write(descriptor, b"voxels")
    assert os.read(there, 6) == b"voxels"
    for one in (there, back, descriptor):
        os.close(one)


def test_numbers_of_numpy_arrive_as_numbers_and_other_things_as_text():
    sent = Failure("refused", "gap", "", {"mm": np.float32(2.5), "slices": np.int64(3), "path": Path("/a")})
    found = answer_from_json(through_a_socket(answer_to_json(sent))[0])
    assert found == Failure("refused", "gap", "", {"mm": 2.5, "slices": 3, "path": "/a"})


@pytest.mark.parametrize(("failure", "code"), [
    (Failure("refused", "gap", "x", {"missing": 1}), "gap"), (Failure("memory"), "decode_memory"),
    (Failure("unexpected", detail="KeyError in a.py, line 3"), "unexpected"),
])  # fmt: skip
def test_a_failure_is_a_refusal(failure, code):
    error = failure.error()
    assert isinstance(error, Refused) and error.code == code and error.numbers == (failure.numbers or {})


def test_a_failure_of_the_system_is_one_here_too():
    error = Failure("os_error", "2", "No such file").error()
    assert isinstance(error, FileNotFoundError) and error.errno == 2


def test_the_other_side_being_gone_is_told():
    ours, theirs = socket.socketpair()
    with theirs:
        ours.close()
        with pytest.raises(EOFError):
            receive(theirs)
