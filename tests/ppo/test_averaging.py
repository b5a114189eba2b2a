"""The moving average of the policy's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ppo_models import LORA_CONFIG as LORA
from support.ppo_trainers import PROMPTS, config, length_reward

from toolkit.ppo import PPOTrainer

pytestmark = pytest.mark.invariant


def test_the_average_is_what_its_equation_says(tmp_path: Path) -> None:
    trainer = PPOTrainer("tiny", config(tmp_path, ema_decay=0.9), length_reward, PROMPTS, peft_config=LORA)

    def weights() -> list[torch.Tensor]:
        return [weight.detach().double().clone() for weight in trainer.models.policy_parameters()]

    expected = weights()
    step = trainer.training_step
    states: list[list[torch.Tensor]] = []

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        if trainer.state.global_step:
            states.append(weights())
        return step(*args, **kwargs)

    trainer.training_step = watched  # type: ignore[method-assign]
    trainer.train()
    states.append(weights())
    for state in states:
        expected = [0.9 * average + 0.1 * weight for average, weight in zip(expected, state, strict=True)]
    assert trainer.average is not None and len(states) == 4
    for average, exact in zip(trainer.average.averages, expected, strict=True):
        torch.testing.assert_close(average.double(), exact, rtol=0, atol=1e-7)
