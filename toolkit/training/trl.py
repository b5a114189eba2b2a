"""TRL's own DPOTrainer and RewardTrainer on our token ids (``trainer: trl``): for its other losses, and for parity.

They see pairs: a prompt with K responses becomes one row for each comparison with a winner, of equal weight. A row has
the columns that their ``DataCollatorForPreference`` reads. RewardTrainer's documentation has them; DPOTrainer insists
on text, which our rows replace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer  # type: ignore[attr-defined]

from toolkit.errors import ModelError
from toolkit.models.load import adapted, head_modules
from toolkit.progress import Reporter
from toolkit.recipe.training import DpoSection, Lora, RewardModelSection
from toolkit.training.batch import Example
from toolkit.training.budget import Spending
from toolkit.training.checkpoints import CheckpointFiles, EndsAtLastStep

TOKEN_COLUMN = "response_tokens"


@dataclass(frozen=True)
class TrainerInputs:
    """What both trainers take: a model without adapters, and the adapter that it gets (None: all weights train)."""

    model: Any
    lora: Lora | None
    tokenizer: PreTrainedTokenizerBase
    arguments: dict[str, Any]  # of ``TrainingArguments``
    callbacks: list[TrainerCallback]
    spending: Spending = field(default_factory=Spending)


# Columns of our rows that the trainers do not know must stay.
DEFAULTS = {"gradient_checkpointing": False, "max_length": None, "remove_unused_columns": False}


class CountsTokens(EndsAtLastStep):
    """Before a TRL trainer in the order of classes: tells ``spending`` how many response tokens a batch has."""

    spending: Spending

    def training_step(self, model: Any, inputs: Any, *args: Any, **more: Any) -> torch.Tensor:
        self.spending.add(int(inputs.pop(TOKEN_COLUMN).sum()))
        loss: torch.Tensor = super().training_step(model, inputs, *args, **more)  # type: ignore[misc]
        return loss


class CountingDPOTrainer(CountsTokens, DPOTrainer):
    pass


class CountingRewardTrainer(CountsTokens, RewardTrainer):
    pass


def give(trainer: Any, rows: list[dict[str, Any]], spending: Spending) -> None:
    """Let a counting trainer train on these rows, with their column of token counts in each batch."""
    collator = trainer.data_collator

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return {**collator(batch), TOKEN_COLUMN: torch.tensor([row[TOKEN_COLUMN] for row in batch])}

    trainer.data_collator, trainer.train_dataset, trainer.spending = collate, Dataset.from_list(rows), spending


def _with_adapter(inputs: TrainerInputs, seed: int, task: str, modules_to_save: list[str] | None = None) -> Any:
    """The model that trains. TRL's trainers would make the same adapter, but leave a head in the model's bf16, and tell
    of layers that the model lacks by an error of peft's.

    Raises ModelError where no layer gets an adapter.
    """
    if inputs.lora is None:
        return inputs.model
    set_seed(seed)  # as TRL does before it makes an adapter, which starts at random
    return adapted(inputs.model, inputs.lora, task=task, modules_to_save=modules_to_save)


def _pairs(examples: Sequence[Example], reporter: Reporter) -> list[tuple[int, int, int, float]]:
    """(example, chosen, rejected, margin) of every comparison with a winner. A line tells what TRL cannot express."""
    rows, ties, soft = [], 0, 0
    for index, example in enumerate(examples):
        margins = example.margins or (0.0,) * len(example.pairs)
        for (i, j, p, _), margin in zip(example.pairs, margins, strict=True):
            ties += p == 0.5
            soft += p not in (0.0, 0.5, 1.0)
            if p != 0.5:
                rows.append((index, i, j, margin) if p > 0.5 else (index, j, i, margin))
    if ties or soft:
        reporter.line(f"TRL's trainers know no ties and no soft labels: {ties} ties left out, {soft} labels rounded")
    return rows


def dpo(
    inputs: TrainerInputs,
    section: DpoSection,
    examples: Sequence[Example],
    reference: Sequence[torch.Tensor],
    reporter: Reporter,
) -> DPOTrainer:
    """A DPOTrainer with reference log-probabilities that were computed before: ``reference[e]``, [K], has those of the
    responses of example e.
    """
    rows = []
    for index, chosen, rejected, _ in _pairs(examples, reporter):
        ids = examples[index].tree.response_ids
        rows.append(
            {
                "prompt_ids": examples[index].tree.prompt_ids,
                "chosen_ids": ids[chosen],
                "rejected_ids": ids[rejected],
                TOKEN_COLUMN: len(ids[chosen]) + len(ids[rejected]),
                "ref_chosen_logps": float(reference[index][chosen]),
                "ref_rejected_logps": float(reference[index][rejected]),
            }
        )
    config = DPOConfig(
        **{**DEFAULTS, "beta": section.beta, **inputs.arguments},
        label_smoothing=section.label_smoothing,
        loss_type=[section.loss_type],
        precompute_ref_log_probs=True,
    )
    model = _with_adapter(inputs, config.seed, "CAUSAL_LM")
    if inputs.lora is not None and isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ModelError(
            "TRL's DPOTrainer cannot train an adapter on the output layer",
            where="model.lora.target_modules",
            fix="dpo.trainer: engine, or leave that layer out",
        )
    trainer = CountingDPOTrainer(
        model=model,
        args=config,
        # Text to tokenise, which the trainer insists on. Our ids and the reference replace it as soon as it is made.
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=inputs.tokenizer,
        callbacks=[inputs.spending, *inputs.callbacks, CheckpointFiles()],
    )
    if inputs.lora is not None:
        # TRL takes the adapter for a trained one, and keeps a copy of it as the reference. The rows have the
        # reference's log-probabilities, and the copy would be saved with the policy.
        for name in sorted({*model.peft_config} - {"default"}):
            model.delete_adapter(name)
        model.set_adapter("default")
    give(trainer, rows, inputs.spending)
    trainer.remove_callback(PrinterCallback)
    return trainer


def reward_model(
    inputs: TrainerInputs, section: RewardModelSection, examples: Sequence[Example], reporter: Reporter
) -> RewardTrainer:
    """A RewardTrainer for a sequence classifier with one output."""
    rows = []
    for index, chosen, rejected, margin in _pairs(examples, reporter):
        prompt, ids = examples[index].tree.prompt_ids, examples[index].tree.response_ids
        n_tokens = len(ids[chosen]) + len(ids[rejected])
        pair = {"chosen_ids": prompt + ids[chosen], "rejected_ids": prompt + ids[rejected], "margin": margin}
        rows.append({**pair, TOKEN_COLUMN: n_tokens})
    config = RewardConfig(
        **{**DEFAULTS, **inputs.arguments},
        center_rewards_coefficient=section.center_rewards_coefficient or None,
    )
    trainer = CountingRewardTrainer(
        model=_with_adapter(inputs, config.seed, "SEQ_CLS", head_modules(inputs.model)),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=inputs.tokenizer,
        callbacks=[inputs.spending, *inputs.callbacks, CheckpointFiles()],
    )
    give(trainer, rows, inputs.spending)
    trainer.remove_callback(PrinterCallback)
    return trainer
