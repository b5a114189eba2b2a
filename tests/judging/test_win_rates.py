"""Slices, judges together, rankings, and AlpacaEval's annotations written and read back."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import logit

from toolkit.errors import DataError
from toolkit.evals.intervals import DEFAULT_INTERVALS, BootstrapOptions
from toolkit.judging import alpaca_eval, win_rates
from toolkit.judging.records import (
    POOLED,
    Judgement,
    one_way,
    read_judgements,
    text_measures,
    turned,
    write_judgements,
)
from toolkit.judging.responses import PolicyResponses
from toolkit.judging.win_rates import RECORDED_CONTROLS, Controls, pooled_win_rate
from toolkit.preferences.rows import prompt_id

N = 60


def judgements(seed: int = 0, judge: str = "gold", pairs: tuple[str, ...] = ("ab",), p: float = 0.6) -> list[Judgement]:
    rng = np.random.default_rng(seed)
    return [
        Judgement(
            f"p{k}", pair[0], pair[1], judge, float(rng.random() < p), order, **text_measures("x" * (k + 1), "y" * 30)
        )
        for k in range(N)
        for pair in pairs
        for order in (0, 1)
    ]


def write(path: Path, rows: list[Judgement], **more: Any) -> Path:
    from dataclasses import asdict

    path.write_text("\n".join(json.dumps(asdict(row) | {k: v(row) for k, v in more.items()}) for row in rows))
    return path


def test_slices_are_the_win_rates_of_their_part(tmp_path: Path) -> None:
    rows = judgements()

    def topic(row: Judgement) -> str:
        return "cars" if int(row.prompt_id[1:]) < 20 else "food"

    file = write(tmp_path / "j.jsonl", rows, topic=topic)
    rates = win_rates.winrate_report([file], by="topic", n_resamples=100)["win_rates"]
    assert [row["slice"] for row in rates] == [None, "topic=cars", "topic=food"]
    for name, row in zip(("cars", "food"), rates[1:], strict=True):
        [alone] = win_rates.win_rates([j for j in rows if topic(j) == name], n_resamples=100)
        assert (row["win_rate"], row["ci_low"], row["n_prompts"]) == (alone.win_rate, alone.ci_low, alone.n_prompts)
    assert rates[0]["n_prompts"] == N == rates[1]["n_prompts"] + rates[2]["n_prompts"]
    # corrected among themselves: the whole is another question
    assert rates[0]["holm_p"] == rates[0]["p_value"]
    low, high = sorted((row["p_value"], row["holm_p"]) for row in rates[1:])
    assert low[1] == pytest.approx(min(1.0, 2 * low[0])) and high[1] == pytest.approx(max(high[0], low[1]))
    with pytest.raises(DataError, match="no column 'topc'"):
        win_rates.winrate_report([file], by="topc")
    with pytest.raises(DataError, match="takes 60 values"):
        win_rates.winrate_report([file], by="prompt_id")


def test_attributes_come_from_a_file_of_prompts(tmp_path: Path) -> None:
    prompts = [f"prompt {k}" for k in range(N)]
    ids = {f"p{k}": prompt_id(text) for k, text in enumerate(prompts)}
    rows = [replace(row, prompt_id=ids[row.prompt_id]) for row in judgements()]
    file = write(tmp_path / "j.jsonl", rows)
    attributes = tmp_path / "prompts.jsonl"
    lines = [{"prompt": text, "level": "easy" if k % 3 else "hard"} for k, text in enumerate(prompts)]
    attributes.write_text("\n".join(map(json.dumps, lines)))
    rates = win_rates.winrate_report([file], by="level", attributes=attributes, n_resamples=50)["win_rates"]
    assert [(row["slice"], row["n_prompts"]) for row in rates[1:]] == [("level=easy", 40), ("level=hard", 20)]
    attributes.write_text("\n".join(map(json.dumps, lines[1:])))
    with pytest.raises(DataError, match="no level for prompt"):
        win_rates.winrate_report([file], by="level", attributes=attributes)
    attributes.write_text("\n".join(map(json.dumps, [*lines, {"prompt": "prompt 0", "level": "easy"}])))
    with pytest.raises(DataError, match="one prompt has level"):
        win_rates.winrate_report([file], by="level", attributes=attributes)


def test_judges_together_are_averaged_inside_prompts() -> None:
    # x judges every prompt in both orders; y judges in one order and only some prompts, with many repeats
    x = judgements(1, "x")
    y = [Judgement(f"p{k}", "a", "b", "y", 1.0, None, seed=s) for k in range(20) for s in range(7)]
    rates = win_rates.report([*x, *y], pool_judges=True, n_resamples=50)["win_rates"]
    assert [row["judge"] for row in rates] == ["x", "y", POOLED]
    of_x = {f"p{k}": np.mean([j.preference for j in x if j.prompt_id == f"p{k}"]) for k in range(N)}  # type: ignore[misc]
    expected = np.mean([(v + 1.0) / 2 if int(key[1:]) < 20 else v for key, v in of_x.items()])
    assert rates[2]["win_rate"] == pytest.approx(expected) and rates[2]["n_judged"] == N


def test_ties_and_failures_are_counted() -> None:
    rows = [Judgement(f"p{k}", "a", "b", "j", v) for k, v in enumerate([1.0, 0.5, 0.5, None, 0.0])]
    [row] = win_rates.win_rates(rows, n_resamples=50)
    assert (row.n_judged, row.n_failed, row.n_tied) == (4, 1, 2)


def test_three_policies_are_ranked() -> None:
    rows = judgements(3, pairs=("ab",), p=0.8) + judgements(4, pairs=("bc",), p=0.7) + judgements(5, pairs=("ac",))
    [ranking] = win_rates.report(rows, n_resamples=100)["bradley_terry"]
    assert [row["policy"] for row in ranking["policies"]] == ["a", "b", "c"]
    assert (ranking["n_prompts"], ranking["n_judged"], ranking["n_failed"]) == (N, 3 * N, 0)
    for row in ranking["policies"]:
        assert row["ci_low"] < row["log_strength"] < row["ci_high"]
    # on a chain the maximum likelihood is that of each pair alone
    chain = [j for j in rows if (j.policy, j.baseline) != ("a", "c")]
    [ranking] = win_rates.report(chain, n_resamples=20)["bradley_terry"]
    strength = {row["policy"]: row["log_strength"] for row in ranking["policies"]}
    rates = {(row["policy"], row["baseline"]): row["win_rate"] for row in win_rates.report(chain)["win_rates"]}
    assert strength["a"] - strength["b"] == pytest.approx(logit(rates["a", "b"]), abs=1e-6)
    assert strength["b"] - strength["c"] == pytest.approx(logit(rates["b", "c"]), abs=1e-6)
    assert win_rates.report(judgements())["bradley_terry"] == []


def test_style_control_needs_recorded_styles(tmp_path: Path) -> None:
    bare = [Judgement(f"p{k}", "a", "b", "j", float(k % 2)) for k in range(40)]
    with pytest.raises(DataError, match="style of its responses"):
        win_rates.win_rates(bare, Controls(style=True))
    [row] = win_rates.win_rates(bare, RECORDED_CONTROLS, n_resamples=50)
    assert row.sc_win_rate is None and row.lc_win_rate is None
    file = write(tmp_path / "j.jsonl", judgements())
    [rate] = win_rates.winrate_report([file], controls=Controls(style=True), n_resamples=50)["win_rates"]
    assert rate["sc_ci_low"] < rate["sc_win_rate"] < rate["sc_ci_high"] and set(rate["style_effects"]) == {
        "length", "lists", "headers", "bold"
    }  # fmt: skip


# ---------------------------------------------------------------- annotations.json

IDS = [f"p{k}" for k in range(N)]
PROMPTS = [f"prompt {k}" for k in range(N)]
TEXTS = {"a": [["x" * (k + 1)] for k in range(N)], "b": [["y" * 30] for _ in range(N)]}
RESPONSES = PolicyResponses(IDS, PROMPTS, TEXTS)


@pytest.mark.parametrize("name", ["annotations.json", "annotations.json.gz"])
def test_annotations_come_back_as_they_were(tmp_path: Path, name: str) -> None:
    rows = judgements()
    rows[0] = replace(rows[0], preference=None, error="timeout")
    rows[2:4] = [replace(row, preference=None, error="timeout") for row in rows[2:4]]
    path = tmp_path / name
    alpaca_eval.write_annotations(rows, RESPONSES, path)
    raw = json.loads(gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes())
    assert len(raw) == N and {"instruction", "output_1", "generator_1", "output_2", "generator_2"} <= raw[0].keys()
    assert raw[5]["output_2"] == "x" * 6 and raw[5]["generator_2"] == "a" and raw[1]["preference"] is None
    assert raw[1]["error"] == "timeout" and all(row["preference"] is None or 1 <= row["preference"] <= 2 for row in raw)
    [before], [after] = (
        win_rates.win_rates(part, Controls(length=True, style=True), n_resamples=100)
        for part in (rows, read_judgements([path]))
    )
    fields = "policy baseline judge win_rate standard_error ci_low ci_high p_value n_judged n_tied"
    for field in f"{fields} lc_win_rate lc_ci_low sc_win_rate sc_ci_high".split():
        assert getattr(after, field) == pytest.approx(getattr(before, field)), field


def test_annotations_know_the_order_where_there_is_one() -> None:
    rows = [j for j in judgements() if j.order == int(j.prompt_id[1:]) % 2]
    raw = alpaca_eval.annotation_rows(rows, RESPONSES)
    assert [row["swapped"] for row in raw] == [k % 2 == 0 for k in range(N)]


def test_annotations_hold_one_output() -> None:
    several = {**TEXTS, "a": [["x", "z"] for _ in range(N)]}
    with pytest.raises(DataError, match="2 samples"):
        alpaca_eval.annotation_rows(judgements(), replace(RESPONSES, texts=several))
    with pytest.raises(DataError, match="another prompt"):
        alpaca_eval.annotation_rows(judgements(), PolicyResponses(IDS[1:], PROMPTS[1:], TEXTS))


def test_a_prompt_judged_in_one_order_alone_is_not_judged() -> None:
    """A judge that always says A, whose second orders failed on 40 of 50 prompts: it used to win 90%."""
    judgements = [Judgement(f"p{k}", "a", "b", "j", 1.0, 0) for k in range(50)]
    judgements += [Judgement(f"p{k}", "a", "b", "j", 0.0 if k < 10 else None, 1) for k in range(50)]
    [row] = win_rates.win_rates(judgements)
    assert (row.win_rate, row.n_judged, row.n_prompts, row.n_failed) == (0.5, 10, 50, 40)
    [row] = win_rates.win_rates([j for j in judgements if j.preference is not None])  # where failures were not recorded
    assert (row.win_rate, row.n_judged) == (0.5, 10)
    [row] = win_rates.win_rates(judgements[:50])  # a judge that is asked in one order has no other to wait for
    assert (row.win_rate, row.n_judged) == (1.0, 50)


def test_arms_are_pooled_over_judges_and_sides() -> None:
    judgements = [Judgement(f"p{k}", "rm_ppo", "dpo", "one", 1.0) for k in range(4)]
    judgements += [Judgement(f"p{k}", "dpo", "rm_ppo", "two", 1.0) for k in range(2)]
    judgements += [Judgement("p0", "rm_ppo", "dpo", "rm", 1.0), Judgement("p0", "rm_ppo", "sft", "one", 0.0)]
    row = pooled_win_rate(judgements, ["one", "two"])
    assert row is not None and (row.policy, row.baseline, row.win_rate, row.n_judged) == ("rm_ppo", "dpo", 0.75, 4)
    assert pooled_win_rate(judgements, ["three"]) is None


def test_a_pair_is_seen_one_way_round() -> None:
    there = Judgement("p", "dpo", "rm_ppo", "j", 0.25, 0, policy_length=3, baseline_length=9, policy_hash="d")
    [back] = one_way([there], [("rm_ppo", "dpo")])
    assert (back.policy, back.baseline, back.preference, back.order) == ("rm_ppo", "dpo", 0.75, 1)
    assert (back.policy_length, back.baseline_length, back.baseline_hash) == (9, 3, "d")
    other = Judgement("p", "dpo", "sft", "j", None)
    assert one_way([back, there, other]) == [back, back, other] and one_way([there, back]) == [there, there]
    assert turned(turned(other)) == other and turned(other).policy == "sft"


def test_files_that_call_another_one_the_policy_say_the_same() -> None:
    """One judge has a against b, another one b against a, and the rows of a third are mixed."""
    pairs = ("ab", "bc", "ac")
    of_judges = [judgements(k, judge, pairs, p) for k, (judge, p) in enumerate((("x", 0.9), ("y", 0.7), ("z", 0.6)))]
    mixed = [*of_judges[0], *map(turned, of_judges[1])]
    mixed += [turned(j) if k % 2 else j for k, j in enumerate(of_judges[2])]
    found = win_rates.report(mixed, pool_judges=True, reference="x", n_resamples=50)
    assert found == win_rates.report(sum(of_judges, []), pool_judges=True, reference="x", n_resamples=50)
    pooled = [row for row in found["win_rates"] if row["judge"] == POOLED]
    assert [(row["policy"], row["baseline"], row["n_judged"]) for row in pooled] == [(*pair, N) for pair in pairs]
    of_x, of_y, of_z, together = (row["win_rate"] for row in found["win_rates"] if row["baseline"] == "b")
    assert together == pytest.approx((of_x + of_y + of_z) / 3)


def test_a_file_gives_the_bounds_that_were_computed_from_it(tmp_path: Path) -> None:
    rows = judgements()
    one: BootstrapOptions = {"n_resamples": 150, "confidence": 0.9, "seed": 7}
    first, second, other = (tmp_path / f"{name}.parquet" for name in ("first", "second", "other"))
    write_judgements(rows, first, one)
    write_judgements(judgements(1, "other judge"), second, one)
    write_judgements(judgements(2, "third judge"), other, {**one, "seed": 8})
    written = win_rates.report(rows, **one)["win_rates"]
    assert win_rates.winrate_report([first])["win_rates"] == written
    assert win_rates.winrate_report([first, second])["win_rates"][0]["ci_low"] == written[0]["ci_low"]
    # What was named counts; files that were computed in two ways, and those that record none, get the defaults.
    assert win_rates.winrate_report([first], seed=3)["intervals"] == {**one, "seed": 3}
    for files in ([first, other], [first, write(tmp_path / "j.jsonl", rows)]):
        assert win_rates.winrate_report(files)["intervals"] == DEFAULT_INTERVALS
    first.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="cannot (be )?read"):
        win_rates.winrate_report([first])


def test_votes_on_each_pair_in_one_order_all_count() -> None:
    """Two samples a prompt, each pair shown once on a random side: a prompt has both orders, and no pair has."""
    votes = [
        Judgement(f"p{p}", "a", "b", "human:me", 1.0, (p * k) % 2, policy_hash=f"a{k}", baseline_hash=f"b{k}")
        for p in range(30)
        for k in range(2)
    ]
    [row] = win_rates.win_rates(votes)
    assert (row.win_rate, row.n_judged, row.n_prompts, row.n_failed) == (1.0, 30, 30, 0)


@pytest.mark.parametrize("failed_rows", [True, False])
def test_half_judged_is_a_pair_of_responses(failed_rows: bool) -> None:
    """Both orders of pair 0; of pair 1 the second order failed or is missing. The judge always says A."""
    rows = [
        Judgement(f"p{p}", "a", "b", "llm", value, order, policy_hash=f"a{k}", baseline_hash=f"b{k}")
        for p in range(20)
        for k, order, value in [(0, 0, 1.0), (0, 1, 0.0), (1, 0, 1.0), (1, 1, None)]
        if failed_rows or value is not None
    ]
    [row] = win_rates.win_rates(rows)
    assert (row.win_rate, row.n_judged, row.n_failed) == (0.5, 20, 20 * failed_rows)


def test_a_report_names_judges_of_one_order(caplog: pytest.LogCaptureFixture) -> None:
    one = [Judgement(f"p{p}", "a", "b", "me", 1.0, p % 2, policy_hash="a", baseline_hash="b") for p in range(4)]
    both = [replace(j, judge="llm", order=order) for j in one for order in (0, 1)]
    win_rates.report([*one, *both, *(replace(j, judge="gold", order=None) for j in one)])
    assert [r.message for r in caplog.records] == [
        "judge me did not see each pair in both orders: position bias is not controlled"
    ]


def test_the_order_of_judges_and_rows_does_not_move_the_pooled_interval() -> None:
    rng = np.random.default_rng(0)
    rows = [
        Judgement(f"p{p}", "rm_ppo", "dpo", judge, float(rng.random()))
        for judge, start in (("x", 0), ("y", 20), ("z", 10))
        for p in range(start, start + 40)
    ]
    pooled = pooled_win_rate(rows, ["x", "y", "z"])
    shuffled = [rows[k] for k in rng.permutation(len(rows))]
    assert pooled == pooled_win_rate(rows[::-1], ["z", "y", "x"]) == pooled_win_rate(shuffled, ["y", "x", "z"])
    whole, other = (
        win_rates.report(part, pool_judges=True, ranking=False)["win_rates"][-1] for part in (rows, shuffled)
    )
    assert {**whole, "holm_p": None} == {**other, "holm_p": None}


def test_three_judges_whose_means_of_three_are_one_half_see_a_tie() -> None:
    """1/2, 2/3 and 1/3 in floats have the mean 0.49999999999999994."""
    of_judges = [[0.5, 0.5, 0.5], [0.5, 1.0, 0.5], [0.0, 1.0, 0.0]]
    rows = [
        Judgement("p", "a", "b", f"j{k}", value, policy_hash=f"{k}{i}", baseline_hash="b")
        for k, values in enumerate(of_judges)
        for i, value in enumerate(values)
    ]
    rows += [Judgement("q", "a", "b", f"j{k}", 1.0, policy_hash="q", baseline_hash="b") for k in range(3)]
    [*_, pooled] = win_rates.report(rows, pool_judges=True)["win_rates"]
    assert pooled["judge"] == POOLED
    assert (pooled["win"], pooled["tie"], pooled["loss"], pooled["win_rate"]) == (0.5, 0.5, 0.0, 0.75)
    assert (pooled["p_value"], pooled["sign_test_p"]) == (1.0, 1.0)


@pytest.mark.parametrize("n_twice", [5, 40])
def test_votes_in_an_order_that_was_drawn_all_count(n_twice: int) -> None:
    """People see pairs in a random order; where two saw the same pair in both orders, the others still count."""
    votes = [
        Judgement(f"p{p}", "a", "b", "people", float(p % 4 > 0), (p // 2 + again) % 2, policy_hash=f"a{p}")
        for p in range(100)
        for again in range(2 if p < n_twice else 1)
    ]
    [row] = win_rates.win_rates(votes)
    assert (row.win_rate, row.n_judged, row.n_failed) == (0.75, 100, 0)
    # a judge that was asked in both orders, and whose answers in one of them are missing
    [row] = win_rates.win_rates([v for v in votes if v.order == 0 or int(v.prompt_id[1:]) < n_twice])
    assert row.n_judged == n_twice


def test_a_crowd_counts_alike_alone_and_among_judges() -> None:
    """Three voters whose places were drawn: pooled, they looked like one judge that was asked in both orders."""
    rng = np.random.default_rng(0)
    crowd = [
        Judgement(
            f"p{p}", "a", "b", "3 judges", float(p % 3 > 0), int(rng.integers(2)), policy_hash=f"a{p}", source=who
        )
        for p in range(40)
        for who in ("ann", "bob", "cem")
    ]
    gold = [Judgement(f"p{p}", "a", "b", "gold", float(p % 2), policy_hash=f"a{p}") for p in range(40)]
    of_crowd, of_gold, pooled = win_rates.report([*crowd, *gold], pool_judges=True, n_resamples=50)["win_rates"]
    assert (of_crowd["n_judged"], pooled["n_judged"], pooled["judge"]) == (40, 40, POOLED)
    assert pooled["win_rate"] == pytest.approx((of_crowd["win_rate"] + of_gold["win_rate"]) / 2, abs=1e-12)


def test_position_is_over_pairs_that_a_judge_saw() -> None:
    """Of equal texts nobody is asked: their ties made a judge that always takes the first look consistent."""

    def both(prompt: int, *texts: str, preferences: tuple[float, float]) -> list[Judgement]:
        measures = text_measures(*texts)
        return [Judgement(f"p{prompt}", "a", "b", "j", p, order, **measures) for order, p in enumerate(preferences)]

    equal = [j for k in range(8) for j in both(k, "same", "same", preferences=(0.5, 0.5))]
    other = [j for k in range(8, 10) for j in both(k, "one", "two", preferences=(1.0, 0.0))]
    [row] = win_rates.win_rates([*equal, *other], n_resamples=50)
    assert (row.n_judged, row.win_rate, row.position_consistency, row.first_slot_rate) == (10, 0.5, 0.0, 1.0)
    [row] = win_rates.win_rates(equal, n_resamples=50)
    assert (row.n_judged, row.position_consistency, row.first_slot_rate) == (8, None, None)


def test_agreement_leaves_out_what_the_win_rate_calls_not_judged() -> None:
    gold = [Judgement(f"p{k}", "a", "b", "gold", 1.0) for k in range(10)]
    llm = [Judgement(f"p{k}", "a", "b", "llm", 1.0 - order, order) for k in range(4) for order in (0, 1)]
    for k in range(4, 10):  # it always takes the first, and failed on these in the second order
        llm += [Judgement(f"p{k}", "a", "b", "llm", 1.0, 0), Judgement(f"p{k}", "a", "b", "llm", None, 1, error="cut")]
    report = win_rates.report([*gold, *llm], n_resamples=50)
    assert report["win_rates"][1]["n_judged"] == 4
    [against] = report["judge_agreement"]["against_reference"]
    assert (against["accuracy"]["value"], against["n"], against["n_all"]) == (0.5, 4, 4)
    assert against["by_order"][0]["value"] == 1.0


def test_options_without_what_they_need_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "j.jsonl", judgements())
    with pytest.raises(DataError, match="a file of attributes, and no attribute"):
        win_rates.winrate_report([file], attributes=tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="judge 'glod' judged nothing here"):
        win_rates.winrate_report([file], reference="glod")
    with pytest.raises(DataError, match="'gold' is the only judge"):
        win_rates.winrate_report([file], reference="gold")
