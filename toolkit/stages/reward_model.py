"""The explicit reward model: a scalar head on the SFT policy, Bradley-Terry over all comparisons of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Trainer

from toolkit.engine import distributed
from toolkit.engine.engine import Engine
from toolkit.engine.sampling import SamplingParams, sample_responses
from toolkit.models.encoding import TextEncoder, Tree, text_encoder
from toolkit.models.inspect import DTYPES, best_device
from toolkit.models.load import load_policy, new_reward_model, trainable
from toolkit.models.resolve import ModelRef, resolve
from toolkit.models.save import CENTRING_PROMPTS, SampleLaw, save_policy, write_reward_mean
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences.reading import from_parquet
from toolkit.preferences.rows import PreferenceRow
from toolkit.progress import Reporter
from toolkit.stages.contexts import RewardModelContext
from toolkit.training import trl
from toolkit.training.batch import PairBatch, examples_of
from toolkit.training.budget import Spending
from toolkit.training.callbacks import StageProgress
from toolkit.training.trainer import (
    EngineTrainer,
    prompts_seen,
    seed_everything,
    total_steps,
    train_to_end,
    trained_tokens,
    training_arguments,
)


def bradley_terry(
    engine: Engine, center_rewards_coefficient: float, batch: PairBatch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of -log sigmoid(r_i - r_j - margin) over comparisons, and metrics; responses are computed once.

    A soft label weighs the losses of both orders. Ouyang et al. 2022 (arXiv 2203.02155), equation 1; the margin:
    Touvron et al. 2023 (arXiv 2307.09288), equation 2.
    """
    rewards_R = engine.branch_scores(batch.trees)
    first, second = rewards_R[batch.first], rewards_R[batch.second]
    margin = first - second
    p = batch.prefer_first
    nll = -(p * F.logsigmoid(margin - batch.margin) + (1 - p) * F.logsigmoid(-margin - batch.margin))
    loss = (batch.weight * nll).sum()
    if center_rewards_coefficient:
        loss = loss + center_rewards_coefficient * (batch.weight * (first + second).square()).sum()
    with torch.no_grad():
        chosen, rejected = (rewards_R[responses] for responses in batch.decided())
        right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": right,
            # The names that RewardTrainer logs.
            "accuracy": right,
            "margin": chosen - rejected,
            "mean_reward": rewards_R,
        }
    return loss, metrics


def run(context: RewardModelContext, inputs: dict[str, Path], out: Path, reporter: Reporter) -> dict[str, Any]:
    """Writes ``model/``: a sequence classifier (an adapter on the SFT model, or all weights), and its mean score."""
    section, spending = context.reward_model, Spending()
    sft_folder = inputs["sft"] / "model"
    sft = resolve(str(sft_folder))
    tokenizer = load_tokenizer(sft)
    dtype = DTYPES[context.model.dtype]
    pad_id = int(tokenizer.pad_token_id)
    seed_everything(context.seed)
    model: Any = new_reward_model(sft, context.model, pad_id, context.seed).to(best_device())
    rows = from_parquet(inputs["data"] / "train.parquet")
    encoder = text_encoder(tokenizer, rows[0].prompt, sft.spec)
    examples = examples_of(rows, encoder, context.data.max_response_tokens)
    n_items = trl.n_pairs(examples) if section.trainer == "trl" else len(examples)
    steps = total_steps(section, n_items)
    progress = StageProgress(reporter, "reward_model", steps)
    arguments = training_arguments(section, out, seed=context.seed, dtype=context.model.dtype, steps=steps)
    lora = context.model.lora
    trainer: Trainer
    if section.trainer == "trl":
        trl_inputs = trl.TrainerInputs(model, lora, tokenizer, arguments, [progress], spending)
        trainer = trl.reward_model(trl_inputs, section, examples, reporter)
        model = trainer.model
    else:
        model = trainable(model, lora, task="SEQ_CLS", modules_to_save=["score"])
        engine = Engine(model, pad_id, dtype=dtype)
        loss = partial(bradley_terry, engine, section.center_rewards_coefficient)
        trainer = EngineTrainer(engine, arguments, examples, loss, [progress], spending)
    train_to_end(trainer, progress, out)
    model.eval()
    engine = Engine(model, pad_id, dtype=dtype)
    if distributed.main_process():
        save_policy(model, tokenizer, out / "model", dtype=dtype, base=sft_folder)

    law = SampleLaw(temperature=1.0, max_new_tokens=context.data.max_response_tokens) if section.center else None
    mean = mean_of_samples(engine, sft, encoder, rows[:CENTRING_PROMPTS], context, law) if law is not None else 0.0
    if distributed.main_process():
        write_reward_mean(out / "model", mean, law)
    return {
        "tokens": trained_tokens(section, steps, examples),
        "prompts_seen": prompts_seen(section, steps, examples),
        "response_tokens_trained": spending.tokens,
        "history": progress.history,
        "mean": mean,
        "steps": steps,
    }


def mean_of_samples(
    engine: Engine,
    sft: ModelRef,
    encoder: TextEncoder,
    rows: Sequence[PreferenceRow],
    context: RewardModelContext,
    law: SampleLaw,
) -> float:
    """The mean score of SFT samples for the prompts of these rows: what is subtracted from every score."""
    prompts = [encoder.prompt(row.prompt) for row in rows]
    samples = sample_responses(
        load_policy(sft, context.model).to(engine.device),
        encoder.tokenizer,
        prompts,
        lambda i, _: (context.seed, "centring", rows[i].prompt_id),
        SamplingParams(law.max_new_tokens, law.temperature),
        dtype=DTYPES[context.model.dtype],
    )
    scores = engine.scores([Tree(ids, [sample.ids]) for ids, [sample] in zip(prompts, samples, strict=True)])
    return sum(score for [score] in scores) / len(scores)
