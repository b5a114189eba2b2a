"""Parts of the page by themselves: tables, figures, the browser of samples."""

from __future__ import annotations

import json
import re

import pyarrow.parquet as pq
import pytest
from support.report_page import build, text_of

from toolkit.report import plots, reading, render, sample_browser, tables
from toolkit.report.names import policy_name

GOLD_OVER_SFT = ("rm_ppo", "sft", "gold")


def test_flags_of_the_samples(run):
    browser = sample_browser.browser([reading.read_run(run)], 500)
    assert browser is not None
    table = {(row["policy"], row["prompt_id"]): row for row in pq.read_table(run / "samples.parquet").to_pylist()}
    judged = [row for row in pq.read_table(run / "judgements.parquet").to_pylist() if row["baseline"] == "dpo"]
    seen = set()
    for row in browser["rows"]:
        a, b = table["rm_ppo", row["id"]], table["dpo", row["id"]]
        explicit, implicit, gold = (a[f"{k}_reward"] - b[f"{k}_reward"] for k in ("explicit", "implicit", "gold"))
        assert row["explicit"] == pytest.approx(abs(explicit), abs=2e-3)
        assert ("rewards" in row["flags"]) == (explicit * implicit < 0)
        assert ("gold" in row["flags"]) == (explicit * gold < 0)
        finals = [s for (name, prompt), s in table.items() if prompt == row["id"] and "@" not in name]
        assert ("truncated" in row["flags"]) == any(s["truncated"] for s in finals)
        assert row["longest"] == max(s["n_tokens"] for s in finals)
        preferences = {
            j["judge"]: j["preference"] for j in judged if j["prompt_id"] == row["id"] and j["preference"] is not None
        }
        assert {judge: preference for _, judge, preference in row["judged"]} == preferences
        assert ("judges" in row["flags"]) == ({0.0, 1.0} <= set(preferences.values()))
        seen |= set(row["flags"])
    assert seen == {"rewards", "gold", "judges", "truncated"}
    assert [c["policy"] for c in browser["columns"]][:4] == ["rm_ppo", "dpo", "sft", "base"]


def test_what_judges_took(run):
    cost = text_of(build(run), "cost")
    assert "openai:judge 96 2 52,000 1,200 30,700 tokens, $0.08 $0.15" in cost


def test_only_sure_rates_are_bold(run):
    loaded = reading.read_run(run)
    for row in loaded.results["win_rates"]:
        if (row["policy"], row["baseline"]) == GOLD_OVER_SFT[:2]:  # by a judge that may decide, and by a signal
            row |= {"ci_low": 0.6, "ci_high": 0.8, "holm_p": 0.01, "lc_ci_low": 0.55, "lc_ci_high": 0.8}
    rows = tables.win_rates(loaded)
    assert {row.sure for row in rows} == {True, False}
    for row in rows:
        rate = row.rate
        planned = row.against == "DPO" and rate["judge"] == loaded.results["verdict"]["judge"]
        tested = not row.signal and rate["p_value" if planned else "holm_p"] <= 0.05
        assert row.sure == (tested and not rate["ci_low"] <= 0.5 <= rate["ci_high"])
        known = rate["lc_ci_low"] is not None
        assert row.lc_sure == (row.sure and known and not rate["lc_ci_low"] <= 0.5 <= rate["lc_ci_high"])


def test_neither_an_interval_alone_nor_a_judge_that_failed_its_test_makes_a_rate_bold(run):
    loaded = reading.read_run(run)
    (row,) = (r for r in loaded.results["win_rates"] if (r["policy"], r["baseline"], r["judge"]) == GOLD_OVER_SFT)
    row |= {"win_rate": 0.625, "ci_low": 0.517, "ci_high": 0.746, "holm_p": 0.02}

    def bold() -> bool:
        return next(r.sure for r in tables.win_rates(loaded) if r.rate is row)

    assert bold()
    row["holm_p"] = 0.052
    assert not bold()
    row["holm_p"] = 0.02
    loaded.results["judge_tests"] = [{"judge": "gold", "passed": False}]
    assert not bold()
    loaded.results["judge_tests"] = []
    loaded.results["verdict"] |= {"judges": {}, "judge": "gold"}  # it compared the arms, and is not independent
    assert not bold()


