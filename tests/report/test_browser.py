"""The report in a real browser: figures, search, filters, keyboard, hostile samples, and no request at all."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.run_folder import HOSTILE, write_run

from toolkit.files import write_table
from toolkit.report.page import build

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports on disk: a hostile run, one without gold, a long one, and several of them on one page."""
    root = tmp_path_factory.mktemp("reports")
    hostile = write_run(root / "first", hostile=True, checkpoints=3)
    no_gold = write_run(root / "second", gold=False, seed=1)
    long = write_run(root / "long", n_prompts=200, checkpoints=1, judge_names=("gold",))
    made = {"hostile": [hostile], "no_gold": [no_gold], "two": [hostile, no_gold], "long": [long]}
    made["three"] = [hostile, no_gold, long]
    made["huge"] = [repeated(long, root / "huge", 5_000)]
    out = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("toolkit.report.page.LARGEST", 20_000_000)  # so many rows do not fit into a page's size
        for name, folders in made.items():
            out[name] = root / f"{name}.html"
            out[name].write_text(build(folders, title=None, max_samples=5_000), encoding="utf-8")
    return out


def repeated(run: Path, target: Path, n_prompts: int) -> Path:
    """A copy of the run whose samples and judgements are repeated under new prompts until there are so many."""
    shutil.copytree(run, target)
    for name in ("samples", "judgements"):
        rows = pq.read_table(run / f"{name}.parquet").to_pylist()
        times = range(n_prompts // len({row["prompt_id"] for row in rows}))
        more = [{**row, "prompt_id": f"{k}-{row['prompt_id']}"} for k in times for row in rows]
        write_table(more, target / f"{name}.parquet")
    return target


@pytest.fixture
def opened(open_page, pages) -> Any:
    return lambda name, **options: open_page(pages[name].as_uri(), **options)


def rows_of(path: Path) -> list[dict[str, Any]]:
    match = re.search(r'id="sample-data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None
    return json.loads(match.group(1))["rows"]


@pytest.mark.parametrize(
    ("name", "least", "width", "scheme"),
    [
        ("hostile", 20, 390, "light"),
        ("no_gold", 20, 1440, "dark"),
        ("two", 20, 1440, "light"),
        ("two", 20, 390, "dark"),
    ],
)
def test_every_figure_is_drawn_without_error_or_request(opened, name, least, width, scheme):
    view = opened(name, width=width, scheme=scheme)
    drawn, wanted = view.draw_everything()
    assert drawn == wanted >= least
    assert view.problems == [] and view.requests == []
    assert view.run("document.documentElement.scrollWidth <= innerWidth")


def test_every_figure_is_drawn_without_scrolling_so_that_a_capture_of_the_page_has_them_all(opened):
    view = opened("hostile")
    wanted = view.run("document.querySelectorAll('[data-figure]').length")
    view.page.wait_for_function(f"document.querySelectorAll('[data-figure] .main-svg:first-child').length >= {wanted}")
    assert view.run("scrollY") == 0 and view.problems == []


def test_on_a_phone_what_the_arms_differ_in_is_as_wide_as_the_page(opened):
    view = opened("hostile", width=390)
    table = "document.querySelector('table.differences')"
    assert view.run(f"{table}.parentElement.scrollWidth <= {table}.parentElement.clientWidth")
    widths = view.run(f"[...{table}.querySelectorAll('tbody th')].map(n => n.getBoundingClientRect().width)")
    assert len(widths) > 3 and min(widths) > 340
    arms = view.run(f"[...{table}.querySelectorAll('tbody td')].map(n => getComputedStyle(n, '::before').content)")
    assert arms[:3] == ['"RM + PPO: "', '"DPO: "', "none"]
    assert view.run(f"{table}.getBoundingClientRect().height") < 90 * len(widths)


@pytest.mark.parametrize("name", ["hostile", "two", "three"])
def test_win_rates_and_policies_need_no_scrolling_on_a_small_laptop(opened, name):
    view = opened(name, width=1200)
    wide = "[...document.querySelectorAll('.scroll')].filter(n => n.scrollWidth > n.clientWidth + 1)"
    assert set(view.run(f"{wide}.map(n => n.ariaLabel)")) <= {"within prompts"}


@pytest.mark.parametrize("width", [1440, 390])
def test_hostile_samples_do_no_harm(opened, width):
    view = opened("hostile", width=width)
    view.draw_everything()
    assert view.run("window.harmed") is None and view.problems == []
    assert view.run("document.querySelectorAll('#samples img, #samples svg, #samples script').length") == 0
    texts = view.run("[...document.querySelectorAll('.row')].map(n => n.querySelector('.text').textContent)")
    assert texts[: len(HOSTILE)] == [text or "(empty)" for text in HOSTILE]
    assert view.run("document.documentElement.scrollWidth <= innerWidth")
    assert view.run("getComputedStyle(document.querySelectorAll('.row')[4].querySelector('.text')).unicodeBidi") == (
        "plaintext"
    )
    long = view.page.locator(".row").nth(5)
    folded = long.bounding_box()["height"]
    long.get_by_role("button", name="Show in full").click()
    assert long.bounding_box()["height"] > 3 * folded
    assert long.get_by_role("button", name="Fold").get_attribute("aria-expanded") == "true"


def test_search_finds_and_marks(opened, pages):
    view = opened("long")
    rows = rows_of(pages["long"])
    word = "honest bright"
    wanted = [r["id"] for r in rows if any(word in s[0] for cell in r["cells"] for s in cell) or word in r["prompt"]]
    assert 0 < len(wanted) < len(rows)
    view.page.get_by_role("searchbox").fill("Honest BRIGHT")
    view.page.wait_for_function(
        f"document.getElementById('sample-count').textContent.startsWith('{len(wanted)} of 200')"
    )
    assert view.prompts() == wanted[:30]
    marked = view.run("[...document.querySelectorAll('mark')].map(n => n.textContent)")
    assert marked and set(marked) == {word}
    view.page.get_by_role("searchbox").fill("no such text anywhere")
    view.page.wait_for_function("document.querySelectorAll('.row').length === 0")
    assert "0 of 200" in view.page.locator("#sample-count").inner_text()
    view.page.get_by_role("searchbox").fill("")
    view.page.wait_for_function("document.getElementById('sample-count').textContent === '200 prompts'")


def test_filters_and_order(opened, pages):
    view = opened("hostile")
    rows = rows_of(pages["hostile"])
    for flag, label in (
        ("rewards", "rewards disagree"),
        ("gold", "gold contradicts"),
        ("judges", "judges disagree"),
        ("truncated", "is truncated"),
    ):
        box = view.page.get_by_label(re.compile(label))
        box.check()
        wanted = [row["id"] for row in rows if flag in row["flags"]]
        assert 0 < len(wanted) < len(rows) and view.prompts() == wanted
        box.uncheck()
    for key, label in (("explicit", "largest explicit margin"), ("longest", "longest response")):
        view.page.locator("#sample-order").select_option(label=label)
        assert view.prompts() == [row["id"] for row in sorted(rows, key=lambda row: -row[key])]
    view.page.get_by_role("checkbox", name="base").uncheck()
    heads = view.run("[...document.querySelector('.row').querySelectorAll('h4')].map(n => n.textContent)")
    assert heads == ["RM + PPO", "DPO", "SFT", "best of 4 by RM", "best of 4 by implicit"]


def test_all_rows_come_while_scrolling(opened):
    view = opened("long")
    assert len(view.prompts()) == 30
    for _ in range(40):
        view.run("scrollTo(0, document.documentElement.scrollHeight)")
        view.page.wait_for_timeout(50)
        if len(view.prompts()) == 200:
            break
    assert len(set(view.prompts())) == 200 and view.page.locator("#sample-more").is_hidden()


def test_five_thousand_rows_scroll_search_and_filter(opened, pages):
    view = opened("huge")
    rows = rows_of(pages["huge"])
    assert len(rows) == 5_000
    for _ in range(400):
        view.run("scrollTo(0, document.documentElement.scrollHeight)")
        if view.page.locator("#sample-more").is_hidden():
            break
        view.page.wait_for_timeout(20)
    assert view.run("document.querySelectorAll('.row').length") == 5_000
    # With every row on the page, a screen is still painted at once: rows out of sight cost nothing.
    frame = "new Promise((done) => { const t = performance.now(); scrollBy(0, -5000); "
    frame += "requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - t))); })"
    assert sorted(view.run(frame) for _ in range(5))[2] < 1_000
    view.page.get_by_label(re.compile("is truncated")).check()
    wanted = [row["id"] for row in rows if "truncated" in row["flags"]]
    view.page.wait_for_function(f"document.getElementById('sample-count').textContent.startsWith('{len(wanted):,} of')")
    assert 0 < len(wanted) < 5_000 and view.prompts() == wanted[:30] and view.problems == []
    view.page.get_by_role("searchbox").fill("no such text anywhere")
    view.page.wait_for_function("document.querySelectorAll('.row').length === 0")


def test_the_keyboard_reaches_what_the_mouse_does(opened):
    view = opened("no_gold")
    view.page.keyboard.press("Tab")
    assert view.run("document.activeElement.className") == "skip"
    figure = view.page.locator("figure").first
    figure.scroll_into_view_if_needed()
    figure.locator(".main-svg").first.wait_for(state="attached")
    lines = "document.querySelector('figure').querySelectorAll('.scatterlayer .trace').length"
    before = view.run(lines)
    button = figure.get_by_role("button", name="RM + PPO")
    button.focus()
    view.page.keyboard.press("Enter")
    view.page.wait_for_function(f"{lines} === {before - 1}")
    assert button.get_attribute("aria-pressed") == "false"
    assert view.run("[...document.querySelectorAll('.scroll, pre')].every(n => n.tabIndex === 0)")
    assert view.run("[...document.querySelectorAll('[role=img]')].every(n => n.getAttribute('aria-label').length > 10)")


def test_a_run_is_switched_off_in_every_figure_and_a_line_in_its_figure_for_all_runs(opened):
    view = opened("two")
    view.draw_everything()
    lines = "[...document.querySelectorAll('figure')].map(n => n.querySelectorAll('.scatterlayer .trace').length)"
    before = view.run(lines)
    explicit = 1  # the frontier of the explicit reward, which both runs have
    key = view.page.locator("#frontier .run-keys button", has_text="second")
    key.click()
    view.page.wait_for_function(f"{lines}[{explicit}] < {before[explicit]}")
    pressed = view.run("[...document.querySelectorAll('[data-run=second]')].map(n => n.ariaPressed)")
    assert len(pressed) > 3 and set(pressed) == {"false"}
    assert sum(after < all_of for after, all_of in zip(view.run(lines), before, strict=True)) > 10
    key.click()
    view.page.wait_for_function(f"{lines}[{explicit}] === {before[explicit]}")
    view.page.locator("figure").nth(explicit).get_by_role("button", name="DPO").click()
    view.page.wait_for_function(f"{lines}[{explicit}] === {before[explicit] - 2}")
    after = view.run(lines)
    assert [k for k, n in enumerate(after) if n != before[k]] == [explicit] and view.problems == []


def test_of_many_runs_the_tables_of_one_are_shown_at_a_time(opened):
    view = opened("three")
    headings = (
        "[...document.querySelectorAll('#verdict .run-name')].filter(n => n.offsetHeight).map(n => n.textContent)"
    )
    assert view.run(headings) == ["first"]
    view.page.get_by_label("Tables and text of").select_option(label="long")
    assert view.run(headings) == ["long"]
    view.page.get_by_label("Tables and text of").select_option(label="all runs")
    assert view.run(headings) == ["first", "second", "long"]


def test_a_change_of_scheme_redraws_the_figures(opened):
    view = opened("no_gold")
    figure = view.page.locator("[data-figure]").first
    figure.scroll_into_view_if_needed()
    figure.locator(".js-line").first.wait_for(state="attached")
    stroke = "document.querySelector('[data-figure] .js-line').style.stroke"
    assert view.run(stroke) == "rgb(178, 72, 11)"
    view.page.emulate_media(color_scheme="dark")
    view.page.wait_for_function(f"{stroke} === 'rgb(240, 147, 85)'")


def test_print_draws_every_figure_and_row_in_the_light_scheme(opened):
    view = opened("long", scheme="dark")
    view.run("dispatchEvent(new Event('beforeprint'))")
    view.page.wait_for_function(
        "[...document.querySelectorAll('[data-figure]')].every(n => n.querySelector('.main-svg'))"
    )
    assert len(view.prompts()) == 200
    assert view.run("document.querySelectorAll('details:not([open])').length") == 0
    assert view.run("document.querySelector('[data-figure] .js-line').style.stroke") == "rgb(178, 72, 11)"
    view.page.set_viewport_size({"width": 500, "height": 900})  # the paper is not as wide as the window
    view.page.emulate_media(media="print")
    inside = "n.querySelector('.main-svg').getBoundingClientRect().width <= n.getBoundingClientRect().width + 1"
    assert view.run(f"[...document.querySelectorAll('[data-figure]')].every(n => {inside})")
    assert view.run("[...document.querySelectorAll('.main-svg')].every(n => n.hasAttribute('viewBox'))")
    view.page.emulate_media(media="screen")
    view.run("dispatchEvent(new Event('afterprint'))")
    assert view.run("document.querySelectorAll('main details[open]').length") == 0
