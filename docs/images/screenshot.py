"""The picture of a report for the README.

usage: python docs/images/screenshot.py RUN/report.html docs/images/report.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTH = 1440
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def take(report: Path, picture: Path) -> None:
    """The page down to its win rates, in the light scheme."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=ARGUMENTS)
        page = browser.new_page(viewport={"width": WIDTH, "height": 1600}, color_scheme="light")
        page.goto(report.resolve().as_uri())
        below = page.locator("#frontier").bounding_box()
        assert below is not None
        page.screenshot(path=picture, clip={"x": 0, "y": 0, "width": WIDTH, "height": below["y"]})
        browser.close()


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
