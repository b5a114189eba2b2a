"""A report, and what stands in its parts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from toolkit.report import page as page_module

ALL_SECTIONS = [
    *("verdict", "win-rates", "frontier", "overoptimization", "agreement", "quality", "drift", "lengths", "training"),
    *("cost", "settings", "reproduction", "samples"),
]


def build(*folders: Path, title: str | None = None, max_samples: int | None = 500) -> str:
    return page_module.build(folders, title=title, max_samples=max_samples)


def sections(html: str) -> list[str]:
    return re.findall(r'<section id="([^"]+)"', html)


def data_of(html: str, name: str) -> Any:
    match = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', html, re.DOTALL)
    assert match is not None
    return json.loads(match.group(1))


def without_plotly(html: str) -> str:
    return html.replace(get_plotlyjs(), "")


def text_of(html: str, section: str) -> str:
    body = html.split(f'<section id="{section}"')[1].split("</section>")[0]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def warnings_of(html: str) -> str:
    """The list of warnings, which stands in the verdict."""
    verdict = html.split('<section id="verdict"')[1].split("</section>")[0]
    return verdict.split('aria-label="Warnings">')[1].split("</ul>")[0]
