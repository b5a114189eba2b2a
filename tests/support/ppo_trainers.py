"""``PPOTrainer`` in its smallest useful size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.ppo_models import ENDS
from toolkit.ppo import PPOConfig, PPOTrainer

PROMPTS = [{"prompt": f"The film was {word}", "wanted": i} for i, word in enumerate(("good", "bad", "long", "new"))]


def config(out: Path, **values: Any) -> PPOConfig:
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "samples_per_prompt": 2,
        "total_episodes": 16,
        "num_ppo_epochs": 1,
        "num_mini_batches": 2,
        "response_length": 8,
        "stop_token_ids": ENDS,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }
    return PPOConfig(**(settings | values))


def length_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [-float(len(ids)) for ids in completion_ids]


def train(trainer: PPOTrainer) -> list[dict[str, float]]:
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]
