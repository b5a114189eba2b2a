"""What the kept policies of both arms say of their cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.files import read_json
from toolkit.models.resolve import resolve, training_record

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