def test_the_row_of_all_judges_stands_among_the_win_rates(copy):
    results = json.loads((copy / "results.json").read_text())
    results["verdict"] |= {"judge": "all judges", "win_rate": 0.618, "ci_low": 0.512, "ci_high": 0.701}
    (copy / "results.json").write_text(json.dumps(results))
    html = build(copy)
    assert "all judges 61.8% 51.2 to 70.1" in re.sub(r" (loses|wins|½)", "", text_of(html, "win-rates"))
    assert "61.8%" in text_of(html, "verdict") and "None" not in text_of(html, "win-rates")
    [row] = [row.rate for row in tables.win_rates(reading.read_run(copy)) if row.rate["judge"] == "all judges"]
    assert row["n_failed"] is row["n_tied"] is None  # the verdict does not say


def test_margins_are_turned_and_capped(run, monkeypatch):
    loaded = reading.read_run(run)
    (whole,) = plots.margins(loaded)
    points = [(x, y) for trace in whole.traces for x, y in zip(trace["x"], trace["y"], strict=True)]
    assert len(points) == 24 * 6 and all(x >= 0 for x, _ in points)
    shown = json.loads((run / "results.json").read_text())["implicit_vs_explicit"]["held_out"]["agreement"]["value"]
    assert sum(y > 0 for _, y in points) / len(points) == pytest.approx(shown)
    monkeypatch.setattr(plots, "MAX_POINTS", 50)
    (capped,) = plots.margins(loaded)
    assert sum(len(trace["x"]) for trace in capped.traces) == 48
    assert "One pair in 3 of 144" in capped.note


def test_the_frontier_starts_at_sft_and_follows_training(run):
    gold = next(figure for figure in plots.frontier(reading.read_run(run)) if figure.name == "frontier-gold_reward")
    ppo = next(trace for trace in gold.traces if trace["name"] == "RM + PPO")
    rows = {row["policy"]: row for row in json.loads((run / "results.json").read_text())["policies"]}
    order = ["sft", "rm_ppo@10", "rm_ppo@20", "rm_ppo"]
    assert ppo["x"] == [rows[name]["kl_nats"] for name in order]
    assert ppo["y"] == [rows[name]["gold_reward"]["value"] for name in order]
    high = rows["rm_ppo"]["gold_reward"]["ci_high"] - rows["rm_ppo"]["gold_reward"]["value"]
    assert ppo["error_y"]["array"][-1] == pytest.approx(high)
    assert "step 10" in ppo["text"][1] and "nats" in ppo["text"][1]
    last = rows["rm_ppo"]  # both bars are intervals
    bars = (ppo["error_x"]["array"][-1], ppo["error_x"]["arrayminus"][-1])
    assert bars == pytest.approx((last["kl_ci_high"] - last["kl_nats"], last["kl_nats"] - last["kl_ci_low"]))
    assert f"KL {last['kl_nats']:.2f} ({last['kl_ci_low']:.2f} to {last['kl_ci_high']:.2f}) nats" in ppo["text"][-1]


@pytest.mark.parametrize(
    ("value", "digits", "sign", "text"),
    [(-1.234, 2, False, "−1.23"), (-0.001, 2, False, "0.00"), (0.001, 2, True, "0.00"), (1234.5, 1, True, "+1,234.5")],
)
def test_numbers(value, digits, sign, text):
    assert render.typeset(value, digits, sign) == text
    assert render.typeset(None) == ""


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        ("rm_ppo", "RM + PPO"),
        ("dpo@12", "DPO, step 12"),
        ("best_of_4_rm", "best of 4 by RM"),
        ("best_of_16_implicit", "best of 16 by implicit"),
        ("another", "another"),
    ],
)
def test_policy_names(policy, name):
    assert policy_name(policy) == name
