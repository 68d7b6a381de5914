"""The pictures: where anatomy stands in them, and what each column holds. Read back as pixels."""

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from maesil.pictures import COLUMNS, MASK_COLOUR, _Layout, save_comparison, save_reconstruction

WINDOW = (-1000.0, 1000.0)


@pytest.fixture
def crop():
    """HU, mask (True = hidden) and prediction of a 32^3 crop."""
    rng = np.random.default_rng(0)
    volume = rng.integers(-900, 900, (32, 32, 32)).astype(np.int16)
    mask = np.repeat(np.repeat(np.repeat(rng.random((4, 4, 4)) < 0.75, 8, 0), 8, 1), 8, 2)
    return volume, mask, volume + rng.normal(0, 100, volume.shape).astype(np.float32)


def panels(path, columns=5, room_at_the_right=0.75):
    """Cut a picture of a cube into its 3 x 5 panels, a little inside their edges: RGB arrays [3][5]."""
    picture = imread(path)[..., :3]
    layout = _Layout((1.0, 1.0, 1.0), columns, room_at_the_right)
    height, width = picture.shape[:2]
    inch, inset = width / (layout.width + 0.1 + room_at_the_right), 0.05
    rows: list[list[np.ndarray]] = []
    for row in range(3):
        rows.append([])
        for column in range(columns):
            x0, x1, y0, y1 = layout.extent(row, column)
            left, right = (int((0.1 + x) * inch) for x in (x0 + inset, x1 - inset))
            top, bottom = (height - int((0.1 + y) * inch) for y in (y1 - inset, y0 + inset))
            rows[-1].append(picture[top:bottom, left:right])
    return rows


def test_equal_input_gives_equal_bytes_and_leaves_the_backend_alone(tmp_path, crop):
    backend = dict.__getitem__(matplotlib.rcParams, "backend")  # without choosing one, as rcParams[...] would
    volume, mask, prediction = crop
    for name in ("a.png", "b.png"):
        save_reconstruction(tmp_path / name, volume, mask, prediction, WINDOW, title="step 7")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert dict.__getitem__(matplotlib.rcParams, "backend") is backend


def corner_centres(panel):
    """Mean brightness of the four quadrants' centres: [[top left, top right], [bottom left, bottom right]]."""
    h, w = panel.shape[:2]
    return [
        [panel[int(h * y) - 8 : int(h * y) + 8, int(w * x) - 8 : int(w * x) + 8].mean() for x in (0.3, 0.7)]
        for y in (0.3, 0.7)
    ]


def test_anterior_and_superior_are_up_and_right_is_left(tmp_path):
    # Bright where the patient is right (low x), anterior (low y) and superior (high z).
    volume = np.full((32, 32, 32), -900, dtype=np.int16)
    volume[16:, :, :] += 600
    volume[:, :16, :] += 500
    volume[:, :, :16] += 400
    mask = np.zeros(volume.shape, dtype=bool)
    save_reconstruction(tmp_path / "p.png", volume, mask, volume.astype(np.float32), WINDOW)
    (axial, *_), (coronal, *_), (sagittal, *_) = panels(tmp_path / "p.png")
    for name, panel in (("axial", axial), ("coronal", coronal), ("sagittal", sagittal)):
        (top_left, top_right), (bottom_left, bottom_right) = corner_centres(panel)
        # Left of the picture: the patient's right, or anterior; top: anterior, or superior. All of them bright.
        assert top_left > top_right > bottom_right, name
        assert top_left > bottom_left > bottom_right, name


