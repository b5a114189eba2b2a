"""The rows of best-of-n in the results: from scored samples of SFT, with the KL exact where all responses are known."""

from __future__ import annotations

import math

import pytest

from toolkit.evals.best_of_n import best_of_n_kl
from toolkit.evals.intervals import DEFAULT_INTERVALS
from toolkit.measure.best_of_n import best_of_n_rows
from toolkit.preferences.samples import Sample
from toolkit.report.sheets import best_of_n_sheet, text_of


def sample(
    prompt: str, k: int, explicit: float, logp: float, *, policy: str = "sft", gold: float | None = 0.0
) -> Sample:
    return Sample(
        prompt_id=prompt,
        policy=policy,
        sample_index=k,
        response_ids=[round(explicit)],
        policy_logp=logp,
        explicit_reward=explicit,
        implicit_reward=-explicit,
        gold_reward=gold,
    )


def pools(logp: float = -9.0) -> list[Sample]:
    """Two prompts with three samples each, whose gold reward is the explicit one times ten."""
    rows = [sample(p, k, value, logp, gold=10 * value) for p in "ab" for k, value in enumerate((1.0, 2.0, 3.0))]
    return [*rows, sample("a", 0, 99.0, -1.0, policy="dpo")]


def test_each_reward_picks_and_each_measures() -> None:
    rows = best_of_n_rows(pools(), DEFAULT_INTERVALS)
    assert len(rows) == 2 * 3 * 3  # picked by two, measured by three, n of 1, 2 and 3
    by = {(row["picked_by"], row["measured_by"], row["n"]): row for row in rows}
    assert by["explicit", "gold", 2]["value"] == pytest.approx((20 + 30 + 30) / 3)
    assert by["implicit", "gold", 3]["value"] == pytest.approx(10.0)  # it prefers the worst
    assert by["explicit", "implicit", 1]["value"] == pytest.approx(-2.0)
    assert (by["explicit", "gold", 2]["kl_nats"], by["explicit", "gold", 2]["kl_exact"]) == (best_of_n_kl(2), False)


def test_the_kl_is_exact_where_the_pool_holds_every_response() -> None:
    rows = best_of_n_rows(pools(math.log(1 / 3)), DEFAULT_INTERVALS)
    row = next(row for row in rows if row["picked_by"] == "explicit" and row["n"] == 2)
    best = [1 / 9, 3 / 9, 5 / 9]
    assert row["kl_exact"] and row["kl_nats"] == pytest.approx(sum(q * math.log(3 * q) for q in best))


def test_without_a_pool_or_a_reward_there_are_no_rows() -> None:
    assert best_of_n_rows([], DEFAULT_INTERVALS) == []
    assert best_of_n_rows([sample("a", 0, 1.0, -1.0)], DEFAULT_INTERVALS) == []
    without_gold = [sample("a", k, float(k), -9.0, gold=None) for k in range(2)]
    assert {row["measured_by"] for row in best_of_n_rows(without_gold, DEFAULT_INTERVALS)} == {"explicit", "implicit"}


def test_the_table_has_gold_where_that_is_known() -> None:
    text = text_of(best_of_n_sheet(best_of_n_rows(pools(), DEFAULT_INTERVALS), 0.95))
    lines = [line.split() for line in text.splitlines() if " gold " in line]
    assert [line[:3] for line in lines] == [[by, "gold", str(n)] for by in ("explicit", "implicit") for n in (1, 2, 3)]
    assert lines[0][3] == "20.000" and lines[1][-3:] == ["at", "most", "0.19"]
