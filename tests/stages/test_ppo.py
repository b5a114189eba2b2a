"""The stage of PPO: what its scores are centred on, and what it does without a critic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.running import SMALL
from transformers import PreTrainedTokenizerBase

from toolkit.engine.engine import Engine
from toolkit.engine.sampling import SamplingParams, sample_responses
from toolkit.errors import DataError
from toolkit.models.encoding import Tree, text_encoder
from toolkit.models.load import load_policy, load_reward_model
from toolkit.models.resolve import resolve
from toolkit.models.reward_head import SampleLaw, reward_head
from toolkit.models.tokenizer import load_tokenizer
from toolkit.ppo.further_prompts import further_prompts
from toolkit.ppo.prompts import PromptIds
from toolkit.ppo.schedule import Schedule
from toolkit.preferences.rows import PreferenceRow
from toolkit.preferences.tables import from_parquet
from toolkit.progress import Reporter
from toolkit.recipe.files import load_recipe
from toolkit.recipe.training import ModelSection
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
    assert reward_head(reward).samples == SampleLaw(1.0, 12)
    short = ["data.max_response_tokens=12", "ppo.total_episodes=16", "ppo.per_device_train_batch_size=16"]
    context = context_with(*short, "ppo.temperature=0.4", "ppo.response_length=7")
    inputs = {name: small_run / name for name in ("data", "sft", "reward_model")}
    ppo.run(context, inputs, tmp_path, Reporter(quiet=True))
    [state] = (tmp_path / "trainer").glob("checkpoint-*/ppo_state.json")
    centre = json.loads(state.read_text(encoding="utf-8"))["centre"]

    sft, section = resolve(str(small_run / "sft" / "model")), ModelSection(name="tiny", dtype="float32", lora=None)
    tokenizer = load_tokenizer(sft)
    read, _ = ppo.read_prompts(context, inputs["data"], tokenizer, Reporter(quiet=True))
    schedule = Schedule(read, context.ppo, context.seed)
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
    scores = [score - reward_head(reward).mean for [score] in engine.scores(trees)]
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


def words(n: int) -> str:
    return " ".join(["good"] * n)


@pytest.mark.e2e
def test_the_length_alone_as_the_reward(small_run: Path, tmp_path: Path) -> None:
    """Its target is the mean length of the preferred responses, or the recipe's; the reward model is not asked."""
    inputs = {name: small_run / name for name in ("data", "sft", "reward_model")}
    tokenizer = load_tokenizer(resolve(str(small_run / "sft" / "model")))
    context = context_with(*SMALL_SETTINGS, "ppo.reward=length", "ppo.missing_eos_penalty=null", "ppo.reward_clip=null")
    rows = from_parquet(inputs["data"] / "train.parquet")
    encoder = text_encoder(tokenizer, rows[0].prompt)
    means = []
    for row in rows:
        lengths = [len(ids) for ids in encoder.encode(row.prompt, row.responses, 12).tree.response_ids]
        weight = sum(c.weight for c in row.comparisons)
        means.append(sum(c.weight * lengths[c.winner] for c in row.comparisons) / weight)
    target = ppo.preferred_length(context, inputs["data"], tokenizer)
    assert target == pytest.approx(sum(means) / len(means)) and 1 < target <= 12

    ppo.run(context, inputs, tmp_path / "mean", Reporter(quiet=True))
    short = context_with(*SMALL_SETTINGS, "ppo.reward=length", "ppo.target_length=2", "ppo.total_episodes=16")
    record = ppo.run(short, inputs, tmp_path / "short", Reporter(quiet=True))
    # Of the first rollout, which SFT samples: every response of n tokens has 1 - |n / 2 - 1|, at most 12 tokens.
    first = record["history"][0]
    assert first["objective/score"] == pytest.approx(2 - first["length/mean"] / 2, abs=0.2)
    written = json.loads((tmp_path / "mean" / "model" / "duel.json").read_text(encoding="utf-8"))
    assert written["reward"] == "length"
    # Nothing centres a length, whatever the rollouts' law is.
    law = SampleLaw(0.5, 12)
    assert (
        ppo.configuration(
            context.ppo, tmp_path, context, Schedule([PromptIds("a", [1])], context.ppo, 0), law
        ).center_samples
        == 0
    )


