"""Small trainers of DPO and reward models as the stages make them, to be stopped and resumed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from toolkit.engine.engine import Engine
from toolkit.models.inspect import torch_dtype
from toolkit.models.load import load_policy, new_reward_model, trainable
from toolkit.recipe.training import DpoSection, Lora, ModelSection, RewardModelSection, Training
from toolkit.stages import dpo
from toolkit.training import reward_model
from toolkit.training.batch import Example
from toolkit.training.length import total_steps
from toolkit.training.trainer import EngineTrainer, seed_everything, training_arguments

LORA = Lora(r=4, alpha=8)
LORA_FP32 = ModelSection(name="tiny", dtype="float32", lora=LORA)


def settings_of(**values: Any) -> Training:
    base = {"learning_rate": 1e-3, "per_device_train_batch_size": 2, "max_steps": 6, "warmup_ratio": 0.0}
    return Training(**(base | {"logging_steps": 1} | values))


class Stop(TrainerCallback):
    def __init__(self, at: int | None) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.at:
            control.should_training_stop = True


def build(
    kind: str,
    out: Path,
    tiny_ref: Any,
    make_trees: Any,
    section: Training,
    *,
    dtype: str = "float32",
    stop_at: int | None = None,
    seed: int = 0,
    items: list[Example] | None = None,
    token_budget: int | None = None,
) -> tuple[EngineTrainer, Any]:
    """A trainer as the stages make it; ``kind`` is dpo or rm, with ``-lora`` behind it or not."""
    task, _, adapter = kind.partition("-")
    lora = LORA if adapter else None
    model_section = ModelSection(name="tiny", dtype=dtype, lora=lora)
    seed_everything(seed)
    if task == "dpo":
        full = None if lora else torch.float32
        model = trainable(load_policy(tiny_ref, model_section, dtype=full), lora, task="CAUSAL_LM")
    else:
        model = new_reward_model(tiny_ref, model_section, 0, seed=1)
        model = trainable(model, lora, task="SEQ_CLS", modules_to_save=["score"])
    scorer = Engine(model, 0, dtype=torch_dtype(dtype), token_budget=token_budget)
    if items is None:
        items = [Example(tree, [(0, 1, 1.0, 1.0), (1, 2, 0.3, 1.0)]) for tree in make_trees(8, seed=3)]
    if task == "dpo":
        model.eval()
        reference = [torch.stack([t.sum() for t in row]) for row in scorer.logps([e.tree for e in items])]
        loss_fn = partial(dpo.dpo_loss, scorer, DpoSection(), reference)
    else:
        loss_fn = partial(reward_model.bradley_terry, scorer, RewardModelSection().center_rewards_coefficient)
    steps = total_steps(section, len(items))
    arguments = training_arguments(section, out, seed=seed, dtype=dtype, steps=steps)
    return EngineTrainer(scorer, arguments, items, loss_fn, [Stop(stop_at)]), model


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: w.detach().clone() for name, w in model.named_parameters() if w.requires_grad}


def losses(trainer: EngineTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_equal(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert weights.keys() == expected.keys() and weights
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=tolerance, msg=name)
