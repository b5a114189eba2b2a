"""Published judgements and published numbers: AlpacaEval 2, LLMBar, PandaLM."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import krippendorff
import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from toolkit.evals.agreement import cohen_kappa, krippendorff_alpha
from toolkit.evals.length_control import load_length_table
from toolkit.judging.records import read_judgements
from toolkit.judging.win_rates import Controls, winrate_report

ROOT = os.environ.get("DUEL_REAL_DATA")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not ROOT, reason="DUEL_REAL_DATA does not name the folder of real data sets"),
]
DATA = Path(ROOT or ".")
ALPACA = DATA / "alpaca_eval"
MODELS = [
    "NullModel",
    "FuseChat-Gemma-2-9B-Instruct",
    "FuseChat-Llama-3.1-8B-Instruct",
    "claude-2",
    "claude-2.1",
    "claude",
    "claude-instant-1.2",
    "OpenHermes-2.5-Mistral-7B",
    "gpt-3.5-turbo-1106",
    "Qwen-14B-Chat",
    "gemma-7b-it",
    "vicuna-13b-v1.5",
    "vicuna-7b-v1.5",
    "alpaca-farm-ppo-human",
    "gemma-2b-it",
    "alpaca-7b",
    "text_davinci_001",
    "phi-2",
]


def win_rates_of(files: list[Path], **options: Any) -> list[dict[str, Any]]:
    return list(winrate_report(files, **options)["win_rates"])


@pytest.fixture(scope="module")
def leaderboard() -> dict[str, dict[str, str]]:
    with open(ALPACA / "leaderboard.csv", encoding="utf-8") as file:
        return {row[""]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def report() -> dict[str, dict[str, float]]:
    files = sorted((ALPACA / "annotations").glob("*.json"))
    rows = win_rates_of(files, controls=Controls(length=True, table=load_length_table(ALPACA)), n_resamples=100)
    return {str(row["policy"]): row for row in rows}  # type: ignore[misc]


@pytest.mark.parametrize("model", MODELS)
def test_alpaca_eval_leaderboard(
    model: str, report: dict[str, dict[str, float]], leaderboard: dict[str, dict[str, str]]
) -> None:
    computed, published = report[model], leaderboard[model]
    assert 100 * computed["win_rate"] == pytest.approx(float(published["win_rate"]), abs=1e-6)
    assert 100 * computed["standard_error"] == pytest.approx(float(published["standard_error"]), abs=1e-6)
    assert 100 * computed["lc_win_rate"] == pytest.approx(float(published["length_controlled_winrate"]), abs=0.15)
    assert computed["lc_ci_low"] < computed["lc_win_rate"] < computed["lc_ci_high"]
    assert computed["n_judged"] == int(published["n_total"])
    assert computed["win"] * computed["n_judged"] == pytest.approx(int(published["n_wins"]))
    assert computed["tie"] * computed["n_judged"] == pytest.approx(int(published["n_draws"]))
    if published["lc_standard_error"]:
        # the published one leaves the uncertainty of the fit out
        assert (computed["lc_ci_high"] - computed["lc_ci_low"]) / 3.92 > float(published["lc_standard_error"]) / 100


@pytest.mark.parametrize("model", ["alpaca-7b", "vicuna-7b-v1.5"])
def test_full_annotations_equal_the_reduced_ones(model: str, report: dict[str, dict[str, float]]) -> None:
    file = ALPACA / "full" / f"{model}.json.gz"
    (row,) = win_rates_of([file], controls=Controls(length=True, table=load_length_table(ALPACA)), n_resamples=100)
    assert row["judge"] == "weighted_alpaca_eval_gpt4_turbo" and row["policy"] == model
    for name in (
        "win_rate",
        "standard_error",
        "ci_low",
        "ci_high",
        "p_value",
        "lc_win_rate",
        "lc_ci_low",
        "lc_ci_high",
    ):
        assert row[name] == pytest.approx(report[model][name], abs=1e-12), name
    reduced = read_judgements([ALPACA / "annotations" / f"{model}.json"])
    assert [j.prompt_id for j in read_judgements([file])] == [j.prompt_id for j in reduced]


def test_llmbar_both_orders(tmp_path: Path) -> None:
    with gzip.open(DATA / "llmbar" / "judge_decisions.csv.gz", "rb") as file:
        decisions = list(csv.DictReader(io.TextIOWrapper(file, encoding="utf-8")))
    records, of_judge = [], defaultdict[str, list[dict[str, str]]](list)
    for row in decisions:
        judge = f"{row['subset']}/{row['judge']}/{row['prompt']}"
        of_judge[judge].append(row)
        for order, column in enumerate(("winner_noswap", "winner_swap")):
            # the better output is the policy; it stands first if it is output 1 and the order is not swapped
            preference = None if not row[column] else float(int(float(row[column])) == int(row["label"]))
            shown_second = (int(row["label"]) == 2) != (order == 1)
            records.append({"prompt_id": row["index"], "policy": "better", "baseline": "worse", "judge": judge,
                            "preference": preference, "order": int(shown_second)})  # fmt: skip
    path = tmp_path / "llmbar.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    report = {str(row["judge"]): row for row in win_rates_of([path], n_resamples=50)}
    assert report.keys() == of_judge.keys()
    for judge, row in report.items():
        mine = of_judge[judge]
        both = [r for r in mine if r["winner_noswap"] and r["winner_swap"]]
        assert row["n_failed"] == sum(not r[c] for r in mine for c in ("winner_noswap", "winner_swap"))
        same = np.mean([r["winner_noswap"] == r["winner_swap"] for r in both])
        assert row["position_consistency"] == pytest.approx(same)
        # output 1 stands first without the swap, output 2 with it
        first = np.mean([((r["winner_noswap"] == "1.0") + (r["winner_swap"] == "2.0")) / 2 for r in both])
        assert row["first_slot_rate"] == pytest.approx(first)
    # per judge: accuracy in each order, and kappa of its verdict with the label
    for judge in sorted(report)[::6]:
        mine = of_judge[judge]
        recorded = tmp_path / "one.jsonl"
        by_output = [  # output 1 is the policy, so that the label is not always the same
            {"prompt_id": r["index"], "policy": "output 1", "baseline": "output 2", "judge": name, "order": order,
             "preference": None if not verdict else 1.0 if int(float(verdict)) == 1 else 0.0}
            for r in mine
            for name, order, verdict in (
                ("label", None, r["label"]), ("judge", 0, r["winner_noswap"]), ("judge", 1, r["winner_swap"]))
        ]  # fmt: skip
        recorded.write_text("\n".join(map(json.dumps, by_output)))
        agreement = winrate_report([recorded], reference="label", n_resamples=50)["judge_agreement"]
        [against] = agreement["against_reference"]
        right = {
            c: [float(int(float(r[c])) == int(r["label"])) for r in mine if r[c]]
            for c in ("winner_noswap", "winner_swap")
        }
        assert [part["value"] for part in against["by_order"]] == pytest.approx([np.mean(v) for v in right.values()])
        whole = [r for r in mine if all(r[c] for c in right)]  # the win rate is over these, too
        verdicts = [np.sign(np.mean([1.0 if int(float(r[c])) == 1 else -1.0 for c in right])) for r in whole]
        truth = [1.0 if r["label"] == "1" else -1.0 for r in whole]
        assert against["n_all"] == len(whole)
        assert against["cohen_kappa"]["value"] == pytest.approx(cohen_kappa_score(verdicts, truth), abs=1e-9)
        assert against["accuracy"]["ci_low"] <= against["accuracy"]["value"] <= against["accuracy"]["ci_high"]
    gpt4 = report["Natural/GPT-4/CoT"]
    assert (gpt4["win_rate"], gpt4["position_consistency"]) == pytest.approx((0.945, 0.91))


def test_pandalm_annotators() -> None:
    with gzip.open(DATA / "pandalm" / "pairs.json.gz", "rb") as file:
        pairs = json.load(file)
    a = np.array([[pair[f"annotator{k}"] for pair in pairs] for k in (1, 2, 3)])
    assert a.shape == (3, 700)
    for (i, j), published in (((0, 1), 0.852), ((0, 2), 0.879), ((1, 2), 0.862)):
        computed = cohen_kappa(a[i], a[j], n_resamples=500)
        assert computed.value == pytest.approx(cohen_kappa_score(a[i], a[j]), abs=1e-9)
        assert computed.ci_low <= published <= computed.ci_high  # type: ignore[operator]  # published over all 999
    alpha = krippendorff_alpha(a, n_resamples=50)
    assert alpha.value == pytest.approx(krippendorff.alpha(a, level_of_measurement="nominal"), abs=1e-9)


def test_pandalm_judges_against_the_annotators(tmp_path: Path) -> None:
    with gzip.open(DATA / "pandalm" / "pairs.json.gz", "rb") as file:
        pairs = json.load(file)
    value: dict[int | None, float] = {0: 0.5, 1: 1.0, 2: 0.0}
    two = {"policy": "1", "baseline": "2"}
    rows: list[dict[str, Any]] = [
        {**two, "prompt_id": pair["idx"], "judge": f"human{k}", "preference": value[pair[f"annotator{k}"]]}
        for pair in pairs
        for k in (1, 2, 3)
    ]
    majority = {}
    for pair in pairs:
        votes = [pair[f"annotator{k}"] for k in (1, 2, 3)]
        majority[pair["idx"]] = max(sorted(set(votes)), key=votes.count)
    rows += [{**two, "prompt_id": k, "judge": "majority", "preference": value[v]} for k, v in majority.items()]
    labels: dict[str, dict[int, int]] = {}
    for name, column in (("gpt35", "gpt_result"), ("pandalm7b", "pandalm_result")):
        with gzip.open(DATA / "pandalm" / f"judge_{name}.json.gz", "rb") as file:
            answers = {row["idx"]: str(row[column]) for row in json.load(file)}
        # an answer without a verdict ("garbage") is a failure, not a tie
        labels[name] = {k: {"Tie": 0, "0": 0, "1": 1, "2": 2}[text] for k, text in answers.items() if text != "garbage"}
        verdicts = {k: value.get(labels[name].get(k)) for k in answers}
        rows += [{**two, "prompt_id": k, "judge": name, "preference": v} for k, v in verdicts.items()]
    path = tmp_path / "pandalm.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    agreement = winrate_report([path], reference="majority", n_resamples=300)["judge_agreement"]
    against = {row["judge"]: row for row in agreement["against_reference"]}
    for name, of_judge in labels.items():
        shared = [k for k in majority if k in of_judge]
        same = np.mean([of_judge[k] == majority[k] for k in shared])
        assert against[name]["same_verdict"]["value"] == pytest.approx(same) and against[name]["n_all"] == len(shared)
        assert against[name]["same_verdict"]["ci_low"] < same < against[name]["same_verdict"]["ci_high"]
        decided = [k for k in shared if majority[k] != 0]
        right = np.mean([1.0 if of_judge[k] == majority[k] else 0.5 if of_judge[k] == 0 else 0.0 for k in decided])
        assert against[name]["accuracy"]["value"] == pytest.approx(right)
        assert against[name]["accuracy"]["ci_low"] > 0.5
        kappa = cohen_kappa_score([of_judge[k] for k in shared], [majority[k] for k in shared])
        assert against[name]["cohen_kappa"]["value"] == pytest.approx(kappa, abs=1e-9)
    kappas = {row["judges"]: row["cohen_kappa"] for row in agreement["pairs"]}
    for both, published in (
        (("human1", "human2"), 0.852),
        (("human1", "human3"), 0.879),
        (("human2", "human3"), 0.862),
    ):
        assert kappas[both]["ci_low"] <= published <= kappas[both]["ci_high"]
