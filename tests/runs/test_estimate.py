"""``duel run --estimate``: about how long the stages that are left take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.running import SMALL, duel

from toolkit.recipe.files import load_recipe
from toolkit.runs import estimate
from toolkit.runs.calibration import Speed

FEW = ("data.train_prompts=20", "data.eval_prompts=5", "data.max_responses=3", "data.max_response_tokens=12")


def seconds(monkeypatch: pytest.MonkeyPatch, out: Path, speed: Speed, *sets: str) -> dict[str, float]:
    monkeypatch.setattr(estimate, "calibrate", lambda *_: speed)
    described = estimate.estimate(load_recipe("smoke", [*FEW, *sets]), out)
    assert described["seconds"] == pytest.approx(sum(part["seconds"] for part in described["parts"]), abs=0.5)
    return {part["part"]: part["seconds"] for part in described["parts"]}


def test_each_stage_counts_its_own_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a second for each token of one kind of work, and nothing else."""
    training = seconds(monkeypatch, tmp_path / "new", Speed(0.0, 1.0, 0.0, 0.0), "sft.num_train_epochs=1")
    epoch = training["sft"]
    assert 20 * 3 < epoch <= 20 * 3 * 12
    recipe = load_recipe("smoke").recipe
    assert training["dpo"] == pytest.approx(epoch * recipe.dpo.num_train_epochs, abs=0.1)
    assert training["reward_model"] == pytest.approx(epoch * recipe.reward_model.num_train_epochs, abs=0.1)
    mean = epoch / 60
    episodes = recipe.ppo.total_episodes
    assert training["ppo"] == pytest.approx(2 * recipe.ppo.num_ppo_epochs * episodes * mean, abs=0.1)  # and the critic
    assert training["evaluate"] == 0

    for differ_by, passes in (("seed", 3), ("head", 1)):
        sets = ("reward_model.members=3", f"reward_model.differ_by={differ_by}")
        ensemble = seconds(monkeypatch, tmp_path / "new", Speed(0.0, 1.0, 0.0, 0.0), *sets)
        assert ensemble["reward_model"] == pytest.approx(passes * training["reward_model"], abs=0.1)

    one_trunk = seconds(monkeypatch, tmp_path / "new", Speed(0.0, 1.0, 0.0, 0.0), "ppo.share_trunk=true")
    assert one_trunk["ppo"] == pytest.approx(training["ppo"] / 2, abs=0.1)

    sampled, pool = Speed(0.0, 0.0, 0.0, 1.0), "evaluate.best_of_n=2"
    sampling = seconds(monkeypatch, tmp_path / "new", sampled, pool)
    assert sampling["ppo"] == pytest.approx(episodes * mean, abs=0.1)
    n_checkpoints = recipe.ppo.num_checkpoints + recipe.dpo.num_checkpoints - 2
    longest = recipe.evaluate.max_new_tokens or 12
    per_prompt = mean * (3 * recipe.evaluate.samples_per_prompt + 2 + n_checkpoints) + longest
    assert sampling["evaluate"] == pytest.approx(5 * per_prompt, abs=0.1)
    fewer = seconds(monkeypatch, tmp_path / "new", sampled, pool, "evaluate.checkpoint_prompts=2")
    less = 3 * (n_checkpoints * mean + longest)
    assert sampling["evaluate"] - fewer["evaluate"] == pytest.approx(less, abs=0.2)


def test_a_stage_that_is_there_takes_no_time(small_run: Path) -> None:
    command = ["run", "smoke", "--out", str(small_run), *SMALL, "--estimate", "--dry-run", "--json"]
    described = json.loads(duel(*command).stdout)
    assert described["estimate"] == {"seconds": 0.0, "parts": [], "without": []}


def test_the_first_lines_of_a_run_say_what_it_does_and_how_long(tmp_path: Path) -> None:
    """Timed here, with the model."""
    sets = [f"--set={value}" for value in FEW]
    shown = duel("run", "smoke", "--out", str(tmp_path / "new"), "--estimate", "--dry-run", *sets).stdout.splitlines()
    assert shown[0].startswith("smoke: about ") and shown[0].endswith("by a short timing of the model")
    assert [line.split()[0] for line in shown[1:7]] == ["data", "sft", "reward_model", "ppo", "dpo", "evaluate"]
    assert max(map(len, shown[:7])) <= 80


def test_judges_with_models_of_their_own_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "calibrate", lambda *_: Speed(0.0, 0.0, 0.0, 0.0))
    recipe = load_recipe("smoke", [*FEW, "evaluate.judges=[gold, 'openai:gpt@http://localhost:1/v1']"])
    assert estimate.estimate(recipe, tmp_path / "new")["without"] == ["the judge openai:gpt@http://localhost:1/v1"]


def test_a_reward_model_of_steps_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stage reads another data set than the one that is timed."""
    monkeypatch.setattr(estimate, "calibrate", lambda *_: Speed(1.0, 1.0, 1.0, 1.0))
    recipe = load_recipe("smoke", [*FEW, "reward_model.kind=process", "reward_model.steps=arithmetic"])
    estimated = estimate.estimate(recipe, tmp_path / "new")
    assert "reward_model" not in [part["part"] for part in estimated["parts"]]
    assert estimated["without"] == ["reward_model"]


def test_only_the_stages_that_would_run_count(tmp_path: Path, small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "calibrate", lambda *_: Speed(1.0, 0.0, 0.0, 0.0))

    def parts(out: Path, sets: list[str], **options: Any) -> list[str]:
        estimated = estimate.estimate(load_recipe("smoke", sets), out, **options)
        return [part["part"] for part in estimated["parts"]]

    assert parts(tmp_path / "new", [*FEW], until="sft") == ["data", "sft"]
    small = [option.removeprefix("--set=") for option in SMALL]
    assert parts(small_run, small, only="dpo") == []
    assert parts(small_run, small, only="dpo", force=True) == ["dpo"]
    assert parts(small_run, small, force=True) == ["data", "sft", "reward_model", "ppo", "dpo", "evaluate"]
    further = estimate.estimate(load_recipe("smoke", [*FEW, "evaluate.temperatures=[0.7]"]), tmp_path / "new")
    assert further["without"] == ["the samples at further temperatures"]
