"""A baseline beside both arms: SFT goes on with the best of its own samples by the reward model.

Rejection-sampling fine-tuning: Touvron et al. 2023 (arXiv 2307.09288), section 3.2.3; RAFT, Dong et al. 2023 (arXiv
2304.06767), with one iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from toolkit.engine import distributed
from toolkit.engine.engine import Engine
from toolkit.engine.sampling import SamplingParams, sample_responses
from toolkit.models.encoding import TextEncoder, Tree, text_encoder
from toolkit.models.inspect import best_device, torch_dtype
from toolkit.models.load import load_policy, trainable
from toolkit.models.resolve import ModelRef, resolve
from toolkit.models.save import save_policy, write_training_record
from toolkit.models.sharding import placed
from toolkit.models.tokenizer import load_tokenizer
from toolkit.ppo.labels import labels_by
from toolkit.preferences import splits
from toolkit.preferences.rows import PreferenceRow
from toolkit.preferences.samples import Sample, by_prompt, read_samples, stored_samples, write_samples
from toolkit.preferences.tables import from_parquet
from toolkit.progress import Reporter
from toolkit.stages.contexts import RftContext
from toolkit.training.batch import Example
from toolkit.training.budget import Spending
from toolkit.training.callbacks import StageProgress
from toolkit.training.imitation import completion_loss
from toolkit.training.length import total_steps
from toolkit.training.online import SampledPrompts
from toolkit.training.trainer import (
    EngineTrainer,
    seed_everything,
    train_to_end,
    trained_tokens,
    training_arguments,
)

SAMPLES_FILE = "samples.parquet"
COLUMNS = (
    *("prompt_id", "policy", "sample_index", "response", "response_ids", "n_tokens", "truncated"),
    "explicit_reward",
)


def run(context: RftContext, inputs: dict[str, Path], out: Path, reporter: Reporter) -> dict[str, Any]:
    """Writes ``model/``, the policy, and ``samples.parquet``: all n samples of each prompt with their rewards."""
    section, dtype, spending = context.rft, torch_dtype(context.model.dtype), Spending()
    sft = resolve(str(inputs["sft"] / "model"))
    reward = inputs["reward_model"] / "model"
    tokenizer = load_tokenizer(sft)
    rows = splits.limit(from_parquet(inputs["data"] / "train.parquet"), section.prompts, context.seed)
    encoder = text_encoder(tokenizer, rows[0].prompt, sft.spec)
    samples = stored_samples(out / SAMPLES_FILE, COLUMNS)
    distributed.barrier()  # every process has read the file before one writes it
    if samples is None:
        with distributed.shared_batches():
            samples = scored_samples(context, rows, encoder, sft, reward, reporter)
        if distributed.main_process():
            write_samples(samples, out / SAMPLES_FILE, COLUMNS)
        distributed.barrier()  # the others read it
        samples = read_samples(out / SAMPLES_FILE, COLUMNS)
    best = best_of_prompts(samples)
    examples = [Example(Tree(encoder.prompt(row.prompt), [best[row.prompt_id].response_ids]), []) for row in rows]

    steps = total_steps(section, len(examples))
    seed_everything(context.seed)
    policy = load_policy(sft, context.model, dtype=dtype if context.model.lora else torch.float32)
    policy = placed(trainable(policy, context.model.lora, task="CAUSAL_LM"))
    engine = Engine(policy, int(tokenizer.pad_token_id), dtype=dtype)
    progress = StageProgress(reporter, "rft", steps)
    arguments = training_arguments(section, out, seed=context.seed, dtype=context.model.dtype, steps=steps)
    trainer = EngineTrainer(engine, arguments, examples, partial(completion_loss, engine), [progress], spending)
    train_to_end(trainer, progress, out)
    if distributed.saves_models():
        save_policy(policy, tokenizer, out / "model", dtype=dtype, base=sft)
        write_training_record(
            out / "model",
            step=steps,
            **spending.facts(),
            arm="rft",
            conversational=encoder.conversational,
            n=section.n,
            reference_fingerprint=sft.fingerprint,
            reward_model_fingerprint=resolve(str(reward)).fingerprint,
        )
    rewards = [[float(sample.explicit_reward or 0.0) for sample in of] for of in by_prompt(samples).values()]
    return {
        "tokens": sum(sample.n_tokens for sample in samples) + trained_tokens(section, steps, examples),
        "history": progress.history,
        "steps": steps,
        "n_samples": len(samples),
        "mean_reward": sum(map(sum, rewards)) / len(samples),
        "mean_best_reward": sum(map(max, rewards)) / len(rewards),
        **spending.metrics(),
    }


def scored_samples(
    context: RftContext,
    rows: Sequence[PreferenceRow],
    encoder: TextEncoder,
    sft: ModelRef,
    reward: Path,
    reporter: Reporter,
) -> list[Sample]:
    """``rft.n`` samples of SFT for each row's prompt, with the reward model's scores of the ids that were sampled."""
    params = SamplingParams(context.data.max_response_tokens, context.rft.temperature, context.rft.n)
    prompts = [encoder.prompt(row.prompt) for row in rows]
    with reporter.task("sample sft", len(rows) * params.n) as task:
        groups = sample_responses(
            load_policy(sft, context.model).to(best_device()),
            encoder.tokenizer,
            prompts,
            lambda i, k: (context.seed, "rft", rows[i].prompt_id, k),
            params,
            dtype=torch_dtype(context.model.dtype),
            advance=task.advance,
        )
    sampled = SampledPrompts(
        [row.prompt for row in rows],
        [Tree(ids, [sample.ids for sample in group]) for ids, group in zip(prompts, groups, strict=True)],
        [[encoder.decode(sample.ids) for sample in group] for group in groups],
        [[sample.truncated for sample in group] for group in groups],
    )
    scores = labels_by("rm", reward, encoder.tokenizer, context.model)(sampled)
    return [
        Sample(
            prompt_id=row.prompt_id,
            policy="sft",
            sample_index=k,
            response=text,
            response_ids=response.ids,
            n_tokens=len(response.ids),
            truncated=response.truncated,
            explicit_reward=score,
        )
        for row, group, texts, of_prompt in zip(rows, groups, sampled.texts, scores, strict=True)
        for k, (response, text, score) in enumerate(zip(group, texts, of_prompt, strict=True))
    ]


def best_of_prompts(samples: Sequence[Sample]) -> dict[str, Sample]:
    """Prompt id -> its sample with the highest reward, of equal ones the first."""
    return {
        name: max(of_prompt, key=lambda sample: (sample.explicit_reward or 0.0, -sample.sample_index))
        for name, of_prompt in by_prompt(samples).items()
    }
