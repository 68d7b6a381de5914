"""Pages to look at in a browser, from the templates in ``maesil/templates``. A page is one file that needs no other."""

from __future__ import annotations

import base64
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined


def rendered(template: str, **values: object) -> str:
    """Return a page as HTML. Every text is escaped unless it is Markup; a value that is missing is an error."""
    return _templates().get_template(template).render(values)


@cache
def _templates() -> Environment:
    """Return the templates; one that was used is kept compiled."""
    return Environment(loader=PackageLoader("maesil", "templates"), autoescape=True, undefined=StrictUndefined)


def data_url(kind: str, data: bytes) -> str:
    """Return the address that holds data itself; ``kind`` is a media type, such as ``image/png``."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
