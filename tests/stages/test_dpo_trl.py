"""The DPO losses equal those of TRL's DPOTrainer on the same pairs, with the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.comparisons import moved
from trl import DPOConfig, DPOTrainer

from toolkit.engine.engine import Engine
from toolkit.models.encoding import Tree, text_encoder
from toolkit.recipe.training import DpoSection
from toolkit.stages.dpo import dpo_loss
from toolkit.training.batch import Example, collate

pytestmark = pytest.mark.parity

PAIRS = [
    {"prompt": "The film was", "chosen": " a joy from the first minute to the last.", "rejected": " dull."},
    {"prompt": "I watched it twice and", "chosen": " loved it.", "rejected": " I still do not know why it was made."},
    {"prompt": "Its music", "chosen": " stays with you", "rejected": " is loud and little else, all evening"},
    {"prompt": "At the end of this long story we", "chosen": " cried", "rejected": " left early; it was raining"},
]
BETA = 0.3


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing"),
    [("sigmoid", 0.0), ("sigmoid", 0.1), ("sigmoid_norm", 0.0), ("robust", 0.1), ("ipo", 0.0), ("hinge", 0.0)],
)
def test_the_loss_of_one_batch_is_trls(
    new_tiny: Callable[[], Any], tokenizer: Any, tmp_path: Path, loss_type: str, label_smoothing: float
) -> None:
    policy, reference = moved(new_tiny()).train(), new_tiny().requires_grad_(False)
    theirs = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(tmp_path),
            beta=BETA,
            loss_type=[loss_type],
            label_smoothing=label_smoothing,
            per_device_train_batch_size=len(PAIRS),
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            disable_dropout=True,
            max_length=None,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    rows = [theirs.train_dataset[i] for i in range(len(PAIRS))]  # as TRL has tokenised them

    def their_loss(pairs: list[dict[str, Any]]) -> torch.Tensor:
        return theirs.compute_loss(theirs.model, theirs._prepare_inputs(theirs.data_collator(pairs)))

    expected = their_loss(rows)
    logged = {key: values[-1] for key, values in theirs._metrics["train"].items() if values}
    if label_smoothing and loss_type == "sigmoid":
        # TRL's sigmoid loss has no label smoothing (Mitchell 2023): it is the loss of labels that flip so often.
        flipped = [row | {"chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in rows]
        expected = (1 - label_smoothing) * expected + label_smoothing * their_loss(flipped)
    expected.backward()
    gradients = {name: weight.grad.clone() for name, weight in policy.named_parameters() if weight.grad is not None}
    policy.zero_grad(set_to_none=True)

    examples = [
        Example(Tree(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]), [(0, 1, 1.0, 1.0)]) for row in rows
    ]
    assert all(ids[-1] == tokenizer.eos_token_id for e in examples for ids in e.tree.response_ids)
    ref_engine = Engine(reference, 0, dtype=torch.float32)
    reference_K = [torch.stack([t.sum() for t in row]) for row in ref_engine.logps([e.tree for e in examples])]
    engine = Engine(policy, 0, dtype=torch.float32)
    section = DpoSection(beta=BETA, loss_type=loss_type, label_smoothing=label_smoothing)
    [batch] = collate(engine, list(enumerate(examples)))["batch"]
    loss, metrics = dpo_loss(engine, section, reference_K, batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    assert gradients
    for name, weight in policy.named_parameters():
        if weight.grad is not None:
            assert float((weight.grad - gradients[name]).norm() / gradients[name].norm()) < 1e-3, name
    keys = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")
    for key in (*keys, "logps/rejected"):
        assert metrics[key].mean().item() == pytest.approx(float(logged[key]), abs=1e-4, rel=1e-5), key


def test_our_tokens_are_trls(new_tiny: Callable[[], Any], tokenizer: Any, tmp_path: Path) -> None:
    """Where prompt and response meet at a space, tokenising them apart gives what TRL gives."""
    theirs = DPOTrainer(
        model=new_tiny(),
        args=DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, max_length=None, report_to="none"),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    for index, pair in enumerate(PAIRS):
        row = theirs.train_dataset[index]
        texts = [pair["chosen"], pair["rejected"]]
        ours = text_encoder(tokenizer, pair["prompt"]).encode(pair["prompt"], texts, 64).tree
        assert ours == Tree(list(row["prompt_ids"]), [list(row["chosen_ids"]), list(row["rejected_ids"])])
