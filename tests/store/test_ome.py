"""What images say of where they lie: by our own reading, and by ngff-zarr, which knows nothing of us."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from support.ct_phantom import base_affine, rotated
from support.ome_reader import OmeImage

from maesil.geometry import world_of
from maesil.store.ome import affine_of, image_attributes, level_paths, ome_version
from maesil.store.pyramid import levels_below

SHAPE = (70, 140, 150)
angles = st.floats(-180, 180)


def attributes_of(affine, **options):
    spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0))
    return image_attributes("volume", affine, levels_below(SHAPE, spacing), **options)


@given(st.tuples(angles, angles, angles), st.floats(-0.01, 0.01))
def test_the_affine_comes_back(degrees, shear):
    affine = rotated(base_affine(), degrees)
    affine[:3, 2] += shear * affine[:3, 1]
    np.testing.assert_allclose(affine_of(attributes_of(affine)), affine, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("degrees", "shear", "kind"),
    [((0, 0, 0), 0, "identity"), ((9, -7, 12), 0, "sequence"), ((9, 0, 0), 0.01, "affine")],
)
def test_the_plainest_words_are_used(degrees, shear, kind):
    affine = rotated(base_affine(), degrees)
    affine[:3, 2] += shear * affine[:3, 1]
    (step,) = attributes_of(affine)["ome"]["multiscales"][0]["coordinateTransformations"]
    assert step["type"] == kind


def test_an_animal_has_no_orientation_of_a_biped():
    axes = attributes_of(base_affine(), oriented=False)["ome"]["multiscales"][0]["coordinateSystems"][1]["axes"]
    assert not any("orientation" in axis for axis in axes)


@pytest.mark.parametrize("degrees", [(0, 0, 0), (9, -7, 12)])
def test_ngff_zarr_validates_the_image_and_puts_every_level_where_it_lies(tmp_path, degrees):
    affine = rotated(base_affine(), degrees)
    attributes = attributes_of(affine)
    levels = levels_below(SHAPE, tuple(np.linalg.norm(affine[:3, :3], axis=0)))
    group = zarr.create_group(tmp_path / "image", attributes=attributes)
    for name, shape in zip(level_paths(attributes), [SHAPE, *(level.shape for level in levels)], strict=True):
        group.create_array(name, shape=shape, chunks=(64, 64, 64), dtype="int16", dimension_names=("z", "y", "x"))
    image = OmeImage(tmp_path / "image")
    for number, level in enumerate([None, *levels]):
        factors = np.array(level.factors if level else (1, 1, 1))
        for index in ((0, 0, 0), np.array(image.hu(number).shape) - 1):
            expected = world_of(affine, np.array(index) * factors + (factors - 1) / 2)
            np.testing.assert_allclose(image.lps(index, number), expected, rtol=0, atol=1e-6)
    (first, *_), metadata = image.read.images, image.read.metadata
    orientations = {axis: first.axes_orientations[axis].value.value for axis in "zyx"}
    assert orientations == {"z": "inferior-to-superior", "y": "anterior-to-posterior", "x": "right-to-left"}
    assert metadata.omero.channels[0].window.start == -160


def test_other_versions_are_refused():
    attributes = attributes_of(base_affine())
    assert ome_version(attributes) == "0.6"
    attributes["ome"]["version"] = "0.4"
    with pytest.raises(ValueError, match=r"0\.4"):
        affine_of(attributes)
