"""The gradient of one optimiser step, split in any way: ``python -m support.step_gradients CASES FOLDER``."""

from __future__ import annotations

import json
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainerCallback

from toolkit.engine.distributed import leave_group, main_process
from toolkit.engine.engine import Engine
from toolkit.models.encoding import Tree
from toolkit.models.load import load_policy, new_reward_model, trainable
from toolkit.models.resolve import resolve
from toolkit.ppo import PPOConfig, PPOTrainer
from toolkit.recipe.training import DpoSection, ModelSection, Training
from toolkit.stages import dpo, sft
from toolkit.training import reward_model
from toolkit.training.batch import Example
from toolkit.training.trainer import EngineTrainer, seed_everything, training_arguments

N_PROMPTS = 6
PROMPTS = [{"prompt": f"The film number {i} was", "wanted": i} for i in range(N_PROMPTS)]


class FirstGradient(TrainerCallback):
    """Keeps the gradient that the first optimiser step gets."""

    def __init__(self) -> None:
        self.gradient: torch.Tensor | None = None

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        if self.gradient is None:
            gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
            self.gradient = torch.cat(gradients).detach().cpu().clone()


def examples() -> list[Example]:
    """Prompts with two to four responses of very different lengths, whose comparisons have unequal weights."""
    chance = random.Random(0)

    def ids(n: int) -> list[int]:
        return [chance.randrange(10, 500) for _ in range(n)]

    made = []
    for _ in range(N_PROMPTS):
        k = chance.choice([2, 3, 4])
        tree = Tree(ids(5), [ids(1 + chance.randint(0, 25)) for _ in range(k)])
        pairs = [(a, b, chance.choice([1.0, 0.3]), float(1 + b)) for a in range(k) for b in range(a + 1, k)]
        made.append(Example(tree, pairs))
    return made


def engine_gradient(kind: str, size: int, accumulation: int, token_budget: int | None, out: Path) -> torch.Tensor:
    """That of SFT, DPO or a reward model, in fp32."""
    seed_everything(0)
    ref, section = resolve("tiny"), ModelSection(name="tiny", dtype="float32", lora=None)
    if kind == "reward_model":
        model = trainable(new_reward_model(ref, section, 0, seed=1), None, task="SEQ_CLS")
    else:
        model = trainable(load_policy(ref, section, dtype=torch.float32), None, task="CAUSAL_LM")
    engine, items = Engine(model, 0, dtype=torch.float32, token_budget=token_budget), examples()
    loss: Any = partial(sft.completion_loss, engine)
    if kind == "dpo":
        logps = engine.logps([item.tree for item in items])
        reference = [torch.stack([t.sum() for t in row]) - 0.5 * torch.arange(len(row)) for row in logps]
        loss = partial(dpo.dpo_loss, engine, DpoSection(beta=0.5), reference)
    elif kind == "reward_model":
        loss = partial(reward_model.bradley_terry, engine, 0.01)
    settings = Training(
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_grad_norm=1e9,
        learning_rate=1e-9, logging_steps=1,
    )  # fmt: skip
    arguments = training_arguments(settings, out, seed=0, dtype="float32", steps=1)
    first = FirstGradient()
    EngineTrainer(engine, {**arguments, "save_strategy": "no"}, items, loss, [first]).train()
    assert first.gradient is not None
    return first.gradient


def reward(completion_ids: list[list[int]], wanted: list[int], **_: Any) -> list[float]:
    return [float(sum(ids) % 7 == want) - 0.1 * len(ids) for ids, want in zip(completion_ids, wanted, strict=True)]


def ppo_gradient(size: int, accumulation: int, out: Path) -> torch.Tensor:
    """Of PPO's first update, critic included: ``size`` responses of a process, ``accumulation`` passes."""
    args = PPOConfig(
        output_dir=str(out), per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        samples_per_prompt=2, total_episodes=2 * N_PROMPTS, num_ppo_epochs=1, num_mini_batches=1, response_length=8,
        stop_token_ids=[2, *range(9, 2048, 7)], max_grad_norm=1e9, learning_rate=1e-9, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    seed_everything(0)
    first = FirstGradient()
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    trainer = PPOTrainer("tiny", args, reward, PROMPTS, peft_config=adapter, callbacks=[first])
    trainer.train()
    assert first.gradient is not None
    return first.gradient


def gradient(kind: str, size: int, accumulation: int, token_budget: int | None, out: Path) -> torch.Tensor:
    """``size`` x ``accumulation`` prompts of each process; of PPO, responses."""
    if kind == "ppo":
        return ppo_gradient(size, accumulation, out)
    return engine_gradient(kind, size, accumulation, token_budget, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    for kind, size, accumulation in json.loads(sys.argv[1]):
        step = gradient(kind, size, accumulation, None, folder)
        if main_process():
            torch.save(step, folder / f"{kind}-{size}x{accumulation}.pt")
    leave_group()
