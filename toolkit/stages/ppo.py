"""The second stage of the arm rm_ppo: PPO against the explicit reward model under a KL penalty."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from toolkit.engine import distributed
from toolkit.errors import RecipeError
from toolkit.files import read_json
from toolkit.models.encoding import Tree, is_conversation, text_encoder
from toolkit.models.inspect import inner, torch_dtype
from toolkit.models.resolve import resolve
from toolkit.models.reward_head import CENTRING_PROMPTS, SampleLaw, reward_head
from toolkit.models.save import write_training_record
from toolkit.models.tokenizer import eos_ids, load_tokenizer
from toolkit.ppo.assembly import models_of_run
from toolkit.ppo.config import SHARED_SETTINGS, PPOConfig
from toolkit.ppo.further_prompts import further_prompts
from toolkit.ppo.loop import PPOLoop
from toolkit.ppo.prompts import PromptIds, TrainingData
from toolkit.ppo.ptx_texts import imitated_texts, texts_of_source
from toolkit.ppo.rewards import length_reward
from toolkit.ppo.sampling import SamplingSettings
from toolkit.ppo.schedule import Schedule
from toolkit.preferences.tables import from_parquet
from toolkit.progress import COMPLETIONS_FILE, Reporter
from toolkit.recipe.training import PpoSection
from toolkit.stages.contexts import PpoContext
from toolkit.training.batch import examples_of
from toolkit.training.budget import Budget, Spending
from toolkit.training.callbacks import StageProgress
from toolkit.training.length import NOTHING, Cost, limit_of
from toolkit.training.milestones import MilestonePolicy
from toolkit.training.trainer import (
    checkpoint,
    keep_along,
    policy_folder,
    record_before,
    seed_everything,
    train_to_end,
    training_arguments,
)

# Under a budget, PPO takes at most this many times the rollouts that it would take at the size of the first one.
MOST_ROLLOUTS = 4


def run(context: PpoContext, inputs: dict[str, Path], out: Path, reporter: Reporter) -> dict[str, Any]:
    """Writes ``model/``, the arm's policy, ``checkpoints/step-N/`` along training, and ``critic/`` if there is one.

    With ``log_completions_steps`` also ``completions.jsonl``. In a further round training goes on from the policy of
    ``previous``, with a new critic and optimiser, and records count its steps and its cost on.
    """
    previous = resolve(str(inputs["previous"] / "model")) if "previous" in inputs else None
    earlier = record_before(inputs)
    spending = Spending(cost_of_reward_model(inputs["reward_model"]) + Cost.recorded(earlier))
    section = with_episodes(context.ppo, spending.before)
    sft = resolve(str(inputs["sft"] / "model"))
    reward = resolve(str(inputs["reward_model"] / "model"))
    tokenizer = load_tokenizer(sft)
    seed_everything(context.seed)
    models, reward_function = models_of_run(
        sft,
        reward,
        context.model,
        tokenizer,
        value_head_init=section.value_head_init,
        share_trunk=section.share_trunk,
        with_critic=section.advantage == "gae",
        reward_shape=section.reward_shape,
        previous=previous,
    )
    prompts, n_further = read_prompts(context, inputs["data"], tokenizer, reporter)
    if section.reward == "length":
        target = section.target_length or preferred_length(context, inputs["data"], tokenizer)
        reporter.line(f"ppo: the reward is a response's length, with a target of {target:.4g} tokens")
        reward_function = length_reward(target)
    texts = read_texts(context, inputs["data"], tokenizer, reporter)
    schedule = Schedule(prompts, section, context.seed, distributed.launched_processes())
    steps, stopped_at = len(schedule), -1

    def record(folder: Path, facts: Mapping[str, object]) -> None:
        write_training_record(
            folder,
            **facts,
            **(budget or spending).facts(),
            arm="rm_ppo",
            conversational=is_conversation(prompts[0].prompt),
            beta=section.kl_coef,
            reference_fingerprint=sft.fingerprint,
            reward=section.reward,
            reward_model_fingerprint=reward.fingerprint,
        )

    def keep(step: int) -> None:
        folder = policy_folder(out, step, final=step in (steps, stopped_at))
        trainer.export(folder)
        record(folder, {"step": earlier.get("step", 0) + step})

    def keep_milestone(kept: MilestonePolicy) -> None:
        reporter.line(f"ppo: {kept}")
        if distributed.main_process():
            trainer.export_as_it_is(checkpoint(out, kept.name))
            record(checkpoint(out, kept.name), kept.facts())

    updates = schedule.updates_per_rollout
    budget, keeping = keep_along(section, spending, steps, keep, unit_steps=updates, cap=MOST_ROLLOUTS)
    progress = StageProgress(reporter, "ppo", steps, budget)
    dtype = torch_dtype(context.model.dtype)
    arguments = configuration(section, out, context, schedule, reward_head(reward.path).samples)
    if arguments.center_samples:
        reporter.line(
            f"ppo: rollouts have temperature {arguments.temperature:g} and at most {arguments.response_length} tokens, "
            f"unlike the samples that the reward model was centred on: {arguments.center_samples} such of SFT centre it"
        )
    trainer = PPOLoop(
        models,
        arguments,
        [reward_function],
        TrainingData(prompts, ptx=texts),
        SamplingSettings(tokenizer, eos_ids(inner(models.policy), tokenizer), dtype, context.seed),
        keep_milestone=keep_milestone,
        spending=spending,
        budget=budget,
        callbacks=[progress, *keeping],
    )
    train_to_end(trainer, progress, out)
    last_step = trainer.state.global_step
    if last_step < steps:
        reporter.line(f"ppo: stopped at step {last_step}{why_it_stopped(budget, steps, section)}")
    if distributed.saves_models():
        if last_step != steps:  # it stopped early, or resumed with more processes beyond the last step
            stopped_at = last_step
            keep(stopped_at)
        models.save_critic(out / "critic")
    take_completions(trainer, out)
    missed = trainer.milestones.missed("ppo", reporter.line) if section.kl_milestones else {}
    response_tokens = [entry["tokens"] for entry in progress.history if "tokens" in entry]
    n_prompts = -(-last_step // updates) * schedule.prompts_per_rollout  # of all rollouts
    prompt_tokens = sum(len(p.ids) for p in prompts) / len(prompts) * n_prompts
    # The first rollouts may train the critic alone.
    of_policy = response_tokens[section.critic_warmup_rollouts :]
    return {
        "tokens": round(sum(response_tokens) + prompt_tokens),
        "prompts_seen": min(len(prompts), len(of_policy) * schedule.prompts_per_rollout),
        **(budget or spending).metrics(),
        "further_prompts": n_further,
        "history": progress.history,
        "steps": last_step,
        **missed,
    }


def why_it_stopped(budget: Budget | None, steps: int, section: PpoSection) -> str:
    """For a line of progress, after the step's number."""
    if budget is None:
        return f" of {steps}, KL passed {section.max_kl} nats"
    if budget.ended == "capped":
        return (
            f": it took {MOST_ROLLOUTS} times the rollouts that the budget would take at the size of the first one; "
            "rollouts have shrunk (length/mean in the log)"
        )
    return ", the budget's end" if budget.ended else f", KL passed {section.max_kl} nats"


