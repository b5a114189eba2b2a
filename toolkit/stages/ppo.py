"""The other arm's second half: PPO against the explicit reward model under a KL penalty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from toolkit import models, training
from toolkit.locating import resolve
from toolkit.ppo.actors import build
from toolkit.ppo.rollout import PromptIds
from toolkit.ppo.trainer import PPOTrainer, Schedule
from toolkit.preferences.encoding import encode_prompt
from toolkit.preferences.reading import from_parquet
from toolkit.progress import Reporter
from toolkit.recipe import PpoSection


def run(settings: Any, inputs: dict[str, Path], out: Path, reporter: Reporter) -> dict[str, Any]:
    """Writes ``model/``, the arm's policy, ``checkpoints/step-N/`` along training, and ``critic/``."""
    section: PpoSection = settings.ppo
    sft = resolve(str(inputs["sft"] / "model"))
    reward = resolve(str(inputs["reward_model"] / "model"))
    tokenizer = models.load_tokenizer(sft)
    training.seed_everything(settings.seed)
    actors = build(sft, reward, settings.model, tokenizer, value_head_init=section.value_head_init)

    rows = from_parquet(inputs["data"] / "train.parquet")
    prompts = [PromptIds(row.prompt_id, encode_prompt(tokenizer, row.prompt)) for row in rows]
    schedule = Schedule(prompts, section, settings.seed)
    steps = len(schedule)
    arguments = training.arguments(section, out, seed=settings.seed, dtype=settings.model.dtype, steps=steps)
    # A checkpoint inside a rollout could not be resumed: its samples are not kept.
    per_save = max(1, round(arguments["save_steps"] / schedule.updates))
    arguments |= {"save_steps": per_save * schedule.updates, "logging_steps": schedule.updates}

    facts = {"arm": "rm_ppo", "beta": section.kl_coef, "reference_fingerprint": sft.fingerprint}
    facts["reward_model_fingerprint"] = reward.fingerprint

    stopped_at = -1

    def keep(step: int) -> None:
        folder = training.policy_folder(out, step, final=step in (steps, stopped_at))
        actors.save_policy(folder, tokenizer)
        models.write_training_record(folder, step=step, **facts)

    watch = training.Watch(reporter, "ppo", steps)
    at = training.milestones(section, schedule.rollouts)
    trainer = PPOTrainer(
        actors,
        TrainingArguments(**arguments),
        section,
        prompts,
        tokenizer,
        eos_ids=models.eos_ids(actors.policy, tokenizer),
        response_length=section.response_length or settings.data.max_response_tokens,
        dtype=models.DTYPES[settings.model.dtype],
        callbacks=[watch, training.KeepPolicies([rollout * schedule.updates for rollout in at], keep)],
    )
    trainer.train(resume_from_checkpoint=training.last_checkpoint(out))
    if trainer.state.global_step < steps:
        reporter.line(f"ppo: stopped at step {trainer.state.global_step} of {steps}, KL passed {section.max_kl} nats")
        stopped_at = trainer.state.global_step
        keep(stopped_at)
    actors.save_critic(out / "critic")
    sampled = sum(entry["tokens"] for entry in watch.history if "tokens" in entry)
    prompt_tokens = sum(len(p.ids) for p in prompts) / len(prompts) * schedule.rollouts * schedule.per_rollout
    return {"tokens": round(sampled + prompt_tokens), "history": watch.history, "steps": trainer.state.global_step}
