"""The other arm's second half: PPO against the explicit reward model under a KL penalty."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from toolkit.engine import distributed
from toolkit.models.encoding import text_encoder
from toolkit.models.inspect import DTYPES, inner
from toolkit.models.resolve import resolve
from toolkit.models.save import reward_mean, write_training_record
from toolkit.models.tokenizer import eos_ids, load_tokenizer
from toolkit.ppo.config import PPOConfig
from toolkit.ppo.loop import PPOLoop, Schedule
from toolkit.ppo.models import SharedBase, build
from toolkit.ppo.rewards import model_source
from toolkit.ppo.rollout import PromptIds
from toolkit.ppo.trainer import adapter_source
from toolkit.preferences.reading import from_parquet
from toolkit.progress import Reporter
from toolkit.recipe.schema import PpoSection
from toolkit.training.callbacks import KeepPolicies, Watch
from toolkit.training.trainer import (
    RESUME_POINTS,
    last_checkpoint,
    milestone_steps,
    policy_folder,
    seed_everything,
    training_arguments,
)


def run(settings: Any, inputs: dict[str, Path], out: Path, reporter: Reporter) -> dict[str, Any]:
    """Writes ``model/``, the arm's policy, ``checkpoints/step-N/`` along training, and ``critic/``."""
    section: PpoSection = settings.ppo
    sft = resolve(str(inputs["sft"] / "model"))
    reward = resolve(str(inputs["reward_model"] / "model"))
    tokenizer = load_tokenizer(sft)
    seed_everything(settings.seed)
    actors, reward_model = build(
        sft,
        reward,
        settings.model,
        tokenizer,
        value_head_init=section.value_head_init,
        share_trunk=section.share_trunk,
    )
    dtype = DTYPES[settings.model.dtype]
    if reward_model is None:
        assert isinstance(actors, SharedBase)
        source = adapter_source(actors)
    else:
        source = model_source(reward_model, tokenizer, tokenizer, dtype=dtype, mean=reward_mean(reward.path))

    rows = from_parquet(inputs["data"] / "train.parquet")
    encoder = text_encoder(tokenizer, rows[0].prompt, sft.spec)
    prompts = [PromptIds(row.prompt_id, encoder.prompt(row.prompt), row.prompt) for row in rows]
    config = configuration(section, out, settings)
    schedule = Schedule(prompts, config, settings.seed, config.world_size)
    steps = len(schedule)
    config.max_steps, config.logging_steps = steps, schedule.updates
    config.warmup_steps = math.ceil(section.warmup_ratio * steps)
    config.save_steps = max(1, math.ceil(steps / RESUME_POINTS))

    facts = {"arm": "rm_ppo", "beta": section.kl_coef, "reference_fingerprint": sft.fingerprint}
    facts["reward_model_fingerprint"] = reward.fingerprint

    stopped_at = -1

    def keep(step: int) -> None:
        folder = policy_folder(out, step, final=step in (steps, stopped_at))
        trainer.export(folder)
        write_training_record(folder, step=step, **facts)

    watch = Watch(reporter, "ppo", steps)
    at = milestone_steps(section, schedule.rollouts)
    trainer = PPOLoop(
        actors,
        config,
        prompts,
        [source],
        tokenizer,
        eos_ids=eos_ids(inner(actors.policy), tokenizer),
        dtype=dtype,
        keep=keep,
        callbacks=[watch, KeepPolicies([rollout * schedule.updates for rollout in at], keep)],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(out))
    if trainer.state.global_step < steps:
        reporter.line(f"ppo: stopped at step {trainer.state.global_step} of {steps}, KL passed {section.max_kl} nats")
    if distributed.main_process():
        if trainer.state.global_step != steps:  # stopped early, or resumed with more processes, behind the last step
            stopped_at = trainer.state.global_step
            keep(stopped_at)
        actors.save_critic(out / "critic")
    sampled = sum(entry["tokens"] for entry in watch.history if "tokens" in entry)
    prompt_tokens = sum(len(p.ids) for p in prompts) / len(prompts) * schedule.rollouts * schedule.per_rollout
    return {"tokens": round(sampled + prompt_tokens), "history": watch.history, "steps": trainer.state.global_step}


def configuration(section: PpoSection, out: Path, settings: Any) -> PPOConfig:
    """The recipe's section as the trainer's settings: equal names mean equal things."""
    shared = training_arguments(section, out, seed=settings.seed, dtype=settings.model.dtype, steps=1)
    known = {f.name for f in fields(PPOConfig)}
    own = {
        name: value
        for name, value in section.model_dump().items()
        if name in known - {"warmup_ratio"} and name not in shared
    }
    own["response_length"] = section.response_length or settings.data.max_response_tokens
    # Optimiser steps are counted from the episodes, and they are the stage's to say.
    return PPOConfig(**{**shared, "max_steps": -1, "warmup_steps": 0}, **own)
