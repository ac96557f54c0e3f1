"""The pages in headless Chromium: with 300 sagas of all kinds and hostile ones, below prefixes, for everybody."""

import asyncio
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Browser

from saga_store.inspection import visible
from saga_store.web import create_app, render_saga
from tests.browser import SCREENSHOTS, SIZES, chromium, served, visiting
from tests.many_sagas import HOSTILE, HOSTILE_TEXTS, ManySagas, make_many_sagas
from tests.test_web import keeping, stripping

LOOKS = {"desktop": "light", "desktop in the dark": "dark", "phone": "light"}
# Made of the same as others, so that axe needn't look for that long.
ALIKE = {f"saga {special}" for special in ("hostile 2", "hostile 3", "hostile 4", "big", "active 0", "given up 0")}
# What is looked at in the dark and on a phone, too.
TWICE = {"attention", "list", "interventions", "saga in doubt 0", "saga exhausted 0", "saga polls", "saga hostile 0"}


@pytest.fixture(scope="module")
def many() -> ManySagas:
    return asyncio.run(make_many_sagas())


@pytest.fixture(scope="module")
def sites(many: ManySagas) -> Iterator[dict[str, str]]:
    """The pages at the root, below a prefix that is stripped, and below one that is kept."""
    app = create_app(many.storage, title="shop @ db-1", trace_url="https://trace.test/{saga_id}", redact=["secret"])
    with served({"root": app, "stripped": stripping(app, "/a/b"), "kept": keeping(app, "/a/b")}) as sites:
        yield {name: url + ("" if name == "root" else "/a/b") for name, url in sites.items()}


