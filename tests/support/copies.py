"""What people do to a scan before they publish it again, as functions of int16 HU ``[z, y, x]``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def in_an_ellipse(hu: np.ndarray, share: float) -> np.ndarray:
    """A smaller field of view: what lies outside an ellipse of a share of the image in the plane is air."""
    y, x = ((2 * np.arange(n) - n + 1) / n for n in hu.shape[1:])
    outside = np.hypot(y[:, None], x) > share
    return np.where(outside, -1024, hu).astype(np.int16)


def _part(hu: np.ndarray, before: float, after: float) -> tuple[slice, ...]:
    return tuple(slice(int(n * before), n - int(n * after)) for n in hu.shape)


COPIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "cut by 5 % above": lambda hu: hu[: -len(hu) // 20],
    "cut by 5 % below": lambda hu: hu[len(hu) // 20 :],
    "cut by a fifth": lambda hu: hu[len(hu) // 5 :],
    "cut along all axes": lambda hu: hu[_part(hu, 0.05, 0.1)],
    "smaller field of view": lambda hu: in_an_ellipse(hu, 0.9),
    "mirrored": lambda hu: hu[:, :, ::-1],
    "turned": lambda hu: hu[:, ::-1, ::-1],
    "mirrored and cut": lambda hu: hu[::-1, :, ::-1][len(hu) // 12 :],
    "clipped": lambda hu: np.clip(hu, -160, 240),
    "clipped and cut": lambda hu: np.clip(hu[: -len(hu) // 10], -160, 240),
}
