"""The pages: what they tell, and that data stay data."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from support.stores import add_volume, make_store, synthetic_hu

from maesil.geometry import world_of
from maesil.store.store import Store
from maesil.viewer.answers import answer
from maesil.viewer.pages import PER_PAGE, list_page, scan_page
from maesil.viewer.served_store import MOST_VOXELS, ServedStore

ROOT = "/token"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>'\"&"


class Seen(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def addresses(self) -> list[str]:
        return [value for _, attrs in self.tags for name, value in attrs.items() if name in ("href", "src", "action")]


def for_script(page: str) -> dict:
    return json.loads(re.search(r'<script id="scan" type="application/json">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture
def hostile(tmp_path) -> tuple[ServedStore, str]:
    store = make_store(tmp_path / "<b>s", [], superpatch=16)
    volume = add_volume(store, synthetic_hu((8, 8, 8)), notes=(HOSTILE,), group=HOSTILE, source={HOSTILE: HOSTILE})
    return ServedStore(store, {volume.volume_id: [f"/scans/{HOSTILE}.dcm"]}), volume.volume_id


def test_data_of_a_store_are_text_and_no_markup(hostile):
    scans, volume_id = hostile
    plain = {"script", "img"}
    for page in (list_page(scans, ROOT, HOSTILE), list_page(scans, ROOT), scan_page(scans, ROOT, volume_id, (1, 1, 1))):
        seen = Seen(page)
        assert not [1 for tag, attrs in seen.tags if tag in plain and ("onerror" in attrs or attrs.get("src") == "x")]
        scripts = [attrs for tag, attrs in seen.tags if tag == "script"]
        assert all(attrs.get("type") == "application/json" or attrs["src"].startswith(ROOT) for attrs in scripts)
        assert "b" not in {tag for tag, _ in seen.tags}
    assert for_script(scan_page(scans, ROOT, volume_id, (1, 1, 1)))["ct"].endswith("/ct.nii?whole")
    assert HOSTILE in Seen(list_page(scans, ROOT)).text


def test_pages_hold_no_script_no_style_and_no_address_of_elsewhere(store, ids):
    scans = ServedStore(store)
    for page in (list_page(scans, ROOT), scan_page(scans, ROOT, ids["turned"], (2, 2, 2))):
        seen = Seen(page)
        assert all(address.startswith((f"{ROOT}/", "data:,")) for address in seen.addresses())
        assert not {"style"} & {tag for tag, _ in seen.tags}
        assert not {name for _, attrs in seen.tags for name in attrs if name == "style" or name.startswith("on")}


def test_each_control_has_a_name(store, ids):
    page = scan_page(ServedStore(store), ROOT, ids["turned"], (1, 1, 1))
    for control in re.findall(r"<input[^>]*>", page):
        before = page[: page.index(control)]
        assert before.rfind("<label") > before.rfind("</label>"), control
    assert all(attrs["aria-label"] for tag, attrs in Seen(page).tags if tag in ("canvas", "aside", "nav"))


def test_a_volume_s_page_tells_what_explain_tells(store, ids):
    scans = ServedStore(store, {ids["turned"]: [f"/scans/{n}.dcm" for n in range(7)]})
    text = " ".join(Seen(scan_page(scans, ROOT, ids["turned"], (1, 1, 1))).text.split())
    for told in (
        ids["turned"], "52 x 70 x 65 of 3 x 2 x 2.5 mm", "the slices are shifted along the scan",
        "R 60.0 mm A 215.0 mm S 470.0 mm",
        "turned by up to 23.2 degrees", "/scans/0.dcm", "and 2 more", "100.0% of the voxels valid",
    ):  # fmt: skip
        assert told in text, told
    straight = Seen(scan_page(scans, ROOT, ids["straight"], (1, 1, 1))).text
    assert "as the patient lies" in straight and "nothing was split" in straight and "Not known here" in straight


@pytest.mark.parametrize("step", [(1, 1, 1), (2, 3, 1)])
def test_the_script_finds_each_voxel_by_its_place(store, ids, step):
    volume = store.volume(ids["turned"])
    told = for_script(scan_page(ServedStore(store), ROOT, ids["turned"], step))
    shown = np.random.default_rng(0).integers(0, told["shape"], (50, 3))
    places = world_of(volume.affine, shown * told["step"])
    back = np.c_[places, np.ones(50)] @ np.array(told["index_of_lps"]).T
    np.testing.assert_allclose(back, shown, atol=1e-6)
    assert (places >= np.array(told["lowest"]) - 1e-6).all() and (places <= np.array(told["highest"]) + 1e-6).all()


def test_the_list_goes_on_over_pages(tmp_path, monkeypatch):
    monkeypatch.setattr("maesil.viewer.pages.PER_PAGE", 2)
    scans = ServedStore(make_store(tmp_path / "s", [(8, 8, 8)] * 5, superpatch=16))
    seen, address, found = Seen(list_page(scans, ROOT)), "", set()
    for first in (0, 2, 4):
        seen = Seen(answer(scans, ROOT, "/", f"from={first}").body.decode())
        found |= {address for address in seen.addresses() if "/volumes/" in address and not address.endswith(".png")}
        assert f"{first + 1} to {min(first + 2, 5)} shown" in seen.text
        address = f"{ROOT}/?find=&from={first + 2}"
        assert (address in seen.addresses()) == (first < 4)
    assert len(found) == 5 and PER_PAGE > 2


@pytest.mark.parametrize(
    "query", ["from=x", "from=-1", "from=99999999999999", "from=%C2%B2", "find=%00%ff", "&&=", "from="]
)
def test_queries_that_mean_nothing_do_no_harm(store, query):
    assert answer(ServedStore(store), ROOT, "/", query).status == 200


def test_refused_sources_and_what_to_do_stand_below_the_list(store):
    text = Seen(list_page(ServedStore(store), ROOT)).text
    assert "a <gap> of 10 mm" in text and "--fill-gaps" in text and "ffffffffffff" in text
    assert "2 volumes" in text


def test_a_scan_of_very_many_voxels_is_shown_in_part_and_says_so(store, ids, monkeypatch):
    monkeypatch.setattr("maesil.viewer.answers.step_for", lambda volume: (2, 2, 2))
    page = answer(ServedStore(store), ROOT, f"/volumes/{ids['turned']}", "").body.decode()
    assert "one voxel of 2 x 2 x 2" in Seen(page).text and for_script(page)["ct"].endswith("/ct.nii")
    whole = answer(ServedStore(store), ROOT, f"/volumes/{ids['turned']}", "whole").body.decode()
    assert "one voxel of" not in whole and for_script(whole)["ct"].endswith("?whole")
    assert MOST_VOXELS > 512**3


@pytest.mark.parametrize("part", ["ct.nii", "picture.png", "overlays/body"])
def test_damage_is_told_in_one_line(store, ids, tmp_path, part):
    shutil.copytree(store.path, tmp_path / "s.zarr")
    volume = store.volume(ids["turned"])
    for path in [*(patch.path for patch in volume.superpatches), f"{volume.prefix}/body/c/0/0/0"]:
        (tmp_path / "s.zarr" / path).write_bytes(b"")
    found = answer(ServedStore(Store.open(tmp_path / "s.zarr")), ROOT, f"/volumes/{ids['turned']}/{part}", "")
    line = found.body.decode()
    assert found.status == 500 and found.kind.startswith("text/plain") and line.count("\n") == 1
    assert "cut" in line or "damaged" in line
