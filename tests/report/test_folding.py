"""Tables of text that fit the terminal."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from toolkit.report.folding import NARROWEST, folded, terminal_width
from toolkit.report.sheets import Sheet, text_of

CELLS = st.text(alphabet="ab /界é[]0.9%-", max_size=60).map(lambda text: " ".join(text.split()))
HEADINGS = st.sampled_from(["win rate", "95% interval", "length-controlled, by length alone", "p", "against", ""])


@st.composite
def tables(draw: st.DrawFn) -> Sheet:
    n = draw(st.integers(1, 9))
    sheet = Sheet("T", draw(st.lists(HEADINGS, min_size=n, max_size=n)), n_keys=draw(st.integers(1, min(3, n))))
    for cells in draw(st.lists(st.lists(CELLS, min_size=n, max_size=n), max_size=4)):
        sheet.add_row(*cells)
    return sheet


@settings(deadline=None, max_examples=60)
@given(tables())
def test_no_row_is_wider_than_the_terminal_and_no_text_is_lost(sheet: Sheet) -> None:
    text = text_of(sheet, width=80)
    rows = [line for line in text.splitlines()[1:] if " is " not in line]
    assert all(cell_len(line) <= 80 for line in rows)
    assert all(cell in text for row in sheet.rows for cell in row)


def test_a_table_that_fits_stays_whole() -> None:
    assert folded("T", ["policy", "p"], [["dpo", "0.5"]], 1, 80).splitlines() == ["T", "policy    p", "dpo     0.5"]


def test_wide_tables_fold_at_their_columns_and_an_interval_stays_with_its_value() -> None:
    columns = ["policy", "judge", "win rate", "95% interval", "length-controlled, by length alone", "95% interval", "p"]
    rows = [[f"runs/{arm}", "gold", "50.0%", "40.0% to 60.0%", "51.0%", "41.0% to 61.0%", "0.5"] for arm in "ab"]
    title, *lines = folded("Win rates", columns, rows, 2, 50).splitlines()
    assert title == "Win rates (judge gold)"  # what all rows share
    first, second = "\n".join(lines).split("\n\n")
    assert re.findall(r"\S+%|to", first.splitlines()[-1]) == ["50.0%", "40.0%", "to", "60.0%"]
    assert second.splitlines()[-1].split() == ["runs/b", "51.0%", "41.0%", "to", "61.0%"]
    assert first.splitlines()[-1].startswith("runs/b ")


def test_intervals_that_have_no_room_beside_their_value_stand_below_it() -> None:
    columns, cells = ["policy", "win rate", *["95% interval"] * 3], ["a", *["9" * 25] * 4]
    text = folded("T", columns, [cells], 1, 80)
    assert all(len(line) <= 80 for line in text.splitlines()) and text.count("9" * 25) == 4


def test_long_names_are_shortened_apart_and_named_in_full_below() -> None:
    names = [f"/data/{'x' * 60}/{k}/{'y' * 60}" for k in range(3)]
    *_, a, b, c = folded("T", ["policy", "win rate"], [[name, "50.0%"] for name in names], 1, 40).splitlines()
    shown = [line.split(" is ") for line in (a, b, c)]
    assert [full for _, full in shown] == names and len({short for short, _ in shown}) == 3


def test_the_width_is_the_terminal_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "132")
    assert terminal_width() == 132
    monkeypatch.setenv("COLUMNS", "20")
    assert terminal_width() == NARROWEST
