"""TRL's trainers on our token ids: the columns that they get become the batches that they train on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import set_seed

from toolkit.errors import ModelError
from toolkit.models.encoding import Tree
from toolkit.models.load import load_policy, lora_config, new_reward_model
from toolkit.models.resolve import ModelRef
from toolkit.progress import Reporter
from toolkit.recipe.training import DpoSection, Lora, ModelSection, RewardModelSection
from toolkit.training import trl
from toolkit.training.batch import Example
from toolkit.training.checkpoints import last_checkpoint

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


BF16 = ModelSection(name="tiny", dtype="bfloat16", lora=Lora(r=4, alpha=8))
FP32 = BF16.model_copy(update={"dtype": "float32"})


def new_head(ref: ModelRef, tokenizer: Any, section: ModelSection = BF16) -> Any:
    return new_reward_model(ref, section, tokenizer.pad_token_id, 0)


def test_a_head_beside_an_adapter_trains_in_full_precision(tiny_ref: ModelRef, tokenizer: Any, tmp_path: Path) -> None:
    """A step of 1e-4 is less than half of what bf16 tells apart at 0.1: the head would stay as it is."""
    arguments = settings(tmp_path) | {"bf16": True, "learning_rate": 1e-4, "lr_scheduler_type": "constant"}
    inputs = trl.TrainerInputs(new_head(tiny_ref, tokenizer), BF16.lora, tokenizer, arguments, [])
    trainer = trl.reward_model(inputs, RewardModelSection(), EXAMPLES, Reporter(quiet=True))
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    [head] = (weight for name, weight in trained.items() if "score" in name)
    before = head.detach().clone()
    trainer.train()
    assert float(((head.detach() - before).abs() > 0.5e-4).float().mean()) > 0.95


def test_dpo_trains_one_adapter_in_full_precision(tiny_ref: ModelRef, tokenizer: Any, tmp_path: Path) -> None:
    """The adapter starts as TRL makes it of the same seed, and no copy of it stays."""
    reference = [torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-4.0, -5.0])]
    inputs = trl.TrainerInputs(load_policy(tiny_ref, BF16), BF16.lora, tokenizer, settings(tmp_path), [])
    trainer = trl.dpo(inputs, DpoSection(), EXAMPLES, reference, Reporter(quiet=True))
    model: Any = trainer.model
    assert [*model.peft_config] == ["default"] and model.active_adapter == "default"
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert names == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert {dict(model.named_parameters())[name].dtype for name in names} == {torch.float32}
    set_seed(42)
    theirs = get_peft_model(load_policy(tiny_ref, BF16), lora_config(Lora(r=4, alpha=8), task="CAUSAL_LM"))
    for name, weight in theirs.named_parameters():
        assert torch.equal(weight, dict(model.named_parameters())[name]), name


@pytest.mark.parametrize("kind", ["dpo", "reward_model"])
def test_layers_that_a_model_lacks_are_an_error_of_the_input(
    kind: str, tiny_ref: ModelRef, tokenizer: Any, tmp_path: Path
) -> None:
    def start(*layers: str) -> None:
        lora = Lora(r=4, alpha=8, target_modules=[*layers])
        if kind == "dpo":
            inputs = trl.TrainerInputs(load_policy(tiny_ref, BF16), lora, tokenizer, settings(tmp_path), [])
            trl.dpo(inputs, DpoSection(), EXAMPLES, [torch.zeros(3), torch.zeros(2)], Reporter(quiet=True))
        else:
            inputs = trl.TrainerInputs(new_head(tiny_ref, tokenizer), lora, tokenizer, settings(tmp_path), [])
            trl.reward_model(inputs, RewardModelSection(), EXAMPLES, Reporter(quiet=True))

    with pytest.raises(ModelError, match="has no layers \\['no_such_layer'\\]"):
        start("no_such_layer")
    with pytest.raises(ModelError, match="output layer" if kind == "dpo" else "has no layers"):
        start("lm_head")


@pytest.mark.parametrize("kind", ["dpo", "reward_model"])
def test_a_training_that_has_ended_takes_no_further_step(
    kind: str, tiny_ref: ModelRef, tokenizer: Any, tmp_path: Path
) -> None:
    """Three steps end in the middle of an epoch of two pairs; a kill may come behind the last checkpoint."""
    arguments = settings(tmp_path / "trainer") | {
        **{"per_device_train_batch_size": 1, "max_steps": 3, "save_steps": 3, "logging_steps": 1},
        **{"learning_rate": 1e-3, "lr_scheduler_type": "constant"},
    }
    ends = []
    for _ in range(2):
        if kind == "dpo":
            model = load_policy(tiny_ref, FP32)
            inputs = trl.TrainerInputs(model, FP32.lora, tokenizer, arguments, [])
            reference = [torch.zeros(3), torch.zeros(2)]
            trainer: Any = trl.dpo(inputs, DpoSection(), EXAMPLES, reference, Reporter(quiet=True))
        else:
            inputs = trl.TrainerInputs(new_head(tiny_ref, tokenizer, FP32), FP32.lora, tokenizer, arguments, [])
            trainer = trl.reward_model(inputs, RewardModelSection(), EXAMPLES, Reporter(quiet=True))
        trainer.train(resume_from_checkpoint=last_checkpoint(tmp_path))
        assert trainer.state.global_step == 3
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        weights = {name: w.detach().clone() for name, w in trainer.model.named_parameters() if w.requires_grad}
        ends.append((logged, inputs.spending.tokens, weights))
    (logged, tokens, weights), (again, tokens_again, weights_again) = ends
    assert again == logged and len(logged) == 3 and tokens_again == tokens > 0
    assert all(torch.equal(weight, weights_again[name]) for name, weight in weights.items())