@pytest.fixture(scope="module")
def file(many: ManySagas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saga's page that stands alone."""
    file = tmp_path_factory.mktemp("file") / "order.html"
    file.write_text(asyncio.run(render_saga(many.storage, many.named["in doubt 0"])), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser(sites: dict[str, str], file: Path) -> Iterator[Browser]:
    """The browser; while it runs there can be no other event loop, so all that needs one comes first."""
    assert sites
    assert file.is_file()
    with chromium() as browser:
        yield browser


def paths(many: ManySagas) -> dict[str, tuple[str, int]]:
    """Return one page of each kind, and with which status it comes."""
    sagas = {
        f"saga {special}": (f"/sagas/{many.named[special]}?context=show", 200)
        for special in (
            *(
                "in doubt 0",
                "exhausted 0",
                "never began 0",
                "failed in doubt 0",
                "onboarding 0",
                "shipping 0",
                "active 0",
            ),
            *("given up 0", "settled", "polls", "5,000 entries", "failed 0", "huge", "big"),
            *(f"hostile {number}" for number in range(len(HOSTILE_TEXTS))),
        )
    }
    asked = urlencode({"name": HOSTILE_TEXTS[0], "in_doubt": "1"})
    return sagas | {
        "attention": ("/", 200),
        "attention, all well": ("/?stale_after=365d&max_attempts=1000", 200),
        "list": ("/sagas?limit=15", 200),
        "list, filtered": (f"/sagas?{asked}", 200),
        "interventions": ("/interventions?since=2026-11-01&limit=8", 200),
        "not found": ("/sagas/00000000-0000-0000-0000-000000000000", 404),
        "bad filter": ("/sagas?silent_for=long", 400),
    }


@pytest.mark.parametrize("look", LOOKS)
def test_every_page(browser: Browser, sites: dict[str, str], many: ManySagas, look: str) -> None:
    """No policy is violated, no error logged, nothing asked elsewhere; nobody is kept out, and nothing sticks out."""
    size = look.split(maxsplit=1)[0]
    with visiting(browser, size=size, scheme=LOOKS[look]) as visit:
        for name, (path, status) in paths(many).items():
            if look != "desktop" and name not in TWICE:
                continue
            page = visit.open(sites["root"] + path, status=status)
            assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0], name
            assert page.evaluate("document.scripts.length") == 0
            visit.keep(name.replace(" ", "-").replace(",", ""))
            if name not in ALIKE:
                assert visit.faults_of_access() == [], name
            assert visit.faults == []


def test_any_saga(browser: Browser, sites: dict[str, str], many: ManySagas) -> None:
    """Any of the sagas can be looked at."""
    assert len(many.ids) >= 300
    with visiting(browser) as visit:
        for saga_id in many.ids[::12]:
            page = visit.open(f"{sites['root']}/sagas/{saga_id}")
            assert page.locator("h1 code").inner_text() == str(saga_id)
            assert page.locator(".verdict").inner_text()


@pytest.mark.parametrize("number", range(len(HOSTILE_TEXTS)))
def test_hostile_text_is_text(browser: Browser, sites: dict[str, str], many: ManySagas, number: int) -> None:
    """To the browser it is the text that was stored, its odd characters written out, and no element."""
    with visiting(browser) as visit:
        page = visit.open(f"{sites['root']}/sagas/{many.named[f'hostile {number}']}?history=all")
        heading = page.locator("h1").evaluate("heading => heading.firstChild.textContent")
        assert heading == (visible(HOSTILE_TEXTS[number]).strip() or "\N{OPEN BOX}") + " "
        assert visible(HOSTILE) in page.locator("tr.person").inner_text()
        assert (
            page.evaluate("document.querySelectorAll('script, img, iframe, object, [onerror], main style').length") == 0
        )


def test_what_is_in_doubt_is_in_sight_on_a_phone(browser: Browser, sites: dict[str, str], many: ManySagas) -> None:
    """The timeline is wider than a phone; its end is what one sees first."""
    with visiting(browser, size="phone") as visit:
        page = visit.open(f"{sites['root']}/sagas/{many.named['in doubt 0']}")
        bar = page.locator(".scroll rect.in-doubt").bounding_box()
        assert bar is not None
        assert 0 <= bar["x"] <= bar["x"] + bar["width"] <= SIZES["phone"][0]
        assert page.locator(".scroll").evaluate("scroll => scroll.scrollWidth > scroll.clientWidth")


def test_a_command_is_copied_whole(browser: Browser, sites: dict[str, str], many: ManySagas) -> None:
    """One click selects a command, all of it and nothing else, on one line."""
    saga_id = many.named["hostile 0"]
    with visiting(browser) as visit:
        page = visit.open(f"{sites['root']}/sagas/{saga_id}")
        for command in page.locator("pre.command").all():
            command.click()
            selected = page.evaluate("getSelection().toString()").rstrip("\n")
            assert "\n" not in selected
            words = shlex.split(selected)
            assert words[:2] == ["saga-store", "saga"]
            assert words[3] == str(saga_id)
            assert "script" not in selected


def test_forms(browser: Browser, sites: dict[str, str], many: ManySagas) -> None:
    """An id that is typed leads to its saga; filters stand in the URL, and each can be left out again."""
    saga_id = many.named["polls"]
    with visiting(browser) as visit:
        page = visit.open(f"{sites['stripped']}/")
        page.fill("#find-id", saga_id.hex[:10])
        page.click("text=Find")
        assert page.url == f"{sites['stripped']}/sagas/{saga_id}"
        page.click("nav >> text=Sagas")
        page.select_option("#f-condition", "exhausted")
        page.fill("#f-silent_for", "1h")
        page.click(".filters >> text=Find")
        assert "condition=exhausted" in page.url
        assert page.locator("tbody tr").count() == 7
        page.click("[aria-label='Leave out condition']")
        assert "condition=" not in page.url
        assert "silent_for=1h" in page.url
        assert visit.faults == []


@pytest.mark.parametrize("site", ["root", "stripped", "kept"])
def test_links_lead_on(browser: Browser, sites: dict[str, str], many: ManySagas, site: str) -> None:
    """As the browser resolves them, all links stay below the prefix and answer 200."""
    start = f"{sites[site]}/"
    with visiting(browser) as visit:
        found: set[str] = set()
        for path in ("", "sagas?name=order", "interventions?since=2026-11-01", f"sagas/{many.named['polls']}"):
            visit.open(start + path)
            found |= set(visit.page.evaluate("[...document.querySelectorAll('a, link')].map(one => one.href)"))
        ours = {url.partition("#")[0] for url in found if not url.startswith("https://trace.test/")}
        assert len(ours) > 40
        assert all(url.startswith(start) for url in ours)
        assert {visit.page.request.get(url).status for url in sorted(ours)[::3]} == {200}


def test_on_paper(browser: Browser, sites: dict[str, str], many: ManySagas) -> None:
    """Printed, a saga is what it tells, without what one could click."""
    with visiting(browser, scheme="dark") as visit:
        page = visit.open(f"{sites['root']}/sagas/{many.named['exhausted 0']}")
        page.emulate_media(media="print")
        assert not page.locator("nav[aria-label=Pages]").is_visible()
        assert page.locator(".timeline svg").is_visible()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        SCREENSHOTS.mkdir(exist_ok=True)
        page.pdf(path=SCREENSHOTS / "saga-on-paper.pdf", format="A4")
        assert visit.faults == []


def test_a_page_as_a_file(browser: Browser, file: Path) -> None:
    """A saga's page that stands alone looks the same, from wherever it lies."""
    with visiting(browser) as visit:
        page = visit.open(file.as_uri())
        assert page.locator(".verdict").evaluate("verdict => getComputedStyle(verdict).borderLeftWidth") == "4px"
        visit.keep("file")
        assert visit.faults_of_access() == []
        assert visit.faults == []
