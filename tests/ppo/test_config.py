"""``PPOConfig``: what it shares with recipes, and the values that it refuses."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import RecipeError
from toolkit.ppo import PPOConfig
from toolkit.ppo.config import SHARED_SETTINGS
from toolkit.recipe.training import PpoSection

pytestmark = pytest.mark.invariant

SIZES = {"per_device_train_batch_size": 8, "samples_per_prompt": 2, "num_mini_batches": 2, "use_cpu": True}


def test_settings_that_recipes_have_too_are_explained_by_one_text() -> None:
    by_name = {f.name: f for f in fields(PPOConfig)}
    assert len(SHARED_SETTINGS) == 38
    for name in SHARED_SETTINGS:
        text = PpoSection.model_fields[name].description
        assert text and by_name[name].metadata["help"] == text.replace("null", "None"), name


def test_every_setting_of_ppo_is_explained() -> None:
    assert all(f.metadata.get("help") for f in fields(PPOConfig) if f.name in PPOConfig.__annotations__)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"per_device_train_batch_size": 7}, "7 responses does not divide by samples_per_prompt = 2"),
        ({"num_mini_batches": 5}, "4 prompts in a rollout do not fill 5 mini-batches"),
        ({"kl_estimator": "k2"}, "kl_estimator must be one of k1, k3, not 'k2'"),
        ({"value_head_init": "policy"}, "value_head_init must be one of reward_model, zero, not 'policy'"),
        ({"dual_clip": 0.9}, "dual_clip must be a number > 1 or None, not 0.9"),
        ({"missing_eos_penalty": 1.0}, "reward truncated"),
        (
            {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"},
            "only the weights that training changes",
        ),
        ({"push_to_hub": True}, "only the weights that training changes"),
        ({"share_trunk": True, "value_learning_rate": 0.5}, "learns at the policy's rate"),
        ({"advantage": "rloo", "samples_per_prompt": 1}, "needs other samples of the same prompt"),
        ({"advantage": "rloo", "share_trunk": True}, "no critic to share a trunk with"),
        ({"advantage": "rloo", "critic_warmup_rollouts": 1}, "no critic to warm up"),
        ({"advantage": "grpo"}, "advantage must be one of gae, rloo, not 'grpo'"),
        ({"temperature": 0.0}, "temperature must be a number > 0, not 0.0"),
        ({"gamma": 1.1}, "gamma must be a number >= 0 and <= 1, not 1.1"),
        ({"lam": -0.1}, "lam must be a number >= 0 and <= 1, not -0.1"),
        ({"ema_decay": 1.0}, "ema_decay must be a number >= 0 and < 1 or None, not 1.0"),
        ({"adaptive_kl": True, "kl_coef": 0.0}, "multiplies a KL coefficient of 0"),
        ({"fsdp": "full_shard"}, "every process holds the whole models"),
        ({"fp16": True}, "fp32 or bf16"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        PPOConfig(str(tmp_path), **(SIZES | values))
