"""TRL's own DPOTrainer and RewardTrainer on our token ids (``trainer: trl``): for its other losses, and for parity.

They see pairs: a prompt with K responses becomes one row for each comparison with a winner, of equal weight. A row has
the columns that their ``DataCollatorForPreference`` reads. RewardTrainer's documentation has them; DPOTrainer insists
on text, which our rows replace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer  # type: ignore[attr-defined]

from toolkit.models.load import lora_config
from toolkit.progress import Reporter
from toolkit.recipe.schema import DpoSection, Lora, RewardModelSection
from toolkit.training.batch import Example


def n_pairs(examples: Sequence[Example]) -> int:
    """Rows that the trainers see."""
    return sum(p != 0.5 for example in examples for *_, p, _ in example.pairs)


def _decided(examples: Sequence[Example], reporter: Reporter) -> list[tuple[int, int, int, float]]:
    """(example, chosen, rejected, margin) of every comparison with a winner; what TRL cannot express is said."""
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
    policy: Any,
    lora: Lora | None,
    tokenizer: PreTrainedTokenizerBase,
    section: DpoSection,
    arguments: dict[str, Any],
    examples: Sequence[Example],
    reference: Sequence[torch.Tensor],
    callbacks: list[TrainerCallback],
    reporter: Reporter,
) -> DPOTrainer:
    """A DPOTrainer for the plain ``policy``, with the reference log-probabilities that were computed before.

    ``reference[e]``: [K] log-probabilities of example e's responses.
    """
    rows = []
    for index, chosen, rejected, _ in _decided(examples, reporter):
        ids = examples[index].tree.response_ids
        rows.append(
            {
                "prompt_ids": examples[index].tree.prompt_ids,
                "chosen_ids": ids[chosen],
                "rejected_ids": ids[rejected],
                "ref_chosen_logps": float(reference[index][chosen]),
                "ref_rejected_logps": float(reference[index][rejected]),
            }
        )
    config = DPOConfig(
        **{"gradient_checkpointing": False, "max_length": None, "beta": section.beta, **arguments},
        label_smoothing=section.label_smoothing,
        loss_type=[section.loss_type],
        precompute_ref_log_probs=True,
    )
    trainer = DPOTrainer(
        model=policy,
        args=config,
        # Text to tokenise, which the trainer insists on. Our ids and the reference replace it as soon as it is made.
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
        peft_config=lora_config(lora, task="CAUSAL_LM") if lora is not None else None,
        callbacks=callbacks,
    )
    trainer.train_dataset = Dataset.from_list(rows)
    trainer.remove_callback(PrinterCallback)
    return trainer


def reward_model(
    model: Any,
    lora: Lora | None,
    tokenizer: PreTrainedTokenizerBase,
    section: RewardModelSection,
    arguments: dict[str, Any],
    examples: Sequence[Example],
    callbacks: list[TrainerCallback],
    reporter: Reporter,
) -> RewardTrainer:
    """A RewardTrainer for a plain sequence classifier."""
    rows = []
    for index, chosen, rejected, margin in _decided(examples, reporter):
        prompt, ids = examples[index].tree.prompt_ids, examples[index].tree.response_ids
        rows.append({"chosen_ids": prompt + ids[chosen], "rejected_ids": prompt + ids[rejected], "margin": margin})
    config = RewardConfig(
        **{"gradient_checkpointing": False, "max_length": None, **arguments},
        center_rewards_coefficient=section.center_rewards_coefficient or None,
    )
    peft_config = lora_config(lora, task="SEQ_CLS", modules_to_save=["score"]) if lora is not None else None
    trainer = RewardTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
