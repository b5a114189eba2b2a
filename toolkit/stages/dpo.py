"""The shortcut arm: direct preference optimisation, the policy as its own reward model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import TrainingArguments

from toolkit import models, training
from toolkit.locating import resolve
from toolkit.preferences.reading import from_parquet
from toolkit.progress import Reporter
from toolkit.recipe import DpoSection
from toolkit.scoring import Engine, by_response


def preference_loss(
    log_ratio_i: torch.Tensor, log_ratio_j: torch.Tensor, prefer_i: torch.Tensor, section: DpoSection
) -> torch.Tensor:
    """[P] losses of comparisons, from log pi/pi_ref of their two responses (for IPO: per token).

    sigmoid: Rafailov et al. 2023 (arXiv 2305.18290), equation 7, with conservative label smoothing (Mitchell 2023).
    ipo: Azar et al. 2023 (arXiv 2310.12036), equation 17, on length-averaged log-ratios as in TRL.
    hinge: Zhao et al. 2023 (SLiC), as in TRL. A soft label weighs the loss of both orders.

    >>> loss = preference_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), DpoSection(beta=1.0))
    >>> round(loss.item(), 6)  # -log sigmoid(1)
    0.313262
    """
    difference = log_ratio_i - log_ratio_j
    p = prefer_i * (1 - section.label_smoothing) + (1 - prefer_i) * section.label_smoothing
    if section.loss_type == "sigmoid":
        margin = section.beta * difference
        return -(p * F.logsigmoid(margin) + (1 - p) * F.logsigmoid(-margin))
    if section.loss_type == "ipo":
        target = 1 / (2 * section.beta)
        return p * (difference - target).square() + (1 - p) * (-difference - target).square()
    margin = section.beta * difference
    return p * F.relu(1 - margin) + (1 - p) * F.relu(1 + margin)


def dpo_loss(
    engine: Engine, section: DpoSection, reference: list[torch.Tensor], batch: training.PairBatch
) -> tuple[torch.Tensor, dict[str, float]]:
    """The mean over prompts of the mean over comparisons; ``reference[e]``: [K] log-probabilities of example e."""
    logps_N, _ = engine.token_logps(batch.trees)
    logps_R = by_response(logps_N, batch.trees)
    ref_R = torch.cat([reference[e] for e in batch.example.tolist()]).to(logps_R.device)
    ratio_R = logps_R - ref_R
    rewards_R = section.beta * ratio_R.detach()
    if section.loss_type == "ipo":
        ratio_R = ratio_R / torch.bincount(batch.trees.owner, minlength=ratio_R.numel())
    losses_P = preference_loss(ratio_R[batch.first], ratio_R[batch.second], batch.prefer_first, section)
    with torch.no_grad():
        sign = torch.sign(batch.prefer_first - 0.5)
        decided = sign != 0
        chosen = torch.where(sign > 0, batch.first, batch.second)[decided]
        rejected = torch.where(sign > 0, batch.second, batch.first)[decided]
        margin = rewards_R[chosen] - rewards_R[rejected]
        logps = logps_R.detach()
        metrics = {
            "rewards/chosen": rewards_R[chosen].mean().item(),
            "rewards/rejected": rewards_R[rejected].mean().item(),
            "rewards/margins": margin.mean().item(),
            "rewards/accuracies": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean().item(),
            "logps/chosen": logps[chosen].mean().item(),
            "logps/rejected": logps[rejected].mean().item(),
        }
    return (batch.weight * losses_P).sum(), metrics if bool(decided.any()) else {}


def run(settings: Any, inputs: dict[str, Path], out: Path, reporter: Reporter) -> dict[str, Any]:
    """Writes ``model/``, the arm's policy, and ``checkpoints/step-N/`` along training."""
    section: DpoSection = settings.dpo
    sft_folder = inputs["sft"] / "model"
    sft = resolve(str(sft_folder))
    tokenizer = models.load_tokenizer(sft)
    dtype = models.DTYPES[settings.model.dtype]
    training.seed_everything(settings.seed)
    policy = models.load_policy(sft, settings.model, dtype=None if settings.model.lora else torch.float32)
    policy = models.trainable(policy, settings.model.lora, task="CAUSAL_LM").to(models.best_device())
    engine = Engine(policy, int(tokenizer.pad_token_id), dtype=dtype)

    rows = from_parquet(inputs["data"] / "train.parquet")
    examples = training.examples_of(rows, tokenizer, settings.data.max_response_tokens)
    steps = training.total_steps(section, len(examples))
    policy.eval()
    n_responses = sum(len(example.tree.response_ids) for example in examples)
    with reporter.task("reference log-probabilities", n_responses) as task:
        # Before its first step the policy is the reference: a new adapter changes nothing.
        per_token = engine.logps([example.tree for example in examples], advance=task.advance)
    reference = [torch.stack([logps.sum() for logps in responses]) for responses in per_token]

    facts = {
        "arm": "dpo",
        "beta": section.beta,
        "loss_type": section.loss_type,
        "reference_fingerprint": sft.fingerprint,
    }

    def keep(step: int) -> None:
        folder = training.policy_folder(out, step, final=step == steps)
        models.save_policy(policy, tokenizer, folder, dtype=dtype, base=sft_folder)
        models.write_training_record(folder, step=step, **facts)

    watch = training.Watch(reporter, "dpo", steps)
    trainer = training.EngineTrainer(
        model=policy,
        args=TrainingArguments(
            **training.arguments(section, out, seed=settings.seed, dtype=settings.model.dtype, steps=steps)
        ),
        train_dataset=list(enumerate(examples)),
        data_collator=partial(training.collate, engine),
        loss_fn=partial(dpo_loss, engine, section, reference),
        callbacks=[watch, training.KeepPolicies(training.milestones(section, steps), keep)],
    )
    trainer.train(resume_from_checkpoint=training.last_checkpoint(out))
    mean_tokens = sum(len(example.tree) for example in examples) / len(examples)
    seen = steps * section.per_device_train_batch_size * section.gradient_accumulation_steps
    tokens = round(seen * mean_tokens) + sum(len(example.tree) for example in examples)
    return {"tokens": tokens, "history": watch.history, "steps": steps, "pairs": sum(len(e.pairs) for e in examples)}
