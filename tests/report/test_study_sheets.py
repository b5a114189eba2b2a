"""A study's tables of text: the gap and what would decide, in 80 columns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from support.study_documents import CASES

from toolkit.report.sheets import Sheet, text_of
from toolkit.report.study_sheets import study_sheets


def by_title(document: dict[str, Any]) -> dict[str, Sheet]:
    return {sheet.title: sheet for sheet in study_sheets(document)}


@pytest.fixture(scope="module")
def better() -> dict[str, Any]:
    return CASES["better"]()


def test_the_steps_of_the_gap_add_up_to_its_first_row(better: dict[str, Any]) -> None:
    rows = by_title(better)["Where the gap comes from, win rate over DPO"].rows
    assert rows[0][0] == "all: DPO to RM + PPO"
    steps = [float(points) for label, points, *_ in rows if label.startswith("  ")]
    assert sum(steps) == pytest.approx(float(rows[0][1]), abs=0.06 * len(steps)) and len(steps) == 3
    [total] = (row for row in better["gap"] if (row["measure"], row["kind"]) == ("win_rate", "total"))
    bounds = f"{100 * total['ci_low']:+.1f} to {100 * total['ci_high']:+.1f}"
    assert rows[0][1:3] == (f"{100 * total['difference']:+.1f}", bounds)


def test_what_would_decide_is_there_where_it_is_known(better: dict[str, Any]) -> None:
    title = "What would decide"
    assert title not in by_title(better)  # all is decided
    document = copy.deepcopy(better)
    document["verdict"]["needed"]["best"] |= {"finding": "undecided", "n_prompts": 1234, "n_seeds": None}
    document["verdict"]["needed"]["matched_kl"] |= {"finding": "no practical difference"}
    assert by_title(document)[title].rows == [
        ("Best against best", "undecided", "1,234", "-"),
        ("At equal KL", "no difference", "-", "-"),
        ("At equal training tokens", "decided", "-", "-"),
    ]


def test_a_probability_is_never_certain(better: dict[str, Any]) -> None:
    document = copy.deepcopy(better)
    document["verdict"]["best"]["probability"], document["verdict"]["matched_kl"]["probability"] = 0.9999, 0.0001
    rows = next(sheet for title, sheet in by_title(document).items() if title.startswith("RM + PPO against DPO")).rows
    assert [row[-1] for row in rows[:2]] == [">0.99", "<0.01"]


@pytest.mark.parametrize("case", CASES)
def test_every_study_fits_a_terminal(case: str) -> None:
    lines = text_of(*study_sheets(CASES[case]())).splitlines()
    assert max(map(len, lines)) < 80
