"""A chest and upper-abdomen phantom whose Hounsfield units are a known function of world position.

World coordinates are DICOM LPS in mm: ``x`` to the patient's left, ``y`` to the back, ``z`` to the head. The
patient's long axis is ``x = y = 0``; ``z = 0`` lies in the upper abdomen, the lungs reach to about 270 mm.
The phantom stands in where no patient data may be used: in ``maesil demo`` and in tests that score HU in
world space.

Organs are signed distances (mm, positive inside) painted one over another; each border is a smooth ramp about
as wide as the blur of a CT reconstruction, so that no border jumps between neighbouring voxels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from maesil.synthetic.shapes import (
    EDGE_MM,
    Array,
    Tubes,
    beside,
    capsule,
    ellipsoid,
    oval,
    paint,
    plane_waves,
    smooth_min,
    smooth_step,
    tube_path,
    tube_tree,
    wave_texture,
)
from maesil.types import Zyx

HuFunction = Callable[[Array], Array]
"""HU of points [..., 3] (LPS mm)."""


AIR = -1000.0
FAT = -105.0
MUSCLE = 55.0
BLOCK = 1 << 14
"""Points evaluated at once: bounds the memory, and lets a block skip the tubes that pass it by."""
ORGANS = ("lung", "heart", "liver", "kidney")
"""What `ChestPhantom.organs` numbers from 1 on."""
LOBES = ((12, -8, 20), (20, -16, 6), (22, 8, 2), (20, -14, -16), (10, 14, -24), (18, 16, -14))
"""Where the arteries and airways of the left lung's segments set out from the hilum (mm)."""


def sample_on_grid(hu: HuFunction, shape: Zyx, affine: ArrayLike) -> Array:
    """Return ``hu`` at every voxel centre of a grid: float32 [z, y, x].

    ``affine`` is 4x4 and takes an index [z, y, x, 1] to LPS mm; it may be oblique or sheared.
    """
    matrix = np.asarray(affine, np.float64)
    yx = np.stack(np.meshgrid(np.arange(shape[1]), np.arange(shape[2]), indexing="ij"), axis=-1)
    plane = yx @ matrix[:3, 1:3].T + matrix[:3, 3]
    volume = np.empty(shape, np.float32)
    for z in range(shape[0]):
        volume[z] = hu(plane + z * matrix[:3, 0])
    return volume


