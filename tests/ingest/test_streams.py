"""What encoded streams say of themselves, against encoders that know."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest
from pydicom.encaps import generate_frames
from pydicom.uid import JPEG2000, UID, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, JPEGLSNearLossless

from maesil.errors import Refused
from maesil.ingest.streams import check_stream, is_lossy_stream
from maesil.synthetic.dicom import SeriesIdentity, ct_slice

SIZE = (64, 80)


def stream_of(syntax: UID, **options) -> bytes:
    hu = np.random.default_rng(0).normal(0, 100, SIZE)
    data: pydicom.Dataset = ct_slice(hu, (0, 0, 0), (0, 1, 0), (1, 0, 0), 1, SeriesIdentity())
    data.compress(syntax, generate_instance_uid=False, **options)
    return next(generate_frames(data.PixelData, number_of_frames=1))


def jpeg(frame: int) -> bytes:
    """The markers of a JPEG stream: one frame, one scan, no coefficients."""
    size = b"".join(n.to_bytes(2, "big") for n in SIZE)
    head = b"\xff\xd8\xff\xe0\x00\x04ab" + bytes([0xFF, frame]) + b"\x00\x0b\x0c" + size + b"\x01\x01\x11\x00"
    return head + b"\xff\xda\x00\x08\x01\x01\x00\x01\x00\x00" + b"\xff\xd9"


@pytest.mark.parametrize(("error", "lossy"), [(0, False), (1, True), (3, True)])
def test_jpeg_ls_says_how_far_it_strays_whatever_the_syntax(error, lossy):
    stream = stream_of(JPEGLSNearLossless, jls_error=error) if error else stream_of(JPEGLSLossless)
    for syntax in (JPEGLSLossless, JPEGLSNearLossless):
        assert is_lossy_stream(syntax, stream) == lossy


@pytest.mark.parametrize("lossy", [False, True])
def test_jpeg_2000_says_which_wavelet(lossy):
    stream = stream_of(JPEG2000, j2k_cr=[5]) if lossy else stream_of(JPEG2000Lossless)
    assert is_lossy_stream(JPEG2000Lossless, stream) == lossy


@pytest.mark.parametrize(("frame", "lossy"), [(0xC0, True), (0xC1, True), (0xC2, True), (0xC3, False), (0xC7, False)])
def test_a_dct_under_the_lossless_syntax_is_lossy(frame, lossy):
    assert is_lossy_stream(JPEGLosslessSV1, jpeg(frame)) == lossy


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1])
def test_another_size_or_a_missing_end_is_refused(syntax):
    stream = jpeg(0xC3) if syntax == JPEGLosslessSV1 else stream_of(syntax)
    check_stream(syntax, stream, SIZE)
    for other, size in ((stream, (64, 81)), (stream[:-3], SIZE)):
        with pytest.raises(Refused) as caught:
            check_stream(syntax, other, size)
        assert caught.value.code == "bad_pixels"
