"""Pages to look at in a browser, from the templates in ``maesil/templates``. A page is one file that needs no other."""

from __future__ import annotations

import base64

from jinja2 import Environment, PackageLoader, StrictUndefined


def rendered(template: str, **values: object) -> str:
    """Return a page as HTML. Every text is escaped unless it is Markup; a value that is missing is an error."""
    loader = PackageLoader("maesil", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template(template).render(values)


def data_url(kind: str, data: bytes) -> str:
    """Return the address that holds data itself; ``kind`` is a media type, such as ``image/png``."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
