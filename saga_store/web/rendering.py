"""Templates into HTML. Whatever is put into one is escaped, and every character of it can be seen."""

import base64
import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from saga_store.inspection import visible
from saga_store.telling import duration, headline, instant, outcome, shards

STYLE = files("saga_store.web").joinpath("static/style.css").read_text(encoding="utf-8")
VERSION = hashlib.sha256(STYLE.encode()).hexdigest()[:12]
"""Of the style sheet, for its link, so that browsers may keep it."""
STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
_LONGEST_LINE = 2000


def _seen(value: object) -> object:
    """Return a text that can be seen; one of nothing but blanks couldn't be, either."""
    if type(value) is not str:
        return value
    return visible(value) if value.strip(" ") else value.replace(" ", "\N{OPEN BOX}")


def _lines(text: str | None) -> list[str]:
    """Return a text's lines, for which the page has line breaks of its own."""
    return (text or "").split("\n")


def _date(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def _clock(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%H:%M:%S.%f")[:-3]


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


_ENVIRONMENT = Environment(
    loader=PackageLoader("saga_store.web"),
    autoescape=True,
    finalize=_seen,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {
    "duration": duration,
    "headline": headline,
    "shards": shards,
    "outcome": outcome,
    "lines": _lines,
    "seen": visible,
    "date": _date,
    "clock": _clock,
    "px": _number,
}
_ENVIRONMENT.globals |= {"instant": instant, "version": VERSION}


def render(template: str, values: Mapping[str, object]) -> str:
    return _ENVIRONMENT.get_template(template).render(values)


def inline_style() -> Markup:
    """Return the style sheet for a page that stands alone; it is ours, so that nothing in it has to be escaped."""
    return Markup(f"<style>{STYLE}</style>")  # noqa: S704 - of our own file
