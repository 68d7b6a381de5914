"""What people do to a scan before they publish it again, as functions of int16 HU ``[z, y, x]``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def in_a_circle(hu: np.ndarray, share: float) -> np.ndarray:
    """A smaller field of view: what lies outside a circle in the plane is air."""
    y, x = (np.arange(n) - (n - 1) / 2 for n in hu.shape[1:])
    outside = np.hypot(y[:, None], x) > share * min(hu.shape[1:]) / 2
    return np.where(outside, -1024, hu).astype(np.int16)


def _part(hu: np.ndarray, before: float, after: float) -> tuple[slice, ...]:
    return tuple(slice(int(n * before), n - int(n * after)) for n in hu.shape)


COPIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "cut by 5 % above": lambda hu: hu[: -len(hu) // 20],
    "cut by 5 % below": lambda hu: hu[len(hu) // 20 :],
    "cut by a fifth": lambda hu: hu[len(hu) // 5 :],
    "cut along all axes": lambda hu: hu[_part(hu, 0.05, 0.1)],
    "smaller field of view": lambda hu: in_a_circle(hu, 0.85),
    "mirrored": lambda hu: hu[:, :, ::-1],
    "turned": lambda hu: hu[:, ::-1, ::-1],
    "mirrored and cut": lambda hu: hu[::-1, :, ::-1][len(hu) // 12 :],
    "clipped": lambda hu: np.clip(hu, -160, 240),
    "clipped and cut": lambda hu: np.clip(hu[: -len(hu) // 10], -160, 240),
}
