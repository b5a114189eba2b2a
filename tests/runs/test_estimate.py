"""``duel run --estimate``: about how long the stages that are left take."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.running import SMALL, duel
from support.small_models import save_bert

from toolkit.recipe.files import load_recipe
from toolkit.runs import calibration, estimate
from toolkit.runs.calibration import Passes, Speed, calibrate
from toolkit.runs.pipeline import RunOptions
from toolkit.runs.plan import plan_stages
from toolkit.runs.store import RunFolder

FEW = ("data.train_prompts=20", "data.eval_prompts=5", "data.max_responses=3", "data.max_response_tokens=12")


READ_DATA = estimate.read_data


@cache
def read_once() -> Any:
    """No setting of these tests changes what is read."""
    return READ_DATA(load_recipe("smoke", FEW).recipe, None)


def seconds(monkeypatch: pytest.MonkeyPatch, out: Path, speed: Speed, *sets: str) -> dict[str, float]:
    monkeypatch.setattr(estimate, "calibrate", lambda *_: speed)
    monkeypatch.setattr(estimate, "read_data", lambda *_: read_once())
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


def test_the_stages_that_are_left_are_those_of_as_many_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = load_recipe("smoke", FEW), RunFolder(tmp_path)
    for planned in plan_stages(recipe, folder, 2)[:2]:
        folder.work_dir(planned.spec.name, planned.key).mkdir(parents=True)
        folder.finish(planned.spec.name, planned.key, {"fields": planned.fields}, planned.inputs)
    monkeypatch.setattr(estimate, "calibrate", lambda *_: Speed(0.0, 1.0, 0.0, 0.0))
    monkeypatch.setattr(estimate, "read_data", lambda *_: read_once())
    for launch, parts in ((["--num_processes", "2"], ["reward_model"]), ([], ["sft", "reward_model"])):
        options = RunOptions(until="reward_model", launch=launch)
        described = estimate.estimate(recipe, tmp_path, options=options)
        assert [part["part"] for part in described["parts"]] == parts
        assert ("by a single process" in estimate.render("smoke", described)) == bool(launch)


def test_every_member_of_an_ensemble_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a second for each token that is scored, and one for each model that is loaded."""
    score, load = Speed(0.0, 0.0, 1.0, 0.0), Speed(1.0, 0.0, 0.0, 0.0)

    def of(speed: Speed, *sets: str) -> dict[str, float]:
        return seconds(monkeypatch, tmp_path / "new", speed, *sets)

    ensemble = "reward_model.members=3"
    rollouts = of(score)["ppo"] / 4  # policy, reference, critic and reward model
    by_one, by_three = (of(score, *sets)["evaluate"] for sets in ((), (ensemble,)))
    assert of(score, ensemble)["ppo"] == pytest.approx(6 * rollouts, abs=0.2)
    assert by_three > by_one
    for one_model in ("reward_model.combine=average_weights", "reward_model.differ_by=head"):
        assert of(score, ensemble, one_model)["ppo"] == pytest.approx(4 * rollouts, abs=0.2)
        assert of(score, ensemble, one_model)["evaluate"] == pytest.approx(by_one, abs=0.2)
    loads, more = of(load), of(load, ensemble)
    assert {stage: more[stage] - loads[stage] for stage in more} == {
        "data": pytest.approx(0, abs=5),
        **dict.fromkeys(("sft", "dpo"), 0),
        **dict.fromkeys(("reward_model", "ppo", "evaluate"), 2),
    }
    assert of(score, "ppo.reward=length")["ppo"] == pytest.approx(3 * rollouts, abs=0.2)