class ChestPhantom:
    """One synthetic patient; ``seed`` decides sizes, positions, vessel trees and contrast."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.half_width = rng.uniform(138.0, 160.0)
        self.half_depth = rng.uniform(92.0, 108.0)
        self.fat = rng.uniform(7.0, 17.0)
        self.spine_y = self.half_depth - 57.0
        right_dome = rng.uniform(52.0, 64.0)
        self.domes = (right_dome, right_dome - rng.uniform(8.0, 16.0))  # right, left (mm)
        self.base = rng.uniform(36.0, 50.0)
        self.heart = np.array([rng.uniform(16.0, 26.0), -rng.uniform(20.0, 28.0), self.base + rng.uniform(68.0, 80.0)])
        self.heart_size = rng.uniform(0.9, 1.08)
        self.vertebra = rng.uniform(24.0, 29.0)  # period of vertebra and disc along z
        self.rib_gap = rng.uniform(25.0, 30.0)
        self.phase = rng.uniform(0.0, 20.0)
        self.lung_hu = rng.uniform(-880.0, -830.0)
        self.contrast = rng.uniform(180.0, 300.0)
        self.liver_hu = rng.uniform(85.0, 120.0)
        self.carina = np.array([rng.uniform(-2.0, 3.0), 8.0, self.base + rng.uniform(132.0, 145.0)])
        self.waves = plane_waves(rng)
        self.airways, self.lung_vessels, self.great_vessels, self.liver_vessels = self._plumbing(rng)

    def hu(self, points: Array) -> Array:
        """Return float32 HU at ``points`` [..., 3] (LPS mm), in blocks so that memory stays bounded."""
        flat = np.ascontiguousarray(points, np.float32).reshape(-1, 3)
        values = np.empty(len(flat), np.float32)
        for start in range(0, len(flat), BLOCK):
            values[start : start + BLOCK] = self._block(flat[start : start + BLOCK])
        return values.reshape(points.shape[:-1])

    def organs(self, points: Array) -> NDArray[np.uint8]:
        """Return which of `ORGANS` each of ``points`` [..., 3] (LPS mm) lies in, counted from 1; 0 for none."""
        flat = np.ascontiguousarray(points, np.float32).reshape(-1, 3)
        numbers = np.zeros(len(flat), np.uint8)
        for start in range(0, len(flat), BLOCK):
            block = flat[start : start + BLOCK]
            x, y, z = (np.ascontiguousarray(axis) for axis in block.T)
            skin = self._body(x, y, z)
            inside = np.flatnonzero(skin > 0)
            if len(inside):
                background = np.full(len(inside), AIR, np.float32)
                numbers[start + inside] = _Patient(self, block[inside], skin[inside], background).organs()
        return numbers.reshape(points.shape[:-1])

    def _block(self, points: Array) -> Array:
        hu = np.full(len(points), AIR, np.float32)
        x, y, z = (np.ascontiguousarray(axis) for axis in points.T)
        self._paint_couch(hu, x, y)
        skin = self._body(x, y, z)
        inside = np.flatnonzero(skin > -EDGE_MM)
        if len(inside):
            hu[inside] = _Patient(self, points[inside], skin[inside], hu[inside]).paint()
        return hu

    def _body(self, x: Array, y: Array, z: Array) -> Array:
        """Depth under the skin (mm), about exact near the surface."""
        shoulder = smooth_step(z, 150.0, 290.0)
        width = self.half_width * (1.0 + 0.05 * shoulder + 0.02 * np.sin(z / 60.0))
        return oval(x, y, width, self.half_depth * (1.0 - 0.08 * shoulder))

    def _paint_couch(self, hu: Array, x: Array, y: Array) -> None:
        """A curved carbon shell over a foam core, some millimetres behind the patient's back."""
        top = y - (self.half_depth + 9.0) + 26.0 * (x / 200.0) ** 2
        paint(hu, np.minimum(top, 16.0 - top), -930.0)
        paint(hu, np.minimum(top, 2.5 - top), -260.0)
        paint(hu, np.minimum(top - 14.0, 16.5 - top), -260.0)

    def _plumbing(self, rng: np.random.Generator) -> tuple[Tubes, Tubes, Tubes, Tubes]:
        airways, vessels = self._airways(rng)
        return airways, vessels, self._great_vessels(), self._liver_vessels(rng)

    def _airways(self, rng: np.random.Generator) -> tuple[Tubes, Tubes]:
        """The windpipe with its branches, and the vessels beside them."""
        carina = self.carina
        airways = tube_path([beside(carina, 0, -6, 110), beside(carina, 0, -2, 40), carina], 9.0, -985.0)
        vessels = Tubes(np.empty((0, 2, 3)), np.empty((0, 2)), np.empty(0))
        for side in (-1.0, 1.0):
            hilum = beside(carina, side * 34.0, 4.0, -20.0)
            airways += tube_path([carina, hilum], 6.5, -980.0)
            for lobe in LOBES:
                along = np.array(lobe) * [side, 1.0, 1.0]
                airways += tube_tree(rng, hilum, along, 3.6, -960.0, depth=3)
                root = beside(hilum, 0, -5, 3)
                vessels += tube_tree(rng, root, along * 1.35, 5.4, self.contrast * 0.6, depth=6)
        return airways, vessels

    def _great_vessels(self) -> Tubes:
        """Aorta, trunk of the lung, both great veins, and the arteries of head and arms."""
        carina, heart, arch = self.carina, self.heart, self.carina[2] + 22.0
        trunk, down = [10, -14, carina[2] - 22], -60.0
        great = tube_path([*self._aorta(arch), [8, self.spine_y - 20, down]], 12.5 * self.heart_size, self.contrast)
        great += tube_path([beside(heart, 0, -4, 26), trunk], 13.0, self.contrast * 0.9)
        for side in (-1.0, 1.0):
            great += tube_path([trunk, beside(carina, side * 34, -6, -17)], 9.0, self.contrast * 0.85)
        great += tube_path([beside(heart, -34, 8, 18), [-22, -14, carina[2] + 90]], 9.0, self.contrast * 0.75)
        below: list[ArrayLike] = [beside(heart, -36, 16, -24), [-24, 26, self.base], [-18, 30, down]]
        great += tube_path(below, 11.0, self.contrast * 0.45)
        for x in (-14.0, 2.0, 20.0):
            great += tube_path([[x * 0.6, -4 + abs(x) * 0.3, arch + 4], [x * 1.8, -2, arch + 110]], 4.5, self.contrast)
        return great

    def _aorta(self, arch: float) -> list[ArrayLike]:
        """Places of the aorta from the heart over its arch to the spine."""
        return [
            beside(self.heart, -14, 6, 22),
            [-6, -22, arch - 34],
            [-2, -16, arch - 6],
            [12, 2, arch + 6],
            [22, 24, arch - 4],
            [24, self.spine_y - 6, arch - 34],
            [20, self.spine_y - 12, self.heart[2]],
        ]

    def _liver_vessels(self, rng: np.random.Generator) -> Tubes:
        portal = np.array([-30.0, 0.0, self.base + 8.0])
        liver = tube_tree(rng, portal, np.array([-30.0, 8.0, 12.0]), 6.0, self.liver_hu + 55.0, depth=4)
        liver += tube_tree(rng, portal, np.array([16.0, -26.0, 8.0]), 5.0, self.liver_hu + 55.0, depth=3)
        return liver


