"""A study's page in a real browser: every figure drawn, no error, no request, phone width, keyboard, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.study_documents import CASES

from toolkit.report.study_page import study_page

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, out = tmp_path_factory.mktemp("studies"), {}
    for name, made in CASES.items():
        out[name] = root / f"{name}.html"
        out[name].write_text(study_page(made(), name), encoding="utf-8")
    return out


@pytest.fixture
def opened(open_page: Any, pages: dict[str, Path]) -> Any:
    return lambda name, **options: open_page(pages[name].as_uri(), **options)


@pytest.mark.parametrize(
    ("name", "least", "width", "scheme"),
    [
        ("better", 7, 1440, "light"),
        ("better", 7, 390, "dark"),
        ("one seed", 7, 390, "light"),
        ("one trial", 1, 390, "dark"),
        ("no common KL", 5, 390, "light"),
        ("diverged", 7, 1440, "dark"),
        ("judges", 5, 390, "light"),
        ("untested", 5, 390, "dark"),
    ],
)
def test_every_figure_is_drawn_without_error_or_request(
    opened: Any, name: str, least: int, width: int, scheme: str
) -> None:
    view = opened(name, width=width, scheme=scheme)
    drawn, wanted = view.draw_everything()
    assert drawn == wanted >= least
    assert view.problems == [] and view.requests == []
    assert view.run("document.documentElement.scrollWidth <= innerWidth")


def test_the_keyboard_reaches_what_the_mouse_does(opened: Any) -> None:
    view = opened("better")
    view.page.keyboard.press("Tab")
    assert view.run("document.activeElement.className") == "skip"
    figure = view.page.locator("figure").first
    figure.scroll_into_view_if_needed()
    figure.locator(".main-svg").first.wait_for(state="attached")
    lines = "document.querySelector('figure').querySelectorAll('.scatterlayer .trace').length"
    before = view.run(lines)
    figure.get_by_role("button", name="DPO, each seed").focus()
    view.page.keyboard.press("Enter")
    view.page.wait_for_function(f"{lines} === {before - 1}")
    assert view.run("[...document.querySelectorAll('.scroll, pre')].every(n => n.tabIndex === 0)")
    assert view.run("[...document.querySelectorAll('[role=img]')].every(n => n.getAttribute('aria-label').length > 10)")


def test_each_line_of_a_legend_looks_like_its_own(opened: Any) -> None:
    view = opened("better")
    shown = "[...document.querySelectorAll('.keys')][0].querySelectorAll('button')"
    marks = view.run(f"[...{shown}].map(b => [b.textContent, b.firstChild.className, b.firstChild.style.color])")
    of_arms = {name: tuple(mark) for name, *mark in marks if name.startswith(("RM + PPO", "DPO"))}
    assert len(set(of_arms.values())) == len(of_arms) >= 8


def test_a_tick_at_the_right_edge_has_its_label(opened: Any) -> None:
    view = opened("better")
    view.draw_everything()
    shown = "[...n.querySelectorAll('.xtick text')].filter(t => getComputedStyle(t).display !== 'none')"
    ticks = (
        f"[...document.querySelectorAll('[data-figure]')].map(n => [n._fullLayout.xaxis._vals.length, {shown}.length])"
    )
    for wanted, drawn in view.run(ticks):
        assert drawn == wanted > 1


def test_print_draws_every_figure_in_the_light_scheme(opened: Any) -> None:
    view = opened("better", scheme="dark")
    view.run("dispatchEvent(new Event('beforeprint'))")
    view.page.wait_for_function(
        "[...document.querySelectorAll('[data-figure]')].every(n => n.querySelector('.main-svg'))"
    )
    assert view.run("document.querySelectorAll('details:not([open])').length") == 0
    view.page.emulate_media(media="print")  # which draws no background where a colour is not asked for exactly
    colours = "[...document.querySelectorAll('.key, .swatch')].map(n => getComputedStyle(n).printColorAdjust)"
    assert set(view.run(colours)) == {"exact"}
    assert view.run("document.querySelector('[data-figure] .js-line').style.stroke").startswith("rgb(178, 72, 11)")
