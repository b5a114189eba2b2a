"""DPO and reward-model training on random pairs: ``python -m support.pair_training BATCH FOLDER KIND...``."""

from __future__ import annotations

import json
import random
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from toolkit.engine import distributed
from toolkit.engine.engine import Engine
from toolkit.models.encoding import Tree
from toolkit.models.load import load_policy, new_reward_model, trainable
from toolkit.models.resolve import resolve
from toolkit.recipe.training import DpoSection, Lora, ModelSection, Training
from toolkit.stages import dpo
from toolkit.training import reward_model
from toolkit.training.batch import Example
from toolkit.training.budget import Spending
from toolkit.training.length import total_steps
from toolkit.training.trainer import EngineTrainer, keep_along, seed_everything, training_arguments

BUDGET = 450  # response tokens: about two epochs


def train(kind: str, batch: int, out: Path) -> None:
    """``kind`` is dpo, rm, or budget, which is DPO under one. Writes the trained weights and the logs into ``out``.

    As in PPO's: with a large epsilon an Adam step is proportional to the gradient, and the weights can be compared.
    """
    chance = random.Random(0)

    def draw(n: int) -> list[int]:
        return [chance.randrange(10, 500) for _ in range(n)]

    trees = [Tree(draw(chance.randint(2, 9)), [draw(chance.randint(1, 9)) for _ in range(3)]) for _ in range(16)]
    items = [Example(tree, [(0, 1, 1.0, 1.0), (1, 2, 0.3, 2.0)]) for tree in trees]
    seed_everything(0)
    ref, section = resolve("tiny"), ModelSection(name="tiny", dtype="float32", lora=Lora(r=4, alpha=8))
    if kind != "rm":
        model = trainable(load_policy(ref, section), section.lora, task="CAUSAL_LM")
    else:
        model = new_reward_model(ref, section, 0, seed=1)
        model = trainable(model, section.lora, task="SEQ_CLS", modules_to_save=["score"])
    engine = Engine(model, 0, dtype=torch.float32)
    if kind != "rm":
        reference = [torch.stack([t.sum() for t in row]) for row in engine.logps(trees)]
        loss = partial(dpo.dpo_loss, engine, DpoSection(), reference)
    else:
        loss = partial(reward_model.bradley_terry, engine, 0.01)
    settings: Training = Training(
        learning_rate=1.0, adam_epsilon=1.0, per_device_train_batch_size=batch, num_train_epochs=2, logging_steps=1,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    if kind == "budget":
        settings = DpoSection(**settings.model_dump(), train_tokens=BUDGET, num_checkpoints=2)
    steps = total_steps(settings, len(items))
    arguments = training_arguments(settings, out, seed=0, dtype="float32", steps=steps)
    spending, budget, kept = Spending(), None, list[int]()
    if isinstance(settings, DpoSection):
        budget, _ = keep_along(settings, spending, steps, kept.append)
    trainer = EngineTrainer(engine, arguments, items, loss, spending=spending, budget=budget)
    trainer.train()
    if distributed.main_process():
        weights = {n: w.detach().contiguous() for n, w in model.named_parameters() if w.requires_grad}
        save_file(weights, out / "state.safetensors")
        (out / "logs.json").write_text(json.dumps([log for log in trainer.state.log_history if "loss" in log]))
        (out / "spent.json").write_text(json.dumps({"tokens": spending.tokens, "kept": kept}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in sys.argv[3:]:
        train(kind, int(sys.argv[1]), Path(sys.argv[2]) / kind)
    distributed.leave_group()
