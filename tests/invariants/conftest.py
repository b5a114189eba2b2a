"""Reward models on the shipped policy, for PPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit import models
from toolkit.recipe import Lora, ModelSection


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory: pytest.TempPathFactory, tiny_ref: Any, tokenizer: Any) -> Path:
    """A reward model on the shipped policy, all weights."""
    folder = tmp_path_factory.mktemp("rm")
    section = ModelSection(name="tiny", dtype="float32", lora=None)
    model = models.new_reward_model(tiny_ref, section, tokenizer.pad_token_id, seed=1)
    models.save_policy(model, tokenizer, folder, dtype=torch.float32, base=folder)
    models.write_reward_mean(folder, 0.25)
    return folder


@pytest.fixture(scope="session")
def reward_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_ref: Any, tokenizer: Any) -> Path:
    """A reward model that is an adapter on the shipped policy."""
    folder = tmp_path_factory.mktemp("rm_adapter")
    section = ModelSection(name="tiny", dtype="float32", lora=Lora(r=4, alpha=8))
    model = models.new_reward_model(tiny_ref, section, tokenizer.pad_token_id, seed=1)
    model = models.trainable(model, section.lora, task="SEQ_CLS", modules_to_save=["score"])
    models.save_policy(model, tokenizer, folder, dtype=torch.float32, base=Path(tiny_ref.path))
    return folder
