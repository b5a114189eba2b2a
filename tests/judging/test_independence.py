"""A judge whose models were trained on prompts of the evaluation does not decide."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.files import write_json, write_table
from toolkit.judging.independence import dependence, trained_prompts


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A reward model in a run folder that was trained on the prompts a, b and c."""
    run = tmp_path / "run"
    folder = run / "reward_model" / "model"
    folder.mkdir(parents=True)
    (run / "data").mkdir()
    write_json(run / "manifest.json", {})
    write_table([{"prompt_id": key, "prompt": key} for key in "abc"], run / "data" / "train.parquet")
    write_json(folder / "config.json", {})
    return folder


def test_the_prompts_of_a_models_run_are_known(model: Path, tmp_path: Path) -> None:
    assert trained_prompts(str(model)) == {"a", "b", "c"}
    alone = tmp_path / "alone"
    alone.mkdir()
    write_json(alone / "config.json", {})
    assert trained_prompts(str(alone)) == set() and trained_prompts("tiny") == set()


def test_judges_that_saw_the_prompts_are_named_with_how_many(model: Path) -> None:
    judges = [f"rm:{model}", f"implicit:tiny,{model}", "rm:tiny", "gold", "rm", "llm:tiny"]
    reasons = dependence(judges, ["b", "c", "d"])
    assert reasons == dict.fromkeys(judges[:2], "a model that was trained on 2 of these 3 prompts")
    assert dependence(judges, ["x", "y"]) == {}
