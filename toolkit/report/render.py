"""A page from a template: its frame, filters, styles, scripts and figures. Nothing of it is asked from a server."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from toolkit.report.figures import Figure
from toolkit.report.names import PALETTE
from toolkit.report.numbers import (
    confidence_level,
    count,
    dollars,
    length_control_name,
    number,
    p_value,
    percent,
    probability,
)

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Body:
    """A part of the page that belongs to the views at these places."""

    places: list[int]
    html: Markup


def inline_scripts() -> list[str]:
    """The scripts that stand inside a page of ``duel watch``."""
    return [(HERE / name).read_text(encoding="utf-8") for name in ("page.js", "live.js")]


def plotly_script() -> str:
    """plotly.js as its package ships it."""
    return str(get_plotlyjs())


def typeset(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A number with a true minus sign. Empty for None."""
    return number(value, digits, sign=sign, absent="").replace("-", "\N{MINUS SIGN}")


def render(
    template: str,
    *,
    title: str,
    sections: Sequence[tuple[str, str]],
    figures: Iterable[Figure],
    live: str | None = None,
    samples: object = None,
    **values: Any,
) -> str:
    """A page of the frame ``frame.html.j2``. ``sections`` are (id, title), and ``values`` are for the template alone.

    With ``live``, a version, the page takes plotly.js from the server of ``duel watch``.
    """
    drawn = {figure.id: {"traces": figure.traces, "layout": figure.layout} for figure in figures}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "percent": partial(percent, absent=""),
        "number": typeset,
        "confidence": confidence_level,
        "count": partial(count, absent=""),
        "dollars": dollars,
        "p": partial(p_value, absent=""),
        "probability": partial(probability, absent=""),
        "length_control_name": length_control_name,
    }
    environment.globals["grouped"] = partial(_grouped, environment)
    return environment.get_template(template).render(
        title=title,
        sections=sections,
        palette=PALETTE,
        live=live,
        # These are our own files. What a model or a data set wrote goes through autoescape or embedded.
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        live_script=Markup((HERE / "live.js").read_text(encoding="utf-8")) if live is not None else "",
        plotly=Markup(plotly_script()) if drawn and live is None else "",
        figures=embedded({"figures": drawn, "palette": PALETTE}),
        samples=embedded(samples) if samples else "",
        **values,
    )


def _grouped(environment: jinja2.Environment, template: str, views: Sequence[Any], **values: Any) -> list[Body]:
    """What a template makes of each view, without empty ones; equal ones are one body of several views."""
    bodies: dict[str, list[int]] = {}
    for place, view in enumerate(views):
        html = environment.get_template(template).render(view=view, **values).strip()
        if html:
            bodies.setdefault(html, []).append(place)
    return [Body(places, Markup(html)) for html, places in bodies.items()]


def is_page(path: Path) -> bool:
    """Whether a file is a page that :func:`render` made."""
    with path.open("rb") as file:
        return b'<meta name="generator" content="duel">' in file.read(1000)


def embedded(value: object) -> Markup:
    """JSON that can neither end the script element around it nor open a comment in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
