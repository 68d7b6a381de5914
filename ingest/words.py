"""Stored values out of native words that are wider than the header says they need be (PS3.5 8.1.1).

The unused bits of a word mean nothing: old files keep overlays or garbage there. But some writers put 16-bit values
under a header of 12 bits, and by the letter a piece of metal of 2600 HU then becomes air. Whoever extends the sign into
the unused bits does not use them for anything else: there a value that does not fit is a larger value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from maesil.errors import Refused

WHOLE_WORDS = "whole_words"
"""Note: values need more bits than BitsStored says, and were read from the whole words."""
_GARBAGE_CHANGES = 0.1
"""Unused bits that differ between more of the neighbouring pixels than this follow nothing in the picture."""
_CLEARLY = 2.0


def values_of(
    words: NDArray[Any], bits: int, *, padding: int | None = None, overlay: bool = False
) -> tuple[NDArray[Any], frozenset[str]]:
    """Return stored values ``[y, x]`` of so many bits, and notes; signed words hold signed values.

    ``overlay`` says that the header declares overlays in unused bits. `Refused` with ``bits_stored`` where it cannot be
    told whether larger values or something else is in the bits beyond.
    """
    allocated = 8 * words.dtype.itemsize
    if bits >= allocated or _fit(words, bits):
        return words, frozenset()
    low = (words << (allocated - bits)) >> (allocated - bits)
    beyond = (words.astype(np.int64) - low) >> bits
    if overlay or _say_nothing(words, beyond, bits):
        return low, frozenset()
    if _are_larger_values(words, low, beyond, padding):
        return words, frozenset([WHOLE_WORDS])
    text = f"expected values of {bits} bits (BitsStored), found some that do not fit"
    raise Refused("bits_stored", f"{text}, and no sign whether they are larger values or something else")


def _fit(words: NDArray[Any], bits: int) -> bool:
    low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if words.dtype.kind == "i" else (0, 1 << bits)
    return bool(low <= words.min() and words.max() < high)


def _say_nothing(words: NDArray[Any], beyond: NDArray[np.int64], bits: int) -> bool:
    """Return whether the unused bits are zero or constant, or change without regard to the picture."""
    if words.dtype.kind == "i" and words.min() >= 0 and words.max() < 1 << bits:
        return True  # two's complement without an extended sign
    unused = words >> bits if words.dtype.kind == "u" else words.view(f"u{words.dtype.itemsize}") >> bits
    changes = [_pairs(beyond, axis) for axis in (0, 1)]
    share = np.concatenate([(a != b).ravel() for a, b in changes]).mean()
    return bool((unused == unused[0, 0]).all() or share > _GARBAGE_CHANGES)


def _are_larger_values(words: NDArray[Any], low: NDArray[Any], beyond: NDArray[np.int64], padding: int | None) -> bool:
    misfits = beyond != 0
    if words.dtype.kind == "i" and (words[~misfits] < 0).any():
        return True  # the sign is extended
    if padding is not None and (words[misfits] == padding).all():
        return True
    jumps = [0.0, 0.0]
    for axis in (0, 1):
        border = np.not_equal(*_pairs(misfits, axis))
        for n, values in enumerate((words, low)):
            a, b = _pairs(values.astype(np.float64), axis)
            jumps[n] += float(np.abs(a - b)[border].sum())
    return _CLEARLY * jumps[0] < jumps[1]


def _pairs(array: NDArray[Any], axis: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return each pixel and its neighbour along an axis."""
    return (array[:-1], array[1:]) if axis == 0 else (array[:, :-1], array[:, 1:])
