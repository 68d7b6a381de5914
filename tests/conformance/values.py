"""Outside cases: stored values, rescale and padding; numbers that cannot be HU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from conformance.case import SCAN, case, simple, tags
from conformance.dicom import each, series, set_pixels, stored_of, write_all
from conformance.judge import Expected, expect, refuse
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence


def _repixel(
    bits: int = 12, signed: int = 0, slope: float = 1, intercept: float = -1024
) -> Callable[[Dataset, int], None]:
    def change(ds: Dataset, _: int) -> None:
        hu = stored_of(ds) - 1024
        set_pixels(ds, np.rint((hu - intercept) / slope).astype(np.int64), bits=bits, signed=signed)
        ds.RescaleSlope, ds.RescaleIntercept = slope, intercept

    return change


simple("sixteen_bits_intercept_minus_32768", _repixel(16, 0, 1, -32768), expect(SCAN))
simple("sixteen_bits_signed_intercept_zero", _repixel(16, 1, 1, 0), expect(SCAN))
simple("slope_0.37", _repixel(16, 0, 0.37, -1024), expect(SCAN.but(tolerance=0.9)))
simple("slope_2_and_odd_intercept", _repixel(12, 0, 2, -1023), expect(SCAN.but(tolerance=1.6)))
simple(
    "rescale_differs_for_each_slice",
    lambda ds, k: _repixel(16, k % 2, 0.25 + 0.05 * (k % 5), -1024 + k)(ds, k),
    expect(SCAN.but(tolerance=0.9)),
)
simple("signed_and_unsigned_by_turns", lambda ds, k: _repixel(16, k % 2, 1, 0 if k % 2 else -1024)(ds, k), expect(SCAN))


def _high_bits(signed: int) -> Callable[[Dataset, int], None]:
    def change(ds: Dataset, k: int) -> None:
        hu = stored_of(ds) - 1024
        garbage = np.random.default_rng(k).integers(0, 16, hu.shape) << 12
        stored = (hu if signed else hu + 1024) & 0xFFF
        set_pixels(ds, stored | garbage, bits=12, signed=signed)
        ds.RescaleIntercept = 0 if signed else -1024
        if signed:
            ds.RescaleType = "HU"

    return change


simple("garbage_in_the_overlay_bits", _high_bits(0), expect(SCAN))
simple("garbage_above_signed_12_bits", _high_bits(1), expect(SCAN))


def _shifted(ds: Dataset, _: int) -> None:
    set_pixels(ds, stored_of(ds) << 4, bits=12)
    ds.HighBit = 15


simple("high_bit_15_of_12", _shifted, expect(SCAN))
simple("thirty_two_bits_allocated", lambda ds, k: set_pixels(ds, stored_of(ds), bits=32, allocated=32), expect(SCAN))
simple("smallest_and_largest_values_wrong", tags(SmallestImagePixelValue=5000, LargestImagePixelValue=1), expect(SCAN))
simple(
    "monochrome1_signed",
    lambda ds, k: (_repixel(16, 1, 1, 0)(ds, k), tags(PhotometricInterpretation="MONOCHROME1")(ds, k)),
    expect(SCAN),
)
simple("rescale_type_us", tags(RescaleType="US"), expect(SCAN, or_refused=True))
simple("rescale_type_absent", tags(RescaleType=None), expect(SCAN))
simple("rescale_type_lower_case", tags(RescaleType="hu "), expect(SCAN))
simple("rescale_type_effective_atomic_number", tags(RescaleType="Z_EFF"), refuse("not_hu"))
simple("rescale_type_electron_density", tags(RescaleType="ED"), refuse("not_hu"))
simple(
    "no_intercept_only_slope",
    lambda ds, k: (_repixel(16, 1, 1, 0)(ds, k), tags(RescaleIntercept=None)(ds, k)),
    expect(SCAN, or_refused=True),
)
simple("slope_zero", tags(RescaleSlope=0), refuse())
simple("slope_empty", tags(RescaleSlope=""), expect(SCAN, or_refused=True))
simple("intercept_not_a_number", tags(RescaleIntercept="nan"), refuse())
simple(
    "no_rescale_values_hu",
    lambda ds, k: (
        _repixel(16, 1, 1, 0)(ds, k),
        tags(RescaleIntercept=None, RescaleSlope=None, RescaleType=None)(ds, k),
    ),
    expect(SCAN, notes=("no_rescale_tags",)),
)
simple(
    "no_rescale_values_plus_1024",
    tags(RescaleIntercept=None, RescaleSlope=None, RescaleType=None),
    refuse("offset_1024"),
)
simple("intercept_twice_applied", tags(RescaleIntercept=-2048), refuse())
simple("intercept_of_minus_1000", tags(RescaleIntercept=-1000), expect(SCAN.but(tolerance=26)))
simple(
    "one_slice_without_rescale",
    lambda ds, k: tags(RescaleIntercept=None, RescaleSlope=None)(ds, k) if k == 13 else None,
    refuse(),
)
simple(
    "one_slice_with_another_intercept_by_mistake",
    lambda ds, k: tags(RescaleIntercept=0)(ds, k) if k == 13 else None,
    refuse(),
)


def _hu(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Dataset, int], None]:
    def change(ds: Dataset, _: int) -> None:
        set_pixels(ds, np.rint(function(stored_of(ds) - 1024.0)).astype(np.int64), bits=16, signed=1)
        ds.RescaleIntercept = 0

    return change


simple("hu_times_ten", _hu(lambda hu: hu * 10), refuse())
simple("hu_halved", _hu(lambda hu: hu / 2), refuse())
simple("hu_clipped_to_a_narrow_window", _hu(lambda hu: hu.clip(-200, 300)), refuse())
simple("hu_clipped_to_minus_1000_and_1000", _hu(lambda hu: hu.clip(-1000, 1000)), expect(SCAN))
simple("hu_negated", _hu(lambda hu: -hu), refuse())
simple("all_zero", _hu(lambda hu: hu * 0), refuse())
simple("all_air", _hu(lambda hu: hu * 0 - 1000), refuse())


def _eight_bits(ds: Dataset, _: int) -> None:
    set_pixels(ds, ((stored_of(ds) - 1024.0).clip(-160, 240) + 160) * 255 / 400, bits=8, allocated=8)
    ds.RescaleIntercept = 0


simple("eight_bit_windowed", _eight_bits, refuse())

CIRCLE = ((np.arange(40)[:, None] - 19.5) / 20) ** 2 + ((np.arange(48)[None] - 23.5) / 24) ** 2 > 1
OUTSIDE = np.broadcast_to(CIRCLE, SCAN.shape)


def _padded(
    value: int, tag: int | None, signed: int = 1, intercept: float = 0, limit: int | None = None
) -> Callable[[Dataset, int], None]:
    def change(ds: Dataset, k: int) -> None:
        hu = stored_of(ds) - 1024
        stored = np.where(CIRCLE, value if limit is None else value + (k % (limit - value + 1)), hu - int(intercept))
        set_pixels(ds, stored, bits=16, signed=signed)
        ds.RescaleIntercept = intercept
        if tag is not None:
            ds.add_new("PixelPaddingValue", "US" if tag > 32767 else "SS", tag)
        if limit is not None:
            ds.add_new("PixelPaddingRangeLimit", "SS" if signed else "US", limit)

    return change


_padding = expect(SCAN, invalid=OUTSIDE)
simple("padding_minus_2000", _padded(-2000, -2000), _padding)
simple("padding_written_as_unsigned", _padded(-2000, 63536), _padding)
simple("padding_range", _padded(-2100, -2100, limit=-2000), _padding)
simple(
    "padding_range_the_other_way_round",
    _padded(-2100, -2000, limit=-2000),
    expect(SCAN, or_refused=True, invalid=OUTSIDE),
)
simple("padding_not_declared", _padded(-2000, None), expect(SCAN, invalid=OUTSIDE, notes=("undeclared_padding",)))
simple(
    "padding_not_declared_minus_3024",
    _padded(-2000, None, intercept=-1024),
    expect(SCAN, invalid=OUTSIDE, notes=("undeclared_padding",)),
)
simple("padding_tag_in_hu_by_mistake", _padded(0, -1024, signed=0, intercept=-1024), expect(SCAN.but(tolerance=26)))
simple("padding_tag_that_never_occurs", tags(PixelPaddingValue=3999), expect(SCAN))
simple("padding_unsigned_63536", _padded(63536, 63536, signed=0, intercept=-1024), _padding)
simple("palette_colour", tags(PhotometricInterpretation="PALETTE COLOR"), refuse("colour"))
simple("one_sample_called_rgb", tags(PhotometricInterpretation="RGB"), refuse("colour"))
simple(
    "one_slice_in_palette_colour",
    lambda ds, k: tags(PhotometricInterpretation="PALETTE COLOR" if k == 9 else "MONOCHROME2")(ds, k),
    refuse(),
)
simple("photometric_absent", tags(PhotometricInterpretation=None), expect(SCAN))
simple("data_set_trailing_padding", lambda ds, k: ds.add_new(0xFFFCFFFC, "OB", bytes(1024)), expect(SCAN))
simple("intercept_with_spaces_and_exponent", tags(RescaleIntercept="-1.024E3", RescaleSlope="1.0000"), expect(SCAN))
simple(
    "padding_only_on_some_slices",
    lambda ds, k: _padded(-2000, -2000 if k % 2 else None)(ds, k),
    expect(SCAN, invalid=OUTSIDE),
)


@case
def modality_lut_instead_of_rescale(folder: Path) -> Expected:
    lut = Dataset()
    lut.LUTDescriptor, lut.ModalityLUTType = [4096, 0, 16], "HU"
    lut.LUTData = (np.arange(4096) - 1024).astype("<i2").tobytes()
    lut["LUTDescriptor"].VR, lut["LUTData"].VR = "US", "OW"
    write_all(
        each(
            series(SCAN),
            tags(RescaleSlope=None, RescaleIntercept=None, RescaleType=None, ModalityLUTSequence=Sequence([lut])),
        ),
        folder,
    )
    return expect(SCAN, or_refused=True)


@case
def float_pixel_data(folder: Path) -> Expected:
    def change(ds: Dataset, _: int) -> None:
        values = (stored_of(ds) - 1024).astype("<f4")
        del ds.PixelData
        ds.FloatPixelData = values.tobytes()
        ds.BitsAllocated, ds.RescaleIntercept = 32, 0
        for tag in ("BitsStored", "HighBit", "PixelRepresentation"):
            delattr(ds, tag)

    write_all(each(series(SCAN), change), folder)
    return expect(SCAN, or_refused=True)
