"""HTML as a browser would read it: its elements, its text and its links."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

import httpx

from saga_store.inspection import visible

_VOID = {"meta", "link", "input", "br"}
_TEXT = {"h1", "h2", "p", "a", "b", "small", "strong", "span", "code", "pre", "time", "details", "summary", "label"}
_LISTS = {"ul", "ol", "li", "dl", "dt", "dd", "table", "caption", "thead", "tbody", "tr", "th", "td"}
_PARTS = {
    "html",
    "head",
    "title",
    "body",
    "header",
    "nav",
    "main",
    "section",
    "div",
    "form",
    "select",
    "option",
    "button",
}
_PICTURES = {"svg", "defs", "pattern", "line", "rect", "path", "polyline", "text"}
# All that a page of ours consists of.
ELEMENTS = _VOID | _TEXT | _LISTS | _PARTS | _PICTURES
_LINKS = {"a": "href", "link": "href", "form": "action"}


@dataclass
class Html(HTMLParser):
    """A page that was parsed."""

    source: str
    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.feed(self.source)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    @property
    def links(self) -> list[str]:
        return [attributes[_LINKS[tag]] for tag, attributes in self.tags if tag in _LINKS and _LINKS[tag] in attributes]

    def check(self) -> None:
        """Find what no page may have: elements or attributes of somebody else's, and characters that can't be seen."""
        assert {tag for tag, _ in self.tags} <= ELEMENTS
        for tag, attributes in self.tags:
            assert not [name for name in attributes if name.startswith("on") or name in {"style", "srcdoc", "src"}], tag
        said = [*self.pieces, *(value for _, attributes in self.tags for value in attributes.values())]
        assert all(visible(line) == line for text in said for line in text.split("\n"))


async def crawl(client: httpx.AsyncClient, start: str, *, most: int = 400) -> dict[str, int]:
    """Follow every link below the start as a browser resolves it, and return what each answered."""
    found: dict[str, int] = {}
    rest = [start]
    while rest and len(found) < most:
        url = rest.pop(0)
        if url in found:
            continue
        response = await client.get(url, follow_redirects=True)
        found[url] = response.status_code
        if response.headers["content-type"].startswith("text/html") and response.status_code == httpx.codes.OK:
            links = [urljoin(str(response.url), link).partition("#")[0] for link in Html(response.text).links]
            rest += [link for link in links if urlsplit(link).netloc == urlsplit(start).netloc]
    return found