def with_episodes(section: PpoSection, reward_model: Cost) -> PpoSection:
    """Under a budget, the section with more episodes than it pays for.

    Raises RecipeError where the training of the reward model took it all.
    """
    limit = limit_of(section)
    if limit is None:
        return section
    took = limit.of(reward_model)
    if took >= limit.amount:
        raise RecipeError(
            f"the reward model's training took {limit.words(took)}, and the arm's budget is "
            f"{limit.words(limit.amount)}",
            where=f"ppo.{limit.key}",
            fix="a larger budget, or fewer reward_model.num_train_epochs",
        )
    batch = section.per_device_train_batch_size * distributed.launched_processes()
    return section.model_copy(update={"total_episodes": limit.most_units * batch})


def cost_of_reward_model(stage: Path) -> Cost:
    """What the stage of the reward model cost, by its record; nothing where the folder has none."""
    file = stage / "stage.json"
    if not file.is_file():
        return NOTHING
    record = read_json(file)
    return Cost(record["metrics"]["response_tokens_trained"], record["wall_s"])


def read_prompts(
    context: PpoContext, data: Path, tokenizer: PreTrainedTokenizerBase, reporter: Reporter
) -> tuple[list[PromptIds], int]:
    """The training prompts as token ids, then those of ``ppo.prompts``; and how many of the latter there are."""
    rows = from_parquet(data / "train.parquet")
    encoder = text_encoder(tokenizer, rows[0].prompt)
    prompts = [PromptIds(row.prompt_id, encoder.prompt(row.prompt), row.prompt) for row in rows]
    source = context.ppo.prompts
    if source is None:
        return prompts, 0
    held_out = from_parquet(data / "eval.parquet")
    further, line = further_prompts(source, rows, held_out, encoder, context.data.max_prompt_tokens)
    reporter.line(f"ppo: {line}")
    return prompts + further, len(further)


