"""The viewer as a person sees it, in headless Chromium: is left left, are the feet down, does nothing leave?"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from support.browser import CHROMIUM, Browser, chromium
from support.viewer_phantom import CORNER_LPS, CUBE_HU, labelled, serving

from maesil.geometry import world_of
from maesil.store.reader import SuperpatchReader
from maesil.store.store import Store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]
READY = "document.body.dataset.ready === 'yes'"
DESK, TELEPHONE = (1280, 900), (400, 800)
PLANES = {"Axial": (0, 1), "Coronal": (0, 2), "Sagittal": (1, 2)}
"""Axes (of L, P, S) that go to the right and that go down or up on the screen."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Browser:
    with chromium(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


@pytest.fixture
def page(browser, server, ids, request) -> Browser:
    """The page of the turned phantom, on a desk unless a test says otherwise."""
    browser.events.clear()
    browser.size(*DESK)
    browser.open(server.url(f"/volumes/{ids[getattr(request, 'param', 'turned')]}"), READY)
    return browser


def press(page: Browser, text: str) -> None:
    """Click the button of this text, where it lies."""
    found = f"[...document.querySelectorAll('button')].find((one) => one.textContent === '{text}')"
    click_on(page, found)


def click_on(page: Browser, element: str) -> None:
    page.run(f"({element}).scrollIntoView({{block: 'center'}})")
    box = page.run(f"(({element}).getBoundingClientRect()).toJSON()")
    page.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


def window(page: Browser, low: int, high: int) -> None:
    for name, value in (("low", low), ("high", high)):
        page.run(f"Object.assign(document.getElementById('{name}'), {{value: {value}}}).onchange()")


def go_to(page: Browser, lps) -> None:
    """Move the three sliders, as a hand would."""
    for axis, value in enumerate(lps):
        page.run(
            f"(() => {{ const one = document.querySelector('[data-axis=\"{axis}\"]'); one.value = {value};"
            " one.dispatchEvent(new Event('input')); })()"
        )


def canvas(page: Browser, picture: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """What the canvas shows, and where it lies on the page."""
    box = page.run("document.getElementById('planes').getBoundingClientRect().toJSON()")
    rows = slice(round(box["y"]), round(box["y"] + box["height"]))
    columns = slice(round(box["x"]), round(box["x"] + box["width"]))
    shown = picture[rows, columns].astype(int)
    shown[:10] = shown[-10:] = shown[:, :10] = shown[:, -10:] = 0  # its rounded corners show the page below
    return shown, box


def told(page: Browser, where: str = "readout") -> tuple[int, np.ndarray, tuple[int, ...]]:
    """HU, place (mm LPS) and voxel (z, y, x) in a line of the page."""
    text = page.run(f"document.getElementById('{where}').textContent")
    place = r"([LR]) ([\d.]+) +([PA]) ([\d.]+) +([SI]) ([\d.]+) mm"
    found = re.search(rf"(-?\d+) HU at {place}, voxel (\d+), (\d+), (\d+)", text)
    assert found, text
    signs = [1 if found[n] in "LPS" else -1 for n in (2, 4, 6)]
    place = np.array([sign * float(found[n]) for sign, n in zip(signs, (3, 5, 7), strict=True)])
    return int(found[1]), place, tuple(int(found[n]) for n in (8, 9, 10))


def extent(volume) -> tuple[np.ndarray, np.ndarray]:
    """The box around the outer faces of all voxels, mm LPS."""
    corners = world_of(volume.affine, np.array(list(np.ndindex(2, 2, 2))) * np.array(volume.shape) - 0.5)
    return corners.min(axis=0), corners.max(axis=0)


def cube_in_plane(store: Store, volume, through: np.ndarray, axis: int) -> np.ndarray:
    """The middle (mm LPS) of what a plane of voxels across an axis holds of the cube, voxels interpolated linearly."""
    hu = SuperpatchReader(store).read_region(volume.volume_id, (0, 0, 0), volume.shape)
    to_index = np.linalg.inv(volume.affine)
    around = (to_index @ [*CORNER_LPS, 1])[:3]
    steps = [np.arange(-12, 12, 0.05) + at for at in around]
    steps[axis] = (to_index @ [*through, 1])[axis : axis + 1]
    index = np.stack(np.meshgrid(*steps, indexing="ij"))
    white = map_coordinates((hu > 1300).astype(float), index, order=1) > 200 / 255
    return world_of(volume.affine, index[:, white].mean(axis=1))


@pytest.mark.parametrize("page", ["turned", "straight"], indirect=True)
@pytest.mark.parametrize("plane", PLANES)
def test_the_corner_of_the_phantom_lies_where_it_must(page, store, ids, plane, request):
    """One plane fills the canvas, so that the place of each mm follows from the box of the scan alone."""
    volume = store.volume(ids[request.node.callspec.params["page"]])
    press(page, plane)
    go_to(page, CORNER_LPS)
    window(page, 1300, 1400)  # the cube alone is white
    page.run("nv.setCrosshairWidth(0)")
    shown, box = canvas(page, page.screenshot())
    place = np.argwhere((shown > 200).all(axis=-1)).mean(axis=0)[::-1]
    right, up = PLANES[plane]
    low, high = extent(volume)
    scale = min(shown.shape[1] / (high - low)[right], shown.shape[0] / (high - low)[up])
    away = (cube_in_plane(store, volume, told(page)[1], list(PLANES).index(plane)) - (low + high) / 2) * scale
    downward = 1 if up == 1 else -1  # the back is below, the head above
    expected = np.array([shown.shape[1] / 2 + away[right], shown.shape[0] / 2 + downward * away[up]])
    np.testing.assert_allclose(place, expected, atol=0.3 * scale)  # 0.3 mm, of voxels of 2 to 3 mm
    page.click(box["x"] + place[0], box["y"] + place[1])
    hu, lps, _ = told(page)
    assert hu == CUBE_HU
    np.testing.assert_allclose(lps[[right, up]], CORNER_LPS[[right, up]], atol=1.2)


def test_all_planes_at_once_show_left_at_the_right_and_feet_below(page, store, ids):
    go_to(page, CORNER_LPS)
    window(page, 1300, 1400)
    shown, _ = canvas(page, page.screenshot())
    white = (shown > 200).all(axis=-1)
    tiles = page.run("nv.screenSlices.map((one) => [one.axCorSag, ...one.leftTopWidthHeight])")
    assert {tile[0] for tile in tiles} == {0, 1, 2}
    for kind, left, top, width, height in tiles:
        rows, columns = np.nonzero(white[round(top) : round(top + height), round(left) : round(left + width)])
        right_half, upper_half = columns.mean() > width / 2, rows.mean() < height / 2
        # The cube is left, before and below the middle. Sagittal planes have the front at the left.
        assert (right_half, upper_half) == {0: (True, True), 1: (True, False), 2: (False, False)}[kind]


@pytest.mark.parametrize("page", ["turned", "straight"], indirect=True)
def test_numbers_under_the_cursor_are_those_of_the_store(page, store, ids, request):
    volume = store.volume(ids[request.node.callspec.params["page"]])
    hu = SuperpatchReader(store).read_region(volume.volume_id, (0, 0, 0), volume.shape)
    _, box = canvas(page, page.screenshot())
    seen = set()
    for x, y in np.random.default_rng(0).uniform(0.02, 0.98, (150, 2)):
        page.mouse("mouseMoved", box["x"] + x * box["width"], box["y"] + y * box["height"])
        if "HU" not in page.run("document.getElementById('under').textContent"):
            continue
        value, lps, index = told(page, "under")
        assert value == hu[index]
        at = np.linalg.solve(volume.affine, [*lps, 1])[:3]
        np.testing.assert_allclose(at, index, atol=0.5 + 0.1)  # places are told to 0.1 mm
        seen.add(value)
    assert {-1000, 40} <= seen


def test_windows_are_those_of_radiology(page):
    """40 HU, black at the lower end and white at the upper one."""
    press(page, "Axial")
    go_to(page, (CORNER_LPS[0] - 40, *CORNER_LPS[1:]))
    assert told(page)[0] == 40
    for name, low, high in (("Lung", -1350, 150), ("Soft tissue", -160, 240), ("Bone", -500, 1300), ("Brain", 0, 80)):
        press(page, name)
        shown, _ = canvas(page, page.screenshot())
        grey = np.bincount(shown[shown.max(axis=-1) == shown.min(axis=-1)][:, 0], minlength=256)
        wanted = 255 * (40 - low) / (high - low)
        around = grey[max(0, round(wanted) - 3) : round(wanted) + 4].sum()
        assert around > 0.05 * grey.sum(), name
        assert page.run("[...document.querySelectorAll('[aria-pressed=true]')].map((one) => one.textContent)") == [
            name,
            "Axial",
        ]
        assert page.run("[low.value, high.value]") == [str(low), str(high)]


def test_keys_alone_move_the_crosshair_and_choose_the_window(page, store, ids):
    volume = store.volume(ids["turned"])
    page.run("document.getElementById('planes').focus()")
    step = np.array(volume.spacing)[::-1]
    for key, axis, way in (("ArrowLeft", 0, -1), ("ArrowRight", 0, 1), ("ArrowUp", 1, -1), ("ArrowDown", 1, 1),
                           ("PageUp", 2, 1), ("PageDown", 2, -1)):  # fmt: skip
        before = told(page)[1]
        page.key(key)
        moved = told(page)[1] - before
        expected = np.zeros(3)
        expected[axis] = way * step[axis]
        np.testing.assert_allclose(moved, expected, atol=0.11)
    for key, name in (("1", "Lung"), ("3", "Bone"), ("5", "Full")):
        page.key(key)
        assert page.run("document.querySelector('[data-window][aria-pressed=true]').textContent") == name
    page.key("v")  # of NiiVue's own keys none is left
    assert page.run("nv.opts.sliceType") == 3 and page.run("document.activeElement.id") == "planes"
    page.key("Tab")
    assert page.run("document.activeElement.id") != "planes"


def test_everything_can_be_reached_and_has_a_name(page):
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    controls = [
        n for n in nodes if n.get("role", {}).get("value") in ("button", "slider", "checkbox", "spinbutton", "link")
    ]
    assert len(controls) >= 9 + 4 + 2 + 2 + 1
    assert all(node["name"]["value"].strip() for node in controls)
    assert page.run("document.querySelectorAll('[tabindex]:not([tabindex=\"0\"])').length") == 0


def test_the_map_of_the_body_lies_over_the_body(page, store, ids):
    volume = store.volume(ids["turned"])
    cells = SuperpatchReader(store).read_map(volume.volume_id, "body")
    press(page, "Coronal")
    go_to(page, world_of(volume.affine, (27, 27, 27)))
    page.run("nv.setCrosshairWidth(0)")
    before, box = canvas(page, page.screenshot())
    click_on(page, "document.querySelector('[data-overlay=\"1\"]')")
    page.wait_for("document.getElementById('legend').textContent.includes('body')")
    page.run("scrollTo(0, 0)")
    after, box = canvas(page, page.screenshot())
    coloured = (np.abs(after - before) > 30).any(axis=-1)
    checked = {True: 0, False: 0}
    for x, y in np.random.default_rng(1).uniform(0.05, 0.95, (400, 2)):
        page.mouse("mouseMoved", box["x"] + x * box["width"], box["y"] + y * box["height"])
        if "HU" not in page.run("document.getElementById('under').textContent"):
            continue
        *_, index = told(page, "under")
        share = cells[tuple(n // 8 for n in index)]
        if all(2 <= n % 8 <= 5 for n in index) and (share == 0 or share > 128):  # well within a cell
            assert coloured[int(y * box["height"]), int(x * box["width"])] == (share > 0), index
            checked[bool(share)] += 1
    assert min(checked.values()) > 5
    assert re.search(r"; body \d+ %", page.run("document.getElementById('readout').textContent"))
    click_on(page, "document.querySelector('[data-overlay=\"1\"]')")
    page.run("scrollTo(0, 0)")
    page.mouse("mouseMoved", 5, 5)
    assert np.abs(canvas(page, page.screenshot())[0] - before).max() < 30


def test_nothing_is_asked_of_any_other_machine_and_no_policy_is_broken(page, server, ids):
    for index in (0, 1):
        click_on(page, f"document.querySelector('[data-overlay=\"{index}\"]')")
    page.wait_for("document.querySelectorAll('#legend li').length === 2")
    page.open(server.url("/"))
    page.wait_for("[...document.images].every((one) => one.complete && one.naturalWidth)")
    asked = [urlsplit(address) for address in page.requests()]
    assert len(asked) > 12
    assert {one.netloc for one in asked if one.scheme not in ("data", "blob")} == {f"127.0.0.1:{server.server_port}"}
    assert all(one.path.startswith(f"/{server.token}/") for one in asked if one.scheme == "http")
    assert page.complaints() == []
    # The policy itself: a request to elsewhere is stopped before it leaves.
    assert page.run("fetch('http://127.0.0.1:9/').catch((error) => 'stopped')") == "stopped"
    assert "Content Security Policy" in page.complaints()[0]


@pytest.mark.parametrize("size", [DESK, TELEPHONE])
@pytest.mark.parametrize("path", ["list", "scan"])
def test_it_fits_a_desk_and_a_telephone(page, server, ids, size, path, tmp_path):
    page.size(*size)
    if path == "list":
        page.open(server.url("/"))
        page.wait_for("[...document.images].every((one) => one.complete && one.naturalWidth)")
    else:
        page.wait_for("nv.canvas.clientWidth <= innerWidth && nv.canvas.width === nv.canvas.clientWidth")
    assert page.run("document.documentElement.scrollWidth") <= size[0]
    wide = page.run(
        "[...document.body.querySelectorAll('*')].filter((one) => one.getBoundingClientRect().right > innerWidth + 1"
        " && !one.closest('.scroll')).map((one) => one.outerHTML.slice(0, 80))"
    )
    assert wide == []
    picture = page.screenshot(tmp_path / "page.png", whole=True)
    assert picture.shape[1] == size[0] and picture.std() > 10
    if path == "scan":
        tiles = page.run("nv.screenSlices.map((one) => one.leftTopWidthHeight)")
        assert len(tiles) == 3 and min(tile[2] for tile in tiles) > 0.35 * min(size[0], 872)


def test_a_fault_of_the_store_is_told_on_the_page(browser, tmp_path, store, ids):
    shutil.copytree(store.path, tmp_path / "s.zarr")
    Path(tmp_path / "s.zarr" / store.volume(ids["turned"]).superpatches[0].path).write_bytes(b"")
    for damaged in serving(Store.open(tmp_path / "s.zarr")):
        browser.open(damaged.url(f"/volumes/{ids['turned']}"), "document.querySelector('.failed') !== null")
        assert "the file was cut" in browser.run("document.querySelector('.failed').textContent")


def test_labels_lie_over_their_voxels_in_their_colours(browser, tmp_path):
    store, volume, labels = labelled(tmp_path)
    browser.size(*DESK)
    for server in serving(store):
        browser.open(server.url(f"/volumes/{volume.volume_id}"), READY)
        press(browser, "Axial")
        go_to(browser, world_of(volume.affine, (22, 32, 46)))
        browser.run("nv.setCrosshairWidth(0)")
        before, _ = canvas(browser, browser.screenshot())
        browser.run("document.querySelector('[data-overlay=\"2\"]').click()")
        browser.wait_for("document.querySelectorAll('#legend li').length === 2")
        assert browser.run("document.getElementById('legend').textContent") == "<liver>lesion"
        after, box = canvas(browser, browser.screenshot())
        coloured = (np.abs(after - before) > 25).any(axis=-1)
        seen = set()
        for x, y in np.random.default_rng(0).uniform(0.05, 0.95, (300, 2)):
            browser.mouse("mouseMoved", box["x"] + x * box["width"], box["y"] + y * box["height"])
            if "HU" in browser.run("document.getElementById('under').textContent"):
                *_, index = told(browser, "under")
                near = np.unique(labels[tuple(slice(max(0, n - 1), n + 2) for n in index)])
                if len(near) == 1:  # away from borders
                    assert coloured[int(y * box["height"]), int(x * box["width"])] == (near[0] == 1), index
                    seen.add(int(near[0]))
        assert {0, 1} <= seen
        assert re.search("; organs (<liver>|lesion)$", browser.run("document.getElementById('readout').textContent"))
