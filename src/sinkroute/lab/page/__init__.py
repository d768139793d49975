"""What all pages share: one frame with its style, one way to write a page, and how figures become part of it.

- `frame.html.j2` is what a page extends, `parts.html.j2` its tables, figures and lists;
- `render` makes a page of a template, `today` says its date;
- `palette` has the colours, `drawing` turns matplotlib's figures into SVG that belongs to its page.

A page is one file: figures are inline SVG, the style stands in the head, and nothing is fetched. Every text passes
through jinja2's autoescape; only what is `Markup` already does not.
"""

from __future__ import annotations

import datetime
import os
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["render", "today"]


def render(template: str, **values: Any) -> str:
    """The page of a template, such as "inspect/page.html.j2", with these values.

    Raises:
        ModuleNotFoundError: jinja2 is missing; `pip install "sinkroute[inspect]"` brings it.
    """
    return _environment().get_template(template).render(**values)


def today() -> str:
    """Today, or the day of SOURCE_DATE_EPOCH, which makes a page the same bytes every time."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    moment = (
        datetime.datetime.fromtimestamp(int(epoch), tz=datetime.timezone.utc)
        if epoch.isdigit()
        else datetime.datetime.now().astimezone()
    )
    return f"{moment.day} {moment:%B %Y}"


@cache
def _environment() -> Environment:
    import jinja2  # only who writes a page pays for it

    return jinja2.Environment(
        loader=jinja2.PackageLoader("sinkroute.lab", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
