"""The commands that score, sample, judge and label, on a finished run."""

from __future__ import annotations

import json
import shutil
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.running import duel, duel_process

from toolkit.models.resolve import resolve

pytestmark = pytest.mark.e2e


def test_rewards_and_score_on_a_run(small_run: Path, tmp_path: Path) -> None:
    policy, reference, rm = (str(small_run / name / "model") for name in ("dpo", "sft", "reward_model"))
    out = tmp_path / "rewards.parquet"
    limits = ["--limit", "12", "--json"]
    command = [
        "rewards", "--policy", policy, "--reference", reference, "--data", "reviews", "--rm", rm, "--per-token",
        "--with-ids", "--out", str(out), *limits,
    ]  # fmt: skip
    summary = json.loads(duel(*command).stdout)
    written = out.stat().st_mtime_ns
    assert json.loads(duel(*command).stdout) == summary and out.stat().st_mtime_ns == written
    assert "the file exists" in duel(*command, "--beta", "0.3", check=2).stderr
    assert {"n_prompts", "n_responses", "accuracy", "accuracy_ci", "seconds", "responses_per_second"} <= summary.keys()
    assert summary["beta"] == 0.1 and summary["n_responses"] == 72
    for row in pq.read_table(out).to_pylist():
        assert row["implicit_reward"] == pytest.approx(0.1 * (row["policy_logp"] - row["reference_logp"]), abs=1e-6)
        assert sum(row["token_rewards"]) == pytest.approx(row["implicit_reward"], abs=1e-6)
        assert len(row["response_ids"]) == row["n_tokens"] == len(row["token_rewards"])
        assert row["running_rewards"] == pytest.approx([*accumulate(row["token_rewards"])], abs=1e-9)
    other = ["rewards", "--policy", policy, "--reference", "tiny", "--data", "reviews"]
    for start, launch in ((duel, []), (duel_process, ["--", "--num_processes", "1"])):  # the launcher would exit with 1
        wrong = start(*other, "--out", str(tmp_path / "w.parquet"), *launch, check=2)
        assert "--any-reference" in wrong.stderr and not (tmp_path / "w.parquet").exists()
    command = ["score", "--rm", rm, "--data", "reviews", "--out", str(tmp_path / "s.parquet"), *limits]
    scored = json.loads(duel(*command).stdout)
    assert scored["n_responses"] == 72
    again = duel(*command)
    assert json.loads(again.stdout) == scored and "done already, by the same command" in again.stderr
    by_rewards = {(r["prompt_id"], r["response_index"]): r["explicit_reward"] for r in pq.read_table(out).to_pylist()}
    for row in pq.read_table(tmp_path / "s.parquet").to_pylist():
        assert row["explicit_reward"] == pytest.approx(by_rewards[row["prompt_id"], row["response_index"]], abs=1e-4)


