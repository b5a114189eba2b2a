"""Policy and critic at once, each on half of the threads: the numbers, weights and settings are those of one by one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from toolkit.ppo import PPOConfig, PPOTrainer, side_by_side
from toolkit.ppo.actors import SharedBase
from toolkit.tree_batch import Tree

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
PROMPTS = [{"prompt": f"The film was {word}"} for word in ("good", "bad", "long", "new")]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def made(out: Path, **values: Any) -> PPOTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "samples_per_prompt": 2,
        "total_episodes": 16,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "response_length": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    torch.manual_seed(0)
    return PPOTrainer("tiny", PPOConfig(**(settings | values)), lengths, PROMPTS, peft_config=LORA)


def lengths(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [-float(len(ids)) for ids in completion_ids]


def trained(trainer: PPOTrainer) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    timeless = [{k: v for k, v in log.items() if not k.startswith("speed/")} for log in logs]
    return timeless, {name: weight.clone() for name, weight in trainer.actors.trained_state().items()}


MORE = ({}, {"bf16": True}, {"gradient_accumulation_steps": 2}, {"critic_warmup_rollouts": 1})


@pytest.mark.parametrize("more", MORE, ids=lambda more: next(iter(more), "plain"))
def test_training_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]) -> None:
    calls: list[None] = []
    both = side_by_side.both
    monkeypatch.setattr(side_by_side, "both", lambda *work: calls.append(None) or both(*work))
    logs, weights = trained(made(tmp_path / "beside", **more))
    # A pass of each rollout, the updates' backward passes, and those of their forward passes that were not kept.
    assert len(calls) >= 2 * 2 + 4
    calls.clear()
    monkeypatch.setattr(side_by_side, "can", lambda device: False)
    expected, of = trained(made(tmp_path / "apart", **more))
    assert not calls and logs[0]["policy/first_ratio_error"] == 0
    assert logs == [pytest.approx(log, rel=1e-4, abs=1e-6) for log in expected]
    assert weights.keys() == of.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, of[name], rtol=1e-3, atol=2e-5)


def test_the_critic_has_the_policys_weights_and_its_own_adapter(tmp_path: Path) -> None:
    actors = made(tmp_path).actors
    assert isinstance(actors, SharedBase) and actors.critic is not None
    ours = {id(weight) for weight in actors.policy.parameters()}
    assert {id(weight) for weight in actors.critic.parameters()} <= ours
    batch = actors.engine.pack([Tree([300, 301], [[7, 8, 9], [11, 2]])])
    torch.nn.init.normal_(actors.value_head.weight)
    with torch.no_grad():
        logps, values = actors.policy_logps(batch, 1.0)[0], actors.values(batch)
        for name, weight in actors.named_parameters():
            if ".critic.lora" in name or "lora_B.critic" in name:
                weight.add_(0.1)
        assert torch.equal(actors.policy_logps(batch, 1.0)[0], logps)
        assert not torch.allclose(actors.values(batch), values)
        together = actors.logps_and_values(batch, 1.0)
        torch.testing.assert_close(together[0], logps)  # another number of threads may sum in another order
        torch.testing.assert_close(together[2], actors.values(batch))


@pytest.mark.parametrize("more", [{"share_trunk": True}, {"gradient_checkpointing": True}])
def test_one_by_one_where_it_must_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]) -> None:
    monkeypatch.setattr(side_by_side, "both", lambda *_: pytest.fail("side by side"))
    trainer = made(tmp_path, **more)
    if "gradient_checkpointing" not in more:
        trainer.train()
        return
    trainer.actors.activation_checkpointing_enable()
    batch = trainer.actors.engine.pack([Tree([300, 301], [[7, 8, 9], [11, 2]])])
    trainer.actors.train()
    logps, _, values = trainer.actors.logps_and_values(batch, 1.0)
    (logps.sum() + values.sum()).backward()
    assert trainer.actors.critic.is_gradient_checkpointing


def test_both_have_the_callers_settings_and_half_of_its_threads() -> None:
    def seen() -> tuple[Any, ...]:
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        here = threading.current_thread() is threading.main_thread()
        return here, torch.get_num_threads(), torch.is_grad_enabled(), product.dtype

    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16, enabled=not gradients):
            dtype = torch.float32 if gradients else torch.bfloat16
            assert side_by_side.both(seen, seen) == ((True, 1, gradients, dtype), (False, 1, gradients, dtype))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("first", [True, False])
def test_an_error_of_either_arrives_when_both_are_done(first: bool) -> None:
    done: list[str] = []

    def fails() -> None:
        done.append("failed")
        raise ValueError("broken")

    def works() -> None:
        threading.Event().wait(0.05)
        done.append("worked")

    with pytest.raises(ValueError, match="broken"):
        side_by_side.both(*((fails, works) if first else (works, fails)))
    assert sorted(done) == ["failed", "worked"] and torch.get_num_threads() == 2
