"""Pages: every text is escaped, and a value that nobody gave is an error."""

from __future__ import annotations

import pytest
from jinja2 import UndefinedError

from maesil.pages import data_url, rendered

HOSTILE = "<script>alert('&')</script>"


def test_texts_are_escaped_wherever_they_stand():
    heads, rows = [("model", False), (HOSTILE, True)], [[HOSTILE, "1.00"]]
    pictures = [(HOSTILE, data_url("image/png", b"\x89PNG"))]
    page = rendered(
        "experiment.html", told=HOSTILE, warnings=[HOSTILE], tables=[(HOSTILE, heads, rows)], pictures=pictures
    )
    assert "<script" not in page and page.count("&lt;script&gt;") == 6
    assert 'src="data:image/png;base64,iVBORw=="' in page and "{{" not in page and "font: 15px" in page


def test_a_missing_value_is_an_error():
    with pytest.raises(UndefinedError, match="told"):
        rendered("experiment.html", warnings=[], tables=[], pictures=[])
