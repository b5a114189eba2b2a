"""Reward models on the shipped policy, for PPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.ppo_models import LORA, MEAN, Folders, shake
from toolkit.models.load import load_policy, new_reward_model, trainable
from toolkit.models.resolve import resolve
from toolkit.models.reward_head import RewardHead
from toolkit.models.save import merge_and_save, save_policy
from toolkit.recipe.training import Lora, ModelSection


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory: pytest.TempPathFactory, tiny_ref: Any, tokenizer: Any) -> Path:
    """A reward model on the shipped policy, all weights."""
    folder = tmp_path_factory.mktemp("rm")
    section = ModelSection(name="tiny", dtype="float32", lora=None)
    model = new_reward_model(tiny_ref, section, tokenizer.pad_token_id, seed=1)
    save_policy(model, tokenizer, folder, dtype=torch.float32, base=tiny_ref)
    RewardHead(mean=0.25).write(folder)
    return folder


@pytest.fixture(scope="session")
def reward_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_ref: Any, tokenizer: Any) -> Path:
    """A reward model that is an adapter on the shipped policy."""
    folder = tmp_path_factory.mktemp("rm_adapter")
    section = ModelSection(name="tiny", dtype="float32", lora=Lora(r=4, alpha=8))
    model = new_reward_model(tiny_ref, section, tokenizer.pad_token_id, seed=1)
    model = trainable(model, section.lora, task="SEQ_CLS", modules_to_save=["score"])
    save_policy(model, tokenizer, folder, dtype=torch.float32, base=tiny_ref)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_ref: Any, tokenizer: Any) -> Folders:
    """An SFT policy that is not its base any more, and a reward model on it, as plain weights and as an adapter."""
    root = tmp_path_factory.mktemp("ppo")
    torch.manual_seed(0)  # adapters start at random, and what is sampled must not depend on the tests before this one
    section = ModelSection(name="tiny", dtype="float32", lora=LORA)
    sft = trainable(load_policy(tiny_ref, section), LORA, task="CAUSAL_LM")
    shake(sft, "lora_B", scale=0.01)
    merge_and_save(sft, tokenizer, root / "sft", torch.float32)
    ref = resolve(str(root / "sft"))
    full = new_reward_model(ref, section, tokenizer.pad_token_id, seed=1)
    save_policy(full, tokenizer, root / "rm_full", dtype=torch.float32, base=ref)
    adapted = new_reward_model(ref, section, tokenizer.pad_token_id, seed=1)
    adapted = trainable(adapted, LORA, task="SEQ_CLS", modules_to_save=["score"])
    shake(adapted, "lora_B", seed=2, scale=0.02)
    save_policy(adapted, tokenizer, root / "rm_adapter", dtype=torch.float32, base=ref)
    for name in ("rm_full", "rm_adapter"):
        RewardHead(mean=MEAN).write(root / name)
    return Folders(root / "sft", root / "rm_full", root / "rm_adapter", tokenizer)