def test_another_base_has_its_own_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(speed: Speed, *sets: str) -> dict[str, float]:
        return seconds(monkeypatch, tmp_path / "new", speed, *sets)

    nothing = Speed(0.0, 0.0, 0.0, 0.0)
    plain, trained, scored = (of(replace(nothing, **{name: 1.0})) for name in ("load_s", "train_s", "score_s"))
    of_base = {name: replace(nothing, base=Passes(*values)) for name, values in BASES.items()}
    assert of(of_base["train"])["reward_model"] == pytest.approx(trained["reward_model"], abs=0.1)
    assert of(of_base["score"])["ppo"] == pytest.approx(scored["ppo"] / 4, abs=0.1)
    assert 0 < of(of_base["score"])["evaluate"] < scored["evaluate"]
    assert [of(of_base["load"])[stage] for stage in ("reward_model", "ppo", "evaluate")] == [1, 1, 1]
    assert [plain[stage] for stage in ("reward_model", "ppo")] == [1, 4]

    as_critic = {name: replace(speed, critic_from_base=True) for name, speed in of_base.items()}
    assert of(of_base["train"])["ppo"] == 0
    assert of(as_critic["train"])["ppo"] == pytest.approx(trained["ppo"] / 2, abs=0.1)
    assert of(as_critic["score"])["ppo"] == pytest.approx(scored["ppo"] / 2, abs=0.1)
    # With adapters, an ensemble on another base leaves the critic to the policy's.
    lora = ("model.lora={r: 2, alpha: 4}", "reward_model.members=2")
    assert of(as_critic["train"], *lora)["ppo"] == 0 and of(as_critic["train"], lora[0])["ppo"] > 0


BASES = {"load": (1.0, 0.0, 0.0), "train": (0.0, 1.0, 0.0), "score": (0.0, 0.0, 1.0)}


@pytest.mark.parametrize("lora", ["null", "{r: 2, alpha: 4}"])
def test_the_base_of_a_reward_model_is_timed_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: str
) -> None:
    """An encoder, which cannot be the critic, and a decoder of the policy's kind, which can."""
    monkeypatch.setattr(calibration, "TIMED_CALLS", 0)
    monkeypatch.setattr(calibration, "TIMED_TOKENS", 40)
    encoder = save_bert(tmp_path / "bert", ["Soup"], positions=512)
    for base, critic in ((str(encoder), False), ("tiny", True)):
        recipe = load_recipe("smoke", [*FEW, f"reward_model.base={base}", f"model.lora={lora}"]).recipe
        sides, text_encoder = estimate.read_data(recipe, None)
        speed = calibrate(recipe, sides["train"], text_encoder)
        assert speed.base is not None and min(vars(speed.base).values()) > 0 and speed.critic_from_base == critic
        assert speed.base not in (speed.policy, None) and speed.reward == speed.base
    plain = load_recipe("smoke", [*FEW, f"model.lora={lora}"]).recipe
    speed = calibrate(plain, sides["train"], text_encoder)
    assert speed.base is None and speed.reward == speed.policy and not speed.critic_from_base


def test_a_stage_that_is_there_takes_no_time(small_run: Path) -> None:
    command = ["run", "smoke", "--out", str(small_run), *SMALL, "--estimate", "--dry-run", "--json"]
    described = json.loads(duel(*command).stdout)
    assert described["estimate"] == {"seconds": 0.0, "processes": 1, "parts": [], "without": []}


def test_the_first_lines_of_a_run_say_what_it_does_and_how_long(tmp_path: Path) -> None:
    """Timed here, with the model."""
    sets = [f"--set={value}" for value in FEW]
    done = duel("run", "smoke", "--out", str(tmp_path / "new"), "--estimate", "--dry-run", *sets)
    assert done.stderr.startswith("timing tiny on this machine")
    shown = done.stdout.splitlines()
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
        estimated = estimate.estimate(load_recipe("smoke", sets), out, options=RunOptions(**options))
        return [part["part"] for part in estimated["parts"]]

    assert parts(tmp_path / "new", [*FEW], until="sft") == ["data", "sft"]
    small = [option.removeprefix("--set=") for option in SMALL]
    assert parts(small_run, small, only="dpo") == []
    assert parts(small_run, small, only="dpo", force=True) == ["dpo"]
    assert parts(small_run, small, force=True) == ["data", "sft", "reward_model", "ppo", "dpo", "evaluate"]
    further = estimate.estimate(load_recipe("smoke", [*FEW, "evaluate.temperatures=[0.7]"]), tmp_path / "new")
    assert further["without"] == ["the samples at further temperatures"]