def test_columns_hold_what_their_titles_say(tmp_path):
    volume = np.zeros((32, 32, 32), dtype=np.int16)
    mask = np.ones(volume.shape, dtype=bool)
    mask[:, :, 16:] = False  # visible on the picture's right in axial and coronal
    prediction = np.full(volume.shape, 400.0, dtype=np.float32)
    save_reconstruction(tmp_path / "p.png", volume, mask, prediction, WINDOW)
    axial = dict(zip(COLUMNS, panels(tmp_path / "p.png")[0], strict=True))

    def left_and_right(panel):
        h, w = panel.shape[:2]
        return panel[h // 3, w // 4], panel[h // 3, 3 * w // 4]

    grey, predicted, hidden = np.full(3, 0.5), np.full(3, 0.7), np.array(MASK_COLOUR)
    expected = {
        "input": (grey, grey),
        "masked input": (hidden, grey),
        "reconstruction": (predicted, hidden),
        "pasted": (predicted, grey),
    }
    for name, pair in expected.items():
        for found, colour in zip(left_and_right(axial[name]), pair, strict=True):
            np.testing.assert_allclose(found, colour, atol=0.01, err_msg=name)
    too_high, right = left_and_right(axial["error"])
    assert too_high[0] > too_high[2] + 0.3  # orange
    np.testing.assert_allclose(right, 0, atol=0.01)


@pytest.mark.parametrize("shape, spacing", [((9, 24, 40), (5.0, 1.0, 1.0)), ((60, 20, 16), (1.0, 2.0, 2.0))])
def test_spacing_gives_every_plane_the_patients_proportions(tmp_path, shape, spacing):
    volume = np.zeros(shape, dtype=np.int16)
    everywhere = np.ones(shape, dtype=bool)
    save_reconstruction(tmp_path / "p.png", volume, everywhere, volume.astype(np.float32), WINDOW, spacing=spacing)
    picture = imread(tmp_path / "p.png")[..., :3]
    grey = (np.abs(picture - 0.5) < 0.02).all(axis=-1)
    inputs = grey[:, : int(picture.shape[1] * 0.187)]
    rows = np.concatenate([[0], (inputs.sum(axis=1) > 20).astype(int), [0]])
    bands = np.flatnonzero(np.diff(rows)).reshape(-1, 2)
    assert len(bands) == 3
    z, y, x = (n * s for n, s in zip(shape, spacing, strict=True))
    for (start, stop), ratio in zip(bands, (x / y, x / z, y / z), strict=True):
        columns = np.flatnonzero(inputs[start:stop].any(axis=0))
        assert (columns[-1] - columns[0] + 1) / (stop - start) == pytest.approx(ratio, rel=0.05)


def test_one_slice_makes_a_picture(tmp_path):
    volume = np.zeros((1, 8, 8), dtype=np.int16)
    save_reconstruction(tmp_path / "p.png", volume, volume == 0, volume.astype(np.float32), WINDOW)
    assert imread(tmp_path / "p.png").shape[1] > 1500


def test_a_crop_of_air_and_an_extreme_prediction(tmp_path):
    volume = np.full((16, 16, 16), -1024, dtype=np.int16)
    prediction = np.full(volume.shape, 1e9, dtype=np.float32)
    save_reconstruction(tmp_path / "p.png", volume, np.ones(volume.shape, dtype=bool), prediction, WINDOW)
    (row, *_) = panels(tmp_path / "p.png")
    assert row[0].mean() < 0.1 and row[3].mean() > 0.9


@pytest.mark.parametrize("all_hidden", [False, True])
def test_a_comparison_shows_each_model_pasted(tmp_path, crop, all_hidden):
    volume, mask, prediction = crop
    mask = mask | all_hidden
    path = tmp_path / "c.png"
    predictions = {"one": prediction, "flat": np.full(volume.shape, 900.0, np.float32)}
    save_comparison(path, volume, mask, predictions, (-1000.0, 1000.0), "title")
    titles = ["input", "one", "flat"] if all_hidden else ["input", "masked input", "one", "flat"]
    for row in panels(path, columns=len(titles), room_at_the_right=0.1):
        shown = dict(zip(titles, row, strict=True))
        # 900 HU is nearly white; what was visible stays as it was.
        white = (shown["flat"] > 0.9).all(axis=-1).mean()
        assert white > 0.9 if all_hidden else 0.3 < white < 0.95
        one, whole = (shown[name][:290, :290].mean(axis=-1) for name in ("one", "input"))
        assert np.corrcoef(one.ravel(), whole.ravel())[0, 1] > 0.8
