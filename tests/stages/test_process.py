"""A run with a process reward model, and what else its model is used for: card, scores, wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.running import SMALL, duel

from toolkit.models.reward_head import reward_head

SETTINGS = [
    *SMALL,
    "--set=data.max_response_tokens=24",
    "--set=sft.num_train_epochs=1",
    "--set=ppo.num_checkpoints=1",
    "--set=dpo.num_checkpoints=1",
    "--set=reward_model.per_device_train_batch_size=8",
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("process") / "run"
    duel("run", "process", *SETTINGS, "--out", str(out))
    return out


def models(run_folder: Path) -> tuple[str, str]:
    """The process reward model, and DPO's policy with its reference."""
    return str(run_folder / "reward_model/model"), f"{run_folder}/dpo/model,{run_folder}/sft/model"


@pytest.mark.e2e
def test_a_run_says_how_good_its_rewards_of_steps_are(run_folder: Path) -> None:
    results = json.loads((run_folder / "results.json").read_text())
    process, report = results["process"], json.loads((run_folder / "data/report.json").read_text())
    assert (process["separator"], process["solution_score"]) == ("\n", "min")
    n_labels = report["steps"]["eval"]["n_labels"]
    for name in ("explicit", "implicit", "implicit_own"):
        assert process[name]["n_steps"] == n_labels and process[name]["steps"]["accuracy"]["n"] == 12
    assert set(process["explicit_over_implicit"]) == {
        "accuracy",
        "f1_macro",
        "auc",
        "auc_within_prompts",
        "first_error",
    }
    labels = next(row for row in results["arm_differences"] if row["name"] == "labels")
    assert labels["ppo"] == f"steps: {report['steps']['train']['n_labels']}" and labels["differs"]
    page = (run_folder / "report.html").read_text()
    assert "Rewards of steps" in page and "first wrong step found, or none" in page
    # The solution score is the explicit reward everywhere: of best-of-n, of the policies' samples, of held-out data.
    assert "best_of_2_rm" in {row["policy"] for row in results["policies"]}
    head = reward_head(run_folder / "reward_model/model")
    rewards = pq.read_table(run_folder / "rewards.parquet").column("explicit_reward").to_numpy()
    assert (rewards >= -head.mean).all() and (rewards <= 1 - head.mean).all()


@pytest.mark.e2e
def test_steps_of_held_out_prompts_do_not_train(run_folder: Path) -> None:
    sides = {side: pq.read_table(run_folder / f"data/{side}_steps.parquet") for side in ("train", "eval")}
    prompts = {side: set(table.column("prompt_id").to_pylist()) for side, table in sides.items()}
    assert not prompts["train"] & prompts["eval"] and len(prompts["train"]) == 24
    compared = set(pq.read_table(run_folder / "data/eval.parquet").column("prompt_id").to_pylist())
    assert not prompts["train"] & compared and prompts["eval"] == compared


@pytest.mark.e2e
def test_the_card_gives_the_same_figures_without_the_run(run_folder: Path, tmp_path: Path) -> None:
    rm, pair = models(run_folder)
    records = pq.read_table(run_folder / "data/eval_steps.parquet").to_pylist()
    steps = tmp_path / "steps.jsonl"
    rows = [{"prompt": json.loads(r["prompt"]), "completions": r["steps"], "labels": r["labels"]} for r in records]
    steps.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["rm-card", rm, "--steps", str(steps), "--implicit", pair, "--max-response-tokens", "24"]
    card = json.loads(duel(*words, "--out", str(tmp_path / "card"), "--json").stdout)
    of_run = json.loads((run_folder / "results.json").read_text())["process"]
    for name in ("explicit", "implicit", "implicit_own"):
        for figure, value in of_run[name]["steps"].items():
            assert card[name]["steps"][figure]["value"] == pytest.approx(value["value"], abs=1e-6), (name, figure)
    table = pq.read_table(tmp_path / "card/steps.parquet").to_pylist()
    assert sum(row["right"] is not None for row in table) == card["explicit"]["n_steps"]
    assert all(0 <= row["probability"] <= 1 for row in table)
    before = (tmp_path / "card/steps.parquet").stat().st_mtime_ns
    again = json.loads(duel(*words, "--out", str(tmp_path / "card"), "--json").stdout)
    assert again == card and (tmp_path / "card/steps.parquet").stat().st_mtime_ns == before
    other = duel(*words, "--seed", "1", "--out", str(tmp_path / "card"), check=2)
    assert "another model, other data or other options" in other.stderr
    text = duel(*words, env={"COLUMNS": "200"}).stdout
    assert "accuracy on steps" in text and "implicit, running sum" in text and "95% interval" in text


@pytest.mark.e2e
def test_other_commands_use_the_solution_score(run_folder: Path, tmp_path: Path) -> None:
    rm, _ = models(run_folder)
    shared = ["--data", "arithmetic", "--limit", "6"]
    duel("score", "--rm", rm, *shared, "--out", str(tmp_path / "scores.parquet"))
    scores = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    mean = reward_head(rm).mean
    assert all(-mean <= row["explicit_reward"] <= 1 - mean for row in scores)
    card: dict[str, Any] = json.loads(duel("rm-card", rm, *shared, "--json").stdout)
    assert card["explicit"]["accuracy"]["n"] == 6


@pytest.mark.e2e
@pytest.mark.fault
def test_wrong_use_is_refused(run_folder: Path, small_run: Path, tmp_path: Path) -> None:
    rm, pair = models(run_folder)
    other = duel("rm-card", str(small_run / "reward_model/model"), "--steps", "arithmetic", check=2)
    assert "not a process reward model" in other.stderr
    assert "--data, or labelled steps" in duel("rm-card", rm, check=2).stderr
    both = duel("rm-card", rm, "--steps", "arithmetic", "--data", "arithmetic", check=2)
    assert "--data, or labelled steps" in both.stderr
    policy = pair.split(",")[0]
    none = duel("rm-card", rm, "--steps", "arithmetic", "--limit", "2", "--implicit", f"{policy},none", check=2)
    assert "name the reference" in none.stderr
    (tmp_path / "steps.jsonl").write_text('{"prompt": "1+1=", "completions": ["1+1=2"]}\n')
    run = ["run", "process", f"--set=reward_model.steps={tmp_path}/steps.jsonl", "--out", str(tmp_path / "run")]
    assert "no labels" in duel(*run, check=2).stderr
    assert "no such file" in duel(*run[:2], "--set=reward_model.steps=./none.jsonl", *run[3:], check=2).stderr
