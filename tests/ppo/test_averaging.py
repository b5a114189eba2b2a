"""The moving average of the policy's weights, and the reference that is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ppo_models import LORA_CONFIG as LORA
from support.ppo_trainers import PROMPTS, config, length_reward, train

from toolkit.errors import RecipeError
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


@pytest.mark.parametrize("peft_config", [LORA, None], ids=["adapters", "all weights"])
def test_the_reference_follows_the_policy_after_each_rollout(tmp_path: Path, peft_config: Any, new_tiny: Any) -> None:
    """Three rollouts of two updates each, against the equation in fp64 and models whose weights are set to it."""
    args = config(tmp_path, reference_decay=0.75, total_episodes=24, kl_coef=0.3)
    trainer = PPOTrainer("tiny", args, length_reward, PROMPTS, peft_config=peft_config)
    average = trainer.models.averaged_reference
    assert average is not None

    def weights() -> list[torch.Tensor]:
        return [weight.detach().double().clone() for weight in trainer.models.policy_parameters()]

    expected, step, kl = weights(), trainer.training_step, []

    def watched(model: Any, inputs: Any, *more: Any, **options: Any) -> torch.Tensor:
        nonlocal expected
        if inputs["update"] == 0 and inputs["rollout"]:  # the updates before it are done, its samples are not drawn
            expected = [0.75 * a + 0.25 * w for a, w in zip(expected, weights(), strict=True)]
        for averaged, exact in zip(average.averages, expected, strict=True):
            torch.testing.assert_close(averaged.double(), exact, rtol=0, atol=1e-6)
        before = weights()
        loss = step(model, inputs, *more, **options)
        if inputs["update"] == 0:
            rollout = trainer.rollout
            assert rollout is not None
            kl.append(mean_kl(trainer, rollout, expected))
            for weight, same in zip(weights(), before, strict=True):
                assert torch.equal(weight, same)  # the policy's are back in place
        return loss

    trainer.training_step = watched  # type: ignore[method-assign]
    logs = train(trainer)
    firsts = [log for log in logs if "objective/kl" in log]
    assert [log["objective/kl_averaged_reference"] for log in firsts] == pytest.approx(kl, abs=1e-4)
    assert firsts[0]["objective/kl"] == kl[0] == 0
    assert abs(firsts[2]["objective/kl"] - kl[2]) > 1e-3  # the one to the policy that training started from
    for log in firsts:
        penalty = log["objective/score_shaped"] - log["objective/rlhf_reward"]
        assert penalty == pytest.approx(0.3 * log["objective/kl_averaged_reference"], abs=1e-4)


def mean_kl(trainer: PPOTrainer, rollout: Any, reference: list[torch.Tensor]) -> float:
    """Mean log pi / pi_ref of the rollout's responses, with the reference's weights in the policy's place."""
    models, per_response = trainer.models, []
    batches = [item.batch for minibatch in rollout.minibatches for item in minibatch]
    for batch in batches:
        latest = [weight.detach().clone() for weight in models.policy_parameters()]
        with torch.no_grad():
            policy, _ = models.policy_logps(batch, 1.0)
            for weight, value in zip(models.policy_parameters(), reference, strict=True):
                weight.copy_(value)
            averaged, _ = models.policy_logps(batch, 1.0)
            for weight, value in zip(models.policy_parameters(), latest, strict=True):
                weight.copy_(value)
        per_response += torch.zeros(batch.n_responses).index_add(0, batch.owner, policy - averaged).tolist()
    return sum(per_response) / len(per_response)


def test_a_reference_without_memory_is_the_policy_itself(tmp_path: Path) -> None:
    """The KL to it is exactly 0; that to the policy that training started from, with its limit, is not."""
    args = config(tmp_path, reference_decay=0.0, kl_coef=5.0)
    trainer = PPOTrainer("tiny", args, length_reward, PROMPTS, peft_config=LORA, eval_dataset=PROMPTS)
    logs = [log for log in train(trainer) if "objective/kl" in log]
    assert [log["objective/kl_averaged_reference"] for log in logs] == [0, 0]
    assert logs[1]["objective/kl"] != 0 and trainer.evaluate()["eval_objective/kl"] != 0
    assert [log["objective/rlhf_reward"] for log in logs] == [log["objective/score_shaped"] for log in logs]


def test_an_averaged_reference_is_no_named_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="starts as the policy"):
        PPOTrainer(
            "tiny", config(tmp_path, reference_decay=0.9), length_reward, PROMPTS, reference="tiny", peft_config=LORA
        )
