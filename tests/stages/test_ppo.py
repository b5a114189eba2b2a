"""The stage of PPO: what its scores are centred on, and what it does without a critic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.running import SMALL

from toolkit.engine.engine import Engine
from toolkit.engine.sampling import SamplingParams, sample_responses
from toolkit.models.encoding import Tree
from toolkit.models.load import load_policy, load_reward_model
from toolkit.models.resolve import resolve
from toolkit.models.save import SampleLaw, centring_law, reward_mean
from toolkit.models.tokenizer import load_tokenizer
from toolkit.ppo.prompts import PromptIds
from toolkit.ppo.schedule import Schedule
from toolkit.progress import Reporter
from toolkit.recipe.files import load_recipe
from toolkit.recipe.schema import ModelSection
from toolkit.stages import ppo
from toolkit.stages.contexts import PpoContext, context_of

pytestmark = pytest.mark.invariant
# Those of the fixture ``small_run``.
SMALL_SETTINGS = [setting.removeprefix("--set=") for setting in SMALL]


def context_with(*sets: str) -> PpoContext:
    context = context_of("ppo", load_recipe("smoke", sets).recipe)
    assert isinstance(context, PpoContext)
    return context


@pytest.mark.parametrize(
    ("sets", "n"),
    [
        ((), 0),
        (("ppo.temperature=0.7",), 128),
        (("ppo.response_length=12",), 128),
        (("ppo.response_length=48",), 0),  # the length of the data
    ],
)
def test_rollouts_unlike_the_centring_samples_are_centred_anew(sets: tuple[str, ...], n: int, tmp_path: Path) -> None:
    context = context_with(*sets, "data.max_response_tokens=48")
    schedule = Schedule([PromptIds("a", [1])], context.ppo, 0)
    for law, expected in ((SampleLaw(1.0, 48), n), (None, 0)):
        assert ppo.configuration(context.ppo, tmp_path, context, schedule, law).center_samples == expected


@pytest.mark.e2e
def test_the_mean_score_of_samples_like_the_rollouts_is_zero(small_run: Path, tmp_path: Path) -> None:
    """At a low temperature the SFT policy's samples score otherwise than at 1, where the reward model was centred."""
    reward = small_run / "reward_model" / "model"
    assert centring_law(reward) == SampleLaw(1.0, 12)
    short = ["data.max_response_tokens=12", "ppo.total_episodes=16", "ppo.per_device_train_batch_size=16"]
    context = context_with(*short, "ppo.temperature=0.4", "ppo.response_length=7")
    inputs = {name: small_run / name for name in ("data", "sft", "reward_model")}
    ppo.run(context, inputs, tmp_path, Reporter(quiet=True))
    [state] = (tmp_path / "trainer").glob("checkpoint-*/ppo_state.json")
    centre = json.loads(state.read_text(encoding="utf-8"))["centre"]

    sft, section = resolve(str(small_run / "sft" / "model")), ModelSection(name="tiny", dtype="float32", lora=None)
    tokenizer = load_tokenizer(sft)
    schedule = Schedule(ppo.read_prompts(inputs["data"], tokenizer, "sft"), context.ppo, context.seed)
    prompts = [schedule.prompt_at(position) for position in range(128)]
    samples = sample_responses(
        load_policy(sft, section),
        tokenizer,
        [prompt.ids for prompt in prompts],
        lambda i, _: (context.seed, "centre", i, prompts[i].prompt_id),
        SamplingParams(7, 0.4),
        dtype=torch.float32,
    )
    trees = [Tree(prompt.ids, [response.ids]) for prompt, [response] in zip(prompts, samples, strict=True)]
    engine = Engine(load_reward_model(resolve(str(reward)), section), 0, dtype=torch.float32)
    scores = [score - reward_mean(reward) for [score] in engine.scores(trees)]
    assert centre == pytest.approx(sum(scores) / 128, abs=1e-3) and abs(centre) > 0.01


@pytest.mark.e2e
def test_rloo_trains_the_arm_without_a_critic(small_run: Path, tmp_path: Path) -> None:
    """From the same first rollout: the samples and scores are those of the run's PPO."""
    context = context_with(*SMALL_SETTINGS, "ppo.advantage=rloo")
    inputs = {name: small_run / name for name in ("data", "sft", "reward_model")}
    record = ppo.run(context, inputs, tmp_path, Reporter(quiet=True))
    with_critic = json.loads((small_run / "ppo" / "stage.json").read_text(encoding="utf-8"))["metrics"]["history"]
    first, same = record["history"][0], with_critic[0]
    for name in ("objective/score", "objective/rlhf_reward", "length/mean", "tokens"):
        assert first[name] == pytest.approx(same[name], abs=1e-5), name
    assert record["history"][-1]["objective/kl"] != 0
    assert not any(name.startswith("value/") for entry in record["history"] for name in entry)
    assert any(name.startswith("value/") for name in same)
    assert (small_run / "ppo" / "critic").is_dir() and not (tmp_path / "critic").exists()
    assert (tmp_path / "model" / "model.safetensors").is_file()
