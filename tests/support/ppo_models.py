"""PPO on the shipped model: settings, prompts, models of every kind, and a trainer that records what it does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainerCallback

from toolkit.engine.reward_model import load_scorer
from toolkit.models.encoding import Tree
from toolkit.models.inspect import torch_dtype
from toolkit.models.resolve import resolve
from toolkit.models.reward_head import RewardHead
from toolkit.ppo.assembly import models_of_run
from toolkit.ppo.config import PPOConfig
from toolkit.ppo.loop import PPOLoop
from toolkit.ppo.models import AdapterModels, PPOModels
from toolkit.ppo.prompts import PromptIds, TrainingData
from toolkit.ppo.rewards import Responses, RewardFunction, adapter_reward, model_reward
from toolkit.ppo.rollout import Rollout, collect
from toolkit.ppo.sampling import SamplingSettings, Scorer
from toolkit.recipe.training import Lora, ModelSection

LORA = Lora(r=4, alpha=8)
LORA_CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
MEAN = 0.3
# Every seventh id ends a response, so that some responses end and some are cut, whatever the model's weights are.
ENDS = [2, *range(9, 2048, 7)]
Settings = dict[str, Any]
SECTION: Settings = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 8,
    "samples_per_prompt": 2,
    "total_episodes": 16,
    "num_ppo_epochs": 2,
    "num_mini_batches": 2,
    "response_length": 8,
    "logging_steps": 1,
    "save_steps": 4,
    "save_total_limit": 1,
    "lr_scheduler_type": "constant",
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}
UPDATES = SECTION["num_ppo_epochs"] * SECTION["num_mini_batches"]
PROMPTS = [
    PromptIds(f"prompt-{i}", torch.randint(300, 2000, (3 + i,), generator=torch.Generator().manual_seed(i)).tolist())
    for i in range(6)
]


def shake(model: Any, marker: str, seed: int = 0, scale: float = 0.05) -> None:
    """Move the weights whose name holds ``marker``, so that an adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if marker in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * scale)


@dataclass(frozen=True)
class Folders:
    sft: Path
    rm_full: Path
    rm_adapter: Path
    tokenizer: Any

    def models(self, kind: str, *, dtype: str = "float32", **options: Any) -> PPOModels:
        """``full``: all weights; ``lora``: adapters on one base; ``mixed``: an adapter, and a reward model apart."""
        section = ModelSection(name="tiny", dtype=dtype, lora=None if kind == "full" else LORA)
        reward = self.rm_adapter if kind == "lora" else self.rm_full
        torch.manual_seed(3)
        options = {"value_head_init": "reward_model"} | options
        models, _ = models_of_run(resolve(str(self.sft)), resolve(str(reward)), section, self.tokenizer, **options)
        return models

    def reward(self, models: PPOModels, dtype: str = "float32") -> RewardFunction:
        """The reward model that belongs to these models."""
        if isinstance(models, AdapterModels):
            return adapter_reward(models, RewardHead(mean=MEAN), self.tokenizer)
        section = ModelSection(name="tiny", dtype=dtype, lora=None)
        model = load_scorer(resolve(str(self.rm_full)), section, self.tokenizer)
        return model_reward(model, self.tokenizer, self.tokenizer)


class Record(TrainerCallback):
    """Logs of every step, a checksum of the trained weights behind every step, and a stop on demand."""

    def __init__(self, models: PPOModels, stop_at: int | None = None) -> None:
        self.models, self.stop_at = models, stop_at
        self.logs: list[dict[str, float]] = []
        self.weights: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.logs.append({"step": state.global_step, **logs})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.weights.append(sum(float(w.double().abs().sum()) for w in self.models.trained_state().values()))
        if state.global_step == self.stop_at:
            control.should_training_stop = True


def make_trainer(
    models: PPOModels,
    folders: Folders,
    out: Path,
    section: Settings = SECTION,
    *,
    dtype: str = "float32",
    stop_at: int | None = None,
    seed: int = 0,
) -> tuple[PPOLoop, Record]:
    args = PPOConfig(output_dir=str(out / "trainer"), seed=seed, bf16=dtype == "bfloat16", **section)
    record = Record(models, stop_at)
    trainer = PPOLoop(
        models,
        args,
        [folders.reward(models, dtype)],
        TrainingData(PROMPTS),
        SamplingSettings(folders.tokenizer, ENDS, torch_dtype(dtype), seed),
        callbacks=[record],
    )
    return trainer, record


def roll(models: PPOModels, folders: Folders, section: Settings = SECTION, *, kl_coef: float = 0.05) -> Rollout:
    return collect(
        models,
        PROMPTS[:4],
        PPOConfig(**section),
        Scorer([folders.reward(models)], [1.0]),
        SamplingSettings(folders.tokenizer, ENDS, torch.float32, 0),
        index=0,
        kl_coef=kl_coef,
    )


def scores_of(folders: Folders, models: PPOModels, trees: list[Tree]) -> list[float]:
    n = sum(len(tree.response_ids) for tree in trees)
    responses = Responses(prompts=[""] * n, completions=[""] * n, truncated=[False] * n, trees=trees)
    return [float(value) for value in folders.reward(models)(responses)]  # type: ignore[arg-type]


def timeless(log: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in log.items() if not name.startswith("speed/")}


def changed(section: Settings, **values: Any) -> Settings:
    return {**section, **values}
