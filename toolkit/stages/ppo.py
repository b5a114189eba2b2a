"""The other arm's second half: PPO against the explicit reward model under a KL penalty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit.engine import distributed
from toolkit.models.encoding import text_encoder
from toolkit.models.inspect import DTYPES, inner
from toolkit.models.resolve import resolve
from toolkit.models.save import reward_mean, write_training_record
from toolkit.models.tokenizer import eos_ids, load_tokenizer
from toolkit.ppo.config import SHARED_SETTINGS, PPOConfig
from toolkit.ppo.loop import PPOLoop
from toolkit.ppo.models import SharedBase, build
from toolkit.ppo.prompts import PromptIds
from toolkit.ppo.rewards import model_source
from toolkit.ppo.schedule import Schedule
from toolkit.ppo.trainer import adapter_source
from toolkit.preferences.reading import from_parquet
from toolkit.progress import Reporter
from toolkit.recipe.schema import PpoSection
from toolkit.stages.contexts import PpoContext
from toolkit.training.callbacks import SaveAtSteps, StageProgress
from toolkit.training.trainer import (
    milestone_steps,
    policy_folder,
    seed_everything,
    train_to_end,
    training_arguments,
)


def run(context: PpoContext, inputs: dict[str, Path], out: Path, reporter: Reporter) -> dict[str, Any]:
    """Writes ``model/``, the arm's policy, ``checkpoints/step-N/`` along training, and ``critic/``."""
    section: PpoSection = context.ppo
    sft = resolve(str(inputs["sft"] / "model"))
    reward = resolve(str(inputs["reward_model"] / "model"))
    tokenizer = load_tokenizer(sft)
    seed_everything(context.seed)
    actors, reward_model = build(
        sft,
        reward,
        context.model,
        tokenizer,
        value_head_init=section.value_head_init,
        share_trunk=section.share_trunk,
    )
    dtype = DTYPES[context.model.dtype]
    if reward_model is None:
        assert isinstance(actors, SharedBase)
        source = adapter_source(actors)
    else:
        source = model_source(reward_model, tokenizer, tokenizer, dtype=dtype, mean=reward_mean(reward.path))

    rows = from_parquet(inputs["data"] / "train.parquet")
    encoder = text_encoder(tokenizer, rows[0].prompt, sft.spec)
    prompts = [PromptIds(row.prompt_id, encoder.prompt(row.prompt), row.prompt) for row in rows]
    schedule = Schedule(prompts, section, context.seed, distributed.launched_processes())
    steps = len(schedule)

    facts = {"arm": "rm_ppo", "beta": section.kl_coef, "reference_fingerprint": sft.fingerprint}
    facts["reward_model_fingerprint"] = reward.fingerprint

    stopped_at = -1

    def keep(step: int) -> None:
        folder = policy_folder(out, step, final=step in (steps, stopped_at))
        trainer.export(folder)
        write_training_record(folder, step=step, **facts)

    progress = StageProgress(reporter, "ppo", steps)
    at = milestone_steps(section, schedule.rollouts)
    trainer = PPOLoop(
        actors,
        configuration(section, out, context, schedule),
        prompts,
        [source],
        tokenizer,
        eos_ids=eos_ids(inner(actors.policy), tokenizer),
        dtype=dtype,
        keep=keep,
        callbacks=[progress, SaveAtSteps([rollout * schedule.updates_per_rollout for rollout in at], keep)],
    )
    train_to_end(trainer, progress, out)
    if trainer.state.global_step < steps:
        reporter.line(f"ppo: stopped at step {trainer.state.global_step} of {steps}, KL passed {section.max_kl} nats")
    if distributed.main_process():
        if trainer.state.global_step != steps:  # stopped early, or resumed with more processes, behind the last step
            stopped_at = trainer.state.global_step
            keep(stopped_at)
        actors.save_critic(out / "critic")
    sampled = sum(entry["tokens"] for entry in progress.history if "tokens" in entry)
    prompt_tokens = sum(len(p.ids) for p in prompts) / len(prompts) * schedule.rollouts * schedule.prompts_per_rollout
    return {"tokens": round(sampled + prompt_tokens), "history": progress.history, "steps": trainer.state.global_step}


def configuration(section: PpoSection, out: Path, context: PpoContext, schedule: Schedule) -> PPOConfig:
    """The recipe's section as the trainer's settings, with one entry of the log for each rollout."""
    values = training_arguments(section, out, seed=context.seed, dtype=context.model.dtype, steps=len(schedule))
    values |= section.model_dump(include=SHARED_SETTINGS)
    values["response_length"] = section.response_length or context.data.max_response_tokens
    values["logging_steps"] = schedule.updates_per_rollout
    return PPOConfig(**values)
