"""The shapes the phantom is painted with: signed distances, tubes, borders and fine texture.

Distances are mm, positive inside; points are LPS mm; every function works on whole arrays of points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.floating[Any]]
EDGE_MM = 1.6
"""Half the width of every border's ramp (mm)."""


@dataclass(frozen=True)
class Tubes:
    """Tapered capsules (vessels, airways): ends [n, 2, 3] mm, radii [n, 2] mm, HU [n]."""

    ends: Array
    radii: Array
    hu: Array

    def __add__(self, other: Tubes) -> Tubes:
        """Both sets, painted in this order."""
        return Tubes(*(np.concatenate(pair) for pair in zip(self._fields(), other._fields(), strict=True)))

    def grown(self, wall: float, hu: float) -> Tubes:
        """Return the tubes with every radius larger by ``wall`` mm, filled with ``hu``: their walls."""
        return Tubes(self.ends, self.radii + wall, np.full_like(self.hu, hu))

    def _fields(self) -> tuple[Array, ...]:
        return self.ends, self.radii, self.hu


def paint(canvas: Array, depth: Array, hu: float | Array) -> None:
    """Blend ``hu`` into ``canvas`` in place where ``depth`` (mm) is positive, over a ramp at the border."""
    share = np.clip(depth * np.float32(0.5 / EDGE_MM) + np.float32(0.5), 0.0, 1.0)
    share *= share * (3.0 - 2.0 * share)
    canvas += share * (np.asarray(hu, np.float32) - canvas)


def oval(x: Array, y: Array, width: Array | float, depth: Array | float) -> Array:
    """Return the distance inside a superellipse of exponent 2.5 (mm, to first order)."""
    u, v = np.abs(x) / width, np.abs(y) / depth
    root_u, root_v = np.sqrt(u), np.sqrt(v)
    power = u * u * root_u + v * v * root_v
    radius = np.maximum(power, 1e-6) ** np.float32(0.4)
    gradient = np.hypot(u * root_u / width, v * root_v / depth) * radius / np.maximum(power, 1e-6)
    return np.asarray((1.0 - radius) / np.maximum(gradient, 1e-4), np.float32)


def ellipsoid(x: Array, y: Array, z: Array, centre: ArrayLike, axes: ArrayLike) -> Array:
    """Return the distance inside an ellipsoid (mm), exact at the centre and near enough at the surface."""
    c, a = np.asarray(centre, np.float32), np.asarray(axes, np.float32)
    radius = np.sqrt(((x - c[0]) / a[0]) ** 2 + ((y - c[1]) / a[1]) ** 2 + ((z - c[2]) / a[2]) ** 2)
    return np.asarray((1.0 - radius) * a.min(), np.float32)


def capsule(points: Array, ends: Array, radii: Array) -> Array:
    """Return the distance inside a tapered capsule (mm)."""
    start, along = ends[0], ends[1] - ends[0]
    t = np.clip((points - start) @ along / max(float(along @ along), 1e-6), 0.0, 1.0)
    radius = radii[0] + (radii[1] - radii[0]) * t
    return np.asarray(radius - np.linalg.norm(points - start - t[:, None] * along, axis=1), np.float32)


def smooth_min(a: Array, b: Array, k: float) -> Array:
    """Return the minimum with a corner rounded over ``k`` mm (polynomial smooth minimum)."""
    h = np.maximum(k - np.abs(a - b), 0.0)
    return np.asarray(np.minimum(a, b) - h * h * (0.25 / k), np.float32)


def smooth_step(value: Array, low: float, high: float) -> Array:
    """Return 0 below ``low``, 1 above ``high``, and a smooth rise between them."""
    t = np.clip((value - low) / (high - low), 0.0, 1.0)
    return np.asarray(t * t * (3.0 - 2.0 * t), np.float32)


def plane_waves(rng: np.random.Generator) -> Array:
    """Return plane waves [n, 5]: wave vector (rad/mm), phase, amplitude (HU); wavelengths 6 to 30 mm."""
    directions = rng.normal(size=(10, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    lengths = np.geomspace(6.0, 30.0, 10)
    vectors = directions * (2.0 * np.pi / lengths[:, None])
    return np.column_stack([vectors, rng.uniform(0.0, 6.28, 10), 1.0 + lengths / 10.0])


def wave_texture(waves: Array, points: Array) -> Array:
    """Return the fine structure of the tissues in HU: a sum of plane waves of some HU each."""
    total = np.zeros(len(points), np.float32)
    for wave in waves.astype(np.float32):
        total += wave[4] * np.sin(points @ wave[:3] + wave[3])
    return total


def beside(origin: Array, x: float, y: float, z: float) -> Array:
    """Return the point ``x`` mm to the left, ``y`` mm to the back and ``z`` mm to the head of ``origin``."""
    return np.asarray(origin + np.array([x, y, z]))


def tube_path(points: Sequence[ArrayLike], radius: float, hu: float) -> Tubes:
    """Return one tube of constant radius along a polyline."""
    knots = np.array([np.asarray(point, np.float64) for point in points])
    ends = np.stack([knots[:-1], knots[1:]], axis=1)
    return Tubes(ends, np.full((len(ends), 2), radius), np.full(len(ends), hu))


def tube_tree(
    rng: np.random.Generator,
    start: Array,
    along: Array,
    radius: float,
    hu: float,
    depth: int,
) -> Tubes:
    """Return a tree of tubes that fork in two, each child shorter, thinner and turned by about 35 degrees."""
    end = start + along
    tree = Tubes(np.array([[start, end]]), np.array([[radius, radius * 0.8]]), np.array([hu]))
    if depth == 0:
        return tree
    turn = rng.normal(size=3)
    turn -= along * (turn @ along) / (along @ along)
    turn *= np.linalg.norm(along) / np.linalg.norm(turn)
    for sign in (-1.0, 1.0):
        child = 0.8 * along + sign * rng.uniform(0.4, 0.7) * turn
        tree += tube_tree(
            rng, end, child * rng.uniform(0.72, 0.9), radius * rng.uniform(0.66, 0.78), hu * 0.88, depth - 1
        )
    return tree