@pytest.mark.e2e
def test_further_prompts_are_those_that_training_may_use(small_run: Path, tmp_path: Path) -> None:
    inputs = {name: small_run / name for name in ("data", "sft", "reward_model")}
    train, held_out = (from_parquet(inputs["data"] / f"{side}.parquet") for side in ("train", "eval"))
    file = tmp_path / "more.txt"
    lines = [
        "A new film was",
        "",
        "A new film was",
        train[0].prompt,
        held_out[0].prompt,
        words(200),
        "The new hotel was",
    ]
    file.write_text("\n".join(map(str, lines)), encoding="utf-8")
    context = context_with(*SMALL_SETTINGS, f"ppo.prompts={file}", "ppo.total_episodes=16")
    said: list[str] = []
    reporter = Reporter(quiet=True)
    reporter.line = said.append  # type: ignore[method-assign]
    tokenizer = load_tokenizer(resolve(str(small_run / "sft" / "model")))
    prompts, n_further = ppo.read_prompts(context, inputs["data"], tokenizer, reporter)
    assert [prompt.prompt for prompt in prompts[len(train) :]] == ["A new film was", "The new hotel was"]
    assert n_further == 2 and len(prompts) == len(train) + 2
    counts = "1 in the training data, 1 held out, 1 with more than 64 tokens"
    assert said == [f"ppo: 2 further prompts of {file}; left out: {counts}"]
    record = ppo.run(context, inputs, tmp_path / "out", reporter)
    assert record["further_prompts"] == 2
    file.write_text(str(held_out[0].prompt), encoding="utf-8")
    with pytest.raises(DataError, match="no further prompt is left"):
        ppo.read_prompts(context, inputs["data"], tokenizer, reporter)


def test_further_prompts_of_held_out_groups_are_left_out(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = tmp_path / "more.jsonl"
    file.write_text('{"prompt": "a", "group": "x"}\n{"prompt": "b", "group": "y"}\n{"prompt": "c"}\n', encoding="utf-8")
    held_out = [
        PreferenceRow("id", "held out", ["1", "2"], [], group="x"),
        PreferenceRow("id2", "other", ["1", "2"], []),
    ]
    prompts, line = further_prompts(str(file), [], held_out, text_encoder(tokenizer, "a"), 10)
    assert [prompt.prompt for prompt in prompts] == ["b", "c"] and line.endswith("left out: 1 held out")


@pytest.mark.e2e
def test_the_options_of_the_updates_reach_the_stage(small_run: Path, tmp_path: Path) -> None:
    """Text that SFT imitates, a reference that follows the policy, and completions to look at."""
    inputs = {name: small_run / name for name in ("data", "sft", "reward_model")}
    options = ["ppo.ptx_coef=0.5", "ppo.reference_decay=0.5", "ppo.log_completions_steps=4"]
    context = context_with(*SMALL_SETTINGS, *options)
    record = ppo.run(context, inputs, tmp_path, Reporter(quiet=True))
    plain = json.loads((small_run / "ppo" / "stage.json").read_text(encoding="utf-8"))["metrics"]
    for entry, same in zip(record["history"][:1], plain["history"][:1], strict=True):
        assert entry["objective/score"] == same["objective/score"] and entry["loss/ptx"] > 0
    assert record["response_tokens_trained"] > plain["response_tokens_trained"]  # those of the texts count
    averaged = [entry["objective/kl_averaged_reference"] for entry in record["history"]]
    assert averaged[0] == 0 and averaged[-1] != record["history"][-1]["objective/kl"]
    lines = (tmp_path / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["step"] for line in lines} == {4 * i for i in range(len(record["history"]))}
    assert not (small_run / "ppo" / "completions.jsonl").exists()
    tokenizer = load_tokenizer(resolve(str(small_run / "sft" / "model")))
    rows = from_parquet(inputs["data"] / "train.parquet")
    assert len(ppo.read_texts(context, inputs["data"], tokenizer, Reporter(quiet=True))) == len(rows)
    file = tmp_path / "texts.txt"
    file.write_text("A long walk home.\n", encoding="utf-8")
    named = context_with(*SMALL_SETTINGS, "ppo.ptx_coef=0.5", f"ppo.ptx_texts={file}")
    assert len(ppo.read_texts(named, inputs["data"], tokenizer, Reporter(quiet=True))) == 1
    assert ppo.read_texts(context_with(*SMALL_SETTINGS), inputs["data"], tokenizer, Reporter(quiet=True)) == []