def take_completions(trainer: PPOLoop, out: Path) -> None:
    """Move what ``log_completions_steps`` wrote out of the trainer's folder, which does not stay."""
    written = Path(str(trainer.args.output_dir)) / COMPLETIONS_FILE
    if distributed.main_process() and written.is_file():
        written.replace(out / COMPLETIONS_FILE)


def read_texts(context: PpoContext, data: Path, tokenizer: PreTrainedTokenizerBase, reporter: Reporter) -> list[Tree]:
    """The texts that ``ppo.ptx_coef`` mixes in; none where it is 0."""
    if not context.ppo.ptx_coef:
        return []
    rows = from_parquet(data / "train.parquet")
    encoder, limits = text_encoder(tokenizer, rows[0].prompt), context.data
    source = context.ppo.ptx_texts
    if source is None:
        return imitated_texts(rows, context.sft.train_on, encoder, limits.max_response_tokens, context.seed)
    held_out = from_parquet(data / "eval.parquet")
    lengths = (limits.max_prompt_tokens, limits.max_response_tokens)
    texts, line = texts_of_source(source, held_out, encoder, lengths, context.seed)
    reporter.line(f"ppo: {line}")
    return texts


def preferred_length(context: PpoContext, data: Path, tokenizer: PreTrainedTokenizerBase) -> float:
    """The mean number of tokens of a preferred response: over prompts, of the mean over their comparisons.

    A tie counts both responses by half.
    """
    rows = from_parquet(data / "train.parquet")
    encoder, means = text_encoder(tokenizer, rows[0].prompt), []
    for example in examples_of(rows, encoder, context.data.max_response_tokens):
        lengths = [len(ids) for ids in example.tree.response_ids]
        total = sum(weight for *_, weight in example.pairs)
        means.append(sum(w * (p * lengths[i] + (1 - p) * lengths[j]) for i, j, p, w in example.pairs) / total)
    return sum(means) / len(means)


def configuration(
    section: PpoSection, out: Path, context: PpoContext, schedule: Schedule, centred_on: SampleLaw | None
) -> PPOConfig:
    """The recipe's section as the trainer's settings, with one entry of the log for each rollout.

    ``centred_on`` is the law of the samples whose mean score is 0 (None: the reward model is not centred). Where
    rollouts have another, the scores are centred on samples like theirs. Those of `reward: length` are as they are.
    """
    values = training_arguments(section, out, seed=context.seed, dtype=context.model.dtype, steps=len(schedule))
    values |= section.model_dump(include=set(SHARED_SETTINGS))
    values["response_length"] = section.response_length or context.data.max_response_tokens
    values["logging_steps"] = schedule.updates_per_rollout
    law = SampleLaw(section.temperature, values["response_length"])
    centres = section.reward != "length" and centred_on not in (None, law)
    values["center_samples"] = CENTRING_PROMPTS if centres else 0
    return PPOConfig(**values)
