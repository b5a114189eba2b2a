"""Tables for a terminal: what a reader gets where names are paths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from toolkit.cli.tables import judging_tables
from toolkit.judging import win_rates
from toolkit.judging.records import Judgement
from toolkit.report.run_sheets import sweep_sheet
from toolkit.report.sheets import missing_estimates


def tables(*policies: str) -> str:
    rng = np.random.default_rng(0)
    rows = [
        Judgement(f"p{k}", a, b, "gold", float(rng.random() < 0.6))
        for k in range(20)
        for i, a in enumerate(policies)
        for b in policies[i + 1 :]
    ]
    return judging_tables(win_rates.report(rows, seed=0, n_resamples=50))


def test_policies_are_named_from_the_folder_that_they_share() -> None:
    text = tables("/home/me/runs/first/dpo/model", "/home/me/runs/first/ppo/model", "/home/me/runs/second/ppo/model")
    lines = text.splitlines()
    assert lines[0] == "Policies in /home/me/runs"
    assert any(line.split()[:2] == ["first/dpo/model", "first/ppo/model"] for line in lines)
    assert "Bradley-Terry" in text and any(line.startswith("second/ppo/model") for line in lines)
    assert text.count("/home/me") == 1


@pytest.mark.parametrize(
    "policies",
    [("runs/a/model", "tiny"), ("/a/m", "b/m"), ("ppo", "dpo"), ("/runs/a", "/runs/a/b"), ("org/a", "org/b")]
    + [("/runs/a", "/runs/a/")],
)
def test_names_without_a_common_folder_stay(policies: tuple[str, ...]) -> None:
    text = tables(*policies)
    assert "Policies in" not in text and all(policy in text for policy in policies)


def test_a_sweep_shows_the_rates_of_the_judge_that_decides() -> None:
    def point(judge: str | None, judges: dict[str, float]) -> dict[str, Any]:
        rates = {"rm": {"win_rate": 0.9}, "gold": {"win_rate": 0.6}, "llm:m": {"win_rate": 0.4}}
        frontier = [{"policy": arm, "kl_nats": 1.0, "win_rate_over_sft": rates} for arm in ("rm_ppo", "dpo")]
        verdict = {"judge": judge, "judges": judges, "winner": "undecided"}
        return {"settings": {"dpo.beta": "0.1"}, "frontier": frontier, "verdict": verdict}

    rows = [point("gold", {"gold": 0.5}), point("rm", {}), point("all judges", {"gold": 0.5, "llm:m": 0.5})]
    shown = [row[1:4] for row in sweep_sheet(rows).rows]
    assert shown == [("60.0%", "60.0%", "gold"), ("-", "-", "-"), ("50.0%", "50.0%", "mean of gold, llm:m")]


def judged(*lengths: tuple[int, int]) -> list[Judgement]:
    rng = np.random.default_rng(1)
    return [
        Judgement(f"p{k}", "a", "b", "gold", float(rng.random() < 0.6), policy_length=x, baseline_length=y)
        for k, (x, y) in enumerate(lengths)
    ]


def test_a_length_controlled_rate_has_its_interval_and_its_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    rng = np.random.default_rng(2)
    report = win_rates.report(
        judged(*rng.integers(100, 200, (60, 2)).tolist()), controls=win_rates.Controls(length=True), n_resamples=100
    )
    [row] = report["win_rates"]
    text = judging_tables(report)
    assert "length-controlled, by length alone" in text and "note:" not in text
    assert f"{row['lc_win_rate']:.1%}  {row['lc_ci_low']:.1%} to {row['lc_ci_high']:.1%}" in text
    report["win_rates"] = [{**row, "lc_variant": "alpaca_eval"}]
    assert "length-controlled, with AlpacaEval's table" in judging_tables(report)


def test_without_a_length_controlled_rate_the_reason_is_said() -> None:
    report = win_rates.report(judged(*[(450, 95)] * 60), controls=win_rates.Controls(length=True), n_resamples=100)
    [row] = report["win_rates"]
    assert row["lc_win_rate"] is None
    text = " ".join(judging_tables(report).split())
    assert f"note: no length-controlled win rate: {row['lc_reason']} (a against b, judge gold)" in text
    assert "by length alone" not in text
    assert "length-controlled" not in judging_tables(win_rates.report(judged(*[(450, 95)] * 60), n_resamples=100))


def test_a_reason_that_is_missing_for_both_controls_is_said_once() -> None:
    row = {"policy": "a", "baseline": "b", "judge": "gold"}
    rows = [{**row, "lc_reason": "too few", "sc_reason": "too few"}, {**row, "policy": "c", "sc_reason": "one side"}]
    assert missing_estimates(rows) == [
        "no length-controlled and no style-controlled win rate: too few (a against b, judge gold)",
        "no style-controlled win rate: one side (c against b, judge gold)",
    ]
