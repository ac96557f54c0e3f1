"""The pages in a real browser: Chromium as the system has it, without a window, and servers for it to look at."""

import asyncio
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
import uvicorn
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Dialog, Page, Request, sync_playwright
from starlette.types import ASGIApp

SCREENSHOTS = Path(__file__).parent.parent / ".screenshots"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
# Chromium keeps to itself, and needs neither a display nor an unprivileged user.
_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_AXE = files("axe_playwright_python").joinpath("axe.min.js")
# What the policy refuses is reported to the page, which would otherwise keep it to itself.
_WATCH = """
addEventListener("securitypolicyviolation", refused =>
    console.error(refused.violatedDirective + ": " + refused.blockedURI))
"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run the system's Chromium; where there is none, skip, except in CI."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        lacking = "there is no Chromium on PATH; on Debian: apt-get install chromium"
        if os.environ.get("SAGA_STORE_TEST_CHROMIUM") == "required":
            pytest.fail(lacking)
        pytest.skip(lacking)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=_ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def served(apps: Mapping[str, ASGIApp], *, lifespan: Literal["on", "off"] = "off") -> Iterator[dict[str, str]]:
    """Serve apps on loopback from a thread, each on a port of its own, and yield their addresses."""
    servers = {
        name: uvicorn.Server(uvicorn.Config(app, port=0, lifespan=lifespan, log_config=None, access_log=False))
        for name, app in apps.items()
    }

    async def serve() -> None:
        await asyncio.gather(*(server._serve() for server in servers.values()))  # noqa: SLF001 - without its signals

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        while not all(server.started for server in servers.values()):
            thread.join(0.01)
            assert thread.is_alive()
        yield {
            name: f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
            for name, server in servers.items()
        }
    finally:
        for server in servers.values():
            server.should_exit = True
        thread.join()


@dataclass
class Visit:
    """A page in the browser, and whatever goes wrong in it."""

    page: Page
    name: str
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.add_init_script(_WATCH)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("dialog", self._dialog)
        self.page.on("request", self._request)

    def open(self, url: str, *, status: int = 200) -> Page:
        self.own = urlsplit(url).netloc
        response = self.page.goto(url)
        assert response is None or response.status == status or url.startswith("file:"), response.status
        assert self.faults == []
        return self.page

    def faults_of_access(self) -> list[str]:
        """Return what axe finds that keeps people from a page, with where it found it."""
        self.page.evaluate(_AXE.read_text(encoding="utf-8"))
        found: dict[str, Any] = self.page.evaluate("axe.run({resultTypes: ['violations']})")
        return [
            f"{violation['impact']} {violation['id']}: {node['html'][:200]}"
            for violation in found["violations"]
            for node in violation["nodes"]
        ]

    def keep(self, what: str, *, whole: bool = True) -> None:
        """Keep a picture of it."""
        SCREENSHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{what}-{self.name}.png", full_page=whole)

    def _console(self, message: ConsoleMessage) -> None:
        # The browser says so of each page that isn't found, which is what was asked for.
        if message.type in {"error", "warning"} and "Failed to load resource" not in message.text:
            self.faults.append(message.text)

    def _dialog(self, dialog: Dialog) -> None:
        self.faults.append(f"a dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, request: Request) -> None:
        if urlsplit(request.url).netloc != self.own:
            self.faults.append(f"asks elsewhere: {request.url}")


@contextmanager
def visiting(browser: Browser, *, size: str = "desktop", scheme: str = "light") -> Iterator[Visit]:
    width, height = SIZES[size]
    context: BrowserContext = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
        is_mobile=size == "phone",
    )
    yield Visit(context.new_page(), f"{size}-{scheme}")
    context.close()
