"""The documentation as a site: it builds strictly, leads nowhere that isn't there, and asks nobody for anything."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from playwright.sync_api import TimeoutError, expect  # noqa: A004 - playwright calls it so
from starlette.staticfiles import StaticFiles

from saga_store import SagaStatus, SagaStepStatus
from tests.browser import SIZES, chromium, served, visiting
from tests.pages import ROOT

WIDTH = "document.documentElement.scrollWidth"
BASE = "http://site.test/"
# What a page fetches as it is shown; a link is only followed by who wants to.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """The links of a page, what it fetches, and the ids in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.ids.update(value for name, value in given.items() if name in {"id", "name"})
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and "href" in given and given.get("rel") != "canonical":
            self.fetched.append(given["href"])
        if tag in FETCHED and FETCHED[tag] in given:
            self.fetched.append(given[FETCHED[tag]])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder


@pytest.fixture(scope="module")
def pages(built: Path) -> dict[str, Page]:
    """Each page by its path in the site."""
    return {
        str(path.relative_to(built)).removesuffix("index.html"): Page(path.read_text(encoding="utf-8"))
        for path in built.rglob("*.html")
        if path.name != "404.html"  # whose paths are from the root of wherever the site is
    }


def test_every_link_leads_somewhere(built: Path, pages: dict[str, Page]) -> None:
    """Pages, headings and files; a name of the API is a heading, too."""
    missing = []
    for name, page in pages.items():
        for link in (*page.links, *page.fetched):
            url = urlsplit(urljoin(BASE + name, link))
            path = unquote(url.path).removeprefix("/")
            if not url.geturl().startswith(BASE):
                continue
            there = (built / path).is_file() or path in pages
            if not there or (url.fragment and path in pages and unquote(url.fragment) not in pages[path].ids):
                missing.append(f"{name or 'index'}: {link}")
    assert not missing


def test_nothing_is_fetched_from_elsewhere(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        assert [url for url in page.fetched if urlsplit(url).netloc] == [], name


def test_no_style_asks_elsewhere(built: Path) -> None:
    for style in built.rglob("*.css"):
        assert re.findall(r"url\([\"']?(?:https?:)?//[^)]*", style.read_text(encoding="utf-8")) == [], style


def test_the_pictures_say_what_there_is() -> None:
    """No status is missing in the picture of a saga's states, nor in that of a step's."""
    for name, statuses in (("saga", SagaStatus), ("step", SagaStepStatus)):
        picture = (ROOT / "docs" / "diagrams" / f"{name}.svg").read_text(encoding="utf-8")
        assert set(re.findall(r'class="name"[^>]*>([A-Z]+)<', picture)) == {status.value for status in statuses}


@pytest.fixture(scope="module")
def address(built: Path) -> Iterator[str]:
    with served({"site": StaticFiles(directory=built, html=True)}) as addresses:
        yield addresses["site"]


def test_in_a_browser(built: Path, pages: dict[str, Page], address: str) -> None:
    """Every page at either width: without a fault, a request elsewhere, or anything that sticks out."""
    with chromium() as browser, visiting(browser) as visit:
        # Each page would read the index of all of them; test_search does once.
        index = json.loads((built / "search" / "search_index.json").read_text(encoding="utf-8")) | {"docs": []}
        visit.page.route("**/search_index.json", lambda asked: asked.fulfill(json=index))
        for name in sorted(pages):
            page = visit.open(f"{address}/{name}")
            for size, (width, height) in SIZES.items():
                page.set_viewport_size({"width": width, "height": height})
                try:  # the theme moves its menus to where they belong
                    page.wait_for_function(f"{WIDTH} <= {width}", timeout=5_000)
                except TimeoutError:
                    pytest.fail(f"{name or 'index'} at {size}: {page.evaluate(WIDTH)} of {width}")


def test_search(address: str) -> None:
    """What nobody can tell of a step is found by its name, without anybody else's help."""
    with chromium() as browser, visiting(browser) as visit:
        page = visit.open(f"{address}/")
        page.get_by_role("textbox", name="Search").fill("in doubt")
        expect(page.locator('.md-search-result__link[href*="/concepts/sagas/"][href$="#in-doubt"]')).to_be_visible()
        visit.keep("docs-search", whole=False)
        assert visit.faults == []
