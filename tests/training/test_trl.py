"""TRL's trainers on our token ids: the columns that they get become the batches that they train on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.models.encoding import Tree
from toolkit.models.load import new_reward_model
from toolkit.models.resolve import ModelRef
from toolkit.progress import Reporter
from toolkit.recipe.training import DpoSection, ModelSection, RewardModelSection
from toolkit.training import trl
from toolkit.training.batch import Example

pytestmark = pytest.mark.parity

# A ranking of three, and a tie that TRL's trainers do not know.
EXAMPLES = [
    Example(Tree([5, 6, 7], [[8, 9, 2], [10, 2], [11, 12, 2]]), [(0, 1, 1.0, 1.0), (1, 2, 0.0, 1.0)], (0.5, 0.25)),
    Example(Tree([5], [[8, 2], [9, 2]]), [(0, 1, 0.5, 1.0)]),
]


def settings(folder: Path) -> dict[str, Any]:
    more = {"per_device_train_batch_size": 2, "max_steps": 1, "report_to": "none", "disable_tqdm": True, "bf16": False}
    return {"output_dir": str(folder), "use_cpu": True, **more}


def rows(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """Ids without padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def test_dpo_trains_on_our_ids_and_reference(new_tiny: Callable[[], Any], tokenizer: Any, tmp_path: Path) -> None:
    reference = [torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-4.0, -5.0])]
    inputs = trl.TrainerInputs(new_tiny(), None, tokenizer, settings(tmp_path), [])
    trainer = trl.dpo(inputs, DpoSection(), EXAMPLES, reference, Reporter(quiet=True))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(sum(e.n_with_winner for e in EXAMPLES))])
    assert rows(batch) == [[5, 6, 7, 8, 9, 2], [5, 6, 7, 11, 12, 2], [5, 6, 7, 10, 2], [5, 6, 7, 10, 2]]
    assert batch["completion_mask"].sum(1).tolist() == [3, 3, 2, 2]
    assert batch["response_tokens"].tolist() == [3 + 2, 3 + 2]
    assert batch["ref_chosen_logps"].tolist() == [-1.0, -3.0] and batch["ref_rejected_logps"].tolist() == [-2.0, -2.0]
    assert trainer.train().global_step == 1 and inputs.spending.tokens == 10


def test_a_reward_model_trains_on_our_ids_and_margins(tiny_ref: ModelRef, tokenizer: Any, tmp_path: Path) -> None:
    model = new_reward_model(tiny_ref, ModelSection(name="tiny", dtype="float32", lora=None), tokenizer.pad_token_id, 0)
    inputs = trl.TrainerInputs(model, None, tokenizer, settings(tmp_path), [])
    trainer = trl.reward_model(inputs, RewardModelSection(), EXAMPLES, Reporter(quiet=True))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(sum(e.n_with_winner for e in EXAMPLES))])
    assert rows(batch) == [[5, 6, 7, 8, 9, 2], [5, 6, 7, 11, 12, 2], [5, 6, 7, 10, 2], [5, 6, 7, 10, 2]]
    assert batch["margin"].tolist() == [0.5, 0.25]
    assert trainer.train().global_step == 1 and inputs.spending.tokens == 10