def test_the_implicit_reward_is_said_in_words(small_run: Path, tmp_path: Path) -> None:
    words = "beta * log(pi / pi_ref), summed over the tokens of the response, with beta = 0.1"
    record = json.loads((small_run / "dpo" / "model" / "duel.json").read_text())
    assert (
        record["implicit_reward"] == json.loads((small_run / "manifest.json").read_text())["implicit_reward"] == words
    )
    policy = shutil.copytree(small_run / "dpo" / "model", tmp_path / "policy")
    shared = ["--reference", str(small_run / "sft" / "model"), "--data", "reviews", "--limit", "2"]
    said = duel("rewards", "--policy", str(policy), *shared, "--out", str(tmp_path / "sum.parquet")).stdout
    assert f"the implicit reward: {words}" in " ".join(said.split())  # over two lines of the terminal
    (policy / "duel.json").write_text(json.dumps(record | {"loss_type": "ipo"}))
    said = duel("rewards", "--policy", str(policy), *shared, "--beta", "2", "--out", str(tmp_path / "m.parquet")).stdout
    mean = "beta * log(pi / pi_ref), its mean over the tokens of the response, with beta = 2"
    assert f"the implicit reward: {mean}" in " ".join(said.split())
    assert json.loads((tmp_path / "m.summary.json").read_text())["implicit_reward"] == mean
    for name in ("own.summary.json", "own.disagreements.jsonl"):
        (tmp_path / name).write_text("mine")
        refused = duel("rewards", "--policy", str(policy), *shared, "--out", str(tmp_path / "own.parquet"), check=2)
        assert name in refused.stderr and (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    free = ["--reference", "none", *shared[2:], "--out", str(tmp_path / "free.parquet")]
    said = duel("rewards", "--policy", str(policy), *free).stdout
    assert "the implicit reward" not in said and "reference-free" in said


def test_rewards_on_what_the_policies_wrote(small_run: Path, tmp_path: Path) -> None:
    """The same figures as the run's own evaluation, which scored the samples when it drew them."""
    policy, reference, rm = (str(small_run / name / "model") for name in ("dpo", "sft", "reward_model"))
    out = tmp_path / "rewards.parquet"
    given = ["--policy", policy, "--reference", reference, "--rm", rm, "--with-ids", "--out", str(out), "--json"]
    data, samples = small_run / "data" / "eval.parquet", small_run / "samples.parquet"
    found = json.loads(duel("rewards", *given, "--data", str(data), "--samples", str(samples)).stdout)
    of_run = json.loads((small_run / "results.json").read_text())["implicit_vs_explicit"]["on_samples"]
    by_source = found["implicit_vs_explicit"]["samples"]
    assert by_source.keys() == {"sft and base", "PPO", "DPO"}
    for source, figures in by_source.items():
        assert figures["n_pairs"] == of_run[source]["n_pairs"]
        for name in ("accuracy_explicit", "accuracy_implicit", "agreement", "margin_correlation"):
            assert figures[name]["value"] == pytest.approx(of_run[source][name]["value"], abs=1e-3), name
    drawn = pq.read_table(samples).to_pylist()
    written = [row for row in pq.read_table(out).to_pylist() if row["source"] != "data"]

    def sampled(rows: list[dict[str, Any]], policy: str, reward: str) -> list[tuple[Any, ...]]:
        return sorted((row["prompt_id"], row[policy], row["response_ids"], round(row[reward], 3)) for row in rows)

    expected = [row for row in drawn if row["kind"] != "best_of_n"]
    assert sampled(written, "source", "explicit_reward") == sampled(expected, "policy", "explicit_reward")
    assert found["n_prompts"] == 12
    wrong = duel("rewards", *given, "--data", str(data), "--samples", str(out), "--force", check=2)
    assert "samples.parquet" in wrong.stderr


def test_labels_by_principles_are_a_data_source(tmp_path: Path) -> None:
    out = tmp_path / "labels.jsonl.gz"
    shared = ["--data", "reviews", "--limit", "12", "--judge", "llm:tiny", "--principles", "hhh", "--out", str(out)]
    made = json.loads(duel("label", *shared, "--json").stdout)
    assert made["n_prompts"] == 12 and made["n_failed"] == 0
    assert made["judge_usage"]["n_questions"] == 2 * made["n_comparisons"] and made["judge_usage"]["prompt_tokens"] > 0
    held_out = ["--set=data.eval_fraction=0.4", "--set=data.eval_prompts=4"]
    plan = duel("run", "smoke", f"--set=data.source={out}", "--dry-run", "--out", str(tmp_path / "x"), *held_out)
    assert "reward_model" in plan.stdout and "dpo" in plan.stdout
    again = duel("label", *shared, "--json")
    assert json.loads(again.stdout) == made and "done already" in again.stderr
    assert "exists" in duel("label", *shared, "--draw", "all", check=2).stderr


def test_winrate_gives_a_runs_own_bounds(small_run: Path, tmp_path: Path) -> None:
    results = json.loads((small_run / "results.json").read_text())
    recipe = results["recipe"]["evaluate"]
    assert recipe["bootstrap"] == 200  # and not what the command takes for other files
    said = duel("winrate", str(small_run / "judgements.parquet"), "--length-control", "--style-control", "--json")
    again = json.loads(said.stdout)
    assert again["win_rates"] == results["win_rates"]
    assert again["intervals"] == {"n_resamples": 200, "confidence": 0.95, "seed": 0}
    by_hand = ("--seed", "1", "--bootstrap", "300", "--confidence", "0.9")
    other = json.loads(duel("winrate", str(small_run / "judgements.parquet"), *by_hand, "--json").stdout)
    assert other["intervals"] == {"n_resamples": 300, "confidence": 0.9, "seed": 1}
    assert [row["win_rate"] for row in other["win_rates"]] == [row["win_rate"] for row in again["win_rates"]]
    assert "90% interval" in duel("winrate", str(small_run / "judgements.parquet"), *by_hand).stdout


def test_winrate_gives_the_bounds_of_duel_judge(small_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "votes.parquet"
    pair = ("--policy", "rm_ppo", "--baseline", "dpo")
    judged = json.loads(
        duel("judge", str(small_run), *pair, "--judge", "gold", "--seed", "5", "--out", str(out), "--json").stdout
    )
    again = json.loads(duel("winrate", str(out), "--length-control", "--style-control", "--json").stdout)
    assert again["win_rates"] == judged["win_rates"] and again["intervals"]["seed"] == 5


def test_models_with_equal_weights_and_other_templates_are_sampled_apart(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("one", "copy", "other")]
    for name in names:
        shutil.copytree(resolve("tiny").path, name)
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages[0].content }}No: ")
    shared = ["--data", "reviews", "--limit", "2", "--max-new-tokens", "2", "--judge", "gold"]
    duel("compare", *names, *shared, "--out", str(tmp_path / "c"))
    assert len([*(tmp_path / "c").glob("samples-*.parquet")]) == 2


def test_compare_simulate_and_winrate(small_run: Path, tmp_path: Path) -> None:
    sft, dpo = (str(small_run / name / "model") for name in ("sft", "dpo"))
    shared = ["--data", "reviews", "--limit", "10", "--max-new-tokens", "10", "--seed", "4"]
    rows = json.loads(
        duel("compare", dpo, sft, "tiny", *shared, "--judge", "gold", "--out", str(tmp_path / "c"), "--json").stdout
    )["win_rates"]
    assert len(rows) == 3 and all(row["n_judged"] == 10 for row in rows)
    [ranking] = json.loads((tmp_path / "c" / "results.json").read_text())["bradley_terry"]
    assert {row["policy"] for row in ranking["policies"]} == {dpo, sft, "tiny"} and ranking["n_judged"] == 30
    again = json.loads(duel("winrate", str(tmp_path / "c" / "judgements.parquet"), "--json").stdout)["win_rates"]
    assert [row["win_rate"] for row in again] == [row["win_rate"] for row in rows]
    assert [(row["ci_low"], row["ci_high"]) for row in again] == [(row["ci_low"], row["ci_high"]) for row in rows]
    out = tmp_path / "sim.jsonl.gz"
    made = json.loads(duel("simulate", "--policy", "tiny", "--k", "3", *shared, "--out", str(out), "--json").stdout)
    assert made["n_prompts"] == 10
    more = ["--dry-run", "--out", str(tmp_path / "x"), "--set=data.eval_fraction=0.4"]
    assert "comparisons" in duel("run", "smoke", f"--set=data.source={out}", *more).stdout
