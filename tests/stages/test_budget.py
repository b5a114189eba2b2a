"""What the kept policies of both arms say of their cost, and both arms under a budget."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.budgeted_stage import train
from support.running import python

from toolkit.errors import RecipeError
from toolkit.files import read_json
from toolkit.models.resolve import resolve, training_record
from toolkit.training.budget import Spending

pytestmark = [pytest.mark.invariant, pytest.mark.e2e]


@pytest.mark.parametrize("stage", ["ppo", "dpo"])
def test_every_kept_policy_knows_its_cost(small_run: Path, stage: str) -> None:
    policies = [*(small_run / stage / "checkpoints").glob("*"), small_run / stage / "model"]
    records = sorted((training_record(resolve(str(policy))) for policy in policies), key=lambda record: record["step"])
    assert len(records) > 1
    tokens = [record["train_tokens"] for record in records]
    seconds = [record["wall_s"] for record in records]
    assert tokens == sorted(set(tokens)) and seconds == sorted(set(seconds))
    written = read_json(small_run / stage / "stage.json")
    before = read_json(small_run / "reward_model" / "stage.json") if stage == "ppo" else None
    assert tokens[-1] == written["metrics"]["response_tokens_trained"] + (
        before["metrics"]["response_tokens_trained"] if before else 0
    )
    assert 0 < seconds[-1] - (before["wall_s"] if before else 0) <= written["wall_s"]


def test_the_counts_are_those_of_the_responses(small_run: Path) -> None:
    """A reward model and DPO that go over the data once count every response token of it once."""
    counts = {
        stage: read_json(small_run / stage / "stage.json")["metrics"]["response_tokens_trained"]
        for stage in ("reward_model", "dpo", "ppo")
    }
    assert counts["reward_model"] == counts["dpo"]
    history = read_json(small_run / "ppo" / "stage.json")["metrics"]["history"]
    assert counts["ppo"] == 2 * sum(entry["tokens"] for entry in history)  # two epochs


# ---------------------------------------------------------------- budgets

TOKENS = 6000


def sets(**more: object) -> list[str]:
    values = {"train_tokens": TOKENS, "num_checkpoints": 4, "logging_steps": 1, **more}
    return [f"{stage}.{name}={value}" for stage in ("ppo", "dpo") for name, value in values.items()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    [file] = folder.glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def budgeted(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both arms, each trained until it has spent the same."""
    out = tmp_path_factory.mktemp("budgeted")
    for stage in ("ppo", "dpo"):
        metrics, lines = train(stage, small_run, out / stage, sets())
        assert any(line.startswith(f"{stage}: spent ") for line in lines)
        (out / stage / "metrics.json").write_text(json.dumps(metrics))
    return out


def test_both_arms_spend_the_budget(budgeted: Path, small_run: Path) -> None:
    of_reward_model = read_json(small_run / "reward_model" / "stage.json")["metrics"]["response_tokens_trained"]
    for stage, before in (("ppo", of_reward_model), ("dpo", 0)):
        metrics = read_json(budgeted / stage / "metrics.json")
        record = training_record(resolve(str(budgeted / stage / "model")))
        assert record["train_tokens"] == pytest.approx(TOKENS, rel=0.05)
        assert record["train_tokens"] == before + metrics["response_tokens_trained"]
        assert (
            record["budget_spent"]
            == metrics["budget_spent"]
            == pytest.approx(record["train_tokens"] / TOKENS, abs=1e-4)
        )
        assert record["step"] == metrics["steps"] > (40 if stage == "ppo" else 10)  # ten rollouts of four steps
        assert metrics["prompts_seen"] == 24
        kept = sorted(
            training_record(resolve(str(folder)))["train_tokens"]
            for folder in (budgeted / stage / "checkpoints").glob("*")
        )
        shares = [(tokens - before) / (TOKENS - before) for tokens in kept]
        assert len(shares) == 3
        assert all(0 <= share - (i + 1) / 4 < 0.1 for i, share in enumerate(shares))


@pytest.mark.fault
@pytest.mark.parametrize(("stage", "kill_at"), [("ppo", 33), ("dpo", 13)])
def test_a_killed_stage_ends_with_the_weights_and_counts_of_a_whole_one(
    budgeted: Path, small_run: Path, tmp_path: Path, stage: str, kill_at: int
) -> None:
    killed = tmp_path / stage
    arguments = ["-m", "support.budgeted_stage", stage, str(small_run), str(killed), str(kill_at), *sets()]
    python(*arguments, check=-signal.SIGKILL)
    assert list(killed.glob("trainer/checkpoint-*/trainer_state.json")) and not (killed / "model").exists()
    metrics, lines = train(stage, small_run, killed, sets())
    assert any("resumed at step" in line for line in lines)
    whole = read_json(budgeted / stage / "metrics.json")
    for name in ("steps", "response_tokens_trained", "budget_spent", "prompts_seen"):
        assert metrics[name] == whole[name]
    for folder in ["model", *(f"checkpoints/{path.name}" for path in (budgeted / stage / "checkpoints").glob("*"))]:
        first, again = weights_of(budgeted / stage / folder), weights_of(killed / folder)
        for name, weight in first.items():
            torch.testing.assert_close(again[name], weight, rtol=0, atol=1e-6, msg=name)
        records = [training_record(resolve(str(root / folder))) for root in (budgeted / stage, killed)]
        assert records[0]["train_tokens"] == records[1]["train_tokens"]


def test_seconds_end_both_arms(small_run: Path, tmp_path: Path) -> None:
    reward_model = read_json(small_run / "reward_model" / "stage.json")["wall_s"]
    for stage, before in (("ppo", reward_model), ("dpo", 0.0)):
        seconds = before + 8.0
        more = [f"{stage}.train_tokens=null", f"{stage}.train_seconds={seconds}"]
        metrics, _ = train(stage, small_run, tmp_path / stage, [*sets(), *more])
        record = training_record(resolve(str(tmp_path / stage / "model")))
        assert metrics["budget_spent"] > 0.5 and record["wall_s"] >= seconds / 2
        rates = [entry["learning_rate"] for entry in metrics["history"]]
        assert rates[-1] < max(rates)


def test_a_reward_model_above_the_budget_is_refused(small_run: Path, tmp_path: Path) -> None:
    took = read_json(small_run / "reward_model" / "stage.json")["metrics"]["response_tokens_trained"]
    with pytest.raises(RecipeError) as refused:
        train("ppo", small_run, tmp_path, sets(train_tokens=took))
    text = refused.value.render()
    assert f"the reward model's training took {took:,} response tokens" in text
    assert "ppo.train_tokens" in text and "reward_model.num_train_epochs" in text


def test_a_policy_that_shrinks_to_a_token_ends(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second rollout on a response is its first token."""
    whole = Spending.add
    calls = []

    def shrunk(self: Spending, n_response_tokens: int) -> None:
        calls.append(n_response_tokens)
        whole(self, n_response_tokens if len(calls) <= 4 else 1)

    monkeypatch.setattr(Spending, "add", shrunk)
    metrics, lines = train("ppo", small_run, tmp_path, sets(train_tokens=2500))
    assert metrics["budget_spent"] < 0.9 and (tmp_path / "model").is_dir()
    assert any("4 times the rollouts" in line for line in lines)
    left = 2500 - training_record(resolve(str(tmp_path / "model")))["train_tokens"] + metrics["response_tokens_trained"]
    rollouts = metrics["steps"] / 4
    assert rollouts == math.ceil(4 * left / sum(calls[:4]))
