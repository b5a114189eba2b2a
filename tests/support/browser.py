"""A real browser for the tests of pages, with what went wrong on a page."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium under playwright; tests skip where either is missing.

    For one module: while playwright is open, an event loop runs in the thread of the tests, and nobody else can start
    one there.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium on this machine (Debian: apt install chromium)")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=chromium, args=FLAGS)
        yield launched
        launched.close()


class Opened:
    """A page, what went wrong on it (``problems``), and what it asked for besides itself (``requests``)."""

    def __init__(self, browser: Any, address: str, *, width: int, scheme: str) -> None:
        self.page = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True
        )  # what a test evaluates is no script of the page
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: self.problems.append(dialog.message))
        own = (address, "data:", "blob:")
        self.page.on("request", lambda r: None if r.url.startswith(own) else self.requests.append(r.url))
        self.page.goto(address)
        self.page.add_style_tag(content="html { scroll-behavior: auto !important; }")

    def run(self, script: str) -> Any:
        return self.page.evaluate(script)

    def draw_everything(self) -> tuple[int, int]:
        """(drawn, all) figures after scrolling through the page."""
        figures = self.page.locator("[data-figure]")
        for index in range(figures.count()):
            figures.nth(index).scroll_into_view_if_needed()
            figures.nth(index).locator(".main-svg").first.wait_for(state="attached", timeout=10_000)
        # A figure without a single mark would be an empty frame.
        marks = "n => n.querySelectorAll('.scatterlayer .points path, .scatterlayer .js-line').length > 0"
        return self.run(f"[...document.querySelectorAll('[data-figure]')].filter({marks}).length"), figures.count()

    def prompts(self) -> list[str]:
        return self.run("[...document.querySelectorAll('.row')].map(n => n.dataset.prompt)")


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Opened]]:
    """``open_page(address, width=, scheme=)``; the pages are closed behind the test."""
    made: list[Opened] = []

    def open_one(address: str, *, width: int = 1440, scheme: str = "light") -> Opened:
        made.append(Opened(browser, address, width=width, scheme=scheme))
        return made[-1]

    yield open_one
    for view in made:
        view.page.close()
