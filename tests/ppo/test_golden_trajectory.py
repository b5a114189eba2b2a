"""PPO's numbers over three rollouts, as they were recorded: what changes them without being meant to shows here.

``python tests/ppo/test_golden_trajectory.py`` records them again, for a change that is meant to.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from peft import LoraConfig

from toolkit.ppo import PPOConfig, PPOTrainer

pytestmark = pytest.mark.golden

RECORDED = Path(__file__).with_name("golden_trajectory.json")
PROMPTS = [{"prompt": f"The {noun} was"} for noun in ("film", "hotel", "food", "book")]
KINDS: dict[str, dict[str, Any]] = {
    "adapters": {"peft_config": True},
    "trunk": {"peft_config": True, "share_trunk": True, "kl_estimator": "k3", "whiten_rewards": True},
    "full": {"peft_config": False, "vf_coef": 0.5, "temperature": 0.8},
}


def few_letters(completions: list[str], **_: Any) -> list[float]:
    return [-len(set(text)) / 10 for text in completions]


def trajectory(out: Path, *, peft_config: bool, **options: Any) -> list[dict[str, float]]:
    args = PPOConfig(
        str(out),
        # With a large epsilon Adam's steps are proportional to the gradients, and rounding stays rounding.
        learning_rate=0.3 if peft_config else 1e-3,
        adam_epsilon=1.0,
        per_device_train_batch_size=8,
        samples_per_prompt=2,
        total_episodes=24,
        num_ppo_epochs=2,
        num_mini_batches=2,
        response_length=10,
        stop_token_ids=[2, *range(9, 2048, 7)],  # so that some responses end, and have a score of their own
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear") if peft_config else None
    trainer = PPOTrainer("tiny", args, few_letters, PROMPTS, peft_config=lora)
    trainer.train()
    compared = ("loss", "grad_norm", "objective/", "policy/", "value/", "length/", "eos_rate", "tokens")
    logs = [log for log in trainer.state.log_history if "loss" in log]
    # A token whose ratio lies on the clip counts or does not, by its last bit.
    return [{n: v for n, v in log.items() if n.startswith(compared) and "clip_fraction" not in n} for log in logs]


@pytest.mark.parametrize("kind", KINDS)
def test_the_trajectory_is_the_recorded_one(kind: str, tmp_path: Path) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[kind]
    logs = trajectory(tmp_path, **KINDS[kind])
    assert len(logs) == len(recorded) == 12
    for log, expected in zip(logs, recorded, strict=True):
        assert log == pytest.approx(expected, rel=2e-3, abs=1e-4)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        logs = {kind: trajectory(Path(folder) / kind, **options) for kind, options in KINDS.items()}
    RECORDED.write_text(json.dumps(logs, indent=1) + "\n", encoding="utf-8")
    sys.stderr.write(f"recorded: {RECORDED}\n")