class _Patient:
    """Paints all organs of one phantom on one block of points, from the skin inwards."""

    def __init__(self, phantom: ChestPhantom, points: Array, skin: Array, background: Array) -> None:
        self.p = phantom
        self.points = points
        self.x, self.y, self.z = (np.ascontiguousarray(axis) for axis in points.T)
        self.low = np.array([axis.min() for axis in (self.x, self.y, self.z)])
        self.high = np.array([axis.max() for axis in (self.x, self.y, self.z)])
        self.skin = skin
        self.canvas = background.copy()
        self.texture = wave_texture(phantom.waves, points)
        self.cavity = self._cavity()
        self.diaphragm = self._diaphragm()
        self.spine_x = 3.0 * np.sin(self.z / 90.0)
        self.spine_yz = phantom.spine_y + 7.0 * np.sin((self.z - 40.0) / 110.0)

    def paint(self) -> Array:
        self._wall()
        self._abdomen()
        lung = self._lungs()
        self._heart()
        self._tubes(self.p.great_vessels.grown(1.5, 40.0))
        self._tubes(self.p.great_vessels)
        # The trees end at the pleura: nothing of them may show in the chest wall.
        chest = np.maximum(lung, 42.0 - np.abs(self.x))
        self._tubes(self.p.airways.grown(1.2, -420.0), within=chest)
        self._tubes(self.p.lung_vessels, within=lung)
        self._tubes(self.p.airways, within=chest)
        self._cage()
        self._spine()
        return self.canvas

    def organs(self) -> NDArray[np.uint8]:
        """Number each point by its organ, in the order of `ORGANS`; where two meet, the first has it."""
        kidneys = np.maximum(self._kidney(-1.0), self._kidney(1.0))
        distances = (self._lungs(), self._heart_distance(), self._liver(), kidneys)
        numbers = np.zeros(len(self.points), np.uint8)
        for number, distance in reversed(list(enumerate(distances, start=1))):
            numbers[distance > 0] = number
        return numbers

    def _cavity(self) -> Array:
        """Distance inside the rib cage (mm): an oval that narrows to the apex of the lungs."""
        top = np.clip((self.z - 120.0) / 190.0, 0.0, 0.93)
        taper = np.sqrt(1.0 - top * top)
        width = (self.p.half_width - self.p.fat - 24.0) * taper
        depth = (self.p.half_depth - self.p.fat * 0.8 - 17.0) * (0.35 + 0.65 * taper)
        return oval(self.x, self.y - 2.0, width, depth)

    def _diaphragm(self) -> Array:
        """Height above the two domes of the diaphragm (mm), negative in the abdomen."""
        height = np.full(len(self.x), self.p.base, np.float32)
        for centre, dome in zip((-66.0, 70.0), self.p.domes, strict=True):
            reach = ((self.x - centre) / 62.0) ** 2 + ((self.y + 12.0) / 66.0) ** 2
            height += dome * np.exp(-reach)
        return (self.z - height) * 0.75

    def _wall(self) -> None:
        fat = self.p.fat * (1.0 + 0.35 * np.sin(np.arctan2(self.y, self.x) * 2.0 + 0.6))
        paint(self.canvas, self.skin, 25.0)
        paint(self.canvas, self.skin - 2.2, FAT + 0.5 * self.texture)
        paint(self.canvas, self.skin - fat, MUSCLE + 0.6 * self.texture)
        # Layers of fat between the muscles of the shoulder girdle and of the back.
        sheet = np.abs(np.sin((self.skin + 4.0 * np.sin(self.x / 21.0) + 3.0 * np.sin(self.z / 17.0)) / 5.2))
        paint(self.canvas, np.minimum(1.6 - 9.0 * sheet, np.minimum(self.skin - fat, -self.cavity - 7.0)), FAT)
        paint(self.canvas, self.cavity + 1.0, -75.0 + 0.5 * self.texture)

    def _abdomen(self) -> None:
        p, x, y, z = self.p, self.x, self.y, self.z
        below = self._below_diaphragm()
        paint(self.canvas, np.minimum(below, 3.5 + self.diaphragm), 60.0)
        liver = self._liver()
        paint(self.canvas, liver, p.liver_hu + self.texture)
        self._tubes(p.liver_vessels, within=liver)
        spleen = ellipsoid(x, y, z, (92.0, 28.0, p.base + 6.0), (24.0, 38.0, 36.0))
        paint(self.canvas, smooth_min(spleen, below - 3.5, 6.0), p.liver_hu + 15.0 + self.texture)
        stomach = ellipsoid(x, y, z, (58.0, -30.0, p.base + 2.0), (34.0, 30.0, 34.0))
        stomach = smooth_min(stomach, below - 4.0, 6.0)
        paint(self.canvas, stomach, 45.0)
        paint(self.canvas, stomach - 4.0, 12.0 + self.texture)
        paint(self.canvas, np.minimum(stomach - 4.0, -36.0 - y), -960.0)
        for side in (-1.0, 1.0):
            kidney = self._kidney(side)
            paint(self.canvas, kidney, 170.0 + self.texture)
            paint(self.canvas, kidney - 14.0, -40.0)

    def _below_diaphragm(self) -> Array:
        """Distance inside the abdomen (mm)."""
        return smooth_min(-self.diaphragm, self.cavity - 2.0, 6.0)

    def _liver(self) -> Array:
        x, y, z = self.x, self.y, self.z
        edge = 40.0 - x - 0.55 * (y + 40.0) + 0.3 * (z - self.p.base) + 5.0 * np.sin(y / 19.0)
        right = smooth_min(self._below_diaphragm() - 3.5, edge, 14.0)
        return smooth_min(right, 30.0 - y * 0.9 - 0.35 * x, 14.0)

    def _kidney(self, side: float) -> Array:
        at = (side * 54.0, self.p.spine_y - 8.0, self.p.base - 52.0)
        return ellipsoid(self.x, self.y, self.z, at, (24.0, 22.0, 50.0))

    def _lungs(self) -> Array:
        """Paint both lungs; returns the distance inside the nearer one (mm)."""
        side = np.abs(self.x) - 9.0 - 21.0 * np.exp(-(((self.y - 4.0) / 34.0) ** 2))
        spine = np.hypot(self.x - self.spine_x, self.y - self.spine_yz) - 25.0
        lung = smooth_min(smooth_min(self.cavity - 3.5, self.diaphragm, 5.0), side, 14.0)
        lung = smooth_min(smooth_min(lung, -self._heart_distance() - 3.0, 6.0), spine, 8.0)
        dependent = 0.5 * (self.y + 10.0)  # lungs are denser where the patient lies on them
        paint(self.canvas, lung, self.p.lung_hu + dependent + 1.6 * self.texture)
        fissure = self.z - float(self.p.carina[2]) + 24.0 + 0.9 * self.y + 5.0 * np.sin(self.x / 31.0)
        paint(self.canvas, np.minimum(0.2 - 0.7 * np.abs(fissure), lung), -640.0)
        return lung

    def _heart_distance(self, inset: float = 0.0, scale: float = 1.0) -> Array:
        """Distance inside the heart: an ellipsoid whose long axis points to the left, forward and down."""
        x, y, z = (self.points - self.p.heart.astype(np.float32)).T
        axis = np.array([0.72, -0.46, -0.52])
        along = axis[0] * x + axis[1] * y + axis[2] * z
        across = np.sqrt(np.maximum(x * x + y * y + z * z - along * along, 0.0))
        size = self.p.heart_size * scale
        return oval(along, across, 60.0 * size, 43.0 * size) - inset

    def _heart(self) -> None:
        heart, size = self.p.heart, self.p.heart_size
        paint(self.canvas, self._heart_distance() + 1.0, -60.0)
        muscle = self._heart_distance(inset=4.0)
        paint(self.canvas, muscle, 70.0 + 0.5 * self.texture)
        chambers = (
            ((20, -2, -12), (32, 19, 21), 1.0),
            ((-8, -20, -14), (26, 14, 22), 0.8),
            ((-26, 2, 0), (17, 19, 24), 0.7),
            ((2, 18, 10), (24, 13, 18), 0.95),
        )
        for centre, axes, share in chambers:
            at = heart + size * np.array(centre)
            room = ellipsoid(self.x, self.y, self.z, at, tuple(size * a for a in axes))
            paint(self.canvas, smooth_min(room, muscle - 3.0, 5.0), self.p.contrast * share)

    def _cage(self) -> None:
        """Ribs: bands of the rib cage's shell that run down from the spine to the front, and the sternum."""
        angle = np.arctan2(np.abs(self.x), self.y - 2.0)  # 0 at the back, pi at the front
        period = self.p.rib_gap
        height = (self.z + 96.0 * (angle / np.pi) ** 1.1 + self.p.phase) % period - period / 2.0
        rib = 1.0 - np.sqrt((height / 6.2) ** 2 + ((self.cavity + 3.0) / 4.2) ** 2)
        rib = np.minimum(rib * 4.6, (angle - 0.16) * 60.0)
        front = smooth_step(angle, 2.35, 2.6)
        bone = 850.0 * (1.0 - front) + 130.0 * front
        paint(self.canvas, rib, bone)
        paint(self.canvas, rib - 2.1, 230.0 * (1.0 - front) + 110.0 * front)
        depth = self.p.half_depth
        sternum = np.minimum(5.5 - np.abs(self.cavity + 5.0), 17.0 - np.abs(self.x))
        sternum = np.minimum(np.minimum(sternum, -self.y - 0.3 * depth), self.z - self.p.base - 52.0)
        paint(self.canvas, sternum, 380.0)
        paint(self.canvas, sternum - 2.2, 130.0)
        plate = 3.2 - np.abs(self.cavity + 17.0 + 3.0 * np.sin(self.z / 25.0))
        scapula = np.minimum(plate, 34.0 - np.abs(angle - 0.95) * 80.0)
        scapula = np.minimum(np.minimum(scapula, self.z - float(self.p.carina[2]) + 8.0), self.skin - 9.0)
        paint(self.canvas, scapula, 700.0)

    def _spine(self) -> None:
        """Vertebrae and discs, periodic along z, with canal, arch, spinous and transverse processes."""
        period = self.p.vertebra
        x, y = self.x - self.spine_x, self.y - self.spine_yz
        z = (self.z + self.p.phase) % period - period / 2.0
        waist = 1.0 - 1.6 * np.cos(z / period * 2.0 * np.pi)
        body = 16.5 + waist - np.sqrt((x / 1.12) ** 2 + (y / 0.92) ** 2)
        vertebra = smooth_min(body, period / 2.0 - 2.7 - np.abs(z), 2.0)
        canal = 8.0 - np.hypot(x / 1.1, y - 22.0)
        level = 9.0 - np.abs(z + 2.0)
        arch = np.minimum(3.6 - np.abs(canal + 3.2), level)
        spinous = np.minimum(3.4 - np.abs(x), 10.0 - np.abs(y - 36.0))
        spinous = np.minimum(spinous, 5.5 - np.abs(z + 0.5 * (y - 33.0) - 2.0))
        wing = np.minimum(4.2 - np.hypot(y - 19.0 - 0.25 * np.abs(x), z), 31.0 - np.abs(x))
        processes = np.maximum(np.maximum(arch, spinous), np.minimum(wing, np.abs(x) - 9.0))
        paint(self.canvas, body, 85.0)
        paint(self.canvas, vertebra, 700.0)
        paint(self.canvas, vertebra - 2.4, 190.0 + 2.0 * self.texture)
        paint(self.canvas, processes, 620.0)
        paint(self.canvas, canal, 22.0)

    def _tubes(self, tubes: Tubes, within: Array | None = None) -> None:
        reach = tubes.radii.max(axis=1)[:, None] + EDGE_MM
        low, high = tubes.ends.min(axis=1) - reach, tubes.ends.max(axis=1) + reach
        met = (low <= self.high).all(axis=1) & (high >= self.low).all(axis=1)
        for i in np.flatnonzero(met):
            near = np.flatnonzero(
                (self.y >= low[i, 1]) & (self.y <= high[i, 1]) & (self.x >= low[i, 0]) & (self.x <= high[i, 0])
            )
            depth = capsule(self.points[near], tubes.ends[i].astype(np.float32), tubes.radii[i])
            if within is not None:
                depth = np.minimum(depth, within[near])
            part = self.canvas[near]
            paint(part, depth, tubes.hu[i])
            self.canvas[near] = part
